"""What a site may add to its GPU hosts: the exporter of GPU metrics, and a CUDA toolkit."""

from __future__ import annotations

from fleet.drivers import DCGM_EXPORTER_UNIT, toolkit_home
from fleet.plan import EXPORTER_DROP_IN
from lab import hosts as lab
from tests.lab.conftest import H20
from tests.lab.site import Site, main_pids

HOST = H20[1]
EXPORTER = "monitoring | The exporter of GPU metrics is as planned"


def metrics(host: str, port: int) -> str:
    ask = f"python3 -c \"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{port}/metrics').read().decode())\""
    return lab.ssh(host, ask).stdout


def state_of_exporter() -> list[str]:
    unit = DCGM_EXPORTER_UNIT
    return lab.ssh(HOST, f"systemctl is-active {unit}; systemctl is-enabled {unit}").stdout.split()


def test_gpu_metrics_are_exported_where_the_site_wants_them_and_not_after(site: Site) -> None:
    before = main_pids(HOST)
    site.append("h20", 'dcgm_exporter = {"port": 9500}')

    run = site.roll_out_well("--limit", HOST)

    assert list(run.changed_operations()) == [EXPORTER]
    assert state_of_exporter() == ["active", "enabled"]
    assert metrics(HOST, 9500).count("DCGM_FI_DEV_GPU_UTIL{") == 8
    assert main_pids(HOST) == before
    assert site.roll_out_well("--limit", HOST).changed == 0

    # Whoever stops it has it back, and another address is another process.
    lab.ssh(HOST, f"systemctl stop {DCGM_EXPORTER_UNIT}", check=True)
    assert list(site.roll_out_well("--limit", HOST).changed_operations()) == [EXPORTER]
    site.edit("h20", "9500", "9400")
    assert list(site.roll_out_well("--limit", HOST).changed_operations()) == [EXPORTER]
    assert metrics(HOST, 9400).count("DCGM_FI_DEV_GPU_UTIL{") == 8
    assert metrics(HOST, 9500) == ""

    site.edit("h20", "dcgm_exporter = .*", "")
    assert list(site.roll_out_well("--limit", HOST).changed_operations()) == [EXPORTER]
    assert state_of_exporter() == ["inactive", "disabled"]
    assert lab.ssh(HOST, f"test -e {EXPORTER_DROP_IN}").returncode == 1
    assert main_pids(HOST) == before
    assert site.roll_out_well("--limit", HOST).changed == 0


def test_an_exporter_that_cannot_have_its_port_is_told_before_anything_is_changed(
    site: Site,
) -> None:
    site.append("h20", "dcgm_exporter = True")
    hold = "systemd-run --quiet --unit=holds-9400 python3 -m http.server --bind 127.0.0.1 9400"
    lab.ssh(HOST, hold, check=True)
    try:
        refused = site.roll_out("--limit", HOST)
    finally:
        lab.ssh(HOST, "systemctl stop holds-9400", check=True)

    assert refused.exit_code == 1
    assert "port 9400 for the exporter of GPU metrics is held by PID" in refused.output
    assert "set dcgm_exporter.port" in refused.output


def test_a_cuda_toolkit_lies_where_a_build_looks_for_it(site: Site) -> None:
    site.append("h20", 'cuda_toolkit = "12.9"')

    run = site.roll_out_well("--limit", HOST)

    assert list(run.changed_operations()) == ["system | Distribution packages are installed"]
    said = lab.ssh(HOST, f"{toolkit_home('12.9')}/bin/nvcc --version", check=True).stdout
    assert "Cuda compilation tools, release 12.9" in said
    assert site.roll_out_well("--limit", HOST).changed == 0
    lab.ssh(HOST, "apt-get -q -y purge cuda-toolkit-12-9", check=True)
