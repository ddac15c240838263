"""What keeps a host from becoming what its plan says, judged from the plan and the host's state.

Pure: the state is what `fleet_host.py probe` answered. Every finding is one line for a person.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from fleet.catalog import catalog
from fleet.drivers import driver_problems, supported_systems
from fleet.plan import PROXY_UNIT, UNIT_PREFIX, HostPlan, system_name

ARCHITECTURES = ("x86_64",)
MEMORY_TOLERANCE = 0.03
"""Share by which a GPU's memory may differ from the catalogue's: ECC and vBIOS make small differences."""


def problems(plan: HostPlan, seen: Mapping[str, Any], clock_offset_s: float) -> list[str]:
    """Everything wrong with this host, at once. `clock_offset_s`: the host's clock minus ours."""
    return [
        *_system(seen),
        *_clock(plan, clock_offset_s),
        *_gpus(plan, seen),
        *_driver(plan, seen),
        *_ports(plan, seen),
        *_mirrors(seen),
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
    if smi["error"]:
        yield f"GPUs: nvidia-smi says: {smi['error']}"
    if smi["devices"] is None:
        on_bus = seen["pci"]["gpus"]
        if on_bus != declared:
            yield f"GPUs: {on_bus}/{declared} GPUs on the PCI bus; {plan.spec.gpu} ×{declared} is declared"
        return
    devices = smi["devices"]
    if len(devices) != declared:
        there = {device["index"] for device in devices}
        missing = ", ".join(str(index) for index in range(declared) if index not in there)
        which = f" (missing: {missing})" if missing and len(devices) < declared else ""
        yield f"GPUs: {len(devices)}/{declared} GPUs{which}; {plan.spec.gpu} ×{declared} is declared"
    for device in devices:
        where = f"GPU {device['index']} ({device['name']})"
        if device["compute_capability"] != kind.compute_capability:
            yield (
                f"{where}: compute capability {device['compute_capability']}, "
                f"{plan.spec.gpu} has {kind.compute_capability}"
            )
        if abs(device["memory_mib"] - kind.memory_mib) > MEMORY_TOLERANCE * kind.memory_mib:
            yield f"{where}: {device['memory_mib']} MiB, {plan.spec.gpu} has {kind.memory_mib} MiB"


def _driver(plan: HostPlan, seen: Mapping[str, Any]) -> Iterator[str]:
    """A driver must be known for the system, and is not exchanged under services that use it."""
    declared = plan.spec.driver
    nvswitch = bool(plan.gpu and plan.gpu.nvswitch)
    yield from driver_problems(declared, system_name(seen["os"]), nvswitch=nvswitch)
    if declared is None:
        return
    devices = (seen["gpus"] or {}).get("devices") or []
    found = {device["driver"] for device in devices}
    packages = plan.driver_request(seen["os"])["packages"]
    for name, version in packages.items():
        state = seen["packages"].get(name)
        if state is not None and version and not fnmatchcase(state["version"], version):
            found.add(state["version"])
    if found <= {declared.version}:
        return
    serving = [name for name in seen["records"] if _active(seen, f"{UNIT_PREFIX}{name}.service")]
    if serving:
        yield (
            f"driver: {', '.join(sorted(found))} is there and {declared.version} is declared, while "
            f"{', '.join(sorted(serving))} serves; stop it first: systemctl stop 'minimax-*'"
        )


def _active(seen: Mapping[str, Any], unit: str) -> bool:
    return bool(seen["units"].get(unit, {}).get("active") == "active")


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


def _disks(plan: HostPlan, seen: Mapping[str, Any]) -> Iterator[str]:
    """Need against free, added up for each file system."""
    release_bytes = catalog().tools.release_bytes
    need: dict[int, int] = {}
    what: dict[int, list[str]] = {}
    for weights in plan.weights:
        size = seen["needs"]["weights"].get(weights.path, {}).get("bytes", 0)
        if size:
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
