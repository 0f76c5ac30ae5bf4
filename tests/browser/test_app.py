"""The app as a person meets it: in a browser, with mouse and keyboard, on any screen.

One server and one browser for all; every test is a new visitor.
"""

import io
import json
import re
import shlex
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from secrets import randbelow
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Route, expect

from accel import Plan
from accel.expected import measured
from accel.tuned import Figure, Tuned
from app import metadata
from app.request import FILES
from app.ui import look
from browser.visitor import BEGINS, OVERFLOW, PROMPT, TABS, WATCH, Visitor

Visit = Callable[..., Visitor]
STEP = re.compile(r"step (\d+) of (\d+)(?:, (\d+) of them skipped)?")
SEVERAL_STEPS = re.compile(r"step ([2-9]|\d\d)")
SCREENS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "small": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}},
    "small-dark": {"color_scheme": "dark", "viewport": {"width": 390, "height": 844}},
}

ORDER = f"""async (url) => {{
  const order = [], fetched = window.fetch;
  window.fetch = async () => {{
    order.push("joined");
    setTimeout(() => order.push("stream ends"), 20);
  }};
  ({look.JOINS})();
  await window.fetch(url);
  order.push("heard");
  window.fetch = fetched;
  return order;
}}"""
"""In which order a page is told of an answer, and of a stream that ends 20 ms after it."""
CLIPS = '[...document.querySelectorAll("#compare-clips video")]'
BOTH = f"(holds) => {CLIPS}.every((video) => new Function('video', 'return ' + holds)(video))"
NEAR = f"""() => {{
  const [one, other] = {CLIPS}.map((video) => video.currentTime);
  return Math.abs(one - other) <= 0.05;
}}"""
"""What holds of both clips of a comparison; whether they stand at the same moment."""


def record(picture: bytes) -> metadata.Record:
    """What the file of a picture says of how it was made."""
    with Image.open(io.BytesIO(picture)) as image:
        return metadata.parse(image.text[metadata.KEY], "the picture")


# making pictures


def test_the_first_picture_takes_one_click(visit: Visit) -> None:
    visitor = visit()
    visitor.press("generate")
    visitor.ended()
    made = record(visitor.picture())
    assert made.plan != {"plan": 1} and made.request["prompt"]
    assert visitor.into("seed").input_value() == str(made.request["seed"])
    assert f"{made.result.steps} steps" in visitor.at("badge").inner_text()
    expect(visitor.page.locator("#timeline table")).to_be_visible()
    for button in ("compare-stock", "copy-cli", "copy-python"):
        expect(visitor.at(button)).to_be_enabled()


def test_progress_and_preview_come_while_it_runs(visit: Visit) -> None:
    visitor = visit()
    visitor.page.evaluate(WATCH)
    visitor.ask(steps="150")
    visitor.goal("fast")
    visitor.generate()
    seen = visitor.page.evaluate("() => window.seen")
    found = [match for one in seen if (match := STEP.search(one["text"]))]
    steps = [int(match[1]) for match in found]
    skipped = [int(match[3] or 0) for match in found]
    assert len(set(steps)) >= 4 and steps == sorted(steps)
    assert {match[2] for match in found} == {"150"}
    assert skipped == sorted(skipped) and 0 < skipped[-1] < 150
    sizes = [one["size"] for one in seen if one["size"] and one["size"][0]]
    assert sizes and max(max(size) for size in sizes) <= 256
    expect(visitor.page.locator("#preview img")).to_have_count(0)


def test_a_stopped_run_leaves_a_partial_and_no_trace(
    visit: Visit, fresh: Callable[..., Path]
) -> None:
    visitor = visit()
    visitor.ask(prompt=PROMPT, steps="200", width="256", height="256")
    visitor.goal("balanced")
    visitor.lock(7)
    visitor.press("generate")
    expect(visitor.at("progress")).to_have_text(SEVERAL_STEPS)
    visitor.page.keyboard.press("Escape")
    visitor.ended()
    partial = record(visitor.picture())
    assert partial.result.partial and 0 < partial.result.steps < 200
    assert "Stopped early" in visitor.at("banner").inner_text()
    assert visitor.jobs()[0]["state"] == "stopped"

    visitor.ask(steps="6", width="64", height="64")
    visitor.generate()
    after = record(visitor.picture())
    assert not after.result.partial

    visitor.at("copy-cli").click()
    shown = visitor.page.locator("#copied .cm-content, #copied code").first
    command = shlex.split(shown.inner_text())
    assert command[:2] == ["accel", "generate"]
    folder = fresh(*command[1:], "--out", "fresh.png")
    alone, _ = metadata.read(folder / "fresh.png")
    assert alone.fingerprint == after.fingerprint
    assert alone.pixels == after.pixels


def test_a_stream_that_ends_is_heard_of_before_what_has_joined(browser: Browser) -> None:
    empty = browser.new_page()  # the app's own page asks for things too, at any moment
    assert empty.evaluate(ORDER, "/gradio_api/queue/join?") == ["joined", "stream ends", "heard"]
    assert empty.evaluate(ORDER, "/gradio_api/run/predict") == ["joined", "heard"]
    empty.close()


def test_a_run_is_found_again_after_a_reload(visit: Visit) -> None:
    visitor = visit()
    visitor.ask(prompt="a boat on the sea", steps="200", width="256", height="256")
    visitor.goal("exact")  # takes longer than a page to load
    visitor.lock(11)
    visitor.press("generate")
    expect(visitor.at("progress")).to_have_text(re.compile("step [1-9]"))
    visitor.open()
    expect(visitor.into("prompt")).to_have_value("a boat on the sea")
    expect(visitor.into("seed")).to_have_value("11")
    expect(visitor.at("progress")).to_have_text(re.compile(r"step \d"))
    expect(visitor.at("generate")).to_be_disabled()
    visitor.at("stop").click()
    expect(visitor.at("generate")).to_be_enabled()
    assert record(visitor.picture()).request["seed"] == 11
    visitor.open()
    assert record(visitor.picture()).request["seed"] == 11


def test_a_clip_is_made_and_shown(visit: Visit) -> None:
    visitor = visit()
    visitor.choose("model", "scenes-wan")
    expect(visitor.into("frames")).to_be_enabled()
    visitor.ask(steps="3", frames="5")
    visitor.generate()
    expect(visitor.page.locator("#result video")).to_be_visible()
    assert visitor.jobs()[0]["files"].keys() >= {"picture", "record"}


@pytest.mark.parametrize("names", [("image",), ("image", "mask")])
def test_pictures_that_are_brought_go_in(
    visit: Visit, tmp_path: Path, names: tuple[str, ...]
) -> None:
    visitor = visit()
    visitor.at("inputs").locator("button").first.click()
    brought = {name: tmp_path / f"{name}.png" for name in names}
    for name, file in brought.items():
        Image.new("RGB", (128, 128), {"image": "teal", "mask": "white"}[name]).save(file)
        visitor.page.locator(f"#{name} input[type=file]").set_input_files(file)
        expect(visitor.page.locator(f"#{name} img")).to_be_visible()
    visitor.ask(steps="5", strength="0.6")
    visitor.generate()
    made = record(visitor.picture())
    assert made.request["strength"] == 0.6 and made.result.steps < 5
    digests = {name: sha256(file.read_bytes()).hexdigest() for name, file in brought.items()}
    assert made.inputs == digests
    assert {name for name in FILES if made.request.get(name)} == set(names)


def test_who_comes_later_sees_how_many_go_before(visit: Visit) -> None:
    running, waiting, last = visitors = [visit() for _ in range(3)]
    for visitor, said in zip(visitors, ("step [1-9]", "it is next", "1 before it"), strict=True):
        visitor.ask(steps="200", width="256", height="256")
        visitor.goal("exact")
        visitor.press("generate")
        expect(visitor.at("progress")).to_have_text(re.compile(said))
    waiting.at("stop").click()
    waiting.ended()
    assert "stopped" in waiting.at("banner").inner_text()
    expect(last.at("progress")).to_have_text(re.compile("it is next"))
    running.at("stop").click()
    running.ended()
    expect(last.at("progress")).to_have_text(re.compile("step [1-9]"))
    last.at("stop").click()
    last.ended()


def test_a_file_of_ours_brings_its_settings_back(visit: Visit, tmp_path: Path) -> None:
    visitor = visit()
    visitor.ask(prompt="a lighthouse at night", steps="5", guidance="2.5")
    visitor.goal("fastest")
    visitor.lock(2**62 + 1)
    visitor.generate()
    file = tmp_path / "ours.png"
    file.write_bytes(visitor.picture())

    other = visit()
    other.page.locator("#drop input[type=file]").set_input_files(file)
    expect(other.at("restored")).to_have_text(re.compile("restored from"))
    for name, value in {
        "prompt": "a lighthouse at night",
        "seed": str(2**62 + 1),
        "steps": "5",
        "guidance": "2.5",
    }.items():
        expect(other.into(name)).to_have_value(value)
    expect(other.page.locator('#goal input[value="fastest"]')).to_be_checked()
    other.generate()
    assert record(other.picture()).pixels == record(file.read_bytes()).pixels


def test_a_foreign_file_is_refused_in_words(visit: Visit, tmp_path: Path) -> None:
    file = tmp_path / "foreign.png"
    Image.new("RGB", (8, 8), "teal").save(file)
    visitor = visit()
    visitor.page.locator("#drop input[type=file]").set_input_files(file)
    expect(visitor.page.locator("#restored [role=alert]")).to_contain_text("foreign.png")


def test_a_prompt_is_text_and_nothing_else(visit: Visit) -> None:
    visitor = visit()
    visitor.ask(prompt="<img src=x onerror=\"document.title='taken'\"><b>bold</b>", steps="2")
    visitor.generate()
    visitor.turn_to("gallery")
    visitor.at("gallery-refresh").click()
    newest = visitor.page.locator("#gallery-grid button").filter(has=visitor.page.locator("img"))
    expect(newest.first).to_contain_text("<b>bold</b>")  # what was there before is gone
    newest.first.click()
    expect(visitor.at("gallery-details")).to_contain_text("<b>bold</b>")
    assert visitor.page.title() != "taken"


# knobs


def test_knobs_that_do_not_fit_say_why(visit: Visit) -> None:
    visitor = visit()
    visitor.choose("model", "scenes-unet")
    visitor.at("knobs").locator("button").first.click()
    switches = visitor.page.locator("#knobs [id^=method-]")
    expect(switches.first).to_be_attached()
    off = visitor.page.locator("#knobs [id^=method-]:has(input:disabled)")
    assert 0 < off.count() < switches.count()
    for text in off.all_text_contents():
        assert re.search(r"Cannot be added: \S+ \S+", text), text


def test_a_knob_that_is_turned_is_what_runs_and_no_tuned_plan_any_more(
    visit: Visit, tmp_path: Path
) -> None:
    visitor = visit()
    visitor.ask(steps="6")
    visitor.page.locator("#drop input[type=file]").set_input_files(tuned(tmp_path / "near.toml"))
    expect(visitor.page.locator("#evidence table")).to_be_visible()
    visitor.at("knobs").locator("button").first.click()
    threshold = visitor.page.locator(
        "#knobs [id^=knob-][id*=EasyCache][id$=-threshold] input"
    ).first
    expect(threshold).to_be_visible()
    threshold.fill("0.123")
    threshold.blur()
    expect(visitor.page.locator("#evidence table")).to_have_count(0)
    visitor.ask(budget="0.5")
    visitor.generate()
    made = record(visitor.picture()).plan
    assert made["cache"]["EasyCache"]["threshold"] == 0.123 and "tuned" not in made
    assert made["guard"]["max_error"] == 0.5
    expect(visitor.at("guarded")).to_contain_text("of 0.5")
    visitor.goal("fast")
    [fast] = [one.threshold for one in Plan.preset("fast") if one.name == "cache.EasyCache"]
    expect(threshold).to_have_value(f"{fast:g}")
    threshold.fill("0.3")
    threshold.blur()
    expect(visitor.page.locator('#goal input[value="custom"]')).to_be_checked()


def tuned(path: Path) -> Path:
    """A file of *balanced* with evidence that it was tuned for scenes-flux."""
    network = measured().networks["scenes-flux"]
    evidence = Tuned(
        targets=("ssim>=0.9",),
        methods="",
        network=network.identity,
        pipeline=network.pipeline,
        scheduler=network.scheduler,
        call=(("num_inference_steps", 28.0),),
        machine="a machine",
        versions=(),
        prompts=1,
        held_out=1,
        texts="",
        figures=(Figure(measure="speedup", mean=2.0, low=1.9, high=2.1),),
        plans=1,
        minutes=1.0,
        date="2026-11-30",
    )
    path.write_text(Plan.preset("balanced").proven(evidence).to_toml())
    return path


# the other pages


def test_a_comparison_shows_both_sides_and_what_was_measured(visit: Visit) -> None:
    visitor = visit()
    visitor.ask(steps="6")
    visitor.lock(5)
    compare(visitor)
    expect(visitor.page.locator("#compare-slider img")).to_have_count(2)
    table = visitor.at("compare-table").inner_text()
    for word in ("Stock", "Accelerated", "SSIM", "PSNR"):
        assert word in table
    assert re.search(r"\d\.\d\d× \(\d+\.\d\d–\d+\.\d\d\)", table)
    expect(visitor.page.locator("#compare-timeline td[class*=accel-]").first).to_be_visible()
    job = visitor.jobs()[0]
    assert job["kind"] == "compare" and job["request"]["seed"] == 5
    assert job["files"].keys() >= {"baseline", "accelerated", "difference", "sheet", "report"}


def test_two_clips_play_as_one(visit: Visit) -> None:
    visitor = visit()
    visitor.choose("model", "scenes-wan")
    expect(visitor.into("frames")).to_be_enabled()
    visitor.ask(steps="3", frames="5")
    compare(visitor)
    clips = visitor.page.locator("#compare-clips video")
    expect(clips).to_have_count(2)
    visitor.page.wait_for_function(BOTH, arg="video.readyState >= 3")
    visitor.at("compare-play").click()
    visitor.page.wait_for_function(BOTH, arg="!video.paused")
    visitor.at("compare-play").click()
    visitor.page.wait_for_function(BOTH, arg="video.paused")
    for one in (0, 1):
        at = clips.nth(one).evaluate(f"(video) => video.currentTime = video.duration * 0.{one + 3}")
        visitor.page.wait_for_function(BOTH, arg=f"Math.abs(video.currentTime - {at}) < 0.04")
        clips.nth(one).evaluate("(video) => video.play()")
        visitor.page.wait_for_function(BOTH, arg="!video.paused")
        clips.nth(one).evaluate("(video) => video.pause()")
        visitor.page.wait_for_function(BOTH, arg="video.paused")
        visitor.page.wait_for_function(NEAR)


def test_a_sweep_is_a_grid_and_a_plot_of_which_points_load(visit: Visit) -> None:
    visitor = visit()
    visitor.ask(steps="6")
    visitor.lock(4)
    sweep(visitor)
    expect(visitor.page.locator("#explore-grid button img")).to_have_count(5)
    points = visitor.page.locator("#explore-plot [data-index]")
    expect(points).to_have_count(5)
    jobs = visitor.jobs()[:5][::-1]
    assert [job["plan"] == {"plan": 1} for job in jobs] == [True, *[False] * 4]
    assert len({json.dumps(job["plan"]) for job in jobs}) == 5
    visitor.shoot("explore-done")

    points.nth(2).focus()
    visitor.page.keyboard.press("Enter")
    expect(visitor.at("tab-generate")).to_be_visible()
    expect(visitor.page.locator('#goal input[value="custom"]')).to_be_checked()
    expect(visitor.into("seed")).to_have_value("4")
    chosen = int(points.nth(2).get_attribute("data-index") or "")
    visitor.generate()
    assert record(visitor.picture()).plan == jobs[chosen]["plan"]


def test_values_are_proposed_once_and_not_over_what_was_typed_after(visit: Visit) -> None:
    """A list says twice that it was chosen from; the second answer may be a slow one."""
    visitor, asked = visit(), list[str]()
    visitor.turn_to("explore")
    visitor.page.on("request", lambda one: asked.append(one.post_data or ""))
    visitor.choose("explore-second", "cache.EasyCache.warmup")
    values = visitor.into("explore-second-values")
    expect(values).not_to_have_value("")
    visitor.page.wait_for_timeout(500)
    assert sum('"cache.EasyCache.warmup"' in one for one in asked) == 1, asked
    visitor.choose("explore-second", "cache.EasyCache.threshold")
    expect(values).to_have_value(re.compile(r"0\.\d"))


@pytest.mark.parametrize("answered", [True, False])
def test_no_knob_is_chosen_before_it_is_known_which_fit(visit: Visit, answered: bool) -> None:
    """Else the knobs that come take away what was typed, and another one is chosen."""
    visitor, held, asked = visit(), list[Route](), "**/gradio_api/run/predict*"

    def hold(route: Route) -> None:
        held.append(route)

    visitor.page.route(asked, hold)
    lists = [visitor.at("explore-knob"), visitor.at("explore-second")]
    visitor.turn_to("explore")
    for one in lists:
        expect(one).to_have_js_property("inert", True)
    [offer] = held
    if answered:
        visitor.page.unroute(asked)  # lets what is held go on
    else:
        offer.fulfill(status=500, json={"error": "something broke"})
        visitor.page.unroute(asked)
    for one in lists:
        expect(one).to_have_js_property("inert", False)
    visitor.wrong = [] if not answered else visitor.wrong
    visitor.choose("explore-second", "cache.EasyCache.warmup")
    expect(visitor.into("explore-second-values")).not_to_have_value("")


def test_the_gallery_finds_restores_deletes_and_brings_back(visit: Visit) -> None:
    visitor = visit()
    seed = randbelow(10**12)
    visitor.ask(prompt="a windmill under a rainbow", steps="2")
    visitor.lock(seed)
    visitor.generate()
    [job] = [job for job in visitor.jobs() if job["request"]["seed"] == seed]

    other = visit()
    other.turn_to("gallery")
    pictures = other.page.locator("#gallery-grid button:has(img)")
    other.ask(gallery_search="nothing of that name")
    expect(other.at("tab-gallery")).to_contain_text("Nothing here yet")
    other.ask(gallery_search=f"rainbow {seed} WINDMILL")
    expect(pictures).to_have_count(1)
    pictures.first.click()
    expect(other.at("gallery-details")).to_contain_text("a windmill under a rainbow")
    other.at("gallery-restore").click()
    expect(other.at("tab-generate")).to_be_visible()
    expect(other.into("prompt")).to_have_value("a windmill under a rainbow")
    expect(other.into("seed")).to_have_value(str(seed))

    other.turn_to("gallery")
    pictures.first.click()
    expect(other.at("gallery-details")).to_contain_text("windmill")
    other.at("gallery-delete").click()
    expect(pictures).to_have_count(0)
    other.page.locator("#gallery-trash input").check()
    expect(pictures).to_have_count(1)
    pictures.first.click()
    expect(other.at("gallery-details")).to_contain_text("windmill")
    other.at("gallery-undelete").click()
    expect(pictures).to_have_count(0)
    other.page.locator("#gallery-trash input").uncheck()
    expect(pictures).to_have_count(1)
    assert job["id"] in [one["id"] for one in other.jobs()]


def test_a_picture_of_the_gallery_is_painted_over_and_edited(visit: Visit) -> None:
    visitor = visit()
    visitor.ask(prompt=PROMPT, steps="3", width="64", height="64")
    visitor.goal("exact")
    visitor.generate()
    visitor.turn_to("gallery")
    visitor.at("gallery-refresh").click()
    newest = visitor.page.locator("#gallery-grid button:has(img)").first
    expect(newest).to_contain_text(PROMPT)  # what was there before is gone
    newest.click()
    expect(visitor.at("gallery-details")).to_contain_text(PROMPT)
    visitor.at("gallery-edit").click()
    expect(visitor.at("edit-picture")).to_contain_text("scenes-flux")
    visitor.ask(edit_prompt="a blue house left of two pine trees")
    for stroke, said in ((True, "was recorded for this"), (False, "Edit 2 of this recording")):
        if stroke:
            paint(visitor)
        visitor.at("edit-run").click()
        expect(visitor.at("edit-figures")).to_contain_text(said)
    told = visitor.at("edit-figures").inner_text()
    assert re.search(r"took \d+\.\d\d s.*Everything anew took \d+\.\d\d s", told, re.DOTALL)
    assert 0 < float(re.search(r"([\d.]+) % of the picture was painted", told)[1]) < 100  # type: ignore[index]
    shown = visitor.page.locator("#edit-after img").first.get_attribute("src") or ""
    made = record(visitor.context.request.get(shown).body())
    assert made.result.edited and made.request["prompt"].startswith("a blue house")


def paint(visitor: Visitor) -> None:
    """A stroke over the middle of the picture that is edited."""
    canvas = visitor.page.locator("#edit-canvas canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    visitor.page.wait_for_timeout(1000)  # the editor draws the picture in, and says so nowhere
    visitor.page.get_by_role("button", name="Brush").first.click()
    visitor.page.mouse.move(x - 8, y)
    visitor.page.mouse.down()
    visitor.page.mouse.move(x + 8, y, steps=4)
    visitor.page.mouse.up()


def test_the_methods_are_found_by_words(visit: Visit) -> None:
    visitor = visit()
    visitor.turn_to("methods")
    sections = visitor.page.locator("#methods-table section")
    everything = sections.count()
    visitor.ask(methods_search="EasyCache")
    expect(visitor.at("methods-table")).to_contain_text(re.compile(rf"\d+ of {everything} methods"))
    expect(visitor.page.locator("#methods-table h2").first).to_contain_text("EasyCache")
    visitor.ask(methods_search="")
    visitor.choose("methods-model", "scenes-unet")
    expect(visitor.page.locator("#methods-table .accel-unfit").first).to_be_visible()
    expect(visitor.page.locator("#methods-table .accel-fits").first).to_be_visible()


# for everybody


def test_everything_can_be_done_with_keys(visit: Visit) -> None:
    visitor = visit()
    reached = tabbed(visitor, 60)
    wanted = ["prompt", "generate", "goal", "model", "seed", "seed-lock", "steps"]
    order = [name for name in dict.fromkeys(reached) if name in wanted]
    assert order == wanted, reached
    visitor.ask(steps="200", width="256", height="256")
    visitor.into("prompt").focus()
    visitor.page.evaluate(BEGINS, "generate")
    visitor.page.keyboard.press("Control+Enter")
    expect(visitor.at("progress")).to_have_text(re.compile("step [1-9]"))
    visitor.page.keyboard.press("Escape")
    visitor.ended()
    assert visitor.jobs()[0]["state"] == "stopped"
    visitor.page.get_by_role("tab", name="Generate").first.focus()
    visitor.page.keyboard.press("Tab")
    visitor.page.keyboard.press("Enter")
    expect(visitor.at("compare-run")).to_be_visible()


def tabbed(visitor: Visitor, count: int) -> list[str]:
    """The ids of what Tab reaches, from the start of the page."""
    visitor.page.evaluate("() => { document.activeElement?.blur(); window.scrollTo(0, 0); }")
    reached = []
    for _ in range(count):
        visitor.page.keyboard.press("Tab")
        reached.append(visitor.page.evaluate("() => document.activeElement.closest('[id]')?.id"))
    return reached


@pytest.fixture(scope="module")
def used(browser: Any, address: str) -> Iterator[Any]:
    """What a browser keeps of a visitor who has a picture, a comparison and a sweep to show."""
    visitor = Visitor(browser, address)
    visitor.ask(prompt=PROMPT, steps="6")
    visitor.lock(3)
    visitor.generate()
    sweep(visitor)
    visitor.turn_to("generate")
    compare(visitor)
    yield visitor.context.storage_state()
    visitor.leave()


@pytest.mark.parametrize("screen", SCREENS)
def test_every_page_is_fit_for_everybody(screen: str, visit: Visit, used: Any) -> None:
    visitor = visit(storage_state=used, **SCREENS[screen])
    dark = visitor.page.evaluate("() => document.body.classList.contains('dark')")
    assert dark == (SCREENS[screen]["color_scheme"] == "dark")
    findings: list[str] = []
    for tab in TABS:
        visitor.turn_to(tab)
        opened(visitor, tab)
        visitor.shoot(f"{tab}-{screen}")
        wide = visitor.page.evaluate(OVERFLOW)
        findings += [f"{tab}: {wide} px too wide"] if wide > 0 else []
        findings += [f"{tab}: {each}" for each in serious(visitor)]
    assert not findings, "\n".join(findings)


def opened(visitor: Visitor, tab: str) -> None:
    """Show what a page hides at first, and wait for what it shows."""
    page = visitor.page
    if tab == "generate":
        for name in ("inputs", "more", "knobs"):
            fold = visitor.at(name).locator("button").first
            if fold.get_attribute("aria-expanded") != "true":
                fold.click()
        expect(page.locator("#knobs [id^=method-]").first).to_be_attached()
        picture = page.locator("#result img").first
        picture.evaluate("(one) => one.scrollIntoView()")  # it is loaded when it can be seen
        expect(picture).to_be_visible()
    elif tab == "compare":
        expect(page.locator("#compare-slider img").first).to_be_visible()
    elif tab == "explore":
        expect(page.locator("#explore-plot [data-index]")).to_have_count(5)
    elif tab == "gallery":
        page.locator("#gallery-grid button:has(img)").first.click()
        expect(page.locator("#gallery-details table").first).to_be_visible()
    elif tab == "methods":
        page.locator("#methods-table summary").first.click()
    page.wait_for_timeout(300)


def serious(visitor: Visitor) -> list[str]:
    """What axe finds on the page that keeps somebody from using it."""
    options = {"resultTypes": ["violations"]}
    found = Axe().run(visitor.page, options=options).response["violations"]
    return [
        f"{one['id']} at {node['target']}: {node['failureSummary']} {node['html'][:200]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"][:5]
    ]


def test_it_speaks_german_to_those_who_do(visit: Visit) -> None:
    visitor = visit(locale="de-DE")
    expect(visitor.at("generate")).to_have_text("Erzeugen")
    assert visitor.page.evaluate("() => document.documentElement.lang") == "de"
    visitor.ask(steps="2")
    visitor.generate()
    assert "Schritte" in visitor.at("badge").inner_text()


def compare(visitor: Visitor) -> None:
    """Compare the settings of Generate with stock, twice each: one run has no spread."""
    visitor.turn_to("compare")
    visitor.page.locator("#compare-repeats input[type=number]").fill("2")
    visitor.page.locator("#compare-repeats input[type=number]").blur()
    visitor.press("compare-run")
    visitor.ended("compare-run")


def sweep(visitor: Visitor) -> None:
    """Two knobs of two values each."""
    visitor.turn_to("explore")
    visitor.into("explore-values").fill("0.05, 0.5")
    visitor.choose("explore-second", "cache.EasyCache.warmup")
    expect(visitor.into("explore-second-values")).not_to_have_value("")
    visitor.into("explore-second-values").fill("2, 4")
    visitor.at("explore-run").click()
    expect(visitor.at("explore-status")).to_contain_text("5 of 5")
