"""HTML parts: every text is escaped, every state is told apart, colours can be read."""

import json
import re
from itertools import product
from shutil import which
from subprocess import run

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import HOSTILE, Reader, job, result, same_shape, speedup, words_of
from pydantic import ValidationError

from app.files import without_folders
from app.serve.jobs import Progress
from app.ui import look, parts
from app.ui.words import LANGUAGES

PHASES = ("loading", "encoding", "denoising", "decoding", "measuring", "writing")
TEXTS = st.text(min_size=1) | st.just(HOSTILE) | st.text("<>&\"'{}$/!-", min_size=1)
STATES = ("computed", "reused", "predicted")

WITH_TEXT = {
    "error": parts.error,
    "note": parts.note,
    "outcome": lambda text: parts.outcome(job(state="failed", error=text)),
    "banner of a method": lambda text: parts.banner(
        result(verdicts={"a.B": {"state": "INACTIVE", "detail": text}})
    ),
    "banner of a note": lambda text: parts.banner(result(notes=[text])),
    "progress": lambda text: parts.progress(Progress("a", "measuring", note=text)),
    "timeline": lambda text: parts.timeline(result(events={text: [[0, text, 0, "computed"]]})),
    "quality": lambda text: parts.quality_table(result(quality={"ssim": f"is {text}"})),
    "gone": lambda text: parts.gone([text]),
    "paused": parts.paused,
    "person": parts.person,
    "table": lambda text: parts.table(text, [text, text], [(text, text)]),
}
WITHOUT_FOLDERS = ("error", "outcome", "gone", "paused")


@pytest.mark.parametrize("name", WITH_TEXT)
@given(text=TEXTS)
def test_a_text_is_shown_as_it_is_and_never_becomes_markup(name, text):
    draw = WITH_TEXT[name]
    shown = same_shape(draw(text), draw("plain"))
    assert (without_folders(text) if name in WITHOUT_FOLDERS else text) in shown.text


def test_an_error_names_files_and_no_folders():
    for html in (parts.error("/a/b/c.png is gone"), parts.paused("/a/b/c.png: no space")):
        assert "c.png" in html and "/b" not in html


def test_the_reader_sees_markup_that_was_not_escaped():
    with pytest.raises(AssertionError):
        same_shape(f"<p>{HOSTILE}</p>", "<p>plain</p>")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [(1.2, 2.0, "faster"), (0.5, 0.9, "slower"), (0.9, 1.1, "even"), (2.0, 2.0, "once")],
)
def test_a_badge_says_faster_or_slower_only_beyond_the_spread(low, high, kind, language):
    middle = (low + high) / 2
    html = parts.badge(result(speedup=speedup(middle, low, high)), language)
    shown = Reader(html)
    assert shown.values("class")[0].split()[-1] == f"accel-{kind}"
    for number in (middle, low, high):
        text = f"{number:.2f}"
        assert (text.replace(".", ",") if language == "de" else text) in shown.text
    assert "2026-11-29" in shown.text


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_badge_claims_no_speed_that_was_not_measured(language):
    html = parts.badge(result(speedup=None), language)
    assert "×" not in html and "accel-unmeasured" in html
    assert parts.badge(None, language) == ""


@given(
    verdicts=st.dictionaries(
        st.sampled_from(["cache.A", "cache.B", "tokens.C"]),
        st.sampled_from(["ACTIVE", "INACTIVE"]),
    ),
    partial=st.booleans(),
    notes=st.lists(st.sampled_from(["the VAE was tiled", "cache.A did nothing: as cache.A"])),
)
def test_nothing_that_was_inactive_passes_unseen(verdicts, partial, notes):
    told = {name: {"state": state, "detail": f"as {name}"} for name, state in verdicts.items()}
    html = parts.banner(result(verdicts=told, partial=partial, notes=notes))
    text = words_of(html)
    for name, state in verdicts.items():
        assert (f"{name} INACTIVE: as {name}" in text) == (state == "INACTIVE")
    assert ("Stopped early" in text) == partial
    assert ("VAE" in text) == ("the VAE was tiled" in notes)
    idle = "INACTIVE" in verdicts.values()
    told_again = "cache.A" in verdicts
    others = any(note.startswith("the") or not told_again for note in notes)
    assert (html == "") == (not idle and not partial and not others)


@given(
    st.dictionaries(
        st.sampled_from(["cache.A", "guidance.B"]),
        st.lists(
            st.tuples(
                st.integers(0, 11),
                st.sampled_from(["cond", "uncond"]),
                st.integers(0, 2),
                st.sampled_from(STATES),
            ),
            min_size=1,
        ),
        min_size=1,
    )
)
def test_a_timeline_has_a_cell_for_every_row_and_step(events):
    plain = {name: [list(event) for event in each] for name, each in events.items()}
    shown = Reader(parts.timeline(result(events=plain)))
    rows = {(name, branch) for name, each in events.items() for _, branch, _, _ in each}
    steps = 1 + max(step for each in events.values() for step, _, _, _ in each)
    assert shown.tags.count("td") == len(rows) * steps
    assert shown.tags.count("th") == 1 + steps + len(rows)
    assert set(shown.values("scope")) == {"col", "row"}
    told = parts.cells(plain)
    for name, each in events.items():
        for step, branch, _, _ in each:
            there = {s for at, b, _, s in each if (at, b) == (step, branch)}
            assert told[f"{name} · {branch}"][step] == (there.pop() if len(there) == 1 else "mixed")
    titles = [title for title in shown.values("title") if title]
    assert len(titles) == sum(len(row) for row in told.values())


def test_a_timeline_of_nothing_is_nothing():
    assert parts.timeline(None) == parts.timeline(result(events={})) == ""


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("step", "total", "skipped"), [(0, None, 0), (3, 20, 2), (21, 20, 0)])
def test_progress_tells_step_and_skipped_steps(phase, step, total, skipped, language):
    now = Progress("a", phase, step, total, skipped, 1.0, eta=3.4)
    shown = Reader(parts.progress(now, language))
    counted = phase == "denoising"
    assert ("3" in shown.text) and shown.values("aria-label")[0]
    assert (str(total) in shown.text) == (counted and total is not None)
    assert bool(re.search(r"skipped|übersprungen", shown.text)) == (counted and skipped > 0)
    if counted and total:
        (value,), (most,) = shown.values("value"), shown.values("max")
        assert 0 <= int(value) <= int(most) == total
    else:
        assert not shown.values("value")


@pytest.mark.parametrize(("position", "eta"), list(product([0, 1, 7, None], [None, 0.2, 90.0])))
def test_a_waiting_job_tells_its_place_and_time(position, eta):
    text = words_of(parts.waiting(job(state="queued", position=position, eta=eta)))
    assert (f"{position} before" in text) == bool(position)
    assert ("s left" in text) == (eta is not None) and " 0 s" not in text


@pytest.mark.parametrize("state", ["queued", "running", "done", "stopped", "failed", "quarantined"])
@pytest.mark.parametrize("error", [None, "It is so: do this."])
def test_a_job_that_gave_nothing_says_why(state, error):
    html = parts.outcome(job(state=state, error=error))
    assert ('role="alert"' in html) == (error is not None)
    assert (html == "") == (error is None and state != "stopped")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_result_holds_no_figure_that_json_cannot(value):
    with pytest.raises(ValidationError, match="finite"):
        result(quality={"psnr": value})


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["psnr", "ssim", "perceptual", "flicker"])
@pytest.mark.parametrize("value", [0.5, "equal", "the sizes differ"])
def test_quality_is_a_figure_or_the_reason_why_there_is_none(name, value, language):
    html = parts.quality_table(result(quality={name: value}), language)
    (figure,) = re.findall(r"<td>(.*?)</td>", html)[:1]
    if value == 0.5:
        assert figure == {"en": "0.500", "de": "0,500"}[language][: 3 if name == "psnr" else 5]
    elif value == "the sizes differ":
        assert figure == value
    else:
        assert figure == {"en": "equal", "de": "gleich"}[language]


def test_quality_of_nothing_is_nothing():
    assert parts.quality_table(None) == parts.quality_table(result(quality={})) == ""


def test_a_preview_is_a_picture_with_a_name():
    shown = Reader(parts.preview(b'\x89PNG"<>'))
    assert shown.tags == ["img"] and shown.values("alt")[0]
    assert shown.values("src")[0].startswith("data:image/png;base64,")


# the look


def luminance(colour):
    parts = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_measured_as_wcag_defines_it():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("side", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(("ink", "paper"), look.PAIRS)
def test_every_text_can_be_read(ink, paper, side):
    assert contrast(look.PALETTE[ink][side], look.PALETTE[paper][side]) >= 4.5


def test_the_css_uses_the_palette_and_nothing_else():
    used = set(re.findall(r"var\(--accel-([a-z-]+)\)", look.CSS))
    assert used <= set(look.PALETTE)
    rules = look.CSS.split("\n", 2)[2]
    assert not re.search(r"#[0-9a-fA-F]{3,6}\b", rules), "a colour beside the palette"


def test_every_class_of_a_part_has_a_look():
    known = set(re.findall(r"\.(accel-[a-z-]+)", look.CSS))
    states = {"computed", "reused", "predicted", "mixed", "faster", "slower", "warning", "error"}
    assert {f"accel-{state}" for state in states} <= known


DOCUMENT = """
const [script, cases] = JSON.parse(require("fs").readFileSync(0));
const pressed = (now) => {
  const found = [], heard = { true: [], false: [] };
  const button = (click) => ({ disabled: now.disabled, offsetParent: {}, click });
  const buttons = Object.fromEntries(
    ["generate", "stop"].map((id) => [id, button(() => found.push(id))])
  );
  globalThis.document = {
    activeElement: { matches: () => now.list },
    querySelector: () => (now.over ? {} : null),
    fullscreenElement: now.full ? {} : null,
    getElementById: (id) => buttons[id],
    addEventListener: (name, hear, first = false) => heard[first].push(hear),
  };
  const event = { ...now.key, isComposing: now.composing, defaultPrevented: false };
  event.preventDefault = () => { event.defaultPrevented = true; };
  eval(script)();
  heard.true.forEach((hear) => hear(event));
  if (now.handled) event.preventDefault();
  now.list = false;  // it closes, as it hears the key
  heard.false.forEach((hear) => hear(event));
  return found;
};
console.log(JSON.stringify(cases.map(pressed)));
"""
"""Enough of a page to press keys in: what is open hears a key before the page does."""
TAKEN = ("list", "over", "full", "handled", "composing", "disabled")


@pytest.mark.skipif(which("node") is None, reason="node runs the script of the page")
@pytest.mark.parametrize(
    ("key", "button"),
    [
        ({"key": "Escape"}, "stop"),
        ({"key": "Enter", "ctrlKey": True}, "generate"),
        ({"key": "Enter", "metaKey": True}, "generate"),
        ({"key": "Enter"}, None),
        ({"key": "a"}, None),
    ],
)
def test_a_key_presses_its_button_where_it_belongs_to_nothing_else(key, button):
    cases = [
        {"key": key, **dict(zip(TAKEN, taken, strict=True))}
        for taken in product([False, True], repeat=len(TAKEN))
    ]
    given = json.dumps([look.KEYS, cases])
    done = run(["node", "-e", DOCUMENT], input=given, capture_output=True, text=True, check=True)
    for case, found in zip(cases, json.loads(done.stdout), strict=True):
        free = not any(case[name] for name in TAKEN)
        assert found == ([button] if free and button else []), case


def test_the_theme_downloads_no_font():
    assert not look.theme()._stylesheets
