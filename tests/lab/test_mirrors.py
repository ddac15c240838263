"""Mirrors that ask who one is: credentials come from a file, and are seen by nobody."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests

from lab import hosts as lab
from lab import topology
from lab.site import sources
from tests.lab.conftest import H20
from tests.lab.site import Site

HOST = H20[0]
ONLY = ("--limit", HOST)
ADDRESS = topology.site().address
CONTROL = f"http://{ADDRESS}/_control"
PASSWORD = "s3cr3t-of-the-mirror"
ASKING = ("/git/", "/nightly/", "/simple/", "/files/", "/apt/debian/")


@pytest.fixture
def asking(gpu_site: Site) -> Iterator[Site]:
    """The index, the nightly builds, git and apt want a user and a password, which a file has."""
    for prefix in ASKING:
        fault = {"mode": "login", "path_prefix": prefix, "token": f"fetch:{PASSWORD}"}
        requests.post(CONTROL, json=fault, timeout=10).raise_for_status()
    (gpu_site.folder / "netrc").write_text(f"machine {ADDRESS} login fetch password {PASSWORD}\n")
    commit = sources.commits()["new"]
    vllm = {"channel": "source", "version": "0.33.1", "commit": commit, "packages": ["six==1.17.0"]}
    gpu_site.edit("h20", r"(?m)^vllm = .*$", f"vllm = {vllm!r}")
    release = gpu_site.plans().plans[HOST].release.path
    lab.ssh(HOST, f"rm -rf {release} /opt/fleet/releases/.cache", check=True)
    gpu_site.append("h20", 'packages = ["aria2"]')
    lab.ssh(HOST, "apt-get -q -y purge aria2", check=True)
    yield gpu_site
    requests.delete(CONTROL, timeout=10).raise_for_status()


def test_mirrors_with_a_password_serve_whoever_has_it_and_it_shows_nowhere(asking: Site) -> None:
    refused = asking.roll_out(*ONLY)

    assert refused.exit_code == 1
    assert "401" in refused.output

    asking.edit("lab", r"mirrors = \{", 'mirrors = {"credentials": {"file": "netrc"},')
    run = asking.pyinfra("-y", "-vvv", "--diff", "inventories/lab.py", "deploy.py", *ONLY)

    assert run.exit_code == 0, run.output
    assert PASSWORD not in run.output
    look = f"grep -rlF {PASSWORD} /etc /var /run /opt/fleet /root /tmp 2>/dev/null"
    having = lab.ssh(HOST, look).stdout.split()
    assert sorted(having) == ["/etc/apt/auth.conf.d/minimax.conf", "/etc/minimax/fetch/.netrc"]
    for path in having:
        assert lab.ssh(HOST, f"stat -c '%a %U' {path}").stdout.strip() == "600 root"
    assert PASSWORD not in lab.ssh(HOST, "journalctl --no-pager").stdout
    assert asking.roll_out_well(*ONLY).changed == 0

    # What leaves group data leaves the host.
    asking.edit("lab", r'"credentials": \{"file": "netrc"\},', "")
    asking.roll_out_well(*ONLY)
    assert lab.ssh(HOST, look).stdout == ""
