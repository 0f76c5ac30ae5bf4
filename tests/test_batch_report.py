"""The report of a batch: figures that add up, a page that no text can break, a contact sheet."""

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from accel.errors import NotWritten
from app import clips
from app.batch import contact, page, report
from app.batch.manifest import Begun, Ended, Failed, Made, State
from app.batch.storage import Folder

NASTY = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "javascript:alert(1)",
    "//example.com/x.png",
    "a\nb\r\n\tc\0d",
    "--></style></svg></title>",
    "&lt;b&gt; &amp;",
    "\u202ereversed",
    "%3Cscript%3E?x=1#y",
)
TEXT = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
IDS = st.sampled_from([*NASTY, *(f"row-{place}" for place in range(20))])
METHODS = st.sampled_from(["cache.EasyCache", "guidance.Interval", NASTY[0]])
SHARES = st.floats(0, 1)
SECONDS = st.floats(0, 1e5)
MOMENTS = st.floats(0, 4e9)
MADE = st.builds(
    Made,
    id=IDS,
    hash=st.just("h"),
    index=st.integers(0, 40),
    file=TEXT.filter(lambda name: name and ".." not in name),
    sha256=st.just("s"),
    bytes=st.integers(0, 10**9),
    pixels=st.just("p"),
    group=st.just("g"),
    batch=st.lists(IDS, max_size=4).map(tuple),
    seed=st.integers(0, 9),
    prompt=TEXT,
    seconds=SECONDS,
    steps=st.integers(1, 50),
    nfe=st.floats(0, 200),
    verdicts=st.dictionaries(
        METHODS,
        st.fixed_dictionaries(
            {"state": st.sampled_from(["ACTIVE", "INACTIVE"]), "detail": TEXT},
        ),
        max_size=3,
    ),
    saved=st.dictionaries(METHODS, SHARES, max_size=3),
    peak=st.none() | st.integers(0, 2**40),
    notes=st.lists(TEXT, max_size=2).map(tuple),
    worker=TEXT,
    moment=MOMENTS,
)
FAILED = st.builds(
    Failed,
    id=IDS,
    hash=st.just("h"),
    index=st.integers(0, 40),
    prompt=TEXT,
    reason=TEXT,
    quarantined=st.booleans(),
    moment=MOMENTS,
)
BEGUN = st.builds(
    Begun,
    rows=st.integers(0, 40),
    seed=st.just(0),
    moment=st.sampled_from(["2026-11-30T12:00:00+02:00", "2026-11-30T12:00:00", "never"]),
)
ENDED = st.builds(
    Ended, seconds=SECONDS, made=st.integers(0, 40), failed=st.integers(0, 40), workers=st.just(1)
)


@st.composite
def _states(draw: st.DrawFn) -> State:
    state = State()
    for line in draw(st.lists(MADE | FAILED | BEGUN | ENDED, max_size=25)):
        state.add(line)
    state.damaged = draw(st.lists(TEXT, max_size=2))
    return state


STATES = _states()
ROWS = st.integers(0, 60)


class Shelf:
    """Files by name; whoever asks for another gets what a storage raises."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = contents

    def get(self, name: str) -> bytes:
        if name not in self.contents:
            raise NotWritten(f"{name!r} is not there.")
        return self.contents[name]


def made(index: int, **given: Any) -> Made:
    plain: dict[str, Any] = {
        "id": f"row-{index}",
        "hash": "h",
        "index": index,
        "file": f"{index:05d}.png",
        "sha256": "s",
        "bytes": 100,
        "pixels": "p",
        "group": "g",
        "batch": (f"row-{index}",),
        "seed": 1,
        "prompt": "a fox",
        "seconds": 1.0,
        "steps": 20,
        "nfe": 20.0,
        "moment": 1e9 + index,
    }
    return Made(**{**plain, **given})


def state_of(*rows: Made | Failed) -> State:
    state = State()
    for row in rows:
        state.add(row)
    return state


def png(colour: str = "red", size: tuple[int, int] = (16, 16), *more: str) -> bytes:
    first, *others = (Image.new("RGB", size, name) for name in (colour, *more))
    buffer = io.BytesIO()
    first.save(buffer, "PNG", save_all=bool(others), append_images=others)
    return buffer.getvalue()


def gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "GIF")
    return buffer.getvalue()


def sheet(*files: tuple[str, bytes | None]) -> Image.Image:
    """The contact sheet of some files; ``None``: it is missing."""
    rows = [made(index, file=name) for index, (name, _) in enumerate(files)]
    shelf = Shelf({name: content for name, content in files if content is not None})
    picture = Image.open(io.BytesIO(contact.draw(rows, shelf)))
    picture.load()
    return picture


# figures


@given(STATES, ROWS)
def test_counts_add_up(state: State, rows: int) -> None:
    found = report.figures(state, rows)
    assert found.made + found.failed + found.left == max(rows, found.made + found.failed)
    assert found.quarantined <= found.failed
    assert sum(found.batches.values()) == found.made
    assert sum(worker.rows for worker in found.workers) == found.made
    assert sum(len(failure.rows) for failure in found.failures) == found.failed
    if found.histogram is not None:
        assert sum(found.histogram.rows) + found.histogram.beyond == found.made
    if found.throughput is not None:
        assert sum(found.throughput.rows) == found.made
        assert 1 <= len(found.throughput.rows) <= report.SLICES


@given(STATES, ROWS)
def test_figures_are_what_a_plain_recount_gives(state: State, rows: int) -> None:
    found, all_made = report.figures(state, rows), list(state.made.values())
    assert found.bytes == sum(row.bytes for row in all_made)
    assert found.peak == max((row.peak for row in all_made if row.peak is not None), default=None)
    assert found.work_seconds == pytest.approx(sum(row.seconds for row in all_made))
    assert found.seconds == pytest.approx(sum(call.seconds for call in state.ended))
    if found.rows_per_second is not None:
        total = sum(call.made for call in state.ended)
        assert found.rows_per_second * found.seconds == pytest.approx(total)
    same_spread(found.nfe, [row.nfe for row in all_made])
    same_spread(found.seconds_a_row, [row.seconds for row in all_made])
    longest = sorted((row.seconds for row in all_made), reverse=True)[:3]
    assert [row.seconds for row in found.slowest] == longest
    assert found.batches == Counter(max(1, len(row.batch)) for row in all_made)
    noted = Counter(note for row in all_made for note in set(row.notes))
    assert {one.note: len(one.rows) for one in found.notes} == noted
    reasons = Counter((row.reason, row.quarantined) for row in state.failed.values())
    assert {(one.reason, one.quarantined): len(one.rows) for one in found.failures} == reasons


@given(STATES)
def test_methods_are_what_a_plain_recount_gives(state: State) -> None:
    all_made = list(state.made.values())
    for method in report.figures(state, 0).methods:
        verdicts = [row.verdicts[method.name] for row in all_made if method.name in row.verdicts]
        states = Counter(verdict["state"] for verdict in verdicts)
        assert (method.active, method.inactive) == (states["ACTIVE"], states["INACTIVE"])
        why = Counter(verdict["detail"] for verdict in verdicts if verdict["state"] == "INACTIVE")
        assert {reason.text: reason.rows for reason in method.reasons} == why
        same_spread(
            method.saved, [row.saved[method.name] for row in all_made if method.name in row.saved]
        )
    names = {method.name for method in report.figures(state, 0).methods}
    assert names == {name for row in all_made for name in (*row.verdicts, *row.saved)}


def same_spread(found: report.Spread | None, values: Sequence[float]) -> None:
    if not values:
        assert found is None
        return
    assert found is not None
    wanted = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    assert list(found.model_dump().values()) == pytest.approx(list(wanted), abs=1e-9)


@given(STATES, ROWS)
def test_figures_come_back_from_json(state: State, rows: int) -> None:
    found = report.figures(state, rows)
    assert report.Figures.model_validate_json(found.to_json()) == found
    json.loads(found.to_json(), parse_constant=pytest.fail)


def test_nothing_has_happened_yet() -> None:
    found = report.figures(State(), 12)
    assert (found.made, found.failed, found.left) == (0, 0, 12)
    assert found.rows_per_second is None and found.throughput is None and found.date is None
    assert list(report.files(State(), 12, Shelf({}), "t")) == ["report.json", "report.html"]


def test_an_hour_without_work_shows_as_zeros() -> None:
    rows = [made(place, moment=1e9 + place) for place in range(100)]
    rows += [made(place, moment=1e9 + 3600 + place) for place in range(100, 200)]
    found = report.figures(state_of(*rows), 200).throughput
    assert found is not None and len(found.rows) == 40
    assert found.rows[0] + found.rows[1] == 100 and found.rows[-2] + found.rows[-1] == 100
    assert not any(found.rows_per_minute[2:-2])
    assert sum(found.rows_per_minute) * found.slice / 60 == pytest.approx(200)


def test_a_row_that_took_an_hour_does_not_press_the_others_together() -> None:
    rows = [made(place, seconds=1 + place / 100) for place in range(99)]
    found = report.figures(state_of(*rows, made(99, seconds=3600)), 100)
    assert found.histogram is not None and found.histogram.beyond == 1
    end = found.histogram.start + found.histogram.width * len(found.histogram.rows)
    assert end == pytest.approx(1.98)
    assert found.slowest[0].seconds == 3600


def test_a_note_that_a_row_has_twice_is_of_one_row() -> None:
    (found,) = report.figures(state_of(made(0, notes=("tried again",) * 2)), 1).notes
    assert found.rows == (report.Row(id="row-0", index=0),)


def test_the_date_is_the_last_moment_of_the_state() -> None:
    state = state_of(made(0, moment=0.0))
    assert report.figures(state, 1).date == "1970-01-01T00:00:00+00:00"
    state.add(Begun(rows=1, seed=0, moment="2026-11-30T12:00:00+02:00"))
    assert report.figures(state, 1).date == "2026-11-30T10:00:00+00:00"
    state.add(made(1, moment=1e300))
    assert report.figures(state, 1).date is None


@settings(max_examples=20)
@given(STATES, st.randoms())
def test_equal_states_give_equal_bytes(state: State, order: Any) -> None:
    shelf = Shelf({row.file: png() for row in state.made.values()})
    again = State(begun=state.begun, ended=state.ended, damaged=state.damaged)
    for ours, theirs in ((state.made, again.made), (state.failed, again.failed)):
        items = list(ours.items())
        order.shuffle(items)
        theirs.update(items)
    assert again == state
    assert report.files(again, 9, shelf, "t") == report.files(state, 9, shelf, "t")


# the page


class Reader(HTMLParser):
    """What a page consists of; a tag that is not closed in order is an error."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags = Counter[str]()
        self.given: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        assert len({name for name, _ in attrs}) == len(attrs)
        self.given += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        pytest.fail(f"a comment: {data}")

    def unknown_decl(self, data: str) -> None:
        pytest.fail(f"a declaration: {data}")

    def values(self, *names: str) -> Iterator[str]:
        return (value for _, name, value in self.given if name in names)


TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "section", "h1", "h2",
    "p", "time", "dl", "div", "dt", "dd", "strong", "span", "figure", "figcaption", "svg",
    "line", "rect", "text", "table", "caption", "thead", "tbody", "tr", "th", "td", "ul", "li",
    "bdi", "a", "img",
}  # fmt: skip
GIVEN = {
    "lang", "charset", "http-equiv", "content", "name", "class", "datetime", "href", "src",
    "alt", "loading", "style", "scope", "role", "tabindex", "aria-label", "aria-hidden",
    "viewbox", "x", "y", "width", "height", "x1", "y1", "x2", "y2", "text-anchor",
}  # fmt: skip


def drawn(state: State, rows: int = 9, title: str = "t") -> str:
    every = report.in_order(state)
    found = report.figures(state, rows)
    return page.draw(found, title, every, len(contact.chosen(every)))


@settings(max_examples=60)
@given(STATES, ROWS, TEXT)
def test_no_text_becomes_a_part_of_the_page(state: State, rows: int, title: str) -> None:
    text = drawn(state, rows, title)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    read = Reader(text)
    assert set(read.tags) <= TAGS
    assert {name for _, name, _ in read.given} <= GIVEN
    assert read.tags["style"] == read.tags["h1"] == read.tags["title"] == 1
    assert all(value.startswith("width: ") for value in read.values("style"))
    body = text.partition("<body>")[2]
    assert not set(body.rstrip("\n")) & {chr(code) for code in (*range(32), *range(127, 160))}
    for nasty in (one for one in NASTY if "<" in one or "\n" in one):
        assert nasty not in body


@settings(max_examples=60)
@given(STATES)
def test_every_link_leads_to_a_file_beside_the_page(state: State) -> None:
    read = Reader(drawn(state))
    files = {row.file for row in state.made.values()}
    links = list(read.values("href"))
    assert {unquote(link) for link in links} == files | ({"contact.jpg"} if files else set())
    for link in [*links, *read.values("src")]:
        assert urlsplit(link)[:2] == ("", "") and not urlsplit(link).query
        assert urljoin("file:///a/b/report.html", link).startswith("file:///a/b/")
        assert unquote(link) in {*files, "contact.jpg"}
    pictures = [value for tag, name, value in read.given if (tag, name) == ("img", "alt")]
    assert len(pictures) == read.tags["img"] and all(pictures)
    assert read.tags["table"] == read.tags["caption"]


def test_texts_are_shown_as_they_are() -> None:
    rows = [made(place, prompt=text, file=f"{text}.png") for place, text in enumerate(NASTY)]
    failed = Failed(
        id=NASTY[0], hash="h", index=99, prompt="", reason=NASTY[1], quarantined=True, moment=0
    )
    read = Reader(drawn(state_of(*rows, failed), title=NASTY[5] + NASTY[6]))
    shown = "".join(read.texts)
    for text in (NASTY[0], NASTY[1], NASTY[2], NASTY[5], NASTY[6], NASTY[7]):
        assert text in shown
    assert "a b c\ufffdd" in shown
    assert "quarantined" in read.texts


def test_policy_lets_nothing_in_but_pictures_and_our_style() -> None:
    read = Reader(drawn(State()))
    assert "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'" in read.values(
        "content"
    )
    assert not {"script", "link", "iframe", "object", "form"} & set(read.tags)


def test_what_a_reader_looks_for_is_there() -> None:
    rows = [
        made(
            place,
            verdicts={"cache.EasyCache": {"state": "INACTIVE", "detail": f"why {place % 7}"}},
            saved={"cache.EasyCache": 0.25},
            notes=("out of memory: made alone",) if place == 5 else (),
            worker="cuda:0",
            peak=3 * 2**30,
        )
        for place in range(40)
    ]
    state = state_of(*rows)
    state.add(Ended(seconds=80, made=40, failed=0))
    shown = "".join(Reader(drawn(state, 45)).texts)
    for text in (
        "40 of 45", "5 left", "0.5", "3 GiB", "25%", "6 × why 0", "10 × 2 other reasons",
        "out of memory: made alone", "cuda:0", "rows a minute", "seconds a row", "All 40 rows",
    ):  # fmt: skip
        assert text in shown, text


@pytest.mark.parametrize(
    ("rows", "pictures", "links", "said"),
    [
        (200, 200, 0, "All 200 rows"),
        (401, 200, 201, "400 of 401 rows, evenly chosen"),
        (2300, 200, 2000, "100 other files"),
    ],
)
def test_many_rows_are_links_and_then_a_sentence(
    rows: int, pictures: int, links: int, said: str
) -> None:
    long = "x" * 5000
    read = Reader(text := drawn(state_of(*(made(place, prompt=long) for place in range(rows)))))
    assert read.tags["img"] == pictures + 1  # the contact sheet
    hrefs = {unquote(link) for link in read.values("href")}
    assert len(hrefs) == pictures + links + 1
    assert said in " ".join(read.texts)
    assert len(text) < 1.5e6


def test_many_failures_do_not_make_a_large_page() -> None:
    long = [
        Failed(id=f"{place}", hash="h", index=place, prompt="", reason=f"{place}" * 999, moment=0)
        for place in range(2000)
    ]
    same = [
        Failed(id=f"same {place}", hash="h", index=place, prompt="", reason="x", moment=0)
        for place in range(2000)
    ]
    state = state_of(*long, *same)
    state.damaged = [f"manifest.jsonl:{place}" for place in range(2000)]
    text = drawn(state)
    assert len(text) < 6e4
    assert "and 1,980 more" in text and "1,951 other reasons" in text
    assert "1,950 other lines" in text


@given(st.floats(0, 1e9), st.floats(0, 1e9), st.booleans())
def test_ticks_are_few_and_inside(low: float, more: float, whole: bool) -> None:
    low = 0 if whole else low
    high = low + more
    found = page.ticks(low, high, whole)
    assert len(found) <= 6 and found == sorted(set(found))
    margin = 1e-6 * max(high, 1e-300)
    assert all(low - margin <= tick <= high + margin for tick in found)
    if low == 0:
        assert found[0] == 0


def test_figures_in_words() -> None:
    assert [page.number(value) for value in (0, 0.1234, 12.34, 99.99, 1234.5)] == [
        "0", "0.123", "12.3", "100", "1,234",
    ]  # fmt: skip
    assert [page.span(value) for value in (1.5, 59.4, 61, 3599.9, 7300)] == [
        "1.5 s", "59.4 s", "1 min 01 s", "60 min 00 s", "2 h 01 min",
    ]  # fmt: skip
    assert [page.size(value) for value in (0, 1023, 1536, 3 * 2**30, 2**50)] == [
        "0 bytes", "1,023 bytes", "1.5 KiB", "3 GiB", "1,024 TiB",
    ]  # fmt: skip
    assert (page.count(1, "row"), page.count(1200, "row")) == ("1 row", "1,200 rows")


def test_colours_are_those_of_the_other_pages() -> None:
    pytest.importorskip("gradio")
    from app.ui import look

    assert page.PALETTE.items() <= look.PALETTE.items()


# the contact sheet


@pytest.mark.parametrize("rows", [1, 2, 400, 401, 1000, 12345])
def test_rows_are_chosen_evenly(rows: int) -> None:
    every = [made(place) for place in range(rows)]
    found = [row.index for row in contact.chosen(every)]
    assert len(found) == min(rows, 400) and (found[0], found[-1]) == (0, rows - 1)
    assert len({later - earlier for earlier, later in pairwise(found)}) <= 2


def test_one_picture_is_enlarged_by_a_whole_factor() -> None:
    picture = sheet(("a.png", png("red", (50, 30))))
    pixels = np.asarray(picture).astype(int)
    red = (pixels[..., 0] > 200) & (pixels[..., 1:] < 60).all(axis=-1)
    rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (150, 90)


def test_a_large_picture_is_reduced() -> None:
    assert sheet(("a.png", png("red", (640, 320)))).size == (160 + 20, 80 + 18 + 20)
    assert sheet(("a.png", png("red", (2000, 1)))).size == (160 + 20, 1 + 18 + 20)


def test_sheet_of_many_rows_is_bounded() -> None:
    state = state_of(*(made(place) for place in range(401)))
    shelf = Shelf({f"{place:05d}.png": png() for place in range(401)})
    files = report.files(state, 401, shelf, "t")
    picture = Image.open(io.BytesIO(files["contact.jpg"]))
    assert picture.size == (10 + 20 * 170, 10 + 20 * 188)
    assert len(files["contact.jpg"]) < 2e6


@pytest.mark.parametrize(
    "content",
    [None, b"", b"\x89PNG\r\n\x1a\n", png("red", (64, 64))[:-40], gif(), b"\0" * 99],
    ids=["missing", "empty", "head", "truncated", "another", "zeros"],
)
@pytest.mark.parametrize("suffix", ["png", "mp4", "", "\0\n/../\u202e"])
def test_what_cannot_be_read_is_a_grey_tile(content: bytes | None, suffix: str) -> None:
    if content is not None and content.startswith(b"\x89PNG") and len(content) > 50:
        content = content[: len(content) // 2]
    picture = sheet((f"x.{suffix}", content), ("good.png", png("red", (160, 160))))
    corner, good = picture.getpixel((160, 160)), picture.getpixel((10 + 170 + 80, 90))
    assert all(abs(value - 208) < 6 for value in corner)
    assert good[0] > 200 and good[1] < 60


def test_a_broken_storage_is_no_reason_to_fail() -> None:
    class Broken:
        def get(self, name: str) -> bytes:
            raise RuntimeError(name)

    assert Image.open(io.BytesIO(contact.draw([made(0)], Broken()))).size == (180, 198)


def test_a_clip_is_shown_by_its_middle_frame() -> None:
    frames = [Image.new("RGB", (64, 64), name) for name in ("red", "red", "lime", "blue", "blue")]
    still = png("red", (64, 64), "#fe0000", "lime", "blue", "#0000fe")
    picture = sheet(("a.mp4", clips.film(frames, 8)), ("b.PNG", still))
    for left in (10 + 64, 10 + 128 + 10 + 64):
        red, green, blue = picture.getpixel((left, 10 + 64))
        assert green > 200 and max(red, blue) < 80


def test_report_of_a_folder(tmp_path: Any) -> None:
    folder = Folder(tmp_path)
    folder.put({"a/ü 1.png": png(), "b.png": png()})
    state = state_of(made(0, file="a/ü 1.png"), made(1, file="b.png"), made(2, file="gone.png"))
    folder.put(report.files(state, 3, folder, "A title"))
    found = report.Figures.model_validate_json((tmp_path / "report.json").read_bytes())
    assert found == report.figures(state, 3)
    read = Reader((tmp_path / "report.html").read_text("utf-8"))
    missing = [link for link in read.values("href") if not (tmp_path / unquote(link)).is_file()]
    assert missing == ["gone.png", "gone.png"]
