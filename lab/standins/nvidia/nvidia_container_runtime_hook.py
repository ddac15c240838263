#!/usr/bin/python3
"""nvidia-container-runtime-hook on a lab host: gives a container the simulated GPUs that it asks for.

As the real one it is run by runc before the container's root is changed, is told of the container on
standard input, takes NVIDIA_VISIBLE_DEVICES from its environment, and mounts into it: here what the
stand-ins of nvidia-smi and vLLM read, with only those GPUs, counted from 0 again.
"""

import json
import subprocess
import sys
from pathlib import Path

HARDWARE = Path("/etc/lab/hardware.json")
FROM_HOST = (
    *("/etc/lab", "/usr/bin/nvidia-smi"),
    # Not who holds memory of a GPU: that goes by process ids, which are others in a container.
    *("/run/lab/nvidia-module-version", "/run/lab/nvidia-fabric"),
)


def fail(text: str) -> int:
    """Say in the real one's words what is wrong."""
    sys.stderr.write(f"nvidia-container-cli: {text}\n")
    return 1


def mount(pid: int, source: Path, target: Path) -> None:
    """Bind a file or folder of the host where the container will see it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        target.mkdir(exist_ok=True)
    else:
        target.touch()
    inside = ["nsenter", "--mount", f"--target={pid}", "--"]
    subprocess.run([*inside, "mount", "--bind", source, target], check=True)


def main() -> int:
    """Exit status for runc: a container whose hook fails is not started."""
    if sys.argv[1:] != ["prestart"]:
        return 0
    state = json.load(sys.stdin)
    bundle = Path(state["bundle"])
    config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    env = dict(word.split("=", 1) for word in config["process"]["env"] if "=" in word)
    asked = env.get("NVIDIA_VISIBLE_DEVICES", "")
    if asked in {"", "void", "none"}:
        return 0
    smi = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    if smi.returncode:
        return fail("initialization error: nvml error: driver not loaded: unknown")
    there = [str(index) for index in range(smi.stdout.count("GPU "))]
    chosen = there if asked == "all" else asked.split(",")
    unknown = [device for device in chosen if device not in there]
    if unknown:
        return fail(f"device error: {unknown[0]}: unknown device: unknown")
    root = bundle / config["root"]["path"]
    for path in filter(Path.exists, map(Path, FROM_HOST)):
        mount(state["pid"], path, root / str(path).lstrip("/"))
    hardware = json.loads(HARDWARE.read_text(encoding="utf-8"))
    seen = bundle / "hardware.json"
    seen.write_text(json.dumps({**hardware, "gpus": len(chosen), "missing": []}), encoding="utf-8")
    mount(state["pid"], seen, root / str(HARDWARE).lstrip("/"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
