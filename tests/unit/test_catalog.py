"""The catalogue is sound in itself: what it names exists, what it offers can run somewhere."""

from __future__ import annotations

import re

import pytest

from fleet import command, options
from fleet.catalog import catalog, holds
from fleet.placement import illegal, service_memory, unsupported
from fleet.spec import COMMIT, Service

KNOWN = catalog()
FAIR_TOKENS = 65_536
OFFERS = [
    pytest.param(name, recipe_name, id=f"{name.split('/')[1]}-{recipe_name}")
    for name in KNOWN.models
    for recipe_name, recipe in KNOWN.recipes_of(name).items()
    if recipe.device == "gpu"
]


def test_the_models_of_the_family_are_there() -> None:
    assert set(KNOWN.models) >= {
        *(f"MiniMaxAI/MiniMax-M1-{size}" for size in ("40k", "80k")),
        *(f"MiniMaxAI/MiniMax-M{version}" for version in ("2", "2.1", "2.5", "2.7", "3")),
        "MiniMaxAI/MiniMax-M3-MXFP8",
        "nvidia/MiniMax-M2.5-NVFP4",
        "nvidia/MiniMax-M2.7-NVFP4",
        "RedHatAI/MiniMax-M2-NVFP4",
        "nvidia/MiniMax-M3-NVFP4",
    }


def test_the_gpu_kinds_that_users_have_are_there() -> None:
    assert set(KNOWN.gpus) >= {
        *("h20-96", "h20-141", "h800-80", "h100-80", "h200-141", "a100-80", "a800-80"),
        *("b200", "b300", "rtx-pro-6000"),
    }


@pytest.mark.parametrize(("model", "recipe_name"), OFFERS)
def test_a_recipe_can_run_where_its_source_names_it(model: str, recipe_name: str) -> None:
    card, recipe = KNOWN.models[model], KNOWN.recipes_of(model)[recipe_name]

    assert not list(illegal(card, recipe.parallel))
    kinds = [KNOWN.gpus[kind] for kind in recipe.kinds]
    capable = [kind for kind in kinds if not list(unsupported(card, recipe, kind))]
    assert capable
    if card.loaded is None:
        return
    version = next(v for v in reversed(options.recorded_versions()) if card.accepts(v))
    for kind in capable:
        held = service_memory(card, recipe.parallel, kind, recipe.arguments(version), version)
        assert held is not None
        # Some sources name hardware on which the full length does not fit; a fair one must.
        assert held.largest_max_model_len >= min(card.context_tokens, FAIR_TOKENS), kind.name


@pytest.mark.parametrize(("model", "recipe_name"), OFFERS)
def test_a_recipe_is_taken_by_every_recorded_vllm_that_serves_its_model(
    model: str, recipe_name: str
) -> None:
    card, recipe = KNOWN.models[model], KNOWN.recipes_of(model)[recipe_name]
    service = Service(
        name="a", model=model, revision="0" * 40, recipe=recipe_name, gpus=[], port=8000
    )
    versions = [
        version
        for version in options.recorded_versions()
        if card.accepts(version) and holds(recipe.vllm, version)
    ]

    assert versions
    for version in versions:
        words = command.options(service, recipe, version)
        env = command.environment(service, recipe, version, release="/r", state="/s")
        findings = [
            *options.check_options(words, version, entrypoint=recipe.entrypoint),
            *options.check_environment(env, version),
        ]
        assert findings == [], version


@pytest.mark.parametrize(("model", "recipe_name"), OFFERS)
def test_a_recipes_parsers_are_its_models(model: str, recipe_name: str) -> None:
    card, recipe = KNOWN.models[model], KNOWN.recipes_of(model)[recipe_name]
    for flag, names in (
        ("tool-call-parser", card.parsers.tool),
        ("reasoning-parser", card.parsers.reasoning),
    ):
        if flag in recipe.args:
            assert recipe.args[flag].value in names


def test_a_variation_is_its_recipe_with_its_change() -> None:
    recipes = KNOWN.recipes_of("MiniMaxAI/MiniMax-M2.5")

    both = recipes["tp4-piecewise-responses"]
    assert both.base == "tp4"
    assert both.parallel == recipes["tp4"].parallel
    assert both.args["reasoning-parser"].value == "minimax_m2"
    assert both.args["compilation-config"].value == {"cudagraph_mode": "PIECEWISE"}
    assert recipes["tp4"].args["reasoning-parser"].value == "minimax_m2_append_think"


def test_revisions_are_commits_with_a_reason() -> None:
    for card in KNOWN.models.values():
        for revision, reason in card.remote_code.revisions.items():
            assert COMMIT.fullmatch(revision)
            assert reason


def test_weights_are_what_their_shape_says() -> None:
    """Experts by layers × experts × three matrices; within 2 % of what is said to be loaded."""
    bytes_each = {"fp8": 1, "none": 2, "nvfp4": 4.5 / 8, "mxfp8": 1 + 1 / 32}
    layers = {"minimax-m3": 57}  # the first three of its 60 are dense
    for name, card in KNOWN.models.items():
        shape, loaded = card.shape, card.loaded
        if shape is None or loaded is None or shape.experts is None or shape.expert_width is None:
            continue
        moe = layers.get(card.family, shape.layers)
        parameters = moe * shape.experts * 3 * shape.hidden * shape.expert_width
        expected = parameters * bytes_each[card.quantisation]
        assert loaded.expert_bytes == pytest.approx(expected, rel=0.02), name


@pytest.mark.parametrize(
    ("specifier", "version", "expected"),
    [
        ("", "0.9.2", True),
        (">=0.11.1", "0.11.0", False),
        (">=0.11.1", "0.33.0+cu129", True),
        (">=0.9.2,<=0.23.0", "0.23.1", False),
        (">=0.13.0", "0.13.0rc1", False),
        ("==9.0", "9.0", True),
    ],
)
def test_version_ranges(specifier: str, version: str, expected: bool) -> None:
    assert holds(specifier, version) is expected


def test_contradictions_name_what_is_wrong_and_why() -> None:
    assert len(KNOWN.contradictions) > 20
    for row in KNOWN.contradictions:
        assert row.said
        assert row.truth
        assert row.reason
        assert not re.search(r"\s{2,}", row.reason)
