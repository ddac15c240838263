"""What a host must be: one frozen HostPlan per host, made by fleet/planner.py.

What a host then does is compare itself with its plan: nothing later decides anything about models,
flags, ports or versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fleet import command
from fleet.catalog import Claim, catalog
from fleet.drivers import (
    apt_pin,
    driver_packages,
    driver_units,
    kernel_headers,
    known_packages,
    supported_systems,
)
from fleet.memory import Memory
from fleet.render import render, repository_file
from fleet.spec import GpuKind, HostSpec

USER = "minimax"
STATE = "/var/lib/minimax"
ETC = "/etc/minimax"
PROGRAMS = "/usr/local/lib/minimax-fleet"
PROGRAM_FILES = ("fleet_host.py", "fleet_packages.py", "fleet_release.py", "fleet_weights.py")
"""Our program on hosts, and the modules of its long verbs."""
PROGRAM = f"{PROGRAMS}/{PROGRAM_FILES[0]}"
UNIT_PREFIX = "minimax-"
PROXY_UNIT = "minimax-proxy.service"
NGINX_UNIT = "nginx.service"
"""Debian's, which starts a freshly installed nginx on port 80; ours is a unit of its own."""
OS_PYTHON = "/usr/bin/python3"
RECORDS = "/var/lib/minimax-fleet"
UNITS = "/etc/systemd/system"
RUN = "/run/minimax-fleet"
DRAINING = "/run/minimax-fleet/draining"
"""A file here, named for a service, takes its public port out of service (see templates/proxy.conf.j2)."""
HUB = "https://huggingface.co"
PYTHONS = "/opt/fleet/python"
"""Interpreters that uv fetched."""
DRIVER_PIN = "/etc/apt/preferences.d/minimax-nvidia"
MODULES = "/etc/modules-load.d/minimax-nvidia.conf"
SYSCTL = {"net.core.somaxconn": "4096"}
"""What files/sysctl.conf sets."""

QUESTION = {
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Who won the world series in 2020?"}],
        },
    ]
}
"""The guides' own request, without its model."""


@dataclass(frozen=True, kw_only=True)
class File:
    """A file as it must be on the host. `content` of a secret never leaves for logs or diffs."""

    path: str
    content: str = field(repr=False)
    mode: str = "644"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Release:
    """A Python environment that is built beside the running one and never changed afterwards."""

    id: str
    path: str
    requirements: tuple[str, ...]
    python: str
    torch_backend: str | None
    bytecode: bool
    """Compiled when it is built: a service's user cannot write it, and would compile at each start."""
    check: tuple[str, ...]
    """Command inside the release that must exit 0 before it may be used."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model repository at a revision, in a directory of its own."""

    repository: str
    revision: str
    path: str


@dataclass(frozen=True, kw_only=True)
class ServicePlan:
    """One service of a host: what runs, where, and when it counts as serving. Times in seconds."""

    name: str
    unit: str
    model: str
    weights: Weights
    vllm_version: str
    recipe: str
    gpus: tuple[int, ...]
    port: int
    engine_port: int
    program: tuple[str, ...]
    options: tuple[tuple[str, ...], ...]
    environment: Mapping[str, str]
    drain_timeout_s: int
    gate: Mapping[str, Any]
    memory: Memory | None
    """None: the host has no GPUs, or the model's figures are unknown."""
    claims: tuple[Claim, ...]
    """What guides say that these GPUs hold with this recipe."""
    notes: tuple[str, ...]
    """What a person should know before a roll-out, and what stops none."""
    stamp: str
    unit_text: str = field(repr=False)
    api_key: str | None = field(repr=False)

    @property
    def argv(self) -> tuple[str, ...]:
        return self.program + tuple(word for words in self.options for word in words)

    @property
    def stage_dir(self) -> str:
        return f"{ETC}/services/{self.name}/{self.stamp}"

    @property
    def files(self) -> tuple[File, ...]:
        """What is put beside the running unit, to be switched to in the host's wave."""
        judged_by = json.dumps({"engine_port": self.engine_port, "gate": dict(self.gate)}, indent=1)
        staged = {
            "unit.service": (self.unit_text, "644"),
            "gate.json": (judged_by, "644"),
            "plan.json": (json.dumps(self.document(), indent=1), "644"),
        }
        if self.api_key:
            secrets = command.environment_file({"VLLM_API_KEY": self.api_key})
            staged["secrets.env"] = (secrets, "600")
        return tuple(
            File(path=f"{self.stage_dir}/{name}", content=content, mode=mode)
            for name, (content, mode) in staged.items()
        )

    @property
    def unit_file(self) -> File:
        """The unit where systemd reads it."""
        return File(path=f"{UNITS}/{self.unit}", content=self.unit_text)

    def document(self) -> dict[str, Any]:
        """What the service is made of, without its secrets; a host keeps it for `fleet plan --diff`."""
        return {
            "name": self.name,
            "model": self.model,
            "repository": self.weights.repository,
            "revision": self.weights.revision,
            "vllm": self.vllm_version,
            "recipe": self.recipe,
            "gpus": list(self.gpus),
            "port": self.port,
            "engine_port": self.engine_port,
            "unit": self.unit,
            "stamp": self.stamp,
            "argv": list(self.argv),
            "environment": dict(self.environment),
        }

    def request(self) -> dict[str, Any]:
        """What the host program must know to cut over to this service, and to judge it."""
        return {
            "name": self.name,
            "unit": self.unit,
            "stamp": self.stamp,
            "unit_sha256": self.unit_file.sha256,
            "argv": list(self.argv),
            "engine_port": self.engine_port,
            "gate": dict(self.gate),
        }


@dataclass(frozen=True, kw_only=True)
class HostPlan:
    """All that a host must be, and all that it is asked about."""

    name: str
    group: str
    spec: HostSpec
    gpu: GpuKind | None
    minimum_driver: int
    """Oldest driver branch that the release's CUDA runs on; 0 without GPUs."""
    release: Release
    hub_tool: Release
    services: tuple[ServicePlan, ...]
    keys: Mapping[str, str] = field(repr=False)
    """Text of each apt repository's public key, by its path on the control machine."""

    @property
    def gpu_name(self) -> str | None:
        """The GPU kind as group data names it."""
        declared = self.spec.gpu
        return declared.name if isinstance(declared, GpuKind) else declared

    @property
    def weights(self) -> tuple[Weights, ...]:
        """Each model once, however many services share it."""
        return tuple({service.weights.path: service.weights for service in self.services}.values())

    @property
    def mirrors(self) -> dict[str, Any]:
        """Addresses that the host fetches from, a tool's own default included."""
        return {
            "apt": {name: apt.url for name, apt in self.spec.mirrors.apt.items()},
            "index": self.spec.mirrors.index or default_index(),
            "hub": (self.spec.mirrors.hub or HUB).rstrip("/"),
        }

    @cached_property
    def proxy_stamp(self) -> str:
        return digest(self._proxy_config(""))

    def _proxy_config(self, stamp: str) -> str:
        return render("proxy.conf.j2", services=self.services, stamp=stamp, draining=DRAINING)

    @cached_property
    def proxy_unit_stamp(self) -> str:
        """What the proxy's process carries: another one means a restart, which ends connections."""
        return digest(self._proxy_unit(""))

    def _proxy_unit(self, stamp: str) -> str:
        return render("proxy.service.j2", config=f"{ETC}/proxy/nginx.conf", stamp=stamp)

    @property
    def proxy_files(self) -> tuple[File, File]:
        """The proxy's configuration and its unit, where nginx and systemd read them."""
        return (
            File(path=f"{ETC}/proxy/nginx.conf", content=self._proxy_config(self.proxy_stamp)),
            File(path=f"{UNITS}/{PROXY_UNIT}", content=self._proxy_unit(self.proxy_unit_stamp)),
        )

    @property
    def installed_files(self) -> tuple[File, ...]:
        """Files that only a cut-over writes, where they count."""
        return (*(service.unit_file for service in self.services), *self.proxy_files)

    @cached_property
    def system_files(self) -> tuple[File, ...]:
        """Files that hold for the whole host, whatever it serves."""
        directories = "".join(
            f"d {path} {mode} {owner} {owner} -\n"
            for path, (owner, mode) in self.directories.items()
        )
        return (
            *(
                File(
                    path=f"{PROGRAMS}/{name}",
                    content=repository_file(f"files/{name}"),
                    mode="755" if name == PROGRAM_FILES[0] else "644",
                )
                for name in PROGRAM_FILES
            ),
            File(
                path="/etc/sysusers.d/minimax.conf", content=repository_file("files/sysusers.conf")
            ),
            File(path="/etc/tmpfiles.d/minimax.conf", content=directories),
            File(
                path="/etc/sysctl.d/60-minimax.conf", content=repository_file("files/sysctl.conf")
            ),
            *self._apt_files(),
        )

    def _apt_files(self) -> Iterator[File]:
        for name, repository in self.spec.mirrors.apt.items():
            keyring = f"/etc/apt/keyrings/minimax-{name}.asc"
            text = render("apt.sources.j2", repository=repository, keyring=keyring)
            yield File(path=keyring, content=self.keys[repository.key])
            yield File(path=f"/etc/apt/sources.list.d/minimax-{name}.sources", content=text)

    def driver_files(self, system: Mapping[str, Any]) -> tuple[File, ...]:
        """Files that a declared driver needs; `system` is what the probe says of the host's."""
        driver = self.spec.driver
        if driver is None:
            return ()
        return (
            File(path=DRIVER_PIN, content=apt_pin(driver, system_name(system))),
            File(path=MODULES, content=repository_file("files/modules-load.conf")),
        )

    def driver_request(self, system: Mapping[str, Any]) -> dict[str, Any]:
        """Driver packages for the host's distribution and kernel, and what must run afterwards."""
        driver, nvswitch = self.spec.driver, bool(self.gpu and self.gpu.nvswitch)
        packages = driver_packages(driver, system_name(system), nvswitch=nvswitch)
        if packages and not system["kernel_headers"]:
            packages = {kernel_headers(system["kernel"]): None, **packages}
        return {
            "packages": packages,
            "mask": [],
            "unhold": known_packages(system_name(system)),
            "start": list(driver_units(nvswitch=nvswitch)) if packages else [],
            "version": driver.version if driver else None,
            "gpus": self.spec.gpu_count,
        }

    @cached_property
    def staged_files(self) -> tuple[File, ...]:
        """Files put beside what runs; nothing reads them before the cut-over."""
        config, unit = self.proxy_files
        return (
            *(file for service in self.services for file in service.files),
            replace(config, path=f"{ETC}/proxy/{self.proxy_stamp}.conf"),
            replace(unit, path=f"{ETC}/proxy/{self.proxy_unit_stamp}.service"),
        )

    @property
    def directories(self) -> dict[str, tuple[str, str]]:
        """Path to owner and mode."""
        return {
            STATE: (USER, "755"),
            f"{STATE}/cache": (USER, "755"),
            self.spec.paths.models: ("root", "755"),
            self.spec.paths.releases: ("root", "755"),
            RECORDS: ("root", "755"),
            # nginx looks below it, as a user of its own.
            RUN: ("root", "755"),
        }

    @property
    def releases(self) -> tuple[Release, ...]:
        return (self.hub_tool, self.release)

    @property
    def base_packages(self) -> dict[str, str | None]:
        """What every step rests on, and what the site adds; any version does."""
        return dict.fromkeys([*catalog().tools.packages, *self.spec.packages])

    def packages(self, system: str) -> dict[str, str | None]:
        """Distribution packages to their exact version (None: any), for `debian-12` and the like."""
        return {
            **self.base_packages,
            **driver_packages(
                self.spec.driver, system, nvswitch=bool(self.gpu and self.gpu.nvswitch)
            ),
        }

    def question(self) -> dict[str, Any]:
        """The one question that the host is asked in a run: see `probe` of files/fleet_host.py."""
        units = [service.unit for service in self.services]
        if self.spec.driver:
            units += driver_units(nvswitch=bool(self.gpu and self.gpu.nvswitch))
        ports = [port for service in self.services for port in (service.port, service.engine_port)]
        return {
            "files": [
                *(file.path for file in (*self.system_files, *self.staged_files)),
                *((DRIVER_PIN, MODULES) if self.spec.driver else ()),
            ],
            "users": [USER],
            "directories": list(self.directories),
            "sysctl": list(SYSCTL),
            "packages": {system: self.packages(system) for system in supported_systems()},
            "kernel_headers": kernel_headers("{kernel}") if self.spec.driver else None,
            "sources": [{"path": f.path, "content": f.content} for f in self._apt_files()],
            "gpus": self.gpu is not None,
            "units": [*units, PROXY_UNIT, NGINX_UNIT],
            "services": f"{ETC}/services",
            "cutover": self.cutover_request(),
            "ports": ports,
            "disks": [self.spec.paths.models, self.spec.paths.releases],
            "releases": [release.path for release in self.releases],
            "weights": [weights.path for weights in self.weights],
            "models": [
                {"path": w.path, "repository": w.repository, "revision": w.revision}
                for w in self.weights
            ],
            "uv": self.uv["path"],
            "mirrors": self.mirrors,
        }

    @property
    def uv(self) -> dict[str, Any]:
        pinned = catalog().tools.uv
        return {
            "version": pinned.version,
            "sha256": pinned.sha256,
            "path": f"/opt/fleet/uv/{pinned.version}/bin/uv",
        }

    def release_request(self, release: Release) -> dict[str, Any]:
        return {
            "path": release.path,
            "requirements": list(release.requirements),
            "python": release.python,
            "torch_backend": release.torch_backend,
            "bytecode": release.bytecode,
            "check": list(release.check),
            "index": self.spec.mirrors.index,
            "uv": self.uv,
            "pythons": PYTHONS,
            "user": USER,
            "home": STATE,
        }

    def weights_request(self, weights: Weights) -> dict[str, Any]:
        return {
            "path": weights.path,
            "repository": weights.repository,
            "revision": weights.revision,
            "hub": self.mirrors["hub"],
            "python": f"{self.hub_tool.path}/bin/python3",
        }

    def cutover_request(self) -> dict[str, Any]:
        config, unit = self.proxy_files
        return {
            "services": [service.request() for service in self.services],
            "proxy": {
                "stamp": self.proxy_stamp,
                "sha256": config.sha256,
                "unit_stamp": self.proxy_unit_stamp,
                "unit_sha256": unit.sha256,
            },
        }


def default_index() -> str | None:
    """Where uv looks by itself, whatever is configured on a host: PyPI, whose address pip knows too."""
    try:
        from pip._internal.models.index import PyPI
    except ImportError:
        # An environment without pip: the index is not asked beforehand then.
        return None
    return str(PyPI.simple_url)


def system_name(system: Mapping[str, Any]) -> str:
    """`debian-12` for what the probe says of an operating system."""
    return f"{system['id']}-{system['version_id']}"


def digest(*parts: str) -> str:
    """12 hex digits that name these texts."""
    text = json.dumps(parts, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
