"""What happens to a release while it is built: a lost connection, a disk that fills. See also F12."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import requests

from lab import hosts as lab
from lab import topology
from tests.lab.conftest import H20
from tests.lab.site import Site, main_pids, wait_for

HOST = H20[0]
ONLY = ("--limit", HOST)
RARE = "0.30.0"
CONTROL = f"http://{topology.site().address}/_control"
DISK = "/mnt/releases"


@contextmanager
def slow_wheel() -> Iterator[None]:
    """The site's index sends one vLLM's wheel, 60 kB of it, at 4 kB/s."""
    rate = {"mode": "rate", "path_prefix": f"/files/vllm-{RARE}-", "bytes_per_s": 4000}
    requests.post(CONTROL, json=rate, timeout=10).raise_for_status()
    try:
        yield
    finally:
        requests.delete(CONTROL, timeout=10).raise_for_status()


def forget_release(site: Site) -> str:
    """Have the host build the rare version's release anew; where it will be."""
    site.edit("h20", r'"version": "0.33.0"', f'"version": "{RARE}"')
    path = site.plans().plans[HOST].release.path
    forget = "UV_CACHE_DIR=/opt/fleet/releases/.cache /opt/fleet/uv/*/bin/uv -q cache clean vllm"
    lab.ssh(HOST, f"rm -rf {path} && {forget}", check=True)
    return path


def is_fetching(site: Site) -> bool:
    """Has the host asked for the rare wheel?"""
    return any(f"/files/vllm-{RARE}-" in request["path"] for request in lab.requests())


def builds(host: str) -> list[str]:
    listed = "systemctl list-units --plain --no-legend 'minimax-job-release-*'"
    return [line.split()[0] for line in lab.ssh(host, listed, check=True).stdout.splitlines()]


def test_f6_a_build_goes_on_when_ssh_drops_and_the_run_follows_it_again(gpu_site: Site) -> None:
    before = main_pids(HOST)
    path = forget_release(gpu_site)
    lab.clear_requests()

    with slow_wheel():
        run = gpu_site.start("-y", "inventories/lab.py", "deploy.py", *ONLY)
        wait_for(lambda: bool(builds(HOST)), 60, "the build is under way")
        (unit,) = builds(HOST)
        started = lab.ssh(HOST, f"systemctl show -p MainPID --value {unit}").stdout
        # The sessions' own processes; the lab's next ssh is a new one.
        lab.ssh(HOST, "pkill -KILL -f 'sshd: root@notty'")
        assert lab.ssh(HOST, f"systemctl show -p MainPID --value {unit}").stdout == started
        output, _ = run.communicate(timeout=300)

    assert run.returncode == 0, output
    built = lab.ssh(HOST, f"{path}/bin/vllm --version", check=True).stdout.strip()
    assert built == RARE
    assert main_pids(HOST) != before
    assert gpu_site.roll_out_well(*ONLY).changed == 0


@pytest.fixture
def small_disk(gpu_site: Site) -> Iterator[Site]:
    """Releases are on a disk of their own, which looks large enough."""
    lab.ssh(HOST, f"mkdir -p {DISK} && mount -t tmpfs -o size=30g none {DISK}", check=True)
    gpu_site.append("h20", f'paths = {{"releases": "{DISK}/releases"}}')
    yield gpu_site
    # Services that run from it are put back by the next roll-out, and hold it until then.
    lab.ssh(HOST, f"systemctl stop 'minimax-m25-*'; umount {DISK} && rmdir {DISK}", check=True)


def test_f8_a_disk_that_fills_during_a_build_leaves_what_serves_and_the_next_run_goes_on(
    small_disk: Site,
) -> None:
    before = main_pids(HOST)
    path = forget_release(small_disk)
    lab.clear_requests()

    with slow_wheel():
        run = small_disk.start("-y", "inventories/lab.py", "deploy.py", *ONLY)
        wait_for(lambda: is_fetching(small_disk), 60, "the wheel is being fetched")
        used = lab.ssh(HOST, f"df --block-size=1 --output=used {DISK} | tail -1").stdout.strip()
        lab.ssh(HOST, f"mount -o remount,size={int(used) + 8192} {DISK}", check=True)
        output, _ = run.communicate(timeout=300)

    assert run.returncode == 1
    assert "No space left on device" in output
    assert "Traceback" not in output
    assert main_pids(HOST) == before
    lab.ssh(HOST, f"mount -o remount,size=30g {DISK}", check=True)

    small_disk.roll_out_well(*ONLY)

    assert lab.ssh(HOST, f"{path}/bin/vllm --version", check=True).stdout.strip() == RARE
    assert small_disk.roll_out_well(*ONLY).changed == 0
