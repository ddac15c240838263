#!/usr/bin/python3
"""dkms on a lab host: says of the driver's stand-in whether its module is built, in dkms' words."""

import os
import sys
from pathlib import Path

ROOT = Path(os.environ.get("LAB_ROOT") or "/")
BUILT = ROOT / "var/lib/lab/nvidia-module"


def main(arguments: list[str]) -> int:
    """`dkms status [-k KERNEL]`, and nothing else of it."""
    if arguments[:1] != ["status"]:
        sys.stderr.write("Error! Unknown action specified: this stand-in has only status\n")
        return 1
    kernel = arguments[2] if arguments[1:2] == ["-k"] else os.uname().release
    if BUILT.exists():
        sys.stdout.write(f"nvidia/{BUILT.read_text().strip()}, {kernel}, x86_64: installed\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
