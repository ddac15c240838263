"""What each vLLM release takes on its command line and in its environment.

fleet/options/vllm-VERSION.json is what the parser of that release itself says; it is written by
scripts/record_vllm_options.py. Here an argument vector is held against it, as strictly as vLLM's own
parser holds it and beyond: that parser completes abbreviations and knows nothing of the values that
only the engine judges (parsers, quantisation, KV cache types, attention backends, CUDA graph modes),
so that such a mistake would show up minutes later, on the host.

It is package data, read once per version: nothing of a site or a host is looked at here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Any

from packaging.version import Version

from fleet.errors import did_you_mean

_FILE = re.compile(r"vllm-(.+)\.json")
_NEGATIVE_NUMBER = re.compile(r"-\d+|-\d*\.\d+")  # what argparse takes for a value
_LEVEL = re.compile(r"-O=?([0-3])")
_HUMAN = re.compile(r"(\d+(?:\.\d+)?)([A-Za-z])")
_OBJECT = re.compile(r"\s*\{.*\}\s*", re.DOTALL)
_SHOWN = 60
"""Characters of a value that a message repeats."""
_LEAVE_OUT = "; leave it out"
_CANDIDATES = 3
"""Options that a message names where an abbreviation could be any of many."""

_ENGINE_VALUES = {
    "attention_backend": "attention_backends",
    "kv_cache_dtype": "kv_cache_dtypes",
    "quantization": "quantization_methods",
    "reasoning_parser": "reasoning_parsers",
    "tool_call_parser": "tool_parsers",
}
"""Options whose values only the engine judges, each with the recorded list of what it takes."""

_ENGINE_FIELDS = {
    ("attention_config", "backend"): "attention_backends",
    ("compilation_config", "cudagraph_mode"): "cudagraph_modes",
}
"""The same, for fields of options that take JSON."""

_FOLDING: Mapping[str, Callable[[str], str]] = {
    "attention_backends": str.upper,
    "cudagraph_modes": str.upper,
    "quantization_methods": str.lower,
}
"""How vLLM spells a value before it looks it up in one of these lists."""

_PLUGINS = {
    "reasoning_parser": "reasoning_parser_plugin",
    "tool_call_parser": "tool_parser_plugin",
}
"""Options with which a site brings values of its own, so that the recorded list is not all of them."""


@dataclass(frozen=True)
class Finding:
    """Something that a vLLM version will not take.

    `option` is the flag (`--max-model-len`) or the name of the environment variable, and `what` one
    line: what is wrong with it at this version, and the nearest right one.
    """

    option: str
    what: str


@dataclass(frozen=True)
class _Fault:
    """What one release objects to: it does not `verb` `thing`; `cure` says what to do.

    Without a verb it holds for any version, and `thing` is the whole of it.
    """

    verb: str
    thing: str
    cure: str = ""

    @property
    def said(self) -> str:
        return f"does not {self.verb} {self.thing}{self.cure}"


_Judged = Iterator[tuple[int, str, _Fault]]
"""Place of an option in what was given, its name, and a fault of it."""


@dataclass(frozen=True)
class _Option:
    """An option as its release defines it; see `describe` of the recording script."""

    flags: tuple[str, ...]
    dest: str
    action: str = "StoreAction"
    type: str | None = None
    nargs: int | str | None = None
    choices: tuple[Any, ...] | None = None
    fields: frozenset[str] = frozenset()
    folds: bool = False
    default: Any = None

    @property
    def name(self) -> str:
        """Its long form, which is what a person should write."""
        return next((flag for flag in self.flags if flag.startswith("--")), self.flags[0])

    @property
    def arity(self) -> tuple[int, float]:
        """The fewest and the most values that it takes."""
        if isinstance(self.nargs, int):
            return self.nargs, self.nargs
        return {None: (1, 1), "?": (0, 1), "*": (0, float("inf")), "+": (1, float("inf"))}[
            self.nargs
        ]

    @property
    def is_json(self) -> bool:
        """Whether an object can be given to it, and so also its fields one by one."""
        kind = self.type or ""
        return "loads" in kind or "parse_dataclass" in kind or "union_dict" in kind


@dataclass(frozen=True)
class _Record:
    """One release's options by every flag of theirs, what its engine knows, and its variables."""

    version: str
    options: Mapping[str, _Option]
    values: Mapping[str, frozenset[str]]
    deprecated_quantization: frozenset[str]
    requires: Mapping[str, str]
    serve_only: frozenset[str]
    level: tuple[str, ...]
    integer_suffixes: frozenset[str]
    environment: frozenset[str]


@cache
def recorded_versions() -> tuple[str, ...]:
    """The vLLM versions whose options are recorded, ascending."""
    names = (_FILE.fullmatch(file.name) for file in (files("fleet") / "options").iterdir())
    return tuple(sorted((name[1] for name in names if name), key=Version))


@cache
def checked_against(version: str) -> tuple[str, ...]:
    """The recorded versions that speak for `version`: itself, or else its neighbours, older first.

    A local part (`+cu129`) makes no difference. Raises packaging's InvalidVersion, a ValueError,
    for what is no version.
    """
    wanted = Version(Version(version).public)
    recorded = recorded_versions()
    for known in recorded:
        if Version(known) == wanted:
            return (known,)
    older = [known for known in recorded if Version(known) < wanted]
    newer = [known for known in recorded if Version(known) > wanted]
    return (*older[-1:], *newer[:1])


def check_options(
    options: Iterable[Sequence[str]], version: str, *, entrypoint: str = "serve"
) -> Iterator[Finding]:
    """What `version` refuses, or would misread, of `options`.

    Each option is its words: `("--max-model-len", "65536")`. `entrypoint` is `serve` for `vllm serve`
    or `api_server` for the module of that name, which lacks a few of its options. Where the version is
    not recorded, it is a finding only if both its neighbours object.
    """
    given = [tuple(words) for words in options if words]
    yield from _agreed(version, lambda record: _judge(given, record, entrypoint))


def check_environment(names: Iterable[str], version: str) -> Iterator[Finding]:
    """Variables of vLLM's (`VLLM_…`) that `version` does not read.

    vLLM itself only logs a warning for them and serves without what they were meant to change. Other
    programs' variables are not looked at.
    """
    given = [name for name in names if name.startswith("VLLM_")]

    def judge(record: _Record) -> _Judged:
        for place, name in enumerate(given):
            if name not in record.environment:
                elsewhere = _elsewhere(name, lambda other: other.environment)
                cure = elsewhere or did_you_mean(name, record.environment) or _LEAVE_OUT
                yield place, name, _Fault("know", "it", cure)

    yield from _agreed(version, judge)


def default(flag: str, version: str) -> Any:
    """What an option (`--gpu-memory-utilization`) is where it is not given; None if it has no default.

    Between two recorded versions, the one of the same minor release speaks, else the older.
    """
    against = checked_against(version)
    release = Version(version).release[:2]
    known = next((v for v in against if Version(v).release[:2] == release), against[0])
    option = _record(known).options.get(flag)
    return option.default if option else None


@cache
def same_option(flag: str, version: str) -> frozenset[str]:
    """All flags that mean the option of `flag` at `version`, itself included.

    Negative forms and short ones, too; between two recorded versions, those of both.
    """
    found = {flag}
    for known in checked_against(version):
        record = _record(known)
        if flag in record.options:
            dest = record.options[flag].dest
            found |= {name for name, option in record.options.items() if option.dest == dest}
    return frozenset(found)


@cache
def negative(flag: str, version: str) -> str | None:
    """The flag that turns an option off (`--no-enable-prefix-caching`); None if it has none."""
    opposite = f"--no-{flag.removeprefix('--')}"
    record = _record(checked_against(version)[-1])
    return opposite if opposite in record.options else None


@cache
def several(flag: str, version: str) -> str | None:
    """How an option takes several values: `words` after it, or `repeated`; None if it takes one."""
    option = _record(checked_against(version)[-1]).options.get(flag)
    if option is None:
        return None
    if option.arity[1] > 1:
        return "words"
    return "repeated" if option.action == "AppendAction" else None


# --- reading the records -------------------------------------------------------------------------


@cache
def _record(version: str) -> _Record:
    file = files("fleet") / "options" / f"vllm-{version}.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    options = [_option(described) for described in data["options"]]
    return _Record(
        version=version,
        options={flag: option for option in options for flag in option.flags},
        values={
            name: frozenset(data[name])
            for name in {*_ENGINE_VALUES.values(), *_ENGINE_FIELDS.values()}
        },
        deprecated_quantization=frozenset(data["deprecated_quantization_methods"]),
        requires=data["requires"],
        serve_only=frozenset(data["serve_only"]),
        level=tuple(data["level_3"]),
        integer_suffixes=frozenset(data["integer_suffixes"]),
        environment=frozenset(data["env"]),
    )


def _option(described: Mapping[str, Any]) -> _Option:
    return _Option(
        flags=tuple(described["flags"]),
        dest=described["dest"],
        action=described.get("action", "StoreAction"),
        type=described.get("type"),
        nargs=described.get("nargs"),
        choices=tuple(described["choices"]) if "choices" in described else None,
        fields=frozenset(described.get("fields", ())),
        folds=described.get("folds", False),
        default=described.get("default"),
    )


# --- what several versions agree on --------------------------------------------------------------


def _agreed(version: str, judge: Callable[[_Record], _Judged]) -> Iterator[Finding]:
    """The faults that every version which speaks for `version` finds in the same place."""
    against = checked_against(version)
    places: list[dict[tuple[int, str], list[_Fault]]] = []
    for known in against:
        found: dict[tuple[int, str], list[_Fault]] = {}
        for place, name, fault in judge(_record(known)):
            found.setdefault((place, name), []).append(fault)
        if not found:
            return
        places.append(found)
    exact = Version(against[0]) == Version(Version(version).public)
    for key in sorted(places[0]):
        if all(key in found for found in places):
            for same in _matched([found[key] for found in places]):
                yield Finding(key[1], _what(None if exact else version, against, same))


def _matched(found: Sequence[Sequence[_Fault]]) -> Iterator[tuple[_Fault, ...]]:
    """One fault of each version, together: those that say the same, or else the first of each."""
    common = False
    for fault in found[0]:
        same = [
            next((o for o in other if (o.verb, o.thing) == (fault.verb, fault.thing)), None)
            for other in found
        ]
        if None not in same:
            common = True
            yield tuple(other for other in same if other)
    if not common:
        yield tuple(faults[0] for faults in found)


def _what(version: str | None, against: Sequence[str], faults: Sequence[_Fault]) -> str:
    """The text of a finding; `version` where it is not itself recorded."""
    newest = faults[-1]
    same = len({(fault.verb, fault.thing) for fault in faults}) == 1
    if same and not newest.verb:
        return f"{newest.thing}{newest.cure}"
    if version is None:
        return f"vLLM {against[0]} {newest.said}"
    if len(against) == 1:
        return f"vLLM {version} is not recorded, and {against[0]} {newest.said}"
    if same:
        said = f"{newest.verb}s {newest.thing}{newest.cure}"
        return f"vLLM {version} is not recorded; neither {' nor '.join(against)} {said}"
    said = "; ".join(
        f"{known} {fault.said}" if fault.verb else f"{known}: {fault.thing}{fault.cure}"
        for known, fault in zip(against, faults, strict=True)
    )
    return f"vLLM {version} is not recorded; {said}"


def _elsewhere(word: str, known_to: Callable[[_Record], Container[str]]) -> str:
    """`, but 0.20.2 to 0.33.0 do`: the recorded versions that know a word; nothing if none does."""
    runs = []
    for known, run in groupby(recorded_versions(), key=lambda v: word in known_to(_record(v))):
        if known:
            first, *rest = run
            runs.append(f"{first} to {rest[-1]}" if rest else first)
    if not runs:
        return ""
    several = len(runs) > 1 or " to " in runs[0]
    return f", but {' and '.join(runs)} {'do' if several else 'does'}"


# --- one version's judgement ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """One option as it was written: its flag, the path of a field after it, and its values."""

    flag: str
    path: tuple[str, ...]
    values: tuple[str, ...]
    attached: bool
    """Whether the value was written after `=`, where it cannot be taken for an option."""

    @property
    def name(self) -> str:
        return ".".join((self.flag, *self.path))


def _judge(options: Sequence[Sequence[str]], record: _Record, entrypoint: str) -> _Judged:
    """Every fault that one release finds in options, each given as its words."""
    found: list[tuple[int, _Given, _Option]] = []
    for place, words in enumerate(options):
        given = _given(words, record)
        option = record.options.get(given.flag)
        if option is None or (entrypoint == "api_server" and given.flag in record.serve_only):
            yield place, given.name, _unknown(given.flag, record, entrypoint)
            continue
        found.append((place, given, option))
    yield from _repeated(found)
    dests = {option.dest for _, _, option in found}
    for place, given, option in found:
        for fault in _faults(given, option, record, dests):
            yield place, given.name, fault


def _repeated(found: Sequence[tuple[int, _Given, _Option]]) -> _Judged:
    """Options given twice: the last one wins, and silently. Different fields may come one by one."""
    first: dict[str, _Given] = {}
    names: set[tuple[str, tuple[str, ...]]] = set()
    for place, given, option in found:
        if option.action in {"AppendAction", "HelpAction"}:
            continue
        earlier = first.setdefault(option.dest, given)
        name = (option.dest, given.path)
        again = name in names and not given.name.endswith("+")
        names.add(name)
        if bool(earlier.path) != bool(given.path):
            cure = (
                f"{earlier.name} is given too, and vLLM would drop it; give all in one JSON object"
            )
            yield place, given.name, _Fault("", cure)
        elif again and earlier.flag != given.flag and not given.path:
            cure = f"{earlier.flag} is the same option, and given too; leave one out"
            yield place, given.name, _Fault("", cure)
        elif again:
            yield place, given.name, _Fault("", "it is given twice; leave one out")


def _given(words: Sequence[str], record: _Record) -> _Given:
    """Read one option's words as vLLM's parser does: underscores, `=`, dotted fields, and `-O3`."""
    if record.level and (level := _LEVEL.fullmatch("".join(words[:2]))):
        # The recorded words are those that this release makes of -O3.
        words = [word.replace("3", level[1]) for word in record.level]
    flag, equals, value = words[0].partition("=")
    flag, *path = flag.split(".")
    if flag.startswith("--"):
        flag = f"--{flag[2:].replace('_', '-')}"
    values = (value, *words[1:]) if equals else tuple(words[1:])
    return _Given(flag=flag, path=tuple(path), values=values, attached=bool(equals))


def _unknown(flag: str, record: _Record, entrypoint: str) -> _Fault:
    """Why a flag is none: no option at all, `vllm serve`'s only, abbreviated, or not this version's."""
    if not re.match(r"--?[A-Za-z]", flag):
        return _Fault("", f"{_shown(flag)} is no option; an option begins with '--'")
    if flag in record.options:
        return _Fault("know", "it", " when started as a module; use a recipe of `vllm serve`")
    known = record.options.keys() - (record.serve_only if entrypoint == "api_server" else set())
    longer = sorted(name for name in known if name.startswith(flag))
    if len(longer) == 1:
        # argparse completes it, until a later version has a second option that begins so.
        return _Fault("know", "it", f"; it would be read as {longer[0]}, so write that")
    elsewhere = _elsewhere(flag, lambda other: other.options)
    if longer and not elsewhere:
        more = " or others" if len(longer) > _CANDIDATES else ""
        could = " or ".join(longer[:_CANDIDATES])
        return _Fault("know", "it", f"; it could stand for {could}{more}")
    return _Fault("know", "it", elsewhere or did_you_mean(flag, known) or _LEAVE_OUT)


def _faults(
    given: _Given, option: _Option, record: _Record, dests: Container[str]
) -> Iterator[_Fault]:
    if option.action == "HelpAction":
        yield _Fault("", "it prints help and exits; leave it out")
        return
    if fault := _wrong_number(given, option):
        yield fault
        return
    required = record.requires.get(given.flag)
    if required and record.options[required].dest not in dests:
        yield _Fault("take", f"it without {required}", "; give both")
    if given.path:
        yield from _field_faults(given, option, record)
        return
    for value in given.values:
        yield from _value_faults(value, option, record, dests)


def _wrong_number(given: _Given, option: _Option) -> _Fault | None:
    """Values that are missing, too many, or would be taken for options themselves."""
    least, most = option.arity
    if given.path:
        least, most = 1, 1
    values = given.values
    for value in values[1:] if given.attached else values:
        if _reads_as_option(value):
            return _Fault("take", _shown(value), "; it would be read as an option of its own")
    if most == 0 and values:
        return _Fault("take", f"a value here, and {_shown(values[0])} is given", "; leave it out")
    if len(values) < least:
        return _Fault("take", "it without a value", "; give one")
    if len(values) > most:
        return _Fault("take", f"{len(values)} values here", "; give one")
    return None


def _reads_as_option(value: str) -> bool:
    """Whether the parser takes a word for an option, and so the one before it for one without value.

    A negative number with a point is taken for the field of an option: `-0.5` is `-0` with field 5.
    """
    if not value.startswith("-") or value == "-":
        return False
    return "." in value.partition("=")[0] or not (_NEGATIVE_NUMBER.fullmatch(value) or " " in value)


def _field_faults(given: _Given, option: _Option, record: _Record) -> Iterator[_Fault]:
    """`--compilation-config.cudagraph_mode PIECEWISE`."""
    if not option.is_json:
        yield _Fault("know", f"fields of {given.flag}", "; give it one value")
        return
    *outer, last = given.path
    is_list = last.endswith("+")
    content: Any = given.values[0].split(",") if is_list else _field_value(given.values[0])
    for name in reversed([*outer, last.removesuffix("+")]):
        content = {name: content}
    yield from _content_faults(content, option, record)


def _field_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _value_faults(
    text: str, option: _Option, record: _Record, dests: Container[str]
) -> Iterator[_Fault]:
    try:
        value = _convert(text, option, record)
    except ValueError as error:
        yield _Fault("take", _shown(text), f"; {error}")
        return
    named = _ENGINE_VALUES.get(option.dest)
    if option.choices is not None and value not in option.choices:
        known = [str(choice) for choice in option.choices if choice is not None]
        elsewhere = _elsewhere(text, lambda other: _choices(other, option.name, named))
        yield _not_among(text, known, elsewhere)
        return
    if isinstance(value, dict):
        yield from _content_faults(value, option, record)
    if named and isinstance(value, str) and value and _PLUGINS.get(option.dest) not in dests:
        yield from _engine_faults(value, named, record)
    if option.dest == "quantization" and text.lower() in record.deprecated_quantization:
        allowing = "--allow-deprecated-quantization"
        if "allow_deprecated_quantization" not in dests:
            yield _Fault("take", f"{_shown(text)} without {allowing}", "; give both")


def _content_faults(
    content: Mapping[str, Any], option: _Option, record: _Record
) -> Iterator[_Fault]:
    """Fields of a JSON object that its option does not have, or whose values the engine refuses."""

    def fields(other: _Record) -> frozenset[str]:
        same = other.options.get(option.name)
        return same.fields if same else frozenset()

    for name, value in content.items():
        named = _ENGINE_FIELDS.get((option.dest, name))
        if option.fields and name not in option.fields:
            cure = _elsewhere(name, fields) or did_you_mean(name, option.fields) or _LEAVE_OUT
            yield _Fault("know", f"its field {_shown(name)}", cure)
        elif named and isinstance(value, str):
            yield from _engine_faults(value, named, record)


def _engine_faults(value: str, named: str, record: _Record) -> Iterator[_Fault]:
    """A value that the parser lets through and the engine refuses minutes later."""
    folding = _FOLDING.get(named)
    looked_up = folding(value) if folding else value
    if looked_up not in record.values[named]:
        known = sorted(record.values[named])
        elsewhere = _elsewhere(looked_up, lambda other: other.values[named])
        yield _not_among(value, known, elsewhere)


def _choices(record: _Record, flag: str, named: str | None) -> Container[str]:
    """What an option takes at another version, be it by its parser's word or by its engine's."""
    option = record.options.get(flag)
    if named or option is None or option.choices is None:
        return record.values[named] if named else ()
    return {str(choice) for choice in option.choices}


def _not_among(value: str, known: Sequence[str], elsewhere: str) -> _Fault:
    cure = elsewhere or did_you_mean(value, known) or f"; it takes {', '.join(known)}"
    return _Fault("take", _shown(value), cure)


def _convert(text: str, option: _Option, record: _Record) -> Any:
    """`text` as the option's own converter makes it; ValueError says what is wanted instead."""
    kind = option.type or "str"
    if optional := re.fullmatch(r"optional_type\((.+)\)", kind):
        if text in {"", "None"}:
            return None
        kind = optional[1]
    if option.folds:
        return text.lower().replace("-", "_")
    if option.action == "LoRAParserAction":
        return _adapter(text)
    if kind == "human_readable_int_or_auto" and text.strip().lower() in {"-1", "auto"}:
        return -1
    if kind.startswith("human_readable_int"):
        return _human_number(text, record.integer_suffixes)
    converter = _CONVERTERS.get(kind)
    return converter(text) if converter else text


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("give a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("give a number") from None


def _human_number(text: str, suffixes: Container[str]) -> int:
    """vLLM's human_readable_int: k, m, g, t are powers of 1000, and K, M, G, T of 1024."""
    suffixed = _HUMAN.fullmatch(text.strip())
    if suffixed and suffixed[2] in suffixes:
        number, suffix = suffixed.groups()
        if suffix.isupper() and "." in number:
            raise ValueError(f"give a whole number before {suffix}, or {number}{suffix.lower()}")
        base = 1024 if suffix.isupper() else 1000
        return int(float(number) * base ** ("kmgt".index(suffix.lower()) + 1))
    try:
        return int(text)
    except ValueError:
        raise ValueError("give a whole number such as 65536, 64k or 64K") from None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"give JSON ({error})") from None


def _json_object(text: str) -> Any:
    content = _json(text)
    if not isinstance(content, dict):
        raise ValueError("give a JSON object")
    return content


def _adapter(text: str) -> Any:
    """A LoRA adapter, in the old form or the new."""
    if not text or re.fullmatch(r"[^=,]*=[^=,]*", text):
        return text
    try:
        return _json_object(text)
    except ValueError:
        raise ValueError("give name=path or a JSON object") from None


def _object_or_text(text: str) -> Any:
    return _json(text) if _OBJECT.fullmatch(text) else text


_CONVERTERS: Mapping[str, Callable[[str], Any]] = {
    "float": _number,
    "int": _whole_number,
    "loads": _json,
    "parse_dataclass": _json_object,
    "parse_reasoning_parser": lambda text: "" if text.lower() == "none" else text,
    "parse_type(loads)": _json,
    "union_dict_and_str": _object_or_text,
}
"""By the name of the release's own converter; what is not here takes any text."""


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…")
