"""The options of this version's `vllm serve`, and vLLM's way of reading them.

They come from options.json, which was recorded from the parser of the real release.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm.logger import log
from vllm.version import release

RECORDED: dict[str, Any] = json.loads(
    Path(__file__).with_name("options.json").read_text(encoding="utf-8")
)

USAGE = "vllm serve [model_tag] [options]"
EPILOG = "For a flag: vllm serve --help=max-model-len\nDocumentation: https://docs.vllm.ai"

MULTIPLIERS = {
    **{"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12},
    **{"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40},
}

# From here on --model is turned into the positional argument; before, `vllm serve` refused it.
MODEL_OPTION_MOVED = (0, 10)

Converter = Callable[[str], Any]


class Parser(argparse.ArgumentParser):
    """argparse, with underscores for hyphens and JSON by dotted keys, as vLLM has it."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse `args`, sys.argv by default; exit with status 2 where they are wrong."""
        given = list(sys.argv[1:] if args is None else args)
        if given[:1] == ["serve"]:
            given = _move_model(given)
            _check_model_given(given)
        return super().parse_args(_join_dotted(_normalise(given)), namespace)


class Switch(argparse.Action):
    """An option without a value that has positive and negative forms."""

    def __init__(self, negative: Sequence[str] = (), **keywords: Any) -> None:
        """negative: the flags that mean False"""
        super().__init__(nargs=0, **keywords)
        self.negative = set(negative)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Set the destination by the flag that was given."""
        setattr(namespace, self.dest, option_string not in self.negative)


def add_serve_options(parser: argparse.ArgumentParser, *, positional: bool = True) -> None:
    """Give `parser` the options of `vllm serve`.

    positional: with the model as an argument; the API server's module has it as an option only
    """
    for described in RECORDED["positionals"] if positional else []:
        parser.add_argument(described["dest"], nargs=described["nargs"], type=str)
    for described in RECORDED["options"]:
        if described["dest"] != "help":
            _add(parser, described)


def non_default(options: argparse.Namespace) -> dict[str, Any]:
    """The options whose values are not the recorded defaults, without secrets."""
    defaults = {described["dest"]: described.get("default") for described in RECORDED["options"]}
    return {
        name: "***" if name in {"api_key", "hf_token"} else value
        for name, value in vars(options).items()
        if (name in defaults or name == "model_tag") and value != defaults.get(name)
    }


def _add(parser: argparse.ArgumentParser, described: dict[str, Any]) -> None:
    keywords: dict[str, Any] = {"dest": described["dest"], "default": described.get("default")}
    action = described.get("action", "")
    if action in {"EnableDisableAction", "BooleanOptionalAction", "StoreTrueAction"}:
        keywords |= {"action": Switch, "negative": described.get("negative", ())}
    else:
        keywords["type"] = _converter(described)
        if action == "AppendAction":
            keywords["action"] = "append"
        elif action == "StoreConstAction":
            keywords["const"] = described.get("const")
        for name in ("nargs", "const", "choices", "required"):
            if name in described:
                keywords[name] = described[name]
    parser.add_argument(*described["flags"], **keywords)


def _converter(described: dict[str, Any]) -> Converter:
    name = described.get("type", "str")
    optional = re.fullmatch(r"optional_type\((.+)\)", name)
    convert = _plain_converter(optional[1] if optional else name, described)
    if optional is None:
        return convert

    def optional_type(value: str) -> Any:
        return None if value in {"", "None"} else _checked(convert)(value)

    return optional_type


def _plain_converter(name: str, described: dict[str, Any]) -> Converter:
    converters: dict[str, Converter] = {
        "int": int,
        "float": float,
        "human_readable_int": human_readable_int,
        "human_readable_int_or_auto": human_readable_int_or_auto,
        "loads": json.loads,
        "parse_type(loads)": _checked(json.loads),
        "union_dict_and_str": union_dict_and_str,
        "parse_dataclass": _dataclass(described),
    }
    if name == "lambda" and "choices" in described:
        return lambda value: value.lower().replace("-", "_")
    return converters.get(name, str)


def _checked(convert: Converter) -> Converter:
    def check(value: str) -> Any:
        try:
            return convert(value)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"Value {value} cannot be converted to {convert}."
            ) from None

    return check


def human_readable_int(value: str) -> int:
    """An integer that may end in k, m, g, t (decimal) or K, M, G, T (binary)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT])", value.strip())
    if match is None:
        return int(value)
    number, suffix = match.groups()
    if suffix.isupper() and "." in number:
        raise argparse.ArgumentTypeError(
            f"Decimals are not allowed with binary suffixes like {suffix}. Did you mean to use "
            f"{number}{suffix.lower()} instead?"
        )
    return int(float(number) * MULTIPLIERS[suffix])


def human_readable_int_or_auto(value: str) -> int:
    """The same; -1 or "auto" is -1."""
    return -1 if value.strip().lower() in {"-1", "auto"} else human_readable_int(value)


def union_dict_and_str(value: str) -> Any:
    """JSON if it looks like an object, or else the string."""
    if not re.match(r"(?s)^\s*{.*}\s*$", value):
        return value
    return _checked(json.loads)(value)


def _dataclass(described: dict[str, Any]) -> Converter:
    # The option is called as the class is: compilation_config, CompilationConfig.
    model = "".join(word.capitalize() for word in described["dest"].split("_"))
    known = set(described.get("fields", ()))

    def parse_dataclass(value: str) -> Any:
        try:
            content = json.loads(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"1 validation error for {model}\n  Invalid JSON: {error} "
                f"[type=json_invalid, input_value={value!r}, input_type=str]"
            ) from None
        if not isinstance(content, dict):
            raise argparse.ArgumentTypeError(
                f"1 validation error for {model}\n  Input should be an object "
                f"[type=dataclass_type, input_value={content!r}, "
                f"input_type={type(content).__name__}]"
            )
        for key in content:
            if known and key not in known:
                raise argparse.ArgumentTypeError(
                    f"1 validation error for {model}\n{key}\n  Unexpected keyword argument "
                    f"[type=unexpected_keyword_argument, input_value={content[key]!r}, "
                    f"input_type={type(content[key]).__name__}]"
                )
        return content

    return parse_dataclass


def _move_model(args: list[str]) -> list[str]:
    """Turn `serve --model X` into `serve X`."""
    for position, argument in enumerate(args):
        if not re.match(r"^--model(=.+|$)", argument):
            continue
        if release() < MODEL_OPTION_MOVED:
            raise ValueError(
                "With `vllm serve`, you should provide the model as a positional argument or in a "
                "config file instead of via the `--model` option."
            )
        log(
            "WARNING",
            "argparse_utils.py:330",
            "With `vllm serve`, you should provide the model as a positional argument or in a "
            "config file instead of via the `--model` option. The `--model` option will be removed "
            "in a future version.",
        )
        after = position + (2 if argument == "--model" else 1)
        model = args[position + 1 : after] or [argument.partition("=")[2]]
        return ["serve", *model, *args[1:position], *args[after:]]
    return args


def _check_model_given(args: list[str]) -> None:
    named = any(re.match(r"--served[-_]model[-_]name(=|$)", argument) for argument in args)
    if named and args[1].startswith("-"):
        raise ValueError(
            "`model` should be provided as the first positional argument when using `vllm serve`. "
            "i.e. `vllm serve <model> --<arg> <value>`."
        )


def _normalise(args: Sequence[str]) -> list[str]:
    """Hyphens for underscores in names, and the short forms of --optimization-level."""
    normal: list[str] = []
    for argument in args:
        level = re.fullmatch(r"-O=?(.+)", argument)
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            stem, dot, keys = name.partition(".")
            if stem == "--help":
                normal.append("--help")
            else:
                normal.append(stem.replace("_", "-") + dot + keys + equals + value)
        elif level and "--optimization-level" in _all_flags():
            normal += ["--optimization-level", level[1]]
        else:
            normal.append(argument)
    return normal


def _all_flags() -> set[str]:
    return {flag for described in RECORDED["options"] for flag in described["flags"]}


def _join_dotted(args: list[str]) -> list[str]:
    """Turn `--json-arg.key value` into `--json-arg {"key": value}`."""
    joined: dict[str, dict[str, Any]] = {}
    rest: list[str] = []
    waiting = iter(args)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if not argument.startswith("-") or "." not in name or re.fullmatch(r"-[\d.]+", argument):
            rest.append(argument)
            continue
        if not equals:
            value = next(waiting, "")
        content: Any
        if name.endswith("+"):
            name, content = name[:-1], value.split(",")
        else:
            try:
                content = json.loads(value)
            except ValueError:
                content = value
        option, *keys = name.split(".")
        target = joined.setdefault(option, {})
        for key in keys[:-1]:
            target = target.setdefault(key, {})
        target[keys[-1]] = content
    for option, content in joined.items():
        rest += [option, json.dumps(content)]
    return rest
