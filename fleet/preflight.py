"""What keeps a host from becoming what its plan says, judged from the plan and the host's state.

Pure: the state is what `fleet_host.py probe` answered. Every finding is one line for a person.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from fleet.catalog import catalog
from fleet.compare import packages_differ
from fleet.drivers import driver_problems, supported_systems
from fleet.plan import PROXY_UNIT, UNIT_PREFIX, HostPlan, system_name

ARCHITECTURES = ("x86_64",)
NVLINK_5 = (10, 0)
"""Compute capability from which on the PCI bus shows no NVSwitches: they are managed through network
adapters (Fabric Manager User Guide, "Systems Using Fourth Generation NVSwitches")."""
MEMORY_TOLERANCE = 0.03
"""Share by which a GPU's memory may differ from the catalogue's: ECC and vBIOS make small differences."""


def problems(plan: HostPlan, seen: Mapping[str, Any], clock_offset_s: float) -> list[str]:
    """Everything wrong with this host, at once. `clock_offset_s`: the host's clock minus ours."""
    return [
        *_system(seen),
        *_clock(plan, clock_offset_s),
        *_gpus(plan, seen),
        *_nvswitches(plan, seen),
        *_driver(plan, seen),
        *_ports(plan, seen),
        *_mirrors(seen),
        *_packages(plan, seen),
        *_disks(plan, seen),
    ]


def _system(seen: Mapping[str, Any]) -> Iterator[str]:
    system = seen["os"]
    name = system_name(system)
    if name not in supported_systems():
        known = ", ".join(supported_systems())
        yield f"operating system: {system['name'] or name} is not supported; known are {known}"
    if system["architecture"] not in ARCHITECTURES:
        yield f"architecture: {system['architecture']}; known is {', '.join(ARCHITECTURES)}"


def _clock(plan: HostPlan, offset_s: float) -> Iterator[str]:
    tolerance = plan.spec.clock_tolerance_s
    if abs(offset_s) > tolerance:
        ahead = "ahead of" if offset_s > 0 else "behind"
        yield (
            f"clock: {abs(offset_s):.0f} s {ahead} this machine's, {tolerance:.0f} s allowed; "
            "set up time synchronisation (TLS and signatures depend on it)"
        )


def _gpus(plan: HostPlan, seen: Mapping[str, Any]) -> Iterator[str]:
    kind, declared = plan.gpu, plan.spec.gpu_count
    if kind is None:
        return
    smi = seen["gpus"]
    # Where the driver step has something to do, it may be the cure, and it asks again.
    curable = smi["devices"] is None and driver_incomplete(plan, seen)
    if smi["error"] and not curable:
        yield f"GPUs: nvidia-smi says: {smi['error']}"
    if smi["devices"] is None:
        on_bus = seen["pci"]["gpus"]
        if on_bus != declared:
            yield f"GPUs: {on_bus}/{declared} GPUs on the PCI bus; {plan.gpu_name} ×{declared} is declared"
        return
    devices = smi["devices"]
    if len(devices) != declared:
        # By address: nvidia-smi counts only those that answer.
        there = {device["address"] for device in devices}
        missing = ", ".join(where for where in seen["pci"]["gpu_addresses"] if where not in there)
        which = f" (silent on the PCI bus: {missing})" if missing else ""
        yield f"GPUs: {len(devices)}/{declared} GPUs{which}; {plan.gpu_name} ×{declared} is declared"
    for device in devices:
        where = f"GPU {device['index']} ({device['name']})"
        if device["compute_capability"] != kind.compute_capability:
            yield (
                f"{where}: compute capability {device['compute_capability']}, "
                f"{plan.gpu_name} has {kind.compute_capability}"
            )
        if abs(device["memory_mib"] - kind.memory_mib) > MEMORY_TOLERANCE * kind.memory_mib:
            yield f"{where}: {device['memory_mib']} MiB, {plan.gpu_name} has {kind.memory_mib} MiB"


def _nvswitches(plan: HostPlan, seen: Mapping[str, Any]) -> Iterator[str]:
    """The fabric manager is for machines with NVSwitches and fails on others, so the kind must be right."""
    kind, on_bus = plan.gpu, seen["pci"]
    if kind is None or not on_bus["gpus"] or kind.capability >= NVLINK_5:
        return
    if kind.nvswitch != bool(on_bus["nvswitches"]):
        has = "has some" if kind.nvswitch else "has none"
        yield (
            f"NVSwitch: {on_bus['nvswitches']} on the PCI bus, and {plan.gpu_name} {has}; mend the "
            f"machine, or describe its kind: gpu = {{…, 'nvswitch': {not kind.nvswitch}}}"
        )


def driver_incomplete(plan: HostPlan, seen: Mapping[str, Any]) -> bool:
    """Has the driver step anything to install, to hold, to enable or to start on this host?"""
    request = plan.driver_request(seen["os"])
    units = [seen["units"][unit] for unit in request["start"]]
    return packages_differ(request["packages"], seen) or any(
        unit["active"] != "active" or unit["disabled"] for unit in units
    )


def driver_runs(plan: HostPlan, seen: Mapping[str, Any]) -> bool:
    """Do all GPUs answer with the declared driver? True where none is declared, or no GPU."""
    declared, smi = plan.spec.driver, seen["gpus"]
    if declared is None or smi is None:
        return True
    return bool(smi["devices"]) and not smi["error"] and _versions(seen) == {declared.version}


def _versions(seen: Mapping[str, Any]) -> set[str]:
    """Driver versions that GPUs answer with."""
    return {device["driver"] for device in (seen["gpus"] or {}).get("devices") or []}


def _driver(plan: HostPlan, seen: Mapping[str, Any]) -> Iterator[str]:
    """A driver must be known for the system, and is neither exchanged nor completed under services."""
    declared = plan.spec.driver
    nvswitch = bool(plan.gpu and plan.gpu.nvswitch)
    yield from driver_problems(declared, system_name(seen["os"]), nvswitch=nvswitch)
    if declared is None:
        yield from _too_old(plan, seen)
        return
    serving = ", ".join(_serving(seen))
    if not serving:
        return
    found, absent = _versions(seen), []
    for name, version in plan.driver_request(seen["os"])["packages"].items():
        state = seen["packages"].get(name)
        if state is None and version:
            absent.append(name)
        elif version and not fnmatchcase(state["version"], version):
            found.add(state["version"])
    stop = f"{serving} serves; stop it first: systemctl stop 'minimax-*'"
    if not found <= {declared.version}:
        there = ", ".join(sorted(found))
        yield f"driver: {there} is there and {declared.version} is declared, while {stop}"
    elif absent:
        yield f"driver: {', '.join(absent)} would be installed while {stop}"


def _too_old(plan: HostPlan, seen: Mapping[str, Any]) -> Iterator[str]:
    """A driver that group data leaves as it is must be new enough for the CUDA of vLLM's wheels."""
    for version in sorted(_versions(seen)):
        branch = version.partition(".")[0]
        if branch.isdigit() and int(branch) < plan.minimum_driver:
            yield (
                f"driver: {version} is there, and the wheels of {plan.release.id} need "
                f"{plan.minimum_driver} or later; declare driver.version"
            )


def _serving(seen: Mapping[str, Any]) -> list[str]:
    """Names of services that run, planned or not."""
    ours = re.compile(rf"{UNIT_PREFIX}(.+)\.service")
    return sorted(
        name[1]
        for unit, state in seen["units"].items()
        if unit != PROXY_UNIT and state["active"] == "active" and (name := ours.fullmatch(unit))
    )


def _ports(plan: HostPlan, seen: Mapping[str, Any]) -> Iterator[str]:
    for service in plan.services:
        for port in (service.port, service.engine_port):
            holder = seen["ports"][str(port)]
            if holder is None or _is_ours(holder["unit"]):
                continue
            yield (
                f"port {port} for {service.name} is held by PID {holder['pid']} "
                f"({holder['command']}); stop that or choose another port"
            )


def _is_ours(unit: str | None) -> bool:
    return unit is not None and (unit == PROXY_UNIT or unit.startswith(UNIT_PREFIX))


def _mirrors(seen: Mapping[str, Any]) -> Iterator[str]:
    for name, answer in seen["needs"]["mirrors"].items():
        if answer["error"]:
            yield f"mirror {name}: {answer['url']} cannot be reached: {answer['error']}"
    for answer in seen["needs"]["weights"].values():
        if "error" in answer:
            yield f"hub: {answer['error']}"


def _packages(plan: HostPlan, seen: Mapping[str, Any]) -> Iterator[str]:
    """Each package that is missing must be in some apt source of the host, at its version."""
    apt = seen["needs"]["apt"]
    if apt is None:
        return
    if "error" in apt:
        yield f"apt: the host's sources cannot be read: {apt['error']}"
        return
    driver = plan.driver_request(seen["os"])["packages"]
    lacking, of_driver = [], False
    for name, version in (plan.base_packages | driver).items():
        there = apt["versions"].get(name)
        if there is None or any(fnmatchcase(found, version or "*") for found in there):
            continue
        has = f" (it has {', '.join(there)})" if there else ""
        lacking.append(f"{name} {version or ''}".strip() + has)
        of_driver |= version is not None
    if lacking:
        cure = "NVIDIA's repository is named in mirrors.apt" if of_driver else "see mirrors.apt"
        yield f"apt: no source of this host has {'; '.join(lacking)}; {cure}"


def _disks(plan: HostPlan, seen: Mapping[str, Any]) -> Iterator[str]:
    """Need against free, added up for each file system."""
    release_bytes = catalog().tools.release_bytes
    need: dict[int, int] = {}
    what: dict[int, list[str]] = {}
    for weights in plan.weights:
        answer = seen["needs"]["weights"].get(weights.path, {})
        # What an interrupted run has fetched is on the disk already, and is gone on from.
        size = answer.get("bytes", 0) - answer.get("fetched_bytes", 0)
        if size > 0:
            device = seen["disks"][plan.spec.paths.models]["device"]
            need[device] = need.get(device, 0) + size
            what.setdefault(device, []).append(weights.repository)
    if not seen["releases"][plan.release.path]:
        device = seen["disks"][plan.spec.paths.releases]["device"]
        need[device] = need.get(device, 0) + release_bytes
        what.setdefault(device, []).append(plan.release.id)
    for path, disk in seen["disks"].items():
        needed = need.pop(disk["device"], 0)
        if needed > disk["free_bytes"]:
            yield (
                f"disk at {path}: {needed / 2**30:.1f} GiB needed for "
                f"{', '.join(what[disk['device']])}, {disk['free_bytes'] / 2**30:.1f} GiB free"
            )
