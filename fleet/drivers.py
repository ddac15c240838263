"""Which distribution packages make up an NVIDIA driver of a version: fleet/drivers.yaml, read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files

import yaml

from fleet.spec import Driver, Model

FABRIC_MANAGER_UNIT = "nvidia-fabricmanager.service"
PERSISTENCE_UNIT = "nvidia-persistenced.service"


class Branch(Model):
    """Package names of one driver branch; `package_version` may end in apt's `*`."""

    package_version: str
    kernel_module: str
    userspace: list[str]
    persistence_daemon: str
    fabric_manager: str | None = None

    @property
    def names(self) -> list[str]:
        """All packages of the branch, for machines with NVSwitches or without."""
        fabric_manager = [self.fabric_manager] if self.fabric_manager else []
        return [self.kernel_module, *self.userspace, self.persistence_daemon, *fabric_manager]


class System(Model):
    """A distribution; `pin` names all packages that must be of the driver's version."""

    repository: str
    pin: list[str]
    branches: dict[str, Branch]


@cache
def _table() -> tuple[str, Mapping[str, System]]:
    document = yaml.safe_load((files("fleet") / "drivers.yaml").read_text(encoding="utf-8"))
    systems = {name: System(**system) for name, system in document["systems"].items()}
    return str(document["kernel_headers"]), systems


def supported_systems() -> tuple[str, ...]:
    """Distributions that hosts may run: `debian-12` and the like."""
    return tuple(_table()[1])


def driver_packages(driver: Driver | None, system: str, *, nvswitch: bool) -> dict[str, str | None]:
    """Packages of a driver to their exact version; empty where none is declared or known."""
    branch = _branch(driver, system)
    if driver is None or branch is None:
        return {}
    names = [name for name in branch.names if nvswitch or name != branch.fabric_manager]
    return dict.fromkeys(names, branch.package_version.format(version=driver.version))


def known_packages(system: str) -> list[str]:
    """Every package that a driver of any branch asks for on a distribution: what may be held by us."""
    table = _table()[1].get(system)
    branches = table.branches.values() if table else ()
    return sorted({name for branch in branches for name in branch.names})


def kernel_headers(kernel: str) -> str:
    """The package without which a kernel module's package installs and builds nothing."""
    return _table()[0].format(kernel=kernel)


def driver_units(*, nvswitch: bool) -> tuple[str, ...]:
    """Units that must run beside a driver; the fabric manager fails on machines without NVSwitches."""
    return (PERSISTENCE_UNIT, FABRIC_MANAGER_UNIT) if nvswitch else (PERSISTENCE_UNIT,)


def apt_pin(driver: Driver, system: str) -> str:
    """apt preferences that keep everything of the driver at its version, dependencies included."""
    branch = _branch(driver, system)
    if branch is None:
        return ""
    version = branch.package_version.format(version=driver.version)
    names = " ".join(_table()[1][system].pin)
    # 1001: also where that is a downgrade.
    return (
        "# Written by minimax-fleet: driver packages depend on each other at exactly one version.\n"
        f"Package: {names}\nPin: version {version}\nPin-Priority: 1001\n"
    )


def driver_problems(driver: Driver | None, system: str, *, nvswitch: bool) -> Iterator[str]:
    """Why a declared driver cannot be installed on a distribution."""
    if driver is None or system not in supported_systems():
        return
    branch = _branch(driver, system)
    if branch is None:
        known = ", ".join(_table()[1][system].branches)
        yield f"driver: branch {driver.branch} is not known for {system}; known are {known}"
    elif nvswitch and branch.fabric_manager is None:
        yield (
            f"driver: no fabric manager of branch {driver.branch} is known for {system}, "
            "and this machine has NVSwitches"
        )


def _branch(driver: Driver | None, system: str) -> Branch | None:
    table = _table()[1].get(system)
    return table.branches.get(driver.branch) if driver is not None and table else None
