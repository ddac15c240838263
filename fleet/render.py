"""Templates of the repository, rendered. A template receives finished values and does no arithmetic."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

ROOT = Path(__file__).resolve().parent.parent


@cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(ROOT / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - configuration files, not HTML
    )


def render(template: str, **values: Any) -> str:
    """The text of `templates/<template>`; an undefined value is an error."""
    return _templates().get_template(template).render(**values)


def repository_file(path: str) -> str:
    """Text of a file of this repository, for example `files/fleet_host.py`."""
    return (ROOT / path).read_text(encoding="utf-8")
