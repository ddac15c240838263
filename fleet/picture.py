"""Fits as a picture: KV tokens by GPU kind and recipe, as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log10
from xml.sax.saxutils import escape

from fleet.placement import Fit

WIDTH = 900
LEFT, RIGHT = 250, 230
"""Room for a bar's name, and for its figures."""
ROW, GAP, TITLE, TOP = 16, 5, 24, 56
FONT = "font-family='system-ui, sans-serif'"
INK, GREY, FITS, SHORT = "#1c1f23", "#6b7078", "#0b6e4f", "#b8621b"


@dataclass(frozen=True)
class Bar:
    """A recipe's KV tokens, and what is to be said beside them."""

    name: str
    tokens: int
    words: str
    colour: str


def fits(model: str, vllm_version: str, gpus: int, found: Mapping[str, Sequence[Fit]]) -> str:
    """The picture of `fleet fit`: a bar for each recipe that can run, GPU kind by GPU kind.

    Kinds that hold the same share theirs.
    """
    alike: dict[tuple[Bar, ...], list[str]] = {}
    for kind, rows in found.items():
        alike.setdefault(tuple(_bars(rows)), []).append(kind)
    groups = [(", ".join(kinds), bars) for bars, kinds in alike.items() if bars]
    longest = max((bar.tokens for _, bars in groups for bar in bars), default=0)
    scale = (WIDTH - LEFT - RIGHT) / max(longest, 1)
    height = TOP + sum(TITLE + len(bars) * (ROW + GAP) + GAP for _, bars in groups) + ROW
    title = f"{model}: tokens of KV cache by GPU kind and recipe"
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' role='img' "
        f"aria-label='{escape(title)}'>",
        f"<rect width='{WIDTH}' height='{height}' fill='#ffffff'/>",
        _text(12, 22, title, size=15, weight=600),
        _text(12, 40, f"up to {gpus} GPUs of a host, vLLM {vllm_version}", size=12, colour=GREY),
        *_axis(longest, scale, height),
    ]
    y = TOP
    for kind, bars in groups:
        lines.append(_text(12, y + 15, kind, size=13, weight=600))
        y += TITLE
        for bar in bars:
            lines += _row(bar, y, scale)
            y += ROW + GAP
        y += GAP
    return "\n".join([*lines, "</svg>", ""])


def _bars(rows: Sequence[Fit]) -> Iterator[Bar]:
    """One for each way to place a model that holds something else; variations hold the same."""
    seen = set()
    for fit in rows:
        held = fit.memory
        if held is None or held in seen:
            continue
        seen.add(held)
        name = f"{fit.recipe_name} ({fit.recipe.parallel})"
        if held.fits:
            words = f"{held.tokens:,} · longest {held.largest_max_model_len:,}"
            yield Bar(name, held.tokens, words, FITS)
        elif held.pool_tokens:
            words = f"{held.tokens:,} · only up to {held.largest_max_model_len:,}"
            yield Bar(name, held.tokens, words, SHORT)
        else:
            yield Bar(name, 0, "the weights do not fit", SHORT)


def _row(bar: Bar, y: int, scale: float) -> Iterator[str]:
    yield _text(24, y + 12, bar.name, size=12)
    length = max(bar.tokens * scale, 1)
    yield f"<rect x='{LEFT}' y='{y}' width='{length:.1f}' height='{ROW}' fill='{bar.colour}'/>"
    yield _text(LEFT + length + 6, y + 12, bar.words, size=11, colour=GREY)


def _axis(longest: int, scale: float, height: int) -> Iterator[str]:
    """Lines at round numbers of tokens, at most five of them."""
    if not longest:
        return
    step = 10 ** int(log10(longest))
    while longest / step > 5:  # noqa: PLR2004 - as many lines as one can read
        step *= 2
    for index in range(ceil(longest / step)):
        tokens = index * step
        x = LEFT + tokens * scale
        yield f"<path d='M{x:.1f} {TOP} V{height - ROW}' stroke='#e3e5e8'/>"
        yield _text(x, height - 4, f"{tokens / 1e6:g}M", size=11, colour=GREY)


def _text(  # noqa: PLR0913 - what SVG calls so
    x: float, y: float, words: str, *, size: int, weight: int = 400, colour: str = INK
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' {FONT} font-size='{size}' font-weight='{weight}' "
        f"fill='{colour}'>{escape(words)}</text>"
    )
