"""F1: applied again, nothing changes, and it costs next to nothing."""

from __future__ import annotations

import re

from lab import hosts as lab
from tests.lab.conftest import CPU, H20
from tests.lab.site import Site, main_pids, wait_for

REMOTE_COMMANDS = 6
SSHD_COUNTS = "/etc/ssh/sshd_config.d/99-count.conf"


def test_the_second_run_changes_nothing(served: Site) -> None:
    everyone = (*H20, CPU)
    before = {host: main_pids(host) for host in everyone}
    lab.clear_requests()

    run = served.roll_out_well()

    assert run.changed == 0, run.changed_operations()
    assert run.results["totals"]["hosts"] >= len(everyone)
    assert run.results["failed_hosts"] == []
    assert {host: main_pids(host) for host in everyone} == before
    assert lab.requests() == []


def test_a_run_that_changes_nothing_costs_few_remote_commands(served: Site) -> None:
    host = H20[0]
    lab.write_file(host, SSHD_COUNTS, "LogLevel VERBOSE\n")
    lab.ssh(host, "systemctl reload ssh", check=True)
    # sshd starts itself anew, and for a moment nobody listens.
    wait_for(lambda: lab.ssh(host, "true").returncode == 0, 10, "sshd listens again")
    since = lab.ssh(host, "date +%s.%N", check=True).stdout.strip()

    served.roll_out_well("--limit", host)

    log = lab.ssh(host, f"journalctl -u ssh --since @{since} -o cat", check=True).stdout
    lab.ssh(host, f"rm {SSHD_COUNTS} && systemctl reload ssh", check=True)
    sessions = re.findall(r"Starting session: (command|subsystem)", log)
    ours = len(sessions) - 1  # reading the journal is one
    assert 1 <= ours <= REMOTE_COMMANDS, log


def test_a_dry_run_finds_nothing_to_do(served: Site) -> None:
    run = served.pyinfra("--json", "--dry", "inventories/lab.py", "deploy.py")

    assert run.exit_code == 0, run.output
    assert run.plan
    for operation in run.plan:
        assert operation["hosts_with_change"] == [], operation
        assert operation["hosts_with_conditional_change"] == [], operation
