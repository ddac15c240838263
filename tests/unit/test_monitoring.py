"""The exporter of GPU metrics: what is planned of it, what a host is told, and when nothing is."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from rich.text import Text

from fleet import show
from fleet.compare import exporter_differs
from fleet.drivers import DCGM_EXPORTER_UNIT
from fleet.inventory import load
from fleet.plan import EXPORTER_DROP_IN
from fleet.preflight import problems
from fleet.spec import DcgmExporter
from tests.unit.state import converged, plan_of, planned, service

ROOT = Path(__file__).resolve().parents[2]
ON = plan_of(service(), dcgm_exporter=True)
OFF = plan_of(service())
CHOSEN = {"address": "0.0.0.0", "port": 9500}


# ---------------------------------------------------------------------------------------- planned


def test_it_listens_on_loopback_unless_the_site_says_where() -> None:
    assert ON.exporter == DcgmExporter(address="127.0.0.1", port=9400)
    chosen = DcgmExporter(address="0.0.0.0", port=9500)
    assert plan_of(service(), dcgm_exporter=CHOSEN).exporter == chosen
    assert OFF.exporter is None
    assert plan_of(service(), dcgm_exporter=False).exporter is None


@pytest.mark.parametrize(
    ("address", "listen", "reachable"),
    [
        ("127.0.0.1", "127.0.0.1:9400", "127.0.0.1"),
        ("0.0.0.0", "0.0.0.0:9400", "127.0.0.1"),
        ("192.0.2.1", "192.0.2.1:9400", "192.0.2.1"),
        ("::", "[::]:9400", "::1"),
        ("2001:db8::1", "[2001:db8::1]:9400", "2001:db8::1"),
    ],
)
def test_the_host_asks_it_where_it_listens(address: str, listen: str, reachable: str) -> None:
    exporter = DcgmExporter(address=address)

    assert (exporter.listen, exporter.reachable) == (listen, reachable)


@pytest.mark.parametrize("address", ["localhost", "10.0.0", "*", ""])
def test_an_address_is_an_ip_address(address: str) -> None:
    with pytest.raises(ValidationError, match="is no IP address; write for example"):
        DcgmExporter(address=address)


def test_a_host_without_gpus_has_no_metrics_of_them() -> None:
    on_cpu = service(recipe="cpu", gpus=[])
    plan, found = planned(on_cpu, gpu=None, gpu_count=0, driver=None, dcgm_exporter=True)

    assert plan is None
    assert "group_data/h20.py: dcgm_exporter: this host has no GPUs; leave it out" in found


@pytest.mark.parametrize("port", [8000, 18000], ids=["public", "engine"])
def test_its_port_is_no_services(port: int) -> None:
    plan, found = planned(service(), dcgm_exporter={"port": port})

    assert plan is None
    assert f"dcgm_exporter.port: port {port} is used by 'm25' too" in "\n".join(found)


def test_another_address_is_another_stamp() -> None:
    assert ON.exporter_stamp != plan_of(service(), dcgm_exporter=CHOSEN).exporter_stamp
    assert ON.exporter_file is not None
    assert f"FLEET_STAMP={ON.exporter_stamp}\n" in ON.exporter_file.content
    assert "DCGM_EXPORTER_LISTEN=127.0.0.1:9400\n" in ON.exporter_file.content


def test_services_do_not_change_by_it() -> None:
    assert [unit.stamp for unit in ON.services] == [unit.stamp for unit in OFF.services]


def test_the_plan_shows_where_metrics_are(tmp_path: Path) -> None:
    (tmp_path / "inventories").mkdir()
    (tmp_path / "group_data").mkdir()
    (tmp_path / "inventories" / "site.py").write_text('h20 = ["a"]\n')
    shipped = (ROOT / "group_data" / "h20.py").read_text()
    more = f'dcgm_exporter = {CHOSEN}\ncuda_toolkit = "12.9"\n'
    (tmp_path / "group_data" / "h20.py").write_text(shipped + more)

    shown = [
        str(line)
        for line in show.site(load(tmp_path / "inventories" / "site.py", cwd=tmp_path))
        if isinstance(line, Text)
    ]

    assert "  metrics  0.0.0.0:9500" in shown
    assert "  toolkit  CUDA 12.9" in shown


# ---------------------------------------------------------------------------------------- compared


def test_one_that_runs_as_planned_is_left_alone() -> None:
    assert not exporter_differs(ON, converged(ON))
    assert not exporter_differs(OFF, converged(OFF))


@pytest.mark.parametrize(
    "change",
    [
        {"active": "failed"},
        {"stamp": "of before"},
        {"stamp": None},
        {"enabled": False},
        {"needs_reload": True},
    ],
    ids=["failed", "older process", "not ours", "not enabled", "edited"],
)
def test_one_that_does_not_run_as_planned_is_put_right(change: dict[str, Any]) -> None:
    seen = converged(ON)
    seen["units"][DCGM_EXPORTER_UNIT].update(change)

    assert exporter_differs(ON, seen)


def test_one_that_lacks_a_package_or_its_file_is_put_right() -> None:
    seen = converged(ON)
    seen["packages"]["datacenter-gpu-manager-exporter"] = None
    assert exporter_differs(ON, seen)
    seen = converged(ON)
    seen["files"][EXPORTER_DROP_IN] = None
    assert exporter_differs(ON, seen)


def test_what_is_not_wanted_any_more_is_ended_and_what_is_not_ours_is_not() -> None:
    """A site may run the exporter without us: then there is no file of ours beside its unit."""
    assert exporter_differs(OFF, converged(ON))
    elsewhere = converged(OFF)
    elsewhere["units"][DCGM_EXPORTER_UNIT].update(active="active", stamp=None)

    assert not exporter_differs(OFF, elsewhere)


def test_a_port_that_somebody_else_holds_is_told_beforehand() -> None:
    seen = converged(ON)
    holder = {"pid": 4711, "command": "node_exporter", "unit": "node-exporter.service"}
    seen["ports"]["9400"] = holder

    (message,) = problems(ON, seen, 0.0)

    assert "port 9400 for the exporter of GPU metrics is held by PID 4711" in message
    seen["ports"]["9400"] = {**holder, "unit": DCGM_EXPORTER_UNIT}
    assert problems(ON, seen, 0.0) == []


# -------------------------------------------------------------------------------------------- told


class Exporter:
    """systemd and the exporter of a host; what they were told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.state: dict[str, Any] = {
            "active": "active",
            "stamp": ON.exporter_stamp,
            "result": "success",
            "loaded": True,
        }

    def run(self, *argv: str, **_: Any) -> SimpleNamespace:
        self.told.append(" ".join(argv))
        return SimpleNamespace(stdout="", stderr="", returncode=0)


@pytest.fixture
def exporter(
    program: ModuleType, packages: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Exporter:
    exporter = Exporter()
    monkeypatch.setattr(program, "run", exporter.run)
    monkeypatch.setattr(program, "unit_state", lambda unit: exporter.state)
    monkeypatch.setattr(program, "journal", lambda unit: [f"journal of {unit}"])
    monkeypatch.setattr(packages, "packages", lambda request: exporter.told.append("packages"))
    monkeypatch.setattr(packages, "EXPORTER_TIMEOUT_S", 0)
    monkeypatch.setattr(packages.time, "sleep", lambda _: None)
    return exporter


def request(folder: Path, plan: Any = ON) -> dict[str, Any]:
    return {**plan.exporter_request(), "drop_in": str(folder / "minimax.conf")}


def test_it_is_installed_then_configured_then_started(
    packages: ModuleType, exporter: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "exporter_problem", lambda request: None)

    packages.exporter(request(tmp_path))

    unit = DCGM_EXPORTER_UNIT
    assert exporter.told == [
        "packages",
        "systemctl daemon-reload",
        f"systemctl enable --quiet {unit}",
        f"systemctl reset-failed {unit}",
        f"systemctl restart {unit}",
    ]
    assert (tmp_path / "minimax.conf").read_text() == request(tmp_path)["content"]


def test_one_that_does_not_answer_is_an_error_with_its_journal(
    program: ModuleType, packages: ModuleType, exporter: Exporter, tmp_path: Path
) -> None:
    exporter.state["active"] = "activating"

    with pytest.raises(program.HostError, match=r"activating, success\njournal of nvidia-dcgm"):
        packages.exporter(request(tmp_path))


def test_ours_is_ended_and_its_file_is_gone(
    packages: ModuleType, exporter: Exporter, tmp_path: Path
) -> None:
    (tmp_path / "minimax.conf").write_text("ours")

    packages.exporter(request(tmp_path, OFF))

    assert exporter.told == [
        f"systemctl disable --quiet --now {DCGM_EXPORTER_UNIT}",
        "systemctl daemon-reload",
    ]
    assert not (tmp_path / "minimax.conf").exists()


def test_a_file_that_was_left_without_the_package_is_taken_away(
    packages: ModuleType, exporter: Exporter, tmp_path: Path
) -> None:
    exporter.state["loaded"] = False
    (tmp_path / "minimax.conf").write_text("ours")

    packages.exporter(request(tmp_path, OFF))

    assert exporter.told == ["systemctl daemon-reload"]
    assert not (tmp_path / "minimax.conf").exists()
