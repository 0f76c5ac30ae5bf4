"""Draw a report: a row for each method, site and branch, a column for each step.

Where a method leaves out one part of its site and computes another (kinds of modules, a range of
blocks), each part has a row of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

if TYPE_CHECKING:
    from accel.report import Event, Report, State

COLOURS: dict[State, tuple[int, int, int]] = {
    "computed": (47, 85, 151),
    "reused": (244, 177, 131),
    "predicted": (169, 209, 142),
}
INK, PAPER, RULE = (40, 40, 40), (255, 255, 255), (225, 225, 225)
CELL, GAP, LEFT, TOP, LEGEND = 18, 2, 270, 40, 34


def draw(report: Report) -> Image.Image:
    """A picture ``[74 + 20·rows, 282 + 20·steps]`` of computed, reused and predicted steps.

    In a batch, a cell shows the share of the samples by the height of its colours.
    """
    rows = _rows(report)
    width = LEFT + max(report.steps, 12) * (CELL + GAP) + 12
    height = TOP + max(len(rows), 1) * (CELL + GAP) + LEGEND
    picture = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(12)
    title = f"{report.pipeline}: {report.steps} steps, {report.nfe:g} network evaluations"
    pen.text((8, 6), title, INK, font)
    for column in range(0, report.steps, 5):
        pen.text((LEFT + column * (CELL + GAP), 24), str(column), INK, font)
    for line, (label, cells) in enumerate(rows.items()):
        top = TOP + line * (CELL + GAP)
        pen.text((8, top + 2), label, INK, font)
        for column in range(report.steps):
            _cell(pen, LEFT + column * (CELL + GAP), top, cells.get(column, []))
    _legend(pen, height - LEGEND + 10, font)
    return picture


def _rows(report: Report) -> dict[str, dict[int, list[State]]]:
    """By label, in order: the states at each step."""
    rows: dict[str, dict[int, list[State]]] = {}
    for tally in report.tallies:
        parts = _parts(tally.events)
        for event in tally.events:
            for part in parts.get(event.branch, [""]):
                state = event.state if part in event.parts or not part else "computed"
                label = f"{tally.method} · {part or tally.site} · {event.branch}"
                rows.setdefault(label, {}).setdefault(event.step, []).append(state)
    return dict(sorted(rows.items()))


def _parts(events: list[Event]) -> dict[str, list[str]]:
    """By branch, the parts that were left out at some step."""
    found: dict[str, list[str]] = {}
    for event in events:
        for part in event.parts:
            if part not in found.setdefault(event.branch, []):
                found[event.branch].append(part)
    return found


def _cell(pen: ImageDraw.ImageDraw, left: int, top: int, states: list[State]) -> None:
    if not states:
        pen.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline=RULE)
        return
    start = 0.0
    for state, colour in COLOURS.items():
        share = states.count(state) / len(states)
        if share:
            low, high = top + round(start * CELL), top + round((start + share) * CELL) - 1
            pen.rectangle((left, low, left + CELL - 1, high), fill=colour)
        start += share


def _legend(pen: ImageDraw.ImageDraw, top: int, font: Font) -> None:
    left = LEFT
    for state, colour in COLOURS.items():
        pen.rectangle((left, top, left + 11, top + 11), fill=colour)
        pen.text((left + 17, top - 1), state, INK, font)
        left += 90
