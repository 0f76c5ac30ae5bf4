"""The page of a job: one HTML file without scripts that needs nothing but the pictures beside it.

All of it is put together by ``el``, which escapes whatever is not `Html` already: a prompt, an id
or the name of a file cannot become a part of the page.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from urllib.parse import quote

from app.clips import CLIP

if TYPE_CHECKING:
    from app.batch.manifest import Made
    from app.batch.report import Failure, Figures, Histogram, Method, Row, Spread, Throughput

PALETTE: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#161b22"),
    "ink": ("#1f2933", "#e6edf3"),
    "quiet": ("#52606d", "#a9b4c0"),
    "line": ("#d3d9e0", "#38414c"),
    "accent": ("#1f5fa8", "#7db3f0"),
    "bad": ("#8c1d18", "#ffb4ab"),
    "bad-paper": ("#fbe9e7", "#3b1512"),
    "warn": ("#6b4500", "#f5d27a"),
    "warn-paper": ("#fff4d6", "#3a2c05"),
}
"""By name: in light, in dark. Taken from the other pages, whose module a batch cannot import."""

POLICY = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'"
PICTURES, LINKS, NAMED, LINES, REASONS = 200, 2000, 20, 50, 5
"""How many pictures, links, rows of a failure, lines of a table and reasons are shown."""
SHORT, LONG = 90, 400
"""Characters of a prompt, of a reason."""
WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 640, 262, 74, 24, 42, 52
VOID = ("img", "meta")
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0

CSS = """
:root { color-scheme: light dark; LIGHT }
@media (prefers-color-scheme: dark) { :root { DARK } }
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1.25rem 3rem; max-width: 70rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, "Segoe UI", Roboto, sans-serif;
}
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 0.5rem; font-size: 1.2rem; }
p { margin: 0.3rem 0; overflow-wrap: anywhere; }
a { color: var(--accent); overflow-wrap: anywhere; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.quiet { color: var(--quiet); }
.figures { display: flex; flex-wrap: wrap; gap: 0.75rem; margin: 1.5rem 0 0; padding: 0; }
.figures div {
  flex: 1 1 10rem; padding: 0.7rem 1rem; border: 1px solid var(--line); border-radius: 8px;
}
.figures dt { color: var(--quiet); font-size: 0.9rem; }
.figures dd { margin: 0; }
.figures .quiet { display: block; font-size: 0.85rem; line-height: 1.35; }
.figures strong { display: block; font-size: 1.45rem; line-height: 1.3; }
.figures .bad { color: var(--bad); background: var(--bad-paper); border-color: transparent; }
.figures .bad dt, .figures .bad .quiet { color: inherit; }
.charts {
  display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
}
figure { margin: 0; }
figcaption { font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font-size: 15px; }
svg .bar { fill: var(--accent); }
svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--quiet); }
.scroll { overflow-x: auto; margin: 0.5rem 0; }
table {
  border-collapse: collapse; min-width: min(100%, 36rem); font-variant-numeric: tabular-nums;
}
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th, td { padding: 0.35rem 0.9rem 0.35rem 0; text-align: left; vertical-align: top; }
th, td { border-bottom: 1px solid var(--line); overflow-wrap: break-word; min-width: 4.5rem; }
thead th { color: var(--quiet); font-weight: 600; font-size: 0.9rem; }
tbody th { font-weight: 400; }
td ul { margin: 0; padding: 0; list-style: none; min-width: 14rem; }
.share {
  display: block; width: 8rem; height: 0.6rem; margin: 0.35rem 0; border-radius: 3px;
  background: var(--line); overflow: hidden;
}
.share span { display: block; height: 100%; background: var(--accent); }
.tag {
  display: inline-block; padding: 0 0.5rem; border-radius: 6px; font-size: 0.85rem;
  color: var(--warn); background: var(--warn-paper);
}
.sheet img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
.gallery {
  display: grid; gap: 1rem 0.75rem; margin: 1rem 0; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr));
}
.gallery li { min-width: 0; }
.gallery img, .gallery .clip {
  display: grid; place-items: center; width: 100%; aspect-ratio: 1; object-fit: contain;
  border: 1px solid var(--line); border-radius: 6px; color: var(--quiet); font-size: 0.85rem;
  text-decoration: none;
}
.gallery p { font-size: 0.85rem; line-height: 1.35; }
@media (max-width: 640px) {
  body { padding: 1rem 0.8rem 2rem; }
  svg text { font-size: 22px; }
  .gallery { grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); }
}
"""


class Html(str):
    """Text that is a piece of HTML already."""

    __slots__ = ()


NOTHING = Html("")


def el(name: str, /, *inside: str, **attributes: str | float) -> Html:
    """An element.

    Args:
        name: Of the element.
        inside: What is in it; all but `Html` is escaped.
        attributes: Its attributes, ``_`` standing for ``-``, one at the end for nothing.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_plain(str(value)))}"'
        for key, value in attributes.items()
    )
    if name in VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{joined(inside)}</{name}>")


def joined(parts: Iterable[str]) -> Html:
    """Some pieces one after the other; all but `Html` is escaped."""
    return Html("".join(part if isinstance(part, Html) else _text(part) for part in parts))


def _text(text: str) -> str:
    return html.escape(_plain(text))


def _plain(text: str) -> str:
    """A text on one line without control characters, which HTML does not allow."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", re.sub(r"\s+", " ", text))


def said(text: str, most: int = LONG) -> Html:
    """What a person or a program wrote, cut; its direction of writing does not go beyond it."""
    return el("bdi", _cut(text, most))


def _cut(text: str, most: int) -> str:
    words = " ".join(text[: 4 * most].split())
    return words if len(words) <= most else f"{words[: most - 1]}…"


def link(file: str, *inside: str) -> Html:
    """A link to a file beside the page, or below."""
    return el("a", *inside, href=address(file))


def address(file: str) -> str:
    """The name of a file as a relative address, never one of another place or kind.

    A colon is always encoded, and so are all slashes of a name that begins with one: it is neither
    a scheme such as ``javascript:`` nor the name of a host.
    """
    return quote(file, safe="" if file.startswith("/") else "/")


def draw(figures: Figures, title: str, made: Sequence[Made], shown: int) -> Html:
    """The page.

    Args:
        figures: What it tells.
        title: Its heading.
        made: All rows that were made, in the order of the input.
        shown: How many of them are on the contact sheet; 0: there is none.
    """
    body = el(
        "body",
        el("header", el("h1", said(title)), _date(figures)),
        el(
            "main",
            _headline(figures),
            _charts(figures),
            *(_section(name, part) for name, part in _tables(figures).items() if part),
            _section("Pictures", _pictures(made, shown)) if made else NOTHING,
        ),
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", _cut(title, SHORT)),
        el("style", _css()),
    )
    return Html(f"<!DOCTYPE html>\n{el('html', head, body, lang='en')}\n")


def _css() -> Html:
    light, dark = (
        " ".join(f"--{name}: {pair[side]};" for name, pair in PALETTE.items()) for side in (0, 1)
    )
    return Html(CSS.replace("LIGHT", light).replace("DARK", dark))


def _section(name: str, inside: Html) -> Html:
    return el("section", el("h2", name), inside)


def _date(figures: Figures) -> Html:
    if figures.date is None:
        return NOTHING
    words = datetime.fromisoformat(figures.date).strftime("%Y-%m-%d %H:%M UTC")
    return el("p", el("time", words, datetime=figures.date), class_="quiet")


# the figures at the top


def _headline(figures: Figures) -> Html:
    bad = "bad" if figures.failed else ""
    return el(
        "dl",
        _figure("Rows made", f"{figures.made:,} of {figures.rows:,}", _left(figures)),
        _figure("Failures", f"{figures.failed:,}", _quarantined(figures), bad),
        _figure("Rows per second", _or(figures.rows_per_second), _calls(figures)),
        _figure("Seconds a row, median", _median(figures.seconds_a_row), _work(figures)),
        _figure("Network evaluations a row, median", _median(figures.nfe), _range(figures.nfe)),
        _figure("Files", size(figures.bytes), _peak(figures)),
        class_="figures",
    )


def _figure(name: str, value: str, below: str, kind: str = "") -> Html:
    inside = el("dd", el("strong", value), el("span", below, class_="quiet"))
    return (
        el("div", el("dt", name), inside, class_=kind)
        if kind
        else el("div", el("dt", name), inside)
    )


def _left(figures: Figures) -> str:
    return f"{figures.left:,} left: run the same command again" if figures.left else "none left"


def _quarantined(figures: Figures) -> str:
    if not figures.quarantined:
        return "none quarantined"
    return f"{figures.quarantined:,} quarantined: a resume leaves them alone"


def _calls(figures: Figures) -> str:
    if not figures.ended:
        return "no call has come to its end"
    return f"{span(figures.seconds)} in {count(figures.ended, 'call')} that came to an end"


def _work(figures: Figures) -> str:
    return f"{span(figures.work_seconds)} of work, all workers together"


def _range(spread: Spread | None) -> str:
    if spread is None:
        return ""
    if spread.least == spread.most:
        return "the same in all rows"
    return f"{number(spread.least)} to {number(spread.most)}"


def _peak(figures: Figures) -> str:
    return "" if figures.peak is None else f"{size(figures.peak)} of memory at the peak"


def _or(value: float | None) -> str:
    return "unknown" if value is None else number(value)


def _median(spread: Spread | None) -> str:
    return "unknown" if spread is None else number(spread.median)


# charts


@dataclass(frozen=True)
class Chart:
    """Bars of equal width.

    Attributes:
        title: What is shown.
        values: The height of each bar.
        low, high: Where the first bar begins and the last one ends.
        across, up: What the axes are, with their units.
        whole: Whether the values are numbers of things.
        below: A sentence under it.
    """

    title: str
    values: Sequence[float]
    low: float
    high: float
    across: str
    up: str
    whole: bool = False
    below: str = ""

    def draw(self) -> Html:
        """As a figure with its caption."""
        top = max(self.values)
        words = f"{self.title}: bars of 0 to {number(top)} {self.up}"
        svg = el(
            "svg",
            *(self._across_at(height, top) for height in ticks(0, top, self.whole)),
            *(self._bar(place, value / top) for place, value in enumerate(self.values)),
            *(self._up_at(value) for value in ticks(self.low, self.high)),
            _line(LEFT, HIGH - BOTTOM, WIDE - RIGHT, HIGH - BOTTOM, "axis"),
            _label(0, 18, "start", self.up),
            _label((LEFT + WIDE - RIGHT) / 2, HIGH - 4, "middle", self.across),
            viewBox=f"0 0 {WIDE} {HIGH}",
            role="img",
            aria_label=words,
        )
        below = el("p", self.below, class_="quiet") if self.below else NOTHING
        return el("figure", el("figcaption", self.title), svg, below)

    def _bar(self, place: int, share: float) -> Html:
        width = (WIDE - LEFT - RIGHT) / len(self.values)
        height = (HIGH - TOP - BOTTOM) * share
        gap = min(2.0, width / 5)
        return el(
            "rect",
            x=_short(LEFT + place * width + gap / 2),
            y=_short(HIGH - BOTTOM - height),
            width=_short(width - gap),
            height=_short(height),
            class_="bar",
        )

    def _across_at(self, value: float, top: float) -> Html:
        y = HIGH - BOTTOM - (HIGH - TOP - BOTTOM) * value / top
        line = _line(LEFT, y, WIDE - RIGHT, y, "grid")
        return joined([line, _label(LEFT - 8, y + 5, "end", number(value))])

    def _up_at(self, value: float) -> Html:
        range_ = self.high - self.low
        share = (value - self.low) / range_ if range_ > 0 else 0.5
        x = LEFT + (WIDE - LEFT - RIGHT) * share
        return _label(x, HIGH - BOTTOM + 20, "middle", number(value))


def _short(value: float) -> str:
    return f"{value:.1f}"


def _line(left: float, top: float, right: float, bottom: float, kind: str) -> Html:
    ends = {"x1": left, "y1": top, "x2": right, "y2": bottom}
    return el("line", **{key: _short(end) for key, end in ends.items()}, class_=kind)


def _label(x: float, y: float, anchor: str, text: str) -> Html:
    return el("text", text, x=_short(x), y=_short(y), text_anchor=anchor)


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """At most six round values from ``low`` to ``high``; one value, if they are hardly apart."""
    if high - low <= 1e-6 * max(abs(low), abs(high), 1e-3):
        return [low]
    least = max((high - low) / 5, float(whole))
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= least)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def _charts(figures: Figures) -> Html:
    parts = [
        _over_time(figures.throughput) if figures.throughput else NOTHING,
        _how_long(figures.histogram) if figures.histogram else NOTHING,
    ]
    return _section("Speed", el("div", *parts, class_="charts")) if any(parts) else NOTHING


def _over_time(found: Throughput) -> Html:
    unit, name = _unit(found.last - found.first)
    return Chart(
        title="Throughput over time",
        values=found.rows_per_minute,
        low=0,
        high=(found.last - found.first) / unit,
        across=f"{name} since the first row",
        up="rows a minute",
    ).draw()


def _unit(seconds: float) -> tuple[float, str]:
    for unit, name in ((DAY, "days"), (HOUR, "hours"), (MINUTE, "minutes")):
        if seconds >= 3 * unit:
            return unit, name
    return 1.0, "seconds"


def _how_long(found: Histogram) -> Html:
    high = found.start + found.width * len(found.rows)
    beyond = f"{count(found.beyond, 'row')} took longer than {number(high)} s: not drawn."
    return Chart(
        title="Seconds a row",
        values=found.rows,
        low=found.start,
        high=high,
        across="seconds a row",
        up="rows",
        whole=True,
        below=beyond if found.beyond else "",
    ).draw()


# tables


def _tables(figures: Figures) -> dict[str, Html]:
    """By heading; an empty one where there is nothing to tell."""
    return {
        "Methods": _methods(figures.methods),
        "Failures": _failures(figures.failures),
        "Slowest rows": _slowest(figures),
        "Calls and workers": joined([_batches(figures), _workers(figures)]),
        "Rows with notes": _notes(figures),
        "Damaged lines of the manifest": _damaged(figures),
    }


def table(
    caption: str, heads: Sequence[str], lines: Sequence[Sequence[str]], more: Html = NOTHING
) -> Html:
    """A table that scrolls where it is too wide; the first cell of a line is its heading.

    Args:
        caption: What it shows.
        heads: Of the columns.
        lines: The cells; all but `Html` is escaped.
        more: What comes below it.
    """
    if not lines:
        return NOTHING
    head = el("thead", el("tr", *(el("th", name, scope="col") for name in heads)))
    body = el("tbody", *(_line_of(cells) for cells in lines))
    inside = el("table", el("caption", caption), head, body)
    box = el("div", inside, class_="scroll", role="region", tabindex=0, aria_label=caption)
    return joined([box, more])


def _line_of(cells: Sequence[str]) -> Html:
    first, *others = cells
    return el("tr", el("th", first, scope="row"), *(el("td", cell) for cell in others))


def _methods(methods: Sequence[Method]) -> Html:
    return table(
        "What each method did",
        ("Method", "Active in", "Inactive in", "Share of the steps saved"),
        [
            (
                said(method.name),
                count(method.active, "row"),
                _inactive(method),
                _saved(method.saved),
            )
            for method in methods
        ],
    )


def _inactive(method: Method) -> Html:
    shown, rest = method.reasons[:REASONS], method.reasons[REASONS:]
    lines = [el("li", f"{reason.rows:,} × ", said(reason.text)) for reason in shown]
    if rest:
        others = sum(reason.rows for reason in rest)
        lines.append(el("li", f"{others:,} × {count(len(rest), 'other reason')}: see report.json"))
    inside = el("ul", *lines) if lines else NOTHING
    return joined([count(method.inactive, "row"), inside])


def _saved(spread: Spread | None) -> Html:
    if spread is None:
        return Html("not counted")
    width = 100 * min(1.0, max(0.0, spread.median))
    bar = el("span", el("span", style=f"width: {width:.1f}%"), class_="share", aria_hidden="true")
    words = f"{spread.median:.0%} (half of the rows {spread.lower:.0%} to {spread.upper:.0%})"
    return joined([words, bar])


def _failures(failures: Sequence[Failure]) -> Html:
    lines = [(f"{len(one.rows):,}", _reason(one), _rows(one.rows)) for one in failures[:LINES]]
    more = _more(len(failures) - LINES, "other reason")
    caption = "Rows that could not be made, by reason"
    return table(caption, ("Rows", "Reason", "Which"), lines, more)


def _reason(failure: Failure) -> Html:
    tag = [" ", el("span", "quarantined", class_="tag")] if failure.quarantined else []
    return joined([said(failure.reason), *tag])


def _rows(rows: Sequence[Row]) -> Html:
    """Which rows: place and id."""
    names = [joined([", " if place else "", _row(row)]) for place, row in enumerate(rows[:NAMED])]
    more = f" and {len(rows) - NAMED:,} more" if len(rows) > NAMED else ""
    return joined([*names, more])


def _row(row: Row) -> Html:
    return joined([f"{row.index} (", said(row.id, SHORT), ")"])


def _more(rest: int, what: str) -> Html:
    if rest <= 0:
        return NOTHING
    return el("p", f"{count(rest, what)}: see report.json.", class_="quiet")


def _slowest(figures: Figures) -> Html:
    lines = [
        (str(row.index), said(row.id, SHORT), f"{number(row.seconds)} s", _file(row.file))
        for row in figures.slowest
    ]
    caption = "The rows that took longest"
    spread = figures.seconds_a_row
    if spread is not None:
        caption += f"; half of all rows took {number(spread.lower)} to {number(spread.upper)} s"
    return table(caption, ("Row", "Id", "Seconds", "File"), lines)


def _file(file: str) -> Html:
    return link(file, said(file, SHORT))


def _batches(figures: Figures) -> Html:
    lines = [(f"{size:,}", count(rows, "row")) for size, rows in figures.batches.items()]
    return table("Rows by the size of the call that made them", ("Rows in a call", "Made"), lines)


def _workers(figures: Figures) -> Html:
    lines = [
        (
            said(worker.name or "unnamed", SHORT),
            count(worker.rows, "row"),
            span(worker.seconds),
            _or(worker.rows_per_second),
        )
        for worker in figures.workers[:LINES]
    ]
    heads = ("Worker", "Made", "Time at work", "Rows per second")
    more = _more(len(figures.workers) - LINES, "other worker")
    return table("Workers", heads, lines, more)


def _notes(figures: Figures) -> Html:
    lines = [
        (f"{len(one.rows):,}", said(one.note), _rows(one.rows)) for one in figures.notes[:LINES]
    ]
    more = _more(len(figures.notes) - LINES, "other note")
    return table("What was changed for rows", ("Rows", "Note", "Which"), lines, more)


def _damaged(figures: Figures) -> Html:
    if not figures.damaged:
        return NOTHING
    items = [el("li", said(where)) for where in figures.damaged[:LINES]]
    words = f"Lines that cannot be read, and count as not written: {len(figures.damaged):,}"
    more = _more(len(figures.damaged) - LINES, "other line")
    return joined([el("p", words), el("ul", *items), more])


# pictures


def _pictures(made: Sequence[Made], shown: int) -> Html:
    pictures, links = made[:PICTURES], made[PICTURES : PICTURES + LINKS]
    rest = len(made) - len(pictures) - len(links)
    words = f"{count(rest, 'other file')}: report.json counts them, the manifest names them all."
    return joined(
        [
            _sheet(len(made), shown) if shown else NOTHING,
            el("ul", *map(_picture, pictures), class_="gallery"),
            table("More files", ("Row", "File", "Prompt"), [_linked(row) for row in links]),
            el("p", words) if rest else NOTHING,
        ]
    )


def _sheet(made: int, shown: int) -> Html:
    words = (
        f"All {count(made, 'row')}"
        if shown == made
        else f"{shown:,} of {made:,} rows, evenly chosen"
    )
    picture = el("img", src="contact.jpg", alt=f"Contact sheet: {words}")
    caption = el("figcaption", f"{words}, by their place in the input")
    return el("figure", caption, link("contact.jpg", picture), class_="sheet")


def _picture(row: Made) -> Html:
    about = f"Row {row.index}: {_cut(row.prompt, SHORT)}"
    inside = (
        el("span", "clip", class_="clip")
        if row.file.lower().endswith(CLIP)
        else el("img", src=address(row.file), alt=about, loading="lazy")
    )
    name = el("p", f"{row.index} ", said(row.file.rpartition("/")[2], SHORT))
    prompt = el("p", said(row.prompt, SHORT), class_="quiet")
    return el("li", link(row.file, inside, name), prompt)


def _linked(row: Made) -> tuple[str, str, str]:
    return str(row.index), _file(row.file), said(row.prompt, SHORT)


# figures in words


def count(number_: int, what: str) -> str:
    """So many of something."""
    return f"{number_:,} {what}" + "s" * (number_ != 1)


def number(value: float) -> str:
    """Three digits, and all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def span(seconds: float) -> str:
    """A time, in the two largest units that it has."""
    if seconds < MINUTE:
        return f"{number(seconds)} s"
    whole = round(seconds)
    if seconds < HOUR:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02} min"


def size(amount: float) -> str:
    """Bytes, in the largest unit of which there is one."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{number(amount)} {unit}"
        amount /= 1024
    return f"{number(amount)} TiB"
