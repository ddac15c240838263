"""What a site may say about its hosts: the schema of group data.

Every model is strict (no `"8000"` where a number belongs), frozen, and refuses unknown keys, so that
a plan never rests on a guess about what was meant. Paths, URLs and names are plain strings because
group data is plain Python literals.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = r"^[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?$"
VERSION = r"^[0-9]+(?:\.[0-9]+)*(?:(?:a|b|rc|\.post|\.dev)[0-9]+)?(?:\+[a-z0-9.]+)?$"

Port = Annotated[int, Field(ge=1, le=65535)]
Argument = str | int | float | bool | list[Any] | dict[str, Any] | None


class Model(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class AptRepository(Model):
    """One apt repository, written to the host as a deb822 source.

    `suites` ending in "/" is a flat repository (as NVIDIA's own are) and takes no components.
    `key` is the path on the control machine of the repository's public key, ASCII-armoured.
    """

    url: str
    suites: str = "/"
    components: str = ""
    key: str


class Mirrors(Model):
    """Where hosts fetch from. What is not given is the tool's own default on that host."""

    apt: dict[str, AptRepository] = {}
    index: str | None = None
    """Python package index (PEP 503) for uv and pip."""
    hub: str | None = None
    """Hugging Face hub or a mirror of it: `HF_ENDPOINT`."""


class Driver(Model):
    """The NVIDIA driver, by exact version: `580.95.05`."""

    version: Annotated[str, Field(pattern=r"^[0-9]{3}\.[0-9]{2,3}(?:\.[0-9]{2})?$")]

    @property
    def branch(self) -> str:
        return self.version.split(".")[0]


class Vllm(Model):
    """Which vLLM a host runs; one release directory is made of it.

    `python` is the interpreter that the release is built on: a path on the host, or a version that uv
    finds or fetches. `packages` are further pinned requirements of the same release.
    """

    channel: Literal["stable"] = "stable"
    version: Annotated[str, Field(pattern=VERSION)]
    python: str = "/usr/bin/python3"
    torch_backend: str | None = None
    packages: list[str] = []

    @field_validator("packages")
    @classmethod
    def _pinned(cls, packages: list[str]) -> list[str]:
        for requirement in packages:
            if "==" not in requirement and " @ " not in requirement:
                raise ValueError(f"{requirement!r} is not pinned; write name==version")
        return packages


class SecretReference(Model):
    """Where the control machine finds a secret: exactly one of a file and an environment variable."""

    file: str | None = None
    env: str | None = None

    @model_validator(mode="after")
    def _one(self) -> SecretReference:
        if (self.file is None) == (self.env is None):
            raise ValueError("give either file or env, and only one of them")
        return self


class Gate(Model):
    """What a started service must do before it counts as serving. Times in seconds."""

    ready_timeout_s: Annotated[int, Field(ge=1)] = 3600
    answer_timeout_s: Annotated[int, Field(ge=1)] = 300
    max_tokens: Annotated[int, Field(ge=1)] = 2048
    expect: str | None = None
    """Regular expression that the answer to the guides' question must match; the model's own if absent."""

    @field_validator("expect")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
        return pattern


class Service(Model):
    """One `vllm serve` on a host.

    `model` names an entry of the catalogue (its parsers, limits and licence); `repository` is where the
    weights really come from when that is a fork or a private copy. `recipe` is a named way to serve of
    the catalogue; `args` and `env` add to it or override it: `True` is a bare flag, `None` removes one,
    a list or dict is passed as JSON.
    """

    name: Annotated[str, Field(pattern=NAME)]
    model: str
    revision: str
    repository: str | None = None
    recipe: str
    gpus: list[Annotated[int, Field(ge=0)]] = []
    port: Port
    engine_port: Port | None = None
    """Loopback port of vLLM itself; the public port belongs to the proxy. Default: public port + 10000."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    gpu_memory_utilization: float | None = None
    drain_timeout_s: Annotated[int, Field(ge=0)] = 300
    api_key: SecretReference | None = None
    args: dict[str, Argument] = {}
    env: dict[str, str] = {}
    gate: Gate = Gate()

    @field_validator("revision")
    @classmethod
    def _pinned(cls, revision: str) -> str:
        if not COMMIT.fullmatch(revision):
            raise ValueError(
                f"{revision!r} is not a commit; pin it: give the 40-hex id of the revision"
            )
        return revision

    @field_validator("gpu_memory_utilization")
    @classmethod
    def _fraction(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value <= 1:
            hint = f"; did you mean {value / 100:g}?" if 1 < value <= 100 else ""  # noqa: PLR2004
            raise ValueError(f"{value:g} is not in (0, 1]{hint}")
        return value

    @field_validator("env")
    @classmethod
    def _environment_names(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name for an environment variable")
        return env


class Rollout(Model):
    """How many hosts are cut over at once, after the canary of each group."""

    batch: int | str = "10%"
    """Hosts in a batch: a count, or a share of the hosts in the run (rounded up)."""

    @field_validator("batch")
    @classmethod
    def _batch(cls, batch: int | str) -> int | str:
        if isinstance(batch, str):
            if not re.fullmatch(r"[1-9][0-9]?%|100%", batch):
                raise ValueError(f"{batch!r} is not a share; write for example '10%'")
        elif batch < 1:
            raise ValueError("at least 1 host")
        return batch


class Paths(Model):
    """Where things live on a host. `models` wants the big, fast file system."""

    releases: str = "/opt/fleet/releases"
    models: str = "/var/lib/minimax/models"

    @field_validator("*")
    @classmethod
    def _absolute(cls, path: str) -> str:
        if not re.fullmatch(r"(?:/[A-Za-z0-9._-]+)+", path) or ".." in path.split("/"):
            raise ValueError(f"{path!r} is not a plain absolute path")
        return path


class HostSpec(Model):
    """All that group data says about one host."""

    gpu: str | None = None
    """GPU kind of the catalogue (`h20-141`); None for a host that serves on its CPU."""
    gpu_count: Annotated[int, Field(ge=0)] = 0
    driver: Driver | None = None
    packages: list[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9+.-]+$")]] = []
    """Further distribution packages, at whatever version the repositories have."""
    vllm: Vllm
    services: list[Service]
    mirrors: Mirrors = Mirrors()
    rollout: Rollout = Rollout()
    paths: Paths = Paths()
    clock_tolerance_s: Annotated[float, Field(gt=0)] = 60.0
