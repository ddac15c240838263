"""The benchmark's own parts: accounts, statistics, what it reads from logs, tables and picture."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from bench import BenchError, chart, report, results
from bench.ansible import PLAYBOOK, differences, host_variables, not_a_no_op, service_user
from bench.labhosts import count_sessions
from bench.measuring import METER, Meter, Sample, Series
from bench.measuring import Command as Measured
from bench.ours import changes
from bench.results import Part, Results
from fleet.plan import RECORDS, File, HostPlan
from fleet.render import repository_file
from tests.unit.state import converged, plan_of, service


def series(*wall_s: float, sessions: float | None = None) -> Series:
    return Series(tuple(Sample(wall, wall / 2, 40.0, wall / 4) for wall in wall_s), sessions)


def part(hosts: int = 4, ours_s: float = 1.0) -> Part:
    return Part(
        hosts,
        floor={
            results.SSH_TRUE: series(0.2),
            results.PROBE: series(0.3, 0.1, 0.2),
            results.START_UP: series(0.4),
            results.EMPTY_DEPLOY: series(0.5),
        },
        first={results.OURS: series(30), "Ansible, mitogen": series(45)},
        no_op={
            results.OURS: series(ours_s, sessions=2),
            "Ansible, mitogen": series(11.0, sessions=1),
            "Ansible, pipelining": series(9.0, 8.0, 20.0, sessions=60),
            "Ansible, as it comes": Series(error="it did not work\nat all"),
        },
    )


def measured(*parts: Part) -> Results:
    return Results("2026-01-02T03:04:05+00:00", "abc1234", {"cores": "2"}, {"pyinfra": "3"}, parts)


# -- statistics and goals ------------------------------------------------------------------------


def test_a_series_has_median_and_range_of_its_samples() -> None:
    runs = series(9.0, 8.0, 20.0)

    assert (runs.wall_s, runs.fastest_s, runs.slowest_s) == (9.0, 8.0, 20.0)
    assert (runs.cpu_s, runs.peak_mib, runs.hosts_cpu_s) == (4.5, 40.0, 2.25)


def test_hosts_cpu_is_unknown_where_no_sample_has_it() -> None:
    assert Series((Sample(1, 1, 1, None),)).hosts_cpu_s is None


def test_goals_are_ratios_of_medians() -> None:
    floor, ansible = measured(part(ours_s=1.2)).goals()

    assert floor.ratio == pytest.approx(1.2 / (0.2 + 0.4))
    assert floor.met is True
    assert ansible.ratio == pytest.approx(1.2 / 9.0)  # its best is pipelining, not mitogen
    assert ansible.met is False


def test_a_goal_without_a_measurement_is_neither_met_nor_missed() -> None:
    alone = replace(part(), no_op={results.OURS: series(1.0)})

    assert [goal.met for goal in measured(alone).goals()] == [True, None]


def test_what_is_to_come_is_predicted_from_the_last_measurement() -> None:
    before = measured(part(1), part(4))

    assert before.predicted_s("no_op", "Ansible, pipelining", 20) == pytest.approx(9.0 * 5)
    assert before.predicted_s("first", "Ansible, mitogen", 20) == pytest.approx(45.0 * 5)
    assert before.predicted_s("no_op", "Ansible, as it comes", 20) == 0.0


def test_results_are_read_as_they_were_saved(tmp_path: Path) -> None:
    before = measured(part(1), part(20))

    before.save(tmp_path / "results.json")

    assert results.load(tmp_path / "results.json") == before


# -- what is read from logs ----------------------------------------------------------------------

RECAP = """\
PLAY RECAP *********************************************************************
h20-01                     : ok=27   changed=0    unreachable=0    failed=0    skipped=5
h20-02                     : ok=27   changed={changed}    unreachable=0    failed=0    skipped=5
"""


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (RECAP.format(changed=0), None),
        (RECAP.format(changed=2), "h20-02: changed=2"),
        ("", "h20-01 is not in the recap"),
    ],
)
def test_ansible_must_say_of_each_host_that_nothing_changed(
    output: str, problem: str | None
) -> None:
    assert not_a_no_op(output, ["h20-01", "h20-02"]) == problem


def pyinfra_json(**totals: int) -> str:
    counted = {"hosts": 2, "success": 0, "error": 0} | totals
    document = {"results": {"totals": counted, "failed_hosts": [], "operations": []}}
    return f"--> a warning\n{json.dumps(document, indent=2)}\n"


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (pyinfra_json(), None),
        (pyinfra_json(success=1), "1 operations changed something, 0 failed"),
        (pyinfra_json(hosts=1), "1 hosts in place of 2"),
        ("error: no such file", "no results as JSON"),
    ],
)
def test_our_no_op_must_say_that_nothing_changed(output: str, problem: str | None) -> None:
    assert changes(output, host_count=2) == problem


def test_sessions_are_counted_whatever_is_run_in_them() -> None:
    log = """\
Accepted publickey for root from 10.86.0.1 port 1 ssh2: ED25519 SHA256:x
Starting session: command for root from 10.86.0.1 port 1 id 0
Starting session: subsystem 'sftp' for root from 10.86.0.1 port 1 id 1
Close session: user root from 10.86.0.1 port 1 id 0
"""
    assert count_sessions(log) == 2


# -- tables and picture --------------------------------------------------------------------------


def test_tables_replace_what_is_between_the_markers_and_nothing_else() -> None:
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"

    text = report.replaced(page, "new")

    assert text == f"before\n{report.BEGIN}\n\nnew\n{report.END}\nafter\n"


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(BenchError, match="markers are missing"):
        report.replaced("no markers", "new")


def test_the_shipped_page_has_the_markers() -> None:
    report.replaced(repository_file("docs/benchmarks.md"), "new")


def test_tables_say_what_was_measured() -> None:
    text = report.tables(measured(part(ours_s=1.0)))

    assert "Measured on 2026-01-02, commit abc1234." in text
    assert "| 4 | no-op ÷ Ansible's best no-op | 0.11 | ≤ 0.1 | **not met** |" in text
    assert "| 4 | **minimax-fleet** | 1.00 | 1.00–1.00 | 1 | 1.7 | 0.11 |" in text
    assert "| 4 | Ansible, pipelining | 9.00 | 8.00–20.00 | 3 | 15.0 | 1.00 |" in text
    assert "- 4 hosts, Ansible, as it comes, no-op: it did not work" in text


def test_every_row_of_a_table_has_as_many_cells_as_its_header() -> None:
    blocks = report.tables(measured(part(1), part(20))).split("\n\n")
    for table in (block for block in blocks if block.startswith("|")):
        assert len({row.count("|") for row in table.splitlines()}) == 1, table


def test_the_picture_is_well_formed_and_has_a_bar_for_each_run() -> None:
    drawn = ElementTree.fromstring(chart.svg(measured(part(1), part(20))))

    bars = [rect for rect in drawn.findall(".//{*}rect") if rect.get("rx")]
    assert len(bars) == 2 * 6
    longest = max(bars, key=lambda rect: float(rect.get("width", 0)))
    assert float(longest.get("x", 0)) + float(longest.get("width", 0)) < chart.WIDTH


def test_an_axis_is_logarithmic() -> None:
    axis = chart.LogAxis(0.2, 90)

    assert (axis.first, axis.last) == (-1, 2)
    assert axis.x(10) - axis.x(1) == pytest.approx(axis.x(1) - axis.x(0.1))


# -- the playbook and its variables --------------------------------------------------------------


def site_plan() -> HostPlan:
    return plan_of(service(), mirrors={"index": "http://10.86.0.2/simple"})


def test_variables_come_from_the_plan() -> None:
    plan = site_plan()
    kept: list[str] = []

    def keep(file: File) -> str:
        kept.append(file.path)
        return f"/files{file.path}"

    variables = host_variables(plan, keep)

    assert variables["user"]["name"] == "minimax"
    assert variables["units"] == ["minimax-m25.service", "minimax-proxy.service"]
    assert f"{plan.release.path}/bin/vllm" in [item["program"] for item in variables["releases"]]
    assert RECORDS not in [item["path"] for item in variables["directories"]]
    assert "/etc/systemd/system/minimax-m25.service" in kept
    assert variables["driver"]["version"] == "580.95.05"


def test_every_variable_is_used_by_the_playbook() -> None:
    text = PLAYBOOK.read_text(encoding="utf-8")
    for name in host_variables(site_plan(), lambda file: file.path):
        assert name in text, name


def test_the_playbook_uses_modules_of_ansible_core_by_their_full_names() -> None:
    (play,) = yaml.safe_load(PLAYBOOK.read_text(encoding="utf-8"))
    known = {"name", "loop", "loop_control", "register", "when", "notify", "until", "retries"}
    known |= {"delay", "environment", "changed_when", "failed_when", "delegate_to"}
    for task in (*play["tasks"], *play["handlers"]):
        (module,) = task.keys() - known
        assert module.startswith("ansible.builtin."), task["name"]


def test_a_service_with_a_key_is_refused() -> None:
    plan = site_plan()
    keyed = replace(plan, services=(replace(plan.services[0], api_key="secret"),))

    with pytest.raises(BenchError, match="API key"):
        host_variables(keyed, lambda file: file.path)


def test_user_is_read_from_the_file_that_declares_it() -> None:
    user = service_user('# comment\nu someone - "Some one" /home/x /bin/false\n')

    assert user == ("someone", "Some one", "/home/x", "/bin/false")


def test_a_converged_host_does_not_differ() -> None:
    plan = plan_of(service())

    assert list(differences(plan, converged(plan))) == []


def test_our_own_program_and_records_are_not_asked_of_ansible() -> None:
    plan = plan_of(service())
    seen = converged(plan)
    seen["records"] = {}
    for path in seen["files"]:
        if path.startswith(("/usr/local/lib/", "/etc/minimax/", "/etc/sysusers.d/")):
            seen["files"][path] = None
    seen["directories"][RECORDS] = None

    assert list(differences(plan, seen)) == []


def test_what_differs_is_named() -> None:
    plan = plan_of(service())
    seen = converged(plan)
    seen["files"]["/etc/sysctl.d/60-minimax.conf"] = None
    seen["units"]["minimax-m25.service"]["stamp"] = "another"
    seen["packages"]["git"] = None

    assert list(differences(plan, seen)) == [
        "/etc/sysctl.d/60-minimax.conf differs",
        "packages, their versions or holds differ",
        "minimax-m25.service does not run as planned",
    ]


# -- the meter -----------------------------------------------------------------------------------


def account(*argv: list[str], log: Path, limit_s: int = 20) -> dict[str, Any]:
    commands = [{"argv": words, "stdin": None, "log": str(log)} for words in argv]
    done = subprocess.run(
        [sys.executable, "-I", METER],
        input=json.dumps({"commands": commands, "limit_s": limit_s}),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_commands_run_at_once_and_each_exit_code_is_told(tmp_path: Path) -> None:
    found = account(["sleep", "0.4"], ["sh", "-c", "echo out; exit 3"], log=tmp_path / "log")

    assert found["exit_codes"] == [0, 3]
    assert 0.4 <= found["wall_s"] < 5
    assert (tmp_path / "log").read_text() == "out\n"


def test_what_a_command_leaves_behind_is_ended_and_counted(tmp_path: Path) -> None:
    # Given a command that ends at once and leaves a busy process in a session of its own,
    pid = tmp_path / "pid"
    busy = f"setsid sh -c 'echo $$ >{pid}; while :; do :; done' & sleep 1"

    found = account(["sh", "-c", busy], log=tmp_path / "log")

    assert found["cpu_s"] > 0.1
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


def test_a_limit_ends_what_takes_too_long(tmp_path: Path) -> None:
    found = account(["sleep", "60"], log=tmp_path / "log", limit_s=1)

    assert found["timed_out"]
    assert found["wall_s"] < 10


def test_a_failing_command_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    meter = Meter(tmp_path, lambda line: None, lambda: None)

    with pytest.raises(BenchError, match=r"(?s)try: failed.*it broke"):
        meter.run("try", [Measured(["sh", "-c", "echo it broke; exit 1"])], cwd=tmp_path)


def test_long_series_are_cut_short_but_never_to_nothing(tmp_path: Path) -> None:
    meter = Meter(tmp_path, lambda line: None, lambda: 1.0)

    samples = meter.series("true", 3, [Measured(["true"])], cwd=tmp_path, at_most_s=0.0)

    assert len(samples) == 1
    assert samples[0].hosts_cpu_s == 0.0
