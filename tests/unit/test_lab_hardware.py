"""The simulated hardware of lab hosts, as files."""

import json
from pathlib import Path

import pytest

from lab import LabError, hardware
from lab.hardware import Behaviour, Hardware, Mode, Rule


def sysfs(directory: Path, name: str) -> list[str]:
    return [path.read_text().strip() for path in sorted((directory / "pci").glob(f"*/{name}"))]


def test_an_h20_host_has_eight_gpus_behind_four_switches(tmp_path: Path) -> None:
    hardware.write(tmp_path, hardware.default("h20"))

    assert sysfs(tmp_path, "vendor") == ["0x10de"] * 12
    assert sysfs(tmp_path, "class") == ["0x068000"] * 4 + ["0x030200"] * 8
    assert sysfs(tmp_path, "device") == ["0x22a3"] * 4 + ["0x232c"] * 8


@pytest.mark.parametrize("group", ["cpu", None])
def test_other_hosts_have_none(group: str | None, tmp_path: Path) -> None:
    hardware.write(tmp_path, hardware.default(group))

    assert not list((tmp_path / "pci").iterdir())


def test_a_gpu_taken_out_leaves_the_directory_that_a_host_has_mounted(tmp_path: Path) -> None:
    hardware.write(tmp_path, Hardware())
    mounted = (tmp_path / "pci").stat().st_ino

    now = hardware.change(tmp_path, gpus=7)

    assert (tmp_path / "pci").stat().st_ino == mounted
    assert sysfs(tmp_path, "class").count("0x030200") == 7
    assert hardware.read(tmp_path) == now == Hardware(gpus=7)


def test_a_gpu_that_fell_off_the_bus_is_still_a_pci_device(tmp_path: Path) -> None:
    hardware.write(tmp_path, Hardware(missing=(3, 5)))

    assert sysfs(tmp_path, "class").count("0x030200") == 8
    assert json.loads((tmp_path / "hardware.json").read_text())["missing"] == [3, 5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpus": 17}, "gpus 17: use 0 to 16"),
        ({"gpus": 4, "missing": (4,)}, "missing .4.: the host has GPUs 0 to 3"),
        ({"name": "NVIDIA H21"}, "GPU name 'NVIDIA H21' is not known; use one of"),
        ({"smi": "slow"}, "smi 'slow': use one of"),
    ],
)
def test_hardware_that_no_host_has_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(LabError, match=message):
        Hardware(**values)  # type: ignore[arg-type]


def test_rules_say_what_they_match_and_only_what_was_set(tmp_path: Path) -> None:
    rule = Rule(Mode.DIE_LOADING, version="0.33.0", text="CUDA error: 802", exit_code=1)

    hardware.misbehave(tmp_path, Behaviour(load_seconds=0.5, rules=(rule,)))

    assert json.loads((tmp_path / "vllm.json").read_text()) == {
        "load_seconds": 0.5,
        "rules": [
            {
                "port": None,
                "version": "0.33.0",
                "mode": "die-loading",
                "text": "CUDA error: 802",
                "exit_code": 1,
            }
        ],
    }


def test_behaving_is_the_absence_of_the_file(tmp_path: Path) -> None:
    hardware.misbehave(tmp_path, Behaviour(rules=(Rule(Mode.HANG),)))

    hardware.behave(tmp_path)
    hardware.behave(tmp_path)

    assert not (tmp_path / "vllm.json").exists()
