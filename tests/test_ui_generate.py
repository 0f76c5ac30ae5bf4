"""The page Generate and the endpoints: what a click does, what is shown, what a client gets."""

import asyncio
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import gradio as gr
import pytest
from evidence import proven
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from saved import Folders, done, picture
from ui_service import Fake, browser, informed
from ui_service import drawn as draw

from accel import Guard, Plan, cache
from accel import methods as all_methods
from accel.errors import BadInput
from accel.tuning.library import tuned_plans
from app import metadata
from app.request import Request, Source, make
from app.serve.jobs import Job, Phase, Progress, Result, Spec
from app.serve.limits import Limits
from app.serve.service import Service
from app.session import Session
from app.ui import events, forms, generate, knobs, look, page, roundtrip, words

pytestmark = pytest.mark.filterwarnings("ignore:The copy keyword is deprecated")  # of Gradio
EASY = Plan(cache.EasyCache(threshold=1e6))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


@pytest.fixture
def service(models: Folders, tmp_path: Path) -> Fake:
    small = {"height": 32, "width": 32, "num_inference_steps": 4}
    return Fake(
        tmp_path / "served",
        [
            informed(models("flux_cfg"), true_cfg_scale=3.5, negative_prompt="", **small),
            informed(models("ltx"), "video", num_frames=9, **small),
        ],
    )


@pytest.fixture(scope="module")
def page_once(models: Folders, tmp_path_factory: pytest.TempPathFactory) -> generate.Page:
    """The page, drawn once: its components keep nothing of a run."""
    empty = Fake(tmp_path_factory.mktemp("empty"), [informed(models("flux_cfg"))])
    return draw(lambda: generate.tab(empty))[0]  # type: ignore[arg-type]


@pytest.fixture
def drawn(page_once: generate.Page, service: Fake) -> generate.Page:
    """The page before a fresh service."""
    return replace(page_once, service=service)  # type: ignore[arg-type]


def values(drawn: generate.Page, **more: Any) -> list[Any]:
    """What stands in the widgets after some were changed."""
    now = {name: getattr(field, "value", None) for name, field in drawn.fields.items()}
    return list((now | more).values())


def named(drawn: generate.Page, updates: dict[Any, Any]) -> dict[str, Any]:
    """Updates by what they are of; of a component that is replaced, its new value."""
    names = {component: name for name, component in (drawn.fields | drawn.shown).items()}
    names |= {drawn.watching: "watching", drawn.redraw: "redraw", drawn.told: "told"}
    return {
        names[component]: getattr(value, "value", value)
        if isinstance(value, gr.Image | gr.Video | gr.Radio)
        else value
        for component, value in updates.items()
    }


def clicked(drawn: generate.Page, **more: Any) -> list[dict[str, Any]]:
    """Everything that a click on *Generate* shows, in order."""
    shown = drawn.run(browser(), *values(drawn, **more))
    return [named(drawn, updates) for updates in shown]


def last(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """What stands in the page at the end."""
    return {name: value for step in steps for name, value in step.items()}


# what is drawn


def test_every_setting_of_a_request_has_a_widget_or_is_the_server_s(drawn: generate.Page) -> None:
    assert set(drawn.fields) | set(generate.PLACES) == set(forms.NAMES)
    assert tuple(drawn.fields) == generate.WIDGETS


def test_the_first_picture_is_one_click_away(drawn: generate.Page, service: Fake) -> None:
    end = last(clicked(drawn))
    assert Path(str(end["picture"])).is_file() or end["picture"]
    (job,) = (job for job in service.jobs.values() if job.spec.kind == "generate")
    assert job.spec.request["prompt"] and job.spec.title == "balanced"


def test_every_widget_with_a_label_says_in_one_sentence_what_it_is(drawn: generate.Page) -> None:
    for name, field in drawn.fields.items():
        if not isinstance(field, gr.Image | gr.File) and field.elem_id != "knobs-text":
            assert str(getattr(field, "info", "")), name


# a run


def test_a_run_shows_where_it_is_and_ends_with_the_picture(
    drawn: generate.Page, service: Fake
) -> None:
    steps = clicked(drawn, goal="custom", knobs=knobs.shown(EASY), seed="7", seed_lock=True)
    first = steps[1]
    job = service.jobs[first["watching"]]
    assert first["picture"] == gr.update(value=None, visible=False) and first["badge"] == ""
    told = [str(step.get("progress", "")) for step in steps]
    assert any("step 3 of 4" in text and "1 of them skipped" in text for text in told)
    assert any("data:image/png;base64," in str(step.get("preview", "")) for step in steps)
    end = last(steps)
    assert end["progress"] == end["preview"] == ""
    assert "2.50" in end["badge"] and "2.20" in end["badge"] and "2.80" in end["badge"]
    assert "cache.EasyCache" in end["timeline"]
    assert end["seed"] == "7"
    path = service.file("local", job.id, "picture")
    made, pictures = metadata.read(path)
    assert made.plan == EASY.to_dict() and made.pixels == metadata.pixels(pictures)


def test_the_picture_is_the_bits_of_a_session_alone(drawn: generate.Page, service: Fake) -> None:
    plan = Plan(cache.EasyCache(threshold=1e6, warmup=2))
    clicked(drawn, seed="3", seed_lock=True, goal="custom", knobs=knobs.shown(plan))
    (job,) = service.jobs.values()
    request = make(Request, job.spec.request)
    alone = Session.open(request.source).run(request, plan)
    made, _ = metadata.read(service.file("local", job.id, "picture"))
    assert made.pixels == metadata.pixels(alone.pictures)


def test_a_stream_changes_nothing_that_may_be_folded_away(page_once: generate.Page) -> None:
    """Gradio 6.31 takes its mark for "as before" for the value of what it has not drawn yet."""
    inside = {id(block) for block in page_once.results}
    for block in page_once.results:
        parent = getattr(block, "parent", None)
        while parent is not None:
            assert not isinstance(parent, gr.Accordion), block.elem_id
            parent = parent.parent
    assert len(inside) == len(page_once.results)
    assert not inside & {id(page_once.shown[name]) for name in generate.COPIED}


def test_a_clip_is_shown_as_a_clip(drawn: generate.Page, service: Fake, models: Folders) -> None:
    end = last(clicked(drawn, model=models("ltx"), goal="exact"))
    (job,) = service.jobs.values()
    assert job.result is not None, job.error
    assert end["picture"] is None and end["film"] is not None


def test_a_method_that_does_nothing_is_said_to_be_inactive(drawn: generate.Page) -> None:
    idle = Plan(cache.EasyCache(threshold=1e-9))
    end = last(clicked(drawn, goal="custom", knobs=knobs.shown(idle)))
    assert "INACTIVE" in end["banner"] and "cache.EasyCache" in end["banner"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": "seven", "seed_lock": True}, "seed"),
        ({"steps": 0}, "steps"),
        ({"goal": "custom", "knobs": '{"cache.EasyCache": {"threshold": "-1"}}'}, "threshold"),
        ({"goal": "custom", "knobs": "no json"}, "no JSON"),
    ],
)
def test_what_cannot_be_is_said_in_the_page_and_nothing_is_queued(
    drawn: generate.Page, service: Fake, change: dict[str, Any], says: str
) -> None:
    (end,) = clicked(drawn, **change)
    assert says in end["banner"] and not service.jobs


def test_a_refusal_of_the_service_is_shown_as_it_is(drawn: generate.Page, service: Fake) -> None:
    service.refused = BadInput("width: 9000, and this server admits at most 2048: <ask> for less.")
    checking, end = clicked(drawn)
    assert "Checking" in checking["progress"] and not end["progress"]
    assert "&lt;ask&gt; for less" in end["banner"]


def test_a_failed_job_says_why_and_the_next_one_runs(drawn: generate.Page) -> None:
    bad = last(clicked(drawn, prompt=" "))
    assert "PROMPT is empty" in bad["banner"] and bad["progress"] == ""
    assert last(clicked(drawn))["badge"]


def test_files_go_in_as_uploads_of_the_owner(
    drawn: generate.Page, service: Fake, tmp_path: Path
) -> None:
    start, mask = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", "white")
    clicked(drawn, image=str(start), mask=str(mask), strength=0.5)
    (job,) = service.jobs.values()
    for option, given in (("image", start), ("mask", mask)):
        stored = Path(job.spec.request[option])
        assert stored.parent == service.uploads("local")
        assert stored.read_bytes() == given.read_bytes()


# stop, reload


def test_stop_ends_the_run_that_is_watched(drawn: generate.Page, service: Fake) -> None:
    steps = drawn.run(browser(), *values(drawn))
    assert "Checking" in named(drawn, next(steps))["progress"]
    watching = named(drawn, next(steps))["watching"]
    for updates in steps:
        if "step 1" in str(named(drawn, updates).get("progress", "")):
            drawn.stop(watching, browser())
    assert service.jobs[watching].state == "stopped"


def test_another_person_s_job_can_be_neither_stopped_nor_seen(
    drawn: generate.Page, service: Fake
) -> None:
    (job,) = service.submit("ada", [Spec(request={"prompt": "secret", "model": "x"})])
    stopped = named(drawn, drawn.stop(job.id, browser("eve")))
    assert "no job" in stopped["banner"] and service.jobs[job.id].state == "queued"
    shown = [named(drawn, updates) for updates in drawn.reattach(job.id, browser("eve"))]
    assert shown == [{"watching": None}]
    assert "secret" not in str(drawn.cli(job.id, browser("eve"), *values(drawn)))


def test_after_a_reload_the_run_and_its_settings_are_back(
    drawn: generate.Page, service: Fake, models: Folders
) -> None:
    asked = Spec(
        request=make(
            Request, {"model": models("flux_cfg"), "prompt": "an owl", "seed": 9}
        ).to_dict(),
        plan=EASY.to_dict(),
        title="custom plan",
    )
    (job,) = service.submit("local", [asked])
    found = named(drawn, drawn.resume(job.id, browser()))
    assert found["prompt"] == "an owl" and found["seed"] == "9"
    assert knobs.read(found["knobs"]) == EASY
    steps = [named(drawn, updates) for updates in drawn.reattach(job.id, browser())]
    assert last(steps)["badge"] and last(steps)["seed"] == "9"
    again = [named(drawn, updates) for updates in drawn.reattach(job.id, browser())]
    assert again[-1]["picture"] and service.jobs[job.id].state == "done"
    assert [named(drawn, u) for u in drawn.reattach(None, browser())] == [{"watching": None}]
    for nothing in (drawn.resume(None, browser()), drawn.resume(job.id, browser("eve"))):
        assert named(drawn, nothing) == {"restored": ""}


@pytest.mark.parametrize("state", ["queued", "running", "done", "stopped", "failed", "quarantined"])
@pytest.mark.parametrize("partial", [None, False, True])
def test_every_state_of_a_job_shows_something_and_only_an_end_lets_the_next_one_start(
    state: Any, partial: bool | None
) -> None:
    result = (
        None
        if partial is None
        else Result(files={}, partial=partial, seed=1, seconds=1.0, steps=4, nfe=4)
    )
    error = "The model is damaged: download it again." if state == "failed" else None
    job = Job(
        "a",
        "local",
        None,
        Spec(request={"seed": 1}),
        state,
        1,
        0.0,
        position=2,
        result=result,
        error=error,
    )
    view = events.of_job(job, "en", paused="The disk is full: free some space.")
    assert view["runs"] == (state in ("queued", "running"))
    if view["runs"]:
        assert ("2 before it" in view["progress"]) == (state == "queued")
        assert "The queue stands still: The disk is full" in view["progress"]
    else:
        assert view["progress"] == view["preview"] == "" and view["job"] is job
    if error:
        assert error in view["banner"]
    if partial and not view["runs"]:
        assert "Stopped early" in view["banner"]


@pytest.mark.parametrize("language", words.LANGUAGES)
@pytest.mark.parametrize("phase", get_args(Phase))
def test_why_the_queue_stands_still_is_said_in_every_phase(phase: Phase, language: Any) -> None:
    now = Progress("a", phase, 1, 4)
    reason = "/srv/accel/outputs/a.png could not be written (No space left on device)."
    told = events.of_progress(now, language, reason)["progress"]
    assert "a.png could not be written" in told and "/srv" not in told
    assert "accel-note" not in events.of_progress(now, language)["progress"]


def test_a_job_that_comes_again_while_it_runs_keeps_the_progress_that_is_known(
    service: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = service.submit("local", [Spec(request={"prompt": "x", "model": "x"})])
    running, step = replace(job, state="running"), Progress(job.id, "denoising", 3, 4)
    given: list[Job | Progress] = [running, step, running, job, running]
    monkeypatch.setattr(service, "watch", lambda *_: iter(given))
    views = list(events.follow(service, "local", job.id, "en"))  # type: ignore[arg-type]
    known = ["step 3 of 4" in view["progress"] for view in views]
    assert known == [False, True, True, False, False]


def test_what_blocks_a_job_is_shown_while_it_is_followed(
    drawn: generate.Page, service: Fake
) -> None:
    service.paused = "The disk is full: free some space."
    steps = clicked(drawn)
    told = [text for step in steps if (text := str(step.get("progress", "")))]
    assert all("The disk is full" in text for text in told[1:]) and len(told) > 3
    assert not last(steps)["progress"]


def test_a_picture_that_is_gone_is_said_to_be_gone_and_everything_else_is_back(
    drawn: generate.Page, service: Fake
) -> None:
    clicked(drawn)
    (job,) = service.jobs.values()
    service.file("local", job.id, "picture").unlink()
    end = last([named(drawn, updates) for updates in drawn.reattach(job.id, browser())])
    assert end["picture"] is None and end["film"] is None
    assert "picture.png" in end["banner"] and "deleted" in end["banner"]
    assert end["badge"] and end["seed"] == str(job.spec.request["seed"])


def test_a_preview_stays_until_there_is_another() -> None:
    assert "preview" not in events.of_progress(Progress("a", "denoising", 1, 4), "en")
    assert (
        "base64"
        in events.of_progress(Progress("a", "denoising", 1, 4, preview=b"x"), "en")["preview"]
    )


# goals


def test_goals_say_what_was_measured_on_this_machine(
    drawn: generate.Page, service: Fake, models: Folders
) -> None:
    model = models("flux_cfg")
    before = generate.captions(service, model, "en")  # type: ignore[arg-type]
    assert [value for _, value in before] == list(forms.GOALS)
    assert before[1][0] == "Balanced: not measured yet" and before[-1][0] == "Custom"
    steps = [named(drawn, updates) for updates in drawn.measure(model, browser())]
    assert any(step.get("measuring") for step in steps)
    after = dict((value, text) for text, value in generate.captions(service, model, "en"))  # type: ignore[arg-type]
    assert after["fast"] == "Fast: 2.50× (2.20–2.80), SSIM 0.984, measured 2026-11-29"
    assert "2,50× (2,20–2,80)" in generate.captions(service, model, "de")[1][0]  # type: ignore[arg-type]


def test_presets_are_measured_once_by_themselves(
    drawn: generate.Page, service: Fake, models: Folders
) -> None:
    model = models("flux_cfg")
    assert len(list(drawn.measure_first(model, browser()))) > 1
    assert list(drawn.measure_first(model, browser())) == [generate.NOTHING]
    service.measured.clear()
    again = list(drawn.measure_first(model, browser()))
    assert again == [generate.NOTHING], "what failed is not tried for ever"


def test_a_speed_that_was_measured_later_is_put_into_the_badge(
    drawn: generate.Page, service: Fake
) -> None:
    clicked(drawn)
    (job,) = service.jobs.values()
    assert job.result is not None
    untimed = job.result.model_copy(update={"speedup": None})
    for result, known in ((untimed, False), (job.result, True)):
        service.jobs[job.id] = replace(job, result=result)
        badge = named(drawn, drawn.refreshed(job.id, browser()))["badge"]
        assert ("2.50" in badge) == known
    service.jobs[job.id] = replace(job, state="running", result=None)
    for watching, who in ((job.id, None), (None, None), (job.id, "eve")):
        assert drawn.refreshed(watching, browser(who)) == generate.NOTHING


@pytest.mark.parametrize(("language", "says"), [("en", "downloads"), ("de", "lädt")])
def test_a_model_that_is_not_here_yet_says_that_it_will_be_downloaded(
    drawn: generate.Page, service: Fake, language: str, says: str
) -> None:
    here, absent = service.offered[0], replace(service.offered[1], bytes=None)
    service.offered = [here, absent]
    who = browser(language=language)
    updates = drawn.offered(generate.offered(drawn.service, "en")[:1], who)
    choices = named(drawn, updates)["model"]["choices"]
    assert [name for _, name in choices] == [here.name, absent.name]
    assert "1 MB" in choices[0][0] and says not in choices[0][0]
    assert says in choices[1][0] and "MB" not in choices[1][0]
    assert drawn.offered(updates[drawn.told], who) == generate.NOTHING  # it would undo a choice


@pytest.mark.parametrize("goal", forms.GOALS)
def test_a_goal_is_put_into_the_knobs(drawn: generate.Page, goal: str) -> None:
    text = knobs.shown(EASY)
    found = named(drawn, drawn.preset(goal, text, browser()))
    wanted = EASY if goal == "custom" else Plan.preset(goal)
    assert knobs.read(found["redraw"]) == wanted
    assert found.get("knobs", text) == found["redraw"]


# tuned plans


@pytest.fixture
def tuned(models: Folders, service: Fake, tmp_path: Path) -> Path:
    """A plan that was tuned for the first model; its file."""
    path = tmp_path / "near.toml"
    pipe = service._session(Source(model=models("flux_cfg"))).model.pipe
    path.write_text(proven(EASY, pipe).to_toml())
    return path


@pytest.fixture
def offering(service: Fake, tuned: Path) -> Fake:
    """A server with that plan in its folder."""
    service.plans = tuned_plans(tuned.parent)
    return service


@pytest.mark.parametrize(("language", "says"), [("en", "2.50× (95 %"), ("de", "2,50× (95 %")])
def test_a_tuned_plan_is_a_goal_of_its_model_alone_and_says_what_it_promises(
    drawn: generate.Page, offering: Fake, models: Folders, language: str, says: str
) -> None:
    mine, other = (
        dict((value, text) for text, value in found)
        for model in ("flux_cfg", "ltx")
        for found in [
            named(drawn, drawn.captions(models(model), "tuned:near", browser(language=language)))[
                "goal"
            ]["choices"]
        ]
    )
    assert list(mine) == [*forms.GOALS, "tuned:near"] and list(other) == list(forms.GOALS)
    for part in (says, "ssim>=0.95", "95 % ", "20 "):
        assert part in mine["tuned:near"]
    gone = named(drawn, drawn.captions(models("ltx"), "tuned:near", browser()))["goal"]
    kept = named(drawn, drawn.captions(models("flux_cfg"), "tuned:near", browser()))["goal"]
    assert gone["value"] == "custom" and "value" not in kept


def test_what_a_tuned_goal_makes_carries_its_evidence_and_comes_back_as_that_goal(
    drawn: generate.Page, offering: Fake, tuned: Path
) -> None:
    [plan] = offering.plans.values()
    chosen = named(drawn, drawn.preset("tuned:near", "{}", browser()))
    assert knobs.read(chosen["knobs"]) == plan and "one &lt;machine&gt;" in chosen["evidence"]
    clicked(drawn, goal="tuned:near", knobs=knobs.shown(EASY))  # the knobs may come later
    (job,) = offering.jobs.values()
    assert Plan.from_dict(job.spec.plan) == plan and job.spec.title == "tuned for ssim>=0.95"
    file = offering.file("local", job.id, "picture")
    assert Plan.from_dict(metadata.read(file)[0].plan) == plan
    copied = named(drawn, drawn.cli(job.id, browser()))["copied"].value
    assert f"--plan {shlex.quote(str(tuned))}" in copied and "--set" not in copied
    found = named(drawn, drawn.restore(str(file), offering.offered[0].name, browser()))
    assert found["goal"] == "tuned:near" and found["evidence"] == chosen["evidence"]
    kept = {name: found[name] for name in generate.WIDGETS} | {"seed_lock": True}
    assert drawn.spec("local", tuple(kept.values())) == job.spec


def test_a_tuned_plan_that_the_server_does_not_have_is_refused_by_name(
    drawn: generate.Page, offering: Fake
) -> None:
    shown = last(clicked(drawn, goal="tuned:far"))
    assert "no tuned plan &#39;far&#39;" in shown["banner"] and not offering.jobs


def test_a_dropped_plan_is_taken_and_a_tuned_one_by_its_model_alone(
    drawn: generate.Page, service: Fake, models: Folders, tuned: Path
) -> None:
    mine, other = models("flux_cfg"), models("ltx")
    [plan] = tuned_plans(tuned.parent).values()

    def dropped(model: str) -> dict[str, Any]:
        found = named(drawn, drawn.restore(str(tuned), model, browser()))
        assert found["drop"] is None
        return found

    taken = dropped(mine)
    assert taken["goal"] == "custom" and knobs.read(taken["knobs"]) == plan
    assert "near.toml" in taken["restored"] and "ssim&gt;=0.95" in taken["evidence"]
    refused = dropped(other)
    assert set(refused) == {"drop", "restored"} and 'role="alert"' in refused["restored"]
    for part in ("near.toml", "a FluxPipeline; this is a LTXPipeline", "ssim&gt;=0.95"):
        assert part in refused["restored"]
    careless = plan.tuned.model_copy(update={"elsewhere": "warn"})  # type: ignore[union-attr]
    tuned.write_text(Plan(*plan, tuned=careless).to_toml())
    warned = dropped(other)
    assert knobs.read(warned["knobs"]) == Plan(*plan, tuned=careless)
    assert "this is a LTXPipeline" in warned["restored"]
    tuned.write_text(Plan.preset("fast").to_toml())
    plain = dropped(other)
    assert not plain["evidence"] and knobs.read(plain["knobs"]) == Plan.preset("fast")
    tuned.write_text("plan = 7")
    assert set(dropped(mine)) == {"drop", "restored"}


# a budget of error


def test_a_budget_puts_a_guard_around_any_goal_and_says_what_it_spent(
    drawn: generate.Page, service: Fake
) -> None:
    end = last(clicked(drawn, goal="fast", budget=" 0.05 ", seed="3", seed_lock=True))
    (job,) = service.jobs.values()
    plan = Plan(*Plan.preset("fast"), guard=Guard(max_error=0.05))
    assert Plan.from_dict(job.spec.plan) == plan and job.spec.title == "fast, error ≤ 0.05"
    assert job.result is not None and job.result.guarded[0].budget == 0.05
    assert "of 0.05" in end["guarded"] and "uncalibrated" in end["guarded"]
    line = shlex.split(roundtrip.as_cli(job.spec))
    assert line[line.index("--preset") + 1] == "fast" and "guard.max_error=0.05" in line
    found = named(drawn, drawn.loaded(job.spec, "en"))
    assert (found["goal"], found["budget"]) == ("fast", "0.05")
    assert drawn.spec("local", tuple(found[name] for name in generate.WIDGETS)) == job.spec
    for wrong in ("much", "-1", "nan"):
        shown = last(clicked(drawn, budget=wrong))
        assert "guard.max_error" in shown["banner"]
    assert len(service.jobs) == 1


def test_without_a_budget_nothing_is_guarded_and_nothing_said(
    drawn: generate.Page, service: Fake
) -> None:
    assert not last(clicked(drawn, goal="fast"))["guarded"]
    (job,) = service.jobs.values()
    assert Plan.from_dict(job.spec.plan).guard is None


# models


def test_what_a_model_has_no_use_for_is_greyed_out_and_emptied(
    drawn: generate.Page, models: Folders
) -> None:
    film, still = models("ltx"), models("flux_cfg")
    greyed = named(drawn, drawn.adapt(film))
    assert not greyed["image"]["interactive"] and greyed["frames"]["interactive"]
    assert greyed["frames"]["placeholder"] == "9"
    greyed = named(drawn, drawn.adapt(still))
    assert greyed["image"]["interactive"] and not greyed["frames"]["interactive"]
    assert (greyed["guidance"]["placeholder"], greyed["steps"]["placeholder"]) == ("3.5", "4")
    emptied = named(drawn, drawn.emptied(still))
    assert emptied == {"frames": "", "fps": "16", "last": None}
    assert set(named(drawn, drawn.emptied(film))) >= {
        "image",
        "last",
        "mask",
        "control",
        "lora",
        "strength",
    }


# there and back


def test_a_dropped_picture_restores_what_made_it(
    drawn: generate.Page, service: Fake, tmp_path: Path
) -> None:
    start = picture(tmp_path / "start.png")
    asked = {"prompt": "a <b>fox</b>", "seed": "11", "seed_lock": True, "image": str(start)}
    clicked(drawn, **asked, strength=0.5, goal="custom", knobs=knobs.shown(EASY), steps=6)
    (job,) = service.jobs.values()
    path = service.file("local", job.id, "picture")
    found = named(drawn, drawn.restore(str(path), service.offered[0].name, browser()))
    assert "restored" in str(found["restored"]).lower()
    again = drawn.spec("local", tuple(found[name] for name in generate.WIDGETS))
    assert again == job.spec


def test_a_file_that_is_not_at_hand_is_named_and_left_empty(
    drawn: generate.Page, service: Fake, tmp_path: Path
) -> None:
    clicked(drawn, image=str(picture(tmp_path / "start.png")), strength=0.5)
    (job,) = service.jobs.values()
    path = service.file("local", job.id, "picture")
    Path(job.spec.request["image"]).unlink()
    found = named(drawn, drawn.restore(str(path), service.offered[0].name, browser()))
    assert found["image"] is None and "image" in found["restored"]
    elsewhere = named(drawn, drawn.restore(str(path), service.offered[0].name, browser("eve")))
    assert elsewhere["image"] is None


def test_a_dropped_file_that_is_none_of_ours_changes_nothing(
    drawn: generate.Page, service: Fake, tmp_path: Path
) -> None:
    found = named(
        drawn, drawn.restore(str(picture(tmp_path / "x.png")), service.offered[0].name, browser())
    )
    assert set(found) == {"restored", "drop"} and "carries no record" in found["restored"]


@pytest.mark.parametrize("how", ["cli", "python"])
def test_what_is_copied_is_the_job_that_is_shown_or_else_the_settings(
    drawn: generate.Page, service: Fake, how: str
) -> None:
    write = {"cli": roundtrip.as_cli, "python": roundtrip.as_python}[how]
    copy = {"cli": drawn.cli, "python": drawn.python}[how]

    def text(watching: str | None, **more: Any) -> str:
        updates = copy(watching, browser(), *values(drawn, **more))
        return str(updates[drawn.shown["copied"]].value)

    assert "an owl" in text(None, prompt="an owl")
    clicked(drawn, prompt="a fox")
    (job,) = service.jobs.values()
    assert text(job.id, prompt="an owl") == write(job.spec).rstrip()


# the real service


def test_a_picture_of_the_real_service_is_the_bits_of_the_copied_command_and_restores_its_job(
    page_once: generate.Page,
    models: Folders,
    real: Service,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn, model = replace(page_once, service=real), models("flux_cfg")
    asked = {"model": model, "prompt": "it's a fox", "steps": "6", "seed": "8", "seed_lock": True}
    steps = clicked(drawn, **asked, goal="custom", knobs=knobs.shown(EASY))
    job = real.job("local", steps[1]["watching"])
    assert job.state == "done", job.error
    file = real.file("local", job.id, "picture")
    made, pictures = metadata.read(file)
    assert made.plan == EASY.to_dict() and made.pixels == metadata.pixels(pictures)
    monkeypatch.chdir(tmp_path)
    command = shlex.split(roundtrip.as_cli(job.spec))
    assert done(*command[1:], "--out", "copied.png").exit_code == 0
    copied, _ = metadata.read(tmp_path / "copied.png")
    assert copied.pixels == made.pixels
    found = named(drawn, drawn.restore(str(file), model, browser()))
    again = drawn.spec("local", tuple(found[name] for name in generate.WIDGETS))
    assert again == job.spec


def test_the_real_service_knows_which_tuned_plans_are_for_a_model(
    models: Folders, real: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, pipeline in (("mine", "flux_cfg"), ("other", "sd15")):
        pipe = Session.open(Source(model=models(pipeline))).model.pipe
        (tmp_path / f"{name}.toml").write_text(proven(EASY, pipe, elsewhere="warn").to_toml())
    (tmp_path / "untuned.toml").write_text(EASY.to_toml())
    monkeypatch.setattr(real, "plans", tuned_plans(tmp_path))
    assert [path.stem for path in real.plans] == ["mine", "other"]
    assert [path.stem for path in real.tuned(models("flux_cfg"))] == ["mine"]
    refused = real.refusal(models("flux_cfg"), real.plans[tmp_path / "other.toml"])
    assert "a StableDiffusionPipeline; this is a FluxPipeline" in str(refused)
    with pytest.raises(BadInput, match="not offered"):
        real.tuned("elsewhere")
    with pytest.raises(BadInput, match="no folder"):
        Service(tmp_path / "served", tuned=tmp_path / "none")


@pytest.fixture(scope="module")
def real(models: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service with its own worker process, which computes on one thread as we do."""
    folder = tmp_path_factory.mktemp("real")
    service = Service(folder, limits=Limits(models=(models("flux_cfg"),)))
    service.start()
    yield service
    service.close()


# the whole page, over HTTP


@pytest.fixture(scope="module")
def served(
    models: Folders, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Client, Fake]]:
    """The page on a port of this machine, and a client of it."""
    folder = tmp_path_factory.mktemp("served")
    service = Fake(folder, [informed(models("flux_cfg"))])

    async def opened() -> tuple[gr.Blocks, str]:
        demo = page.build(service)  # type: ignore[arg-type]
        _, url, _ = demo.launch(
            prevent_thread_lock=True,
            quiet=True,
            theme=look.theme(),
            css=look.CSS,
            head=look.HEAD,
            i18n=words.translator(),
            allowed_paths=[str(service.outputs)],
            server_name="127.0.0.1",
        )
        return demo, url

    demo, url = asyncio.run(opened())
    try:
        yield Client(url, verbose=False, download_files=folder / "client"), service
    finally:
        demo.close()


ENDPOINTS = {"/generate", "/compare", "/status", "/cancel", "/methods"}


def test_the_endpoints_are_these_and_no_others(served: tuple[Client, Fake]) -> None:
    client, _ = served
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert set(named) == ENDPOINTS


def test_a_client_generates_and_gets_the_very_file(
    served: tuple[Client, Fake], models: Folders
) -> None:
    client, service = served
    settings = {"model": models("flux_cfg"), "prompt": "a fox", "seed": 4}
    job, files = client.predict(settings, EASY.to_dict(), api_name="/generate")
    assert job["state"] == "done" and job["spec"]["plan"] == EASY.to_dict()
    stored = service.file("local", job["id"], "picture")
    assert Path(files[0]).read_bytes() == stored.read_bytes()
    assert client.predict(job["id"], api_name="/status")[0]["result"]["seed"] == 4
    assert client.predict(job["id"], api_name="/cancel")["state"] == "done"


def test_a_client_sees_the_run_as_it_goes(served: tuple[Client, Fake], models: Folders) -> None:
    client, _ = served
    settings = {"model": models("flux_cfg"), "prompt": "a fox"}
    running = client.submit(settings, None, api_name="/generate")
    running.result(timeout=60)
    states = [answer[0]["state"] for answer in running.outputs()]
    assert states[0] == "queued" and states[-1] == "done"
    steps = [
        answer[0]["progress"]["step"] for answer in running.outputs() if "progress" in answer[0]
    ]
    assert steps == sorted(steps) and steps


def test_a_client_compares(served: tuple[Client, Fake], models: Folders) -> None:
    client, _ = served
    settings = {"model": models("flux_cfg"), "prompt": "a fox", "seed": 4}
    job, files = client.predict(settings, EASY.to_dict(), 2, api_name="/compare")
    assert job["spec"]["repeats"] == 2 and job["state"] == "done"
    assert {"baseline", "accelerated", "difference"} <= set(job["result"]["files"])
    assert len(files) == len(job["result"]["files"])


def test_a_client_gives_files(served: tuple[Client, Fake], models: Folders, tmp_path: Path) -> None:
    client, service = served
    start = picture(tmp_path / "start.png")
    settings = {"model": models("flux_cfg"), "prompt": "a fox", "seed": 4, "strength": 0.5}
    job, _ = client.predict(settings, None, handle_file(start), api_name="/generate")
    stored = service.jobs[job["id"]].spec.request["image"]
    assert Path(stored).read_bytes() == start.read_bytes()
    assert job["spec"]["request"]["image"] == Path(stored).name, "no folder of the server"


def test_a_client_lists_the_methods_and_why_one_does_not_fit(
    served: tuple[Client, Fake], models: Folders
) -> None:
    client, service = served
    listed = client.predict("", api_name="/methods")
    assert {one["name"] for one in listed} == set(all_methods())
    service.matrix = service.matrix.model_copy(
        update={"methods": {**service.matrix.methods, "tokens.ToMe": "it needs a UNet"}}
    )
    listed = client.predict(models("flux_cfg"), api_name="/methods")
    assert {one["name"]: one["unfit"] for one in listed}["tokens.ToMe"] == "it needs a UNet"


@pytest.mark.parametrize(
    ("endpoint", "arguments", "says"),
    [
        ("/generate", ({"steps": 0, "prompt": "x"}, None), "steps"),
        ("/generate", ({"prompt": "x"}, {"cache": {"Nope": {}}}), "cache.Nope"),
        ("/generate", ({"prompt": "x"}, {"plan": 7}), "format"),
        ("/generate", (["no", "fields"], None), "request"),
        ("/generate", ({"prompt": "x"}, [1]), "plan"),
        ("/compare", ({"prompt": "x"}, None, 1000), "repeats"),
        ("/status", ("../../etc/passwd",), "no job"),
        ("/cancel", ("nothing",), "no job"),
    ],
)
def test_a_client_is_told_what_is_wrong(
    served: tuple[Client, Fake], endpoint: str, arguments: tuple[Any, ...], says: str
) -> None:
    client, service = served
    before = len(service.jobs)
    with pytest.raises(AppError, match=says):
        client.predict(*arguments, api_name=endpoint)
    assert len(service.jobs) == before


def test_the_page_names_every_part_that_tests_and_keys_rely_on(
    served: tuple[Client, Fake],
) -> None:
    client, _ = served
    ids = {part["props"].get("elem_id") for part in client.config["components"]}
    assert ids >= {
        *("prompt", "negative", "model", "seed", "seed-lock", "steps", "width", "height", "frames"),
        *("guidance", "goal", "generate", "stop", "progress", "preview", "result", "badge"),
        *("banner", "copy-cli", "copy-python", "drop", "knobs", "compare-run", "compare-slider"),
        *("compare-table", "compare-timeline", "explore-run", "explore-grid", "explore-plot"),
        *("gallery-grid", "gallery-search", "gallery-restore", "gallery-delete", "methods-table"),
    }
