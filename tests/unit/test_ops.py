"""Operations of ours: what they do at which time of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from paramiko import SSHException
from pyinfra.api.command import FunctionCommand
from pyinfra.api.exceptions import ConnectError
from pyinfra.connectors.util import CommandOutput, OutputLine
from pyinfra.context import ctx_host, ctx_state

from fleet import facts, ops
from fleet.facts import Input
from fleet.ops import FollowedCommand
from fleet.plan import PROGRAM
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


# ------------------------------------------------------------------------------- a lost connection


class Line:
    """A host whose connection is cut after so many lines of its job, and comes back later."""

    def __init__(self, *answers: tuple[bool, list[str], bool], away: int = 0) -> None:
        self.answers = list(answers)
        self.away = away
        self.asked: list[tuple[str, Any]] = []
        self.said: list[str] = []
        self.connected = True
        self.connector = SimpleNamespace(client=self, connect=self.connect)

    def get_transport(self) -> Any:
        return SimpleNamespace(is_active=lambda: self.connected, sock=None)

    def close(self) -> None:
        self.connected = False

    def connect(self) -> None:
        if self.away:
            self.away -= 1
            raise ConnectError("Could not connect (connection refused)")
        self.connected = True

    def run_shell_command(self, command: Any, **arguments: Any) -> tuple[bool, CommandOutput]:
        self.asked.append((str(command), json.loads(arguments["_stdin"])))
        done, lines, self.connected = self.answers.pop(0)
        return done, CommandOutput([OutputLine("stdout", line) for line in lines])

    def log(self, text: str) -> None:
        self.said.append(text)

    def log_styled(self, text: str, **_: Any) -> None:
        self.said.append(text)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "RECONNECT_EVERY_S", 0)
    monkeypatch.setattr(ops, "RECONNECT_SAID_EVERY_S", -1)


REQUEST: dict[str, Any] = {"services": []}


def followed(line: Line) -> bool:
    state: Any = SimpleNamespace(print_input=False)
    host: Any = line
    done, output = FollowedCommand("cutover", REQUEST).execute(state, host, {})
    assert list(output) == []
    return bool(done)


def test_a_job_whose_connection_is_cut_is_followed_from_where_its_lines_broke_off() -> None:
    own = "cutover: under way already; following it"
    line = Line(
        (False, [own, "one", "two"], False), (False, ["three"], False), (True, [], True), away=2
    )

    assert followed(line)

    begun, *again = line.asked
    assert begun == (f"python3 {PROGRAM} job cutover", REQUEST)
    assert again == [
        (f"python3 {PROGRAM} follow cutover", {"request": REQUEST, "seen": seen}) for seen in (2, 3)
    ]
    assert [text for text in line.said if text.startswith("not back yet")]


@pytest.mark.parametrize("done", [True, False])
def test_a_job_that_ends_while_connected_is_told_as_it_ended(done: bool) -> None:
    line = Line((done, ["one"], True))

    assert followed(line) is done
    assert len(line.asked) == 1


def test_a_host_that_does_not_come_back_fails_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "RECONNECT_TIMEOUT_S", -1)
    line = Line((False, [], False), away=9)

    assert not followed(line)
    assert line.said[-1].startswith("not back after 0 s: Could not connect (connection refused)")


def test_a_connection_that_is_gone_before_the_job_began_is_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Line((True, [], True))
    real = line.run_shell_command

    def gone(command: Any, **arguments: Any) -> tuple[bool, CommandOutput]:
        monkeypatch.setattr(line, "run_shell_command", real)
        line.connected = False
        raise SSHException("SSH session not active")

    monkeypatch.setattr(line, "run_shell_command", gone)

    assert followed(line)
    assert line.asked == [(f"python3 {PROGRAM} job cutover", REQUEST)]
