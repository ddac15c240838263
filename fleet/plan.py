"""What a host must be: one frozen HostPlan per host, made by fleet/planner.py.

What a host then does is compare itself with its plan: nothing later decides anything about models,
flags, ports or versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fleet import command, container, credentials
from fleet.catalog import Claim, catalog
from fleet.drivers import (
    DCGM_EXPORTER_UNIT,
    apt_pin,
    container_choices,
    container_engines,
    container_packages,
    dcgm_packages,
    dnf_locks,
    driver_packages,
    driver_units,
    kernel_headers,
    known_packages,
    package_manager,
    supported_systems,
    system_name,
    toolkit_home,
    toolkit_packages,
    unattended_upgrades,
)
from fleet.memory import Memory
from fleet.render import render, repository_file
from fleet.spec import DcgmExporter, GpuKind, HostSpec

USER = "minimax"
STATE = "/var/lib/minimax"
ETC = "/etc/minimax"
PROGRAMS = "/usr/local/lib/minimax-fleet"
PROGRAM_FILES = (
    "fleet_host.py",
    "fleet_driver.py",
    "fleet_image.py",
    "fleet_packages.py",
    "fleet_prune.py",
    "fleet_release.py",
    "fleet_weights.py",
)
"""Our program on hosts, and the modules of its long verbs."""
PROGRAM = f"{PROGRAMS}/{PROGRAM_FILES[0]}"
UNIT_PREFIX = "minimax-"
PROXY_UNIT = "minimax-proxy.service"
NGINX_UNIT = "nginx.service"
"""Debian's, which starts a freshly installed nginx on port 80; ours is a unit of its own."""
OS_PYTHON = "/usr/bin/python3"
RECORDS = "/var/lib/minimax-fleet"
AIM = f"{ETC}/rollout.json"
"""What the last roll-out that staged a host is to make of it: what `tasks.rollback` goes back from."""
UNITS = "/etc/systemd/system"
RUN = "/run/minimax-fleet"
DRAINING = "/run/minimax-fleet/draining"
"""A file here, named for a service, takes its public port out of service (see templates/proxy.conf.j2)."""
HUB = "https://huggingface.co"
NETRC = f"{ETC}/fetch/.netrc"
"""Credentials of mirrors, for uv, pip and ourselves; and for git, whose HOME its folder then is."""
PYTHONS = "/opt/fleet/python"
"""Interpreters that uv fetched."""
DRIVER_PIN = "/etc/apt/preferences.d/minimax-nvidia"
MODULES = "/etc/modules-load.d/minimax-nvidia.conf"
NO_NOUVEAU = "/etc/modprobe.d/minimax-nvidia.conf"
NO_UPGRADES = "/etc/apt/apt.conf.d/60minimax-nvidia"
"""Keeps unattended-upgrades away from the driver."""
EXPORTER_DROP_IN = f"{UNITS}/{DCGM_EXPORTER_UNIT}.d/minimax.conf"
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
    modules: tuple[str, ...]
    """What must be importable in it, too."""
    origin: Mapping[str, Any]
    """Where its main package comes from (see fleet/releases.py), but for the mirror."""
    patches: tuple[tuple[str, str], ...] = field(repr=False)
    """Path on the control machine and text of each patch, in order."""
    overrides: tuple[str, ...] = ()
    """Requirements that count in place of what packages themselves ask for."""
    lock: str | None = field(default=None, repr=False)
    """Every package at its version with its hashes, as a requirements file; None: not locked."""
    lock_python: str | None = None
    """The version of Python that `lock` is for: 3.11, or in full where uv fetches it."""
    image: str | None = None
    """The image's name on the host, for a release that is one; below `path` is its manifest then."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model repository at a revision, in a directory of its own."""

    repository: str
    revision: str
    path: str
    files: Mapping[str, tuple[int, str]] | None = field(default=None, repr=False)
    """Size in bytes and SHA-256 of each file, as they are locked; None: the hub is believed."""

    @property
    def digest(self) -> str | None:
        """Names the locked hashes of the files; a host compares it with what it has verified."""
        if self.files is None:
            return None
        return digest(*(f"{name} {self.files[name][1]}" for name in sorted(self.files)))


@dataclass(frozen=True, kw_only=True)
class ServicePlan:
    """One service of a host: what runs, where, and when it counts as serving. Times in seconds."""

    name: str
    unit: str
    model: str
    weights: Weights
    release: str
    """Path of the release that it runs from."""
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
    image: str | None = None
    """What its container is made of; None where it runs in none."""

    @property
    def argv(self) -> tuple[str, ...]:
        return self.program + tuple(word for words in self.options for word in words)

    def invocation(self) -> dict[str, Any]:
        """The program's entrypoint, and the words that its parser is given."""
        options = [word for words in self.options for word in words]
        # Of a container's, what follows the image is given to its entrypoint.
        after = 1 if self.image is None else self.program.index(self.image) + 1
        words = [*self.program[after:], *options]
        if words[0] == "serve":
            return {"entrypoint": "serve", "words": words[1:]}
        return {"entrypoint": words[1], "words": words[2:]}

    @property
    def stage_dir(self) -> str:
        return f"{ETC}/services/{self.name}/{self.stamp}"

    @property
    def accepted(self) -> str:
        """Written on the host once the release has parsed the unit's arguments."""
        return f"{self.stage_dir}/accepted.json"

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
            "weights": self.weights.path,
            "release": self.release,
            "vllm": self.vllm_version,
            "recipe": self.recipe,
            "gpus": list(self.gpus),
            "port": self.port,
            "engine_port": self.engine_port,
            "unit": self.unit,
            "stamp": self.stamp,
            "argv": list(self.argv),
            "environment": dict(self.environment),
            **({"image": self.image} if self.image else {}),
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
            **({"image": self.image, "release": self.release} if self.image else {}),
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
    driver_versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By distribution: driver packages at the exact versions that are locked."""
    services: tuple[ServicePlan, ...]
    credentials: str = field(default="", repr=False)
    """Text of the netrc file for the mirrors; empty where they ask for nothing."""
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
            "dnf": {name: dnf.url for name, dnf in self.spec.mirrors.dnf.items()},
            "index": self.spec.mirrors.index or default_index(),
            "hub": (self.spec.mirrors.hub or HUB).rstrip("/"),
            "registry": self._registry,
        }

    @property
    def _registry(self) -> str | None:
        """Where images come from; None where none is asked for."""
        image = self.spec.vllm.image
        if image is None:
            return None
        return container.registry_address(image, self.spec.mirrors.registry)

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
            *self.program_files,
            File(
                path="/etc/sysusers.d/minimax.conf", content=repository_file("files/sysusers.conf")
            ),
            File(path="/etc/tmpfiles.d/minimax.conf", content=directories),
            # There without credentials, too: what was in it must not outlive its place in group data.
            File(path=NETRC, content=self.credentials, mode="600"),
            File(
                path="/etc/sysctl.d/60-minimax.conf", content=repository_file("files/sysctl.conf")
            ),
        )

    @property
    def program_files(self) -> tuple[File, ...]:
        """Our program on the host: the only one of system_files that a rollback needs."""
        return tuple(
            File(
                path=f"{PROGRAMS}/{name}",
                content=repository_file(f"files/{name}"),
                mode="755" if name == PROGRAM_FILES[0] else "644",
            )
            for name in PROGRAM_FILES
        )

    def repository_files(self, manager: str) -> tuple[File, ...]:
        """The site's repositories and their keys, for hosts with apt or with dnf."""
        return tuple(self._apt_files() if manager == "apt" else self._dnf_files())

    def _apt_files(self) -> Iterator[File]:
        urls = [repository.url for repository in self.spec.mirrors.apt.values()]
        known = credentials.apt_auth(credentials.read(self.credentials), urls)
        yield File(path="/etc/apt/auth.conf.d/minimax.conf", content=known, mode="600")
        for name, repository in self.spec.mirrors.apt.items():
            keyring = f"/etc/apt/keyrings/minimax-{name}.asc"
            text = render("apt.sources.j2", repository=repository, keyring=keyring)
            yield File(path=keyring, content=self.keys[repository.key])
            yield File(path=f"/etc/apt/sources.list.d/minimax-{name}.sources", content=text)

    def _dnf_files(self) -> Iterator[File]:
        for name, repository in self.spec.mirrors.dnf.items():
            key = f"/etc/pki/rpm-gpg/RPM-GPG-KEY-minimax-{name}"
            login = credentials.login_for(credentials.read(self.credentials), repository.url)
            named = {"name": f"minimax-{name}", "repository": repository, "key": key}
            text = render("dnf.repo.j2", **named, login=login)
            yield File(path=key, content=self.keys[repository.key])
            path, mode = f"/etc/yum.repos.d/minimax-{name}.repo", "600" if login else "644"
            yield File(path=path, content=text, mode=mode)

    def driver_files(self, system: Mapping[str, Any]) -> tuple[File, ...]:
        """Files that a declared driver needs; `system` is what the probe says of the host's."""
        driver = self.spec.driver
        if driver is None:
            return ()
        name = system_name(system)
        # What dnf keeps at the driver's version it keeps by its own locks: see driver_request.
        of_apt = [
            File(path=DRIVER_PIN, content=apt_pin(driver, name)),
            File(path=NO_UPGRADES, content=unattended_upgrades(name)),
        ]
        return (
            *(of_apt if package_manager(name) == "apt" else ()),
            File(path=MODULES, content=repository_file("files/modules-load.conf")),
            File(path=NO_NOUVEAU, content=repository_file("files/modprobe.conf")),
        )

    def driver_request(self, system: Mapping[str, Any]) -> dict[str, Any]:
        """Driver packages for the host's distribution and kernel, and what must run afterwards."""
        # The module is built for the kernel that runs, and for the one that a reboot would start.
        without = [] if system["kernel_headers"] else [system["kernel"]]
        without += [system["next_kernel"]] if system["next_kernel"] else []
        return self._driver_request(system_name(system), without)

    def _driver_request(self, name: str, without: Iterable[str] = ()) -> dict[str, Any]:
        """For `debian-12` and the like; `without` are kernels whose headers are to be installed."""
        driver, nvswitch = self.spec.driver, bool(self.gpu and self.gpu.nvswitch)
        packages = self._driver_packages(name)
        if packages:
            headers = [kernel_headers(kernel, name) for kernel in without]
            packages = dict.fromkeys(headers) | packages
        return {
            "packages": packages,
            "mask": [],
            "unhold": known_packages(name),
            "lock": dnf_locks(driver, name),
            "start": list(driver_units(nvswitch=nvswitch)) if packages else [],
            "version": driver.version if driver else None,
            "gpus": self.spec.gpu_count,
            "nvswitch": nvswitch,
            "pin": self._driver_pin(name),
            "reboot": driver.reboot if driver else None,
            "python": f"{self.release.path}/bin/python3",
        }

    def _driver_pin(self, system: str) -> dict[str, str] | None:
        """Path and content of what keeps the driver's packages at one version; None where apt is not."""
        driver = self.spec.driver
        if driver is None or package_manager(system) != "apt":
            return None
        return {"path": DRIVER_PIN, "content": apt_pin(driver, system)}

    def driver_to_exchange(self, system: str) -> dict[str, Any] | None:
        """What a cut-over is told of the declared driver, on `debian-12` and the like; None where none is.

        The same for every kernel: whoever tells it again, be it after a reboot, finds the same job.
        """
        request = self._driver_request(system)
        return request if request["packages"] else None

    @cached_property
    def staged_files(self) -> tuple[File, ...]:
        """Files put beside what runs; nothing reads them before the cut-over."""
        config, unit = self.proxy_files
        return (
            *(file for service in self.services for file in service.files),
            replace(config, path=f"{ETC}/proxy/{self.proxy_stamp}.conf"),
            replace(unit, path=f"{ETC}/proxy/{self.proxy_unit_stamp}.service"),
            File(path=AIM, content=json.dumps(self._aim(), indent=1)),
        )

    def _aim(self) -> dict[str, Any]:
        """Stamps of all that a cut-over exchanges."""
        return {
            "services": {service.name: service.stamp for service in self.services},
            "proxy": {"stamp": self.proxy_stamp, "unit_stamp": self.proxy_unit_stamp},
        }

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
    def places(self) -> list[str]:
        """Folders whose room is looked at."""
        images = [container.ROOT] if self.release.image else []
        return [self.spec.paths.models, self.spec.paths.releases, *images]

    @property
    def releases(self) -> tuple[Release, ...]:
        return (self.hub_tool, self.release)

    def base_packages(self, system: str) -> dict[str, str | None]:
        """What every step rests on, and what the site adds, at any version; for `debian-12` and the like."""
        ours = catalog().tools.packages[package_manager(system)]
        return {
            **dict.fromkeys([*ours, *self.spec.packages]),
            **toolkit_packages(self.spec.cuda_toolkit),
        }

    def _driver_packages(self, system: str) -> dict[str, str | None]:
        """Packages of the driver, at the revision that is locked, else at any of its version."""
        nvswitch = bool(self.gpu and self.gpu.nvswitch)
        packages = driver_packages(self.spec.driver, system, nvswitch=nvswitch)
        exact = self.driver_versions.get(system, {})
        return {name: exact.get(name, version) for name, version in packages.items()}

    def packages(self, system: str) -> dict[str, str | None]:
        """All distribution packages to their exact version (None: any), for `debian-12` and the like."""
        return {
            **self.base_packages(system),
            **self._driver_packages(system),
            **self.exporter_packages,
        }

    def engine_packages(
        self, system: str, installed: Collection[str] = ()
    ) -> dict[str, str | None]:
        """Packages that containers need; none where nothing runs in one. `installed` as in
        drivers.container_packages."""
        if self.release.image is None:
            return {}
        found = container_packages(system, installed)
        engines = container_engines(system)
        return {name: None for name in found if self.gpu is not None or name in engines}

    @property
    def exporter(self) -> DcgmExporter | None:
        """The exporter of GPU metrics, where one is asked for."""
        asked = self.spec.dcgm_exporter
        if isinstance(asked, DcgmExporter):
            return asked
        return DcgmExporter() if asked else None

    @property
    def exporter_packages(self) -> dict[str, str | None]:
        return dcgm_packages() if self.exporter else {}

    @cached_property
    def exporter_stamp(self) -> str | None:
        """What the exporter's process carries; None where there is to be none of ours."""
        return digest(self._exporter_text("")) if self.exporter else None

    def _exporter_text(self, stamp: str) -> str:
        return render("dcgm-exporter.conf.j2", exporter=self.exporter, stamp=stamp)

    @property
    def exporter_file(self) -> File | None:
        """What is added to the exporter's own unit."""
        if self.exporter_stamp is None:
            return None
        return File(path=EXPORTER_DROP_IN, content=self._exporter_text(self.exporter_stamp))

    def exporter_request(self) -> dict[str, Any]:
        """What the host program must know to run the exporter, or to end ours."""
        return {
            "packages": self.exporter_packages,
            "mask": [],
            "unit": DCGM_EXPORTER_UNIT,
            "drop_in": EXPORTER_DROP_IN,
            "content": self.exporter_file.content if self.exporter_file else None,
            "stamp": self.exporter_stamp,
            "host": self.exporter.reachable if self.exporter else None,
            "port": self.exporter.port if self.exporter else None,
        }

    def question(self, *, outside: bool = True) -> dict[str, Any]:
        """The one question that the host is asked in a run: see `probe` of files/fleet_host.py.

        `outside`: whether it asks its mirrors for what it lacks of the plan.
        """
        units = [service.unit for service in self.services]
        if self.spec.driver:
            units += driver_units(nvswitch=bool(self.gpu and self.gpu.nvswitch))
        ports = [port for service in self.services for port in (service.port, service.engine_port)]
        ports += [self.exporter.port] if self.exporter else []
        managers = ("apt", "dnf")
        repositories = {manager: self.repository_files(manager) for manager in managers}
        return {
            "files": [
                *(file.path for file in (*self.system_files, *self.staged_files)),
                *(file.path for manager in managers for file in repositories[manager]),
                EXPORTER_DROP_IN,
                *((DRIVER_PIN, NO_UPGRADES, MODULES, NO_NOUVEAU) if self.spec.driver else ()),
            ],
            "users": [USER],
            "directories": list(self.directories),
            "sysctl": list(SYSCTL),
            "packages": {system: self.packages(system) for system in supported_systems()},
            "kernel_headers": {
                system: kernel_headers("{kernel}", system)
                for system in supported_systems()
                if self.spec.driver
            },
            "sources": {
                manager: [{"path": f.path, "content": f.content} for f in repositories[manager]]
                for manager in managers
            },
            "gpus": self.gpu is not None,
            "units": [*units, PROXY_UNIT, NGINX_UNIT, DCGM_EXPORTER_UNIT],
            "services": f"{ETC}/services",
            "cutover": self.cutover_request(),
            "drivers": {name: self.driver_to_exchange(name) for name in supported_systems()},
            "fabric_manager": bool(self.gpu and self.gpu.nvswitch),
            "ports": ports,
            "disks": self.places,
            "releases": [release.path for release in self.releases],
            "images": [release.path for release in self.releases if release.image],
            "engines": {
                system: [[*self.engine_packages(system, [name])] for name in names]
                for system in supported_systems()
                if (names := self.release.image and container_choices(system))
            },
            "accepted": [service.accepted for service in self.services],
            "weights": {weights.path: weights.digest for weights in self.weights},
            "models": [
                {"path": w.path, "repository": w.repository, "revision": w.revision}
                for w in self.weights
            ],
            "uv": self.uv["path"],
            "mirrors": self.mirrors,
            "outside": outside,
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
        toolkit = self.spec.cuda_toolkit
        return {
            "path": release.path,
            "requirements": list(release.requirements),
            "python": release.python,
            "torch_backend": release.torch_backend,
            "driver": self.spec.driver.version if self.spec.driver else None,
            "bytecode": release.bytecode,
            "check": list(release.check),
            "origin": dict(release.origin),
            "overrides": list(release.overrides),
            "lock": release.lock,
            "lock_python": release.lock_python,
            "patches": [list(patch) for patch in release.patches],
            "cuda_home": toolkit_home(toolkit) if toolkit else None,
            "modules": list(release.modules),
            "max_jobs": self.spec.vllm.max_jobs,
            "addresses": self.addresses,
            "index": self.spec.mirrors.index,
            "netrc": NETRC if self.credentials else None,
            "uv": self.uv,
            "pythons": PYTHONS,
            "user": USER,
            "home": STATE,
        }

    def image_request(self, release: Release) -> dict[str, Any]:
        """The same for a release that is an image."""
        image, mirror = self.spec.vllm.image or "", self.spec.mirrors.registry
        return {
            **self.release_request(release),
            "image": {
                "tag": release.image,
                "pull": container.pulled_from(image, mirror),
                "without_tls": container.without_tls(mirror),
                "gpus": self.gpu is not None,
            },
        }

    @property
    def addresses(self) -> dict[str, Any]:
        """Where what no index has is fetched from; `git` are beginnings of addresses and their mirrors."""
        mirrors, known = self.spec.mirrors, catalog().tools.runtime.repositories
        wheel = self.spec.vllm.wheel
        return {
            "extra_index": list(mirrors.extra_index),
            "nightly": (mirrors.nightly or known.nightly).rstrip("/"),
            "python": mirrors.python,
            "git": dict(mirrors.git),
            "vllm": known.vllm,
            "deep_gemm": known.deep_gemm,
            "wheel": wheel.url if wheel else None,
        }

    def arguments_request(self) -> dict[str, Any]:
        """Every service's arguments, to be parsed by the release that it runs from."""
        return {
            "user": USER,
            "services": [
                {
                    "name": service.name,
                    "stamp": service.stamp,
                    "python": f"{self.release.path}/bin/python3",
                    **service.invocation(),
                    "environment": dict(service.environment),
                    "image": service.image,
                    "gpus": list(service.gpus),
                }
                for service in self.services
            ],
        }

    def weights_request(self, weights: Weights) -> dict[str, Any]:
        return {
            "path": weights.path,
            "repository": weights.repository,
            "revision": weights.revision,
            "hub": self.mirrors["hub"],
            "python": f"{self.hub_tool.path}/bin/python3",
            "files": weights.files,
        }

    def prune_request(self) -> dict[str, Any]:
        """What of the host the plan needs, and how many releases are kept besides."""
        return {
            "releases": self.spec.paths.releases,
            "named": [release.path for release in self.releases],
            "keep": self.spec.keep_releases,
            "stages": [[service.name, service.stamp] for service in self.services],
            "proxy": self._aim()["proxy"],
            "uv": self.uv["path"],
        }

    def cutover_request(self, system: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What a cut-over is told. `system` is what the probe says of the host's; without it, no driver."""
        config, unit = self.proxy_files
        driver = self.driver_to_exchange(system_name(system)) if system else None
        return {
            **({"driver": driver} if driver else {}),
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


def digest(*parts: str) -> str:
    """12 hex digits that name these texts."""
    text = json.dumps(parts, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
