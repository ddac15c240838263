"""The GPUs that a server sees, as NVML and CUDA would show them to vLLM."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from vllm import lab

MEMORY_MIB = 143771
GPUS = 8  # where the lab describes no hardware


def visible() -> list[int]:
    """Indexes of the GPUs that CUDA would offer to this process.

    Raises RuntimeError, as vLLM and torch do, where there is no driver or no fabric.
    """
    hardware = lab.hardware()
    present = list(range(GPUS)) if hardware is None else _present()
    if hardware is not None and not present:
        raise RuntimeError(
            "Failed to infer device type, please set the environment variable "
            "`VLLM_LOGGING_LEVEL=DEBUG` to turn on verbose logging to help debug the issue."
        )
    if hardware is not None and hardware.get("nvswitch") and not lab.FABRIC.exists():
        raise RuntimeError(
            "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before "
            "calling NumCudaDevices() that might have already set an error? Error 802: system not "
            "yet initialized"
        )
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    named = []
    for item in chosen.split(","):
        # CUDA stops at the first that it cannot find.
        if not item.strip().isdigit() or int(item) not in present:
            break
        named.append(int(item))
    return named


def memory_mib() -> int:
    """The memory of a GPU, in MiB."""
    return int((lab.hardware() or {}).get("memory_mib", MEMORY_MIB))


def free_mib(index: int) -> int:
    """What no living process holds of a GPU, in MiB."""
    held = 0
    for file in _records(index):
        if not Path("/proc", file.name).exists():
            continue
        try:
            held += int(float(file.read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return memory_mib() - held


def hold(index: int, held_mib: int) -> None:
    """Say that this process holds memory of a GPU, where the lab wants to know."""
    directory = lab.GPU_USERS / str(index)
    try:
        directory.mkdir(exist_ok=True)
        for file in _records(index):
            if not Path("/proc", file.name).exists():
                file.unlink(missing_ok=True)
        (directory / str(os.getpid())).write_text(str(held_mib), encoding="ascii")
    except OSError:
        return  # outside the lab, or not for this user to write


def _records(index: int) -> list[Path]:
    try:
        return [file for file in (lab.GPU_USERS / str(index)).iterdir() if file.name.isdigit()]
    except OSError:
        return []


def _present() -> list[int]:
    """The GPUs that the driver has, by its own tool; none where that fails, as where NVML does."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return [int(index) for index in re.findall(r"^GPU (\d+):", listed.stdout, flags=re.MULTILINE)]
