"""A service as a container: the `docker run` of its unit, and what that is given. Pure.

The client stands in the foreground of the unit, so that systemd sees the service end, its journal has
what vLLM says, and the client's environment has the unit's stamp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fleet import command

CLIENT = "/usr/bin/docker"
ROOT = "/var/lib/docker"
"""Where the engine keeps images."""
RUNTIME = "/run/minimax-containers"
REPOSITORY = "minimax-fleet/vllm"
"""Images of releases have tags of this one, which no registry has."""
HUB = "registry-1.docker.io"
"""The registry of names that begin with none."""
USER = "--user=minimax:minimax"
"""As the plan has it. An image does not know the host's user, so the process has its numbers: the unit
asks for them when it starts (`USER_ASKED`), and the host's program when it compares."""
USER_ASKED = "--user=${FLEET_USER}"
IDENTITY = {"LOGNAME": "minimax", "USER": "minimax"}
"""torch names its cache by the user, whose number no image has a name for."""
STOP_MARGIN_S = 45
"""More than vLLM drains, and less than systemd waits."""


def tag(release: str) -> str:
    """The image of a release, by the release's id."""
    return f"{REPOSITORY}:{release.replace('+', '-')}"


def split(image: str) -> tuple[str, str, str]:
    """Registry, path and digest of `name@sha256:…`; a tag beside the digest says nothing.

    A name's first part is a registry if it could be a host: Docker's own rule.
    """
    name, _, digest = image.partition("@")
    first, slash, rest = name.partition("/")
    hosted = bool(slash) and (bool(re.search(r"[.:]", first)) or first == "localhost")
    registry, path = (first, rest) if hosted else (HUB, name)
    path = re.sub(r":[^/]*$", "", path)
    return registry, path if hosted or "/" in path else f"library/{path}", digest


def pulled_from(image: str, mirror: str | None) -> str:
    """The name by which an image is fetched: the mirror's, or its own."""
    registry, path, digest = split(image)
    place = mirror.partition("://")[2].rstrip("/") if mirror else registry.replace(HUB, "docker.io")
    return f"{place}/{path}@{digest}"


def registry_address(image: str, mirror: str | None) -> str:
    """Where the registry of an image answers, for a look whether it does."""
    if mirror is None:
        return f"https://{split(image)[0]}/v2/"
    scheme, _, place = mirror.partition("://")
    return f"{scheme}://{place.partition('/')[0]}/v2/"


def without_tls(mirror: str | None) -> str | None:
    """The host of a mirror that speaks plain HTTP, which Docker must be told; None for others."""
    if mirror is None or not mirror.startswith("http://"):
        return None
    return mirror.removeprefix("http://").partition("/")[0]


def environment(env: Mapping[str, str], cache: str) -> dict[str, str]:
    """Variables of a service's process, made fit for a container of its own.

    Programs are the image's. The GPUs that it is given are all that it sees, counted from 0 again.
    """
    dropped = ("PATH", "CUDA_VISIBLE_DEVICES")
    kept = {name: value for name, value in env.items() if name not in dropped}
    return {**kept, "HOME": cache, **IDENTITY}


def program(  # noqa: PLR0913 - what a container is made of
    inner: Sequence[str],
    image: str,
    *,
    name: str,
    release: str,
    gpus: Sequence[int],
    models: str,
    cache: str,
    names: Sequence[str],
) -> tuple[str, ...]:
    """The words before vLLM's options: `docker run … IMAGE serve DIR`, with the guides' flags.

    `inner` is what a release's own environment would run; `models` and `cache` are the folders that it
    reads and writes; `names` the variables that it is given, whose values the client has from the unit.

    Of the guides' flags `--privileged` is left out: GPUs come by `--gpus` and locked memory by `--ulimit`;
    nothing else of it is needed on one host. `--shm-size` means nothing beside `--ipc=host`.
    """
    entrypoint, *words = inner
    devices = ",".join(map(str, gpus))
    return (
        *(CLIENT, "run", "--rm", "--init", "--pull=never"),
        f"--name={unit_name(name)}",
        f"--cidfile={runtime_folder(name)}/container.id",
        f"--label=minimax-fleet.release={release}/",
        # The journal has it all; the engine's own log of it would grow without end.
        "--log-driver=none",
        *("--network=host", "--ipc=host"),
        *("--ulimit=memlock=-1", "--ulimit=stack=67108864", "--ulimit=nofile=1048576"),
        # The value is CSV of Docker's, where a comma has to be quoted.
        *([f'--gpus="device={devices}"'] if gpus else []),
        *(USER, "--cap-drop=ALL", "--security-opt=no-new-privileges"),
        f"--mount=type=bind,source={models},target={models},readonly",
        f"--mount=type=bind,source={cache},target={cache}",
        f"--workdir={cache}",
        *(f"--env={variable}" for variable in names),
        f"--entrypoint={entrypoint.rpartition('/')[2]}",
        image,
        *words,
    )


def unit_name(name: str) -> str:
    """Of a service: its container's name, and its unit's without the suffix."""
    return f"minimax-{name}"


def runtime_folder(name: str) -> str:
    """Of root alone: the container's id and the user's numbers, there while the unit runs."""
    return f"{RUNTIME}/{name}"


def values(name: str, cache: str, gpus: Sequence[int], drain_timeout_s: int) -> dict[str, Any]:
    """What the template of the unit needs for a container."""
    return {
        "name": unit_name(name),
        "folder": runtime_folder(name),
        "runtime": runtime_folder(name).removeprefix("/run/"),
        "cache": cache,
        "gpus": bool(gpus),
        "stop_s": drain_timeout_s + STOP_MARGIN_S,
    }


def systemd_line(words: Iterable[str]) -> str:
    """The words before vLLM's options for ExecStart=, each of Docker's options on a line of its own."""
    quoted = (USER_ASKED if word == USER else command.systemd_word(word) for word in words)
    return re.sub(r' ("?--)', r" \\\n    \1", " ".join(quoted))
