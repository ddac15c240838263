#!/usr/bin/env python3
"""Plan every recipe of a checkout of vllm-project/recipes, and count why the others cannot be planned.

``plan_public_recipes.py DIR`` takes each ``models/*/*.yaml`` with each variant and each of its strategies
for one host, on 8 GPUs of several kinds, or on as many as the recipe asks for, and makes a whole plan of
it, as ``fleet plan`` does. Memory is unknown throughout: the recipes come without the models' config.json.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from fleet.catalog import catalog
from fleet.planner import Planner, Texts
from fleet.recipefile import STRATEGIES, RecipeFileError, read
from fleet.spec import HostSpec

KINDS = ("h20-141", "h200-141", "b200", "rtx-pro-6000")
GPUS = 8
REVISION = "0" * 40


@dataclass(frozen=True)
class Choice:
    """What of a recipe is planned, and on what."""

    recipe: str
    variant: str
    strategy: str
    kind: str
    vllm: str

    @property
    def file(self) -> str:
        return f"recipes/{self.recipe}.yaml"

    def __str__(self) -> str:
        return f"{self.recipe} {self.variant} {self.strategy} on {self.kind}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--kind", action="append", help=f"GPU kind (default: {', '.join(KINDS)})")
    parser.add_argument("--vllm", default="0.33.0", help="version of vLLM (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="print every attempt")
    arguments = parser.parse_args()
    files = sorted((arguments.directory / "models").glob("*/*.yaml"))
    if not files:
        sys.stderr.write(
            f"{arguments.directory}: no models/*/*.yaml; give a checkout of the recipes\n"
        )
        return 2
    outcomes: dict[Choice, str | None] = {}
    for file in files:
        text = file.read_text(encoding="utf-8")
        recipe = f"{file.parent.name}/{file.stem}"
        for choice in choices(recipe, text, arguments.kind or KINDS, arguments.vllm):
            outcomes[choice] = refusal(choice, text)
    for line in report(outcomes, every=arguments.all):
        sys.stdout.write(f"{line}\n")
    return 0


def choices(recipe: str, text: str, kinds: Sequence[str], vllm: str) -> Iterator[Choice]:
    """Each variant with each strategy for one host that the recipe has; the plain one if it has none."""
    document = yaml.safe_load(text)
    named = {*document["compatible_strategies"], *document.get("strategy_hardware", {})}
    strategies = [strategy for strategy in STRATEGIES if strategy in named] or ["single_node_tp"]
    for kind in kinds:
        for variant in document["variants"]:
            for strategy in strategies:
                yield Choice(recipe, variant, strategy, kind, vllm)


def refusal(choice: Choice, text: str) -> str | None:
    """Why no plan can be made of it; None where one can."""
    gpus = wanted_gpus(choice, text)
    service = {
        "name": "public",
        "model": choice.file,
        "variant": choice.variant,
        "recipe": choice.strategy,
        "revision": REVISION,
        "gpus": list(range(gpus)),
        "port": 8000,
    }
    spec = HostSpec.model_validate(
        {
            "gpu": choice.kind,
            "gpu_count": max(gpus, GPUS),
            "vllm": {"version": choice.vllm},
            "reviewed_revisions": [REVISION],
            "services": [service],
        }
    )
    planner = Planner({}, Texts(secrets={}, keys={}, documents={choice.file: text}))
    if planner.plan("public-01", "public", spec) is not None:
        return None
    return planner.problems[0].what.removeprefix(f"{choice.file}: ")


def wanted_gpus(choice: Choice, text: str) -> int:
    """8, or the number that the recipe asks for."""
    gpu = (choice.kind, catalog().gpus[choice.kind])
    try:
        read(
            choice.file,
            text,
            strategy=choice.strategy,
            variant=choice.variant,
            gpu=gpu,
            gpus=GPUS,
        )
    except RecipeFileError as error:
        return error.gpus or GPUS
    return GPUS


def report(outcomes: dict[Choice, str | None], *, every: bool) -> Iterator[str]:
    if every:
        yield from (f"{choice}: {reason or 'planned'}" for choice, reason in outcomes.items())
        yield ""
    yield f"{'':24} {'recipes':>9} {'planned':>9} {'commands':>9} {'planned':>9}"
    for kind in dict.fromkeys(choice.kind for choice in outcomes):
        yield _row(kind, {c: reason for c, reason in outcomes.items() if c.kind == kind})
    yield _row("any of them", outcomes)
    yield ""
    yield "Why not, in recipes (of which nothing can be planned) and commands:"
    yield ""
    planned = {choice.recipe for choice, reason in outcomes.items() if reason is None}
    refused = {choice: reason for choice, reason in outcomes.items() if reason is not None}
    commands = Counter(_kind_of(reason) for reason in refused.values())
    hopeless = {
        (c.recipe, _kind_of(reason)) for c, reason in refused.items() if c.recipe not in planned
    }
    recipes = Counter(reason for _, reason in hopeless)
    for kind, count in sorted(commands.items(), key=lambda item: (-recipes[item[0]], -item[1])):
        choice, reason = next((c, r) for c, r in refused.items() if _kind_of(r) == kind)
        yield f"{recipes[kind]:5} {count:5}  {reason}"
        yield f"{'':12} ({choice})"


def _row(title: str, outcomes: dict[Choice, str | None]) -> str:
    planned = [choice for choice, reason in outcomes.items() if reason is None]
    numbers = (_recipes(outcomes), _recipes(planned), len(outcomes), len(planned))
    return f"{title:24} " + " ".join(f"{number:9}" for number in numbers)


def _recipes(found: Iterable[Choice]) -> int:
    return len({choice.recipe for choice in found})


def _kind_of(reason: str) -> str:
    """A reason without its place in the file, its values and its cure: to count those alike."""
    where, separator, what = reason.partition(": ")
    if not separator or " " in where:  # the planner's own reasons have no place in the file
        where, what = "", reason
    if where.startswith("--"):
        where = "flag"
    elif where.isupper():
        where = "variable"
    else:
        where = where.split(".")[0]
    what = re.split(r"; |, but |, and not | has \d", what)[0]
    return f"{where}: {re.sub(_VALUE, '…', what)}"


_VALUE = r"names .*|'[^']*'|\b[A-Za-z]*\d[\w.+-]*"


if __name__ == "__main__":
    sys.exit(main())
