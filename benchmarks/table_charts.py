"""The charts of the honest table's page: speed beside stock against nearness to it, as SVG.

Not seconds: rows are drawn hours apart, each beside stock, and the machine's pace changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import winners

from app.batch.page import NOTHING, Html, el, joined, ticks

WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 640, 390, 84, 16, 14, 58
LEAST = 1e-4
"""What is nearer to stock than that is drawn there."""

MARKS = {
    winners.SINGLE: ("ours, one method", "one"),
    winners.COMPOSED: ("ours, together or tuned", "both"),
    winners.PEER: ("peers", "peer"),
    winners.STEPS: ("stock in fewer steps", "fewer"),
}

Row = dict[str, Any]


def draw(rows: Sequence[Row]) -> Html:
    """Two charts of the rows that have a side (`winners.side`), under one key."""
    similar = [(1 - one, f"{one:g}") for one in (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)]
    distant = [(one, f"{one:g}") for one in (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)]
    parts = [
        Scatter("SSIM to stock (down is nearer)", "ssim", similar).draw(rows),
        Scatter("Perceptual distance to stock (down is nearer)", "perceptual", distant).draw(rows),
    ]
    return joined([_key(), el("div", *parts, class_="charts")])


@dataclass(frozen=True)
class Scatter:
    """Speed across, distance from stock up; both on logarithmic scales.

    Attributes:
        title: What is shown.
        key: The figure that distance is of; of ``ssim`` it is what is missing to 1.
        heights: Where lines are drawn, and what is written there.
    """

    title: str
    key: str
    heights: Sequence[tuple[float, str]]

    def draw(self, rows: Sequence[Row]) -> Html:
        """As a figure."""
        shown = [row for row in rows if winners.side(row)]
        if not shown:
            return NOTHING
        speeds = [row["speedup"]["median"] for row in shown]
        low, high = min(speeds) / 1.1, max(speeds) * 1.1
        top = max([self._lost(row) for row in shown] + [2 * LEAST]) * 1.3
        frame = _Frame(low, high, top)
        inside = [
            *(frame.height(value, words) for value, words in self.heights if LEAST < value <= top),
            *(frame.speed(value) for value in _speeds(low, high)),
            frame.path([row for row in shown if winners.side(row) == winners.STEPS], self._lost),
            *(frame.mark(row, self._lost(row)) for row in shown),
            _text((LEFT + WIDE - RIGHT) / 2, HIGH - 6, "middle", "times as fast as stock"),
        ]
        svg = el("svg", *inside, viewBox=f"0 0 {WIDE} {HIGH}", role="img", aria_label=self.title)
        return el("figure", el("figcaption", self.title), svg)

    def _lost(self, row: Row) -> float:
        lost = 1 - row[self.key] if self.key == "ssim" else row[self.key]
        return max(LEAST, lost)


@dataclass(frozen=True)
class _Frame:
    """From figures to places."""

    low: float
    high: float
    top: float

    def x(self, speed: float) -> float:
        share = math.log(speed / self.low) / math.log(self.high / self.low)
        return LEFT + (WIDE - LEFT - RIGHT) * share

    def y(self, lost: float) -> float:
        share = math.log(self.top / lost) / math.log(self.top / LEAST)
        return TOP + (HIGH - TOP - BOTTOM) * share

    def height(self, value: float, words: str) -> Html:
        y = self.y(value)
        line = _straight(LEFT, y, WIDE - RIGHT, y, "grid")
        return joined([line, _text(LEFT - 8, y + 5, "end", words)])

    def speed(self, value: float) -> Html:
        x = self.x(value)
        line = _straight(x, TOP, x, HIGH - BOTTOM, "grid")
        return joined([line, _text(x, HIGH - BOTTOM + 20, "middle", f"{value:g}×")])

    def path(self, rows: Sequence[Row], lost: Any) -> Html:
        places = " ".join(
            f"{self.x(row['speedup']['median']):.1f},{self.y(lost(row)):.1f}" for row in rows
        )
        return el("polyline", points=places, class_="path") if places else NOTHING

    def mark(self, row: Row, lost: float) -> Html:
        side = winners.side(row)
        assert side is not None  # rows without one are not drawn
        return _shape(side, self.x(row["speedup"]["median"]), self.y(lost), _tip(row))


def _straight(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return el("line", **{name: f"{value:.1f}" for name, value in ends.items()}, class_=kind)


def _text(x: float, y: float, anchor: str, text: str) -> Html:
    return el("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _shape(side: str, x: float, y: float, tip: str = "") -> Html:
    """The mark of a class: it tells them apart without colour too."""
    kind, inside = f"mark {MARKS[side][1]}", [el("title", tip)] if tip else []
    if side == winners.SINGLE:
        return el("circle", *inside, cx=f"{x:.1f}", cy=f"{y:.1f}", r="5", class_=kind)
    paths = {
        winners.COMPOSED: f"M{x - 5:.1f} {y - 5:.1f}h10v10h-10z",
        winners.PEER: f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6-6z",
        winners.STEPS: f"M{x:.1f} {y - 6:.1f}l6 10h-12z",
    }
    return el("path", *inside, d=paths[side], class_=kind)


def _tip(row: Row) -> str:
    return (
        f"{winners.title(row)}: {row['seconds']['median']:.3f} s, {row['speedup']['median']:.2f}×, "
        f"SSIM {row['ssim']:.4f}, perceptual {row['perceptual']:.4f}"
    )


def _speeds(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis: halves and doubles, or a linear scale if it is short."""
    if high / low < 4:
        return [value for value in ticks(low, high) if low <= value <= high]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [f * 10.0**p for p in powers for f in (1, 2, 5) if low <= f * 10.0**p <= high]


def _key() -> Html:
    items = [
        el("li", el("svg", _shape(side, 8, 8), viewBox="0 0 16 16", aria_hidden="true"), name)
        for side, (name, _) in MARKS.items()
    ]
    return el("ul", *items, class_="key")
