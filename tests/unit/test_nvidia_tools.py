"""The stand-ins of NVIDIA's other packages: nvcc, DCGM's exporter, nvidia-ctk."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from lab.site import apt

HARDWARE = {
    "gpus": 2,
    "name": "NVIDIA H20-3e",
    "memory_mib": 143771,
    "compute_capability": "9.0",
    "nvswitch": 4,
    "smi": "ok",
    "missing": [],
}


def script(folder: Path, template: str, version: str) -> Path:
    """A stand-in as its package installs it."""
    path = folder / template
    path.write_text((apt.STANDINS / template).read_text().replace("@VERSION@", version))
    path.chmod(0o755)
    return path


def run(path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(path), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(("line", "build"), [("12.9", "V12.9.86"), ("13.0", "V13.0.88")])
def test_nvcc_says_which_cuda_it_is(tmp_path: Path, line: str, build: str) -> None:
    done = run(script(tmp_path, "nvcc.py", line), "--version")

    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == "nvcc: NVIDIA (R) Cuda compiler driver"
    assert f"Cuda compilation tools, release {line}, {build}" in done.stdout.splitlines()


def test_nvcc_fails_where_it_would_have_to_compile(tmp_path: Path) -> None:
    nvcc = script(tmp_path, "nvcc.py", "12.9")

    assert run(nvcc).returncode == run(nvcc, "kernel.cu").returncode == 1
    assert "No input files specified" in run(nvcc).stderr


def test_nvidia_ctk_adds_its_runtime_and_leaves_the_rest(tmp_path: Path) -> None:
    config = tmp_path / "etc/docker/daemon.json"
    config.parent.mkdir(parents=True)
    config.write_text('{"log-driver": "journald"}')
    ctk = script(tmp_path, "nvidia_ctk.py", "1.18.0")

    done = run(ctk, "runtime", "configure", "--runtime=docker", LAB_ROOT=str(tmp_path))

    assert done.returncode == 0
    assert "Wrote updated config to /etc/docker/daemon.json" in done.stderr
    assert json.loads(config.read_text()) == {
        "log-driver": "journald",
        "runtimes": {"nvidia": {"args": [], "path": "nvidia-container-runtime"}},
    }
    assert run(ctk, "runtime", "configure", "--runtime=none").returncode == 1
    assert "CLI version 1.18.0" in run(ctk, "--version").stdout


@pytest.fixture
def host(tmp_path: Path) -> dict[str, str]:
    """A lab host with two GPUs and a driver: the environment of what runs there."""
    (tmp_path / "hardware.json").write_text(json.dumps(HARDWARE))
    (tmp_path / "run/lab").mkdir(parents=True)
    (tmp_path / "run/lab/nvidia-module-version").write_text("580.95.05\n")
    smi = script(tmp_path, "nvidia_smi.py", "580.95.05")
    return {
        "LAB_ROOT": str(tmp_path),
        "LAB_HARDWARE": str(tmp_path / "hardware.json"),
        "LAB_NVIDIA_SMI": str(smi),
    }


COUNTERS = str(apt.STANDINS / "dcgm-counters.csv")


def fetch(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_exporter_serves_a_line_for_each_gpu_where_its_environment_says(
    tmp_path: Path, host: dict[str, str]
) -> None:
    exporter = script(tmp_path, "dcgm_exporter.py", "4.8.2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(exporter), "-f", COUNTERS],
        env={**os.environ, **host, "DCGM_EXPORTER_LISTEN": f"127.0.0.1:{port}"},
        stdout=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                status, text = fetch(f"http://127.0.0.1:{port}/metrics")
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        elsewhere, _ = fetch(f"http://127.0.0.1:{port}/")
    finally:
        process.terminate()
        process.communicate(timeout=10)

    assert (status, elsewhere) == (200, 404)
    lines = [line for line in text.splitlines() if line.startswith("DCGM_FI_DEV_GPU_UTIL{")]
    assert [line.partition(",")[0] for line in lines] == [
        'DCGM_FI_DEV_GPU_UTIL{gpu="0"',
        'DCGM_FI_DEV_GPU_UTIL{gpu="1"',
    ]
    assert 'modelName="NVIDIA H20-3e"' in lines[0]
    assert "# TYPE DCGM_FI_DEV_GPU_UTIL gauge" in text.splitlines()
    assert process.returncode == 0


def test_the_exporter_ends_where_no_driver_answers(tmp_path: Path, host: dict[str, str]) -> None:
    (tmp_path / "run/lab/nvidia-module-version").unlink()

    done = run(script(tmp_path, "dcgm_exporter.py", "4.8.2"), "-f", COUNTERS, **host)

    assert done.returncode == 1
    assert "couldn't communicate with the NVIDIA driver" in done.stderr


def test_packages_of_other_versions_are_built_as_they_are_named() -> None:
    catalogue = yaml.safe_load((apt.STANDINS / "packages.yaml").read_text())
    built = {package.name: package for package in apt.standins(catalogue)}

    assert built["cuda-toolkit-12-9"].package_version == "12.9.1-1"
    assert built["datacenter-gpu-manager-4-core"].package_version == "1:4.6.1-1"
    assert built["nvidia-container-toolkit"].relations["Depends"] == (
        "nvidia-container-toolkit-base (= 1.18.0-1)"
    )
