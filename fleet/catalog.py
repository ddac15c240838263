"""The catalogue: models, recipes, GPU kinds and driver packages, read from fleet/models/*.yaml.

It is package data, read once: nothing of a site or a host is looked at here.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal

import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic import Field

from fleet.spec import Argument, Model


class GpuKind(Model):
    """A GPU as nvidia-smi names it; `memory_mib` is its memory.total in MiB."""

    name: str
    memory_mib: int
    compute_capability: str
    nvswitch: bool


class GateDefaults(Model):
    expect: str


class ModelCard(Model):
    """What the planner must know of a model. `weights_bytes` on disk; `vllm` is a version range."""

    family: str
    """File of the catalogue; a recipe serves the models of its own family."""
    architecture: str
    weights_bytes: int
    vllm: str
    attention_heads: int
    expert_width: int | None = None
    quantisation_block: int | None = None
    gate: GateDefaults

    def accepts(self, vllm_version: str) -> bool:
        return SpecifierSet(self.vllm, prereleases=True).contains(Version(vllm_version).public)


class Parallel(Model):
    """Ranks of tensor, pipeline and data parallelism, and whether experts are kept whole per rank."""

    tensor: Annotated[int, Field(ge=1)] = 1
    pipeline: Annotated[int, Field(ge=1)] = 1
    data: Annotated[int, Field(ge=1)] = 1
    expert: bool = False

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data


class Recipe(Model):
    """A named way to serve, with the guide that it comes from."""

    family: str
    source: str
    entrypoint: Literal["serve", "api_server"] = "serve"
    parallel: Parallel
    args: dict[str, Argument] = {}
    env: dict[str, str] = {}
    env_until: dict[str, str] = {}
    """Variables that exist up to and including a vLLM version; left out for newer ones."""

    def environment(self, vllm_version: str) -> dict[str, str]:
        """The recipe's variables that this vLLM version knows."""
        version = Version(vllm_version)
        return {
            name: value
            for name, value in self.env.items()
            if name not in self.env_until or version <= Version(self.env_until[name])
        }


class PinnedUv(Model):
    version: str
    sha256: dict[str, str]


class PinnedTool(Model):
    requirements: list[str]


class Tools(Model):
    release_bytes: int
    uv: PinnedUv
    hub: PinnedTool
    packages: list[str]


class Catalog(Model):
    models: dict[str, ModelCard]
    recipes: dict[str, Recipe]
    gpus: dict[str, GpuKind]
    tools: Tools


@cache
def catalog() -> Catalog:
    """The catalogue that ships with this version."""
    models: dict[str, ModelCard] = {}
    recipes: dict[str, Recipe] = {}
    for family in ("minimax-m1", "minimax-m2"):
        document = _yaml(f"{family}.yaml")
        for name, card in document["models"].items():
            models[name] = ModelCard(family=family, **card)
        for name, recipe in document["recipes"].items():
            recipes[name] = Recipe(family=family, **recipe)
    gpus = {name: GpuKind(**kind) for name, kind in _yaml("gpus.yaml").items()}
    return Catalog(models=models, recipes=recipes, gpus=gpus, tools=Tools(**_yaml("tools.yaml")))


def _yaml(name: str) -> dict[str, Any]:
    text = (files("fleet") / "models" / name).read_text(encoding="utf-8")
    document = yaml.safe_load(text)
    assert isinstance(document, dict), name
    return document
