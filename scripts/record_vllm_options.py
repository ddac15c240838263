#!/usr/bin/env python3
"""Record the options of a vLLM release from its own command-line parser.

``record_vllm_options.py 0.33.0`` fetches the published wheel of that version with pip, unpacks its
Python files, and asks the parser that it defines for ``vllm serve`` what it accepts. The result is
``fleet/options/vllm-0.33.0.json``, which the plan checks argument vectors against and which the
lab's stand-in parses with. No GPU, torch or CUDA library is needed: whatever is not installed is
replaced by a mock, because the parser only needs names and types from it.

``record_vllm_options.py --parse FILE 0.33.0`` records nothing but asks the same parser what it makes
of the argument vectors in FILE, a JSON list of ``{"entrypoint": …, "words": […]}``, where the
entrypoint is ``serve`` (``vllm serve``) or ``api_server`` (``python3 -m
vllm.entrypoints.openai.api_server``) and the words are those after it. It prints a JSON list of
``{"exit": 0, "error": ""}``.

The wheel comes from the index that pip is configured to use (pip.conf, ``PIP_INDEX_URL``). Run it
on Linux with a Python that the wheel supports (3.11 or 3.12 serves all of 0.9 to 0.33).
"""

from __future__ import annotations

import abc
import argparse
import ast
import contextlib
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import types
import venv
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NoReturn

OUTPUT = Path(__file__).resolve().parent.parent / "fleet" / "options"

# What the parser really computes with; anything else that vLLM imports is mocked. The versions are
# those that the wheel itself asks for.
REAL_REQUIREMENTS = frozenset(
    {
        "cachetools",
        "cloudpickle",
        "huggingface-hub",
        "msgspec",
        "numpy",
        "packaging",
        "psutil",
        "pydantic",
        "pyyaml",
        "regex",
        "typing-extensions",
    }
)

REAL_MODULES = (
    *("cachetools", "cloudpickle", "huggingface_hub", "msgspec", "numpy", "packaging.version"),
    *("psutil", "pydantic", "regex", "typing_extensions", "yaml"),
)

# vLLM's configuration classes tell their platform and versions from these.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CONFIGURE_LOGGING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
}


# What a mock says when it is asked for its version: new enough for any check.
MOCK_VERSION = "99.0.0"


class RecordingError(Exception):
    """The release could not be recorded; the text says why, in one line."""


# --- the outer half: fetch, unpack, run ----------------------------------------------------------


def record(version: str, output: Path) -> Path:
    """Record vLLM ``version`` into ``output`` and return the file written.

    Raises RecordingError when the wheel cannot be fetched or its parser cannot be imported.
    """
    recorded = ask(version, "--inside")
    # The wheel's own version may carry a local part (+cu129); the file is named by what was asked.
    recorded["version"] = version
    output.mkdir(parents=True, exist_ok=True)
    target = output / f"vllm-{version}.json"
    target.write_text(render(recorded), encoding="utf-8")
    return target


def parse(version: str, invocations: Path) -> list[dict[str, Any]]:
    """What the parser of vLLM ``version`` makes of each argument vector in the file ``invocations``.

    Raises RecordingError as ``record`` does.
    """
    answers: list[dict[str, Any]] = ask(version, "--parse", str(invocations.resolve()), "--inside")
    return answers


def ask(version: str, *arguments: str) -> Any:
    """Run this script in an environment where vLLM ``version`` can be imported; its JSON answer."""
    with tempfile.TemporaryDirectory(prefix="vllm-options-") as temporary:
        work = Path(temporary)
        wheel = fetch(version, work / "wheel")
        source = unpack(wheel, work / "source")
        wheel.unlink()  # up to 500 MB that nothing below needs
        python = environment(requirements(source), work / "venv")
        return json.loads(
            run(
                [str(python), str(Path(__file__).resolve()), *arguments, str(source)],
                f"vLLM {version}: its parser could not be imported",
                env={**os.environ, **QUIET, "HOME": str(work)},
            )
        )


def fetch(version: str, directory: Path) -> Path:
    """Download the x86-64 Linux wheel of ``version``, whatever machine this is."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (35, 31, 28, 17)]
    run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
            *("--only-binary=:all:", "--implementation=cp", "--abi=abi3", "--python-version=3.12"),
            *(*platforms, "--platform=manylinux1_x86_64"),
            *("--dest", str(directory), f"vllm=={version}"),
        ],
        f"vLLM {version}: pip could not download the wheel",
    )
    wheels = list(directory.glob("vllm-*.whl"))
    if len(wheels) != 1:
        raise RecordingError(f"vLLM {version}: expected one wheel, pip left {len(wheels)}")
    return wheels[0]


def unpack(wheel: Path, directory: Path) -> Path:
    """Unpack the Python files and the metadata of ``wheel``; leave the compiled parts behind."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith((".py", ".dist-info/METADATA")):
                archive.extract(name, directory)
    return directory


def requirements(source: Path) -> list[str]:
    """What the wheel asks for, of the packages that must be real."""
    metadata = next(source.glob("vllm-*.dist-info/METADATA")).read_text(encoding="utf-8")
    wanted = []
    for line in re.findall(r"^Requires-Dist: (.*)$", metadata, flags=re.MULTILINE):
        name = re.split(r"[\s\[<>=!~;(]", line, maxsplit=1)[0].lower().replace("_", "-")
        if name in REAL_REQUIREMENTS and "extra ==" not in line:
            wanted.append(line)
    named = {re.split(r"[\s\[<>=!~;(]", line, maxsplit=1)[0].lower() for line in wanted}
    return wanted + sorted(REAL_REQUIREMENTS - {name.replace("_", "-") for name in named})


def environment(wanted: Sequence[str], directory: Path) -> Path:
    """Make a throw-away virtual environment with ``wanted`` and return its interpreter."""
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    run(
        [str(python), "-m", "pip", "install", "--quiet", *wanted],
        "pip could not install what the parser needs",
    )
    return python


def run(command: Sequence[str], failure: str, env: dict[str, str] | None = None) -> str:
    """Run ``command``, return its output; on failure raise ``failure`` with its last line."""
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise RecordingError(f"{failure}: {reason}")
    return done.stdout


def render(recorded: dict[str, Any]) -> str:
    """JSON with one option a line, so that two versions can be compared by diff."""
    lines = ["{"]
    for key, value in recorded.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            items = ",\n".join("  " + json.dumps(item, ensure_ascii=False) for item in value)
            lines.append(f" {json.dumps(key)}: [\n{items}\n ],")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)},")
    lines[-1] = lines[-1].removesuffix(",")
    return "\n".join([*lines, "}", ""])


# --- the inner half: runs in the throw-away environment ------------------------------------------


class MockMeta(abc.ABCMeta):
    """Makes a class answer to any attribute, call or operator.

    Mocks are classes, not instances, because vLLM inherits from them and annotates with them.
    """

    __version__ = MOCK_VERSION

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = mock(name)
        setattr(cls, name, value)
        return value

    def __call__(cls, *arguments: Any, **keywords: Any) -> Any:
        if not cls.__dict__.get("_is_mock"):
            return super().__call__(*arguments, **keywords)  # a class of vLLM's own
        if (
            len(arguments) == 1
            and not keywords
            and isinstance(arguments[0], type | types.FunctionType)
        ):
            return arguments[0]  # used as a decorator
        if "_result" not in cls.__dict__:
            # The same for every call: vLLM compares what it gets with what it got before.
            type.__setattr__(cls, "_result", mock(cls.__name__))
        return cls.__dict__["_result"]

    def register(cls, *_: Any, **__: Any) -> Any:
        """ABCMeta's own has another signature than the registries that vLLM imports."""
        return cls

    def __getitem__(cls, item: Any) -> Any:
        return cls

    def __iter__(cls) -> Iterator[Any]:
        return iter(())

    def __len__(cls) -> int:
        return 0

    def __bool__(cls) -> bool:
        return True

    def __index__(cls) -> int:
        return 0

    __int__ = __index__

    def __enter__(cls) -> Any:
        return cls

    def __exit__(cls, *exception: object) -> None:
        return None

    def _same(cls, *_: Any) -> Any:
        return cls

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _same
    __rtruediv__ = __rfloordiv__ = __rpow__ = __or__ = __ror__ = _same
    __neg__ = __invert__ = __and__ = __rand__ = __mod__ = __pow__ = __floordiv__ = _same

    def _unordered(cls, other: Any) -> bool:
        return False

    __lt__ = __gt__ = __le__ = __ge__ = _unordered


def mock(name: str) -> Any:
    """A fresh mock class called ``name``."""

    def any_schema(cls: Any, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()

    # The metaclass' __mro_entries__ cannot be used: these are real classes with a real layout.
    body = {
        "_is_mock": True,
        "__module__": "mock",
        "__get_pydantic_core_schema__": classmethod(any_schema),
        "__init_subclass__": classmethod(lambda cls, **keywords: None),
    }
    return MockMeta(name, (), body)


class MockModule(types.ModuleType):
    """A module in which every name exists."""

    __all__: list[str] = []
    __version__ = MOCK_VERSION

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = mock(name)
        setattr(self, name, value)
        return value


class MockFinder(MetaPathFinder, Loader):
    """A mock for what is not there, and for the parts of vLLM that serve rather than parse."""

    # What vllm/entrypoints/cli/serve.py imports beside the parser, over the versions.
    SERVING = re.compile(
        r"vllm\.(ir|executor|v1\.(engine|executor|metrics|utils|worker)|usage\.usage_lib"
        r"|entrypoints\.(openai\.api_server|launchers\.(api_server|dp_supervisor|launcher)))"
        r"(\.|$)"
    )
    COMPILED = re.compile(r"vllm\.(_\w*C\w*|_moe\w*|_rs\w*|vllm_flash_attn\._\w*)$")

    # Optional parts that vLLM looks for, and takes another way when they are missing.
    ABSENT = (
        *("amdsmi", "habana_frameworks", "intel_extension_for_pytorch", "libtpu", "neuronxcc"),
        *("torch_neuronx", "torch_xla", "tpu_inference", "transformers_neuronx", "vllm_omni"),
    )

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """A spec for what nothing real can provide, but for what vLLM is better off without."""
        package = name.partition(".")[0]
        if package == "vllm":
            wanted = bool(self.SERVING.match(name) or self.COMPILED.match(name))
        elif name == package:
            wanted = package not in sys.stdlib_module_names and not self.is_installed(name, path)
        else:
            # A part that a real package lacks is its own affair.
            wanted = isinstance(sys.modules[package], MockModule)
        if not wanted or name.startswith(self.ABSENT):
            return None
        return ModuleSpec(name, self, is_package=True)

    @staticmethod
    def is_installed(name: str, path: Any) -> bool:
        """Whether another finder has ``name``."""
        others = (finder for finder in sys.meta_path if not isinstance(finder, MockFinder))
        return any(finder.find_spec(name, path) is not None for finder in others)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        """An empty mock module; its names appear when asked for."""
        module = MockModule(spec.name)
        module.__path__ = []
        module.__file__ = f"{spec.name}.py"
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def load(source: Path) -> types.ModuleType:
    """Make the release unpacked in ``source`` importable, and import its ``vllm serve``."""
    sys.path.insert(0, str(source))
    for name in REAL_MODULES:
        # Before the mocks are there, so that these see what is really installed beside them.
        __import__(name)
    sys.meta_path.insert(0, MockFinder())
    find_version = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return find_version(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            return MOCK_VERSION

    importlib.metadata.version = version
    # Default configurations are made while the parser is, and the device must be known for that.
    from vllm import platforms  # type: ignore
    from vllm.platforms.cpu import CpuPlatform  # type: ignore

    platform = CpuPlatform()
    platform.device_type = "cuda"  # what --help names as this machine's device
    platforms.current_platform = platform
    from vllm.entrypoints.cli import serve  # type: ignore

    module: types.ModuleType = serve
    return module


def inspect_source(source: Path) -> dict[str, Any]:
    """Import the parser of the release unpacked in ``source`` and describe it."""
    serve = load(source)
    root, parser = serve_parser(serve)
    positionals = [describe(action, []) for action in parser._actions if not action.option_strings]
    options = [
        describe(
            action, [flag for flag, of in parser._option_string_actions.items() if of is action]
        )
        for action in parser._actions
        if action.option_strings
    ]
    models = registry(source)
    module_flags = api_server_parser(serve)._option_string_actions
    human_readable = parser._option_string_actions["--max-model-len"].type
    return {
        "version": None,
        "positionals": positionals,
        "options": sorted(options, key=lambda option: option["flags"]),
        "tool_parsers": parser_names(source, "tool"),
        "reasoning_parsers": parser_names(source, "reasoning"),
        "minimax_architectures": sorted(name for name in models[0] if "MiniMax" in name),
        "removed_architectures": dict(sorted(models[1].items())),
        "env": environment_names(),
        "serve_only": sorted(set(parser._option_string_actions) - set(module_flags)),
        "requires": required_by_switches(serve, root, options),
        "level_3": preprocessed(root, ["serve", "model", "-O3"])[2:],
        "integer_suffixes": [
            suffix for suffix in "kmgtKMGT" if result(human_readable, f"1{suffix}") is not None
        ],
        **engine_values(source, options),
    }


def flexible_parser(**keywords: Any) -> argparse.ArgumentParser:
    """vLLM's own kind of argument parser."""
    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser  # type: ignore
    except ImportError:
        from vllm.utils import FlexibleArgumentParser  # type: ignore

    parser: argparse.ArgumentParser = FlexibleArgumentParser(**keywords)
    return parser


def serve_parser(
    serve: types.ModuleType,
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of ``vllm`` as vLLM builds it, and that of its ``serve``."""
    root = flexible_parser(prog="vllm")
    parser = serve.ServeSubcommand().subparser_init(root.add_subparsers())
    return root, parser


def api_server_parser(serve: types.ModuleType) -> argparse.ArgumentParser:
    """The parser of vllm.entrypoints.openai.api_server when that is run as a program."""
    parser: argparse.ArgumentParser = serve.make_arg_parser(flexible_parser(prog="api_server.py"))
    return parser


def preprocessed(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """What vLLM's parser makes of ``words`` before it hands them to argparse."""
    seen: list[str] = []
    original = argparse.ArgumentParser.parse_args

    def catch(self: Any, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        seen.extend(args)
        return argparse.Namespace()

    argparse.ArgumentParser.parse_args = catch  # type: ignore[method-assign, assignment]
    try:
        parser.parse_args(words)
    finally:
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]
    return seen


def parse_words(source: Path, invocations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the release unpacked in ``source`` makes of each argument vector, as its programs do."""
    serve = load(source)
    root, _ = serve_parser(serve)
    module = api_server_parser(serve)
    answers = []
    for invocation in invocations:
        if invocation["entrypoint"] == "serve":
            exit_code, said = outcome(partial(serve_words, serve, root), invocation["words"])
        else:
            exit_code, said = outcome(
                lambda words: serve.validate_parsed_serve_args(module.parse_args(words)),
                invocation["words"],
            )
        answers.append({"exit": exit_code, "error": said})
    return answers


def serve_words(
    serve: types.ModuleType, root: argparse.ArgumentParser, words: Sequence[str]
) -> None:
    """What ``vllm serve`` does with its words before it looks at the model."""
    serve.ServeSubcommand().validate(root.parse_args(["serve", *words]))


def required_by_switches(
    serve: types.ModuleType, root: argparse.ArgumentParser, options: Sequence[dict[str, Any]]
) -> dict[str, str]:
    """Flags without a value that are refused alone, each with the option that they ask for."""
    found = {}
    for option in options:
        if option.get("nargs") != 0 or option.get("action") == "HelpAction":
            continue
        for flag in option["flags"]:
            _, said = outcome(partial(serve_words, serve, root), ["model", flag])
            if asked := re.search(r"requires (--[a-z-]+)", said):
                found[flag] = asked[1]
    return found


def outcome(parse: Callable[[Sequence[str]], Any], words: Sequence[str]) -> tuple[int, str]:
    """The exit status that a program which does only ``parse`` would have, and what it says."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parse(words)
    except SystemExit as end:
        return (end.code if isinstance(end.code, int) else 1), said.getvalue().strip()
    except Exception as error:
        # A traceback and exit status 1, where vLLM does not turn it into a message.
        return 1, f"{type(error).__name__}: {error}"
    return 0, ""


def describe(action: argparse.Action, accepted: Sequence[str]) -> dict[str, Any]:
    """One option as plain data; what is at its default is left out.

    ``accepted`` are the strings by which the parser knows it: more than help shows, for vLLM hides
    some old forms.
    """
    flags = [*action.option_strings, *sorted(set(accepted) - set(action.option_strings))]
    described: dict[str, Any] = {"flags": flags, "dest": action.dest}
    kind = type(action).__name__.lstrip("_")
    if kind in {"BooleanOptionalAction", "EnableDisableAction"}:
        default = [flag for flag in flags if flag.startswith("--no-")]
        negative = set(getattr(action, "negative_option_strings", default))
        described["negative"] = [flag for flag in flags if flag in negative]
    if kind != "StoreAction":
        described["action"] = kind
    if action.type is not None:
        described["type"] = type_name(action.type)
        if accepted := dataclass_fields(action.type):
            described["fields"] = accepted
        if result(action.type, "A-b") == "a_b":
            described["folds"] = True
    if action.nargs is not None:
        described["nargs"] = action.nargs
    if action.choices is not None:
        described["choices"] = sorted(
            action.choices, key=lambda choice: (choice is None, str(choice))
        )
    if action.const is not None and kind == "StoreAction":
        described["const"] = action.const
    if action.required:
        described["required"] = True
    try:
        json.dumps(action.default, allow_nan=False)
    except (TypeError, ValueError):
        return described  # an object of vLLM's own
    if action.default is not None and action.default != argparse.SUPPRESS:
        described["default"] = action.default
    return described


def result(convert: Any, word: str) -> Any:
    """What an option's converter makes of ``word``; None where it refuses it."""
    try:
        return convert(word)
    except Exception:
        return None


def type_name(kind: Any) -> str:
    """The name of a type or converter, with what it wraps: ``optional_type(int)``."""
    *outer, name = getattr(kind, "__qualname__", type(kind).__name__).split(".")
    inner = [cell.cell_contents for cell in getattr(kind, "__closure__", None) or ()]
    wrapped = [type_name(value) for value in inner if callable(value)]
    if not wrapped or outer[-1:] != ["<locals>"]:
        return name.strip("<>")
    return f"{outer[-2]}({', '.join(wrapped)})"


def dataclass_fields(kind: Any) -> list[str]:
    """The field names that a JSON option takes, where its converter is for one dataclass."""
    for cell in getattr(kind, "__closure__", None) or ():
        if callable(cell.cell_contents) and (found := dataclass_fields(cell.cell_contents)):
            return found
    for default in getattr(kind, "__defaults__", None) or ():
        if fields := getattr(default, "__dataclass_fields__", None):
            return sorted(name for name in fields if not name.startswith("_"))
    return []


def parser_names(source: Path, kind: str) -> list[str]:
    """The names that ``--tool-call-parser`` or ``--reasoning-parser`` takes."""
    name = f"{kind.capitalize()}ParserManager"
    packages = {
        "tool": ["vllm.tool_parsers", "vllm.entrypoints.openai.tool_parsers"],
        "reasoning": ["vllm.reasoning"],
    }
    for package in packages[kind]:
        try:
            module = __import__(package, fromlist=[name])
        except ImportError:
            continue
        manager = getattr(module, name)
        if hasattr(manager, "list_registered"):
            return sorted(manager.list_registered())
        # Before registration was lazy, importing the package registered all of them.
        registered = getattr(manager, f"{kind}_parsers")
        return sorted(registered)
    raise RecordingError(f"no {name} in {source}")


def registry(source: Path) -> tuple[set[str], dict[str, str]]:
    """Architectures of the model registry, and those removed with the last version that had them.

    Read from the syntax tree: importing the registry would import every model.
    """
    path = source / "vllm" / "model_executor" / "models" / "registry.py"
    known: set[str] = set()
    removed: dict[str, str] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Dict):
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        if isinstance(target, ast.Name) and target.id == "_PREVIOUSLY_SUPPORTED_MODELS":
            removed = ast.literal_eval(node.value)
        else:
            known |= {str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)}
    return known, removed


def engine_values(source: Path, options: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Values that no parser checks and the engine does, from the syntax trees of the release.

    A list is empty where the release does not have such a thing at all. Raises RecordingError where
    it does, and its values are not where any version kept them so far.
    """
    flags = {flag: option for option in options for flag in option["flags"]}
    backends = enum_members(source, "AttentionBackendEnum") or enum_members(source, "_Backend")
    if takes_auto_backend():
        backends.append("AUTO")
    found = {
        "quantization_methods": sorted(
            {*assigned(source, "QuantizationMethods"), *registered_quantization(source)}
        ),
        "deprecated_quantization_methods": assigned(source, "DEPRECATED_QUANTIZATION_METHODS"),
        "kv_cache_dtypes": assigned(source, "CacheDType"),
        "cudagraph_modes": enum_members(source, "CUDAGraphMode"),
        "attention_backends": backends,
    }
    optional = {"deprecated_quantization_methods"}
    if "cudagraph_mode" not in flags["--compilation-config"].get("fields", ()):
        optional.add("cudagraph_modes")
    for name, values in found.items():
        if not values and name not in optional:
            raise RecordingError(f"no {name} in {source}; they have moved")
    return found


def takes_auto_backend() -> bool:
    """Whether "auto" stands for no attention backend in particular, beside the enumeration."""
    try:
        from vllm.config.attention import AttentionConfig  # type: ignore
    except ImportError:
        return False  # older versions have no such configuration
    return result(lambda name: AttentionConfig(backend=name), "auto") is not None


def defining(source: Path, pattern: str) -> Iterator[ast.Module]:
    """Syntax trees of the release's files in which a line begins as ``pattern`` says."""
    for path in sorted((source / "vllm").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if re.search(rf"^{pattern}", text, flags=re.MULTILINE):
            yield ast.parse(text)


def assigned(source: Path, name: str) -> list[str]:
    """The strings in ``name = Literal[…]`` or ``name = […]``; none where nothing is called so."""
    found: set[str] = set()
    for tree in defining(source, rf"{name}\b.*="):
        for node in tree.body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name) and target.id == name:
                found |= {
                    part.value
                    for part in ast.walk(node.value)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                }
    return sorted(found)


def enum_members(source: Path, name: str) -> list[str]:
    """The members of the enumeration ``name``; none where no class is called so."""
    return sorted(
        target.id
        for tree in defining(source, rf"class {name}\b")
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == name
        for statement in node.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name) and not target.id.startswith("_")
    )


def registered_quantization(source: Path) -> set[str]:
    """Methods that the release itself adds with ``@register_quantization_config("…")``."""
    return {
        decorator.args[0].value
        for tree in defining(source, r"@register_quantization_config\(")
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call)
        and decorator.args
        and isinstance(decorator.args[0], ast.Constant)
        and isinstance(decorator.args[0].value, str)
    }


def environment_names() -> list[str]:
    """The environment variables that this release reads through vllm.envs."""
    from vllm import envs

    return sorted(envs.environment_variables)


def inside(source: Path, invocations: Path | None) -> NoReturn:
    """Answer on stdout, in the throw-away environment, and end."""
    # vLLM prints to stdout while it is imported; the answer must be alone there.
    answer, sys.stdout = sys.stdout, sys.stderr
    sys.argv = ["vllm"]
    if invocations is None:
        answered: Any = inspect_source(source)
    else:
        answered = parse_words(source, json.loads(invocations.read_text(encoding="utf-8")))
    answer.write(json.dumps(answered))
    answer.flush()
    os._exit(0)  # threads that imports left behind must not hold the answer up


def main(arguments: Sequence[str] | None = None) -> int:
    """Record the versions named on the command line; 1 when one could not be recorded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="such as 0.33.0")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: fleet/options")
    parser.add_argument(
        "--parse", type=Path, metavar="FILE", help="ask the parser of one VERSION; record nothing"
    )
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        inside(options.inside, options.parse)
    if not options.versions:
        parser.error("name at least one version")
    if options.parse:
        if len(options.versions) > 1:
            parser.error("--parse takes one version")
        if not options.parse.is_file():
            parser.error(f"{options.parse}: no such file")
        try:
            answers = parse(options.versions[0], options.parse)
        except RecordingError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        sys.stdout.write(json.dumps(answers, indent=1) + "\n")
        return 0
    failed = False
    for version in options.versions:
        try:
            path = record(version, options.output)
        except RecordingError as error:
            sys.stderr.write(f"{error}\n")
            failed = True
        else:
            count = len(json.loads(path.read_text(encoding="utf-8"))["options"])
            sys.stdout.write(f"{path}: {count} options\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
