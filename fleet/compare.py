"""A host's state beside its plan: what differs, and whether its services must be cut over. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from fleet.plan import PROXY_UNIT, SYSCTL, USER, File, HostPlan


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


def stale_services(plan: HostPlan, seen: Mapping[str, Any]) -> list[str]:
    """Services whose *running process* is not the plan's, or never passed the gate; retired ones too."""
    stale = []
    for service in plan.services:
        unit = seen["units"][service.unit]
        passed = (seen["records"].get(service.name) or {}).get("stamp")
        good = unit["active"] == "active" and unit["stamp"] == passed == service.stamp
        if not (good and unit["enabled"]) or service.name in seen["draining"]:
            stale.append(service.name)
    planned = {service.name for service in plan.services}
    return stale + sorted(name for name in seen["records"] if name not in planned)


def proxy_is_stale(plan: HostPlan, seen: Mapping[str, Any]) -> bool:
    unit = seen["units"][PROXY_UNIT]
    loaded = (seen["proxy"] or {}).get("stamp")
    return bool(unit["active"] != "active" or not unit["enabled"] or loaded != plan.proxy_stamp)


def must_cut_over(plan: HostPlan, seen: Mapping[str, Any]) -> bool:
    """Does this host belong to a wave?"""
    return bool(stale_services(plan, seen)) or proxy_is_stale(plan, seen)
