"""Argument vectors and variables against what each vLLM release was recorded to take."""

from __future__ import annotations

import json
import time
from importlib.resources import files
from typing import Any
from unittest.mock import ANY

import pytest
from packaging.version import InvalidVersion, Version

from fleet import command
from fleet.catalog import catalog, holds
from fleet.options import (
    check_environment,
    check_options,
    checked_against,
    default,
    recorded_versions,
    same_option,
)
from fleet.spec import Service

NEWEST = "0.33.0"

# What a recipe of today comes to, so that a mistake stands among much that is right.
USUAL = (
    ("--served-model-name", "MiniMaxAI/MiniMax-M2.5"),
    ("--host", "127.0.0.1"),
    ("--port", "18000"),
    ("--tensor-parallel-size", "4"),
    ("--trust-remote-code",),
    ("--enable-auto-tool-choice",),
    ("--tool-call-parser", "minimax_m2"),
    ("--reasoning-parser", "minimax_m2_append_think"),
    ("--max-model-len", "196608"),
    ("--gpu-memory-utilization", "0.92"),
    ("--compilation-config", '{"cudagraph_mode":"PIECEWISE"}'),
    ("--shutdown-timeout", "300"),
)


def told(*options: tuple[str, ...], version: str = NEWEST, **how: Any) -> list[tuple[str, str]]:
    """Option and text of every finding."""
    return [(found.option, found.what) for found in check_options(options, version, **how)]


def told_one(*options: tuple[str, ...], version: str = NEWEST, **how: Any) -> str:
    findings = told(*options, version=version, **how)
    assert len(findings) == 1, findings
    return findings[0][1]


def told_of_environment(*names: str, version: str = NEWEST) -> list[tuple[str, str]]:
    return [(found.option, found.what) for found in check_environment(names, version)]


# --- which versions ------------------------------------------------------------------------------


def test_versions_ascend_by_number_and_not_by_letter() -> None:
    versions = recorded_versions()
    assert list(versions) == sorted(versions, key=Version)
    assert versions.index("0.9.2") < versions.index("0.10.2") < versions.index("0.33.0")


@pytest.mark.parametrize(
    ("version", "against"),
    [
        ("0.33.0", ("0.33.0",)),
        ("0.33.0+cu129", ("0.33.0",)),
        ("0.19.1+cu129", ("0.19.1",)),
        ("0.33", ("0.33.0",)),
        ("0.22.1", ("0.20.2", "0.23.0")),
        ("0.22.1+cu129", ("0.20.2", "0.23.0")),
        ("0.33.0rc1", ("0.32.0", "0.33.0")),
        ("0.23.0.post1", ("0.23.0", "0.24.0")),
        ("0.99.0", ("0.33.0",)),
        ("0.8.5", ("0.9.2",)),
    ],
)
def test_the_version_itself_or_its_neighbours(version: str, against: tuple[str, ...]) -> None:
    assert checked_against(version) == against


def test_no_version_at_all() -> None:
    with pytest.raises(InvalidVersion):
        checked_against("latest")


# --- options -------------------------------------------------------------------------------------


def test_what_is_right_is_not_mentioned() -> None:
    assert told(*USUAL) == []


@pytest.mark.parametrize("version", recorded_versions())
@pytest.mark.parametrize(
    "options",
    [
        (("--max_model_len", "65536"),),
        (("--max-model-len=65536",),),
        (("--max-model-len", "64k"),),
        (("--max-model-len", "64K"),),
        (("--max-model-len", "25.6k"),),
        (("--seed", "-1"),),
        (("--no-enable-prefix-caching",),),
        (("--quantization", "None"),),
        (("--served-model-name", "a", "b"),),
        (("--middleware", "a.b"), ("--middleware", "c.d")),
        (("--hf-overrides", '{"a": 1}'),),
        (("--compilation-config.backend", "eager"), ("--compilation_config.debug_dump_path=x",)),
        (("-tp", "4"),),
        (("-O3",),),
        (("-O=1",),),
        (("-O", "2"),),
        (("--tool-parser-plugin", "/x.py"), ("--tool-call-parser", "of_my_own")),
        (),
    ],
)
def test_what_every_version_takes(version: str, options: tuple[tuple[str, ...], ...]) -> None:
    assert told(*options, version=version) == []


def test_b17_an_unknown_flag_among_right_ones() -> None:
    assert told(*USUAL, ("--max-modle-lem", "65536")) == [
        (
            "--max-modle-lem",
            "vLLM 0.33.0 does not know it; did you mean '--max-model-len'?",
        )
    ]


def test_a_flag_that_other_versions_have() -> None:
    assert told_one(("--shutdown-timeout", "300"), version="0.13.0") == (
        "vLLM 0.13.0 does not know it, but 0.18.1 to 0.33.0 do"
    )


def test_b17_an_abbreviation_is_written_out() -> None:
    assert told(("--max-model", "65536")) == [
        (
            "--max-model",
            "vLLM 0.33.0 does not know it; it would be read as --max-model-len, so write that",
        )
    ]


def test_an_abbreviation_of_many() -> None:
    assert told_one(("--disable-log", "x")) == (
        "vLLM 0.33.0 does not know it; it could stand for "
        "--disable-log-deltas or --disable-log-outputs or --disable-log-requests or others"
    )


def test_nothing_like_it() -> None:
    assert told_one(("--zzz", "x")) == "vLLM 0.33.0 does not know it; leave it out"


@pytest.mark.parametrize("word", ["model", "--", "-", "-1", "---x", "ü"])
def test_what_is_no_option(word: str) -> None:
    assert told(("--seed", "1"), (word, "x")) == [
        (word, f"{word!r} is no option; an option begins with '--'")
    ]


def test_what_only_prints() -> None:
    text = "it prints help and exits; leave it out"
    assert told(("--help",), ("-h",)) == [("--help", text), ("-h", text)]
    assert told(("--help=max-model-len",)) == [("--help", text)]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--max-model-len",), "it without a value; give one"),
        (("--served-model-name",), "it without a value; give one"),
        (("--dtype", "auto", "half"), "2 values here; give one"),
        (("--trust-remote-code", "yes"), "a value here, and 'yes' is given; leave it out"),
        (("--trust-remote-code=true",), "a value here, and 'true' is given; leave it out"),
        (("--no-enable-prefix-caching", "1"), "a value here, and '1' is given; leave it out"),
        (
            ("--dtype", "--enforce-eager"),
            "'--enforce-eager'; it would be read as an option of its own",
        ),
        (("--gpu-memory-utilization", "-0.5"), "'-0.5'; it would be read as an option of its own"),
    ],
)
def test_the_number_of_values(words: tuple[str, ...], what: str) -> None:
    assert told(words) == [(words[0].partition("=")[0], f"vLLM 0.33.0 does not take {what}")]


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (("--max-num-seqs", "many"), "give a whole number"),
        (("--max-num-seqs", "1.5"), "give a whole number"),
        (("--max-num-seqs", ""), "give a whole number"),
        (("--gpu-memory-utilization", "90%"), "give a number"),
        (("--max-model-len", "64x"), "give a whole number such as 65536, 64k or 64K"),
        (("--max-model-len", "1.5K"), "give a whole number before K, or 1.5k"),
        (("--compilation-config", "[1]"), "give a JSON object"),
        (
            ("--compilation-config", '{"mode":'),
            "give JSON (Expecting value: line 1 column 9 (char 8))",
        ),
    ],
)
def test_a_value_of_the_wrong_type(words: tuple[str, str], cure: str) -> None:
    assert told(words) == [(words[0], f"vLLM 0.33.0 does not take {words[1]!r}; {cure}")]


def test_a_long_value_is_cut() -> None:
    shown = "'" + "x" * 59 + "…'"
    assert told_one(("--seed", "x" * 1000)) == (
        f"vLLM 0.33.0 does not take {shown}; give a whole number"
    )


def test_auto_is_a_length_since() -> None:
    assert told(("--max-model-len", "auto")) == []
    assert told_one(("--max-model-len", "auto"), version="0.13.0") == (
        "vLLM 0.13.0 does not take 'auto'; give a whole number such as 65536, 64k or 64K"
    )


def test_a_choice() -> None:
    assert told_one(("--dtype", "bf16")) == (
        "vLLM 0.33.0 does not take 'bf16'; did you mean 'bfloat16'?"
    )
    assert told_one(("--dtype", "int3")) == (
        "vLLM 0.33.0 does not take 'int3'; it takes auto, bfloat16, float, float16, float32, half"
    )


def test_a_choice_of_numbers() -> None:
    assert told(("--block-size", "128"), version="0.13.0") == []
    assert told_one(("--block-size", "7"), version="0.13.0") == (
        "vLLM 0.13.0 does not take '7'; it takes 1, 128, 16, 256, 32, 64, 8"
    )


def test_a_choice_that_may_be_written_with_hyphens() -> None:
    assert told(("--moe-backend", "Deep-GEMM")) == []
    assert told_one(("--moe-backend", "deepgemm")) == (
        "vLLM 0.33.0 does not take 'deepgemm'; did you mean 'deep_gemm'?"
    )
    assert told_one(("--moe-backend", "hpc"), version="0.23.0") == (
        "vLLM 0.23.0 does not take 'hpc', but 0.31.0 to 0.33.0 do"
    )


@pytest.mark.parametrize(
    ("version", "words", "cure"),
    [
        (NEWEST, ("--tool-call-parser", "minimax-m2"), "; did you mean 'minimax_m2'?"),
        (NEWEST, ("--tool-call-parser", "minimax"), ", but 0.9.2 to 0.23.0 do"),
        ("0.9.2", ("--tool-call-parser", "minimax_m2"), ", but 0.11.2 to 0.33.0 do"),
        (
            NEWEST,
            ("--reasoning-parser", "minimax_m2_append"),
            "; did you mean 'minimax_m2_append_think'?",
        ),
        ("0.23.0", ("--reasoning-parser", "minimax_m3"), ", but 0.24.0 to 0.33.0 do"),
        ("0.9.2", ("--reasoning-parser", "minimax_m2"), ", but 0.11.2 to 0.33.0 do"),
        (NEWEST, ("--quantization", "fp9"), "; did you mean 'fp8'?"),
        (NEWEST, ("--quantization", "gguf"), ", but 0.9.2 to 0.23.0 do"),
        (NEWEST, ("--kv-cache-dtype", "fp9"), "; did you mean 'fp8'?"),
        ("0.13.0", ("--kv-cache-dtype", "nvfp4"), ", but 0.20.2 to 0.33.0 do"),
        (NEWEST, ("--attention-backend", "FLASHINFA"), "; did you mean 'FLASHINFER'?"),
        (NEWEST, ("--attention-backend", "xformers"), ", but 0.9.2 to 0.11.2 do"),
        ("0.13.0", ("--attention-backend", "auto"), ", but 0.18.1 to 0.33.0 do"),
    ],
)
def test_a_value_that_only_the_engine_refuses(
    version: str, words: tuple[str, str], cure: str
) -> None:
    assert told(words, version=version) == [
        (words[0], f"vLLM {version} does not take {words[1]!r}{cure}")
    ]


def test_how_the_engine_spells() -> None:
    assert told(("--attention-backend", "flashinfer"), ("--quantization", "FP8")) == []
    assert told(("--attention-backend", "auto")) == []
    assert told(("--reasoning-parser", "None")) == []
    assert told(("--reasoning-parser", "")) == []
    assert told(("--compilation-config", '{"cudagraph_mode":"piecewise"}')) == []


def test_quantisation_that_must_be_allowed() -> None:
    words = ("--quantization", "experts_int8")
    assert told_one(words, version="0.19.1") == (
        "vLLM 0.19.1 does not take 'experts_int8' without --allow-deprecated-quantization; give both"
    )
    assert told(words, ("--allow-deprecated-quantization",), version="0.19.1") == []
    assert told(words, version="0.13.0") == []
    assert told(words, version="0.23.0") == []


def test_a_switch_that_asks_for_another_option() -> None:
    assert told_one(("--enable-auto-tool-choice",)) == (
        "vLLM 0.33.0 does not take it without --tool-call-parser; give both"
    )
    assert told(("--disable-auto-tool-choice",)) == []


def test_adapters() -> None:
    assert told(("--lora-modules", "a=/b", '{"name": "c", "path": "/d"}')) == []
    assert told_one(("--lora-modules", "a")) == (
        "vLLM 0.33.0 does not take 'a'; give name=path or a JSON object"
    )


# --- JSON and its fields -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        (("--compilation-config", '{"cudagraph_mode":"PIECEWIZE","mode":3}'),),
        (("--compilation-config.cudagraph_mode", "PIECEWIZE"),),
        (("--compilation_config.cudagraph_mode=PIECEWIZE",),),
        (("-cc.cudagraph_mode", "PIECEWIZE"), ("-cc.mode", "3")),
    ],
)
def test_cudagraph_mode_however_it_is_given(options: tuple[tuple[str, ...], ...]) -> None:
    assert told_one(*options) == (
        "vLLM 0.33.0 does not take 'PIECEWIZE'; did you mean 'PIECEWISE'?"
    )


def test_the_field_is_named_with_its_option() -> None:
    assert told(("--attention_config.backend", "FLASHINFA")) == [
        (
            "--attention-config.backend",
            "vLLM 0.33.0 does not take 'FLASHINFA'; did you mean 'FLASHINFER'?",
        )
    ]


def test_unknown_fields() -> None:
    assert told(("--compilation-config", '{"cudagraph-mode":"PIECEWISE","modes":3}')) == [
        (
            "--compilation-config",
            "vLLM 0.33.0 does not know its field 'cudagraph-mode'; did you mean 'cudagraph_mode'?",
        ),
        (
            "--compilation-config",
            "vLLM 0.33.0 does not know its field 'modes'; did you mean 'mode'?",
        ),
    ]
    assert told_one(("--compilation-config", '{"cudagraph_mode":"NONE"}'), version="0.9.2") == (
        "vLLM 0.9.2 does not know its field 'cudagraph_mode', but 0.10.2 to 0.33.0 do"
    )


def test_a_field_in_a_field_and_a_list() -> None:
    assert told(("--compilation-config.pass_config.fuse_norm_quant", "true")) == []
    assert told(("--compilation-config.custom_ops+", "none,+rms_norm")) == []


def test_fields_of_what_has_none() -> None:
    assert told(("--max-model-len.most", "3")) == [
        (
            "--max-model-len.most",
            "vLLM 0.33.0 does not know fields of --max-model-len; give it one value",
        )
    ]


def test_levels_are_another_option_in_older_versions() -> None:
    mode = ("--compilation-config", '{"cudagraph_mode":"NONE"}')
    assert told(mode, ("-O3",)) == []
    assert told(mode, ("-O3",), version="0.10.2") == [
        ("-O", "--compilation-config is the same option, and given too; leave one out")
    ]
    assert told_one(("-O7",)) == "vLLM 0.33.0 does not know it; leave it out"


# --- given twice ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        (("--seed", "1"), ("--seed=2",), "it is given twice; leave one out"),
        (
            ("--gpu-memory-utilization", "0.9"),
            ("--device-memory-utilization", "0.5"),
            "--gpu-memory-utilization is the same option, and given too; leave one out",
        ),
        (
            ("--enable-expert-parallel",),
            ("--no-enable-expert-parallel",),
            "--enable-expert-parallel is the same option, and given too; leave one out",
        ),
        (
            ("--compilation-config", '{"mode":3}'),
            ("--compilation-config.backend", "eager"),
            "--compilation-config is given too, and vLLM would drop it; give all in one JSON object",
        ),
        (
            ("--compilation-config.mode", "3"),
            ("--compilation-config.mode", "0"),
            "it is given twice; leave one out",
        ),
    ],
)
def test_given_twice(first: tuple[str, ...], second: tuple[str, ...], what: str) -> None:
    assert told(first, second) == [(second[0].partition("=")[0], what)]


def test_one_option_by_all_its_names() -> None:
    assert same_option("--gpu-memory-utilization", NEWEST) == {
        "--gpu-memory-utilization",
        "--device-memory-utilization",
    }
    assert same_option("--tensor-parallel-size", "0.9.2") == {"--tensor-parallel-size", "-tp"}
    assert same_option("--enable-expert-parallel", "0.13.0") == {
        "--enable-expert-parallel",
        "--no-enable-expert-parallel",
    }
    assert same_option("--no-such", NEWEST) == {"--no-such"}


# --- the module beside `vllm serve` --------------------------------------------------------------


def test_the_module_has_fewer_options() -> None:
    assert told(("--headless",), version="0.9.2") == []
    assert told_one(("--headless",), version="0.9.2", entrypoint="api_server") == (
        "vLLM 0.9.2 does not know it when started as a module; use a recipe of `vllm serve`"
    )
    assert told(("--headless",), entrypoint="api_server") == []


# --- versions that are not recorded --------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "words", "what"),
    [
        (
            "0.21.0",
            ("--max-modle-len", "1"),
            "neither 0.20.2 nor 0.23.0 knows it; did you mean '--max-model-len'?",
        ),
        (
            "0.17.0",
            ("--shutdown-timeout", "300"),
            "neither 0.14.0 nor 0.17.1 knows it, but 0.18.1 to 0.33.0 do",
        ),
        (
            "0.21.0",
            ("--max-model-len",),
            "neither 0.20.2 nor 0.23.0 takes it without a value; give one",
        ),
        (
            "0.21.0",
            ("--kv-cache-dtype", "fp9"),
            "neither 0.20.2 nor 0.23.0 takes 'fp9'; did you mean 'fp8'?",
        ),
        (
            "0.15.0",
            ("--quantization", "experts_int8"),
            "neither 0.14.0 nor 0.17.1 takes 'experts_int8' without "
            "--allow-deprecated-quantization; give both",
        ),
    ],
)
def test_both_neighbours_object(version: str, words: tuple[str, ...], what: str) -> None:
    assert told(words, version=version) == [(words[0], f"vLLM {version} is not recorded; {what}")]


def test_both_neighbours_object_each_in_its_own_way() -> None:
    assert told_one(("--moe-backend", "moon"), version="0.16.0") == (
        "vLLM 0.16.0 is not recorded; 0.14.0 does not know it, but 0.17.1 to 0.33.0 do; "
        "0.17.1 does not take 'moon'; it takes aiter, auto, cutlass, deep_gemm, "
        "flashinfer_cutedsl, flashinfer_cutlass, flashinfer_trtllm, marlin, triton"
    )


def test_the_only_neighbour_objects() -> None:
    assert told_one(("--max-modle-len", "1"), version="0.99.0") == (
        "vLLM 0.99.0 is not recorded, and 0.33.0 does not know it; did you mean '--max-model-len'?"
    )


def test_what_one_neighbour_takes_may_be_right() -> None:
    assert told(("--shutdown-timeout", "300"), version="0.17.2") == []
    assert told(("--quantization", "experts_int8"), version="0.20.0") == []


def test_what_each_neighbour_objects_to_must_be_the_same_option() -> None:
    gone, new = ("--swap-space", "4"), ("--shutdown-timeout", "300")
    assert told(gone, new, version="0.17.1") == [("--shutdown-timeout", ANY)]
    assert told(gone, new, version="0.18.1") == [("--swap-space", ANY)]
    assert told(gone, new, version="0.17.2") == []


def test_the_local_part_is_left_out_of_the_text() -> None:
    assert told_one(("--zzz", "x"), version="0.19.1+cu129") == (
        "vLLM 0.19.1 does not know it; leave it out"
    )


def test_what_holds_for_any_version_names_none() -> None:
    assert told_one(("--help",), version="0.21.0") == "it prints help and exits; leave it out"


# --- environment ---------------------------------------------------------------------------------


def test_variables() -> None:
    assert told_of_environment("VLLM_CACHE_ROOT", "NCCL_DEBUG", "HOME", "vllm_anything") == []
    assert told_of_environment("VLLM_USE_DEEPGEMM") == [
        (
            "VLLM_USE_DEEPGEMM",
            "vLLM 0.33.0 does not know it; did you mean 'VLLM_USE_DEEP_GEMM'?",
        )
    ]
    assert told_of_environment("VLLM_USE_V1") == [
        ("VLLM_USE_V1", "vLLM 0.33.0 does not know it, but 0.9.2 to 0.10.2 do")
    ]
    assert told_of_environment("VLLM_USE_V1", version="0.10.2") == []
    assert told_of_environment("VLLM_USE_V1", version="0.22.0") == [
        (
            "VLLM_USE_V1",
            "vLLM 0.22.0 is not recorded; neither 0.20.2 nor 0.23.0 knows it, "
            "but 0.9.2 to 0.10.2 do",
        )
    ]
    unlike = "VLLM_" + "Q" * 40
    assert told_of_environment(unlike) == [(unlike, "vLLM 0.33.0 does not know it; leave it out")]


@pytest.mark.parametrize("version", recorded_versions())
def test_every_version_knows_what_the_plan_sets_itself(version: str) -> None:
    told_by_plan = {
        "name": "m",
        "model": "m",
        "revision": "0" * 40,
        "recipe": "r",
        "port": 8000,
        "gpus": [0],
    }
    service = Service.model_validate(told_by_plan)
    for model, card in catalog().models.items():
        for recipe in catalog().recipes_of(model).values():
            if not (card.accepts(version) and holds(recipe.vllm, version)):
                continue
            env = command.environment(service, recipe, version, release="/r", state="/s")
            assert told_of_environment(*env, "VLLM_API_KEY", version=version) == []


# --- defaults and the records --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "fraction"),
    [
        ("0.9.2", 0.9),
        ("0.19.0", 0.9),
        ("0.19.1+cu129", 0.9),
        ("0.20.0", 0.92),
        ("0.22.0", 0.92),
        ("0.33.0", 0.92),
        ("0.99.0", 0.92),
    ],
)
def test_the_default_utilisation(version: str, fraction: float) -> None:
    assert default("--gpu-memory-utilization", version) == fraction


def test_between_two_versions_the_older_default() -> None:
    assert default("--api-server-count", "0.14.0") == 1
    assert default("--api-server-count", "0.17.1") is None
    assert default("--api-server-count", "0.16.0") == 1


def test_what_has_no_default() -> None:
    assert default("--max-model-len", NEWEST) is None
    assert default("--no-such-option", NEWEST) is None


@pytest.mark.parametrize("version", recorded_versions())
def test_a_record_holds_what_is_asked_of_it(version: str) -> None:
    recorded = json.loads((files("fleet") / "options" / f"vllm-{version}.json").read_text())
    assert recorded["version"] == version
    for name in ("quantization_methods", "kv_cache_dtypes", "attention_backends", "tool_parsers"):
        assert len(recorded[name]) > 3, name
    assert "fp8" in recorded["quantization_methods"]
    assert {"auto", "fp8"} <= {*recorded["kv_cache_dtypes"]}
    assert "FLASHINFER" in recorded["attention_backends"]
    assert ("PIECEWISE" in recorded["cudagraph_modes"]) == (version != "0.9.2")
    flags = {flag for option in recorded["options"] for flag in option["flags"]}
    assert {*recorded["requires"], *recorded["requires"].values()} <= flags
    assert {*recorded["deprecated_quantization_methods"]} <= {
        *recorded["quantization_methods"],
        "tpu_int8",  # deprecated by name only where it is gone already
    }


def test_it_is_fast() -> None:
    """A plan of 10,000 hosts asks as often."""
    took_s = []
    for _ in range(50):
        began = time.perf_counter()
        assert told(*USUAL) == []
        took_s.append(time.perf_counter() - began)
    assert min(took_s) < 0.001  # the least: other work on this machine is not what is measured
