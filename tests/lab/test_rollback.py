"""F13: back to what served before, with every mirror off; and what pruning leaves and takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet.plan import HostPlan
from lab import hosts as lab
from lab.hardware import Mode, Rule
from tests.lab.conftest import H20
from tests.lab.site import Run, Site, argv_of, main_pids, unit_text

HOST = H20[0]
NEXT, OLDER = "0.33.1", "0.30.0"
OTHER_REVISION = "1ab0000000000000000000000000000000002502"
HISTORY = "/var/lib/minimax-fleet/history.json"
RELEASES = "/opt/fleet/releases"
FLEET = str(Path(sys.executable).with_name("fleet"))


@pytest.fixture
def mirrors_off() -> Iterator[Any]:
    """Switches the site host off, when called, until the test's end."""
    yield lambda: lab.stop("site")
    lab.start("site")


def go_back(site: Site, *arguments: str) -> Run:
    command = ("--json", "-y", "inventories/lab.py", "tasks.rollback.apply")
    return site.pyinfra(*command, *arguments)


def serves(plan: HostPlan, host: str) -> bool:
    """Units, processes (argv and stamp), proxy and model are this plan's, and no other service runs."""
    pids = main_pids(host)
    assert set(pids) == {*(service.unit for service in plan.services), "minimax-proxy.service"}
    for service in plan.services:
        pid = pids[service.unit]
        assert unit_text(host, service.unit) == service.unit_text
        assert tuple(argv_of(host, pid)[-len(service.argv) :]) == service.argv
        environment = lab.ssh(host, f"tr '\\0' '\\n' < /proc/{pid}/environ", check=True).stdout
        assert f"FLEET_STAMP={service.stamp}\n" in environment
        shown = lab.ssh(host, f"curl -s http://127.0.0.1:{service.port}/v1/models", check=True)
        assert json.loads(shown.stdout)["data"][0]["id"] == service.model
        assert service.weights.path in service.argv
    for file in plan.proxy_files:
        assert lab.read_file(host, file.path) == file.content
    return True


def status(site: Site, *hosts: str) -> list[str]:
    """The column `gate` of `fleet status`."""
    limits = [word for host in hosts for word in ("--limit", host)]
    command = [FLEET, "status", "inventories/lab.py", "--json", *limits]
    done = subprocess.run(command, cwd=site.folder, capture_output=True, text=True, check=False)
    return [row["gate"] for row in json.loads(done.stdout)]


def test_f13_what_served_before_comes_back_with_every_mirror_off(
    gpu_site: Site, mirrors_off: Any
) -> None:
    gpu_site.roll_out_well("--limit", "h20")
    old = gpu_site.plans().plans[HOST]
    gpu_site.edit("h20", r'"version": "0.33.0"', f'"version": "{NEXT}"')
    gpu_site.roll_out_well("--limit", "h20")
    new = gpu_site.plans().plans[HOST]
    assert serves(new, HOST)
    mirrors_off()

    run = go_back(gpu_site, "--limit", "h20")

    assert run.exit_code == 0, run.output
    waves = [hosts for name, hosts in run.changed_operations().items() if "Wave" in name]
    assert waves == [["h20-01"], ["h20-02"], ["h20-03"]]
    assert all(serves(old, host) for host in H20)
    pids = {host: main_pids(host) for host in H20}
    for gate in status(gpu_site, "h20"):
        assert f"its process is not the plan's; rolled back from {new.release.id} at" in gate

    again = go_back(gpu_site, "--limit", "h20")

    assert again.exit_code == 0, again.output
    assert again.changed == 0, again.changed_operations()
    assert {host: main_pids(host) for host in H20} == pids

    # Forward is what group data says, and needs no mirror either; then the old release goes.
    gpu_site.roll_out_well("--limit", "h20")
    assert all(serves(new, host) for host in H20)
    pids = {host: main_pids(host) for host in H20}
    last = H20[-1]
    lab.ssh(last, f"mv {old.release.path} {old.release.path}.away", check=True)

    refused = go_back(gpu_site, "--limit", "h20")
    lab.ssh(last, f"mv {old.release.path}.away {old.release.path}", check=True)

    assert refused.exit_code == 1
    said = f"[{last}] {old.release.id} cannot serve again: the release {old.release.id} is gone; "
    assert f"{said}change group data back and roll out" in refused.output
    assert {host: main_pids(host) for host in H20} == pids


@pytest.mark.thorough
def test_revision_services_and_ports_of_that_time_come_back(gpu_site: Site) -> None:
    gpu_site.edit("h20", r'"revision": "[0-9a-f]+"', f'"revision": "{OTHER_REVISION}"')
    gpu_site.append("h20", f'reviewed_revisions = ["{OTHER_REVISION}"]')
    gpu_site.roll_out_well("--limit", HOST)
    old = gpu_site.plans().plans[HOST]
    shipped = "f710177d938eff80b684d42c5aa84b382612f21f"
    gpu_site.edit("h20", f'"revision": "{OTHER_REVISION}"', f'"revision": "{shipped}"')
    gpu_site.edit("h20", r'"port": 8000', '"port": 9000')
    gpu_site.append("h20", "services = [services[0] | {'name': 'm25-c'}]")
    gpu_site.roll_out_well("--limit", HOST)
    new = gpu_site.plans().plans[HOST]
    assert serves(new, HOST)
    assert [service.name for service in new.services] == ["m25-c"]

    run = go_back(gpu_site, "--limit", HOST)

    assert run.exit_code == 0, run.output
    assert serves(old, HOST)
    assert go_back(gpu_site, "--limit", HOST).changed == 0
    gpu_site.roll_out_well("--limit", HOST)
    assert serves(new, HOST)
    assert gpu_site.roll_out_well("--limit", HOST).changed == 0


def test_what_does_not_pass_any_more_is_undone_and_ends_the_run(gpu_site: Site) -> None:
    gpu_site.roll_out_well("--limit", "h20-0[12]")
    gpu_site.edit("h20", r'"version": "0.33.0"', f'"version": "{NEXT}"')
    gpu_site.roll_out_well("--limit", "h20-0[12]")
    plan = gpu_site.plans().plans[HOST]
    history = lab.read_file(HOST, HISTORY)
    untouched = main_pids(H20[1])
    lab.misbehave(HOST, Rule(Mode.HANG, version="0.33.0"))

    run = go_back(gpu_site, "--limit", "h20-0[12]")

    assert run.exit_code == 1
    assert "the cut-over failed and was undone: m25-" in run.output
    assert serves(plan, HOST)
    assert lab.read_file(HOST, HISTORY) == history
    assert main_pids(H20[1]) == untouched
    assert status(gpu_site, HOST) == ["passed", "passed"]


@pytest.mark.thorough
def test_hosts_where_the_new_one_never_passed_are_left_alone(gpu_site: Site) -> None:
    """The canary was put back and the wave of the other never came: neither may go further back."""
    both = ("--limit", "h20-0[12]")
    gpu_site.edit("h20", r'"version": "0.33.0"', f'"version": "{OLDER}"')
    gpu_site.roll_out_well(*both)
    gpu_site.edit("h20", rf'"version": "{OLDER}"', '"version": "0.33.0"')
    gpu_site.roll_out_well(*both)
    plan = gpu_site.plans().plans[HOST]
    lab.misbehave(HOST, Rule(Mode.DIE_LOADING, version=NEXT))
    gpu_site.edit("h20", r'"version": "0.33.0"', f'"version": "{NEXT}"')
    assert gpu_site.roll_out(*both).exit_code == 1
    pids = {host: main_pids(host) for host in H20[:2]}

    run = go_back(gpu_site, *both)

    assert run.exit_code == 0, run.output
    assert run.changed == 0, run.changed_operations()
    assert {host: main_pids(host) for host in H20[:2]} == pids
    assert serves(plan, HOST)

    older = go_back(gpu_site, "--data", f"to={OLDER}", *both)

    assert older.exit_code == 0, older.output
    waves = [hosts for name, hosts in older.changed_operations().items() if "Wave" in name]
    assert waves == [["h20-01"], ["h20-02"]]
    assert f"/vllm-{OLDER}-" in argv_of(HOST, main_pids(HOST)["minimax-m25-a.service"])[0]


def test_a_release_that_never_served_and_a_misplaced_to_are_refused(served: Site) -> None:
    pids = main_pids(HOST)

    unknown = served.pyinfra(
        *("-y", "inventories/lab.py", "tasks.rollback.apply", "--limit", HOST),
        *("--data", "to=0.1.0"),
    )
    misplaced = served.pyinfra("-y", "inventories/lab.py", "deploy.py", "--data", "to=0.33.0")

    assert unknown.exit_code == 1
    assert f"[{HOST}] --data to=0.1.0: no such release has served here; " in unknown.output
    assert misplaced.exit_code == 2
    assert "--data to: is for tasks.rollback.apply; leave it out" in misplaced.output
    assert main_pids(HOST) == pids


def releases(host: str) -> set[str]:
    return set(lab.ssh(host, f"ls -A {RELEASES}", check=True).stdout.split())


def test_pruning_takes_what_nothing_needs_and_says_what_it_freed(gpu_site: Site) -> None:
    ids = []
    for version in (OLDER, "0.33.0", NEXT):
        gpu_site.edit("h20", r'"version": "0\.3[0-9.]+"', f'"version": "{version}"')
        gpu_site.roll_out_well("--limit", HOST)
        ids.append(gpu_site.plans().plans[HOST].release.id)
    plan, older, pids = gpu_site.plans().plans[HOST], ids[0], main_pids(HOST)
    # A wheel's size, and what a build leaves that is killed.
    lab.ssh(HOST, f"fallocate -l 200M {RELEASES}/{older}/ballast", check=True)
    lab.ssh(HOST, f"mkdir {RELEASES}/.vllm-9.9.9-0123456789ab.partial", check=True)
    prune = ("inventories/lab.py", "tasks.prune.releases", "--limit", HOST)

    dry = gpu_site.pyinfra("--dry", *prune)

    assert dry.exit_code == 0, dry.output
    assert f"removes {older}: nothing needs it; frees 0.2 GiB" in dry.output
    assert "removes .vllm-9.9.9-0123456789ab.partial: a killed build left it" in dry.output
    assert f"keeps {plan.release.id}: the plan names it" in dry.output
    assert releases(HOST) >= {older, ".vllm-9.9.9-0123456789ab.partial"}

    done = gpu_site.pyinfra("-y", *prune)

    assert done.exit_code == 0, done.output
    assert f"removed {older}: 0.2 GiB" in done.output
    left = releases(HOST)
    assert older not in left
    assert not [name for name in left if name.endswith(".partial")]
    assert {plan.hub_tool.id, *ids[1:]} <= left
    assert main_pids(HOST) == pids
    assert gpu_site.pyinfra("--json", "-y", *prune).changed == 0
    # The way back is there, the one before it is named, and what goes on building finds its cache.
    gone = go_back(gpu_site, "--limit", HOST, "--data", f"to={older}")
    assert gone.exit_code == 1
    assert f"{older} cannot serve again: " in gone.output
    assert go_back(gpu_site, "--limit", HOST).exit_code == 0
    gpu_site.edit("h20", r'"version": "0\.3[0-9.]+"', f'"version": "{OLDER}"')
    gpu_site.roll_out_well("--limit", HOST)
    assert serves(gpu_site.plans().plans[HOST], HOST)
