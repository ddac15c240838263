"""The `vllm serve` invocation of a service: argv, environment, and how systemd must be told them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from shlex import quote

from fleet import options as known
from fleet.catalog import Parallel, Recipe, holds
from fleet.spec import Argument, Service

SPREADING = (
    *("nnodes", "node-rank", "master-addr", "master-port", "headless"),
    *("data-parallel-rank", "data-parallel-start-rank", "data-parallel-size-local"),
    *("data-parallel-address", "data-parallel-rpc-port", "data-parallel-backend"),
    *("data-parallel-hybrid-lb", "data-parallel-external-lb"),
    *("prefill-context-parallel-size", "decode-context-parallel-size"),
)
"""Flags that spread an engine over hosts or over further ranks; a service is on GPUs of one host."""

MANAGED_FLAGS = {
    "model": "model",
    "served-model-name": "model",
    "host": "port",
    "port": "port",
    "uds": "port",
    "config": "args",
    "api-key": "api_key",
    "tensor-parallel-size": "recipe",
    "pipeline-parallel-size": "recipe",
    "data-parallel-size": "recipe",
    "enable-expert-parallel": "recipe",
    **dict.fromkeys(
        ("tp", "pp", "dp", "ep", "no-enable-expert-parallel", "disable-expert-parallel"), "recipe"
    ),
    **dict.fromkeys(SPREADING, "recipe"),
    "max-model-len": "max_model_len",
    "gpu-memory-utilization": "gpu_memory_utilization",
    "shutdown-timeout": "drain_timeout_s",
    "revision": "revision",
}
"""Flags that the plan itself sets, each with the group data key that decides it."""

MANAGED_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "gpus",
    "FLEET_STAMP": "nothing: it names the plan",
    "PATH": "nothing: it begins with the release's own programs",
    "VLLM_CACHE_ROOT": "nothing: each service has a folder of its own",
    "VLLM_ENGINE_READY_TIMEOUT_S": "gate.ready_timeout_s",
    "HF_HUB_OFFLINE": "nothing: serving never waits for the network",
    "HOME": "nothing",
    "VLLM_API_KEY": "api_key",
    "VLLM_SERVER_DEV_MODE": "nothing: it opens unauthenticated endpoints",
}

SHUTDOWN_TIMEOUT_SINCE = ">=0.18.0"
"""fleet/options/: unknown in 0.17.1, known in 0.18.1."""
ENGINE_READY_TIMEOUT_SINCE = ">=0.14.0"
"""Unknown in 0.13.0, known in 0.14.0; an unknown one only draws a warning."""

_SYSTEMD_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")


@cache
def flag_name(name: str) -> str:
    """`--enable_expert_parallel` and `enable-expert-parallel` are one flag: the latter.

    What follows a dot is a field of the option's JSON, whose underscores stay:
    `attention-config.indexer_kv_dtype`.
    """
    option, dot, field = name.removeprefix("--").partition(".")
    return f"{option.replace('_', '-')}{dot}{field}"


def flag(name: str, value: Argument, vllm_version: str) -> tuple[str, ...]:
    """One option as argv words, in the form that this vLLM takes it.

    A bare flag for True and its negative form for False, where it has one; a list as words, where the
    option takes several; any other list or dict as JSON.
    """
    option = f"--{flag_name(name)}"
    words: tuple[str, ...]
    if value is None:
        words = ()
    elif value is True:
        words = (option,)
    elif value is False:
        negative = known.negative(option, vllm_version)
        words = (negative,) if negative else ()
    elif isinstance(value, list) and known.several(option, vllm_version) == "words":
        words = (option, *map(str, value))
    elif isinstance(value, (dict, list)):
        words = (option, json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    else:
        words = (option, str(value))
    return words


def flags(name: str, value: Argument, vllm_version: str) -> Iterable[tuple[str, ...]]:
    """The same for each value of an option that is given again for each."""
    repeated = known.several(f"--{flag_name(name)}", vllm_version) == "repeated"
    for one in value if isinstance(value, list) and repeated else [value]:
        yield flag(name, one, vllm_version)


def parallel_flags(parallel: Parallel, vllm_version: str) -> Iterable[tuple[str, ...]]:
    if parallel.tensor > 1:
        yield flag("tensor-parallel-size", parallel.tensor, vllm_version)
    if parallel.pipeline > 1:
        yield flag("pipeline-parallel-size", parallel.pipeline, vllm_version)
    if parallel.data > 1:
        yield flag("data-parallel-size", parallel.data, vllm_version)
    if parallel.expert:
        yield flag("enable-expert-parallel", True, vllm_version)


def arguments(service: Service, recipe: Recipe, vllm_version: str) -> dict[str, Argument]:
    """A service's flags by name, but for those of its place: model, ports and ranks.

    A site's `args` override the recipe's, and None takes one away; what the plan manages comes from
    the service's own keys.
    """
    merged = {flag_name(name): value for name, value in recipe.arguments(vllm_version).items()}
    merged.update(site_arguments(service))
    if holds(SHUTDOWN_TIMEOUT_SINCE, vllm_version):
        merged["shutdown-timeout"] = service.drain_timeout_s
    return {name: value for name, value in merged.items() if value is not None}


def site_arguments(service: Service) -> dict[str, Argument]:
    """The flags that a service's own data sets, by name; None takes one away."""
    own = {flag_name(name): value for name, value in service.args.items()}
    if service.max_model_len is not None:
        own["max-model-len"] = service.max_model_len
    if service.gpu_memory_utilization is not None:
        own["gpu-memory-utilization"] = service.gpu_memory_utilization
    return own


def options(service: Service, recipe: Recipe, vllm_version: str) -> tuple[tuple[str, ...], ...]:
    """Every option of a service, each as its own tuple of words, in a fixed order."""
    return tuple(
        words
        for words in (
            flag("served-model-name", service.model, vllm_version),
            flag("host", "127.0.0.1", vllm_version),
            flag("port", engine_port(service), vllm_version),
            *parallel_flags(recipe.parallel, vllm_version),
            *(
                words
                for name, value in arguments(service, recipe, vllm_version).items()
                for words in flags(name, value, vllm_version)
            ),
        )
        if words
    )


def engine_port(service: Service) -> int:
    """vLLM's own loopback port; the public one is the proxy's."""
    return service.engine_port if service.engine_port is not None else service.port + 10_000


def program(recipe: Recipe, release: str, model_path: str) -> tuple[str, ...]:
    """The words before the options: `vllm serve DIR`, or the module that the M1 guide starts."""
    if recipe.entrypoint == "api_server":
        module = "vllm.entrypoints.openai.api_server"
        return (f"{release}/bin/python3", "-m", module, "--model", model_path)
    return (f"{release}/bin/vllm", "serve", model_path)


def variables(service: Service, recipe: Recipe, vllm_version: str) -> dict[str, str]:
    """The recipe's variables and the site's, which come before them; None takes one away."""
    merged: dict[str, str | None] = {**recipe.environment(vllm_version), **service.env}
    return {name: value for name, value in merged.items() if value is not None}


def environment(
    service: Service, recipe: Recipe, vllm_version: str, *, release: str, state: str
) -> dict[str, str]:
    """Variables of a service's process, without its secrets and its stamp."""
    env = {
        "HF_HUB_OFFLINE": "1",
        "HOME": state,
        "PATH": f"{release}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "VLLM_CACHE_ROOT": f"{state}/cache/{service.name}",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if service.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, service.gpus))
    if holds(ENGINE_READY_TIMEOUT_SINCE, vllm_version):
        env["VLLM_ENGINE_READY_TIMEOUT_S"] = str(service.gate.ready_timeout_s)
    return env | variables(service, recipe, vllm_version)


def systemd_word(word: str) -> str:
    """One argv word for ExecStart=: `%` and `$` doubled, quoted with C escapes where needed.

    Raises ValueError for NUL, which no argv can hold. See systemd.service(5), "Command lines".
    """
    return _quoted(word.replace("%", "%%").replace("$", "$$"))


def systemd_line(words: Iterable[str]) -> str:
    """Words for ExecStart=, in a line."""
    return " ".join(map(systemd_word, words))


def systemd_assignment(name: str, value: str) -> str:
    """One `NAME=value` for Environment=, where `%` is special and `$` is not."""
    return _quoted(f"{name}={value.replace('%', '%%')}")


def _quoted(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character, which no command line can carry")
    if _SYSTEMD_PLAIN.fullmatch(text):
        return text
    escaped = "".join(_ESCAPES.get(character, character) for character in text)
    return f'"{escaped}"'


_CONTROLS = frozenset(map(chr, [*range(1, 0x20), 0x7F]))
_ESCAPES = {
    "\\": "\\\\",
    '"': '\\"',
    **{character: f"\\x{ord(character):02x}" for character in _CONTROLS},
    "\n": "\\n",
    "\t": "\\t",
    "\r": "\\r",
}


def environment_file(variables: Mapping[str, str]) -> str:
    """Text for EnvironmentFile=; values are single lines, so that nothing can be smuggled in."""
    lines = []
    for name, value in variables.items():
        if any(ord(character) < 0x20 for character in value):  # noqa: PLR2004
            raise ValueError(f"{name} holds a control character")
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$")
        escaped = escaped.replace("`", "\\`")
        lines.append(f'{name}="{escaped}"\n')
    return "".join(lines)


def shell(argv: Sequence[str], env: Mapping[str, str]) -> str:
    """The invocation as one pastes it into a shell, one option per line."""
    words = [f"{name}={_shell_word(value)}" for name, value in env.items()]
    lines: list[str] = []
    for word in argv:
        if word.startswith("--") or not lines:
            lines.append(_shell_word(word))
        else:
            lines[-1] += f" {_shell_word(word)}"
    return " \\\n  ".join([*words, *lines])


def _shell_word(word: str) -> str:
    """Quoted for bash and zsh; control characters by name, which a terminal would not show."""
    if not _CONTROLS.intersection(word):
        return quote(word)
    escapes = {**_ESCAPES, "'": "\\'", '"': '"'}
    return "$'" + "".join(escapes.get(character, character) for character in word) + "'"
