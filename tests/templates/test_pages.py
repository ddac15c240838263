"""What of the documentation is generated is as the catalogue says; `make golden` writes it anew."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from fleet import markdown, picture, placement
from fleet.catalog import catalog

DOCS = Path(__file__).resolve().parents[2] / "docs"
PICTURED = "MiniMaxAI/MiniMax-M2.5"
VLLM = "0.33.0"
GPUS = 8

PARTS = {
    ("catalogue.md", "generated", "what is generated"): markdown.catalogue,
    ("memory.md", "claims", "claims"): markdown.claims,
    ("memory.md", "measurements", "measurements"): markdown.measurements,
}


def compare(page: Path, text: str) -> None:
    if os.environ.get("GOLDEN") == "write":
        page.write_text(text, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == text, f"{page.name} is stale; run `make golden`"


@pytest.mark.parametrize(("name", "begin", "end"), PARTS)
def test_a_generated_part_is_current(name: str, begin: str, end: str) -> None:
    page = DOCS / name
    marks = (f"<!-- {begin}: `make golden` -->\n", f"<!-- end of {end} -->")
    body = PARTS[name, begin, end](catalog())
    between = re.compile(f"({re.escape(marks[0])}).*({re.escape(marks[1])})", re.DOTALL)
    text = page.read_text(encoding="utf-8")

    assert between.search(text)
    compare(page, between.sub(lambda found: f"{found[1]}\n{body}\n{found[2]}", text))


def test_the_picture_is_current() -> None:
    kinds = catalog().gpus
    found = {kind: list(placement.fits(PICTURED, kinds[kind], GPUS, VLLM)) for kind in kinds}

    compare(DOCS / "fit.svg", picture.fits(PICTURED, VLLM, GPUS, found))
