"""Recipe files in the schema of vllm-project/recipes: what is read of them, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.catalog import LoadedWeights, Parallel, Shape, catalog
from fleet.recipefile import (
    LONGEST_FILE,
    Reading,
    RecipeFileError,
    loaded_weights,
    read,
    shape_of,
)
from fleet.spec import Argument, GpuKind

RECIPES = Path(__file__).parent / "recipes"
HERON = (RECIPES / "Heron-80B.yaml").read_text(encoding="utf-8")
WREN = (RECIPES / "Wren-7B.yaml").read_text(encoding="utf-8")
NAME = "recipes/Heron-80B.yaml"
HERON_DOCUMENT = yaml.safe_load(HERON)
WREN_DOCUMENT = yaml.safe_load(WREN)


def kind(compute_capability: str) -> GpuKind:
    return GpuKind(
        name="NVIDIA GPU",
        memory_mib=143_771,
        compute_capability=compute_capability,
        nvswitch=True,
    )


AMPERE, HOPPER, BLACKWELL, WORKSTATION = kind("8.0"), kind("9.0"), kind("10.0"), kind("12.0")


def heron(strategy: str = "single_node_tp", **changes: Any) -> Reading:
    """Heron on Hoppers of a kind that recipes know, as many as it asks for."""
    choice: dict[str, Any] = {"gpu": ("h200-141", HOPPER), "gpus": 4} | changes
    return read(NAME, choice.pop("text", HERON), strategy=strategy, **choice)


def changed(document: dict[str, Any] = HERON_DOCUMENT, **changes: Any) -> str:
    """A recipe file with other values at some paths: `model__install={"pip": False}`."""
    document = copy.deepcopy(document)
    for path, value in changes.items():
        *outer, last = path.split("__")
        part = document
        for key in outer:
            part = part[key]
        part[last] = value
    return json.dumps(document, default=str)  # JSON is YAML, and quicker to write


def refusal(strategy: str = "single_node_tp", **changes: Any) -> RecipeFileError:
    with pytest.raises(RecipeFileError) as caught:
        heron(strategy, **changes)
    assert "\n" not in str(caught.value)
    return caught.value


def flags(reading: Reading) -> dict[str, Argument]:
    return {name: setting.value for name, setting in reading.recipe.args.items()}


def variables(reading: Reading) -> dict[str, Argument]:
    return {name: setting.value for name, setting in reading.recipe.env.items()}


def config(name: str) -> dict[str, Any]:
    document = json.loads((RECIPES / f"{name}.config.json").read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


class TestCommand:
    def test_base_then_hardware_then_features_and_the_last_value_wins(self) -> None:
        assert list(flags(heron()).items()) == [
            ("trust-remote-code", True),
            ("attention-config.use_prefill_cache", "True"),
            ("max-num-seqs", 128),
            ("no-enable-prefix-caching", True),
            ("enable-auto-tool-choice", True),
            ("tool-call-parser", "hermes"),
            ("chat-template", "examples/heron.jinja"),
            ("reasoning-parser", "qwen3"),
        ]

    def test_every_flag_and_variable_names_the_file(self) -> None:
        recipe = heron().recipe

        assert {setting.source for setting in (*recipe.args.values(), *recipe.env.values())} == {
            NAME
        }

    def test_variables_are_texts_and_those_of_the_plan_are_left_out(self) -> None:
        assert variables(heron()) == {"HERON_BASE": "1", "HERON_HOPPER": "1"}

    def test_a_strategys_own_hardware_stands_instead_of_the_recipes(self) -> None:
        reading = heron("single_node_tep", gpus=8)

        found = flags(reading)
        assert found["block-size"] == 64
        assert found["max-num-seqs"] == 256
        assert found["enable-prefix-caching"] is True
        assert "no-enable-prefix-caching" not in found
        assert variables(reading) == {"HERON_BASE": "0"}

    def test_the_very_gpu_is_added_to_its_generation(self) -> None:
        assert flags(heron("single_node_tep", gpu=("h100-80", HOPPER)))["block-size"] == 32

    def test_a_gpu_that_recipes_do_not_know_is_of_its_generation(self) -> None:
        for key in ("h20-96", "h20-141", "h800-80"):
            assert flags(heron(gpu=(key, HOPPER))) == flags(heron())

    def test_the_brand_stands_in_for_a_generation_that_is_not_there(self) -> None:
        found = flags(heron(gpu=("b200", BLACKWELL)))

        assert found["attention-backend"] == "FLASH_ATTN"
        assert found["max-num-seqs"] == 256

    def test_a_host_without_gpus_takes_nothing_of_nvidia(self) -> None:
        reading = read("recipes/Wren-7B.yaml", WREN, strategy="single_node_tp", gpu=None, gpus=0)

        assert reading.recipe.device == "cpu"
        assert reading.recipe.parallel == Parallel()
        assert flags(reading) == {}

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--max-num-seqs", "64"], {"max-num-seqs": 64}),
            (["--max-num-seqs=64"], {"max-num-seqs": 64}),
            (["--max_num_seqs", 64], {"max-num-seqs": 64}),
            (["--gpu-memory-utilization", "0.95"], {"gpu-memory-utilization": 0.95}),
            (["--gpu-memory-utilization", "0.90"], {"gpu-memory-utilization": "0.90"}),
            (["--max-model-len auto"], {"max-model-len": "auto"}),
            (["--max-model-len", "-1"], {"max-model-len": -1}),
            (["--seed", "1e400"], {"seed": "1e400"}),
            (["--enforce-eager"], {"enforce-eager": True}),
            (["--no-enable-chunked-prefill"], {"no-enable-chunked-prefill": True}),
            (["--hf-overrides", '{"a": {"b": 1}}'], {"hf-overrides": {"a": {"b": 1}}}),
            (["--hf-overrides={}"], {"hf-overrides": {}}),
            (["--chat-template", "{% for m %}"], {"chat-template": "{% for m %}"}),
            (["--cudagraph-capture-sizes", "1", "2"], {"cudagraph-capture-sizes": [1, 2]}),
            (["--allowed-origins", '["*"]'], {"allowed-origins": ["*"]}),
            (["-cc.use_graph_partition=True"], {"compilation-config.use_graph_partition": "True"}),
            (["--attention_config.backend", "FA"], {"attention-config.backend": "FA"}),
            (["--dtype", "half", "--dtype", "bfloat16"], {"dtype": "bfloat16"}),
            (["--enforce-eager", "--no-enforce-eager"], {"no-enforce-eager": True}),
            (["--host", "0.0.0.0", "--port=1", "--api-key", "k"], {}),
        ],
    )
    def test_words_are_read_as_vllm_reads_them(
        self, words: list[object], expected: dict[str, Argument]
    ) -> None:
        text = changed(WREN_DOCUMENT, model__base_args=words)

        reading = read("w", text, strategy="single_node_tp", gpu=("b200", BLACKWELL), gpus=1)

        assert flags(reading) == expected


class TestFeatures:
    def test_named_ones_are_on_instead_of_the_default(self) -> None:
        found = flags(heron(features=["reasoning"]))

        assert found["reasoning-parser"] == "qwen3"
        assert "tool-call-parser" not in found

    def test_none_at_all(self) -> None:
        assert "reasoning-parser" not in flags(heron(features=[]))

    def test_a_mode_can_have_other_flags_on_other_hardware(self) -> None:
        there = heron(features=["spec_decoding"], gpu=("b200", BLACKWELL))

        assert flags(heron(features=["spec_decoding"]))["speculative-config"] == {
            "method": "mtp",
            "num_speculative_tokens": 1,
        }
        assert flags(there)["speculative-config"] == {"method": "mtp", "num_speculative_tokens": 2}

    def test_a_variants_own_mode_switches_its_feature_on(self) -> None:
        reading = heron(variant="nvfp4", gpu=("b200", BLACKWELL))

        found = flags(reading)["speculative-config"]
        assert found == {"method": "eagle3", "model": "wetland/Heron-draft"}

    def test_one_for_another_strategy_is_off_by_default_and_refused_by_name(self) -> None:
        assert "max-model-len" not in flags(heron())
        assert flags(heron("single_node_dep", gpus=8))["max-model-len"] == 131072
        assert str(refusal(features=["long_context"])) == (
            "features.long_context: is for single_node_dep, not for single_node_tp; "
            "leave it out of features"
        )

    def test_one_without_a_mode_for_the_hardware(self) -> None:
        there: dict[str, Any] = {"gpu": ("rtx-pro-6000", WORKSTATION), "gpus": 2}
        text = changed(strategy_overrides={})

        assert str(refusal(features=["spec_decoding"], text=text, **there)) == (
            "features.spec_decoding: has no mode for 'default' on rtx-pro-6000; "
            "leave it out of features"
        )

    def test_an_unknown_one(self) -> None:
        assert str(refusal(features=["reasonning"])) == (
            "features: no 'reasonning'; did you mean 'reasoning'?"
        )


class TestRanks:
    def test_tensor_parallelism_takes_the_gpus_that_the_recipe_is_for(self) -> None:
        assert heron().recipe.parallel == Parallel(tensor=4)

    def test_another_number_is_told(self) -> None:
        found = refusal(gpus=8)

        assert found.gpus == 4
        assert str(found) == (
            "strategy_overrides.single_node_tp.tp: asks for 4 GPUs and the service has 8; give it 4"
        )

    def test_a_variants_number_comes_first_and_may_depend_on_the_gpu(self) -> None:
        found = refusal(variant="bf16", gpu=("h100-80", HOPPER), gpus=4)

        assert str(found) == ("variants.bf16.tp: asks for 8 GPUs and the service has 4; give it 8")
        assert heron(variant="bf16").recipe.parallel == Parallel(tensor=4)

    def test_without_a_number_it_takes_all(self) -> None:
        text = changed(strategy_overrides={})

        assert heron(text=text, gpus=2).recipe.parallel == Parallel(tensor=2)

    def test_expert_parallelism(self) -> None:
        assert heron("single_node_tep", gpus=8).recipe.parallel == Parallel(tensor=8, expert=True)

    def test_the_recipes_own_ranks_win(self) -> None:
        expected = Parallel(tensor=2, data=4, expert=True)

        assert heron("single_node_dep", gpus=8).recipe.parallel == expected

    def test_own_ranks_on_other_gpus_are_told(self) -> None:
        found = refusal("single_node_dep", gpus=4)

        assert found.gpus == 8
        assert str(found) == (
            "strategy_overrides.single_node_dep.vllm_args[2]: TP2+DP4+EP runs on 8 GPUs and the "
            "service has 4; give it 8"
        )

    def test_a_floor_of_gpus(self) -> None:
        assert str(refusal("single_node_dep", gpus=2)) == (
            "strategy_min_gpus.single_node_dep: single_node_dep takes at least 4 GPUs, and the "
            "service has 2; give it 4"
        )
        assert str(refusal(gpu=("a100-80", AMPERE), gpus=4)) == (
            "strategy_min_gpus.a100: single_node_tp takes at least 8 GPUs, and the service has 4; "
            "give it 8"
        )

    def test_experts_are_not_spread_over_one_gpu(self) -> None:
        assert str(refusal("single_node_tep", gpus=1)) == (
            "compatible_strategies: single_node_tep takes at least 2 GPUs, and the service has 1; "
            "give it 2"
        )


class TestCard:
    def test_without_the_models_config_its_memory_is_unknown(self) -> None:
        card = heron().card

        assert (card.shape, card.loaded) == (None, None)
        assert card.family == NAME
        assert card.architecture == "moe"
        assert card.vllm == ">=0.20.0"
        assert card.vllm_source == f"{NAME}: model.min_vllm_version"
        assert card.context_tokens == 131072
        assert card.weights_bytes == 80_000_000_000
        assert card.quantisation == "fp8"
        assert card.quantisation_block is None
        assert card.parsers.tool == ["hermes"]
        assert card.parsers.reasoning == ["qwen3"]
        assert card.remote_code.needed
        assert card.licence is None

    def test_with_it(self) -> None:
        card = heron(config=config("Heron-80B")).card

        assert card.architecture == "HeronForCausalLM"
        assert card.quantisation_block == 128
        assert card.shape is not None
        # 48 layers × 344 experts × 3 × 2048 × 768 parameters at a byte.
        assert card.loaded == LoadedWeights(
            total_bytes=80_000_000_000 + 2 * 100_000 * 2048, expert_bytes=77_913_391_104
        )
        assert card.weights_bytes == card.loaded.total_bytes

    def test_a_variant_has_its_own_repository_version_and_precision(self) -> None:
        reading = heron(variant="bf16")

        assert reading.model == "wetland/Heron-80B-BF16"
        assert reading.recipe.models == ["wetland/Heron-80B-BF16"]
        assert reading.card.vllm == ">=0.22.1"
        assert reading.card.vllm_source == f"{NAME}: variants.bf16.min_vllm_version"
        assert reading.card.quantisation == "none"
        assert reading.card.weights_bytes == 160_000_000_000

    @pytest.mark.parametrize(
        ("variant", "least"),
        [("default", "8.0"), ("bf16", "7.5"), ("nvfp4", "10.0"), ("wide_fp4", "8.0")],
    )
    def test_the_least_that_a_precision_runs_on(self, variant: str, least: str) -> None:
        assert heron(variant=variant).card.compute_capability == least

    def test_the_context_is_the_configs_where_the_recipe_has_none(self) -> None:
        text = changed(model__context_length=None)

        assert heron(text=text, config=config("Heron-80B")).card.context_tokens == 131072
        assert str(refusal(text=text)) == (
            "model.context_length: missing; write it, or give the model's config.json"
        )

    def test_a_config_that_is_not_understood_leaves_memory_unknown_and_says_so(self) -> None:
        reading = heron(config={"hidden_size": 2048})

        assert reading.card.shape is None
        assert reading.notes[-1] == ("memory is unknown: config.json: num_hidden_layers is missing")

    def test_notes_say_what_the_recipe_wants_besides(self) -> None:
        assert heron().notes == (
            "dependencies[0]: Kernels of its own: uv pip install heron-kernels==1.2",
            "features.tool_calling.args[3]: --chat-template examples/heron.jinja is a file that "
            "vLLM's wheel does not have; put it on the host, and its absolute path in args",
        )

    def test_an_image_of_its_own_is_noted_and_a_releases_is_not(self) -> None:
        image = "vllm/vllm-openai:heron"
        note = f"model.docker_image: {image} is recommended; the plan uses vLLM's wheel"

        for given_as in (image, {"nvidia": image}, {"nvidia": {"cu130": image}}, {"cu129": image}):
            assert note in heron(text=changed(model__docker_image=given_as)).notes
        for given_as in ("vllm/vllm-openai:v0.20.0", {"amd": "vllm/vllm-openai-rocm:x"}):
            notes = heron(text=changed(model__docker_image=given_as)).notes
            assert not any("docker_image" in line for line in notes)


class TestRefused:
    @pytest.mark.parametrize(
        ("choice", "error"),
        [
            (
                {"strategy": "multi_node_dep"},
                "compatible_strategies: 'multi_node_dep' spans hosts, and a service is on one; "
                "use single_node_tp or single_node_tep or single_node_dep",
            ),
            (
                {"strategy": "pd_cluster"},
                "compatible_strategies: 'pd_cluster' spans hosts, and a service is on one; "
                "use single_node_tp or single_node_tep or single_node_dep",
            ),
            (
                {"strategy": "tp4"},
                "compatible_strategies: 'tp4' is no strategy; "
                "use single_node_tp or single_node_tep or single_node_dep",
            ),
            ({"variant": "nvpf4"}, "variants: no 'nvpf4'; did you mean 'nvfp4'?"),
            (
                {"variant": "q"},
                "variants: no 'q'; it has default, bf16, nvfp4, mxfp4, int8, wide_fp4",
            ),
            (
                {"variant": "mxfp4"},
                "variants.mxfp4.supported_hardware: names mi355x, b200, and not h200-141; "
                "use another variant (default, bf16, nvfp4, int8, wide_fp4)",
            ),
            (
                {"variant": "int8"},
                "variants.int8.precision_hardware: this variant is for AMD, not for h200-141; "
                "use another variant (default, bf16, nvfp4, mxfp4, wide_fp4)",
            ),
            (
                {"gpu": ("b300", kind("10.3"))},
                "meta.hardware.b300: the model does not run on b300; use other hardware",
            ),
        ],
    )
    def test_what_a_service_asks_for(self, choice: dict[str, Any], error: str) -> None:
        assert str(refusal(**choice)) == error

    def test_a_strategy_that_the_recipe_does_not_have(self) -> None:
        with pytest.raises(RecipeFileError) as caught:
            read("w", WREN, strategy="single_node_tep", gpu=None, gpus=0)

        assert str(caught.value) == (
            "compatible_strategies: no 'single_node_tep'; use single_node_tp"
        )

    def test_a_strategy_that_one_gpu_has_and_another_has_not(self) -> None:
        gates = {"single_node_tp": {"hopper": "unsupported", "h200": "supported"}}
        text = changed(strategy_hardware=gates)

        assert heron(text=text).recipe.parallel.tensor == 4
        assert str(refusal(text=text, gpu=("h100-80", HOPPER))) == (
            "strategy_hardware.single_node_tp.hopper: 'single_node_tp' is not for h100-80; "
            "use single_node_tep or single_node_dep"
        )

    def test_a_kind_that_recipes_do_not_know_may_stand_for_those_of_its_generation(self) -> None:
        assert heron(variant="wide_fp4", gpu=("h20-141", HOPPER)).model == "wetland/Heron-80B"

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            (
                {"omni": {"tasks": []}},
                "omni: is served by vLLM-Omni, not by `vllm serve`; no plan can be made of it",
            ),
            (
                {"meta__tasks": ["omni"]},
                "meta.tasks: is served by vLLM-Omni, not by `vllm serve`; no plan can be made of it",
            ),
            (
                {"meta__tasks": ["embedding"]},
                "meta.tasks: embedding is no chat, which a service must answer to be in service; "
                "run it apart from the fleet",
            ),
            (
                {"model__install": {"docker": {}, "pip": False}},
                "model.install.pip: no wheel of vLLM serves it, only an image; the fleet runs "
                "published wheels, so wait for a release",
            ),
            (
                {"model__nightly_required": True},
                "model.nightly_required: asks for a nightly build; the fleet runs published wheels, "
                "so wait for a release",
            ),
            (
                {"model__min_vllm_version": "nightly"},
                "model.min_vllm_version: asks for a nightly build; the fleet runs published wheels, "
                "so wait for a release",
            ),
            (
                {"model__min_vllm_version": "soon"},
                "model.min_vllm_version: 'soon' is no version of vLLM; write it as in '0.18.0'",
            ),
            (
                {"model__min_vllm_version": 0.2},
                "model.min_vllm_version: expected a text, got float; quote it",
            ),
            (
                {"model__model_id": "/models/heron"},
                "model.model_id: '/models/heron' is no repository; expected organisation/name",
            ),
            (
                {"model__base_args": "--trust-remote-code"},
                "model.base_args: expected a list, got str; see CONTRIBUTING.md of "
                "vllm-project/recipes",
            ),
            (
                {"model__base_args": ["--trust-remote-code", True]},
                "model.base_args[1]: expected a text, got bool; quote it",
            ),
            (
                {"model__base_args": ["heron", "--dtype", "half"]},
                "model.base_args[0]: 'heron' follows no flag; an option begins with '--'",
            ),
            (
                {"model__base_args": ["-x", "1"]},
                "model.base_args[0]: '-x' is no short option known here; write the long one",
            ),
            (
                {"model__base_args": ["--config", "heron.yaml"]},
                "model.base_args[0]: --config hides flags from the plan; write them out in the "
                "recipe file",
            ),
            (
                {"model__base_args": ["--pipeline-parallel-size", "two"]},
                "model.base_args[0]: --pipeline-parallel-size takes a whole number, not 'two'; see "
                "CONTRIBUTING.md of vllm-project/recipes",
            ),
            (
                {"model__base_args": ["--dtype", "ha\0lf"]},
                "model.base_args[1]: holds a NUL character, which no command line can carry; "
                "take it out",
            ),
            (
                {"model__base_env": {"NCCL_SOCKET_IFNAME": "$IFACE"}},
                "model.base_env: NCCL_SOCKET_IFNAME=$IFACE is to be filled in by hand, and no shell "
                "will; write its value",
            ),
            (
                {"model__base_env": {"A-B": "1"}},
                "model.base_env: 'A-B' is no name for an environment variable; correct it",
            ),
            (
                {"variants": {"default": ["fp8"]}},
                "variants.default: expected a mapping, got list; see CONTRIBUTING.md of "
                "vllm-project/recipes",
            ),
            (
                {"strategy_overrides__single_node_tp__tp": "four"},
                "strategy_overrides.single_node_tp.tp: expected a whole number of GPUs, got 'four'; "
                "see CONTRIBUTING.md of vllm-project/recipes",
            ),
            (
                {"hardware_overrides__hopper": "none"},
                "hardware_overrides.hopper: expected a mapping, got str; see CONTRIBUTING.md of "
                "vllm-project/recipes",
            ),
            (
                {"features__reasoning__args": {"a": 1}},
                "features.reasoning.args: expected a list, got dict; see CONTRIBUTING.md of "
                "vllm-project/recipes",
            ),
        ],
    )
    def test_what_the_file_says(self, changes: dict[str, Any], error: str) -> None:
        assert str(refusal(text=changed(**changes))) == error

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("", "the file: holds nothing; expected the keys of a recipe: model, variants, …"),
            ("- a", "the file: holds a list; expected the keys of a recipe: model, variants, …"),
            ("model: [", "line 1, column 9: "),
            ("a: !!python/object:os.system {}", "line 1, column 4: could not determine a constr"),
            ("a: !!bool x", "the file: is no YAML that can be read (KeyError); correct it"),
            (
                "a: " + "[" * 500,
                "the file: is no YAML that can be read (RecursionError); correct it",
            ),
            (
                "#" * (LONGEST_FILE + 1),
                "the file: 262,145 characters are no recipe; a recipe file ha",
            ),
            (
                "variants: {}",
                "model: missing, and every recipe has it; see CONTRIBUTING.md of vllm-",
            ),
            (
                "&a {model: *a, variants: *a}",
                "model.model_id: missing, and every recipe has it; se",
            ),
            (
                "&a {model: {model_id: *a, min_vllm_version: x}, variants: {}}",
                "model.model_id: expected a text, got dict; see CONTRIBUTING.md of vllm-project/re",
            ),
        ],
    )
    def test_what_is_no_recipe_at_all(self, text: str, error: str) -> None:
        assert str(refusal(text=text)).startswith(error)

    def test_what_is_not_asked_for_may_be_anything(self) -> None:
        """A later schema must not break what this one reads."""
        text = changed(
            variants__bf16="later", features__spec_decoding=3, strategy_overrides__pd_cluster=[1]
        )

        assert flags(heron(text=text)) == flags(heron())


class TestShape:
    def test_grouped_queries_and_experts(self) -> None:
        assert shape_of(config("Heron-80B")) == Shape(
            layers=50,
            attention_layers=50,
            attention_heads=32,
            kv_heads=4,
            head_dim=128,
            hidden=2048,
            experts=344,
            expert_width=768,
            vocabulary=100_000,
        )

    def test_latent_attention_with_an_index(self) -> None:
        found = shape_of(config("Bittern-MLA"))

        assert (found.kv_heads, found.latent_dim, found.kv_elements) == (1, 576, 576)
        assert (found.index_layers, found.index_dim) == (41, 128)
        assert (found.experts, found.expert_width) == (64, 1024)

    def test_recurrent_layers_of_a_nested_config_keep_a_state(self) -> None:
        found = shape_of(config("Grebe-Hybrid"))

        assert (found.layers, found.attention_layers) == (8, 2)
        # 6 layers of 32 × 128 × 128 elements in float32, and 3 inputs of a convolution in bf16.
        assert found.state_bytes == 6 * (4 * 32 * 128 * 128 + 2 * 3 * (2 * 16 * 128 + 32 * 128))

    def test_the_catalogues_own_models_come_out_as_the_catalogue_has_them(self) -> None:
        """M1's and M2's config.json, as far as memory needs it."""
        m1 = {
            "attn_type_list": [int(layer % 8 == 7) for layer in range(80)],
            "head_dim": 128,
            "hidden_size": 6144,
            "intermediate_size": 9216,
            "num_attention_heads": 64,
            "num_hidden_layers": 80,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "vocab_size": 200_064,
        }
        m2 = {
            "head_dim": 128,
            "hidden_size": 3072,
            "intermediate_size": 1536,
            "num_attention_heads": 48,
            "num_hidden_layers": 62,
            "num_key_value_heads": 8,
            "num_local_experts": 256,
            "vocab_size": 200_064,
        }

        assert shape_of(m1) == catalog().models["MiniMaxAI/MiniMax-M1-40k"].shape
        assert shape_of(m2) == catalog().models["MiniMaxAI/MiniMax-M2.5"].shape

    @pytest.mark.parametrize(
        ("changes", "layers"),
        [
            ({"full_attention_interval": 4, "linear_num_value_heads": 1}, 12),
            ({"hybrid_override_pattern": "ME*-" * 2, "mamba_num_heads": 1}, 2),
            ({"layers_block_type": ["conv", "attention"], "conv_L_cache": 3}, 1),
            ({"linear_attn_config": {"full_attn_layers": [4, 8], "num_heads": 1}}, 2),
            ({"num_kv_shared_layers": 10}, 40),
        ],
    )
    def test_hybrid_models_say_in_many_ways_which_layers_attend(
        self, changes: dict[str, Any], layers: int
    ) -> None:
        rest = dict.fromkeys(
            (
                *("linear_num_key_heads", "linear_key_head_dim", "linear_value_head_dim"),
                *("linear_conv_kernel_dim", "mamba_head_dim", "ssm_state_size", "conv_kernel"),
                "n_groups",
            ),
            2,
        )
        nested = changes.get("linear_attn_config")
        if nested:
            changes = {"linear_attn_config": nested | {"head_dim": 2, "short_conv_kernel_size": 4}}

        assert shape_of(config("Heron-80B") | rest | changes).attention_layers == layers

    def test_the_larger_of_two_geometries_is_counted(self) -> None:
        found = shape_of(config("Heron-80B") | {"swa_num_key_value_heads": 8, "swa_head_dim": 128})

        assert found.kv_heads == 8

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"num_attention_heads": None}, "num_attention_heads is missing"),
            ({"hidden_size": "2048"}, "hidden_size: '2048' is no count"),
            ({"num_hidden_layers": 0}, "num_hidden_layers: 0 is no count"),
            ({"kv_lora_rank": 512}, "qk_rope_head_dim is missing"),
            (
                {"compress_ratios": [4]},
                "compress_ratios: this form of KV cache is not known; its memory cannot be told",
            ),
            (
                {"layer_types": ["full_attention", "tide"]},
                "'tide' is a kind of layer that is not known",
            ),
            ({"layer_types": ["mlp"]}, "no layer keeps keys and values; its memory cannot be told"),
            (
                {"layer_types": ["mamba", "attention"]},
                "the state of its recurrent layers is not known; its memory cannot be told",
            ),
        ],
    )
    def test_what_is_missing_or_unknown_is_named(self, changes: dict[str, Any], error: str) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
            shape_of(config("Heron-80B") | changes)


class TestWeights:
    def test_the_catalogues_figures_are_met(self) -> None:
        """From M2.5's config.json and the 230B of its recipe."""
        m2 = {
            "hidden_size": 3072,
            "intermediate_size": 1536,
            "num_hidden_layers": 62,
            "num_local_experts": 256,
            "vocab_size": 200_064,
        }

        for precision, model in (
            ("fp8", "MiniMaxAI/MiniMax-M2.5"),
            ("nvfp4", "nvidia/MiniMax-M2.5-NVFP4"),
        ):
            found = loaded_weights(m2, precision, 230_000_000_000)
            expected = catalog().models[model].loaded
            assert found is not None
            assert expected is not None
            assert found.expert_bytes == pytest.approx(expected.expert_bytes, rel=0.001)
            assert found.total_bytes == pytest.approx(expected.total_bytes, rel=0.02)

    def test_a_dense_models_weights_are_all_quantised_but_its_embeddings(self) -> None:
        dense = {"hidden_size": 1000, "num_hidden_layers": 1, "vocab_size": 1000}

        assert loaded_weights(dense, "int8", 10_000_000) == LoadedWeights(total_bytes=12_000_000)
        tied = dense | {"tie_word_embeddings": True}
        assert loaded_weights(tied, "int8", 10_000_000) == LoadedWeights(total_bytes=11_000_000)

    @pytest.mark.parametrize(
        ("changes", "precision", "parameters"),
        [
            ({}, "fp8", None),
            ({}, "int2/4/8", 80_000_000_000),
            ({}, "fp8", 8_000_000_000),
            ({"hidden_size": None}, "fp8", 80_000_000_000),
        ],
    )
    def test_what_cannot_be_told_is_none(
        self, changes: dict[str, Any], precision: str, parameters: int | None
    ) -> None:
        assert loaded_weights(config("Heron-80B") | changes, precision, parameters) is None


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(document: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of everything in a document."""
    keys: Sequence[Any] = ()
    if isinstance(document, dict):
        keys = list(document)
    elif isinstance(document, list):
        keys = range(len(document))
    for key in keys:
        yield (*path, key)
        yield from places(document[key], (*path, key))


def replaced(document: Any, path: tuple[str | int, ...], value: Any) -> Any:
    outcome = part = copy.deepcopy(document)
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return outcome


def lines(text: str, strategy: str, variant: str, model_config: Any = None) -> Sequence[str]:
    """What a person is told: the reading's notes, or the one error."""
    there: dict[str, Any] = {"gpu": ("h200-141", HOPPER), "gpus": 8, "config": model_config}
    try:
        return read(NAME, text, strategy=strategy, variant=variant, **there).notes
    except RecipeFileError as error:
        return (str(error),)


class TestNoTraceback:
    @settings(max_examples=30, deadline=None)
    @given(
        place=st.sampled_from([*places(HERON_DOCUMENT)]),
        value=anything,
        strategy=st.sampled_from(["single_node_tp", "single_node_tep", "single_node_dep"]),
        variant=st.sampled_from(["default", "bf16", "nvfp4"]),
    )
    def test_anything_anywhere_in_a_recipe(
        self, place: tuple[str | int, ...], value: Any, strategy: str, variant: str
    ) -> None:
        document = replaced(HERON_DOCUMENT, place, value)

        told = lines(json.dumps(document, default=str), strategy, variant)

        assert all(line.isprintable() for line in told)

    @settings(max_examples=50, deadline=None)
    @given(
        text=st.text()
        | anything.map(json.dumps)
        | st.dictionaries(st.text(), anything).map(json.dumps)
    )
    def test_any_text(self, text: str) -> None:
        (told,) = lines(text, "single_node_tp", "default")

        assert told.isprintable()
        assert ": " in told

    @settings(max_examples=50, deadline=None)
    @given(
        name=st.sampled_from(["Heron-80B", "Bittern-MLA", "Grebe-Hybrid"]),
        place=st.integers(min_value=0, max_value=60),
        value=anything | st.integers(min_value=1 << 60),
    )
    def test_anything_anywhere_in_a_config(self, name: str, place: int, value: Any) -> None:
        document = config(name)
        paths = [*places(document)]
        document = replaced(document, paths[place % len(paths)], value)

        told = lines(HERON, "single_node_dep", "default", document)

        assert all(line.isprintable() for line in told)
