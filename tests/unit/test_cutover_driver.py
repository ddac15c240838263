"""A cut-over that exchanges the driver: services are down meanwhile, and both go back together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.unit.test_cutover import NEW, OLD, UNIT, Machine

DRIVER = {"version": "580.95.05", "packages": {}}


class Driver:
    """What fleet_driver.py does inside a cut-over, played; says in which state it met the services."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.acts: list[tuple[str, bool]] = []
        self.forward: Callable[[], None] = lambda: None
        self.back: Callable[[], None] = lambda: None

    def note(self, act: str) -> None:
        """An act, and whether any service was up or would have come up at boot."""
        self.acts.append((act, UNIT in self.machine.processes or UNIT in self.machine.enabled))

    def begin(self, driver: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
        exchange = {"driver": driver, "before": json.loads(json.dumps(before))}
        file = self.machine.program.exchange_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(exchange))
        return exchange

    def go_forward(self, exchange: dict[str, Any]) -> None:
        self.note("forward")
        self.forward()

    def go_back(self, exchange: dict[str, Any], why: str) -> None:
        self.note("back")
        self.back()

    def finish(self, exchange: dict[str, Any]) -> None:
        self.note("finish")
        self.machine.program.exchange_file().unlink()


@pytest.fixture
def machine(program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A host that serves m25 as an older plan says, and whose driver is not the declared one."""
    made = Machine(program, tmp_path, monkeypatch)
    program.cutover(made.plan(OLD, "m25"))
    made.calls.clear()
    why = {"why": "kernel module 580.82.07; 580.95.05 is declared", "reboot": True, "staged": True}
    monkeypatch.setattr(program, "driver_due", lambda driver: why if driver else None)
    return made


@pytest.fixture
def driver(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver(machine)
    monkeypatch.setattr(machine.program, "drivers", lambda: made)
    return made


def plan(machine: Machine, stamp: str) -> dict[str, Any]:
    return {**machine.plan(stamp, "m25"), "driver": DRIVER}


def fail(error: Exception) -> None:
    raise error


def test_services_are_down_and_disabled_while_their_driver_is_exchanged(
    machine: Machine, driver: Driver
) -> None:
    """Also those that the plan leaves as they are."""
    before = machine.pids()[UNIT]

    machine.program.cutover(plan(machine, OLD))

    assert driver.acts == [("forward", False), ("finish", True)]
    assert machine.stopped_in_public == []
    assert machine.pids()[UNIT] != before
    assert UNIT in machine.enabled


def test_without_a_driver_to_exchange_nothing_of_it_is_done(
    machine: Machine, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.program, "driver_due", lambda driver: None)

    machine.program.cutover(plan(machine, NEW))

    assert driver.acts == []
    assert machine.pids()[UNIT]


def test_a_driver_that_fails_goes_back_before_any_service_starts(
    machine: Machine, driver: Driver
) -> None:
    driver.forward = lambda: fail(machine.program.HostError("nvidia-smi sees 7/8 GPUs"))

    with pytest.raises(machine.program.HostError, match="was undone: nvidia-smi sees 7/8 GPUs"):
        machine.program.cutover(plan(machine, NEW))

    assert driver.acts == [("forward", False), ("back", False), ("finish", True)]
    assert machine.processes[UNIT]["stamp"] == OLD
    assert UNIT in machine.enabled


def test_a_service_that_fails_under_the_new_driver_takes_it_back_with_it(
    machine: Machine, driver: Driver
) -> None:
    def gate(service: dict[str, Any]) -> None:
        if service["stamp"] == NEW:
            raise machine.program.GateError("health", "200", "503")

    machine.gate = gate

    with pytest.raises(machine.program.HostError, match="was undone: m25: gate, health"):
        machine.program.cutover(plan(machine, NEW))

    assert driver.acts == [("forward", False), ("back", False), ("finish", True)]
    assert machine.processes[UNIT]["stamp"] == OLD


def test_where_no_driver_works_no_service_is_started(machine: Machine, driver: Driver) -> None:
    driver.forward = lambda: fail(machine.program.HostError("the new one fails"))
    driver.back = lambda: fail(machine.program.HostError("so does the old; kernel module none"))

    with pytest.raises(
        machine.program.HostError,
        match=r"OUT OF SERVICE: .*\(the new one fails\).*: so does the old; kernel module none",
    ):
        machine.program.cutover(plan(machine, NEW))

    assert driver.acts == [("forward", False), ("back", False), ("finish", False)]


class Rebooted(BaseException):
    """The machine went down: what ran is no more, and nothing catches it."""


def test_after_a_reboot_it_goes_back_to_what_was_there_when_it_began(
    machine: Machine, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far the first half came: here all was noted when the power was cut."""
    real = machine.program.end_exchange

    def cut(exchange: dict[str, Any]) -> None:
        monkeypatch.setattr(machine.program, "end_exchange", real)
        raise Rebooted

    monkeypatch.setattr(machine.program, "end_exchange", cut)
    with pytest.raises(Rebooted):
        machine.program.cutover(plan(machine, NEW))
    assert machine.program.record("m25")["stamp"] == NEW
    driver.forward = lambda: fail(machine.program.HostError("on its way back"))

    with pytest.raises(machine.program.HostError, match="undone: on its way back"):
        machine.program.cutover(plan(machine, NEW))

    assert machine.processes[UNIT]["stamp"] == OLD
    assert machine.program.record("m25")["stamp"] == OLD
    assert [known["services"]["m25"]["stamp"] for known in machine.program.generations()] == [OLD]
    assert machine.program.exchange_due(plan(machine, OLD)) != "its exchange goes on"
