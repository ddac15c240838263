"""Inventory, group data and catalogue in; one frozen HostPlan per host out.

Everything that can be judged without a host is judged here. What a host then does is compare itself
with its plan: nothing later decides anything about models, flags, ports or versions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fleet import command
from fleet.catalog import Catalog, GpuKind, ModelCard, Recipe, catalog
from fleet.drivers import apt_pin, driver_packages, driver_units, kernel_headers, supported_systems
from fleet.errors import Problem, did_you_mean
from fleet.render import render, repository_file
from fleet.spec import HostSpec, SecretReference, Service, Vllm

USER = "minimax"
STATE = "/var/lib/minimax"
ETC = "/etc/minimax"
PROGRAM = "/usr/local/lib/minimax-fleet/fleet_host.py"
UNIT_PREFIX = "minimax-"
PROXY_UNIT = "minimax-proxy.service"
OS_PYTHON = "/usr/bin/python3"
RECORDS = "/var/lib/minimax-fleet"
DRAINING = "/run/minimax-fleet/draining"
"""A file here, named for a service, takes its public port out of service (see templates/proxy.conf.j2)."""
HUB = "https://huggingface.co"
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
        staged = {"unit.service": (self.unit_text, "644"), "gate.json": (judged_by, "644")}
        if self.api_key:
            secrets = command.environment_file({"VLLM_API_KEY": self.api_key})
            staged["secrets.env"] = (secrets, "600")
        return tuple(
            File(path=f"{self.stage_dir}/{name}", content=content, mode=mode)
            for name, (content, mode) in staged.items()
        )

    def request(self) -> dict[str, Any]:
        """What the host program must know to cut over to this service, and to judge it."""
        return {
            "name": self.name,
            "unit": self.unit,
            "stamp": self.stamp,
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
    release: Release
    hub_tool: Release
    services: tuple[ServicePlan, ...]
    keys: Mapping[str, str] = field(repr=False)
    """Text of each apt repository's public key, by its path on the control machine."""

    @property
    def weights(self) -> tuple[Weights, ...]:
        """Each model once, however many services share it."""
        return tuple({service.weights.path: service.weights for service in self.services}.values())

    @property
    def mirrors(self) -> dict[str, Any]:
        """Addresses that the host fetches from; None where a tool's own default serves."""
        return {
            "apt": {name: apt.url for name, apt in self.spec.mirrors.apt.items()},
            "index": self.spec.mirrors.index,
            "hub": self.spec.mirrors.hub or HUB,
        }

    @cached_property
    def proxy_stamp(self) -> str:
        return digest(self._proxy_config(""))

    def _proxy_config(self, stamp: str) -> str:
        return render("proxy.conf.j2", services=self.services, stamp=stamp, draining=DRAINING)

    @cached_property
    def system_files(self) -> tuple[File, ...]:
        """Files that hold for the whole host, whatever it serves."""
        directories = "".join(
            f"d {path} {mode} {owner} {owner} -\n"
            for path, (owner, mode) in self.directories.items()
        )
        return (
            File(path=PROGRAM, content=repository_file("files/fleet_host.py"), mode="755"),
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
            "start": list(driver_units(nvswitch=nvswitch)) if packages else [],
            "version": driver.version if driver else None,
            "gpus": self.spec.gpu_count,
        }

    @cached_property
    def staged_files(self) -> tuple[File, ...]:
        """Files put beside what runs; nothing reads them before the cut-over."""
        config = f"{ETC}/proxy/{self.proxy_stamp}.conf"
        return (
            *(file for service in self.services for file in service.files),
            File(path=config, content=self._proxy_config(self.proxy_stamp)),
            File(
                path=f"/etc/systemd/system/{PROXY_UNIT}",
                content=render("proxy.service.j2", config=f"{ETC}/proxy/nginx.conf"),
            ),
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
            "gpus": self.gpu is not None,
            "units": [*units, PROXY_UNIT],
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
        return {
            "services": [service.request() for service in self.services],
            "proxy": {"stamp": self.proxy_stamp},
        }


class Planner:
    """Turns one host's group data into its plan, collecting what is wrong on the way."""

    def __init__(
        self,
        origins: Mapping[str, str],
        secrets: Mapping[SecretReference, str],
        keys: Mapping[str, str],
    ) -> None:
        self._catalog: Catalog = catalog()
        self._keys = keys
        self._origins = origins
        self._secrets = secrets
        self.problems: list[Problem] = []

    def plan(self, name: str, group: str, spec: HostSpec) -> HostPlan | None:
        """The host's plan, or None with `problems` filled."""
        before = len(self.problems)
        gpu = self._gpu(spec)
        release = vllm_release(spec.vllm, spec.paths.releases)
        self._check_placement(spec)
        for mirror, repository in spec.mirrors.apt.items():
            if repository.key not in self._keys:
                what = f"{repository.key} is missing on this machine; it is the repository's public key"
                self._refuse(f"mirrors.apt.{mirror}.key", what)
        services = [
            planned
            for index, service in enumerate(spec.services)
            if (planned := self._service(index, service, spec, release)) is not None
        ]
        if len(self.problems) > before:
            return None
        return HostPlan(
            name=name,
            group=group,
            spec=spec,
            gpu=gpu,
            release=release,
            hub_tool=hub_release(self._catalog, spec.paths.releases),
            services=tuple(services),
            keys=self._keys,
        )

    def _refuse(self, path: str, what: str) -> None:
        key = re.split(r"[\[.]", path, maxsplit=1)[0]
        self.problems.append(Problem(f"{self._origins.get(key, 'inventory')}: {path}", what))

    def _gpu(self, spec: HostSpec) -> GpuKind | None:
        if spec.gpu is None:
            return None
        kind = self._catalog.gpus.get(spec.gpu)
        if kind is None:
            known = ", ".join(self._catalog.gpus)
            hint = did_you_mean(spec.gpu, self._catalog.gpus) or f"; known are {known}"
            self._refuse("gpu", f"{spec.gpu!r} is no GPU kind of the catalogue{hint}")
        return kind

    def _check_placement(self, spec: HostSpec) -> None:
        names: dict[str, int] = {}
        gpus: dict[int, int] = {}
        ports: dict[int, str] = {}
        for index, service in enumerate(spec.services):
            path = f"services[{index}]"
            first = names.setdefault(service.name, index)
            if first != index:
                self._refuse(f"{path}.name", f"{service.name!r} is services[{first}]'s already")
            for gpu in service.gpus:
                holder = gpus.setdefault(gpu, index)
                if holder != index:
                    other = spec.services[holder].name
                    self._refuse(
                        f"{path}.gpus",
                        f"GPU {gpu} is used by {other!r} and {service.name!r}; give each its own",
                    )
                if gpu >= spec.gpu_count:
                    self._refuse(
                        f"{path}.gpus",
                        f"GPU {gpu} of {spec.gpu_count}; they are counted from 0",
                    )
            if len(set(service.gpus)) < len(service.gpus):
                self._refuse(f"{path}.gpus", f"{service.gpus} names a GPU twice")
            for role, port in (
                ("port", service.port),
                ("engine_port", command.engine_port(service)),
            ):
                if port > 65535:  # noqa: PLR2004
                    self._refuse(
                        f"{path}.port", f"{port} for vLLM itself is no port; set engine_port"
                    )
                user = f"{service.name!r} ({role})"
                other_user = ports.setdefault(port, user)
                if other_user != user:
                    self._refuse(
                        f"{path}.{role}", f"port {port} is used by {other_user} and {user}"
                    )

    def _service(
        self, index: int, service: Service, spec: HostSpec, release: Release
    ) -> ServicePlan | None:
        path = f"services[{index}]"
        card = self._catalog.models.get(service.model)
        if card is None:
            hint = did_you_mean(service.model, self._catalog.models)
            self._refuse(f"{path}.model", f"{service.model!r} is not in the catalogue{hint}")
        recipe = self._catalog.recipes.get(service.recipe)
        if recipe is None:
            known = ", ".join(self._catalog.recipes)
            hint = did_you_mean(service.recipe, self._catalog.recipes) or f"; known are {known}"
            self._refuse(f"{path}.recipe", f"{service.recipe!r} is no recipe{hint}")
        if card is None or recipe is None:
            return None
        before = len(self.problems)
        if recipe.family != card.family:
            ours = ", ".join(
                name for name, known in self._catalog.recipes.items() if known.family == card.family
            )
            what = f"{service.recipe!r} does not serve {service.model}; its recipes are {ours}"
            self._refuse(f"{path}.recipe", what)
        self._check_ranks(path, service, recipe, card, spec)
        self._check_flags(path, service)
        if not card.accepts(spec.vllm.version):
            self._refuse(
                "vllm.version",
                f"{spec.vllm.version} does not serve {service.model}: supported {card.vllm}",
            )
        api_key = self._api_key(path, service)
        if len(self.problems) > before:
            return None
        try:
            return _service_plan(service, recipe, card, spec, release, api_key)
        except ValueError as error:
            self._refuse(path, str(error))
            return None

    def _check_ranks(
        self, path: str, service: Service, recipe: Recipe, card: ModelCard, spec: HostSpec
    ) -> None:
        ranks = recipe.parallel.ranks
        if spec.gpu is not None and ranks != len(service.gpus):
            self._refuse(
                f"{path}.gpus",
                f"recipe {service.recipe!r} runs {ranks} ranks on {len(service.gpus)} GPUs; "
                f"give it exactly {ranks} of this host's {spec.gpu_count}",
            )
        if spec.gpu is None and service.gpus:
            self._refuse(f"{path}.gpus", "the host has no GPUs; declare gpu and gpu_count")
        tensor = recipe.parallel.tensor
        if card.attention_heads % tensor:
            self._refuse(f"{path}.recipe", f"{tensor} does not divide {card.attention_heads} heads")
        if card.expert_width and card.quantisation_block and not recipe.parallel.expert:
            width, rest = divmod(card.expert_width, tensor)
            if rest or width % card.quantisation_block:
                self._refuse(
                    f"{path}.recipe",
                    f"{tensor} splits {card.expert_width} into {width}, not a multiple of the FP8 "
                    f"block {card.quantisation_block}; use tp4, tep8 or dep8",
                )

    def _check_flags(self, path: str, service: Service) -> None:
        for name in service.args:
            key = command.MANAGED_FLAGS.get(command.flag_name(name))
            if key is not None:
                self._refuse(
                    f"{path}.args", f"--{command.flag_name(name)} is set by {key!r}; use that"
                )
        for name in service.env:
            manager = command.MANAGED_ENVIRONMENT.get(name)
            if manager is not None:
                self._refuse(f"{path}.env", f"{name} is set by {manager}; leave it out")

    def _api_key(self, path: str, service: Service) -> str | None:
        if service.api_key is None:
            return None
        value = self._secrets.get(service.api_key)
        if not value:
            source = service.api_key.file or f"${service.api_key.env}"
            self._refuse(f"{path}.api_key", f"{source} is missing or empty on this machine")
        elif not (value.isascii() and value.isprintable() and " " not in value):
            self._refuse(f"{path}.api_key", "holds a character that no HTTP header can carry")
        return value


def _service_plan(  # noqa: PLR0913
    service: Service,
    recipe: Recipe,
    card: ModelCard,
    spec: HostSpec,
    release: Release,
    api_key: str | None,
) -> ServicePlan:
    repository = service.repository or service.model
    weights = Weights(
        repository=repository,
        revision=service.revision,
        path=f"{spec.paths.models}/{repository}/{service.revision}",
    )
    version = spec.vllm.version
    program = command.program(recipe, release.path, weights.path)
    options = command.options(service, recipe, version)
    env = command.environment(service, recipe, version, release=release.path, state=STATE)
    values = {
        "name": service.name,
        "model": service.model,
        "vllm_version": version,
        "port": service.port,
        "state_dir": STATE,
        "stage_dir": f"{ETC}/services/{service.name}",
        "has_secrets": api_key is not None,
        "stop_timeout_s": service.drain_timeout_s + 60,
        "environment_lines": [command.systemd_assignment(*item) for item in env.items()],
        "program_line": " ".join(map(command.systemd_word, program)),
        "option_lines": [" ".join(map(command.systemd_word, words)) for words in options],
    }
    # The stamp names everything that the process is made of; it is the last thing put into the unit.
    bare = render("service.service.j2", service=values, stamp="")
    stamp = digest(bare, api_key or "")
    return ServicePlan(
        name=service.name,
        unit=f"{UNIT_PREFIX}{service.name}.service",
        model=service.model,
        weights=weights,
        vllm_version=version,
        recipe=service.recipe,
        gpus=tuple(service.gpus),
        port=service.port,
        engine_port=command.engine_port(service),
        program=program,
        options=options,
        environment=env,
        drain_timeout_s=service.drain_timeout_s,
        gate={
            "model": service.model,
            "ready_timeout_s": service.gate.ready_timeout_s,
            "answer_timeout_s": service.gate.answer_timeout_s,
            "expect": service.gate.expect or card.gate.expect,
            "request": {
                "model": service.model,
                **QUESTION,
                "max_tokens": _answer_tokens(service),
            },
        },
        stamp=stamp,
        unit_text=render("service.service.j2", service=values, stamp=stamp),
        api_key=api_key,
    )


def _answer_tokens(service: Service) -> int:
    """How long the gate's answer may be: vLLM refuses a request that leaves no room for its prompt."""
    wanted, context = service.gate.max_tokens, service.max_model_len
    return wanted if context is None else min(wanted, context // 2)


def vllm_release(vllm: Vllm, folder: str) -> Release:
    """The release directory of a vLLM; its id is a digest of what goes in."""
    requirements = (f"vllm=={vllm.version}", *vllm.packages)
    identity = digest(vllm.channel, vllm.python, vllm.torch_backend or "", *requirements)
    name = f"vllm-{vllm.version}-{identity}"
    return Release(
        id=name,
        path=f"{folder}/{name}",
        requirements=requirements,
        python=vllm.python,
        torch_backend=vllm.torch_backend,
        bytecode=True,
        check=("vllm", "--version"),
    )


def hub_release(tools: Catalog, folder: str) -> Release:
    """huggingface_hub in an environment of its own, so that no vLLM decides its version."""
    requirements = tuple(tools.tools.hub.requirements)
    name = f"hub-{digest(*requirements)}"
    return Release(
        id=name,
        path=f"{folder}/{name}",
        requirements=requirements,
        python=OS_PYTHON,
        torch_backend=None,
        bytecode=False,
        check=("hf", "version"),
    )


def system_name(system: Mapping[str, Any]) -> str:
    """`debian-12` for what the probe says of an operating system."""
    return f"{system['id']}-{system['version_id']}"


def digest(*parts: str) -> str:
    """12 hex digits that name these texts."""
    text = json.dumps(parts, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
