"""The page Compare: both sides, what is between them, what may be downloaded."""

from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from saved import Folders
from ui_service import Fake, browser, informed
from ui_service import drawn as draw

from accel import Plan, cache
from accel.errors import BadInput
from app import clips, metadata
from app.request import Request, make
from app.serve.jobs import Spec
from app.ui import compare, events, generate, page, records

EASY = Plan(cache.EasyCache(threshold=1e6))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


@pytest.fixture
def service(models: Folders, tmp_path: Path) -> Fake:
    return Fake(
        tmp_path / "served", [informed(models("flux_cfg")), informed(models("ltx"), "video")]
    )


@pytest.fixture
def both(service: Fake) -> tuple[generate.Page, compare.Page]:
    def both() -> tuple[generate.Page, compare.Page]:
        making = generate.tab(service)  # type: ignore[arg-type]
        kept = compare.kept()
        return making, compare.tab(service, making.inputs, page._asked(making), kept)  # type: ignore[arg-type]

    return draw(both)[0]


def asked(model: str, **more: Any) -> Spec:
    request = make(Request, {"model": model, "prompt": "a fox", "seed": 3, **more})
    return events.compared(Spec(request=request.to_dict(), plan=EASY.to_dict()), 2)


def named(drawn: compare.Page, updates: dict[Any, Any]) -> dict[str, Any]:
    names = {component: name for name, component in drawn.shown.items()}
    names[drawn.watching] = "watching"
    return {names[component]: value for component, value in updates.items()}


def compared(drawn: compare.Page, spec: Spec) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every update of a comparison, and what stands in the page at the end."""
    steps = [named(drawn, updates) for updates in drawn.submitted(spec, browser())]
    return steps, {name: value for step in steps for name, value in step.items()}


def test_pictures_are_shown_under_one_slider_by_their_own_files(
    both: tuple[generate.Page, compare.Page], service: Fake, models: Folders
) -> None:
    _, end = compared(both[1], asked(models("flux_cfg")))
    job = service.jobs[end["watching"]]
    files = records.files(service, job)  # type: ignore[arg-type]
    assert end["slider"].visible and not end["clips"].visible
    for side, plan in zip(compare.SIDES, (Plan(), EASY), strict=True):
        made, pictures = metadata.read(files[side])
        assert made.plan == plan.to_dict() and made.request["seed"] == 3
        assert made.pixels == metadata.pixels(pictures)
        assert end[side] is None
    assert end["difference"] == str(files["difference"])
    assert "2.50" in end["badge"] and "cache.EasyCache" in end["timeline"]
    assert "PSNR" in end["table"] and "1.000" in end["table"]
    assert end["progress"] == ""


def test_clips_are_shown_beside_each_other(
    both: tuple[generate.Page, compare.Page], service: Fake, models: Folders
) -> None:
    _, end = compared(both[1], asked(models("ltx")))
    job = service.jobs[end["watching"]]
    assert job.result is not None, job.error
    assert not end["slider"].visible and end["clips"].visible and end["play"].visible
    for side in compare.SIDES:
        assert Path(end[side]).suffix == clips.CLIP and Path(end[side]).is_file()


def test_every_file_of_a_comparison_can_be_downloaded(
    both: tuple[generate.Page, compare.Page], service: Fake, models: Folders
) -> None:
    _, end = compared(both[1], asked(models("flux_cfg")))
    job = service.jobs[end["watching"]]
    assert job.result is not None
    assert {Path(path).name for path in end["files"]} == set(job.result.files.values())


def test_a_new_comparison_begins_with_an_empty_page(
    both: tuple[generate.Page, compare.Page], models: Folders
) -> None:
    steps, _ = compared(both[1], asked(models("flux_cfg")))
    shown = {name: steps[1][name] for name in compare.CLEARED}
    assert shown.pop("whole") == gr.update(visible=False)
    assert not any(shown.values())


def test_a_refusal_is_shown_and_nothing_is_queued(
    both: tuple[generate.Page, compare.Page], service: Fake, models: Folders
) -> None:
    service.refused = BadInput("steps: 900, and this server admits at most 200: ask for less.")
    _, end = compared(both[1], asked(models("flux_cfg")))
    assert "ask for less" in end["banner"] and not service.jobs


def test_a_failed_comparison_says_why(
    both: tuple[generate.Page, compare.Page], models: Folders
) -> None:
    _, end = compared(both[1], asked(models("flux_cfg"), prompt=" "))
    assert "PROMPT is empty" in end["banner"] and end["files"] is None


def test_the_settings_of_generate_are_compared(
    both: tuple[generate.Page, compare.Page], service: Fake
) -> None:
    making, _ = both
    now = {name: getattr(field, "value", None) for name, field in making.fields.items()}
    now |= {"prompt": "an owl", "seed": "5", "seed_lock": True, "goal": "fast"}
    spec = page._asked(making)(browser(), 4, *now.values())
    assert (spec.kind, spec.repeats, spec.title) == ("compare", 4, "fast")
    assert spec.request["prompt"] == "an owl" and spec.request["seed"] == 5
    assert Plan.from_dict(spec.plan) == Plan.preset("fast")


def test_the_picture_that_is_shown_is_compared_with_its_own_seed_and_plan(
    both: tuple[generate.Page, compare.Page], service: Fake, models: Folders
) -> None:
    making, _ = both
    spec = Spec(request={"model": models("flux_cfg"), "prompt": "x"}, plan=EASY.to_dict())
    (job,) = service.submit("local", [spec.model_copy(update={"against": "other"})])
    found = making.comparison(job.id, browser())
    assert found.kind == "compare" and found.against is None
    assert (found.request, found.plan) == (job.spec.request, job.spec.plan)


def test_after_a_reload_the_comparison_is_back_and_only_for_its_owner(
    both: tuple[generate.Page, compare.Page], service: Fake, models: Folders
) -> None:
    _, drawn = both
    (job,) = service.submit("ada", [asked(models("flux_cfg"))])
    gone = [named(drawn, updates) for updates in drawn.reattach(job.id, browser("eve"))]
    assert gone == [{"watching": None}]
    steps = [named(drawn, updates) for updates in drawn.reattach(job.id, browser("ada"))]
    assert service.jobs[job.id].state == "done" and steps[-1]["slider"].visible


@pytest.mark.parametrize("role", ["baseline", "difference", "sheet"])
def test_a_file_that_is_gone_is_said_to_be_gone_and_the_others_are_shown(
    both: tuple[generate.Page, compare.Page], service: Fake, models: Folders, role: str
) -> None:
    _, drawn = both
    _, end = compared(drawn, asked(models("flux_cfg")))
    job = service.jobs[end["watching"]]
    lost = service.file("local", job.id, role)
    lost.unlink()
    steps = [named(drawn, updates) for updates in drawn.reattach(job.id, browser())]
    again = {name: value for step in steps for name, value in step.items()}
    assert lost.name in again["banner"] and "deleted" in again["banner"]
    assert set(again["files"]) == set(end["files"]) - {str(lost)}
    assert (again["slider"].value is None) == (role == "baseline")
    assert (again["difference"] is None) == (role == "difference")
    assert again["table"] == end["table"]


def test_a_comparison_can_be_stopped(
    both: tuple[generate.Page, compare.Page], service: Fake, models: Folders
) -> None:
    _, drawn = both
    steps = drawn.submitted(asked(models("flux_cfg")), browser())
    assert "Checking" in named(drawn, next(steps))["progress"]
    watching = named(drawn, next(steps))["watching"]
    drawn.stop(watching, browser())
    list(steps)
    assert service.jobs[watching].state == "stopped"
    assert "no job" in named(drawn, drawn.stop("nothing", browser()))["banner"]
