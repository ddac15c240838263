"""`make demo` ends with a line and an exit code, whatever goes wrong on the way."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from fleet.errors import Problem, SiteError
from fleet.health import Answer, NoAnswerError
from fleet.plan import ServicePlan
from lab import LabError, demo, hosts
from tests.unit.state import plan_of, service

ROOT = "the lab makes namespaces, mounts and cgroups and so needs root; use sudo"


@pytest.fixture(autouse=True)
def site(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site with one host, whose lab comes up and whose commands all succeed."""
    plan = plan_of(service())
    planned = SimpleNamespace(plans={plan.name: plan}, addresses={plan.name: "192.0.2.1"})
    monkeypatch.setattr(hosts, "up", lambda progress: progress("up"))
    no_server = subprocess.CompletedProcess[str]([], 1)
    monkeypatch.setattr(hosts, "ssh", lambda name, command, **options: no_server)
    monkeypatch.setattr("lab.demo.inventory.load", lambda inventory: planned)
    monkeypatch.setattr(demo, "ask", lambda service, address: Answer("Dodgers", 0.1))
    commands(monkeypatch)


def commands(monkeypatch: pytest.MonkeyPatch, **exit_codes: int) -> None:
    """Commands end with these codes, 0 where none is given."""

    def run(argv: list[Path | str], check: bool) -> subprocess.CompletedProcess[str]:
        code = exit_codes.get(Path(argv[0]).name, 0)
        if check and code:
            raise subprocess.CalledProcessError(code, list(map(str, argv)))
        return subprocess.CompletedProcess(list(map(str, argv)), code)

    monkeypatch.setattr("lab.demo.subprocess.run", run)


def test_it_ends_with_an_answer_and_what_to_try_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main() == 0

    said = capsys.readouterr().out
    assert "http://192.0.2.1:8000" in said
    assert "Dodgers" in said
    assert "make lab-down" in said


def test_a_machine_that_cannot_carry_a_lab_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(progress: object) -> None:
        raise LabError(ROOT)

    monkeypatch.setattr(hosts, "up", refuse)

    assert demo.main() == 1
    assert f"lab: {ROOT}\n" in capsys.readouterr().out


def test_a_failed_roll_out_is_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    commands(monkeypatch, pyinfra=1)

    assert demo.main() == 1


def test_a_service_that_is_not_as_planned_is_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands(monkeypatch, fleet=1)

    assert demo.main() == 1
    assert "make lab-down" in capsys.readouterr().out


def test_a_service_that_does_not_answer_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def silent(service: ServicePlan, address: str) -> Answer:
        raise NoAnswerError(f"http://{address}: [Errno 111] Connection refused [/]")

    monkeypatch.setattr(demo, "ask", silent)

    assert demo.main() == 1
    assert "m25: http://192.0.2.1: [Errno 111] Connection refused [/]" in capsys.readouterr().out


def test_group_data_that_somebody_broke_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(inventory: str) -> None:
        raise SiteError([Problem("group_data/h20.py: gpu", "what to do")])

    monkeypatch.setattr("lab.demo.inventory.load", refuse)

    assert demo.main() == 2
    assert "error: group_data/h20.py: gpu: what to do\n" in capsys.readouterr().out
