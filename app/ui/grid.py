"""The pictures of a sweep as a table: a row a value of the first knob, a column one of the second.

With one knob there is one row. The stock run stands before the table. Every picture is a button,
with the index of its run as the plot has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from app.ui import parts, scatter, sweep
from app.ui.sweep import Mark
from app.ui.words import Language, say

_SHOT = Markup(
    '<button type="button" class="accel-shot" data-index="{index}" aria-label="{told}" '
    'title="{told}">{picture}<span>{index}</span></button>'
)
_PICTURE = Markup('<img src="{source}" alt="" loading="lazy">')
_FILM = Markup('<video src="{source}" muted preload="metadata"></video>')
_NONE = Markup("<span>{index}: {why}</span>")
_STOCK = Markup('<div class="accel-stock-shot">{shot} <span>{name}</span></div>')


@dataclass(frozen=True)
class Shot:
    """What is shown of a run of a sweep.

    Attributes:
        mark: The run.
        source: Where a browser gets its picture; ``None`` where there is none.
        film: Whether that is a clip.
        gone: Whether it left a picture that is not there any more.
    """

    mark: Mark
    source: str | None = None
    film: bool = False
    gone: bool = False


def draw(shots: Sequence[Shot], language: Language = "en") -> Markup:
    """The table of the runs of a sweep, the stock run first."""
    if not shots:
        return Markup()
    stock, *cells = (_cell(index, shot, language) for index, shot in enumerate(shots))
    places = [_place(shot.mark, language) for shot in shots[1:]]
    columns = list(dict.fromkeys(column for _, column in places))
    rows = [
        (row, *(_at((row, column), places, cells) for column in columns))
        for row in dict.fromkeys(row for row, _ in places)
    ]
    first = _STOCK.format(shot=stock, name=say("explore_stock", language))
    heads = [say("explore_settings", language), *columns]
    return first + parts.table(say("explore_grid", language), heads, rows)


def _at(
    wanted: tuple[str, str], places: Sequence[tuple[str, str]], cells: Sequence[Markup]
) -> Markup:
    """What stands at a place of the table."""
    found = (cell for place, cell in zip(places, cells, strict=True) if place == wanted)
    return Markup().join(found)


def _place(mark: Mark, language: Language) -> tuple[str, str]:
    """Head of the row and of the column of a run: each a knob and its value."""
    heads = [f"{short(knob)} = {value}" for knob, value in sweep.settings(mark.title).items()]
    *rows, column = heads or [mark.title]
    return next(iter(rows), say("explore_grid", language)), column


def short(knob: str) -> str:
    """A knob in little space: ``EasyCache.threshold``."""
    return knob.partition(".")[2]


def _cell(index: int, shot: Shot, language: Language) -> Markup:
    if shot.source is None:
        why = say("explore_gone", language) if shot.gone else scatter.state(shot.mark, language)
        return _NONE.format(index=index, why=why)
    picture = (_FILM if shot.film else _PICTURE).format(source=shot.source)
    told = f"{index}: {scatter.told(shot.mark, language)}"
    return _SHOT.format(index=index, told=told, picture=picture)
