"""What a killed run, a killed build or a reboot leaves behind is put right by the same command."""

from __future__ import annotations

import pytest

from lab import hosts as lab
from tests.lab.conftest import H20
from tests.lab.site import Site, main_pids, wait_for

KILL_AT = (
    "Starting operation: preflight",
    "Starting operation: system | Program",
    "Starting operation: system | Distribution packages",
    "Starting operation: driver | Driver packages",
    "Starting operation: runtime | Release of huggingface_hub",
    "building",
    "Starting operation: weights",
    "Starting operation: service",
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


def test_f12_a_killed_build_leaves_what_serves_and_is_built_again(gpu_site: Site) -> None:
    host = H20[0]
    before = main_pids(host)
    gpu_site.edit("h20", r'"version": "0.33.0"', '"version": "0.33.1"')
    release = gpu_site.plans().plans[host].release
    gpu_site.kill_when(f"{release.id}: building", "--limit", host)
    lab.ssh(host, "systemctl kill --signal=KILL 'minimax-job-release-*'")

    assert main_pids(host) == before
    assert lab.ssh(host, f"test -e {release.path}").returncode == 1
    hub_before = lab.ssh(host, f"stat -c %Y {gpu_site.plans().plans[host].hub_tool.path}").stdout

    gpu_site.roll_out_well("--limit", host)

    assert lab.ssh(host, f"{release.path}/bin/vllm --version").stdout.strip() == "0.33.1"
    assert (
        lab.ssh(host, f"stat -c %Y {gpu_site.plans().plans[host].hub_tool.path}").stdout
        == hub_before
    )


def test_f15_a_host_serves_again_after_a_reboot(served: Site) -> None:
    host = H20[1]

    lab.reboot(host)

    def serves() -> bool:
        return (
            served.pyinfra(
                "-y", "inventories/lab.py", "tasks.health.check", "--limit", host
            ).exit_code
            == 0
        )

    wait_for(serves, 60, f"{host} serves again")
    assert served.roll_out_well("--limit", host).changed == 0


def test_power_loss_is_like_a_reboot(served: Site) -> None:
    host = H20[1]

    lab.crash(host)
    lab.start(host)

    wait_for(
        lambda: set(main_pids(host)) >= {"minimax-m25-a.service", "minimax-m25-b.service"},
        60,
        f"{host} runs its services again",
    )
    served.roll_out_well("--limit", host)
