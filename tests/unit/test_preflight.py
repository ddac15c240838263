"""Everything wrong with a host is found before it is touched, in words for a person."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fleet.drivers import FABRIC_MANAGER_UNIT, PERSISTENCE_UNIT
from fleet.preflight import driver_incomplete, driver_runs, problems
from tests.unit.state import SYSTEM, converged, plan_of, service

PLAN = plan_of(service())
HUB = PLAN.weights[0].path


def lose_gpu(seen: dict[str, Any]) -> None:
    del seen["gpus"]["devices"][5]


def before_the_driver(seen: dict[str, Any]) -> None:
    seen["gpus"] = {"error": None, "devices": None}
    seen["pci"]["gpus"] = 7


def broken_smi(seen: dict[str, Any]) -> None:
    seen["gpus"] = {"error": "Failed to initialize NVML", "devices": None}


def lost_gpu(seen: dict[str, Any]) -> None:
    seen["gpus"]["error"] = "Unable to determine the device handle for GPU0000:65:00.0"


def no_switches(seen: dict[str, Any]) -> None:
    seen["pci"]["nvswitches"] = 0


def package_missing(seen: dict[str, Any]) -> None:
    """A driver package is to be installed, for which nobody has to be stopped."""
    seen["packages"]["nvidia-driver-cuda"] = None
    stop_services(seen)


def stop_services(seen: dict[str, Any]) -> None:
    for planned in PLAN.services:
        seen["units"][planned.unit].update(active="inactive", stamp=None)


def not_in_any_source(seen: dict[str, Any]) -> None:
    package_missing(seen)
    versions = {"nvidia-driver-cuda": ["570.172.08-1", "580.82.07-1"], "git-lfs": []}
    seen["needs"]["packages"] = {"versions": versions}


def broken_sources(seen: dict[str, Any]) -> None:
    package_missing(seen)
    seen["needs"]["packages"] = {
        "error": "The repository 'http://mirror stable Release' is not signed."
    }


def other_gpu(seen: dict[str, Any]) -> None:
    seen["gpus"]["devices"][0].update(memory_mib=81559, compute_capability="8.0")


def port_held(seen: dict[str, Any]) -> None:
    seen["ports"]["8000"] = {"pid": 4711, "command": "python3", "unit": "jupyter.service"}


def driver_under_services(seen: dict[str, Any]) -> None:
    for device in seen["gpus"]["devices"]:
        device["driver"] = "570.172.08"


def another_driver(seen: dict[str, Any]) -> None:
    driver_under_services(seen)
    seen["due"]["driver"] = {
        "why": "kernel module 570.172.08, packages 570.172.08-1; 580.95.05 is declared",
        "reboot": True,
        "staged": False,
    }


def f14_mismatch(seen: dict[str, Any]) -> None:
    error = "Failed to initialize NVML: Driver/library version mismatch"
    seen["gpus"] = {"error": error, "devices": None}


def too_big(seen: dict[str, Any]) -> None:
    seen["needs"]["weights"] = {HUB: {"bytes": 230 * 2**30, "fetched_bytes": 0}}
    for disk in seen["disks"].values():
        disk["free_bytes"] = 100 * 2**30


def index_down(seen: dict[str, Any]) -> None:
    answer = {"url": "http://mirror/simple", "error": "Connection refused"}
    seen["needs"]["mirrors"] = {"index": answer}


def test_nothing_is_wrong_with_a_converged_host() -> None:
    assert problems(PLAN, converged(PLAN), 0.0) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_gpu, "GPUs: 7/8 GPUs (silent on the PCI bus: 0000:40:00.0); h20-141 ×8 is declared"),
        (before_the_driver, "GPUs: 7/8 GPUs on the PCI bus; h20-141 ×8 is declared"),
        (broken_smi, "GPUs: nvidia-smi says: Failed to initialize NVML"),
        (lost_gpu, "GPUs: nvidia-smi says: Unable to determine the device handle"),
        (no_switches, "NVSwitch: 0 on the PCI bus, and h20-141 has some"),
        (
            not_in_any_source,
            "apt: no repository of this host has git-lfs; "
            "nvidia-driver-cuda 580.95.05-1 (it has 570.172.08-1, 580.82.07-1); "
            "NVIDIA's repository is named in mirrors.apt",
        ),
        (
            broken_sources,
            "apt: the host's repositories cannot be read: The repository 'http://mirror",
        ),
        (other_gpu, "compute capability 8.0, h20-141 has 9.0"),
        (other_gpu, "81559 MiB, h20-141 has 143771 MiB"),
        (port_held, "port 8000 for m25 is held by PID 4711 (python3)"),
        (
            another_driver,
            "driver: kernel module 570.172.08, packages 570.172.08-1; 580.95.05 is declared: that takes "
            "a reboot of this host; allow it, driver = {'version': '580.95.05', 'reboot': 'if-needed'}",
        ),
        (
            f14_mismatch,
            "Driver/library version mismatch; kernel module 580.95.05 is loaded: reboot this host",
        ),
        (too_big, "230.0 GiB needed for MiniMaxAI/MiniMax-M2.5, 100.0 GiB free"),
        (index_down, "mirror index: http://mirror/simple cannot be reached: Connection refused"),
        (
            lambda seen: seen["os"].update(id="arch", name="Arch Linux"),
            "Arch Linux is not supported",
        ),
        (lambda seen: seen["os"].update(architecture="riscv64"), "architecture: riscv64"),
    ],
)
def test_what_is_wrong_is_named(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    seen = converged(PLAN)
    change(seen)

    assert message in "\n".join(problems(PLAN, seen, 0.0))


@pytest.mark.parametrize(("offset_s", "words"), [(600.0, "600 s ahead of"), (-90.0, "90 s behind")])
def test_a_clock_that_is_off(offset_s: float, words: str) -> None:
    assert words in "\n".join(problems(PLAN, converged(PLAN), offset_s))


def test_all_that_is_wrong_is_told_at_once() -> None:
    seen = converged(PLAN)
    for change in (lose_gpu, port_held, index_down, too_big):
        change(seen)

    assert len(problems(PLAN, seen, 600.0)) == 5


def test_what_an_interrupted_download_left_needs_no_disk_again() -> None:
    seen = converged(PLAN)
    too_big(seen)
    seen["needs"]["weights"][HUB]["fetched_bytes"] = 200 * 2**30

    assert problems(PLAN, seen, 0.0) == []

    seen["needs"]["weights"][HUB]["fetched_bytes"] = 100 * 2**30
    assert "130.0 GiB needed for MiniMaxAI" in "\n".join(problems(PLAN, seen, 0.0))


def test_ports_held_by_our_own_units_are_free_for_us() -> None:
    seen = converged(PLAN)
    seen["ports"]["8000"] = {"pid": 1, "command": "nginx", "unit": "minimax-proxy.service"}
    seen["ports"]["18000"] = {"pid": 2, "command": "vllm", "unit": "minimax-m25.service"}

    assert problems(PLAN, seen, 0.0) == []


def test_a_driver_branch_that_is_not_known_for_the_system() -> None:
    plan = plan_of(service(), driver={"version": "590.48.01"})

    message = "\n".join(problems(plan, converged(plan), 0.0))

    assert "driver: branch 590 is not known for debian-12; known are 570, 575, 580" in message


@pytest.mark.parametrize(
    "change",
    [
        package_missing,
        lambda seen: seen["os"].update(kernel_headers=False, kernel="6.1.0-41-amd64"),
        lambda seen: seen["packages"]["nvidia-driver-cuda"].update(held=False),
        lambda seen: seen["units"][PERSISTENCE_UNIT].update(active="failed"),
        lambda seen: seen["units"][FABRIC_MANAGER_UNIT].update(enabled=False, disabled=True),
    ],
    ids=["package", "headers of a new kernel", "hold", "daemon that failed", "daemon not enabled"],
)
def test_a_broken_nvidia_smi_is_left_to_the_driver_step_where_that_has_something_to_do(
    change: Callable[[dict[str, Any]], Any],
) -> None:
    seen = converged(PLAN)
    broken_smi(seen)
    assert not driver_incomplete(PLAN, seen)
    change(seen)

    assert driver_incomplete(PLAN, seen)
    assert problems(PLAN, seen, 0.0) == []


def test_a_driver_that_is_not_declared_is_nobodys_to_mend() -> None:
    plan = plan_of(service(), driver=None)
    seen = converged(plan)
    broken_smi(seen)

    assert "nvidia-smi says" in "\n".join(problems(plan, seen, 0.0))
    assert not driver_incomplete(plan, seen)


@pytest.mark.parametrize(
    "change",
    [driver_under_services, broken_smi, lambda seen: seen["gpus"].update(devices=None)],
    ids=["another version", "broken", "absent"],
)
def test_a_driver_counts_by_what_the_gpus_answer_and_not_by_its_packages(
    change: Callable[[dict[str, Any]], Any],
) -> None:
    seen = converged(PLAN)
    assert driver_runs(PLAN, seen)
    change(seen)

    assert not driver_runs(PLAN, seen)


def test_headers_may_be_installed_under_services() -> None:
    seen = converged(PLAN)
    seen["os"].update(kernel_headers=False)

    assert driver_incomplete(PLAN, seen)
    assert problems(PLAN, seen, 0.0) == []


def test_another_driver_is_no_obstacle_where_the_host_may_reboot_for_it() -> None:
    """What nvidia-smi says of the one that goes is none either, but for GPUs that do not answer it."""
    plan = plan_of(service(), driver={"version": "580.95.05", "reboot": "if-needed"})
    seen = converged(plan)
    another_driver(seen)
    assert problems(plan, seen, 0.0) == []

    f14_mismatch(seen)
    assert problems(plan, seen, 0.0) == []


def test_packages_that_changed_under_their_module_are_exchanged_without_leave_to_reboot() -> None:
    seen = converged(PLAN)
    f14_mismatch(seen)
    why = "kernel module 580.95.05, packages 580.105.08-1; 580.95.05 is declared"
    seen["due"]["driver"] = {"why": why, "reboot": False, "staged": False}

    assert problems(PLAN, seen, 0.0) == []


def test_a_driver_that_is_loaded_is_exchanged_with_apt_only() -> None:
    seen = converged(PLAN)
    another_driver(seen)
    seen["os"].update(id="rocky", version_id="9.6")

    assert "is exchanged with apt only; on rocky-9 stop the services" in "\n".join(
        problems(PLAN, seen, 0.0)
    )


MISMATCHED = "fabric manager NVIDIA GPU driver interface version 580.82.07 don't match with driver"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "fabric manager: there is none, and this machine has NVSwitches; install it of the"),
        (
            {"version": "580.82.07", "active": "failed", "said": MISMATCHED},
            f"fabric manager: 580.82.07 is installed and kernel module 580.95.05 is loaded: {MISMATCHED};"
            " install it of the driver's own version, or declare driver.version",
        ),
        (
            {"version": "580.95.05", "active": "inactive", "said": None},
            "fabric manager: its unit is inactive; see journalctl -u nvidia-fabricmanager.service",
        ),
    ],
)
def test_f14_a_driver_that_is_not_declared_must_have_its_fabric_manager(
    found: dict[str, Any] | None, message: str
) -> None:
    plan = plan_of(service(), driver=None)
    seen = converged(plan)
    assert problems(plan, seen, 0.0) == []
    seen["driver"]["fabric_manager"] = found

    (problem,) = problems(plan, seen, 0.0)

    assert problem.startswith(message)


def test_a_kernel_that_waits_for_a_reboot_needs_its_headers_too() -> None:
    system = {**SYSTEM, "next_kernel": "6.1.0-41-amd64"}

    assert next(iter(PLAN.driver_request(system)["packages"])) == "linux-headers-6.1.0-41-amd64"
    # What a cut-over is told is the same before and after that reboot.
    assert PLAN.cutover_request(system) == PLAN.cutover_request(SYSTEM)


def test_switches_that_the_declared_kind_has_not_are_named_with_the_cure() -> None:
    kind = {"name": "NVIDIA H20", "memory_mib": 143771, "compute_capability": "9.0"}
    plan = plan_of(service(), gpu={**kind, "nvswitch": False})

    (message,) = problems(plan, converged(plan), 0.0)

    assert message.startswith("NVSwitch: 4 on the PCI bus, and NVIDIA H20 has none")
    assert "'nvswitch': True" in message


@pytest.mark.parametrize("capability", ["10.0", "12.0"])
def test_switches_of_later_generations_are_not_looked_for_on_the_bus(capability: str) -> None:
    kind = {"name": "later", "memory_mib": 183359, "compute_capability": capability}
    plan = plan_of(service(), gpu={**kind, "nvswitch": True})
    seen = converged(plan)
    no_switches(seen)

    assert problems(plan, seen, 0.0) == []


def test_the_index_that_uv_takes_by_itself_is_looked_at_too() -> None:
    default = PLAN.question()["mirrors"]["index"]
    declared = plan_of(service(), mirrors={"index": "http://mirror/simple"})

    assert default.startswith("https://")
    assert declared.question()["mirrors"]["index"] == "http://mirror/simple"


def test_an_address_of_the_hub_may_end_in_a_slash() -> None:
    plan = plan_of(service(), mirrors={"hub": "http://mirror/hub/"})

    assert plan.question()["mirrors"]["hub"] == "http://mirror/hub"
    assert plan.weights_request(plan.weights[0])["hub"] == "http://mirror/hub"


def test_b18_a_driver_left_as_it_is_must_be_new_enough_for_the_wheels() -> None:
    """The converged host's devices answer with branch 580."""
    old = plan_of(service(), driver=None)
    seen = converged(old)
    for device in seen["gpus"]["devices"]:
        device["driver"] = "570.172.08"

    assert problems(old, converged(old), 0) == []
    assert problems(old, seen, 0) == [
        f"driver: 570.172.08 is there, and the wheels of {old.release.id} need 580 or later; "
        "declare driver.version"
    ]
