"""The page of the honest table: one HTML file that needs nothing beside it and asks for nothing.

It looks as the page of a job does and is put together by the same ``el``, which escapes whatever is
no `Html` yet. The only script sorts tables; it and the style are allowed by their hash alone.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import table_charts
import winners
from album import ENOUGH
from contest import MEETS, active, together
from PIL import Image

from accel.tuning.targets import SHARE
from app.batch.page import CSS, NOTHING, PALETTE, Html, count, el, joined

MOST = 1_500_000
"""Bytes of a page."""

QUALITY, LARGEST, FRAMES = 72, 128, 4
"""Of a picture: its quality as WebP, pixels a side at most; of a clip so many frames."""

MORE = """
body { max-width: 78rem; }
.winners td { min-width: 11rem; }
.winners strong { display: block; }
ul.words { padding-left: 1.2rem; margin: 0.6rem 0; }
ul.words li { margin: 0.25rem 0; }
.key { display: flex; flex-wrap: wrap; gap: 0.3rem 1.2rem; margin: 0.4rem 0; padding: 0; }
.key li { list-style: none; display: flex; align-items: center; gap: 0.4rem; }
.key svg { width: 16px; height: 16px; flex: none; }
svg .one { fill: var(--accent); fill-opacity: 0.75; }
svg .both { fill: var(--warn); fill-opacity: 0.8; }
svg .peer { fill: none; stroke: var(--bad); stroke-width: 2; }
svg .fewer { fill: var(--quiet); }
svg .path { fill: none; stroke: var(--quiet); stroke-dasharray: 5 4; }
svg .level { stroke: var(--ink); stroke-dasharray: 2 4; }
svg .mark { pointer-events: all; }
svg .mark:hover { stroke: var(--ink); stroke-width: 3; }
.tall { max-height: 36rem; overflow: auto; }
.tall thead th { position: sticky; top: 0; background: var(--paper); }
th button {
  all: unset; cursor: pointer; display: inline-flex; gap: 0.3rem; align-items: baseline;
}
th button:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
th[aria-sort="ascending"] button::after { content: "↑"; }
th[aria-sort="descending"] button::after { content: "↓"; }
.num, .num button, .rows td { text-align: right; }
.rows td, th.num { white-space: nowrap; padding-right: 1.1rem; }
.rows tbody th { min-width: 15rem; }
.rows td { min-width: 3.5rem; }
.shown {
  display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr));
}
.shown figure { min-width: 0; }
.shown div { display: flex; flex-wrap: wrap; gap: 0.5rem; }
.shown img { max-width: 100%; height: auto; border-radius: 6px; border: 1px solid var(--line); }
.plain { padding-left: 1.2rem; columns: 2 24rem; column-gap: 2rem; }
.plain li { break-inside: avoid; margin: 0.25rem 0; overflow-wrap: anywhere; font-size: 0.9rem; }
summary { cursor: pointer; margin: 0.5rem 0; font-weight: 600; }
@media (max-width: 640px) { .winners td { min-width: 9rem; } .rows tbody th { min-width: 11rem; } }
"""

SCRIPT = """
"use strict";
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), row = head.parentElement;
    const place = [...row.children].indexOf(head);
    const body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of row.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (line) => {
      const cell = line.children[place];
      const number = parseFloat(cell.textContent);
      return Number.isNaN(number) ? cell.textContent : number;
    };
    const compare = (a, b) => {
      const x = value(a), y = value(b);
      const words = typeof x === "string" || typeof y === "string";
      const order = words ? String(x).localeCompare(String(y)) : x - y;
      return down ? -order : order;
    };
    body.append(...[...body.rows].sort(compare));
  });
}
"""

Row = dict[str, Any]


def draw(result: dict[str, Any], title: str, machine: dict[str, Any]) -> str:
    """The page.

    Args:
        result: What `table.measured` found.
        title: What was drawn, in a sentence.
        machine: Where.
    """
    stage = "held-out" if result["rows"]["held-out"] else "sweep"
    main = el(
        "main",
        _figures(result, stage),
        _section("Who holds a level", _winners(result["levels"])),
        _section("Speed beside fidelity", table_charts.draw(active(result["rows"]["sweep"]))),
        _section("Pictures", _shown(result["shown"])),
        *_tables(result),
        *_earlier(result["carried"]),
        _section("What did nothing", _list(result["idle"])),
        _section("What was left out, and why", _list(together(result["left_out"]))),
        _section("How it was measured", _method(result)),
    )
    where = f"{machine['processor']}, {count(machine['threads'], 'thread')}, {machine['date']}"
    versions = ", ".join(f"{name} {one}" for name, one in machine["versions"].items())
    header = el(
        "header",
        el("h1", f"The honest table: {result['model']}"),
        el("p", f"{title}."),
        el("p", f"{where} ({versions})", class_="quiet"),
    )
    style, script = Html(_style()), Html(SCRIPT)
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy(style, script)),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"The honest table: {result['model']}"),
        el("style", style),
    )
    body = el("body", header, main, el("script", script))
    return f"<!DOCTYPE html>\n{el('html', head, body, lang='en')}\n"


def policy(style: str, script: str) -> str:
    """Nothing is loaded; this style and this script alone count."""
    return (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _style() -> str:
    light, dark = (
        " ".join(f"--{name}: {pair[side]};" for name, pair in PALETTE.items()) for side in (0, 1)
    )
    return CSS.replace("LIGHT", light).replace("DARK", dark) + MORE


def _section(name: str, inside: Html) -> Html:
    return el("section", el("h2", name), inside) if inside else NOTHING


def _list(lines: Iterable[str]) -> Html:
    items = [el("li", line) for line in lines]
    return el("ul", *items, class_="plain") if items else NOTHING


# the figures at the top


def _earlier(told: list[str]) -> list[Any]:
    return [_section("Numbers of earlier code", _list(told))] if told else []


def _figures(result: dict[str, Any], stage: str) -> Html:
    rows, stock = result["rows"][stage], result["stock"][stage]
    seconds, speed = stock["seconds"], f"{len(result['rows']['sweep'])} settings in the sweep"
    counted = _find(rows)
    parts = [
        (
            "Stock",
            f"{seconds['median']:.2f} s",
            f"quartiles {seconds['low']:.2f}–{seconds['high']:.2f} s",
        ),
        ("Settings", str(len(result["rows"]["sweep"])), f"{len(result['left_out'])} left out"),
        ("Captions right, stock", f"{stock['caption_accuracy']:.1%}", f"over {stock['captions']}"),
        (
            "Evaluations, stock",
            f"{counted['nfe']:g}",
            f"{counted['block_rows']:.0f} block forwards",
        ),
    ]
    if "motion_accuracy" in stock:
        parts.append(("Motion right, stock", f"{stock['motion_accuracy']:.1%}", speed))
    return el("dl", *(_figure(*part) for part in parts), class_="figures")


def _find(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row["package"] == row["method"] == "stock")


def _figure(name: str, value: str, below: str) -> Html:
    inside = el("dd", el("strong", value), el("span", below, class_="quiet"))
    return el("div", el("dt", name), inside)


# who wins


def _winners(levels: Sequence[dict[str, Any]]) -> Html:
    heads = (
        "SSIM at least",
        "Ours, one method",
        "Ours, together or tuned",
        "Best peer",
        "Stock in fewer steps",
    )
    lines = [(f"{one['level']:g}", *(_best(one, side) for side in winners.SIDES)) for one in levels]
    words = [el("li", sentence) for one in levels for sentence in one["words"]]
    open_ = [el("li", winners.why_censored(one)) for one in levels if one["censored"]]
    whence = (
        "On captions that the sweep has not seen."
        if levels[0]["verified"]
        else "From the sweep itself: the winners are not verified on other captions yet."
    )
    head = el("thead", el("tr", *(el("th", name, scope="col") for name in heads)))
    body = el("tbody", *(_line(cells) for cells in lines))
    table = el("table", head, body, class_="winners")
    box = el(
        "div", table, class_="scroll", role="region", tabindex=0, aria_label="Who holds a level"
    )
    return joined([el("p", whence, class_="quiet"), box, el("ul", *words, *open_, class_="words")])


def _line(cells: Sequence[str]) -> Html:
    first, *others = cells
    return el("tr", el("th", first, scope="row"), *(el("td", cell) for cell in others))


def _best(one: dict[str, Any], side: str) -> Html:
    best = one["best"][side]
    tag = el("span", "censored", class_="tag") if winners.is_censored(one, side) else NOTHING
    if best is None:
        return joined([el("span", "none ", class_="quiet"), tag])
    speed, share = best["speedup"], best["meets"][str(one["level"])]
    spread = f"{speed['low']:.2f}–{speed['high']:.2f}×"
    detail = f"{spread}, SSIM {best['ssim']:.3f}; {share:.0%} of the captions reach it"
    name = joined([winners.title(best), " ", tag])
    return joined([el("strong", f"{speed['median']:.2f}×"), name, el("p", detail, class_="quiet")])


# pictures


def _shown(shown: Sequence[dict[str, Any]]) -> Html:
    figures = [one for entry in shown for one in [_pictures(entry)] if one]
    return el("div", *figures, class_="shown") if figures else NOTHING


def _pictures(entry: dict[str, Any]) -> Html:
    pairs = zip(entry["pictures"], entry["captions"], strict=True)
    drawn = [
        el("img", src=_data(one), alt=f"{entry['name']}: {caption}", title=caption)
        for one, caption in pairs
        if one is not None
    ]
    if not drawn:
        return NOTHING
    return el("figure", el("figcaption", entry["name"]), el("div", *drawn))


def _data(frames: np.ndarray) -> str:
    """A picture, or some frames of a clip side by side, within the page."""
    if frames.ndim == 4:
        places = np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)
        frames = np.concatenate([*frames[places]], axis=1)
    picture = Image.fromarray(frames)
    tall = min(LARGEST, picture.height)
    small = picture.resize((picture.width * tall // picture.height, tall))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# tables


COLUMNS: dict[str, tuple[str, str]] = {
    "seeds": ("captions", "{}"),
    "seconds": ("seconds", "{:.3f}"),
    "speedup": ("faster", "{:.2f}×"),
    "spread": ("quartiles", "{}"),
    "nfe": ("NFE", "{:.1f}"),
    "block_rows": ("blocks", "{:.0f}"),
    "psnr": ("PSNR", "{:.1f}"),
    "ssim": ("SSIM", "{:.4f}"),
    **{f"meets {level}": (f"≥ {level:g}", "{:.0%}") for level in MEETS},
    "perceptual": ("perceptual", "{:.4f}"),
    "frechet_real": ("Fréchet, real", "{:.2f}"),
    "frechet_stock": ("Fréchet, stock", "{:.2f}"),
    "caption_accuracy": ("captions right", "{:.1%}"),
    "motion_accuracy": ("motion right", "{:.1%}"),
    "flicker": ("flicker", "{:.4f}"),
    "compile_seconds": ("compile, s", "{:.1f}"),
}
"""By figure: the head of its column, and how it is written."""


def _tables(result: dict[str, Any]) -> list[Html]:
    verified, sweep = result["rows"]["held-out"], result["rows"]["sweep"]
    about = "On captions that the sweep has not seen: who holds a level, and who failed before"
    parts = [_section(about, _table(about, verified))] if verified else []
    return [*parts, _section("The sweep", _table("The sweep", sweep))]


def _table(caption: str, rows: Sequence[Row]) -> Html:
    """Every row, the fastest first; a click on a head sorts by it."""
    ordered = sorted(rows, key=lambda row: -row["speedup"]["median"])
    there = [key for key in COLUMNS if any(_figure_of(row, key) is not None for row in rows)]
    heads = [_head("setting", ""), *(_head(COLUMNS[key][0], "num") for key in there)]
    lines = [
        el("tr", el("th", _name(row), scope="row"), *(_cell(row, key) for key in there))
        for row in ordered
    ]
    table = el("table", el("thead", el("tr", *heads)), el("tbody", *lines), class_="rows")
    return el("div", table, class_="scroll tall", role="region", tabindex=0, aria_label=caption)


def _head(name: str, kind: str) -> Html:
    more = {"class_": kind} if kind else {}
    return el("th", el("button", name, type="button"), scope="col", **more)


def _name(row: Row) -> Html:
    tag = el("span", "did nothing", class_="tag") if row["inactive"] else NOTHING
    name = winners.title(row)
    return joined([name, " " if tag else "", tag])


def _figure_of(row: Row, key: str) -> Any:
    if key == "spread":
        return f"{row['speedup']['low']:.2f}–{row['speedup']['high']:.2f}"
    if key.startswith("meets "):
        return row["meets"].get(key.removeprefix("meets "))
    found = row.get(key)
    return found["median"] if isinstance(found, dict) else found


def _cell(row: Row, key: str) -> Html:
    found = _figure_of(row, key)
    if found is None:
        return el("td", "–")
    written = found if isinstance(found, str) else COLUMNS[key][1].format(found)
    return el("td", written)


def _method(result: dict[str, Any]) -> Html:
    words = [
        "Every setting draws the same captions and seeds as the stock pipeline, one after the "
        "other in rotating order; each time is compared with the stock time just before. Putting a "
        "method on and taking it off is not timed, nor is compiling.",
        "NFE and block forwards are counted in the layers themselves, below all hooks: they are "
        "what was computed, whoever decided it. Where blocks are compiled, each evaluation counts "
        "as all blocks.",
        "SSIM, PSNR and the perceptual distance are to the stock picture of the same caption and "
        "seed; captions and motion are judged by the bundled oracles; Fréchet distances, from "
        f"{ENOUGH} captions on, are to real scenes and to the stock set.",
        "A level is held, as accel tune holds a target, where the mean SSIM reaches it and at "
        f"least {SHARE:.0%} of the captions do one by one; the columns with ≥ say how many do.",
        "In the sweep all draw a few captions; who is far from holding a level fastest draws no "
        "more. Then of each class the fastest is drawn on captions that the sweep has not seen; "
        "where it cannot hold the level there any more it stops, and the next one is drawn.",
        f"The call: {', '.join(f'{key} {one!r}' for key, one in result['call'].items())}.",
    ]
    return joined(el("p", one) for one in words)
