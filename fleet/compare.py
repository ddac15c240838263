"""A host's state beside its plan: what differs, and whether its services must be cut over. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from fleet.drivers import DCGM_EXPORTER_UNIT
from fleet.plan import DRIVER_PIN, EXPORTER_DROP_IN, SYSCTL, USER, File, HostPlan


def files_to_write(files: Iterable[File], seen: Mapping[str, Any]) -> list[File]:
    """Files that are absent or differ in content, mode or owner."""
    return [file for file in files if not _same(file, seen["files"][file.path])]


def driver_files_to_write(plan: HostPlan, seen: Mapping[str, Any]) -> list[File]:
    """Files of the declared driver that differ. Where the driver is to be exchanged, the pin stays what
    the installed packages go by until they change."""
    return [
        file
        for file in files_to_write(plan.driver_files(seen["os"]), seen)
        if file.path != DRIVER_PIN or not driver_is_stale(seen)
    ]


def _same(file: File, state: Mapping[str, Any] | None) -> bool:
    return state is not None and (state["sha256"], state["mode"], state["uid"]) == (
        file.sha256,
        file.mode,
        0,
    )


def system_differs(plan: HostPlan, seen: Mapping[str, Any]) -> bool:
    """User, directories or kernel settings are not as declared, whatever the files say."""
    directories = {
        path: None if state is None else (state["owner"], state["mode"])
        for path, state in seen["directories"].items()
    }
    return (
        not seen["users"][USER] or directories != dict(plan.directories) or seen["sysctl"] != SYSCTL
    )


def packages_differ(packages: Mapping[str, str | None], seen: Mapping[str, Any]) -> bool:
    """A package is absent, or not at its exact version and held there."""
    for name, version in packages.items():
        state = seen["packages"].get(name)
        if state is None:
            return True
        if version and not (fnmatchcase(state["version"], version) and state["held"]):
            return True
    return False


def there(seen: Mapping[str, Any]) -> list[str]:
    """Names of the packages that the host was asked about and has."""
    return [name for name, state in seen["packages"].items() if state is not None]


def exporter_differs(plan: HostPlan, seen: Mapping[str, Any]) -> bool:
    """The exporter of GPU metrics does not run as planned, or one of ours is there and is not to be."""
    there, planned = seen["files"][EXPORTER_DROP_IN], plan.exporter_file
    if planned is None:
        # One that is not of our making is nobody's to end.
        return there is not None
    unit = seen["units"][DCGM_EXPORTER_UNIT]
    return (
        packages_differ(plan.exporter_packages, seen)
        or bool(files_to_write([planned], seen))
        or (unit["active"], unit["stamp"]) != ("active", plan.exporter_stamp)
        or not unit["enabled"]
        or unit["needs_reload"]
    )


def arguments_unknown(plan: HostPlan, seen: Mapping[str, Any]) -> bool:
    """Has a service's release not yet been seen to take its arguments?"""
    return not all(seen["accepted"][service.accepted] for service in plan.services)


def stale_services(plan: HostPlan, seen: Mapping[str, Any]) -> dict[str, str]:
    """Services that must be cut over, each with why: those of the plan, then those that left it.

    The host judges that itself (`due` of files/fleet_host.py), by what a cut-over goes by: so whatever
    puts a host into a wave is put right there. While the driver is exchanged no service can run.
    """
    due = seen["due"]
    stale = {unit.name: due["services"].get(unit.name) for unit in plan.services}
    if driver_is_stale(seen):
        stale = {name: why or driver_reason(seen) for name, why in stale.items()}
    return {name: why for name, why in stale.items() if why} | dict.fromkeys(
        due["gone"], "it is not in the plan"
    )


def proxy_is_stale(seen: Mapping[str, Any]) -> bool:
    """Does nginx or its unit differ from the plan?"""
    return seen["due"]["proxy"] is not None


def driver_is_stale(seen: Mapping[str, Any]) -> bool:
    """Must the driver be exchanged while the host's services are down?"""
    return seen["due"]["driver"] is not None


def driver_reason(seen: Mapping[str, Any]) -> str:
    """Why services go down for the driver."""
    return f"the driver is exchanged: {seen['due']['driver']['why']}"


def must_cut_over(plan: HostPlan, seen: Mapping[str, Any]) -> bool:
    """Does this host belong to a wave?"""
    return bool(stale_services(plan, seen)) or proxy_is_stale(seen) or driver_is_stale(seen)
