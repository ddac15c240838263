"""What a killed run, a killed build or a reboot leaves behind is put right by the same command."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import requests
from _pytest.mark import ParameterSet

from lab import hosts as lab
from lab import topology
from lab.hardware import Mode, Rule
from tests.lab.conftest import H20
from tests.lab.site import Site, main_pids, wait_for

# A version that no other test installs.
RARE = "0.30.0"
NEXT = "0.33.1"


def thorough(point: str) -> ParameterSet:
    """A point of which others are like enough for every day: see `make test-thorough`."""
    return pytest.param(point, marks=pytest.mark.thorough)


KILL_AT = (
    thorough("Starting operation: preflight"),
    thorough("Starting operation: system | Program"),
    "Starting operation: system | Distribution packages",
    thorough("Starting operation: driver | Driver packages"),
    thorough("Starting operation: runtime | Release of huggingface_hub"),
    "building",
    thorough("Starting operation: weights"),
    thorough("Starting operation: service"),
    "Starting operation: rollout | Wave 1",
    "started m25-a",
)


@pytest.mark.parametrize("point", KILL_AT)
def test_a_run_killed_anywhere_is_finished_by_the_next(site: Site, point: str) -> None:
    host = H20[-1]
    lab.reset(host)

    site.kill_when(point, "--limit", host)
    site.roll_out_well("--limit", host)

    assert site.roll_out_well("--limit", host).changed == 0
    assert converged(site, host)


HEALTH = ("-y", "inventories/lab.py", "tasks.health.check")
UPGRADE_KILL_AT = (
    thorough("Starting operation: service"),
    "draining and stopping",
    thorough("started m25-a"),
    "putting this host back",
)


@pytest.fixture(scope="module")
def upgraded(served: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site whose host is upgraded again and again, and left so by each test for the next."""
    site = Site(tmp_path_factory.mktemp("upgraded"))
    site.set_in_services("h20", '"gate": {"ready_timeout_s": 25, "answer_timeout_s": 6}')
    site.set_in_services("h20", '"max_model_len": 100000')
    yield site
    lab.behave(H20[0])
    served.roll_out_well("--limit", H20[0])


@pytest.mark.parametrize("point", UPGRADE_KILL_AT)
def test_an_upgrade_killed_anywhere_leaves_one_that_serves_and_is_finished_by_the_next(
    upgraded: Site, point: str
) -> None:
    host = H20[0]
    # Of each point its own: hosts that have it already would change nothing.
    length = 100000 + len(point)
    upgraded.edit("h20", r'"max_model_len": \d+', f'"max_model_len": {length}')
    if point == "putting this host back":
        lab.misbehave(host, Rule(Mode.DIE_LOADING, version=NEXT))
        upgraded.edit("h20", r'"version": "0.33.0"', f'"version": "{NEXT}"')

    upgraded.kill_when(point, "--limit", host)
    lab.behave(host)
    # What was begun on the host goes on there: it ends with the old or the new, and either serves.
    wait_for(lambda: not jobs(host), 90, "the host finishes what it had begun")
    answered = upgraded.pyinfra(*HEALTH, "--limit", host)
    assert answered.exit_code == 0, answered.output

    upgraded.roll_out_well("--limit", host)

    assert upgraded.roll_out_well("--limit", host).changed == 0
    assert converged(upgraded, host)


def jobs(host: str) -> list[str]:
    """Long verbs that are under way."""
    listed = lab.ssh(host, "systemctl list-units --plain --no-legend 'minimax-job-*'", check=True)
    return listed.stdout.splitlines()


def converged(site: Site, host: str) -> bool:
    """Every service of the plan, and none but them, runs under the plan's stamp."""
    pids = main_pids(host)
    services = site.plans().plans[host].services
    assert set(pids) == {*(service.unit for service in services), "minimax-proxy.service"}
    for service in services:
        pid = pids[service.unit]
        environment = lab.ssh(host, f"tr '\\0' '\\n' < /proc/{pid}/environ", check=True).stdout
        assert f"FLEET_STAMP={service.stamp}\n" in environment
    return True


CUT_OFF_AT = ("draining and stopping", "started m25-a")


@pytest.mark.parametrize("point", CUT_OFF_AT)
def test_f6_a_run_whose_connection_is_cut_in_a_cut_over_goes_on_by_another(
    upgraded: Site, point: str
) -> None:
    host = H20[0]
    length = 110000 + CUT_OFF_AT.index(point)
    upgraded.edit("h20", r'"max_model_len": \d+', f'"max_model_len": {length}')
    process = upgraded.start("-y", "inventories/lab.py", "deploy.py", "--limit", host)
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if point in line:
            # Every session's sshd, this one's own among them; the listener is called otherwise.
            lab.ssh(host, "pkill -KILL --full 'sshd: root'")

    said = "".join(printed)
    assert process.wait() == 0, said
    assert "the connection is lost; the host goes on by itself" in said
    assert "connected again after" in said
    # The job was not begun twice, and none of its lines came twice or never.
    for line in ("draining and stopping", "started m25-a", "m25-a serves: ready"):
        assert said.count(line) == 1, said
    assert upgraded.roll_out_well("--limit", host).changed == 0
    assert converged(upgraded, host)


@pytest.fixture
def slow_wheel() -> Iterator[None]:
    """The site's index stalls in the middle of one vLLM's wheel, once."""
    control = f"http://{topology.site().address}/_control"
    stall = {"mode": "stall", "path_prefix": f"/files/vllm-{RARE}", "after_bytes": 100, "times": 1}
    requests.post(control, json={**stall, "seconds": 600}, timeout=10).raise_for_status()
    yield
    requests.delete(control, timeout=10).raise_for_status()


def test_f12_a_killed_build_leaves_what_serves_and_is_built_again(
    gpu_site: Site, slow_wheel: None
) -> None:
    host = H20[0]
    before = main_pids(host)
    gpu_site.edit("h20", r'"version": "0.33.0"', f'"version": "{RARE}"')
    plan = gpu_site.plans().plans[host]
    forget = "UV_CACHE_DIR=/opt/fleet/releases/.cache /opt/fleet/uv/*/bin/uv -q cache clean vllm"
    lab.ssh(host, f"rm -rf {plan.release.path} && {forget}", check=True)
    gpu_site.kill_when(f"{plan.release.id}: building", "--limit", host)
    partial = f"/opt/fleet/releases/.{plan.release.id}.partial"
    wait_for(lambda: exists(host, f"{partial}/bin"), 20, "the build is under way")

    lab.ssh(host, "systemctl kill --signal=KILL 'minimax-job-release-*'", check=True)

    assert main_pids(host) == before
    assert not exists(host, plan.release.path)
    assert exists(host, partial)
    hub_tool = built_at(host, plan.hub_tool.path)

    gpu_site.roll_out_well("--limit", host)

    version = lab.ssh(host, f"{plan.release.path}/bin/vllm --version", check=True).stdout
    assert version.strip() == RARE
    assert built_at(host, plan.hub_tool.path) == hub_tool
    assert not exists(host, partial)


def exists(host: str, path: str) -> bool:
    return lab.ssh(host, f"test -e {path}").returncode == 0


def built_at(host: str, release: str) -> float:
    return float(json.loads(lab.read_file(host, f"{release}/fleet-release.json"))["built_at"])


def wait_until_it_serves(site: Site, host: str) -> None:
    """Waits for the gate, from the control machine, as after any start of a host."""
    health = (*HEALTH, "--limit", host)
    wait_for(lambda: site.pyinfra(*health).exit_code == 0, 60, f"{host} serves again")


def test_f15_a_host_serves_again_after_a_reboot(served: Site) -> None:
    host = H20[1]

    lab.reboot(host)

    wait_until_it_serves(served, host)
    assert served.roll_out_well("--limit", host).changed == 0


def test_power_loss_is_like_a_reboot(served: Site) -> None:
    host = H20[1]

    lab.crash(host)
    lab.start(host)

    wait_until_it_serves(served, host)
    assert served.roll_out_well("--limit", host).changed == 0


def test_a_python_that_services_cannot_read_is_refused_and_what_serves_goes_on(
    gpu_site: Site,
) -> None:
    host = H20[0]
    before = main_pids(host)
    lab.ssh(host, "cp /usr/bin/python3 /root/python3", check=True)
    gpu_site.edit("h20", r'"version": "0.33.0"', '"version": "0.33.0", "python": "/root/python3"')

    run = gpu_site.roll_out("--limit", host)
    lab.ssh(host, "rm /root/python3", check=True)

    assert run.exit_code == 1
    assert "its Python is /root/python3, where no service may look" in run.output
    assert main_pids(host) == before
