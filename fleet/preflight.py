"""What keeps a host from becoming what its plan says, judged from the plan and the host's state.

Pure: the state is what `fleet_host.py probe` answered. Every finding is one line for a person.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from fleet import container
from fleet.catalog import catalog
from fleet.compare import driver_is_stale, packages_differ, there
from fleet.drivers import (
    DCGM_EXPORTER_UNIT,
    FABRIC_MANAGER_UNIT,
    driver_problems,
    package_manager,
    supported_systems,
    system_name,
    toolkit_packages,
)
from fleet.plan import OS_PYTHON, PROXY_UNIT, UNIT_PREFIX, HostPlan

ARCHITECTURES = ("x86_64",)
OLDEST_PYTHON = (3, 10)
"""For huggingface_hub at the version of fleet/models/tools.yaml."""
NVLINK_5 = (10, 0)
"""Compute capability from which on the PCI bus shows no NVSwitches: they are managed through network
adapters (Fabric Manager User Guide, "Systems Using Fourth Generation NVSwitches")."""
MEMORY_TOLERANCE = 0.03
"""Share by which a GPU's memory may differ from the catalogue's: ECC and vBIOS make small differences."""


def problems(plan: HostPlan, seen: Mapping[str, Any], clock_offset_s: float) -> list[str]:
    """Everything wrong with this host, at once. `clock_offset_s`: the host's clock minus ours."""
    return [
        *_system(plan, seen),
        *_clock(plan, clock_offset_s),
        *_gpus(plan, seen),
        *_nvswitches(plan, seen),
        *_fabric_manager(plan, seen),
        *_driver(plan, seen),
        *_ports(plan, seen),
        *_mirrors(seen),
        *_packages(plan, seen),
        *_disks(plan, seen),
    ]


def _system(plan: HostPlan, seen: Mapping[str, Any]) -> Iterator[str]:
    system = seen["os"]
    name = system_name(system)
    if name not in supported_systems():
        known = ", ".join(supported_systems())
        yield f"operating system: {system['name'] or name} is not supported; known are {known}"
    if system["architecture"] not in ARCHITECTURES:
        yield f"architecture: {system['architecture']}; known is {', '.join(ARCHITECTURES)}"
    if system["enforcing"]:
        yield (
            "SELinux is enforcing, by which nginx may not have the public ports, and nothing here was ever "
            "tried under it; make it permissive: setenforce 0, and SELINUX=permissive in /etc/selinux/config"
        )
    own = system["python"]
    too_old = tuple(map(int, own.split(".")[:2])) < OLDEST_PYTHON
    if too_old and plan.release.python == OS_PYTHON and not all(seen["releases"].values()):
        yield (
            f"python: {OS_PYTHON} is {own}, and the client of the model hub needs "
            f"{OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or later, vLLM mostly more; set vllm.python to a "
            "version that uv fetches, such as '3.12'"
        )


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
    curable = driver_incomplete(plan, seen) or driver_is_stale(seen)
    if smi["error"] and not (smi["devices"] is None and curable):
        yield f"GPUs: nvidia-smi says: {smi['error']}{_mismatch(plan, seen)}"
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


def _mismatch(plan: HostPlan, seen: Mapping[str, Any]) -> str:
    """The module's version, and the cure, where nvidia-smi speaks of another one."""
    if "mismatch" not in seen["gpus"]["error"].lower():
        return ""
    cure = "" if plan.spec.driver else ", or declare driver.version"
    return f"; kernel module {seen['driver']['loaded'] or 'none'} is loaded: reboot this host{cure}"


def _fabric_manager(plan: HostPlan, seen: Mapping[str, Any]) -> Iterator[str]:
    """A driver that group data leaves as it is must have its fabric manager: without it CUDA says 802."""
    if plan.gpu is None or not plan.gpu.nvswitch or plan.spec.driver is not None:
        return
    loaded, found = seen["driver"]["loaded"], seen["driver"]["fabric_manager"]
    cure = "of the driver's own version, or declare driver.version"
    if found is None:
        yield f"fabric manager: there is none, and this machine has NVSwitches; install it {cure}"
    elif loaded and found["version"] != loaded:
        yield (
            f"fabric manager: {found['version']} is installed and kernel module {loaded} is loaded"
            f"{': ' + found['said'] if found['said'] else ''}; install it {cure}"
        )
    elif found["active"] != "active":
        yield f"fabric manager: its unit is {found['active']}; see journalctl -u {FABRIC_MANAGER_UNIT}"


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
    """A driver must be known for the system; one that is loaded is exchanged in the host's wave."""
    declared = plan.spec.driver
    nvswitch = bool(plan.gpu and plan.gpu.nvswitch)
    yield from driver_problems(declared, system_name(seen["os"]), nvswitch=nvswitch)
    if declared is None:
        yield from _too_old(plan, seen)
        return
    exchange, system = seen["due"]["driver"], system_name(seen["os"])
    if exchange is None:
        return
    if package_manager(system) != "apt":
        yield (
            f"driver: {exchange['why']}: a driver that is loaded is exchanged with apt only; on {system} "
            "stop the services, install it by hand and reboot"
        )
    elif exchange["reboot"] and declared.reboot == "never":
        yield (
            f"driver: {exchange['why']}: that takes a reboot of this host; allow it, driver = "
            f"{{'version': '{declared.version}', 'reboot': 'if-needed'}}, or declare the version that is "
            "loaded"
        )


def _too_old(plan: HostPlan, seen: Mapping[str, Any]) -> Iterator[str]:
    """A driver that group data leaves as it is must be new enough for the CUDA of vLLM's wheels."""
    for version in sorted(_versions(seen)):
        branch = version.partition(".")[0]
        if branch.isdigit() and int(branch) < plan.minimum_driver:
            yield (
                f"driver: {version} is there, and the wheels of {plan.release.id} need "
                f"{plan.minimum_driver} or later; declare driver.version"
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
    exporter = plan.exporter
    holder = seen["ports"][str(exporter.port)] if exporter else None
    if exporter and holder and holder["unit"] != DCGM_EXPORTER_UNIT:
        yield (
            f"port {exporter.port} for the exporter of GPU metrics is held by PID {holder['pid']} "
            f"({holder['command']}); stop that or set dcgm_exporter.port"
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
    """Each package that is missing must be in some repository of the host, at its version."""
    found = seen["needs"]["packages"]
    if found is None:
        return
    system = system_name(seen["os"])
    manager = package_manager(system)
    if "error" in found:
        yield f"{manager}: the host's repositories cannot be read: {found['error']}"
        return
    driver = plan.driver_request(seen["os"])["packages"]
    of_nvidia = {
        *(name for name, version in driver.items() if version),
        *plan.exporter_packages,
        *toolkit_packages(plan.spec.cuda_toolkit),
    }
    lacking = {}
    engine = plan.engine_packages(system, there(seen))
    for name, version in (plan.packages(system) | engine | driver).items():
        versions = found["versions"].get(name)
        if versions is None or any(fnmatchcase(one, version or "*") for one in versions):
            continue
        has = f" (it has {', '.join(versions)})" if versions else ""
        lacking[name] = f"{name} {version or ''}".strip() + has
    if lacking:
        cures = [f"see mirrors.{manager}"]
        if of_nvidia & lacking.keys():
            # Without it, dnf shows the drivers of one module stream alone.
            how = ", with module_hotfixes" if manager == "dnf" else ""
            cures = [f"NVIDIA's repository is named in mirrors.{manager}{how}"]
        if "dkms" in lacking:
            cures.append("dkms is in EPEL")
        if "nvidia-container-toolkit" in lacking:
            cures.append("nvidia-container-toolkit is in NVIDIA's repository libnvidia-container")
        what = "; ".join(lacking.values())
        yield f"{manager}: no repository of this host has {what}; {', and '.join(cures)}"


def _disks(plan: HostPlan, seen: Mapping[str, Any]) -> Iterator[str]:
    """Need against free, added up for each file system."""
    tools = catalog().tools
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
        place = container.ROOT if plan.release.image else plan.spec.paths.releases
        size = tools.image_bytes if plan.release.image else tools.release_bytes
        device = seen["disks"][place]["device"]
        need[device] = need.get(device, 0) + size
        what.setdefault(device, []).append(plan.release.id)
    for path, disk in seen["disks"].items():
        needed = need.pop(disk["device"], 0)
        if needed > disk["free_bytes"]:
            yield (
                f"disk at {path}: {needed / 2**30:.1f} GiB needed for "
                f"{', '.join(what[disk['device']])}, {disk['free_bytes'] / 2**30:.1f} GiB free"
            )
