"""What pruning would take from a host, in words; the host itself says what (`spare` there). Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from fleet.memory import gib


def needed(spare: Mapping[str, Any]) -> bool:
    """Is there anything to remove?"""
    return bool(spare["remove"] or spare["archives"] or spare["files"])


def lines(spare: Mapping[str, Any]) -> Iterator[str]:
    """What stays and why, what goes and how much that frees."""
    for entry in spare["kept"]:
        yield f"keeps {PurePosixPath(entry['path']).name}: {entry['why']}"
    total = spare["archive_bytes"]
    for entry in spare["remove"]:
        total += entry["bytes"]
        name, size = PurePosixPath(entry["path"]).name, gib(entry["bytes"])
        yield f"removes {name}: {entry['why']}; frees {size}"
    if spare["archives"]:
        yield f"removes wheels that only they had from uv's cache; frees {gib(spare['archive_bytes'])}"
    if spare["files"]:
        yield f"removes {len(spare['files'])} staged units and configurations of what is gone"
    yield f"frees {gib(total)}" if needed(spare) else "nothing to remove"
