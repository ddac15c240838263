"""A host's state as the probe gives it, for a host that is exactly what its plan says."""

from __future__ import annotations

from typing import Any

from fleet.drivers import DCGM_EXPORTER_UNIT
from fleet.plan import EXPORTER_DROP_IN, NGINX_UNIT, PROXY_UNIT, SYSCTL, USER, HostPlan
from fleet.planner import Planner, Texts
from fleet.spec import HostSpec

REVISION = "f710177d938eff80b684d42c5aa84b382612f21f"
SYSTEM: dict[str, Any] = {
    "id": "debian",
    "version_id": "12",
    "name": "Debian GNU/Linux 12 (bookworm)",
    "architecture": "x86_64",
    "kernel": "6.1.0-40-amd64",
    "python": "3.11.2",
    "kernel_headers": True,
    "next_kernel": None,
    "enforcing": False,
}


def service(**changes: Any) -> dict[str, Any]:
    return {
        "name": "m25",
        "model": "MiniMaxAI/MiniMax-M2.5",
        "revision": REVISION,
        "recipe": "tp4",
        "gpus": [0, 1, 2, 3],
        "port": 8000,
    } | changes


def planned(*services: dict[str, Any], **changes: Any) -> tuple[HostPlan | None, list[str]]:
    """The plan of a host and the problems found, from group data with `changes`."""
    data = {
        "gpu": "h20-141",
        "gpu_count": 8,
        "driver": {"version": "580.95.05"},
        "vllm": {"version": "0.33.0"},
        "services": list(services),
    } | changes
    planner = Planner(dict.fromkeys(data, "group_data/h20.py"), Texts({}, {}, {}))
    plan = planner.plan("h20-01", "h20", HostSpec.model_validate(data))
    return plan, [str(problem) for problem in planner.problems]


def plan_of(*services: dict[str, Any], **changes: Any) -> HostPlan:
    plan, problems = planned(*services, **changes)
    assert plan is not None, problems
    return plan


def address(gpu: int) -> str:
    """Where a GPU is on the PCI bus."""
    return f"0000:{0x18 + 8 * gpu:02x}:00.0"


def converged(plan: HostPlan) -> dict[str, Any]:
    """What the probe answers once everything is as planned."""
    files = (
        *(*plan.system_files, *plan.repository_files("apt"), *plan.driver_files(SYSTEM)),
        *(*plan.staged_files, *plan.installed_files),
        *([plan.exporter_file] if plan.exporter_file else []),
    )
    packages = plan.packages("debian-12") | plan.engine_packages("debian-12")
    running = {
        "loaded": True,
        "active": "active",
        "sub": "running",
        "enabled": True,
        "disabled": False,
        "pid": 100,
        "restarts": 0,
        "result": "success",
        "exit_status": 0,
    }
    devices = [
        {
            "index": index,
            "name": plan.gpu.name,
            "memory_mib": plan.gpu.memory_mib,
            "compute_capability": plan.gpu.compute_capability,
            "driver": "580.95.05",
            "address": address(index),
        }
        for index in range(plan.spec.gpu_count)
        if plan.gpu
    ]
    nothing_held = {
        str(port): None for unit in plan.services for port in (unit.port, unit.engine_port)
    }
    if plan.exporter:
        nothing_held[str(plan.exporter.port)] = None
    return {
        "os": dict(SYSTEM),
        "files": {
            EXPORTER_DROP_IN: None,
            **{file.path: {"sha256": file.sha256, "mode": file.mode, "uid": 0} for file in files},
        },
        "users": {USER: True},
        "directories": {
            path: {"owner": owner, "mode": mode} for path, (owner, mode) in plan.directories.items()
        },
        "sysctl": dict(SYSCTL),
        "packages": {
            name: {"version": version or "1.0", "held": bool(version)}
            for name, version in packages.items()
        },
        "pci": {
            "gpus": plan.spec.gpu_count,
            "gpu_addresses": [address(index) for index in range(plan.spec.gpu_count)],
            "nvswitches": 4,
        },
        "gpus": {"error": None, "devices": devices},
        "units": {
            **{unit.unit: {**running, "stamp": unit.stamp} for unit in plan.services},
            PROXY_UNIT: {**running, "stamp": None},
            **{unit: {**running, "stamp": None} for unit in plan.driver_request(SYSTEM)["start"]},
            NGINX_UNIT: {**running, "loaded": False, "active": "inactive", "stamp": None},
            DCGM_EXPORTER_UNIT: {**running, "stamp": plan.exporter_stamp, "needs_reload": False},
        },
        "records": {unit.name: {"stamp": unit.stamp} for unit in plan.services},
        "due": {"services": {}, "gone": [], "proxy": None, "driver": None},
        "driver": {
            "loaded": "580.95.05",
            "nouveau": False,
            "fabric_manager": {"version": "580.95.05", "active": "active", "said": None},
        },
        "history": {"aim": None, "way_back": None, "generations": []},
        "ports": nothing_held,
        "disks": {path: {"free_bytes": 10**13, "device": 1} for path in plan.places},
        "releases": {release.path: True for release in plan.releases},
        "weights": {weights.path: True for weights in plan.weights},
        "uv": True,
        "needs": {"mirrors": {}, "packages": None, "weights": {}},
    }
