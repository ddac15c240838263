"""Everything wrong with a host is found before it is touched, in words for a person."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fleet.preflight import problems
from tests.unit.state import converged, plan_of, service

PLAN = plan_of(service())
HUB = PLAN.weights[0].path


def lose_gpu(seen: dict[str, Any]) -> None:
    del seen["gpus"]["devices"][5]


def before_the_driver(seen: dict[str, Any]) -> None:
    seen["gpus"] = {"error": None, "devices": None}
    seen["pci"]["gpus"] = 7


def broken_smi(seen: dict[str, Any]) -> None:
    seen["gpus"] = {"error": "Failed to initialize NVML", "devices": None}


def other_gpu(seen: dict[str, Any]) -> None:
    seen["gpus"]["devices"][0].update(memory_mib=81559, compute_capability="8.0")


def port_held(seen: dict[str, Any]) -> None:
    seen["ports"]["8000"] = {"pid": 4711, "command": "python3", "unit": "jupyter.service"}


def driver_under_services(seen: dict[str, Any]) -> None:
    for device in seen["gpus"]["devices"]:
        device["driver"] = "570.172.08"


def too_big(seen: dict[str, Any]) -> None:
    seen["needs"]["weights"] = {HUB: {"bytes": 230 * 2**30}}
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
        (lose_gpu, "GPUs: 7/8 GPUs (missing: 5); h20-141 ×8 is declared"),
        (before_the_driver, "GPUs: 7/8 GPUs on the PCI bus; h20-141 ×8 is declared"),
        (broken_smi, "GPUs: nvidia-smi says: Failed to initialize NVML"),
        (other_gpu, "compute capability 8.0, h20-141 has 9.0"),
        (other_gpu, "81559 MiB, h20-141 has 143771 MiB"),
        (port_held, "port 8000 for m25 is held by PID 4711 (python3)"),
        (driver_under_services, "580.95.05 is declared, while m25 serves"),
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


def test_ports_held_by_our_own_units_are_free_for_us() -> None:
    seen = converged(PLAN)
    seen["ports"]["8000"] = {"pid": 1, "command": "nginx", "unit": "minimax-proxy.service"}
    seen["ports"]["18000"] = {"pid": 2, "command": "vllm", "unit": "minimax-m25.service"}

    assert problems(PLAN, seen, 0.0) == []


def test_a_driver_branch_that_is_not_known_for_the_system() -> None:
    plan = plan_of(service(), driver={"version": "550.90.07"})

    message = "\n".join(problems(plan, converged(plan), 0.0))

    assert "driver: branch 550 is not known for debian-12; known are 570, 580" in message
