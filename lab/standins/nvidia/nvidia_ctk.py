#!/usr/bin/python3
"""nvidia-ctk on a lab host: `runtime configure` makes the runtime known to Docker, as NVIDIA's does.

`system create-dev-char-symlinks` has nothing to link here: there are no devices.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

VERSION = "@VERSION@"
ROOT = Path(os.environ.get("LAB_ROOT") or "/")
RUNTIME = {"args": [], "path": "nvidia-container-runtime"}


def say(text: str) -> None:
    """A line as its logger writes it where no terminal is."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(f'time="{now}" level=info msg="{text}"', file=sys.stderr)


def configure(path: Path, default: bool) -> None:
    """Add the runtime to Docker's configuration; what else is there stays."""
    say(f"Loading config from {path}")
    place = ROOT / str(path).lstrip("/")
    known = json.loads(place.read_text() or "{}") if place.exists() else {}
    known.setdefault("runtimes", {})["nvidia"] = RUNTIME
    if default:
        known["default-runtime"] = "nvidia"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(known, indent=4))
    say(f"Wrote updated config to {path}")
    say("It is recommended that docker daemon be restarted.")


def main(arguments: list[str]) -> int:
    """0 when done, 1 for a runtime that is none, 2 for wrong use."""
    parser = argparse.ArgumentParser(prog="nvidia-ctk")
    version = f"NVIDIA Container Toolkit CLI version {VERSION}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, dest="command")
    system = commands.add_parser("system").add_subparsers(required=True)
    system.add_parser("create-dev-char-symlinks").add_argument("--create-all", action="store_true")
    command = commands.add_parser("runtime")
    options = command.add_subparsers(required=True).add_parser("configure")
    options.add_argument("--runtime", default="docker")
    options.add_argument("--config", type=Path, default=Path("/etc/docker/daemon.json"))
    options.add_argument("--set-as-default", "--nvidia-set-as-default", action="store_true")
    given = parser.parse_args(arguments)
    if given.command == "system":
        return 0
    if given.runtime != "docker":
        print(f"unrecognized runtime '{given.runtime}'", file=sys.stderr)
        return 1
    configure(given.config, given.set_as_default)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
