"""A host that cannot become what its plan says is refused, with all that is wrong, before any is changed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import hosts as lab
from tests.lab.conftest import H20
from tests.lab.site import Site, main_pids, written

HOST = H20[0]
SMALL = "/mnt/small"
# A version that no test installs: its release is missing on every host.
ABSENT = "0.33.9"
WRONG = (
    "clock: ",
    "GPUs: 7/8 GPUs (silent on the PCI bus: 0000:40:00.0); h20-141 ×8 is declared",
    "port 9000 for m25-a is held by PID ",
    "mirror index: https://",
    "apt: no repository of this host has no-such-package; see mirrors.apt",
    "GiB needed for MiniMaxAI/MiniMax-M2.5, 0.0 GiB free",
)


@pytest.fixture
def wrong_host(site: Site) -> Iterator[str]:
    """A host with a lost GPU, a full disk and somebody on a port, and group data that asks too much."""
    lab.set_hardware(HOST, missing=(5,))
    lab.ssh(HOST, f"mkdir -p {SMALL} && mount -t tmpfs -o size=1m none {SMALL}", check=True)
    lab.ssh(HOST, "systemd-run --unit=squatter python3 -m http.server 9000", check=True)
    site.edit("lab", r'"index": .*', "")
    site.edit("h20", r'"port": 8000', '"port": 9000')
    site.edit("h20", r'"version": "0.33.0"', f'"version": "{ABSENT}"')
    site.append("h20", f'paths = {{"models": "{SMALL}/models"}}')
    site.append("h20", 'packages = ["no-such-package"]')
    site.append("h20", "clock_tolerance_s = 1e-9")
    yield HOST
    lab.ssh(HOST, f"systemctl stop squatter; umount {SMALL} && rmdir {SMALL}", check=True)
    lab.set_hardware(HOST, missing=())


@pytest.mark.parametrize("how", ["--dry", "-y"])
def test_all_that_is_wrong_is_told_at_once_and_no_host_is_changed(
    site: Site, wrong_host: str, how: str
) -> None:
    before = {host: (main_pids(host), written(host)) for host in H20}

    run = site.pyinfra(how, "inventories/lab.py", "deploy.py", "--limit", "h20")

    assert run.exit_code == 1, run.output
    said = [line for line in run.output.splitlines() if f"[{wrong_host}]" in line]
    for words in WRONG:
        assert any(words in line for line in said), f"{words}\n{run.output}"
    assert {host: (main_pids(host), written(host)) for host in H20} == before
    assert "Traceback" not in run.output


def test_a_machine_without_the_switches_of_its_kind_is_refused(site: Site) -> None:
    lab.set_hardware(HOST, nvswitch=0)

    run = site.pyinfra("-y", "inventories/lab.py", "tasks.preflight.check", "--limit", HOST)
    lab.set_hardware(HOST, nvswitch=4)

    assert run.exit_code == 1
    assert "NVSwitch: 0 on the PCI bus, and h20-141 has some" in run.output


def test_a_bare_host_without_nvidias_repository_is_refused_untouched(site: Site) -> None:
    """And with it, an nginx that was there before is left alone."""
    host = H20[-1]
    lab.reset(host)
    lab.write_file(host, "/etc/systemd/system/nginx.service", NGINX)
    lab.ssh(host, "systemctl daemon-reload && systemctl enable --now nginx.service", check=True)
    before = written(host)
    mirrors = (site.folder / "group_data" / "lab.py").read_text()
    site.edit("lab", r'\n *"nvidia": .*', "")

    refused = site.roll_out("--limit", host)

    assert refused.exit_code == 1, refused.output
    assert (
        "apt: no repository of this host has nvidia-kernel-open-dkms 580.95.05-1" in refused.output
    )
    assert "NVIDIA's repository is named in mirrors.apt" in refused.output
    assert written(host) == before

    site.write("lab", mirrors)
    site.roll_out_well("--limit", host)

    state = lab.ssh(host, "systemctl is-enabled nginx.service; systemctl is-active nginx.service")
    assert state.stdout.split() == ["enabled", "active"]
    assert site.roll_out_well("--limit", host).changed == 0
    lab.ssh(host, "systemctl disable --now nginx.service", check=True)
    lab.ssh(
        host, "rm /etc/systemd/system/nginx.service && systemctl mask nginx.service", check=True
    )


NGINX = """\
[Service]
ExecStart=/bin/sleep infinity

[Install]
WantedBy=multi-user.target
"""
