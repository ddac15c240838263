"""Operations of ours: what they do at which time of a run."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from pyinfra.api.command import FunctionCommand
from pyinfra.context import ctx_host, ctx_state

from fleet import facts, ops
from fleet.facts import Input
from tests.unit.state import converged, plan_of, service

PLAN = plan_of(service())


class Host:
    """The current host, in whatever state the test puts it."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = converged(PLAN)
        self.looked = 0

    def look(self) -> dict[str, Any]:
        self.looked += 1
        return self.seen

    def noop(self, _why: str) -> None:
        """As pyinfra's."""


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    current = Host()
    monkeypatch.setattr(facts, "plan", lambda: PLAN)
    monkeypatch.setattr(facts, "look", current.look)
    with ctx_host.use(current):
        yield current


def confirmed(*, needed: bool, executing: bool = True) -> list[Any]:
    """The commands that the operation gives at this time."""
    with ctx_state.use(SimpleNamespace(is_executing=executing)):
        return list(ops.confirm._inner(needed=needed))


def test_a_host_that_still_differs_after_the_waves_fails(host: Host) -> None:
    host.seen["due"]["services"]["m25"] = "it runs as another"

    (command,) = confirmed(needed=True)

    assert isinstance(command, FunctionCommand)
    assert command.function is ops.fail
    assert "m25 (it runs as another): still not what the plan says" in command.args[0][0]


def test_a_host_that_was_cut_over_passes(host: Host) -> None:
    assert confirmed(needed=True) == []
    assert host.looked == 1


def test_a_host_that_was_as_planned_is_not_asked_again(host: Host) -> None:
    assert confirmed(needed=False) == []
    assert host.looked == 0


def test_a_dry_run_does_not_ask_for_what_no_wave_has_done_yet(host: Host) -> None:
    assert confirmed(needed=True, executing=False) == []
    assert host.looked == 0


def test_the_program_and_its_question_are_not_printed() -> None:
    lines = Input(["program", "question"])

    assert list(lines) == ["program", "question"]
    assert "question" not in f"{lines}"


def test_a_host_that_does_not_say_how_its_services_are_is_no_host_that_serves(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "ask", lambda _fact, _request: None)

    (result,) = ops.gate(PLAN, answer=False)

    assert ops.explain(result) == "m25: its host does not say how it is; see above"
