"""Which distribution packages make up NVIDIA's driver of a version, a CUDA toolkit, DCGM's exporter and a
container runtime: fleet/drivers.yaml, read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from fleet.spec import Driver, Model

FABRIC_MANAGER_UNIT = "nvidia-fabricmanager.service"
PERSISTENCE_UNIT = "nvidia-persistenced.service"
DCGM_EXPORTER_UNIT = "nvidia-dcgm-exporter.service"
DCGM_UNIT = "nvidia-dcgm.service"
"""The exporter's unit wants it; both keep the GPUs open."""
DOCKER_UNIT = "docker.service"

Packages = dict[str, str | None]
"""Names to the exact version, None for any."""


class Branch(Model):
    """Package names of one driver branch; `package_version` may end in the package manager's `*`."""

    package_version: str
    kernel_module: str
    userspace: list[str]
    persistence_daemon: str
    fabric_manager: str | None = None
    beside: list[str] = []

    @property
    def names(self) -> list[str]:
        """NVIDIA's packages of the branch, for machines with NVSwitches or without."""
        fabric_manager = [self.fabric_manager] if self.fabric_manager else []
        return [self.kernel_module, *self.userspace, self.persistence_daemon, *fabric_manager]


class System(Model):
    """A distribution; `pin` names all packages that must be of the driver's version."""

    manager: Literal["apt", "dnf"]
    repository: str
    pin: list[str]
    branches: dict[str, Branch]


class Toolkit(Model):
    """A CUDA toolkit's package and where it lands, with `{major}` and `{minor}` of its line."""

    package: str
    home: str


class Dcgm(Model):
    packages: list[str]


class Containers(Model):
    """`engines` by distribution: each a set of packages, of which one set is wanted, the first at best."""

    toolkit: list[str]
    engines: dict[str, list[list[str]]]


class Table(Model):
    """fleet/drivers.yaml."""

    kernel_headers: dict[str, str]
    lock: str
    cuda_toolkit: Toolkit
    dcgm: Dcgm
    containers: Containers
    systems: dict[str, System]


@cache
def _table() -> Table:
    return Table(**yaml.safe_load((files("fleet") / "drivers.yaml").read_text(encoding="utf-8")))


def supported_systems() -> tuple[str, ...]:
    """Distributions that hosts may run: `debian-12` and the like."""
    return tuple(_table().systems)


def system_name(system: Mapping[str, Any]) -> str:
    """`debian-12`, `rocky-9` for what the probe says of an operating system.

    The releases of Enterprise Linux count by their major version: `rocky-9` is 9.5 and 9.6.
    """
    exact = f"{system['id']}-{system['version_id']}"
    major = exact.partition(".")[0]
    return major if exact not in _table().systems and major in _table().systems else exact


def package_manager(system: str) -> Literal["apt", "dnf"]:
    """Of a distribution; apt for one that is not known."""
    known = _table().systems.get(system)
    return known.manager if known else "apt"


def driver_packages(driver: Driver | None, system: str, *, nvswitch: bool) -> Packages:
    """Packages of a driver to their exact version; empty where none is declared or known."""
    branch = _branch(driver, system)
    if driver is None or branch is None:
        return {}
    names = [name for name in branch.names if nvswitch or name != branch.fabric_manager]
    lock = [_table().lock] if package_manager(system) == "dnf" else []
    version = branch.package_version.format(version=driver.version)
    return dict.fromkeys([*lock, *branch.beside]) | dict.fromkeys(names, version)


def known_packages(system: str) -> list[str]:
    """Every package that a driver of any branch asks for on a distribution: what may be held by us."""
    table = _table().systems.get(system)
    branches = table.branches.values() if table else ()
    return sorted({name for branch in branches for name in branch.names})


def kernel_headers(kernel: str, system: str) -> str:
    """The package without which a kernel module's package installs and builds nothing."""
    return _table().kernel_headers[package_manager(system)].format(kernel=kernel)


def driver_units(*, nvswitch: bool) -> tuple[str, ...]:
    """Units that must run beside a driver; the fabric manager fails on machines without NVSwitches."""
    return (PERSISTENCE_UNIT, FABRIC_MANAGER_UNIT) if nvswitch else (PERSISTENCE_UNIT,)


def apt_pin(driver: Driver, system: str) -> str:
    """apt preferences that keep everything of the driver at its version, dependencies included."""
    branch = _branch(driver, system)
    if branch is None:
        return ""
    version = branch.package_version.format(version=driver.version)
    names = " ".join(_table().systems[system].pin)
    # 1001: also where that is a downgrade.
    return (
        "# Written by minimax-fleet: driver packages depend on each other at exactly one version.\n"
        f"Package: {names}\nPin: version {version}\nPin-Priority: 1001\n"
    )


def unattended_upgrades(system: str) -> str:
    """apt configuration by which unattended-upgrades leaves alone all that a driver consists of."""
    table = _table().systems.get(system)
    # nvidia-container-toolkit is no part of a driver, and has versions of its own.
    pinned = table.pin if table else []
    names = [name.replace("nvidia-*", "nvidia-(?!container).*") for name in pinned]
    lines = "".join(f'    "^{name}$";\n' for name in names)
    return (
        "// Written by minimax-fleet: a driver that changes under a running kernel module ends its GPUs.\n"
        f"Unattended-Upgrade::Package-Blacklist {{\n{lines}}};\n"
    )


def dnf_locks(driver: Driver | None, system: str) -> Packages:
    """Names (`*` in them) of what dnf is to keep at the driver's version wherever it is installed."""
    branch = _branch(driver, system)
    if driver is None or branch is None or package_manager(system) != "dnf":
        return {}
    version = branch.package_version.format(version=driver.version)
    return dict.fromkeys(_table().systems[system].pin, version)


def driver_problems(driver: Driver | None, system: str, *, nvswitch: bool) -> Iterator[str]:
    """Why a declared driver cannot be installed on a distribution."""
    if driver is None or system not in supported_systems():
        return
    branch = _branch(driver, system)
    if branch is None:
        known = ", ".join(_table().systems[system].branches)
        yield f"driver: branch {driver.branch} is not known for {system}; known are {known}"
    elif nvswitch and branch.fabric_manager is None:
        yield (
            f"driver: no fabric manager of branch {driver.branch} is known for {system}, "
            "and this machine has NVSwitches"
        )


def toolkit_packages(line: str | None) -> Packages:
    """Packages of the CUDA toolkit of a line (`12.9`), at any version; empty for None.

    They have the same name on every distribution. Not held: the line is part of the name.
    """
    return {} if line is None else {_of_line(_table().cuda_toolkit.package, line): None}


def toolkit_home(line: str) -> str:
    """Where the CUDA toolkit of a line lands: CUDA_HOME, with bin/nvcc below it."""
    return _of_line(_table().cuda_toolkit.home, line)


def dcgm_packages() -> Packages:
    """DCGM's exporter and what it runs by, at any version, on every distribution."""
    return dict.fromkeys(_table().dcgm.packages)


def container_packages(system: str, installed: Collection[str] = ()) -> Packages:
    """Packages of Docker's engine and NVIDIA's container toolkit on a distribution, at any version.

    `installed` has names of packages that the host has: an engine that is there is kept, for engines
    exclude each other. Empty for a distribution that is not known. Their unit is DOCKER_UNIT;
    `nvidia-ctk runtime configure --runtime=docker` and a restart of it make the GPUs known to it.
    """
    containers = _table().containers
    engines = containers.engines.get(system, [])
    if not engines:
        return {}
    there = [engine for engine in engines if engine[0] in installed]
    return dict.fromkeys([*(there or engines)[0], *containers.toolkit])


def container_choices(system: str) -> list[str]:
    """The package by which each engine of a distribution is known, the preferred one first."""
    return [engine[0] for engine in _table().containers.engines.get(system, [])]


def container_engines(system: str) -> list[str]:
    """Every package of an engine on a distribution: what a host must be asked for beforehand."""
    return sorted(
        {name for engine in _table().containers.engines.get(system, []) for name in engine}
    )


def _of_line(text: str, line: str) -> str:
    major, minor = line.split(".")
    return text.format(major=major, minor=minor)


def _branch(driver: Driver | None, system: str) -> Branch | None:
    table = _table().systems.get(system)
    return table.branches.get(driver.branch) if driver is not None and table else None
