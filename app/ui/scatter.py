"""The speed–fidelity plot of a sweep as SVG: every point is a button that keyboards reach too.

Gradio's own plots report a brushed range, not the point that was clicked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from app.ui.sweep import Mark, best
from app.ui.words import Language, number, say

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 16, 56
RADIUS = 11

PICK = """
const pick = (event) => {
  const mark = event.target.closest("[data-index]");
  const key = event.type === "keydown";
  if (!mark || (key && mark.localName === "button")) return;
  if (key && event.key !== "Enter" && event.key !== " ") return;
  event.preventDefault();
  trigger("click", { index: Number(mark.dataset.index) });
};
element.addEventListener("click", pick);
element.addEventListener("keydown", pick);
"""
"""For ``gr.HTML(js_on_load=…)``: a click event with the index of the mark that was chosen.

Of a real button a key makes a click by itself.
"""

_PLOT = Markup(
    '<div class="accel-plot"><svg viewBox="0 0 {width} {height}" role="group" '
    'aria-label="{name}">{body}</svg></div>'
)
_LINE = Markup('<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
_TEXT = Markup('<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>')
_TURNED = Markup(
    '<text transform="translate(16 {y:.1f}) rotate(-90)" text-anchor="middle">{text}</text>'
)
_FRONT = Markup('<polyline class="accel-front" points="{points}"/>')
_POINT = Markup(
    '<g class="accel-point {kind}" role="button" tabindex="0" data-index="{index}" '
    'aria-label="{told}"><title>{told}</title><circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    '<text x="{x:.1f}" y="{base:.1f}" text-anchor="middle" aria-hidden="true">{index}</text></g>'
)


@dataclass(frozen=True)
class Scale:
    """From a range of values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where a value lies."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Some round values inside of the range."""
        step = round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def round_step(rough: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below ``rough`` (> 0)."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next((m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9)), 10 * power)


def draw(marks: Sequence[Mark], language: Language = "en") -> Markup:
    """The plot of the marks whose speed and nearness are known; the index is that of the mark."""
    known = [(index, mark) for index, mark in enumerate(marks) if mark.plotted]
    if not known:
        return Markup()
    across = _scale([mark.ratio or 0 for _, mark in known], LEFT, WIDTH - RIGHT, 0.1)
    up = _scale([mark.ssim or 0 for _, mark in known], HEIGHT - BOTTOM, TOP, 0.02)
    body = Markup().join(
        [
            _axes(across, up, language),
            _front([mark for _, mark in known], across, up),
            *(_point(index, mark, across, up, language) for index, mark in known),
        ]
    )
    name = say("explore_plot", language)
    return _PLOT.format(width=WIDTH, height=HEIGHT, name=name, body=body)


def _scale(values: Sequence[float], start: float, end: float, least: float) -> Scale:
    """A range with some room around the values, of a certain width at least."""
    low, high = min(values), max(values)
    room = max((high - low) * 0.12, least / 2)
    return Scale(low - room, high + room, start, end)


def _axes(across: Scale, up: Scale, language: Language) -> Markup:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in across.ticks:
        parts.append(_line("accel-grid", (across(tick), TOP), (across(tick), bottom)))
        parts.append(_text((across(tick), bottom + 20), "middle", _tick(tick, across, language)))
    for tick in (tick for tick in up.ticks if tick <= 1 + 1e-9):
        parts.append(_line("accel-grid", (LEFT, up(tick)), (right, up(tick))))
        parts.append(_text((LEFT - 8, up(tick) + 4), "end", _tick(tick, up, language)))
    parts.append(_line("accel-axis", (LEFT, bottom), (right, bottom)))
    parts.append(_line("accel-axis", (LEFT, TOP), (LEFT, bottom)))
    parts.append(_text(((LEFT + right) / 2, HEIGHT - 12), "middle", say("explore_speed", language)))
    parts.append(_TURNED.format(y=(TOP + bottom) / 2, text=say("explore_nearness", language)))
    return Markup().join(parts)


def _tick(value: float, scale: Scale, language: Language) -> str:
    step = round_step((scale.high - scale.low) / 5)
    return number(value, max(0, -math.floor(math.log10(step) + 1e-9)), language)


def _line(kind: str, one: tuple[float, float], other: tuple[float, float]) -> Markup:
    return _LINE.format(kind=kind, x1=one[0], y1=one[1], x2=other[0], y2=other[1])


def _text(place: tuple[float, float], anchor: str, text: str) -> Markup:
    return _TEXT.format(x=place[0], y=place[1], anchor=anchor, text=text)


def _front(marks: Sequence[Mark], across: Scale, up: Scale) -> Markup:
    places = sorted((across(mark.ratio or 0), up(mark.ssim or 0)) for mark in best(marks))
    return _FRONT.format(points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places))


def _point(index: int, mark: Mark, across: Scale, up: Scale, language: Language) -> Markup:
    x, y = across(mark.ratio or 0), up(mark.ssim or 0)
    kind = "accel-stock" if not mark.title else "" if mark.measured else "accel-rough"
    return _POINT.format(
        kind=kind, index=index, told=told(mark, language), x=x, y=y, base=y + 4.5, r=RADIUS
    )


def state(mark: Mark, language: Language) -> str:
    """What became of a mark that is not in the plot."""
    if mark.state != "done":
        return say(f"part_state_{mark.state}", language)
    return say("explore_incomparable" if mark.ssim is None else "explore_untimed", language)


def told(mark: Mark, language: Language = "en") -> str:
    """A mark in words: what it was set to, how fast and how near it was."""
    title = mark.title or say("explore_stock", language)
    if not mark.plotted:
        return f"{title}: {state(mark, language)}"
    return say(
        "explore_told",
        language,
        title=title,
        ratio=number(mark.ratio or 0, 2, language),
        ssim=number(mark.ssim or 0, 3, language),
    )
