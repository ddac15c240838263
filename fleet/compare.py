"""A host's state beside its plan: what differs, and whether its services must be cut over. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from fleet.plan import SYSCTL, USER, File, HostPlan


def files_to_write(files: Iterable[File], seen: Mapping[str, Any]) -> list[File]:
    """Files that are absent or differ in content, mode or owner."""
    return [file for file in files if not _same(file, seen["files"][file.path])]


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


def stale_services(plan: HostPlan, seen: Mapping[str, Any]) -> dict[str, str]:
    """Services that must be cut over, each with why: those of the plan, then those that left it.

    The host judges that itself (`due` of files/fleet_host.py), by what a cut-over goes by: so whatever
    puts a host into a wave is put right there.
    """
    due = seen["due"]
    stale = {unit.name: due["services"].get(unit.name) for unit in plan.services}
    return {name: why for name, why in stale.items() if why} | dict.fromkeys(
        due["gone"], "it is not in the plan"
    )


def proxy_is_stale(seen: Mapping[str, Any]) -> bool:
    """Does nginx or its unit differ from the plan?"""
    return seen["due"]["proxy"] is not None


def must_cut_over(plan: HostPlan, seen: Mapping[str, Any]) -> bool:
    """Does this host belong to a wave?"""
    return bool(stale_services(plan, seen)) or proxy_is_stale(seen)
