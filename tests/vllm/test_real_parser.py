"""The real vLLM's own parser beside ours: `make test-vllm`.

Each version's wheel is fetched from the package index that pip is configured to use (up to 500 MB,
deleted afterwards), and its parser is asked once for everything below. No GPU and no torch are needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from fleet.catalog import Recipe, catalog, holds
from fleet.options import check_options
from tests.unit.state import REVISION, planned, service

ROOT = Path(__file__).resolve().parent.parent.parent
RECORDER = ROOT / "scripts" / "record_vllm_options.py"
VERSIONS = ("0.33.0", "0.23.0", "0.19.1", "0.11.2", "0.9.2")

Options = tuple[tuple[str, ...], ...]

TAKEN_BY_BOTH: dict[str, Options] = {
    "underscores": (("--max_model_len", "65536"), ("--trust_remote_code",)),
    "decimal suffix": (("--max-model-len", "64k"),),
    "binary suffix": (("--max-model-len", "64K"),),
    "fraction with a decimal suffix": (("--max-model-len", "25.6k"),),
    "value after an equals sign": (("--max-model-len=65536",),),
    "negative number": (("--seed", "-1"),),
    "short form": (("-tp", "4"),),
    "negative form": (("--no-enable-prefix-caching",),),
    "JSON": (("--hf-overrides", '{"max_position_embeddings": 4096}'),),
    "None where nothing may be given": (("--quantization", "None"),),
    "several values": (("--served-model-name", "a", "b"),),
    "fields one by one": (
        ("--compilation-config.cudagraph_copy_inputs", "true"),
        ("--compilation_config.backend=eager",),
    ),
    "parsers": (("--enable-auto-tool-choice",), ("--tool-call-parser", "hermes")),
    "level": (("-O3",),),
    "level, spaced": (("-O", "2"),),
}

REFUSED_BY_BOTH: dict[str, Options] = {
    "unknown option": (("--max-modle-len", "65536"),),
    "unknown option with a field": (("--compile.mode", "3"),),
    "no whole number": (("--max-num-seqs", "many"),),
    "no number": (("--gpu-memory-utilization", "half"),),
    "no suffix": (("--max-model-len", "64x"),),
    "fraction with a binary suffix": (("--max-model-len", "1.5K"),),
    "empty": (("--max-num-seqs", ""),),
    "no such choice": (("--dtype", "int3"),),
    "broken JSON": (("--compilation-config", '{"backend":'),),
    "JSON that is no object": (("--compilation-config", "[]"),),
    "value of a switch": (("--trust-remote-code", "yes"),),
    "value of a switch after an equals sign": (("--trust-remote-code=true",),),
    "missing value": (("--max-model-len",),),
    "option for a value": (("--dtype", "--enforce-eager"),),
    "negative number for a field": (("--gpu-memory-utilization", "-0.5"),),
    "two values": (("--dtype", "auto", "half"),),
    "auto tools without a parser": (("--enable-auto-tool-choice",),),
    "field of a number": (("--max-model-len.most", "3"),),
}

REFUSED_BY_US: dict[str, Options] = {
    "abbreviation": (("--max-model", "65536"),),
    "abbreviation of a switch": (("--trust-remote",),),
    "unknown tool parser": (("--tool-call-parser", "minimax_m9"),),
    "unknown quantisation": (("--quantization", "fp9"),),
    "given twice": (("--max-num-seqs", "8"), ("--max-num-seqs", "16")),
    "whole and by field": (
        ("--compilation-config", '{"backend": "eager"}'),
        ("--compilation-config.cudagraph_copy_inputs", "true"),
    ),
}

EITHER: dict[str, Options] = {
    # What these are depends on the version; ours and the real one must say the same.
    "auto length": (("--max-model-len", "auto"),),
    "length of -1": (("--max-model-len", "-1"),),
    "tera": (("--max-model-len", "1t"),),
    "level as configuration": (("--compilation-config", "3"),),
    "hyphens in a choice": (("--moe-backend", "deep-gemm"),),
    "KV cache type of today": (("--kv-cache-dtype", "nvfp4"),),
    "choice of a number": (("--block-size", "128"),),
    "no choice of a number": (("--block-size", "7"),),
    "list, item by item": (("--compilation-config.custom_ops+", "none"),),
    "drain": (("--shutdown-timeout", "300"),),
}

ODD = ("", "1", "-1", "1.5", "64k", "x y", "None", "[]", '{"a": 1}')
"""Given to every option there is."""

JUDGED_BY_THE_ENGINE = {
    *("--attention-backend", "--kv-cache-dtype", "--quantization", "-q"),
    *("--reasoning-parser", "--tool-call-parser"),
}
"""Options whose values the real parser does not look at, and we do."""

LOOKED_INTO = {
    "--chat-template": "is looked for on the disk",
    "--grpc-port": "wants a variable as well",
    "--lora-modules": "the names in its JSON",
    "--reasoning-effort-map": "the names in its JSON",
    "--sse-keep-alive-interval": "is not to be negative",
    # Of 0.9.2 only:
    "--limit-mm-per-prompt": "another notation beside JSON",
    "--media-io-kwargs": "another notation beside JSON",
    "--mm-processor-kwargs": "another notation beside JSON",
    "--override-generation-config": "another notation beside JSON",
    "--override-neuron-config": "another notation beside JSON",
    "--prompt-adapters": "another notation beside JSON",
    "--rope-scaling": "another notation beside JSON",
    "--tokenizer-pool-extra-config": "another notation beside JSON",
}
"""Options in whose values the real parser sees more than we do, and what."""


@dataclass(frozen=True)
class Invocation:
    """`entrypoint` as the recorder's --parse has it, and the words after it."""

    entrypoint: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    exit: int
    error: str


@dataclass(frozen=True)
class Real:
    """A vLLM version, and what its parser said to each invocation."""

    version: str
    answers: Mapping[Invocation, Answer]

    def refuses(self, options: Options) -> bool:
        return self.answers[serving(options)].exit != 0


def serving(options: Options) -> Invocation:
    return Invocation("serve", ("/model", *(word for words in options for word in words)))


def odd(version: str) -> list[Options]:
    """Every option of a version but those that read files and end, with each odd value."""
    recorded = json.loads((ROOT / "fleet" / "options" / f"vllm-{version}.json").read_text())
    flags = [flag for option in recorded["options"] for flag in option["flags"]]
    return [
        ((flag, value),)
        for flag in sorted({*flags} - {"--config", "--help", "--model", "-h"})
        for value in ODD
    ]


def recipe_invocations(version: str) -> dict[str, Invocation | list[str]]:
    """What each recipe of the catalogue is started with, with each model that `version` serves.

    By model and recipe; the planner's problems in place of it where it plans on no kind of GPU.
    """
    found: dict[str, Invocation | list[str]] = {}
    for model, card in catalog().models.items():
        for name, recipe in catalog().recipes_of(model).items():
            if card.accepts(version) and holds(recipe.vllm, version):
                found[f"{model} {name}"] = recipe_invocation(version, model, name, recipe)
    return found


def recipe_invocation(
    version: str, model: str, name: str, recipe: Recipe
) -> Invocation | list[str]:
    ranks = recipe.parallel.ranks if recipe.device == "gpu" else 0
    problems: list[str] = []
    kinds: list[str | None] = [*recipe.kinds, *catalog().gpus] if ranks else [None]
    for gpu, length in product(kinds, (None, 4096)):
        told = service(model=model, recipe=name, gpus=list(range(ranks)), max_model_len=length)
        host: dict[str, Any] = {"gpu": gpu, "gpu_count": ranks, "reviewed_revisions": [REVISION]}
        if not ranks:
            host["driver"] = None
        plan, found = planned(told, vllm={"version": version}, **host)
        if plan is not None:
            words = plan.services[0].argv
            return Invocation(
                recipe.entrypoint, words[3 if recipe.entrypoint == "api_server" else 2 :]
            )
        problems = problems or found
    return problems


@pytest.fixture(scope="module", params=VERSIONS)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Real:
    """The answers of one version, all got at once: fetching it takes longer than all the rest."""
    version = request.param
    tables = (TAKEN_BY_BOTH, REFUSED_BY_BOTH, REFUSED_BY_US, EITHER)
    invocations = [serving(options) for table in tables for options in table.values()]
    invocations += map(serving, odd(version))
    recipes = recipe_invocations(version).values()
    invocations += [recipe for recipe in recipes if isinstance(recipe, Invocation)]
    asked = tmp_path_factory.mktemp("vllm") / "invocations.json"
    asked.write_text(
        json.dumps([{"entrypoint": i.entrypoint, "words": i.words} for i in invocations])
    )
    command = [sys.executable, str(RECORDER), "--parse", str(asked), version]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = [Answer(**answer) for answer in json.loads(done.stdout)]
    return Real(version, dict(zip(invocations, answers, strict=True)))


def test_every_recipe_is_taken(real: Real) -> None:
    recipes = recipe_invocations(real.version)
    assert recipes, f"the catalogue has no model for vLLM {real.version}"
    refused = {}
    for name, recipe in recipes.items():
        if isinstance(recipe, list):
            refused[name] = f"not planned: {recipe}"
        elif real.answers[recipe].exit != 0:
            refused[name] = real.answers[recipe].error
    assert refused == {}


@pytest.mark.parametrize("case", TAKEN_BY_BOTH)
def test_taken_by_both(real: Real, case: str) -> None:
    options = TAKEN_BY_BOTH[case]
    assert real.answers[serving(options)] == Answer(0, "")
    assert list(check_options(options, real.version)) == []


@pytest.mark.parametrize("case", REFUSED_BY_BOTH)
def test_refused_by_both(real: Real, case: str) -> None:
    options = REFUSED_BY_BOTH[case]
    assert real.refuses(options)
    assert list(check_options(options, real.version)) != []


@pytest.mark.parametrize("case", REFUSED_BY_US)
def test_refused_by_us_alone(real: Real, case: str) -> None:
    options = REFUSED_BY_US[case]
    assert real.answers[serving(options)] == Answer(0, "")
    assert list(check_options(options, real.version)) != []


@pytest.mark.parametrize("case", EITHER)
def test_both_say_the_same(real: Real, case: str) -> None:
    options = EITHER[case]
    findings = list(check_options(options, real.version))
    assert bool(findings) == real.refuses(options), (findings, real.answers[serving(options)])


def test_every_option_with_odd_values(real: Real) -> None:
    unlike = []
    for options in odd(real.version):
        flag = options[0][0]
        said = [found.what for found in check_options(options, real.version)]
        if real.refuses(options):
            explained = bool(said) or flag in LOOKED_INTO
        else:
            # Fields that a configuration does not have are ignored by versions before 0.18.
            explained = not said or flag in JUDGED_BY_THE_ENGINE or "its field" in said[0]
        if not explained:
            unlike.append((options, said, real.answers[serving(options)]))
    assert unlike == []
