"""The benchmark's picture: bars on a logarithmic axis, as SVG."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, floor, log10
from xml.sax.saxutils import escape

from bench.results import ANSIBLE, EMPTY_DEPLOY, OURS, PROBE, Part, Results

WIDTH = 860
LABELS = 250  # room for the bars' names
VALUES = 70  # and for their numbers
BAR, GAP, GROUP_GAP, TITLE, AXIS = 18, 5, 16, 26, 34
COLOURS = {OURS: "#0b6e4f", ANSIBLE: "#b8621b", "": "#8a8f98"}
FONT = "font-family='system-ui, sans-serif'"


@dataclass(frozen=True)
class Bar:
    """A bar, with its length in seconds."""

    name: str
    seconds: float


def no_op_bars(part: Part) -> list[Bar]:
    """What a no-op takes with one number of hosts, quickest first; the floor with it."""
    floor_bars = [
        Bar("probe + pyinfra's start-up", part.least_s),
        *(Bar(name, part.floor[name].wall_s) for name in (PROBE, EMPTY_DEPLOY)),
    ]
    runs = [Bar(name, series.wall_s) for name, series in part.no_op.items() if series.samples]
    return sorted([*floor_bars, *runs], key=lambda bar: bar.seconds)


def svg(results: Results) -> str:
    """The picture of all no-ops."""
    groups = [
        (f"{part.hosts} host{'s' * (part.hosts > 1)}", no_op_bars(part)) for part in results.parts
    ]
    seconds = [bar.seconds for _, bars in groups for bar in bars]
    axis = LogAxis(min(seconds), max(seconds))
    height = AXIS + sum(TITLE + len(bars) * (BAR + GAP) + GROUP_GAP for _, bars in groups) + AXIS
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' "
        f"role='img' aria-label='Seconds that a run takes that has nothing to do'>",
        f"<rect width='{WIDTH}' height='{height}' fill='#ffffff'/>",
        f"<text x='12' y='22' {FONT} font-size='15' font-weight='600' fill='#1c1f23'>"
        "Nothing to do: wall seconds (logarithmic)</text>",
        *axis.lines(AXIS + 6, height - AXIS),
    ]
    y = AXIS
    for title, bars in groups:
        lines.append(
            f"<text x='12' y='{y + 18}' {FONT} font-size='13' font-weight='600' fill='#1c1f23'>"
            f"{escape(title)}</text>"
        )
        y += TITLE
        for bar in bars:
            lines += _bar(bar, y, axis)
            y += BAR + GAP
        y += GROUP_GAP
    return "\n".join([*lines, "</svg>", ""])


class LogAxis:
    """Whole decades that hold all values, across the room for bars."""

    def __init__(self, least: float, most: float) -> None:
        self.first = floor(log10(least))
        self.last = max(ceil(log10(most)), self.first + 1)

    def x(self, seconds: float) -> float:
        share = (log10(seconds) - self.first) / (self.last - self.first)
        return LABELS + share * (WIDTH - LABELS - VALUES)

    def lines(self, top: float, bottom: float) -> Iterator[str]:
        for decade in range(self.first, self.last + 1):
            x = self.x(10.0**decade)
            yield f"<line x1='{x:.1f}' y1='{top}' x2='{x:.1f}' y2='{bottom}' stroke='#d5d8dc'/>"
            yield (
                f"<text x='{x:.1f}' y='{bottom + 18}' {FONT} font-size='12' fill='#5b6168' "
                f"text-anchor='middle'>{10.0**decade:g} s</text>"
            )


def _bar(bar: Bar, y: float, axis: LogAxis) -> Iterator[str]:
    colour = next(colour for start, colour in COLOURS.items() if bar.name.startswith(start))
    end = max(axis.x(bar.seconds), LABELS + 2)
    weight = " font-weight='600'" if bar.name == OURS else ""
    name = escape(bar.name.replace("`", ""))
    yield (
        f"<text x='{LABELS - 8}' y='{y + 13.5}' {FONT} font-size='13' text-anchor='end'{weight} "
        f"fill='#1c1f23'>{name}</text>"
    )
    yield (
        f"<rect x='{LABELS}' y='{y}' width='{end - LABELS:.1f}' height='{BAR}' rx='2' fill='{colour}'/>"
    )
    yield (
        f"<text x='{end + 6:.1f}' y='{y + 13.5}' {FONT} font-size='12'{weight} fill='#1c1f23'>"
        f"{_number(bar.seconds)}</text>"
    )


def _number(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}"  # noqa: PLR2004
