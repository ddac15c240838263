#!/usr/bin/python3
"""nv-fabricmanager on a lab host: starts where there are NVSwitches and a driver of its version.

The messages, with their grammar, are NVIDIA's: what reads a journal has to know them.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

VERSION = "@VERSION@"

ROOT = Path(os.environ.get("LAB_ROOT") or "/")
HARDWARE = Path(os.environ.get("LAB_HARDWARE") or ROOT / "etc/lab/hardware.json")
LOADED = ROOT / "run/lab/nvidia-module-version"
# Here while the GPUs are registered with the fabric; it outlives the daemon, as the state does.
FABRIC = ROOT / "run/lab/nvidia-fabric"

MISMATCH = (
    "fabric manager NVIDIA GPU driver interface version {own} don't match with driver version "
    "{loaded}. Please update with matching NVIDIA driver package.\n"
)
NO_SWITCH = (
    "request to query NVSwitch device information from NVSwitch driver failed with error:"
    "WARNING Nothing to do [NV_WARN_NOTHING_TO_DO]\n"
)
CONFIGURED = (
    "Successfully configured all the available NVSwitches to route GPU NVLink traffic. NVLink "
    "Peer-to-Peer support will be enabled once the GPUs are successfully registered with the "
    "NVLink fabric.\n"
)


def say(text: str) -> None:
    """Write to the journal at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def notify(message: str) -> None:
    """Tell systemd, where it started us, that we are ready (sd_notify)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect("\0" + address[1:] if address.startswith("@") else address)
        channel.sendall(message.encode())


def main(arguments: list[str]) -> int:
    """Run until SIGTERM; exit status 1 without NVSwitches or with another version's module."""
    if "--version" in arguments or "-v" in arguments:
        say(f"Fabric Manager version is : {VERSION}\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    say("Detected Pre-NVL5 system\n")
    try:
        switches = json.loads(HARDWARE.read_text()).get("nvswitch", 0)
    except (OSError, ValueError):
        switches = 0
    loaded = LOADED.read_text().strip() if LOADED.exists() else ""
    if loaded and loaded != VERSION:
        say(MISMATCH.format(own=VERSION, loaded=loaded))
        return 1
    if not loaded or not switches:
        say(NO_SWITCH)
        return 1
    say("Connected to 1 node.\n")
    FABRIC.write_text("Completed\n")
    say(CONFIGURED)
    notify("READY=1")
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
