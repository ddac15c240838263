"""The version that this wheel was built as."""

from __future__ import annotations

import re
from pathlib import Path

__version__ = Path(__file__).with_name("VERSION").read_text(encoding="ascii").strip()


def release(version: str = __version__) -> tuple[int, ...]:
    """The numbers of a version, to compare by: (0, 33, 1)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])
