"""What to tell a person whose plan cannot be, or who should know something about it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from math import ceil

from packaging.version import Version

from fleet import command, options, placement
from fleet.catalog import FAMILIES, Claim, ModelCard, Parallel, Recipe, catalog, holds
from fleet.errors import did_you_mean
from fleet.memory import KV_DTYPE_BYTES, OVERHEAD_BYTES, Memory, gib
from fleet.spec import Argument, GpuKind, HostSpec, Service

HIGHEST_UTILISATION = 0.97
"""Above it the CUDA context itself, which vLLM does not allocate, has no room."""

_PLACED = re.compile(r"(tp|tep|dp|dep)([1-9][0-9]?)")

_NOT_COUNTED = {
    "speculative-config": "the draft model's weights and cache",
    "cpu-offload-gb": "what --cpu-offload-gb moves off the GPUs",
    "enable-lora": "LoRA adapters",
}
"""Flags that change what GPUs hold in ways that fleet/memory.py does not work out."""


def either(names: list[str]) -> str:
    """`a, b or c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def unknown_gpu(word: str) -> str:
    """For a GPU kind that the catalogue lacks: kinds that begin so, or that nvidia-smi calls so."""
    known, folded = catalog().gpus, word.casefold()
    named = [
        name
        for name, kind in known.items()
        if name.startswith(f"{folded}-") or kind.name.casefold().endswith(f" {folded}")
    ]
    if named:
        hint = f"; did you mean {either([repr(name) for name in named])}?"
    else:
        hint = did_you_mean(word, known) or f"; known are {', '.join(known)}"
    return f"{word!r} is no GPU kind of the catalogue{hint}; another can be described"


def unknown_recipe(service: Service, gpu: GpuKind | None, gpus: int) -> str:
    """For a recipe that a model does not have: why it cannot have it, or what it has."""
    known = catalog()
    own, card = known.recipes_of(service.model), known.models[service.model]
    legal = placement.legal_recipes(service.model, gpu, gpus)
    use = f"; use {either(legal)}" if legal else ""
    placed = _PLACED.fullmatch(service.recipe)
    if placed:
        size = int(placed[2])
        tensor, data = (size, 1) if placed[1].startswith("t") else (1, size)
        parallel = Parallel(tensor=tensor, data=data, expert=placed[1].endswith("ep"))
        reason = next(placement.illegal(card, parallel), None)
        if reason is not None:
            return f"{reason}{use}"
    parts = set(service.recipe.split("-"))
    same = [name for name in own if set(name.split("-")) == parts]
    hint = f"; did you mean {same[0]!r}?" if same else did_you_mean(service.recipe, own) or use
    if any(name == service.recipe for _, name in known.recipes):
        return f"{service.recipe!r} does not serve {service.model}{hint}"
    return f"{service.recipe!r} is no recipe of {service.model}{hint}"


def does_not_fit(
    held: Memory, service: Service, card: ModelCard, recipe: Recipe, spec: HostSpec
) -> str:
    """Needed against available, and what would fit."""
    inputs = held.inputs
    if held.max_model_len > inputs.context_tokens:
        return (
            f"max_model_len {held.max_model_len} is more than {service.model} takes; "
            f"set {inputs.context_tokens} or less"
        )
    room = inputs.usable_bytes - held.weights_bytes - inputs.overhead_bytes
    if inputs.kv_cache_bytes is not None and inputs.kv_cache_bytes > room > 0:
        return (
            f"kv-cache-memory-bytes {gib(inputs.kv_cache_bytes)} is more than the {gib(room)} that "
            f"weights and overhead leave of a GPU; set {room} or less"
        )
    if room <= 0:
        what = (
            f"the weights of {service.model} do not fit: {gib(held.weights_bytes)} a GPU and "
            f"{gib(inputs.overhead_bytes)} besides are needed, {gib(inputs.usable_bytes)} of "
            f"{gib(inputs.gpu_bytes)} are available at utilisation {inputs.utilisation:g}"
        )
    else:
        what = (
            f"does not fit: one sequence of {held.max_model_len} tokens needs "
            f"{gib(held.needed_kv_bytes)} of KV cache a GPU, {gib(held.kv_bytes)} are available"
        )
    cures = list(_cures(held, service, card, recipe, spec))
    if not cures:
        return f"{what}; it needs more or larger GPUs"
    return f"{what}; {' or '.join(cures)} fits"


def _cures(
    held: Memory, service: Service, card: ModelCard, recipe: Recipe, spec: HostSpec
) -> Iterator[str]:
    """Changes of one key each that make it fit."""
    if held.largest_max_model_len > 0:
        yield f"max_model_len up to {held.largest_max_model_len}"
    if held.inputs.kv_cache_bytes is None and held.least_utilisation <= HIGHEST_UTILISATION:
        yield f"gpu_memory_utilization of at least {ceil(held.least_utilisation * 100) / 100:g}"
    nearest = _nearest(service, card, recipe, spec)
    if nearest is not None:
        yield f"recipe {nearest.recipe_name!r} on {nearest.gpus} GPUs"


def _nearest(
    service: Service, card: ModelCard, recipe: Recipe, spec: HostSpec
) -> placement.Fit | None:
    """Another recipe that fits with the service's own settings, on GPUs that no other service has."""
    kind = catalog().gpus.get(spec.gpu) if isinstance(spec.gpu, str) else spec.gpu
    if recipe.family not in FAMILIES or kind is None:
        return None
    taken = {gpu for other in spec.services if other.name != service.name for gpu in other.gpus}
    changes = command.site_arguments(service)
    version = spec.vllm.version
    reviewed = {*card.remote_code.revisions, *spec.reviewed_revisions}
    found = placement.fits(service.model, kind, spec.gpu_count - len(taken), version, changes)
    return placement.nearest_fit(
        (
            fit
            for fit in found
            if service.revision in reviewed
            or not {**fit.recipe.arguments(version), **changes}.get("trust-remote-code")
        ),
        recipe,
    )


def too_heavy(
    model: str, card: ModelCard, recipe: Recipe, kind: GpuKind, utilisation: float
) -> str | None:
    """Where only the weights are known: whether they alone are too much. They are an estimate, so a
    tenth of it is let pass."""
    if card.weights_bytes is None:
        return None
    least = card.weights_bytes * 9 // 10 // recipe.parallel.ranks + OVERHEAD_BYTES
    usable = int(kind.memory_bytes * utilisation)
    if least <= usable:
        return None
    return (
        f"the weights of {model} do not fit: about {card.weights_bytes / 1e9:.0f} GB on "
        f"{recipe.parallel.ranks} GPUs, and {gib(OVERHEAD_BYTES)} besides on each, {gib(usable)} of "
        f"{gib(kind.memory_bytes)} are available; it needs more or larger GPUs"
    )


def claims(service: Service, spec: HostSpec) -> Iterator[Claim]:
    """What guides say that these GPUs hold."""
    for claim in catalog().claims:
        same_hardware = (claim.gpu, claim.gpus) == (spec.gpu, len(service.gpus))
        if same_hardware and service.model in claim.models:
            yield claim


def notes(
    service: Service, card: ModelCard, recipe: Recipe, spec: HostSpec, held: Memory | None
) -> Iterator[str]:
    """What a person should know before a roll-out."""
    version = spec.vllm.version
    arguments = command.arguments(service, recipe, version)
    yield from (note.text for note in card.notes if holds(note.vllm, version))
    if not holds(card.recommended, version):
        yield f"{card.recommended_by} asks for vLLM {card.recommended}"
    yield from _unrecorded(version)
    if spec.mirrors.index and spec.vllm.torch_backend:
        yield "torch_backend is left out: it would fetch torch past mirrors.index"
    if isinstance(spec.gpu, str) and recipe.kinds and spec.gpu not in recipe.kinds:
        source = catalog().sources[recipe.source].title
        yield f"{source} has {service.recipe!r} for {either(recipe.kinds)}, not for {spec.gpu}"
    yield from _memory_notes(service, card, recipe, spec, held, arguments)
    for key, names in (
        ("tool-call-parser", card.parsers.tool),
        ("reasoning-parser", card.parsers.reasoning),
    ):
        value = arguments.get(key)
        if value is not None and names and value not in names:
            yield f"--{key} {value} is not {service.model}'s: {either(names)}"
    for name, setting in (recipe.args | recipe.env).items():
        if not holds(setting.vllm, version) and name not in service.args:
            why = f" ({setting.why})" if setting.why else ""
            yield f"{name} of the recipe is left out: it is for vLLM {setting.vllm}{why}"


def _memory_notes(  # noqa: PLR0913 - all of them are looked at
    service: Service,
    card: ModelCard,
    recipe: Recipe,
    spec: HostSpec,
    held: Memory | None,
    arguments: Mapping[str, Argument],
) -> Iterator[str]:
    if spec.gpu is None:
        return
    if held is None:
        known = recipe.family in FAMILIES
        cure = "the catalogue has no size of its weights" if known else "give model_config_file"
        yield f"memory is unknown: {cure}"
        return
    dtype = str(arguments.get("kv-cache-dtype", "auto"))
    if dtype not in KV_DTYPE_BYTES:
        yield f"--kv-cache-dtype {dtype} is counted as two bytes an element, more than it takes"
    yield from (
        f"memory does not count {what}" for name, what in _NOT_COUNTED.items() if name in arguments
    )
    if held.inputs.utilisation > HIGHEST_UTILISATION:
        yield f"gpu_memory_utilization {held.inputs.utilisation:g} leaves the CUDA context no room"
    asked, room = held.max_model_len, held.largest_max_model_len
    if service.max_model_len is None and "max-model-len" in arguments and asked < room:
        yield f"max_model_len is the recipe's {asked}; up to {room} fits, set what requests need"


@cache
def _unrecorded(version: str) -> tuple[str, ...]:
    """A note where vLLM's options are not known at this version itself."""
    checked = options.checked_against(version)
    if [Version(found) for found in checked] == [Version(Version(version).public)]:
        return ()
    against = " and ".join(checked)
    return (f"vLLM {version} is not recorded; its options were checked against {against}",)
