"""The catalogue: models, recipes, GPU kinds and tools, read from fleet/models/*.yaml.

It is package data, read once: nothing of a site or a host is looked at here. Every flag and variable of
a recipe names the guide or recipe that it comes from, and the vLLM versions that it is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from itertools import combinations
from typing import Annotated, Any, Literal

import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic import Field

from fleet.spec import Argument, GpuKind, Model

FAMILIES = ("minimax-m1", "minimax-m2", "minimax-m3")

Tokens = Annotated[int, Field(ge=1)]


class GateDefaults(Model):
    expect: str


class Source(Model):
    """Where a flag, a figure or a claim comes from."""

    title: str
    url: str | None = None


class Shape(Model):
    """What of a model's architecture decides its memory; the names are those of its config.json.

    `attention_layers` are the layers that keep keys and values of every token. `latent_dim` is for
    multi-head latent attention: elements per token and layer, the same on every tensor-parallel rank.
    `index_dim`: elements per token and indexed layer of a sparse attention's own cache, which keeps one
    head on every rank. `state_bytes`: what a sequence keeps however long it is (linear attention).
    """

    layers: Annotated[int, Field(ge=1)]
    attention_layers: Annotated[int, Field(ge=0)]
    attention_heads: Annotated[int, Field(ge=1)]
    kv_heads: Annotated[int, Field(ge=1)]
    head_dim: Annotated[int, Field(ge=1)]
    latent_dim: int | None = None
    index_layers: int = 0
    index_dim: int = 0
    state_bytes: int = 0
    hidden: Annotated[int, Field(ge=1)]
    experts: int | None = None
    expert_width: int | None = None
    vocabulary: int | None = None

    @property
    def kv_elements(self) -> int:
        """Elements that one KV head of one layer keeps for a token: a key and a value."""
        return self.latent_dim or 2 * self.head_dim


class LoadedWeights(Model):
    """Bytes of the weights in GPU memory; `expert_bytes` of them are of routed experts, which expert
    parallelism spreads over all ranks. The rest is held by every data-parallel rank."""

    total_bytes: Annotated[int, Field(ge=1)]
    expert_bytes: Annotated[int, Field(ge=0)] = 0


class Parsers(Model):
    """Names that this model's answers can be parsed with."""

    tool: list[str] = []
    reasoning: list[str] = []


class RemoteCode(Model):
    """Python that the repository carries, and that --trust-remote-code runs.

    `revisions` are commits of the publisher that the catalogue knows, each with where it is from: any
    other commit's code must be looked at by the site (`reviewed_revisions`).
    """

    needed: bool
    revisions: dict[str, str] = {}


class Note(Model):
    """What anybody should know who serves a model with these vLLM versions (empty: with any)."""

    text: str
    vllm: str = ""


class ModelCard(Model):
    """What the planner must know of a model. `weights_bytes` on disk; `vllm` is a version range."""

    family: str
    """File of the catalogue; a recipe serves the models of its own family."""
    architecture: str
    licence: str | None = None
    """None: the catalogue does not know; read the repository's own."""
    vllm: str
    vllm_source: str
    recommended: str = ""
    """vLLM versions that its publishers name, where that is less than what serves it."""
    recommended_by: str = ""
    compute_capability: str
    """The least that vLLM runs this checkpoint on."""
    context_tokens: Tokens
    """Longest sequence that the model takes: config.json max_position_embeddings."""
    weights_bytes: Annotated[int, Field(ge=1)] | None
    """None: unknown."""
    quantisation: str
    """`none`, `fp8`, `mxfp8`, `nvfp4`, `int4`, …"""
    quantisation_block: int | None = None
    """Edge of a weight block that shares a scale; a tensor-parallel slice must hold whole ones."""
    shape: Shape | None = None
    """None: memory is unknown."""
    loaded: LoadedWeights | None = None
    loaded_as: dict[str, LoadedWeights] = {}
    """By value of --quantization, where weights are quantised while they load."""
    parsers: Parsers = Parsers()
    remote_code: RemoteCode = RemoteCode(needed=False)
    gate: GateDefaults
    notes: list[Note] = []

    def accepts(self, vllm_version: str) -> bool:
        return holds(self.vllm, vllm_version)

    @property
    def oldest_vllm(self) -> str:
        return next(spec.version for spec in SpecifierSet(self.vllm) if spec.operator == ">=")

    @property
    def vllm_range(self) -> str:
        """`0.9.2 to 0.23.0` or `0.20.2 and later`."""
        bounds = {spec.operator: spec.version for spec in SpecifierSet(self.vllm)}
        first, last = bounds.get(">="), bounds.get("<=")
        if first and last:
            return f"{first} to {last}"
        return f"{first} and later" if first else self.vllm


class Parallel(Model):
    """Ranks of tensor, pipeline and data parallelism, and whether experts are kept whole per rank."""

    tensor: Annotated[int, Field(ge=1)] = 1
    pipeline: Annotated[int, Field(ge=1)] = 1
    data: Annotated[int, Field(ge=1)] = 1
    expert: bool = False

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        """`TP4`, `TP8+EP`, `DP8+EP`."""
        sizes = (("TP", self.tensor), ("PP", self.pipeline), ("DP", self.data))
        words = [f"{name}{size}" for name, size in sizes if size > 1]
        return "+".join([*(words or ["TP1"]), *(["EP"] if self.expert else [])])


class Setting(Model):
    """A flag's or variable's value, the source that gives it, and the vLLM versions that it is for."""

    value: Argument
    source: str
    vllm: str = ""
    mandatory: bool = False
    """The model does not work without it: a site may neither change it nor take it away."""
    why: str | None = None


class Claim(Model):
    """What a guide says that hardware holds: total KV tokens of a recipe on so many GPUs of a kind."""

    models: list[str]
    recipe: str
    gpu: str
    gpus: Annotated[int, Field(ge=1)]
    tokens: Tokens
    source: str


class Measurement(Model):
    """A capacity that vLLM itself reported on real hardware ("GPU KV cache size"), in tokens."""

    model: str
    gpu: str
    parallel: Parallel
    vllm: str
    utilisation: float
    kv_cache_dtype: str
    tokens: Tokens
    source: str


class Recipe(Model):
    """A named way to serve, with the guide that it comes from.

    `kinds` are the GPU kinds that the source names it for; others may serve as well. `models` restricts
    it within its family (empty: all). `compute_capability` is a range, where kernels are for one
    generation.
    """

    family: str
    title: str
    source: str
    base: str | None = None
    """The recipe that this is a variation of."""
    entrypoint: Literal["serve", "api_server"] = "serve"
    device: Literal["gpu", "cpu"] = "gpu"
    parallel: Parallel
    kinds: list[str] = []
    models: list[str] = []
    compute_capability: str = ""
    vllm: str = ""
    """Versions that have what the recipe is about, where that is less than its models' own."""
    args: dict[str, Setting] = {}
    env: dict[str, Setting] = {}

    def arguments(self, vllm_version: str) -> dict[str, Argument]:
        """The recipe's flags that are for this vLLM version."""
        return _applying(self.args, vllm_version)

    def environment(self, vllm_version: str) -> dict[str, str]:
        """The recipe's variables that are for this vLLM version."""
        return {name: str(value) for name, value in _applying(self.env, vllm_version).items()}

    def serves(self, name: str, card: ModelCard) -> bool:
        return self.family == card.family and (not self.models or name in self.models)


def _applying(settings: Mapping[str, Setting], vllm_version: str) -> dict[str, Argument]:
    return {
        name: setting.value
        for name, setting in settings.items()
        if holds(setting.vllm, vllm_version)
    }


@cache
def holds(specifier: str, version: str) -> bool:
    """Whether a version (its local part aside) is in a range; an empty range holds all."""
    return SpecifierSet(specifier, prereleases=True).contains(Version(version).public)


class Variation(Model):
    """A change that a guide makes to several recipes: each is also there as `<recipe>-<name>`."""

    title: str
    source: str
    recipes: list[str]
    args: dict[str, Setting] = {}
    env: dict[str, Setting] = {}


class Contradiction(Model):
    """Where the guides disagree with one another or with today's vLLM, and what the catalogue holds."""

    topic: str
    said: str
    sources: list[str]
    truth: str
    reason: str


class PinnedUv(Model):
    version: str
    sha256: dict[str, str]


class PinnedTool(Model):
    requirements: list[str]


class CudaLine(Model):
    """The CUDA that vLLM's wheels of a version range are for, and the oldest driver branch for it."""

    backend: str
    version: str
    vllm: str
    driver: int
    cure: str


class Repositories(Model):
    """Where sources are, if no mirror says otherwise."""

    nightly: str
    vllm: str
    deep_gemm: str


class Since(Model):
    """What holds of a range of vLLM versions, and where that is from."""

    vllm: str
    source: str


class TritonKernels(Since):
    requirement: str


class Nightly(Since):
    """A fix that nightly builds and sources before it lack; `vllm` is where all have it."""

    commit: str
    families: list[str]
    why: str


class Runtime(Model):
    """How vLLM is built and what it brings along, by version."""

    repositories: Repositories
    fix: Nightly
    triton_kernels: TritonKernels
    copied_libraries: Since
    """Versions whose library is called vllm._C, which the guides' copying cures."""
    bundled_deep_gemm: Since
    deep_gemm_cuda: str
    """Oldest CUDA toolkit that DeepGEMM builds with."""
    download_kernels: Since


class Tools(Model):
    runtime: Runtime
    release_bytes: int
    image_bytes: int
    cuda: list[CudaLine]
    uv: PinnedUv
    hub: PinnedTool
    packages: dict[str, list[str]]
    """Of the distribution, by package manager."""


class Catalog(Model):
    """`recipes` by family and name: `("minimax-m2", "tp4")`."""

    models: dict[str, ModelCard]
    recipes: dict[tuple[str, str], Recipe]
    claims: list[Claim]
    measurements: list[Measurement]
    gpus: dict[str, GpuKind]
    sources: dict[str, Source]
    contradictions: list[Contradiction]
    tools: Tools

    def recipes_of(self, model: str) -> dict[str, Recipe]:
        """The recipes that serve a model, by name."""
        card = self.models[model]
        return {
            name: recipe for (_, name), recipe in self.recipes.items() if recipe.serves(model, card)
        }

    def variations(self, family: str, name: str) -> list[str]:
        """What a recipe's variations add to its name: `-piecewise`."""
        return [
            other.removeprefix(name)
            for (kin, other), recipe in self.recipes.items()
            if kin == family and recipe.base == name
        ]


@cache
def catalog() -> Catalog:
    """The catalogue that ships with this version."""
    models: dict[str, ModelCard] = {}
    recipes: dict[tuple[str, str], Recipe] = {}
    claims: list[Claim] = []
    measurements: list[Measurement] = []
    for family in FAMILIES:
        document = _yaml(f"{family}.yaml")
        for name, card in document["models"].items():
            models[name] = ModelCard(family=family, **card)
        claims.extend(Claim(**claim) for claim in document.get("claims", []))
        measurements.extend(Measurement(**row) for row in document.get("measurements", []))
        own = {
            name: Recipe(family=family, **recipe) for name, recipe in document["recipes"].items()
        }
        own |= dict(_varied(own, document.get("variations", {})))
        recipes.update({(family, name): recipe for name, recipe in own.items()})
    return Catalog(
        models=models,
        recipes=recipes,
        claims=claims,
        measurements=measurements,
        gpus={name: GpuKind(**kind) for name, kind in _yaml("gpus.yaml").items()},
        sources={name: Source(**source) for name, source in _yaml("sources.yaml").items()},
        contradictions=[Contradiction(**row) for row in _yaml("contradictions.yaml")["rows"]],
        tools=Tools(**_yaml("tools.yaml")),
    )


def _varied(
    recipes: Mapping[str, Recipe], documents: Mapping[str, dict[str, Any]]
) -> Iterator[tuple[str, Recipe]]:
    """Each recipe with each set of the variations that name it: `tp4-piecewise-responses`."""
    variations = {name: Variation(**document) for name, document in documents.items()}
    for name, recipe in recipes.items():
        own = [key for key, variation in variations.items() if name in variation.recipes]
        for chosen in _subsets(own):
            titles, args, env = [recipe.title], dict(recipe.args), dict(recipe.env)
            for key in chosen:
                titles.append(variations[key].title)
                args.update(variations[key].args)
                env.update(variations[key].env)
            changes = {"title": ", ".join(titles), "args": args, "env": env, "base": name}
            yield "-".join([name, *chosen]), recipe.model_copy(update=changes)


def _subsets(names: list[str]) -> Iterable[tuple[str, ...]]:
    for size in range(1, len(names) + 1):
        yield from combinations(names, size)


def _yaml(name: str) -> dict[str, Any]:
    text = (files("fleet") / "models" / name).read_text(encoding="utf-8")
    # The loader in C is ten times as quick; not every build of PyYAML has it.
    document = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - both are safe
    assert isinstance(document, dict), name
    return document
