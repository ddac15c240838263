"""Every command of the guides is what its recipe produces: same program, same flags, same environment.

What the plan adds is its own: the place (ports, model's path, served name), the drain, and variables
that keep the process from the network. It must not take away or change anything of the guide's.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from fleet.catalog import catalog
from fleet.plan import ServicePlan
from tests.unit.state import plan_of

COMMANDS: list[dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "guides.yaml").read_text(encoding="utf-8")
)
OF_THE_PLAN = {"--served-model-name", "--host", "--port", "--shutdown-timeout"}


def as_planned(row: dict[str, Any]) -> ServicePlan:
    ranks = catalog().recipes_of(row["model"])[row["recipe"]].parallel.ranks
    service = {
        "name": "guide",
        "model": row["model"],
        "revision": next(iter(catalog().models[row["model"]].remote_code.revisions)),
        "recipe": row["recipe"],
        "gpus": list(range(ranks)),
        "port": 8000,
    }
    plan = plan_of(service, gpu=row["gpu"], driver=None, vllm={"version": row["vllm"]})
    return plan.services[0]


def parsed(command: str) -> tuple[list[str], dict[str, Any], dict[str, str]]:
    """The program's words, its options by name, and the variables of a shell command."""
    words = [word for word in shlex.split(command.replace("\\\n", " ")) if word != "export"]
    env = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    first = next(index for index, word in enumerate(words) if word.startswith("--"))
    return words[:first], options(words[first:]), env


def options(words: list[str]) -> dict[str, Any]:
    """Options by name, with hyphens; JSON as data, a bare flag as True."""
    found: dict[str, Any] = {}
    for word in words:
        if word.startswith("--"):
            name = word.replace("_", "-")
            found[name] = True
        else:
            found[name] = json.loads(word) if word.startswith("{") else word
    return found


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: f"{row['model']}-{row['recipe']}")
def test_a_guides_command_is_what_its_recipe_produces(row: dict[str, Any]) -> None:
    planned = as_planned(row)
    program, wanted, env = parsed(row["command"])

    got = options([word for words in planned.options for word in words])

    if program[0] == "vllm":
        assert [Path(planned.program[0]).name, planned.program[1]] == program[:2]
    else:
        assert planned.program[1:4] == (*program[1:3], "--model")
        wanted.pop("--model")
    assert {name: value for name, value in got.items() if name not in OF_THE_PLAN} == wanted
    assert env.items() <= planned.environment.items()


def test_the_guides_environment_is_all_that_recipes_add() -> None:
    """No recipe of a guide sets more than its command does."""
    for row in COMMANDS:
        recipe = catalog().recipes_of(row["model"])[row["recipe"]]
        _, _, env = parsed(row["command"])
        assert recipe.environment(row["vllm"]) == env, row["recipe"]


def test_every_flag_names_a_source_of_the_catalogue() -> None:
    known = catalog()
    for recipe in known.recipes.values():
        assert recipe.source in known.sources
        for setting in (recipe.args | recipe.env).values():
            assert setting.source in known.sources
    for row in known.contradictions:
        assert set(row.sources) <= set(known.sources), row.topic
