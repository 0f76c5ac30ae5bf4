"""Who holds a level of fidelity fastest: one method of ours, ours together, peers, stock in less.

A row holds a level as `accel.tune` holds a target: the mean SSIM of its pictures to stock's reaches
it, and at least 95 % of them do one by one. Of each class the fastest of the sweep is drawn again
on captions that it has not seen, and so is the next one where the sweep cannot tell which of the
two is faster; if one does not hold the level there, another takes its place. What did nothing does
not compete.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, product
from typing import Any

import caches
from contest import MEETS, OURS, STOCK, active, label
from peers import COMPILED

from accel.tuning.targets import SHARE, may_miss

SINGLE, COMPOSED, PEER, STEPS = "single", "composed", "peer", "steps"
SIDES = {
    SINGLE: ("our best single method", "no single method of ours"),
    COMPOSED: ("our best composition", "no composition of ours"),
    PEER: ("the best peer", "no peer"),
    STEPS: ("the best of stock in fewer steps", "no smaller number of stock's steps"),
}
"""By class of contestants, what the best of it is called, and what is said where there is none."""

RUNNERS = 3
"""Who is beaten by so many of its class, by what a few captions can tell, has no hope."""

SPARE, AHEAD = 0.4, 1.1
"""What a few captions cannot tell: this share of 1 − SSIM at a level, and so much of the speed."""

LIKELY, HOPE = 0.85, 0.5
"""Shares of the captions that reach a level: of the sweep's, with which a row may well hold it on
others, and of the first few, with which it may hold it on the sweep's."""

FEWER = "stock in fewer steps"

NAMELESS = ("preset ", "tuned ")
"""Plans whose name does not say what they are made of."""

Row = dict[str, Any]
Level = dict[str, Any]


def side(row: Row) -> str | None:
    """The class of a row; the stock pipeline itself is in none."""
    if row["package"] == OURS:
        return COMPOSED if row["parts"] > 1 or row["tuned"] else SINGLE
    if row["package"] == STOCK:
        return STEPS if row["method"] != STOCK else None
    return PEER


def holds(row: Row, level: float) -> bool:
    """Whether a row holds a level: on average, and nearly all of its captions one by one."""
    found: bool = row["ssim"] >= level and row["meets"][str(level)] >= SHARE
    return found


def hopeful(rows: Sequence[Row]) -> list[Row]:
    """Who may win a level on more captions than a few; stock and tuned plans are always among them.

    A row may hold a level if its SSIM is below it by no more than `SPARE`, and half of its captions
    reach it. It is beaten there if `RUNNERS` of its class hold it by `SPARE` and are `AHEAD` times
    as fast.
    """
    return [
        row
        for row in rows
        if row["method"] == STOCK or row["tuned"] or any(_hopes(row, rows, one) for one in MEETS)
    ]


def _hopes(row: Row, rows: Sequence[Row], level: float) -> bool:
    spare = SPARE * (1 - level)
    if row["inactive"] or row["ssim"] < level - spare or row["meets"][str(level)] < HOPE:
        return False
    safe = [
        one
        for one in active([*rows])
        if side(one) == (side(row) or STEPS) and holds(one, level) and one["ssim"] >= level + spare
    ]
    return sum(_speed(one) > AHEAD * _speed(row) for one in safe) < RUNNERS


def contending(sweep: Sequence[Row], drawn: Sequence[Row], captions: int) -> list[Row]:
    """Of whom more captions must be drawn to say who holds each level; none where that is said.

    Of each class at each level it is the fastest of the sweep that has not failed there, and the
    next one if their quartiles overlap. Stock and tuned plans draw all captions, whatever they
    hold.

    Args:
        sweep: All rows.
        drawn: What they have drawn so far of captions that the sweep has not seen.
        captions: How many of these there are.
    """
    known = {label(row): row for row in drawn}
    open_ = {
        label(row): row for row in sweep if row["tuned"] or row["package"] == row["method"] == STOCK
    }
    for level, one in product(MEETS, SIDES):
        likely = _likely(sweep, one, level)
        left = (row for row in likely if not failed(known, row, level, captions))
        first = [*islice(left, 2)]
        open_ |= {label(row): row for row in first if _overlap(row, first[0])}
    return [row for name, row in open_.items() if _count(known, name) < captions]


def _likely(rows: Sequence[Row], one: str, level: float) -> list[Row]:
    """Rows of a class that may hold a level on other captions, the fastest first."""
    found = [
        row
        for row in active([*rows])
        if side(row) == one and row["ssim"] >= level and row["meets"][str(level)] >= LIKELY
    ]
    return sorted(found, key=lambda row: -_speed(row))


def failed(known: dict[str, Row], row: Row, level: float, captions: int) -> bool:
    """Whether it cannot hold a level any more, or does not in the end.

    Args:
        known: Rows by label; who has none has not failed.
        row: Somebody.
        level: Of SSIM.
        captions: How many are drawn in all.
    """
    drawn = known.get(label(row))
    if drawn is None:
        return False
    missed = round((1 - drawn["meets"][str(level)]) * drawn["seeds"])
    if missed > may_miss(captions):
        return True
    return drawn["seeds"] == captions and not holds(drawn, level)


def _count(known: dict[str, Row], name: str) -> int:
    return known[name]["seeds"] if name in known else 0


def _ranked(rows: Sequence[Row], one: str, level: float) -> list[Row]:
    """Rows of a class that hold a level, the fastest first."""
    holding = [row for row in active([*rows]) if side(row) == one and holds(row, level)]
    return sorted(holding, key=lambda row: -_speed(row))


def levels(sweep: Sequence[Row], verified: Sequence[Row]) -> list[Level]:
    """For each level the best of each class, and how ours stands beside the others.

    Args:
        sweep: All rows, which say whether a peer's sweep ends too early.
        verified: Rows of captions that the sweep has not seen, or none: then the sweep's count. Who
            drew fewer of them than the others had failed at what it was drawn for.
    """
    rows = _whole(verified) or sweep
    found = []
    for level in MEETS:
        best = {one: next(iter(_ranked(rows, one, level)), None) for one in SIDES}
        found.append(
            {
                "level": level,
                "verified": bool(verified),
                "best": {one: row and point(row) for one, row in best.items()},
                "censored": censored(sweep, level),
                "words": list(words(best, level)),
            }
        )
    return found


def _whole(rows: Sequence[Row]) -> list[Row]:
    """Those that have drawn all captions."""
    most = max((row["seeds"] for row in rows), default=0)
    return [row for row in rows if row["seeds"] == most]


def point(row: Row) -> dict[str, Any]:
    """What a table of winners says of a row."""
    names = ("package", "method", "knob", "ssim", "meets", "nfe", "block_rows", "caption_accuracy")
    named = {name: row[name] for name in names}
    made = {"made_of": row.get("made_of", ())}
    return named | made | {"seconds": row["seconds"]["median"], "speedup": row["speedup"]}


def censored(rows: Sequence[Row], level: float) -> list[str]:
    """Curves not of ours that end while they hold a level: one more knob might be faster."""
    curves: dict[str, list[Row]] = {}
    for row in active([*rows]):
        if side(row) in (PEER, STEPS) and row["package"] != COMPILED:
            curves.setdefault(_curve(row), []).append(row)
    return [
        name
        for name, points in curves.items()
        if holds(points[-1], level) and not caches.stands_still(points)
    ]


def _curve(row: Row) -> str:
    return FEWER if row["package"] == STOCK else f"{row['package']}: {row['method']}"


def is_censored(one: Level, which: str) -> bool:
    """Whether the best of a class might not be the best: a sweep of that class ends too early."""
    stock = FEWER in one["censored"]
    others = len(one["censored"]) > stock
    return {STEPS: stock, PEER: others}.get(which, False)


def words(best: dict[str, Row | None], level: float) -> Iterator[str]:
    """How ours stands, in plain sentences: also where it does not win."""
    ours = [row for row in (best[SINGLE], best[COMPOSED]) if row]
    first = max(ours, key=_speed, default=None)
    if first is None:
        yield f"At SSIM ≥ {level:g} nothing of ours holds the level."
    yield _beside(first, best[PEER], level, PEER)
    yield _beside(first, best[STEPS], level, STEPS)
    yield _together(best[COMPOSED], best[SINGLE], level)


def _beside(ours: Row | None, other: Row | None, level: float, what: str) -> str:
    (best, none), at = SIDES[what], f"At SSIM ≥ {level:g}"
    if other is None:
        return f"{at} {none} holds the level."
    if ours is None:
        return f"{at} we do not win: {best} is {title(other)} ({_times(other)})."
    if _speed(ours) > _speed(other):
        return f"{at} {_faster(ours, other, best)}"
    ratio = _speed(other) / _speed(ours)
    return (
        f"{at} we do not win: {best}, {title(other)}, is {ratio:.2f}× as fast as our best, "
        f"{title(ours)}.{_draw(ours, other)}"
    )


def _together(both: Row | None, single: Row | None, level: float) -> str:
    at = f"At SSIM ≥ {level:g}"
    if both is None or single is None:
        none = SIDES[COMPOSED if both is None else SINGLE][1]
        return f"{at} {none} holds the level."
    if _speed(both) > _speed(single):
        return f"{at} composing pays: {_faster(both, single, SIDES[SINGLE][0])}"
    return f"{at} composing does not pay: {_faster(single, both, SIDES[COMPOSED][0])}"


def _faster(one: Row, other: Row, called: str) -> str:
    ratio = _speed(one) / _speed(other)
    return f"{title(one)} is {ratio:.2f}× as fast as {called}, {title(other)}.{_draw(one, other)}"


def _draw(one: Row, other: Row) -> str:
    return " The quartiles overlap: that is as good as a draw." if _overlap(one, other) else ""


def title(row: Row) -> str:
    """What a row is called in a sentence; of a preset and a tuned plan also what it is made of."""
    if row["package"] == STOCK:
        return f"stock in {row['knob']:g} steps" if row["method"] != STOCK else "stock"
    made = row.get("made_of", ())
    short = row["method"].startswith(NAMELESS)
    return f"{label(row)} ({' + '.join(made)})" if made and short else label(row)


def _speed(row: Row) -> float:
    speed: float = row["speedup"]["median"]
    return speed


def _times(row: Row) -> str:
    return f"{_speed(row):.2f}×"


def _overlap(one: Row, other: Row) -> bool:
    first, second = one["speedup"], other["speedup"]
    apart: bool = first["low"] > second["high"] or second["low"] > first["high"]
    return not apart


def markdown(found: Sequence[Level], title: str, notes: Sequence[str]) -> str:
    """The levels as a table to read, the sentences, and what a reader must know."""
    heads = ("SSIM held", "ours, single", "ours, composed", "best peer", "fewer steps")
    lines = [f"{title}", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for one in found:
        cells = [f"{one['level']:g}", *(_cell(one, which) for which in SIDES)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"* {sentence}" for one in found for sentence in one["words"])]
    lines += ["", *(f"* {why_censored(one)}" for one in found if one["censored"])]
    return "\n".join([*lines, "", *(f"* {note}" for note in notes)]).rstrip() + "\n"


def _cell(one: Level, which: str) -> str:
    best, open_ = one["best"][which], " (censored)" if is_censored(one, which) else ""
    if best is None:
        return f"none{open_}"
    share = best["meets"][str(one["level"])]
    figures = f"{best['speedup']['median']:.2f}×, SSIM {best['ssim']:.3f}, {share:.0%} of captions"
    return f"{title(best)} ({figures}){open_}"


def why_censored(one: Level) -> str:
    """What is not known at a level, since sweeps of peers end too early."""
    return (
        f"SSIM ≥ {one['level']:g} is censored: the sweeps of {'; '.join(one['censored'])} end "
        "while they still hold it; with a larger knob they might be faster."
    )
