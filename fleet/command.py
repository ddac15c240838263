"""The `vllm serve` invocation of a service: argv, environment, and how systemd must be told them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from fleet.catalog import Parallel, Recipe, holds
from fleet.spec import Argument, Service

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
    "max-model-len": "max_model_len",
    "gpu-memory-utilization": "gpu_memory_utilization",
    "shutdown-timeout": "drain_timeout_s",
    "revision": "revision",
}
"""Flags that the plan itself sets, each with the group data key that decides it."""

MANAGED_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "gpus",
    "FLEET_STAMP": "nothing: it names the plan",
    "HF_HUB_OFFLINE": "nothing: serving never waits for the network",
    "HOME": "nothing",
    "VLLM_API_KEY": "api_key",
    "VLLM_SERVER_DEV_MODE": "nothing: it opens unauthenticated endpoints",
}

SHUTDOWN_TIMEOUT_SINCE = ">=0.19.0"
ENGINE_READY_TIMEOUT_SINCE = ">=0.14.0"
"""fleet/options/: unknown in 0.13.0, known in 0.23.0; an unknown one only draws a warning."""

_SYSTEMD_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")


@cache
def flag_name(name: str) -> str:
    """`--enable_expert_parallel` and `enable-expert-parallel` are one flag: the latter.

    What follows a dot is a field of the option's JSON, whose underscores stay:
    `attention-config.indexer_kv_dtype`.
    """
    option, dot, field = name.removeprefix("--").partition(".")
    return f"{option.replace('_', '-')}{dot}{field}"


def flag(name: str, value: Argument) -> tuple[str, ...]:
    """One option as argv words: a bare flag for True, nothing for None and False, JSON for data."""
    option = f"--{flag_name(name)}"
    if value is None or value is False:
        return ()
    if value is True:
        return (option,)
    if isinstance(value, (dict, list)):
        return (option, json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    return (option, str(value))


def parallel_flags(parallel: Parallel) -> Iterable[tuple[str, ...]]:
    if parallel.tensor > 1:
        yield flag("tensor-parallel-size", parallel.tensor)
    if parallel.pipeline > 1:
        yield flag("pipeline-parallel-size", parallel.pipeline)
    if parallel.data > 1:
        yield flag("data-parallel-size", parallel.data)
    if parallel.expert:
        yield flag("enable-expert-parallel", True)


def arguments(service: Service, recipe: Recipe, vllm_version: str) -> dict[str, Argument]:
    """A service's flags by name, but for those of its place: model, ports and ranks.

    A site's `args` override the recipe's, and None takes one away; what the plan manages comes from
    the service's own keys.
    """
    merged = {flag_name(name): value for name, value in recipe.arguments(vllm_version).items()}
    merged.update((flag_name(name), value) for name, value in service.args.items())
    if service.max_model_len is not None:
        merged["max-model-len"] = service.max_model_len
    if service.gpu_memory_utilization is not None:
        merged["gpu-memory-utilization"] = service.gpu_memory_utilization
    if holds(SHUTDOWN_TIMEOUT_SINCE, vllm_version):
        merged["shutdown-timeout"] = service.drain_timeout_s
    return {name: value for name, value in merged.items() if value is not None}


def options(service: Service, recipe: Recipe, vllm_version: str) -> tuple[tuple[str, ...], ...]:
    """Every option of a service, each as its own tuple of words, in a fixed order."""
    return tuple(
        words
        for words in (
            flag("served-model-name", service.model),
            flag("host", "127.0.0.1"),
            flag("port", engine_port(service)),
            *parallel_flags(recipe.parallel),
            *(
                flag(name, value)
                for name, value in arguments(service, recipe, vllm_version).items()
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


_ESCAPES = {
    "\\": "\\\\",
    '"': '\\"',
    **{chr(code): f"\\x{code:02x}" for code in range(1, 0x20)},
    "\x7f": "\\x7f",
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
    from shlex import quote

    words = [f"{name}={quote(value)}" for name, value in env.items()]
    lines: list[str] = []
    for word in argv:
        if word.startswith("--") or not lines:
            lines.append(quote(word))
        else:
            lines[-1] += f" {quote(word)}"
    return " \\\n  ".join([*words, *lines])
