#!/usr/bin/python3
"""nvidia-persistenced on a lab host: starts only where a driver of its own version is loaded."""

import os
import signal
import socket
import sys
from pathlib import Path

VERSION = "@VERSION@"

ROOT = Path(os.environ.get("LAB_ROOT") or "/")
LOADED = ROOT / "run/lab/nvidia-module-version"
# nvidia-smi reports persistence mode while the process of this file lives.
PID_FILE = ROOT / "run/nvidia-persistenced/nvidia-persistenced.pid"

NO_DRIVER = (
    "Failed to query NVIDIA devices. Please ensure that the NVIDIA device files (/dev/nvidia*) "
    "exist, and that user {user} has read and write permissions for those files.\n"
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
    """Run until SIGTERM; exit status 1 if no module of this version is loaded."""
    if "--version" in arguments or "-v" in arguments:
        say(f"nvidia-persistenced:  version {VERSION}\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    say(f"Started ({os.getpid()})\n")
    loaded = LOADED.read_text().strip() if LOADED.exists() else ""
    if loaded != VERSION:
        say(NO_DRIVER.format(user=os.getuid()))
        say(f"Shutdown ({os.getpid()})\n")
        return 1
    PID_FILE.parent.mkdir(parents=True, exist_ok=True)
    PID_FILE.write_text(f"{os.getpid()}\n")
    try:
        notify("READY=1")
        while True:
            signal.pause()
    finally:
        PID_FILE.unlink(missing_ok=True)
        say(f"Shutdown ({os.getpid()})\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
