"""A host's cut-over: what makes one due, what it puts right, and that it goes back whatever happens.

systemd and nginx are played by `Machine`; the program is the real one, its files are real files.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

OLD, NEW = "0" * 12, "1" * 12
HOUR_S = 3600


class Machine:
    """Units as systemd has them, and an nginx: what runs is what their files said when it was started."""

    def __init__(self, program: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.program = program
        self.calls: list[tuple[str, ...]] = []
        self.processes: dict[str, dict[str, Any]] = {}
        self.enabled: set[str] = set()
        self.read: dict[str, str | None] = {}
        self.nginx: str | None = None
        self.reload_fails = False
        self.stopped_in_public: list[str] = []
        self.gate: Callable[[dict[str, Any]], None] = lambda service: None
        self._pids = iter(range(100, 1000))
        self.folder = folder
        for name in (
            *("RECORDS", "UNITS", "SERVICES", "PROXY", "PROXY_RUN", "DRAINING", "JOBS"),
            *("AIM", "RUNTIME_UNITS", "KEPT_JOBS"),
        ):
            monkeypatch.setattr(program, name, folder / name.lower())
        for name in ("RECORDS", "UNITS", "SERVICES", "PROXY"):
            (folder / name.lower()).mkdir()
        for name, played in (
            ("run", self.run),
            ("units_state", self.units_state),
            ("process_argv", self.argv),
            ("loaded_configuration", lambda: self.nginx),
            ("port_holder", lambda port: None),
            ("http_status", lambda service, path: 200),
            ("journal", lambda unit, lines=1: [f"the last line of {unit}"]),
            ("pass_gate", self.pass_gate),
            ("PROXY_TIMEOUT_S", 0),
        ):
            monkeypatch.setattr(program, name, played)

    # -- what the program asks of systemd and nginx ----------------------------------------------

    def run(self, *argv: str, check: bool = True, **_: object) -> Any:
        self.calls.append(argv)
        if argv[0] == "systemctl":
            units = [word for word in argv[2:] if not word.startswith("--")]
            getattr(self, argv[1].replace("-", "_"))(*units)
        return subprocess.CompletedProcess(argv, 0, "", "")

    def start(self, *units: str) -> None:
        for unit in units:
            if unit not in self.processes:
                text = self.file(unit) or ""
                stamp = re.search("FLEET_STAMP=([0-9a-f]+)", text)
                argv = re.search("ExecStart=(.*)", text)
                self.processes[unit] = {
                    "pid": next(self._pids),
                    "stamp": stamp[1] if stamp else None,
                    "argv": argv[1].split() if argv else [],
                    "started_at": time.time(),
                }
                if unit == self.program.PROXY_UNIT:
                    self.reload(unit)

    def stop(self, *units: str) -> None:
        for unit in units:
            name = unit.removeprefix("minimax-").removesuffix(".service")
            if self.processes.pop(unit, None) and not (self.program.DRAINING / name).exists():
                self.stopped_in_public.append(name)

    def restart(self, *units: str) -> None:
        self.stop(*units)
        self.start(*units)

    def reload(self, unit: str) -> None:
        if not self.reload_fails:
            self.nginx = (self.program.PROXY / "nginx.conf").read_text().strip("# \n")

    def enable(self, *units: str) -> None:
        self.enabled |= set(units)

    def disable(self, *units: str) -> None:
        self.enabled -= set(units)

    def daemon_reload(self) -> None:
        self.read = {path.name: path.read_text() for path in self.program.UNITS.glob("*.service")}

    def reset_failed(self, *units: str) -> None:
        pass

    def units_state(self, units: list[str]) -> dict[str, dict[str, Any]]:
        return {unit: self.state(unit) for unit in units}

    def state(self, unit: str) -> dict[str, Any]:
        process = self.processes.get(unit, {})
        return {
            "active": "active" if process else "inactive",
            "pid": process.get("pid", 0),
            "stamp": process.get("stamp"),
            "started_at": process.get("started_at", 0.0),
            "enabled": unit in self.enabled,
            "needs_reload": self.read.get(unit) != self.file(unit),
            "drop_ins": [str(path) for path in self.program.UNITS.glob(f"{unit}.d/*.conf")],
        }

    def argv(self, pid: int) -> list[str]:
        return next((p["argv"] for p in self.processes.values() if p["pid"] == pid), [])

    def pass_gate(self, service: dict[str, Any], timeout: float, **_: object) -> dict[str, Any]:
        self.gate(service)
        return {"ready_s": 1.0, "first_answer_s": 0.1, "answer": "Dodgers"}

    # -- what a test does and looks at -----------------------------------------------------------

    def file(self, unit: str) -> str | None:
        path = self.program.UNITS / unit
        return path.read_text() if path.is_file() else None

    def service(self, name: str, stamp: str) -> dict[str, Any]:
        """A service of the plan, staged."""
        argv = ["vllm", "serve", f"--seed={stamp}"]
        text = f"# Written by minimax-fleet for {name};\nFLEET_STAMP={stamp}\nExecStart={' '.join(argv)}\n"
        gate = {"ready_timeout_s": 1}
        stage = self.program.SERVICES / name / stamp
        stage.mkdir(parents=True, exist_ok=True)
        (stage / "unit.service").write_text(text)
        (stage / "gate.json").write_text(json.dumps({"engine_port": 18000, "gate": gate}))
        made = {"argv": argv, "vllm": stamp[0], "release": f"{self.folder}/releases/vllm-{stamp}"}
        made |= {"weights": f"{self.folder}/models/{stamp}", "revision": stamp}
        (stage / "plan.json").write_text(json.dumps({**made, "port": 8000, "engine_port": 18000}))
        return {
            "name": name,
            "unit": f"minimax-{name}.service",
            "stamp": stamp,
            "unit_sha256": sha256(text),
            "argv": argv,
            "engine_port": 18000,
            "gate": gate,
        }

    def proxy(self, stamp: str) -> dict[str, Any]:
        """The plan's proxy, staged. Its unit carries a stamp of its own."""
        unit_stamp = stamp.replace("0", "a")
        config, unit = f"# {stamp}\n", f"FLEET_STAMP={unit_stamp}\n"
        (self.program.PROXY / f"{stamp}.conf").write_text(config)
        (self.program.PROXY / f"{unit_stamp}.service").write_text(unit)
        return {
            "stamp": stamp,
            "sha256": sha256(config),
            "unit_stamp": unit_stamp,
            "unit_sha256": sha256(unit),
        }

    def plan(self, stamp: str, *names: str) -> dict[str, Any]:
        return {
            "services": [self.service(name, stamp) for name in names],
            "proxy": self.proxy(OLD),
        }

    def due(self, plan: dict[str, Any]) -> dict[str, Any]:
        units = [*(service["unit"] for service in plan["services"]), self.program.PROXY_UNIT]
        found: dict[str, Any] = self.program.due(plan, self.units_state(units))
        return found

    def serves(self, plan: dict[str, Any]) -> bool:
        """Is every service of the plan public and enabled, and nothing due?"""
        return self.due(plan) == NOTHING and not [*self.program.DRAINING.glob("*")]

    def pids(self) -> dict[str, int]:
        return {unit: process["pid"] for unit, process in self.processes.items()}


NOTHING: dict[str, Any] = {"services": {}, "gone": [], "proxy": None, "driver": None}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def machine(program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A host that serves m25 as an older plan says."""
    made = Machine(program, tmp_path, monkeypatch)
    program.cutover(made.plan(OLD, "m25"))
    made.calls.clear()
    return made


# ------------------------------------------------------------------------------------ what is due


def test_a_host_that_is_as_planned_is_left_alone(machine: Machine) -> None:
    plan, pids = machine.plan(OLD, "m25"), machine.pids()
    assert machine.due(plan) == NOTHING

    machine.program.cutover(plan)

    assert machine.pids() == pids
    assert not [call for call in machine.calls if call[1] in ("stop", "start", "reload", "restart")]


def test_another_plan_exchanges_the_process(machine: Machine) -> None:
    plan, before = machine.plan(NEW, "m25"), machine.pids()
    assert machine.due(plan)["services"] == {"m25": "its process is not the plan's"}

    machine.program.cutover(plan)

    assert machine.serves(plan)
    assert machine.pids()["minimax-m25.service"] != before["minimax-m25.service"]
    assert machine.program.record("m25")["previous"] == OLD


UNIT = "minimax-m25.service"


def edit_unit(machine: Machine) -> None:
    text = machine.file(UNIT) or ""
    (machine.program.UNITS / UNIT).write_text(text.replace("--seed", "--api-key --seed"))


def edit_by_systemctl(machine: Machine) -> None:
    folder = machine.program.UNITS / f"{UNIT}.d"
    folder.mkdir()
    (folder / "override.conf").write_text("[Service]\nLimitNOFILE=1\n")


def delete_unit(machine: Machine) -> None:
    (machine.program.UNITS / UNIT).unlink()


def disable(machine: Machine) -> None:
    machine.disable(UNIT)


def forget_to_reload(machine: Machine) -> None:
    """As a cut-over leaves it that is killed between writing a unit and telling systemd."""
    machine.read[UNIT] = "another"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (edit_unit, f"{UNIT} was changed by hand"),
        (edit_by_systemctl, "override.conf was changed by hand"),
        (delete_unit, f"{UNIT} was changed by hand"),
        (disable, "its unit is not enabled"),
        (forget_to_reload, "systemd has not read its files yet"),
    ],
)
def test_what_systemd_reads_is_put_right_without_a_restart(
    machine: Machine, change: Callable[[Machine], None], why: str
) -> None:
    plan, pids = machine.plan(OLD, "m25"), machine.pids()
    change(machine)
    assert machine.due(plan)["services"]["m25"].endswith(why)

    machine.program.cutover(plan)

    assert machine.serves(plan)
    assert machine.pids() == pids
    assert not [call for call in machine.calls if call[1] in ("stop", "start", "restart")]


@pytest.mark.parametrize("change", [edit_unit, edit_by_systemctl])
def test_a_process_that_was_started_from_a_changed_unit_is_exchanged(
    machine: Machine, change: Callable[[Machine], None]
) -> None:
    plan = machine.plan(OLD, "m25")
    change(machine)
    machine.daemon_reload()
    time.sleep(0.01)
    machine.restart(UNIT)
    before = machine.pids()

    assert "m25" in machine.due(plan)["services"]
    machine.program.cutover(plan)

    assert machine.serves(plan)
    assert machine.pids()[UNIT] != before[UNIT]
    assert machine.argv(machine.pids()[UNIT]) == plan["services"][0]["argv"]


def test_a_process_with_other_arguments_is_exchanged_though_its_unit_was_put_back(
    machine: Machine,
) -> None:
    plan = machine.plan(OLD, "m25")
    machine.processes[UNIT]["argv"] = ["vllm", "serve", "--max-model-len=1"]

    assert machine.due(plan)["services"] == {
        "m25": "its process has other arguments than the plan's"
    }
    machine.program.cutover(plan)

    assert machine.serves(plan)
    assert machine.argv(machine.pids()[UNIT]) == plan["services"][0]["argv"]


def test_an_interpreter_before_the_arguments_and_a_title_that_passed_are_the_plans(
    machine: Machine,
) -> None:
    plan = machine.plan(NEW, "m25")
    machine.gate = lambda service: machine.processes[UNIT].update(argv=["VLLM::APIServer"])
    machine.program.cutover(plan)

    assert machine.due(plan) == NOTHING
    machine.processes[UNIT]["argv"] = ["python3", *plan["services"][0]["argv"]]
    assert machine.due(plan) == NOTHING


def test_a_service_that_never_passed_is_judged_and_not_restarted(machine: Machine) -> None:
    plan, pids = machine.plan(OLD, "m25"), machine.pids()
    (machine.program.RECORDS / "services" / "m25.json").unlink()
    assert machine.due(plan)["services"] == {"m25": "it has not passed the gate"}

    machine.program.cutover(plan)

    assert machine.serves(plan)
    assert machine.pids() == pids


def test_a_service_that_a_killed_cut_over_left_draining_is_judged(machine: Machine) -> None:
    plan, pids = machine.plan(OLD, "m25"), machine.pids()
    (machine.program.DRAINING / "m25").touch()
    assert machine.due(plan)["services"] == {"m25": "its public port is out of service"}

    machine.program.cutover(plan)

    assert machine.serves(plan)
    assert machine.pids() == pids


# -------------------------------------------------------------------------------------- the proxy


def test_a_changed_configuration_of_nginx_is_put_right_by_a_reload(machine: Machine) -> None:
    plan, pids = machine.plan(OLD, "m25"), machine.pids()
    (machine.program.PROXY / "nginx.conf").write_text(f"# {OLD}\nlocation /metrics …\n")
    assert machine.due(plan)["proxy"].endswith("nginx.conf was changed by hand")

    machine.program.cutover(plan)

    assert machine.serves(plan)
    assert machine.pids() == pids
    assert ("systemctl", "reload", machine.program.PROXY_UNIT) in machine.calls


def test_a_disabled_proxy_is_enabled(machine: Machine) -> None:
    plan, pids = machine.plan(OLD, "m25"), machine.pids()
    machine.disable(machine.program.PROXY_UNIT)
    assert machine.due(plan)["proxy"] == "its unit is not enabled"

    machine.program.cutover(plan)

    assert machine.serves(plan)
    assert machine.pids() == pids


def test_a_proxy_of_another_unit_is_restarted(machine: Machine) -> None:
    plan, unit = machine.plan(OLD, "m25"), machine.program.PROXY_UNIT
    before = machine.pids()
    plan["proxy"] = machine.proxy(NEW)

    machine.program.cutover(plan)

    assert machine.serves(plan)
    assert machine.pids()[unit] != before[unit]
    assert machine.pids()[UNIT] == before[UNIT]


def test_an_nginx_that_keeps_its_old_configuration_fails_the_cut_over(machine: Machine) -> None:
    plan = machine.plan(NEW, "m25")
    plan["proxy"] |= {"stamp": NEW, "sha256": sha256(f"# {NEW}\n")}
    (machine.program.PROXY / f"{NEW}.conf").write_text(f"# {NEW}\n")
    machine.reload_fails = True

    with pytest.raises(machine.program.HostError, match="does not take its configuration 1111"):
        machine.program.cutover(plan)

    assert json.loads((machine.program.RECORDS / "proxy.json").read_text())["stamp"] == OLD
    machine.reload_fails = False
    assert machine.serves(machine.plan(OLD, "m25"))


def test_the_loaded_configuration_is_what_nginx_answers(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket
    import threading

    monkeypatch.setattr(program, "PROXY_RUN", tmp_path)
    assert program.loaded_configuration() is None
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "stamp.sock"))
        server.listen()

        def answer() -> None:
            connection, _ = server.accept()
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 200 OK\r\nServer: nginx\r\n\r\n000000000001\n")
            connection.close()

        threading.Thread(target=answer).start()
        assert program.loaded_configuration() == "000000000001"


# ---------------------------------------------------------------------------- what left the plan


def test_a_service_that_left_the_plan_is_stopped_and_removed(machine: Machine) -> None:
    plan = machine.plan(OLD)
    assert machine.due(plan)["gone"] == ["m25"]

    machine.program.cutover(plan)

    assert machine.serves(plan)
    assert UNIT not in machine.processes
    assert machine.file(UNIT) is None
    assert UNIT not in machine.enabled


def test_a_unit_without_a_record_is_removed_too(machine: Machine) -> None:
    """A first installation lost power while it was judged, and then its service was renamed."""
    orphan = machine.service("old-name", OLD)
    text = (machine.program.SERVICES / "old-name" / OLD / "unit.service").read_text()
    (machine.program.UNITS / orphan["unit"]).write_text(text)
    machine.enable(orphan["unit"])
    machine.start(orphan["unit"])
    plan = machine.plan(OLD, "m25")
    assert machine.due(plan)["gone"] == ["old-name"]

    machine.program.cutover(plan)

    assert machine.serves(plan)
    assert orphan["unit"] not in machine.processes
    assert machine.file(orphan["unit"]) is None


def test_somebody_elses_unit_stays_whatever_its_name(machine: Machine) -> None:
    (machine.program.UNITS / "minimax-exporter.service").write_text("[Unit]\n")

    assert machine.due(machine.plan(OLD, "m25")) == NOTHING


# ------------------------------------------------------------------------------------- going back


def fail(error: Exception) -> Callable[..., Any]:
    def raises(*_: object, **__: object) -> None:
        raise error

    return raises


ODD = [
    TypeError("list indices must be integers or slices, not str"),
    AttributeError("'list' object has no attribute 'get'"),
    OSError(28, "No space left on device"),
    FileNotFoundError(2, "No such file or directory", "systemctl"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    RecursionError("maximum recursion depth exceeded"),
    subprocess.TimeoutExpired("systemctl", 5),
]


@pytest.mark.parametrize("error", ODD, ids=lambda error: type(error).__name__)
def test_whatever_goes_wrong_in_the_gate_the_host_goes_back(
    machine: Machine, error: Exception
) -> None:
    old = machine.plan(OLD, "m25", "other")
    machine.program.cutover(old)

    def gate(service: dict[str, Any]) -> None:
        if (service["name"], service["stamp"]) == ("other", NEW):
            raise error

    machine.gate = gate
    with pytest.raises(machine.program.HostError) as raised:
        machine.program.cutover(machine.plan(NEW, "m25", "other"))

    # m25 passed and was public again when the other one failed.
    assert machine.stopped_in_public == []
    assert str(raised.value).startswith("the cut-over failed and was undone: other: ")
    assert type(error).__name__ in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert machine.serves(old)


@pytest.mark.parametrize("what", ["note_serving", "switch_proxy", "check_port_free"])
def test_a_full_disk_between_stop_and_start_is_no_end(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    real = getattr(machine.program, what)
    full = fail(OSError(28, "No space left on device"))

    def once(*arguments: Any) -> Any:
        monkeypatch.setattr(machine.program, what, real)
        return full()

    monkeypatch.setattr(machine.program, what, once)
    with pytest.raises(
        machine.program.HostError, match=r"undone: OSError: .* No space left"
    ) as caught:
        machine.program.cutover(machine.plan(NEW, "m25"))

    assert len(str(caught.value).splitlines()) == 1
    assert machine.serves(machine.plan(OLD, "m25"))


def test_going_back_writes_nothing_that_is_there_already(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that was full before the units were switched, what served can be started all the same."""
    monkeypatch.setattr(machine.program, "write_atomically", fail(OSError(28, "No space left")))

    with pytest.raises(machine.program.HostError, match="was undone"):
        machine.program.cutover(machine.plan(NEW, "m25"))

    assert machine.serves(machine.plan(OLD, "m25"))


def test_records_that_were_written_before_the_failure_are_taken_back(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = machine.plan(OLD, "m25", "other")
    machine.program.cutover(old)
    note = machine.program.note_serving

    def full_disk(service: dict[str, Any], found: dict[str, Any]) -> None:
        if service["name"] == "other":
            raise OSError(28, "No space left on device")
        note(service, found)

    monkeypatch.setattr(machine.program, "note_serving", full_disk)
    with pytest.raises(machine.program.HostError, match="was undone"):
        machine.program.cutover(machine.plan(NEW, "m25", "other"))

    assert machine.serves(old)


def test_a_host_that_can_neither_go_forward_nor_back_says_so_in_one_line(machine: Machine) -> None:
    machine.gate = fail(TypeError("odd"))

    with pytest.raises(machine.program.HostError) as raised:
        machine.program.cutover(machine.plan(NEW, "m25"))

    assert str(raised.value).startswith("OUT OF SERVICE: the cut-over failed (m25: TypeError: odd")


def test_a_service_that_cannot_go_back_keeps_no_other_from_it(machine: Machine) -> None:
    old = machine.plan(OLD, "m25", "other")
    machine.program.cutover(old)
    new = machine.plan(NEW, "m25", "other")
    (machine.program.SERVICES / "m25" / OLD / "unit.service").unlink()
    machine.gate = lambda service: fail(TypeError("odd"))() if service["stamp"] == NEW else None

    with pytest.raises(machine.program.HostError, match=f"OUT OF SERVICE: .* {OLD}, which served"):
        machine.program.cutover(new)

    assert machine.processes["minimax-other.service"]["stamp"] == OLD
    assert UNIT not in machine.processes


def test_a_failed_first_installation_is_left_stopped(machine: Machine) -> None:
    plan = machine.plan(OLD, "m25", "new")

    def gate(service: dict[str, Any]) -> None:
        if service["name"] == "new":
            raise machine.program.GateError("health", "200", "503")

    machine.gate = gate
    with pytest.raises(machine.program.HostError, match="undone: new: gate, health: expected 200"):
        machine.program.cutover(plan)

    assert machine.serves(machine.plan(OLD, "m25"))
    assert machine.file("minimax-new.service") is None


# ------------------------------------------------------------------------------------------- jobs


@pytest.fixture
def job(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[str, ...]]:
    """Starts a job of a verb; the command that made its unit."""
    monkeypatch.setattr(machine.program, "is_running", lambda unit: False)
    monkeypatch.setattr(machine.program, "wait_for_others", lambda verb, unit: None)
    monkeypatch.setattr(machine.program, "follow", lambda unit, log, code: 0)

    def start(verb: str) -> tuple[str, ...]:
        machine.calls.clear()
        machine.program.job(verb, {"services": []})
        return machine.calls[-1]

    return start


def test_whatever_ends_a_cut_over_its_services_ports_are_public_again(
    machine: Machine, job: Callable[[str], tuple[str, ...]]
) -> None:
    afterwards = [word for word in job("cutover") if "ExecStopPost" in word]

    assert afterwards == ["--property=ExecStopPost=/bin/rm -rf /run/minimax-fleet/draining"]
    assert not [word for word in job("weights") if "ExecStopPost" in word]


def test_a_job_reaches_the_outside_as_the_session_does_and_shows_no_password(
    machine: Machine, job: Callable[[str], tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in machine.program.environment_outside():
        monkeypatch.delenv(name)
    proxy = "http://user:secret@proxy.example:3128"
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    monkeypatch.setenv("no_proxy", "mirror.example")

    command = job("weights")

    assert "secret" not in " ".join(command)
    (told,) = machine.program.JOBS.glob("*.json")
    assert told.stat().st_mode & 0o777 == 0o600
    assert json.loads(told.read_text())["environment"] == {
        "HTTPS_PROXY": proxy,
        "no_proxy": "mirror.example",
    }


def test_a_jobs_environment_is_that_of_the_session_that_asked_for_it(
    machine: Machine, weights: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.delenv("https_proxy", raising=False)
    machine.program.JOBS.mkdir()
    told = {"request": {"a": 1}, "environment": {"https_proxy": "http://proxy.example"}}
    (machine.program.JOBS / "unit.json").write_text(json.dumps(told))
    found: dict[str, Any] = {}
    monkeypatch.setattr(
        weights, "weights", lambda request: found.update(request, proxy=os.environ["https_proxy"])
    )

    assert machine.program.run_job("weights", "unit") == 0
    assert found == {"a": 1, "proxy": "http://proxy.example"}


def test_a_job_that_breaks_says_so_in_one_line(
    machine: Machine, weights: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.program.JOBS.mkdir()
    (machine.program.JOBS / "unit.json").write_text('{"request": {}, "environment": {}}')

    assert machine.program.run_job("weights", "unit") == 1
    assert (machine.program.JOBS / "unit.exit").read_text() == "1"
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "KeyError: 'path' (fleet_weights.py, weights, line " + line.rsplit(" ", 1)[1]


def test_a_host_that_goes_down_for_a_reboot_does_not_end_the_following(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """systemd stops answering before sshd does; the job has ended by itself when it can be asked again."""
    log, code = tmp_path / "log", tmp_path / "exit"
    log.write_text("rebooting this host\n")
    asked: list[str] = []

    def running(unit: str) -> bool:
        asked.append(unit)
        if len(asked) > 1:
            code.write_text("0")
            return False
        raise machine.program.SystemdSilentError("Failed to connect to bus")

    monkeypatch.setattr(machine.program, "LOOK_S", 0)
    monkeypatch.setattr(machine.program, "resume", lambda unit, resumed: None)
    monkeypatch.setattr(machine.program, "pending", lambda unit: False)
    monkeypatch.setattr(machine.program, "is_running", running)

    assert machine.program.follow("minimax-job-cutover-1", log, code) == 0
    assert len(asked) == 2
