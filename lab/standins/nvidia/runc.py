#!/usr/bin/python3
"""Stands before runc on a lab host, which may have fewer rights than a server's root.

Without CAP_SYS_RESOURCE nobody's limits can be raised: what a container asks for beyond them becomes
what may be had, and the container starts. With it, runc is all there is.
"""

import json
import os
import re
import resource
import sys

RUNC = "/usr/sbin/runc"
SYS_RESOURCE = 24


def may_raise() -> bool:
    """Whether this process may raise limits."""
    with open("/proc/self/status", encoding="ascii") as status:
        found = re.search(r"^CapEff:\s*([0-9a-f]+)", status.read(), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> SYS_RESOURCE & 1)


def lowered(value: int, highest: int) -> int:
    """A limit, no higher than what may be had; the kernel's infinity is the highest of all."""
    return value if highest == resource.RLIM_INFINITY else min(value, highest)


def lower(path: str) -> None:
    """Take what this process cannot give out of a container's configuration, or of a process for one."""
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    for limit in config.get("process", config).get("rlimits") or []:
        _, highest = resource.getrlimit(getattr(resource, limit["type"]))
        limit["soft"] = lowered(limit["soft"], highest)
        limit["hard"] = lowered(limit["hard"], highest)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file)


def main() -> None:
    """Run runc with the arguments given, over a configuration that it can carry out."""
    words = sys.argv[1:]
    if not may_raise():
        if "create" in words:
            lower(os.path.join(words[words.index("--bundle") + 1], "config.json"))
        elif "exec" in words:
            lower(words[words.index("--process") + 1])
    os.execv(RUNC, [RUNC, *words])


if __name__ == "__main__":
    main()
