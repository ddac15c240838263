"""Recipe files in the schema of vllm-project/recipes, read as they are: any model, one host.

`read` makes of a variant, a strategy and features what that project's own command builder makes of them
(its src/lib/command-synthesis.js, whose order is kept: base, variant, strategy, the recipe's changes to
the strategy, hardware, features; what comes later wins). Only what is asked for is looked at, so that a
file of a later schema is still read where it says nothing new about that.

`shape_of` and `loaded_weights` take the figures for memory from a model's config.json.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, TypeVar

import yaml
from packaging.version import InvalidVersion, Version
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from fleet.catalog import (
    GateDefaults,
    LoadedWeights,
    ModelCard,
    Parallel,
    Parsers,
    Recipe,
    RemoteCode,
    Setting,
    Shape,
)
from fleet.command import MANAGED_ENVIRONMENT, MANAGED_FLAGS, SPREADING
from fleet.errors import EXPECTED_TYPES, did_you_mean
from fleet.spec import Argument, GpuKind

LONGEST_FILE = 1 << 18
"""Characters of a recipe file; the longest of vllm-project/recipes has some 60,000."""

STRATEGIES: Mapping[str, tuple[str, ...]] = {
    "single_node_tp": ("--tensor-parallel-size",),
    "single_node_tep": ("--enable-expert-parallel", "--tensor-parallel-size"),
    "single_node_dep": ("--enable-expert-parallel", "--data-parallel-size"),
}
"""What serves on one host, with its flags; the last one takes the number of GPUs."""

ANY_ANSWER = r"\S"
"""What the gate expects: a recipe file does not say what its model knows."""

Part = TypeVar("Part", bound="_Part")


class RecipeFileError(ValueError):
    """A recipe file that cannot be read, or not so: `<path inside the file>: what; what to do`.

    `gpus` is the number of GPUs that the recipe asks for, where another number is what is wrong.
    """

    def __init__(self, where: str, what: str, gpus: int | None = None) -> None:
        self.where, self.what, self.gpus = _one_line(where), _one_line(what), gpus
        super().__init__(f"{self.where}: {self.what}")


@dataclass(frozen=True)
class Reading:
    """A recipe file's answer to one service."""

    model: str
    """Hugging Face repository of the chosen variant."""
    card: ModelCard
    recipe: Recipe
    notes: tuple[str, ...] = ()
    """What the recipe wants beyond the command, and what of it is unknown: a line each."""


def read(  # noqa: PLR0913 - what a service says of it
    name: str,
    text: str,
    *,
    strategy: str,
    variant: str = "default",
    features: Sequence[str] | None = None,
    gpu: tuple[str, GpuKind] | None,
    gpus: int,
    config: Mapping[str, Any] | None = None,
) -> Reading:
    """The model and the command of a recipe file's `text` for `gpus` GPUs of one host.

    `name` is the file's path as a site gives it: the card's family and the source of every flag.
    `features` are switched on instead of the recipe's own default; `gpu` is a kind by its key in the
    catalogue, and None for a host without GPUs. `config` is the model's config.json: without it, memory
    is unknown. `weights_bytes` of the card is an estimate: parameters times the precision's bytes.

    Raises RecipeFileError for a file that is none, or that has no such thing for one such host.
    """
    file = _file(text)
    hardware = _hardware(gpu, gpus)
    _check_kind_of_model(file)
    _check_release(file)
    chosen = _choose(file, strategy, variant, hardware)
    blocks = [*_blocks(chosen), *_feature_blocks(chosen, features)]
    flags = _flags(blocks)
    parallel = _parallel(flags, hardware)
    args = _settings(name, flags)
    shape, unknown = _shape(config)
    model = _model_id(chosen)
    recipe = Recipe(
        family=name,
        title=_one_line(f"{file.meta.title or model}, {strategy}"),
        source=name,
        device="cpu" if gpu is None else "gpu",
        parallel=parallel,
        models=[model],
        args=args,
        env={key: Setting(value=value, source=name) for key, value in _env(blocks).items()},
    )
    return Reading(
        model=model,
        card=_card(name, chosen, args, shape, config),
        recipe=recipe,
        notes=(*_notes(chosen), *_missing_files(flags), *unknown),
    )


# The schema, as far as it is used. Unknown keys are let be; null is the same as absent.


def _scalar_text(value: object) -> object:
    """YAML numbers as the words that they are on a command line."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _carried(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character, which no command line can carry; take it out")
    return text


def _absent(default: Callable[[], object]) -> BeforeValidator:
    return BeforeValidator(lambda value: default() if value is None else value)


Word = Annotated[str, BeforeValidator(_scalar_text), AfterValidator(_carried)]
Words = Annotated[list[Word], _absent(list)]
Names = Annotated[list[str], _absent(list)]
Table = Annotated[dict[str, Any], _absent(dict)]
Name = Annotated[str, _absent(lambda: "unknown")]
Environment = Annotated[dict[str, Word], _absent(dict)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class _Meta(_Part):
    title: str | None = None
    tasks: Names = []
    hardware: Table = {}


class _Served(_Part):
    model_id: str
    min_vllm_version: str
    nightly_required: Any = None
    install: Table = {}
    docker_image: Any = None
    architecture: Name = "unknown"
    parameter_count: str | None = None
    context_length: int | None = None
    base_args: Words = []
    base_env: Environment = {}


class _Variant(_Part):
    model_id: str | None = None
    min_vllm_version: str | None = None
    precision: Name = "unknown"
    precision_hardware: Table = {}
    supported_hardware: Names = []
    tp: Any = None
    extra_args: Words = []
    extra_env: Environment = {}
    hardware_overrides: Table = {}
    default_modes: Table = {}


class _Hardwired(_Part):
    """Changes for some hardware; `args` are a feature's, and replace its own."""

    args: list[Word] | None = None
    extra_args: Words = []
    extra_env: Environment = {}


class _Override(_Part):
    """The recipe's changes to a strategy."""

    tp: Any = None
    extra_args: Words = []
    vllm_args: Words = []
    env: Environment = {}
    extra_env: Environment = {}
    hardware_overrides: Table = {}


class _Mode(_Part):
    args: Words = []
    variants: Names = []
    hardware: Table = {}
    hardware_overrides: Table = {}


class _Feature(_Part):
    args: Words = []
    modes: Table = {}
    default_mode: str | None = None
    strategies: Names = []
    hardware: Table = {}
    hardware_overrides: Table = {}
    companion: Any = None


class _Dependency(_Part):
    note: str | None = None
    command: str | None = None
    brand: str | None = None
    optional: Any = None
    install_modes: Names = []


class _File(_Part):
    meta: Annotated[_Meta, _absent(_Meta)] = _Meta()
    model: _Served
    variants: Table
    features: Table = {}
    opt_in_features: Names = []
    hardware_opt_in_features: Table = {}
    compatible_strategies: Names = []
    strategy_overrides: Table = {}
    strategy_hardware: Table = {}
    strategy_min_gpus: Any = None
    hardware_overrides: Table = {}
    dependencies: Annotated[list[Any], _absent(list)] = []
    omni: Any = None


@lru_cache(maxsize=32)
def _file(text: str) -> _File:
    """Parsed once for all the hosts of a fleet: YAML is slow."""
    return _part(_File, _document(text), "")


def _document(text: str) -> dict[Any, Any]:
    if len(text) > LONGEST_FILE:
        what = f"{len(text):,} characters are no recipe; a recipe file has at most {LONGEST_FILE:,}"
        raise RecipeFileError("the file", what)
    try:
        document = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "the file"
        raise RecipeFileError(where, f"{error.problem}; correct the YAML") from None
    except (
        Exception
    ) as error:  # PyYAML lets others through: KeyError for `!!bool x`, RecursionError
        what = f"is no YAML that can be read ({type(error).__name__}); correct it"
        raise RecipeFileError("the file", what) from None
    if not isinstance(document, dict):
        held = "nothing" if document is None else f"a {type(document).__name__}"
        what = f"holds {held}; expected the keys of a recipe: model, variants, …"
        raise RecipeFileError("the file", what)
    return document


def _part(kind: type[Part], content: object, where: str) -> Part:
    """`content` as this part of the schema; where it stands in the file is for the error."""
    try:
        return kind.model_validate({} if content is None else content)
    except ValidationError as error:
        finding = error.errors(include_url=False)[0]
        path = _dotted(where, finding["loc"])
        raise RecipeFileError(path or "the file", _explained(finding)) from None


_SCHEMA = "see CONTRIBUTING.md of vllm-project/recipes"


def _explained(finding: Mapping[str, Any]) -> str:
    kind, value = finding["type"], finding["input"]
    if kind == "missing":
        return f"missing, and every recipe has it; {_SCHEMA}"
    if kind == "value_error":
        return str(finding["ctx"]["error"])
    if kind in EXPECTED_TYPES:
        scalar = kind == "string_type" and isinstance(value, (bool, int, float))
        cure = "quote it" if scalar else _SCHEMA
        return f"expected {EXPECTED_TYPES[kind]}, got {type(value).__name__}; {cure}"
    return f"{finding['msg'][0].lower()}{finding['msg'][1:]}; {_SCHEMA}"


def _dotted(where: str, location: Iterable[int | str]) -> str:
    for part in location:
        if isinstance(part, int):
            where += f"[{part}]"
        elif part != "[key]":  # pydantic's own word, for a key of a mapping
            where = f"{where}.{part}" if where else part
    return where


_LONGEST_TEXT, _LONGEST_VALUE = 300, 60
_LONG = 64
"""Bits from which on an integer is not shown: Python refuses to write those of thousands of digits."""


def _one_line(text: str) -> str:
    printable = "".join(character if character.isprintable() else " " for character in text)
    return _cut(" ".join(printable.split()), _LONGEST_TEXT)


def _shown(value: object) -> str:
    """A value for an error's text; of a list or mapping, which can hold itself, only what it is."""
    if isinstance(value, (str, float)) or (isinstance(value, int) and value.bit_length() < _LONG):
        return _cut(repr(value), _LONGEST_VALUE)
    return f"a {type(value).__name__}"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


# What serves where.


@dataclass(frozen=True)
class _Hardware:
    """A service's GPUs by the names that recipe files have: a profile, a generation and a brand."""

    name: str
    profile: str
    generation: str | None
    brand: str | None
    gpus: int

    @property
    def listed_as(self) -> set[str]:
        """Profiles that mean it in a list: its own, or any Hopper's where recipes have none for it."""
        unknown = self.generation == "hopper" and self.profile not in _HOPPERS
        return {self.profile, *(_HOPPERS if unknown else ())}

    def exact(self, table: Mapping[str, Any]) -> tuple[str, Any] | None:
        """The entry for just this GPU, with its key."""
        return self._first(table, self.profile)

    def broad(self, table: Mapping[str, Any]) -> tuple[str, Any] | None:
        """The entry for its generation, or else for its brand."""
        return self._first(table, self.generation, self.brand)

    def nearest(self, table: Mapping[str, Any]) -> tuple[str, Any] | None:
        """The entry that says most about this GPU."""
        return self._first(table, self.profile, self.generation, self.brand, "default")

    @staticmethod
    def _first(table: Mapping[str, Any], *keys: str | None) -> tuple[str, Any] | None:
        return next(((key, table[key]) for key in keys if key and table.get(key) is not None), None)


_PROFILES = {
    "a100-80": "a100",
    "h20-96": "h20",
    "h20-141": "h20",
    "h100-80": "h100",
    "h200-141": "h200",
    "h800-80": "h800",
}
"""GPU kinds of the catalogue whose profile in vllm-project/recipes is not their own name."""

_HOPPERS = {"h100", "h200"}

_GENERATIONS = {9: "hopper", 10: "blackwell", 11: "blackwell", 12: "blackwell"}
_ADA = (8, 9)


def _hardware(gpu: tuple[str, GpuKind] | None, gpus: int) -> _Hardware:
    if gpu is None:
        return _Hardware("a host without GPUs", "", "cpu", None, gpus)
    key, kind = gpu
    profile = _PROFILES.get(key, key.replace("-", "_"))
    if profile.startswith("rtx_") and gpus > 1:
        profile += f"_{gpus}x"  # workstation cards have a profile for each number of them
    generation = "ada" if kind.capability == _ADA else _GENERATIONS.get(kind.capability[0])
    return _Hardware(key or kind.name, profile, generation, "nvidia", gpus)


@dataclass(frozen=True)
class _Chosen:
    """A recipe file with what a service chose of it."""

    file: _File
    strategy: str
    variant_name: str
    variant: _Variant
    hardware: _Hardware

    @property
    def variant_path(self) -> str:
        return f"variants.{self.variant_name}"

    @property
    def override_path(self) -> str:
        return f"strategy_overrides.{self.strategy}"

    @property
    def override(self) -> _Override:
        overrides = self.file.strategy_overrides
        return _part(_Override, overrides.get(self.strategy), self.override_path)


def _choose(file: _File, strategy: str, variant: str, hardware: _Hardware) -> _Chosen:
    _check_strategy(file, strategy, hardware)
    if variant not in file.variants:
        hint = (
            did_you_mean(variant, file.variants) or f"; it has {', '.join(file.variants) or 'none'}"
        )
        raise RecipeFileError("variants", f"no {variant!r}{hint}")
    path = f"variants.{variant}"
    chosen = _Chosen(
        file, strategy, variant, _part(_Variant, file.variants[variant], path), hardware
    )
    _check_hardware(chosen)
    return chosen


def _check_kind_of_model(file: _File) -> None:
    if file.omni is not None or "omni" in file.meta.tasks:
        what = "is served by vLLM-Omni, not by `vllm serve`; no plan can be made of it"
        raise RecipeFileError("omni" if file.omni is not None else "meta.tasks", what)
    if file.meta.tasks and not {"text", "multimodal"} & set(file.meta.tasks):
        what = (
            f"{', '.join(file.meta.tasks)} is no chat, which a service must answer to be in service"
        )
        raise RecipeFileError("meta.tasks", f"{what}; run it apart from the fleet")


def _check_release(file: _File) -> None:
    """A release of a fleet is made of published wheels, by exact version."""
    if file.model.install.get("pip") is False:
        what = "no wheel of vLLM serves it, only an image; the fleet runs published wheels"
        raise RecipeFileError("model.install.pip", f"{what}, so wait for a release")
    if file.model.nightly_required is True:
        what = "asks for a nightly build; the fleet runs published wheels, so wait for a release"
        raise RecipeFileError("model.nightly_required", what)


def _check_strategy(file: _File, strategy: str, hardware: _Hardware) -> None:
    offered = [name for name in STRATEGIES if _supported(file, name, hardware)]
    others = f"use {' or '.join(offered)}" if offered else "this recipe has none for one host"
    if strategy not in STRATEGIES:
        several = strategy.startswith("multi_node_") or strategy == "pd_cluster"
        what = "spans hosts, and a service is on one" if several else "is no strategy"
        raise RecipeFileError("compatible_strategies", f"{strategy!r} {what}; {others}")
    if strategy not in offered:
        gate = hardware.nearest(_table(file.strategy_hardware, strategy, "strategy_hardware"))
        where = f"strategy_hardware.{strategy}.{gate[0]}" if gate else "compatible_strategies"
        what = f"{strategy!r} is not for {hardware.name}" if gate else f"no {strategy!r}"
        raise RecipeFileError(where, f"{what}; {others}")
    least, where = _least_gpus(file, strategy, hardware)
    if hardware.gpus and hardware.gpus < least:
        what = f"{strategy} takes at least {least} GPUs, and the service has {hardware.gpus}"
        raise RecipeFileError(where, f"{what}; give it {least}", gpus=least)


def _supported(file: _File, strategy: str, hardware: _Hardware) -> bool:
    gates = _table(file.strategy_hardware, strategy, "strategy_hardware")
    if gate := hardware.nearest(gates):
        return bool(gate[1] != "unsupported")
    return strategy in file.compatible_strategies


def _table(tables: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """A mapping of mappings' entry; nothing where it has none."""
    found = tables.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        what = f"expected a mapping, got {type(found).__name__}; {_SCHEMA}"
        raise RecipeFileError(f"{where}.{key}", what)
    return found


def _least_gpus(file: _File, strategy: str, hardware: _Hardware) -> tuple[int, str]:
    """GPUs that a strategy needs, and what of the file says so."""
    floors, where = file.strategy_min_gpus, "strategy_min_gpus"
    bounds = [(1 if strategy == "single_node_tp" else 2, "compatible_strategies")]
    bounds.append(_floor(floors, strategy, where))
    if isinstance(floors, dict):
        profile = hardware.profile
        bounds.append(_floor(floors.get(profile), strategy, f"{where}.{profile}"))
    return max(bounds)


def _floor(floors: object, strategy: str, where: str) -> tuple[int, str]:
    """One number for every strategy, or a mapping of them."""
    if isinstance(floors, dict):
        floors, where = floors.get(strategy), f"{where}.{strategy}"
    return (0 if floors is None else _whole(floors, where)), where


def _whole(value: object, where: str) -> int:
    if type(value) is not int or not 1 <= value <= _MOST_GPUS:
        what = f"expected a whole number of GPUs, got {_shown(value)}; {_SCHEMA}"
        raise RecipeFileError(where, what)
    return value


_MOST_GPUS = 1024


def _check_hardware(chosen: _Chosen) -> None:
    variant, hardware, path = chosen.variant, chosen.hardware, chosen.variant_path
    if chosen.file.meta.hardware.get(hardware.profile) == "unsupported":
        what = f"the model does not run on {hardware.name}; use other hardware"
        raise RecipeFileError(f"meta.hardware.{hardware.profile}", what)
    brand = variant.precision_hardware.get("brand")
    if brand is not None and str(brand).casefold() != hardware.brand:
        what = f"this variant is for {brand}, not for {hardware.name}"
        raise RecipeFileError(f"{path}.precision_hardware", f"{what}; {_other_variant(chosen)}")
    listed = variant.supported_hardware
    if listed and not hardware.listed_as & {*listed}:
        what = f"names {', '.join(listed)}, and not {hardware.name}"
        raise RecipeFileError(f"{path}.supported_hardware", f"{what}; {_other_variant(chosen)}")


def _other_variant(chosen: _Chosen) -> str:
    others = [name for name in chosen.file.variants if name != chosen.variant_name]
    return f"use another variant ({', '.join(others)})" if others else "use other hardware"


# From the file to flags.


@dataclass(frozen=True)
class _Block:
    """Flags and variables of one place in the file."""

    path: str
    words: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)


def _blocks(chosen: _Chosen) -> Iterator[_Block]:
    """What applies, in its order: what comes later wins."""
    served, variant = chosen.file.model, chosen.variant
    yield _Block("model.base_args", served.base_args, served.base_env)
    yield _Block(f"{chosen.variant_path}.extra_args", variant.extra_args, variant.extra_env)
    overrides = f"{chosen.variant_path}.hardware_overrides"
    yield from _hardwired(chosen.hardware.exact(variant.hardware_overrides), overrides)
    yield _strategy(chosen)
    override, path = chosen.override, chosen.override_path
    yield _Block(f"{path}.extra_args", override.extra_args, override.env | override.extra_env)
    yield _Block(f"{path}.vllm_args", override.vllm_args)
    own = chosen.hardware.broad(override.hardware_overrides)
    if own is not None:
        # The strategy's own changes for this hardware stand instead of the recipe's and variant's.
        yield from _hardwired(own, f"{path}.hardware_overrides")
    else:
        broad = chosen.hardware.broad
        yield from _hardwired(broad(chosen.file.hardware_overrides), "hardware_overrides")
        yield from _hardwired(broad(variant.hardware_overrides), overrides)
    exact = chosen.hardware.exact(override.hardware_overrides)
    yield from _hardwired(exact, f"{path}.hardware_overrides")


def _hardwired(entry: tuple[str, Any] | None, where: str) -> Iterator[_Block]:
    if entry is not None:
        path = f"{where}.{entry[0]}"
        part = _part(_Hardwired, entry[1], path)
        yield _Block(f"{path}.extra_args", part.extra_args, part.extra_env)


def _strategy(chosen: _Chosen) -> _Block:
    """The strategy's flags, with all the GPUs that the service was given."""
    gpus = max(1, chosen.hardware.gpus)
    if chosen.strategy == "single_node_tp":
        for content, path in (
            (chosen.variant.tp, f"{chosen.variant_path}.tp"),
            (chosen.override.tp, f"{chosen.override_path}.tp"),
        ):
            wanted = _wanted_gpus(content, path, chosen.hardware)
            if wanted is not None:
                _check_gpus(wanted, chosen.hardware, path, f"asks for {_gpus(wanted)}")
                break
    return _Block(chosen.strategy, [*STRATEGIES[chosen.strategy], str(gpus)])


def _wanted_gpus(content: object, path: str, hardware: _Hardware) -> int | None:
    """A number of GPUs, or a mapping of hardware to them; None where it says nothing."""
    if isinstance(content, dict):
        entry = hardware.nearest(content)
        return None if entry is None else _whole(entry[1], f"{path}.{entry[0]}")
    return None if content is None else _whole(content, path)


def _check_gpus(wanted: int, hardware: _Hardware, path: str, asks: str) -> None:
    given = hardware.gpus
    if given and wanted != given:
        what = f"{asks} and the service has {given}; give it {wanted}"
        raise RecipeFileError(path, what, gpus=wanted)


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _feature_blocks(chosen: _Chosen, asked: Sequence[str] | None) -> Iterator[_Block]:
    """Flags of the features asked for, or of those that the recipe has on by default."""
    features = chosen.file.features
    for name in asked or ():
        if name not in features:
            hint = did_you_mean(name, features) or f"; it has {', '.join(features) or 'none'}"
            raise RecipeFileError("features", f"no {name!r}{hint}")
    for name in _default_features(chosen) if asked is None else features:
        if asked is not None and name not in asked:
            continue
        path = f"features.{name}"
        feature = _part(_Feature, features[name], path)
        reason = _inapplicable(path, feature, chosen)
        if reason is None:
            yield _feature_block(name, feature, chosen)
        elif asked is not None:
            raise RecipeFileError(path, f"{reason}; leave it out of features")


def _default_features(chosen: _Chosen) -> Iterator[str]:
    """All but those to opt in to; a variant can have one on nevertheless."""
    file = chosen.file
    there = file.hardware_opt_in_features.get(chosen.hardware.profile)
    off = [*file.opt_in_features, *(there if isinstance(there, list) else ())]
    for name in file.features:
        if name not in off or name in chosen.variant.default_modes:
            yield name


def _inapplicable(path: str, feature: _Feature, chosen: _Chosen) -> str | None:
    if feature.strategies and chosen.strategy not in feature.strategies:
        return f"is for {', '.join(feature.strategies)}, not for {chosen.strategy}"
    if _is_unsupported(feature.hardware, chosen.hardware):
        return f"is not for {chosen.hardware.name}"
    if feature.companion is not None:
        return "wants a second process beside vLLM, which no plan has"
    if feature.modes and not _modes(path, feature, chosen):
        return f"has no mode for {chosen.variant_name!r} on {chosen.hardware.name}"
    return None


def _is_unsupported(table: Mapping[str, Any], hardware: _Hardware) -> bool:
    return any(
        entry is not None and entry[1] == "unsupported"
        for entry in (hardware.exact(table), hardware.broad(table))
    )


def _modes(path: str, feature: _Feature, chosen: _Chosen) -> dict[str, _Mode]:
    """The modes that this variant and hardware can have."""
    modes = {
        name: _part(_Mode, content, f"{path}.modes.{name}")
        for name, content in feature.modes.items()
    }
    return {
        name: mode
        for name, mode in modes.items()
        if (not mode.variants or chosen.variant_name in mode.variants)
        and not _is_unsupported(mode.hardware, chosen.hardware)
    }


def _feature_block(name: str, feature: _Feature, chosen: _Chosen) -> _Block:
    path, hardware = f"features.{name}", chosen.hardware
    if not feature.modes:
        entry, words = hardware.broad(feature.hardware_overrides), feature.args
    else:
        modes = _modes(path, feature, chosen)
        preferred = (chosen.variant.default_modes.get(name), feature.default_mode)
        usable = (key for key in preferred if isinstance(key, str) and key in modes)
        key = next(usable, next(iter(modes)))
        path = f"{path}.modes.{key}"
        entry, words = hardware.nearest(modes[key].hardware_overrides), modes[key].args
    if entry is not None:
        place = f"{path}.hardware_overrides.{entry[0]}"
        own = _part(_Hardwired, entry[1], place).args
        if own is not None:
            return _Block(f"{place}.args", own)
    return _Block(f"{path}.args", words)


@dataclass(frozen=True)
class _Given:
    """A flag's value, and where in the file it is from."""

    value: Argument
    path: str


_SHORT = {
    "-ac": "attention-config",
    "-asc": "api-server-count",
    "-cc": "compilation-config",
    "-dcp": "decode-context-parallel-size",
    "-dp": "data-parallel-size",
    "-ep": "enable-expert-parallel",
    "-pp": "pipeline-parallel-size",
    "-q": "quantization",
    "-sc": "speculative-config",
    "-tp": "tensor-parallel-size",
}
"""vLLM's short options (fleet/options/) that make sense for a service on one host."""

_NUMBER = re.compile(r"-[0-9]+(?:\.[0-9]+)?")


def _flags(blocks: Iterable[_Block]) -> dict[str, _Given]:
    """Every flag once, with the value that was given last, in the order of these."""
    flags: dict[str, _Given] = {}
    for block in blocks:
        for name, given in _parsed(block):
            # `--no-x` takes back `--x`, and the other way around.
            flags.pop(name.removeprefix("no-") if name.startswith("no-") else f"no-{name}", None)
            flags.pop(name, None)
            flags[name] = given
    return flags


def _parsed(block: _Block) -> Iterator[tuple[str, _Given]]:
    """`--flag value`, `--flag=value`, `--flag a b` and `--flag`, as vLLM's parser reads them."""
    words, index = block.words, 0
    while index < len(words):
        place = f"{block.path}[{index}]"
        # A whole `--flag value` in one word: the recipes' own page joins words by spaces.
        flag, *attached = re.split(r"=|\s+", words[index].strip(), maxsplit=1)
        if not re.match(r"--?[A-Za-z]", flag):
            what = f"{_shown(flag)} follows no flag; an option begins with '--'"
            raise RecipeFileError(place, what)
        index += 1
        while index < len(words) and not _is_flag(words[index]):
            attached.append(words[index])
            index += 1
        yield _flag_name(flag, place), _Given(_value(attached), place)


def _is_flag(word: str) -> bool:
    return word.startswith("-") and word != "-" and not _NUMBER.fullmatch(word)


def _flag_name(flag: str, place: str) -> str:
    """`--attention_config.use_x` is `attention-config.use_x`: fields keep their underscores."""
    option, dot, fields = flag.partition(".")
    if not option.startswith("--"):
        if option not in _SHORT:
            what = f"{_shown(option)} is no short option known here; write the long one"
            raise RecipeFileError(place, what)
        option = _SHORT[option]
    return option.removeprefix("--").replace("_", "-") + dot + fields


def _value(words: Sequence[str]) -> Argument:
    if not words:
        return True
    values = [_scalar(word) for word in words]
    return values[0] if len(values) == 1 else values


def _scalar(word: str) -> Argument:
    """JSON as data, numbers as numbers where they are written the same again, the rest as text."""
    if word[:1] in ("{", "["):
        try:
            content = json.loads(word)
        except (ValueError, RecursionError):
            return word  # a chat template can begin so
        return content if isinstance(content, (dict, list)) else word
    for kind in (int, float):
        try:
            number = kind(word)
        except (ValueError, OverflowError):
            continue
        if str(number) == word and math.isfinite(number):
            return number
    return word


_RANKS = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
_MEMORY = {"max-model-len", "gpu-memory-utilization"}
_PLANNED = {*MANAGED_FLAGS, "no-enable-expert-parallel"} - _MEMORY
"""Flags of a recipe that the plan sets itself, by the service's own keys or by its Parallel."""


def _parallel(flags: Mapping[str, _Given], hardware: _Hardware) -> Parallel:
    tensor, pipeline, data = (_size(name, flags.get(name)) for name in _RANKS)
    expert = "enable-expert-parallel" in flags
    parallel = Parallel(tensor=tensor, pipeline=pipeline, data=data, expert=expert)
    # The file's own flag is at fault rather than the strategy's, which follows the service.
    given = [flags[name].path for name in _RANKS if name in flags]
    where = next((path for path in given if not path.startswith(tuple(STRATEGIES))), given[-1])
    asks = f"{parallel} runs on {_gpus(parallel.ranks)}"
    _check_gpus(parallel.ranks, hardware, where, asks)
    return parallel


def _size(name: str, given: _Given | None) -> int:
    if given is None:
        return 1
    if type(given.value) is not int or not 1 <= given.value <= _MOST_GPUS:
        what = f"--{name} takes a whole number, not {_shown(given.value)}"
        raise RecipeFileError(given.path, f"{what}; {_SCHEMA}")
    return given.value


def _settings(name: str, flags: Mapping[str, _Given]) -> dict[str, Setting]:
    """The flags that stay, each with the recipe file as its source."""
    if "config" in flags:
        what = "--config hides flags from the plan; write them out in the recipe file"
        raise RecipeFileError(flags["config"].path, what)
    spread = next((key for key in flags if key in SPREADING), None)
    if spread is not None:
        what = f"--{spread} spreads it over hosts or further ranks, and a service is on one host"
        raise RecipeFileError(flags[spread].path, f"{what}; use another strategy")
    return {
        key: Setting(value=given.value, source=name)
        for key, given in flags.items()
        if key not in _PLANNED
    }


_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _env(blocks: Iterable[_Block]) -> dict[str, str]:
    """Every variable once, with the value that was given last, but for those of the plan itself."""
    env: dict[str, str] = {}
    for block in blocks:
        where = f"{block.path.removesuffix('args')}env"
        for key, value in block.env.items():
            if not _VARIABLE.fullmatch(key):
                what = f"{_shown(key)} is no name for an environment variable; correct it"
                raise RecipeFileError(where, what)
            if value.startswith("$"):
                what = (
                    f"{key}={value} is to be filled in by hand, and no shell will; write its value"
                )
                raise RecipeFileError(where, what)
            env[key] = value
    return {key: value for key, value in env.items() if key not in MANAGED_ENVIRONMENT}


def _notes(chosen: _Chosen) -> Iterator[str]:
    served = chosen.file.model
    if isinstance(pip := served.install.get("pip"), dict):
        for key in ("command", "note"):
            if isinstance(pip.get(key), str):
                yield _one_line(f"model.install.pip.{key}: {pip[key]}")
    if image := _own_image(served.docker_image):
        yield _one_line(f"model.docker_image: {image} is recommended; the plan uses vLLM's wheel")
    for index, content in enumerate(chosen.file.dependencies):
        path = f"dependencies[{index}]"
        wanted = _part(_Dependency, content, path)
        here = wanted.brand is None or wanted.brand.casefold() == chosen.hardware.brand
        by_wheel = not wanted.install_modes or "pip" in wanted.install_modes
        if here and by_wheel and wanted.optional is not True:
            yield _one_line(f"{path}: {': '.join(filter(None, (wanted.note, wanted.command)))}")


_RELEASED_IMAGE = re.compile(r"vllm/vllm-openai:(?:latest|v[0-9.]+)")


def _own_image(image: object) -> str | None:
    """The image for NVIDIA GPUs, where it is not the one of a release."""
    for keys in (("nvidia",), ("cu130", "cu129")):
        if isinstance(image, dict):
            image = next((image[key] for key in keys if key in image), image)
    return image if isinstance(image, str) and not _RELEASED_IMAGE.fullmatch(image) else None


_FILE = re.compile(r"(?!/)\S+\.(?:jinja|py)")


def _missing_files(flags: Mapping[str, _Given]) -> Iterator[str]:
    for name, given in flags.items():
        if isinstance(given.value, str) and _FILE.fullmatch(given.value):
            what = f"--{name} {given.value} is a file that vLLM's wheel does not have"
            yield _one_line(
                f"{given.path}: {what}; put it on the host, and its absolute path in args"
            )


# The model's card.


@dataclass(frozen=True)
class _Precision:
    """`bits` of a weight with its share of the scales; `capability` is the least that serves it."""

    bits: float
    capability: str
    block: int | None = None


_PRECISIONS = {
    "fp32": _Precision(32, "7.5"),
    "bf16": _Precision(16, "7.5"),
    "fp16": _Precision(16, "7.5"),
    # Without FP8 tensor cores, vLLM's Marlin kernels take the weights as they are, from Ampere on.
    "fp8": _Precision(8, "8.0"),
    "mxfp8": _Precision(8.25, "8.0"),
    "int8": _Precision(8, "7.5"),
    "awq": _Precision(8, "7.5"),
    "gptq": _Precision(8, "7.5"),
    "int4": _Precision(4.25, "7.5"),
    "mxfp4": _Precision(4.25, "8.0"),
    # The recipes' own rule: Blackwell, unless the variant's precision_hardware says otherwise.
    "fp4": _Precision(4.5, "10.0", 16),
    "nvfp4": _Precision(4.5, "10.0", 16),
}
"""By the words of the schema. AWQ and GPTQ at a byte, as its own table has them."""

_UNQUANTISED = {"fp32", "bf16", "fp16"}
_LEAST = "7.5"
_MARLIN = "8.0"
_LEAST_OF_GENERATION = {"ada": "8.9", "hopper": "9.0", "blackwell": "10.0"}
_BYTE, _BF16 = 8, 16

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COUNT = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*([KMBT])", re.IGNORECASE)
_THOUSANDS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def _model_id(chosen: _Chosen) -> str:
    own = chosen.variant.model_id
    model = own or chosen.file.model.model_id
    if not _REPOSITORY.fullmatch(model):
        where = f"{chosen.variant_path}.model_id" if own else "model.model_id"
        what = f"{_shown(model)} is no repository; expected organisation/name"
        raise RecipeFileError(where, what)
    return model


def _card(
    name: str,
    chosen: _Chosen,
    args: Mapping[str, Setting],
    shape: Shape | None,
    config: Mapping[str, Any] | None,
) -> ModelCard:
    served, word = chosen.file.model, chosen.variant.precision.casefold()
    precision = _PRECISIONS.get(word)
    parameters = _parameters(served.parameter_count)
    loaded = None if config is None else loaded_weights(config, word, parameters)
    on_disk = None if loaded is None else loaded.total_bytes
    if on_disk is None and precision and parameters:
        on_disk = math.ceil(parameters * precision.bits / _BYTE)
    version, version_path = _version(chosen)
    return ModelCard(
        family=name,
        architecture=_architecture(config) or served.architecture,
        vllm=f">={version}",
        vllm_source=f"{name}: {version_path}",
        compute_capability=_capability(chosen, precision),
        context_tokens=_context_tokens(served, config),
        weights_bytes=on_disk,
        quantisation="none" if word in _UNQUANTISED else word,
        quantisation_block=_block(config) or (precision.block if precision else None),
        shape=shape,
        loaded=loaded,
        parsers=Parsers(
            tool=_parser_names(args, "tool-call-parser"),
            reasoning=_parser_names(args, "reasoning-parser"),
        ),
        remote_code=RemoteCode(needed="trust-remote-code" in args),
        gate=GateDefaults(expect=ANY_ANSWER),
    )


def _parser_names(args: Mapping[str, Setting], flag: str) -> list[str]:
    value = args[flag].value if flag in args else None
    return [value] if isinstance(value, str) else []


def _version(chosen: _Chosen) -> tuple[Version, str]:
    """The first vLLM that serves the variant, and where the file says so."""
    own = chosen.variant.min_vllm_version
    where = f"{chosen.variant_path}.min_vllm_version" if own else "model.min_vllm_version"
    text = own or chosen.file.model.min_vllm_version
    if text == "nightly":
        what = "asks for a nightly build; the fleet runs published wheels, so wait for a release"
        raise RecipeFileError(where, what)
    try:
        return Version(text), where
    except InvalidVersion:
        what = f"{_shown(text)} is no version of vLLM; write it as in '0.18.0'"
        raise RecipeFileError(where, what) from None


def _capability(chosen: _Chosen, precision: _Precision | None) -> str:
    said = chosen.variant.precision_hardware
    if not said:
        return precision.capability if precision else _LEAST
    generation = _LEAST_OF_GENERATION.get(str(said.get("generation")))
    return generation or (_MARLIN if precision and precision.bits < _BF16 else _LEAST)


def _context_tokens(served: _Served, config: Mapping[str, Any] | None) -> int:
    found = served.context_length
    if found is None and config is not None:
        found = _config_text(config).get("max_position_embeddings")
    where = "model.context_length"
    if found is None:
        raise RecipeFileError(where, "missing; write it, or give the model's config.json")
    if type(found) is not int or not 1 <= found <= _MOST:
        raise RecipeFileError(where, f"{_shown(found)} is no number of tokens; {_SCHEMA}")
    return found


def _parameters(text: str | None) -> int | None:
    """`671B`: 671,000,000,000."""
    found = _COUNT.search(text or "")
    return round(float(found[1]) * _THOUSANDS[found[2].upper()]) if found else None


def _architecture(config: Mapping[str, Any] | None) -> str | None:
    names = (config or {}).get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _block(config: Mapping[str, Any] | None) -> int | None:
    """Edge of a block of weights that shares a scale."""
    quantisation = (config or {}).get("quantization_config")
    block = quantisation.get("weight_block_size") if isinstance(quantisation, dict) else None
    first = block[0] if isinstance(block, list) and block else None
    return first if type(first) is int and first > 0 else None


# Figures for memory, of a config.json.

_NESTED = ("text_config", "llm_config", "language_config")
"""Where a model of text and images keeps the figures of its language model."""

_ATTENDING = {
    "attention",
    "chunked_attention",
    "deepseek_sparse_attention",
    "full_attention",
    "global_attention",
    "local_attention",
    "sliding_attention",
    "sparse_attention",
    "*",
}
_LAYER_LISTS = ("layer_types", "layers_block_type", "hybrid_override_pattern")
_RECURRENT = {"linear_attention", "mamba", "mamba2", "conv", "M"}
_NEITHER = {"mlp", "moe", "-", "E"}

_UNKNOWN_CACHES = ("attn_layer_period", "block_configs", "compress_ratios", "layer_group_size")
"""Keys of models whose KV cache has a form that is not known here."""

_GEOMETRIES = (
    ("num_key_value_heads", "head_dim"),
    ("swa_num_key_value_heads", "swa_head_dim"),
    ("num_global_key_value_heads", "global_head_dim"),
)
"""KV heads and their size; some models have others in sliding-window or in global layers."""


def _shape(config: Mapping[str, Any] | None) -> tuple[Shape | None, tuple[str, ...]]:
    if config is None:
        return None, ()
    try:
        return shape_of(config), ()
    except ValueError as error:
        return None, (_one_line(f"memory is unknown: config.json: {error}"),)


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The figures for memory of a model's config.json, nested ones included.

    Layers with a sliding window are counted as if they kept every token, and a layer's KV heads as the
    larger of what its kinds of layers have: an upper bound. Raises ValueError naming the key that is
    missing, or that says what is not known here.
    """
    text = _config_text(config)
    for key in _UNKNOWN_CACHES:
        if text.get(key):
            raise ValueError(
                f"{key}: this form of KV cache is not known; its memory cannot be told"
            )
    kinds = _layer_kinds(text)
    heads, hidden = _count(text, "num_attention_heads"), _count(text, "hidden_size")
    attending = sum(kind in _ATTENDING for kind in kinds)
    attending -= _optional(text, "num_kv_shared_layers") or 0
    recurrent = sum(kind in _RECURRENT for kind in kinds)
    if attending < 1:
        raise ValueError("no layer keeps keys and values; its memory cannot be told")
    kv_heads, head_dim = _kv_heads(text, heads, hidden)
    latent = _latent(text)
    index_layers, index_dim = _index(text, attending)
    return Shape(
        layers=len(kinds),
        attention_layers=attending,
        attention_heads=heads,
        kv_heads=1 if latent else kv_heads,
        head_dim=head_dim,
        latent_dim=latent,
        index_layers=index_layers,
        index_dim=index_dim,
        state_bytes=recurrent * _layer_state_bytes(text, heads) if recurrent else 0,
        hidden=hidden,
        experts=_optional(text, *_EXPERTS),
        expert_width=_expert_width(text),
        vocabulary=_optional(text, "vocab_size"),
    )


def _config_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((config[key] for key in _NESTED if isinstance(config.get(key), dict)), config)


def _count(text: Mapping[str, Any], key: str) -> int:
    if text.get(key) is None:
        raise ValueError(f"{key} is missing")
    value = text[key]
    if type(value) is not int or not 1 <= value <= _MOST:
        raise ValueError(f"{key}: {_shown(value)} is no count")
    return value


_MOST = 1 << 40
_MOST_LAYERS = 10_000


def _optional(text: Mapping[str, Any], *keys: str) -> int | None:
    """The first of these keys that is there."""
    return next((_count(text, key) for key in keys if text.get(key)), None)


def _layer_kinds(text: Mapping[str, Any]) -> Sequence[str]:
    """What each layer is; by the many ways in which hybrid models say so."""
    kinds = next((text[key] for key in _LAYER_LISTS if text.get(key)), None)
    if kinds is None:
        layers = _count(text, "num_hidden_layers")
        kinds = _stated_kinds(text, min(layers, _MOST_LAYERS))
    if not isinstance(kinds, (list, str)):
        raise ValueError(f"{_shown(kinds)} is no list of layers")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in _ATTENDING | _RECURRENT | _NEITHER:
            raise ValueError(f"{_shown(kind)} is a kind of layer that is not known")
    return kinds


def _stated_kinds(text: Mapping[str, Any], layers: int) -> Sequence[str]:
    flags, linear = text.get("attn_type_list"), text.get("linear_attn_config")
    if isinstance(flags, list):
        return ["linear_attention" if flag == 0 else "attention" for flag in flags]
    if text.get("full_attention_interval"):
        interval = _count(text, "full_attention_interval")
        return ["linear_attention" if n % interval else "attention" for n in range(1, layers + 1)]
    if isinstance(linear, dict):
        full = linear.get("full_attn_layers")
        if not isinstance(full, list):
            raise ValueError("linear_attn_config.full_attn_layers is missing")
        return ["attention"] * len(full) + ["linear_attention"] * (layers - len(full))
    return ["attention"] * layers


def _kv_heads(text: Mapping[str, Any], heads: int, hidden: int) -> tuple[int, int]:
    """KV heads of a layer and the size of one, as configurations default them."""
    own = _optional(text, "head_dim", "attention_head_dim") or hidden // heads
    if own < 1:
        raise ValueError(f"hidden_size: {hidden} is less than num_attention_heads")
    found = [
        (_optional(text, count) or heads, _optional(text, size) or own)
        for count, size in _GEOMETRIES
        if count == "num_key_value_heads" or text.get(count)
    ]
    return max(found, key=math.prod)


def _latent(text: Mapping[str, Any]) -> int | None:
    """Multi-head latent attention keeps one compressed vector and a rotary part."""
    if not text.get("kv_lora_rank"):
        return None
    return _count(text, "kv_lora_rank") + _count(text, "qk_rope_head_dim")


def _index(text: Mapping[str, Any], attending: int) -> tuple[int, int]:
    """Layers with an index of their own for sparse attention, and its elements per token."""
    sparse = text.get("sparse_attention_config")
    if isinstance(sparse, dict) and sparse.get("sparse_index_dim"):
        layers = sparse.get("sparse_attention_freq")
        indexed = sum(layer == 1 for layer in layers) if isinstance(layers, list) else attending
        return indexed, _count(sparse, "sparse_index_dim")
    index_dim = _optional(text, "index_head_dim")
    return (attending, index_dim) if index_dim else (0, 0)


def _layer_state_bytes(text: Mapping[str, Any], heads: int) -> int:
    """What a recurrent layer keeps of a sequence, in vLLM: its state, and the inputs of its convolution.

    States at 4 bytes an element, the larger of the types that models ask for, and inputs at 2.
    """
    linear = text.get("linear_attn_config")
    if isinstance(linear, dict):  # Kimi delta attention
        size = _count(linear, "num_heads") * _count(linear, "head_dim")
        kept = _count(linear, "short_conv_kernel_size") - 1
        return 4 * size * _count(linear, "head_dim") + 2 * kept * 3 * size
    if text.get("linear_num_value_heads"):  # gated delta net
        keys = _count(text, "linear_num_key_heads") * _count(text, "linear_key_head_dim")
        values = _count(text, "linear_num_value_heads") * _count(text, "linear_value_head_dim")
        kept = _count(text, "linear_conv_kernel_dim") - 1
        return 4 * values * _count(text, "linear_key_head_dim") + 2 * kept * (2 * keys + values)
    if text.get("mamba_num_heads"):
        size = _count(text, "mamba_num_heads") * _count(text, "mamba_head_dim")
        state, kept = _count(text, "ssm_state_size"), _count(text, "conv_kernel") - 1
        return 4 * size * state + 2 * kept * (size + 2 * _count(text, "n_groups") * state)
    if text.get("conv_L_cache"):
        return 2 * (_count(text, "conv_L_cache") - 1) * _count(text, "hidden_size")
    if isinstance(text.get("attn_type_list"), list):
        return 4 * heads * _count(text, "head_dim") ** 2
    raise ValueError("the state of its recurrent layers is not known; its memory cannot be told")


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOLERANCE = 1.05
"""Parameters are given to two or three digits."""


def _expert_width(text: Mapping[str, Any]) -> int | None:
    if _optional(text, *_EXPERTS) is None:
        return None
    return _optional(text, "moe_intermediate_size", "intermediate_size")


def loaded_weights(
    config: Mapping[str, Any], precision: str, parameters: int | None
) -> LoadedWeights | None:
    """Weights in GPU memory: an estimate from the model's config.json, its precision (a word of the
    recipes' schema) and its number of parameters.

    Routed experts are counted, and the rest is what remains of `parameters`. Embeddings and output layer
    are in bf16 whatever the precision; of a mixture of experts with 4-bit weights, so is all that is no
    expert. None where a figure is missing, or where they contradict one another.
    """
    known, text = _PRECISIONS.get(precision.casefold()), _config_text(config)
    if known is None or not parameters:
        return None
    try:
        experts = _expert_parameters(text)
        embedded = (_optional(text, "vocab_size") or 0) * _count(text, "hidden_size")
    except ValueError:
        return None
    if experts > parameters * _TOLERANCE:
        return None
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings")) is True
    rest = max(parameters - experts, 0)
    wide = min(embedded * (1 if tied else 2), rest)
    bits = _BF16 if experts and known.bits < _BYTE else known.bits
    expert_bytes = math.ceil(experts * known.bits / _BYTE)
    rest_bytes = math.ceil(((rest - wide) * bits + wide * max(known.bits, _BF16)) / _BYTE)
    return LoadedWeights(total_bytes=expert_bytes + rest_bytes, expert_bytes=expert_bytes)


def _expert_parameters(text: Mapping[str, Any]) -> int:
    """Parameters of all routed experts; 0 of a dense model. Raises ValueError where they are unclear."""
    experts = _optional(text, *_EXPERTS)
    if experts is None:
        return 0
    width = _expert_width(text)
    if width is None:
        raise ValueError("moe_intermediate_size is missing")
    size = _optional(text, "routed_expert_hidden_size", "moe_latent_size", "hidden_size") or 0
    gated = text.get("mlp_hidden_act") != "relu2"
    return _expert_layers(text) * experts * (3 if gated else 2) * size * width


def _expert_layers(text: Mapping[str, Any]) -> int:
    """Layers with routed experts; by the many ways in which models say so."""
    for key in (*_LAYER_LISTS[1:], "mlp_layer_types", "moe_layer_freq"):
        if isinstance(text.get(key), (list, str)):
            return sum(kind in ("E", "moe", "sparse", 1) for kind in text[key])
    chosen, dense = text.get("moe_layers"), text.get("mlp_only_layers")
    if isinstance(chosen, list):
        return len(chosen)
    layers = _count(text, "num_hidden_layers") - (_optional(text, "first_k_dense_replace") or 0)
    layers -= len(dense) if isinstance(dense, list) else 0
    step = (
        _optional(text, "moe_layer_freq", "decoder_sparse_step", "interleave_moe_layer_step") or 1
    )
    return max(layers, 0) // step
