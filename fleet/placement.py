"""Which recipes of a model are legal on which GPUs, and what they hold there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from fleet import options
from fleet.catalog import LoadedWeights, ModelCard, Parallel, Recipe, catalog, holds
from fleet.memory import KV_DTYPE_BYTES, Inputs, Memory, memory
from fleet.spec import Argument, GpuKind

AUTO = ("auto", "-1", -1)
"""--max-model-len: as long as fits."""

_SUFFIXES = {
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
    "T": 1 << 40,
}


def illegal(card: ModelCard, parallel: Parallel) -> Iterator[str]:
    """Why a model cannot be split so; nothing where it can."""
    shape, tensor = card.shape, parallel.tensor
    if shape is None:
        return
    if shape.attention_heads % tensor:
        yield f"{tensor} does not divide {shape.attention_heads} attention heads"
    if not shape.latent_dim and shape.kv_heads % tensor and tensor % shape.kv_heads:
        yield f"{tensor} neither divides {shape.kv_heads} KV heads nor is a multiple of them"
    if parallel.pipeline > shape.layers:
        yield f"{parallel.pipeline} pipeline ranks for {shape.layers} layers"
    # vLLM flattens tensor and data ranks for its experts, whether they are kept whole or sliced.
    ranks = tensor * parallel.data
    if shape.experts and parallel.expert and shape.experts % ranks:
        yield f"{ranks} does not divide {shape.experts} experts"
    if shape.expert_width and card.quantisation_block and not parallel.expert:
        width, rest = divmod(shape.expert_width, ranks)
        if rest:
            yield f"{ranks} does not divide the experts' width of {shape.expert_width}"
        elif width % card.quantisation_block:
            yield (
                f"{ranks} splits {shape.expert_width} into {width}, not a multiple of the "
                f"{card.quantisation.upper()} block {card.quantisation_block}"
            )


def unsupported(card: ModelCard, recipe: Recipe, kind: GpuKind) -> Iterator[str]:
    """Why a GPU cannot run a model or a recipe."""
    least = tuple(map(int, card.compute_capability.split(".")))
    if kind.capability < least:
        yield (
            f"this checkpoint ({card.quantisation}) needs compute capability "
            f"{card.compute_capability}; {kind.name} has {kind.compute_capability}"
        )
    if not holds(recipe.compute_capability, kind.compute_capability):
        yield (
            f"the recipe is for compute capability {recipe.compute_capability.lstrip('=')}; "
            f"{kind.name} has {kind.compute_capability}"
        )


def service_memory(
    card: ModelCard,
    parallel: Parallel,
    kind: GpuKind,
    arguments: Mapping[str, Argument],
    vllm_version: str,
) -> Memory | None:
    """What the GPUs of a service hold, by its flags; None where the model's figures are unknown.

    Raises ValueError for a flag's value that is no number.
    """
    weights = _loaded(card, arguments)
    if card.shape is None or weights is None:
        return None
    dtype = str(arguments.get("kv-cache-dtype", "auto"))
    if dtype == "auto" and arguments.get("dtype") in ("float", "float32"):
        dtype = "float32"
    index_dtype = _field(arguments, "attention-config", "indexer_kv_dtype")
    length = arguments.get("max-model-len", card.context_tokens)
    return memory(
        Inputs(
            gpu_bytes=kind.memory_bytes,
            utilisation=utilisation(arguments, vllm_version),
            parallel=parallel,
            shape=card.shape,
            weights=weights,
            kv_element_bytes=KV_DTYPE_BYTES.get(dtype, 2),
            index_element_bytes=KV_DTYPE_BYTES.get(str(index_dtype), 2),
            max_model_len=None if length in AUTO else _number("max-model-len", length),
            context_tokens=card.context_tokens,
            max_sequences=_optional_number(arguments, "max-num-seqs"),
            kv_cache_bytes=_optional_number(arguments, "kv-cache-memory-bytes"),
        )
    )


def _loaded(card: ModelCard, arguments: Mapping[str, Argument]) -> LoadedWeights | None:
    quantisation = arguments.get("quantization")
    return card.loaded_as.get(str(quantisation), card.loaded) if quantisation else card.loaded


def _field(arguments: Mapping[str, Argument], option: str, field: str) -> object:
    """A field of an option that takes JSON, in any of the forms that vLLM takes; None if not given."""
    value = arguments.get(f"{option}.{field}")
    if value is not None:
        return value
    whole = arguments.get(option)
    if isinstance(whole, str):
        try:
            whole = json.loads(whole)
        except ValueError:
            return None  # told by fleet/options.py
    return whole.get(field) if isinstance(whole, dict) else None


def utilisation(arguments: Mapping[str, Argument], vllm_version: str) -> float:
    """--gpu-memory-utilization, or what this vLLM takes where it is not given.

    Raises ValueError for what is no share above 0 and up to 1.
    """
    value = arguments.get("gpu-memory-utilization")
    if value is None:
        value = options.default("--gpu-memory-utilization", vllm_version)
    try:
        share = float(str(value))
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"--gpu-memory-utilization {value!r} is not in (0, 1]")
    return share


def _optional_number(arguments: Mapping[str, Argument], name: str) -> int | None:
    value = arguments.get(name)
    return None if value is None else _number(name, value)


def _number(name: str, value: Argument) -> int:
    """A whole number as vLLM reads it: `65536`, `64k` (thousands), `64K` (1024s)."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,6})?)([kmgtKMGT]?)", str(value))
    if not found:
        raise ValueError(f"--{name} {value!r} is no number")
    if found[1].isdigit():
        return int(found[1]) * _SUFFIXES.get(found[2], 1)
    return int(float(found[1]) * _SUFFIXES.get(found[2], 1))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One recipe on GPUs of one kind. `memory` is None where it is unknown, or where `reasons` say why
    the recipe cannot run there at all."""

    recipe_name: str
    recipe: Recipe = field(hash=False)
    gpus: int
    reasons: tuple[str, ...]
    memory: Memory | None

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.fits


def fits(
    model: str,
    kind: GpuKind,
    gpus: int,
    vllm_version: str,
    changes: Mapping[str, Argument] | None = None,
) -> Iterator[Fit]:
    """Every recipe of a model that wants at most so many GPUs, on GPUs of a kind.

    `changes` are a site's own flags, over each recipe's; None takes one away.
    """
    card = catalog().models[model]
    for name, recipe in catalog().recipes_of(model).items():
        if recipe.parallel.ranks > gpus or recipe.device == "cpu":
            continue
        if not holds(recipe.vllm, vllm_version):
            continue
        reasons = (*illegal(card, recipe.parallel), *unsupported(card, recipe, kind))
        merged = {**recipe.arguments(vllm_version), **(changes or {})}
        arguments = {flag: value for flag, value in merged.items() if value is not None}
        found = None
        if not reasons:
            found = service_memory(card, recipe.parallel, kind, arguments, vllm_version)
        yield Fit(
            recipe_name=name,
            recipe=recipe,
            gpus=recipe.parallel.ranks,
            reasons=reasons,
            memory=found,
        )


def nearest_fit(found: Iterable[Fit], like: Recipe) -> Fit | None:
    """Of the recipes that fit, the one with the number of GPUs nearest to another's."""
    ranks = like.parallel.ranks
    fitting = [fit for fit in found if fit.fits]
    return min(fitting, key=lambda fit: (abs(fit.gpus - ranks), fit.recipe_name), default=None)


def legal_recipes(model: str, kind: GpuKind | None, gpus: int) -> list[str]:
    """Names of a model's recipes that could run on these GPUs, variations of one another left out."""
    card = catalog().models[model]
    return [
        name
        for name, recipe in catalog().recipes_of(model).items()
        if recipe.base is None
        and recipe.parallel.ranks <= max(gpus, 1)
        and recipe.device == ("cpu" if kind is None else "gpu")
        and not any(illegal(card, recipe.parallel))
        and not (kind and any(unsupported(card, recipe, kind)))
    ]
