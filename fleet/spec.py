"""What a site may say about its hosts: the schema of group data.

Every model is strict (no `"8000"` where a number belongs), frozen, and refuses unknown keys, so that
a plan never rests on a guess about what was meant. Paths, URLs and names are plain strings because
group data is plain Python literals.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from packaging.requirements import InvalidRequirement, Requirement
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    field_validator,
    model_validator,
)

COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = r"^[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?$"
DRIVER_VERSION = r"^[0-9]{3}\.[0-9]{2,3}(?:\.[0-9]{2})?$"
CAPABILITY = r"^[0-9]+\.[0-9]$"
CUDA_LINE = r"^1[0-9]\.[0-9]$"
PACKAGE = r"^[a-z0-9][a-z0-9+.-]+$"
TORCH_BACKEND = r"^(?:auto|cpu|xpu|cu[0-9]{2,3}|rocm[0-9.]+)$"
OPTION = re.compile(r"(?:--)?[A-Za-z][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_.+-]+)?")
PLAIN_WORDS = r"^[A-Za-z0-9._/ -]*$"
SHA256 = r"^[0-9a-f]{64}$"
WHEEL = re.compile(r"(?:https?://[^\s/]+|file://)/\S*?([^/\s]+\.whl)")
IMAGE = re.compile(r"[a-z0-9][a-z0-9._:/-]*@sha256:[0-9a-f]{64}")
VERSION = r"^[0-9]+(?:\.[0-9]+)*(?:(?:a|b|rc|\.post|\.dev)[0-9]+)?(?:\+[a-z0-9.]+)?$"

LARGEST = 2**63 - 1
RESERVED_NAME = re.compile(r"proxy|job-.*")
"""Units of our own are called so: minimax-proxy.service, minimax-job-….service."""
REPOSITORY = re.compile(r"(?!\.)[A-Za-z0-9._-]+/(?!\.)[A-Za-z0-9._-]+")


def _argument(value: object) -> object:
    """Text, numbers, truth, None, and lists and dicts of these: what JSON can say."""
    if isinstance(value, list):
        return [_argument(item) for item in value]
    if isinstance(value, dict):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            raise ValueError(f"key {wrong!r} is no text")
        return {key: _argument(item) for key, item in value.items()}
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        if abs(value) > LARGEST:
            raise ValueError("no number of vLLM is as large as that")
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    what = repr(value) if isinstance(value, float) else type(value).__name__
    raise ValueError(f"expected text, a number, True, None, a list or a dict, got {what}")


CREDENTIALS = re.compile(r"https?://[^/\s]*@")


def _url(value: str) -> str:
    _refuse_credentials(value)
    if not re.fullmatch(r"https?://[^\s/]+(?:/\S*)?", value):
        raise ValueError(f"{value!r} is no address; write http://… or https://…")
    return value


def _refuse_credentials(value: str) -> None:
    """Credentials come from a file, and reach uv, git, pip, apt and dnf by files of their own."""
    if CREDENTIALS.search(value):
        raise ValueError(
            "holds credentials, which would reach command lines and logs; put them into a netrc file "
            "and name that in mirrors.credentials; a hub must do without"
        )


def _repository(value: str) -> str:
    if not REPOSITORY.fullmatch(value):
        raise ValueError(f"{value!r} is no repository; write owner/name")
    return value


Port = Annotated[int, Field(ge=1, le=65535)]
Argument = Annotated[
    str | int | float | bool | list[Any] | dict[str, Any] | None, PlainValidator(_argument)
]
Url = Annotated[str, AfterValidator(_url)]
Repository = Annotated[str, AfterValidator(_repository)]


def _commit(revision: str) -> str:
    if not COMMIT.fullmatch(revision):
        raise ValueError(
            f"{revision!r} is not a commit; pin it: give the 40-hex id of the revision"
        )
    return revision


class Model(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class GpuKind(Model):
    """A GPU as nvidia-smi reports it; `memory_mib` is its memory.total in MiB."""

    name: str
    memory_mib: Annotated[int, Field(ge=1, le=LARGEST)]
    compute_capability: Annotated[str, Field(pattern=CAPABILITY)]
    nvswitch: bool

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib << 20

    @property
    def capability(self) -> tuple[int, int]:
        """`(9, 0)`, to be compared."""
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)

    @property
    def fp8(self) -> bool:
        """Tensor cores for FP8: Ada (8.9) and Hopper (9.0) were the first."""
        return self.capability >= (8, 9)

    @property
    def fp4(self) -> bool:
        """Tensor cores for FP4: Blackwell (10.0 and 12.0) was the first."""
        return self.capability >= (10, 0)


class SecretReference(Model):
    """Where the control machine finds a secret: exactly one of a file and an environment variable."""

    file: str | None = None
    env: str | None = None

    @model_validator(mode="after")
    def _one(self) -> SecretReference:
        if (self.file is None) == (self.env is None):
            raise ValueError("give either file or env, and only one of them")
        return self


class AptRepository(Model):
    """One apt repository, written to the host as a deb822 source.

    `suites` ending in "/" is a flat repository (as NVIDIA's own are) and takes no components.
    `key` is the path on the control machine of the repository's public key, ASCII-armoured.
    """

    url: Url
    suites: Annotated[str, Field(pattern=PLAIN_WORDS)] = "/"
    components: Annotated[str, Field(pattern=PLAIN_WORDS)] = ""
    key: str


class DnfRepository(Model):
    """One dnf repository, written to the host as a .repo file.

    `key` is the path on the control machine of the key that signs its packages, ASCII-armoured.
    """

    url: Url
    key: str
    module_hotfixes: bool = False
    """All of its packages can be seen, whatever module streams are enabled: for NVIDIA's."""


class Mirrors(Model):
    """Where hosts fetch from. What is not given is the tool's own default on that host."""

    apt: dict[Annotated[str, Field(pattern=NAME)], AptRepository] = {}
    dnf: dict[Annotated[str, Field(pattern=NAME)], DnfRepository] = {}

    def repository_keys(self) -> dict[str, str]:
        """Path of each repository's public key on the control machine, by `apt.NAME` and `dnf.NAME`."""
        by_manager: dict[str, Mapping[str, AptRepository | DnfRepository]] = {
            "apt": self.apt,
            "dnf": self.dnf,
        }
        return {
            f"{manager}.{name}": repository.key
            for manager, repositories in by_manager.items()
            for name, repository in repositories.items()
        }

    index: Url | None = None
    """Python package index (PEP 503) for uv and pip."""
    extra_index: list[Url] = []
    """Further indexes, asked before `index`; what one of them has comes from there alone."""
    nightly: Url | None = None
    """vLLM's index of builds by commit: `<nightly>/<commit>/vllm/`."""
    git: dict[str, Url] = {}
    """Beginnings of git addresses, each with what stands in for it: git's `url.….insteadOf`."""
    python: Url | None = None
    """Where uv fetches interpreters: `UV_PYTHON_INSTALL_MIRROR`."""
    hub: Url | None = None
    """Hugging Face hub or a mirror of it: `HF_ENDPOINT`."""
    credentials: SecretReference | None = None
    """A netrc file for all of these but the hub."""
    registry: Url | None = None
    """Registry of images, with a path if it has one, that stands in for the image's own."""

    @field_validator("git")
    @classmethod
    def _prefixes(cls, git: dict[str, str]) -> dict[str, str]:
        for prefix in git:
            if not re.fullmatch(r"(?:https?|ssh|git)://\S+/", prefix):
                raise ValueError(
                    f"{prefix!r} is no beginning of an address; write for example 'https://github.com/'"
                )
        return git


class Driver(Model):
    """The NVIDIA driver, by exact version: `580.95.05`.

    A kernel module that is loaded stays until a reboot. `never`: where that is needed, the host is
    refused before anything is changed.
    """

    version: Annotated[str, Field(pattern=DRIVER_VERSION)]
    reboot: Literal["never", "if-needed"] = "never"

    @property
    def branch(self) -> str:
        return self.version.split(".")[0]


class WheelFile(Model):
    """A wheel that the site keeps: on a mirror, or on the hosts themselves (`file:///srv/…`)."""

    url: str
    sha256: Annotated[str, Field(pattern=SHA256)]

    @field_validator("url")
    @classmethod
    def _wheel(cls, url: str) -> str:
        _refuse_credentials(url)
        if not WHEEL.fullmatch(url):
            raise ValueError(f"{url!r} is no address of a wheel; write https://… or file:///….whl")
        return url


CHANNELS = ("stable", "nightly", "source", "wheel", "docker")
KEYS_OF_CHANNELS: dict[str, tuple[str, ...]] = {
    "commit": ("nightly", "source", "docker"),
    "wheel": ("wheel",),
    "image": ("docker",),
    "precompiled": ("source",),
    "patches": ("source", "docker"),
    "max_jobs": ("source", "docker"),
    "deep_gemm": ("stable", "nightly", "source", "wheel"),
    "kernels": ("stable", "nightly", "source", "wheel"),
    "python": ("stable", "nightly", "source", "wheel"),
    "torch_backend": ("stable", "nightly", "source", "wheel"),
    "packages": ("stable", "nightly", "source", "wheel"),
    "overrides": ("stable", "nightly", "source", "wheel"),
}
"""Keys of `vllm` that mean something only to some channels."""


class Vllm(Model):
    """Which vLLM a host runs; one release directory, or one image, is made of it.

    `python` is the interpreter that the release is built on: a path on the host, or a version that uv
    finds or fetches. `packages` are further pinned requirements of the same release.

    `version` is that of the package index for `stable`; for the others it is what `vllm --version` is to
    begin with, by which options are checked.
    """

    channel: Literal["stable", "nightly", "source", "wheel", "docker"] = "stable"
    version: Annotated[str, Field(pattern=VERSION)]
    commit: str | None = None
    """vLLM's own commit: of a nightly, a source build, or a source build inside an image. A branch or a
    date would move."""
    wheel: WheelFile | None = None
    image: str | None = None
    """Of docker: `name@sha256:…`. A tag would move."""
    precompiled: bool = True
    """Of a source build: the compiled libraries come from the commit's own wheel, and no compiler is
    needed. Else all is compiled."""
    patches: list[str] = []
    """Of a source build: files on the control machine, applied in order by `git apply`."""
    max_jobs: Annotated[int, Field(ge=1)] | None = None
    """Of a full source build: compilers at once. None: as many as the host's cores and memory carry."""
    deep_gemm: str | None = None
    """Commit of DeepGEMM to build into the release, for versions of vLLM that do not bundle it."""
    kernels: bool = False
    """Run `vllm download-kernels` into the release, where that version has it."""
    python: str = "/usr/bin/python3"
    torch_backend: Annotated[str, Field(pattern=TORCH_BACKEND)] | None = None
    packages: list[str] = []
    overrides: list[str] = []
    """Requirements that count in place of what packages themselves ask for: uv's `--overrides`."""

    @model_validator(mode="after")
    def _of_the_channel(self) -> Vllm:
        for key, channels in KEYS_OF_CHANNELS.items():
            if key in self.model_fields_set and self.channel not in channels:
                raise ValueError(
                    f"{key} means nothing to channel {self.channel!r} ({_either(channels)} has it); "
                    "leave it out"
                )
        needs_commit = self.channel in ("nightly", "source")
        if (needs_commit or self.commit is not None) and not COMMIT.fullmatch(self.commit or ""):
            given = "no commit" if self.commit is None else f"{self.commit!r}"
            raise ValueError(
                f"channel {self.channel!r} with {given}: pin it, give commit as 40 hex digits"
            )
        if self.channel == "wheel" and self.wheel is None:
            raise ValueError("channel 'wheel' with no wheel: give {'url': …, 'sha256': …}")
        if self.channel == "docker" and not IMAGE.fullmatch(self.image or ""):
            given = "no image" if self.image is None else f"{self.image!r}"
            raise ValueError(f"channel 'docker' with {given}: pin it, give image as name@sha256:…")
        for key in ("patches", "max_jobs"):
            if self.channel == "docker" and self.commit is None and key in self.model_fields_set:
                raise ValueError(
                    f"{key} is for a build inside the image; give commit, or leave it out"
                )
        if self.precompiled and "max_jobs" in self.model_fields_set and self.channel == "source":
            raise ValueError(
                "max_jobs is for a full build; set precompiled to False, or leave it out"
            )
        return self

    @field_validator("deep_gemm")
    @classmethod
    def _deep_gemm_commit(cls, commit: str | None) -> str | None:
        if commit is not None and not COMMIT.fullmatch(commit):
            raise ValueError(
                f"{commit!r} is not a commit; pin it: give 40 hex digits of DeepGEMM's"
            )
        return commit

    @field_validator("packages")
    @classmethod
    def _pinned(cls, packages: list[str]) -> list[str]:
        for requirement in packages:
            _refuse_credentials(requirement)
            if "==" not in requirement and " @ " not in requirement:
                raise ValueError(f"{requirement!r} is not pinned; write name==version")
        return packages

    @field_validator("overrides")
    @classmethod
    def _requirements(cls, overrides: list[str]) -> list[str]:
        for requirement in overrides:
            _refuse_credentials(requirement)
            try:
                Requirement(requirement)
            except InvalidRequirement as error:
                what = str(error).splitlines()[0]
                raise ValueError(f"{requirement!r} is no requirement: {what}") from None
        return overrides


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(names)


class Gate(Model):
    """What a started service must do before it counts as serving. Times in seconds."""

    ready_timeout_s: Annotated[int, Field(ge=1, le=LARGEST)] = 3600
    answer_timeout_s: Annotated[int, Field(ge=1, le=LARGEST)] = 300
    max_tokens: Annotated[int, Field(ge=1, le=LARGEST)] = 2048
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

    `model` names an entry of the catalogue (its parsers, limits and licence), or a recipe file in the
    schema of vllm-project/recipes (`recipes/DeepSeek-V3.yaml`); `repository` is where the weights really
    come from when that is a fork or a private copy. `recipe` is a named way to serve of the catalogue,
    or a strategy of the recipe file; `args` and `env` add to it or override it: `True` is a bare flag,
    `None` takes one away, a list or dict is passed as JSON.
    """

    name: Annotated[str, Field(pattern=NAME)]
    model: str
    revision: str
    repository: Repository | None = None
    recipe: str
    variant: str = "default"
    """Of a recipe file: which of its checkpoints."""
    features: list[str] | None = None
    """Of a recipe file: which of its features; None for those that it has on by default."""
    model_config_file: str | None = None
    """Of a recipe file: the model's config.json on this machine, for the memory arithmetic."""
    gpus: list[Annotated[int, Field(ge=0, le=LARGEST)]] = []
    port: Port
    engine_port: Port | None = None
    """Loopback port of vLLM itself; the public port belongs to the proxy. Default: public port + 10000."""
    max_model_len: Annotated[int, Field(ge=1, le=LARGEST)] | None = None
    gpu_memory_utilization: float | None = None
    drain_timeout_s: Annotated[int, Field(ge=0, le=LARGEST)] = 300
    api_key: SecretReference | None = None
    args: dict[str, Argument] = {}
    env: dict[str, str | None] = {}
    gate: Gate = Gate()

    @field_validator("revision")
    @classmethod
    def _pinned(cls, revision: str) -> str:
        return _commit(revision)

    @field_validator("gpu_memory_utilization")
    @classmethod
    def _fraction(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value <= 1:
            hint = f"; did you mean {value / 100:g}?" if 1 < value <= 100 else ""  # noqa: PLR2004
            raise ValueError(f"{value:g} is not in (0, 1]{hint}")
        return value

    @field_validator("name")
    @classmethod
    def _free(cls, name: str) -> str:
        if RESERVED_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is a name of our own units; choose another")
        return name

    @field_validator("args")
    @classmethod
    def _options(cls, args: dict[str, Argument]) -> dict[str, Argument]:
        for name in args:
            if not OPTION.fullmatch(name):
                raise ValueError(
                    f"{name!r} is no option's name; write it and its value apart: "
                    "{'max-num-seqs': 64}"
                )
        return args

    @field_validator("env")
    @classmethod
    def _environment_names(cls, env: dict[str, str | None]) -> dict[str, str | None]:
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


class DcgmExporter(Model):
    """NVIDIA's exporter of GPU metrics for Prometheus: plain HTTP, without a key."""

    address: str = "127.0.0.1"
    """That it listens on: one of the host's, or `0.0.0.0` for all."""
    port: Port = 9400

    @field_validator("address")
    @classmethod
    def _address(cls, address: str) -> str:
        try:
            ipaddress.ip_address(address)
        except ValueError as error:
            raise ValueError(
                f"{address!r} is no IP address; write for example '0.0.0.0'"
            ) from error
        return address

    @property
    def reachable(self) -> str:
        """Where the host itself reaches it."""
        address = ipaddress.ip_address(self.address)
        loopback = {4: "127.0.0.1", 6: "::1"}[address.version]
        return loopback if address.is_unspecified else self.address

    @property
    def listen(self) -> str:
        """As the exporter takes it: `127.0.0.1:9400`, `[::1]:9400`."""
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}:{self.port}"


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

    gpu: str | GpuKind | None = None
    """GPU kind of the catalogue (`h20-141`) or one that the catalogue lacks, described; None for a host
    that serves on its CPU."""
    gpu_count: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    driver: Driver | None = None
    packages: list[Annotated[str, Field(pattern=PACKAGE)]] = []
    """Further distribution packages, at whatever version the repositories have."""
    cuda_toolkit: Annotated[str, Field(pattern=CUDA_LINE)] | None = None
    """Line of the CUDA toolkit to install: `12.9`. For what is compiled on the host."""
    dcgm_exporter: bool | DcgmExporter = False
    """Run NVIDIA's exporter of GPU metrics; `True` for its defaults."""
    reviewed_revisions: list[str] = []
    """Commits of model repositories whose Python the site has looked at, for --trust-remote-code."""
    vllm: Vllm
    services: list[Service]
    keep_releases: Annotated[int, Field(ge=2, le=LARGEST)] = 2
    """Releases that pruning leaves of those that served: the one in use, and what to go back to."""
    mirrors: Mirrors = Mirrors()
    rollout: Rollout = Rollout()
    paths: Paths = Paths()
    clock_tolerance_s: Annotated[float, Field(gt=0)] = 60.0

    @field_validator("reviewed_revisions")
    @classmethod
    def _commits(cls, revisions: list[str]) -> list[str]:
        return [_commit(revision) for revision in revisions]
