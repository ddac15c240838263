#!/usr/bin/python3
"""nv-hostengine on a lab host: runs, and does nothing. The exporter has an engine of its own."""

import signal
import sys

VERSION = "@VERSION@"


def main(arguments: list[str]) -> int:
    """Run until SIGTERM."""
    if "--version" in arguments:
        print(f"Version : {VERSION}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
