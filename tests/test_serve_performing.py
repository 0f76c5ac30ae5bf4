"""Jobs on real (tiny) models: the bits of the command line, kept stock sides, measured figures."""

import json
from dataclasses import replace
from itertools import count
from threading import Event

import pytest
from PIL import Image
from saved import Folders, done, picture

from accel import Plan, cache, guidance
from accel.errors import UnsupportedModel
from app import clips, compare, metadata
from app.compare import Side, Timing
from app.request import Request, Source
from app.serve import performing
from app.serve.baselines import Baselines
from app.serve.following import Control
from app.serve.jobs import Progress, Spec
from app.serve.performing import Against, Task
from app.serve.worker import Worker
from app.session import Session

CACHE = Plan(cache.EasyCache(threshold=1e6))


class Counting(Session):
    """A session that counts what it ran."""

    def run(self, request, plan, watch=None, *, memory=False):
        self.ran.append(f"{len(plan)} followed" if watch else f"{len(plan)} timed")
        return super().run(request, plan, watch, memory=memory)

    def bare(self, request):
        self.ran.append("bare")
        return super().bare(request)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


@pytest.fixture(scope="module")
def desk():
    """A worker, and what its session ran."""
    ran = []

    def open_counting(source):
        session = Counting.open(source)
        session.ran = ran
        return session

    return Worker(open_counting), ran


@pytest.fixture
def perform(desk, folders, tmp_path):
    worker, ran = desk

    def act(kind="generate", plan=CACHE, against=None, job="j", model="sd15", stop=None, **more):
        ran.clear()
        heard = []
        asked = {
            "model": folders(model),
            "device": "cpu",
            "prompt": "a red fox",
            "seed": 3,
            "steps": 6,
        }
        repeats = more.pop("repeats", 2)
        spec = Spec(
            kind=kind, request=asked | more, plan=plan.to_dict(), title="cached", repeats=repeats
        )
        task = Task(job, spec, tmp_path / job, tmp_path / "baselines", against=against)

        def say(message):
            heard.append(message)
            if stop is not None and isinstance(message, Progress) and stop in message.note:
                control.stop.set()

        control = Control(Event(), Event(), say)
        return worker.perform(task, control), tmp_path / job, heard

    return act


def test_the_picture_is_that_of_the_command_line_bit_for_bit(perform, folders, tmp_path):
    ended, folder, _ = perform()
    path = folder / ended.result.files["picture"]
    typed = done(
        "generate", "a red fox", "--model", folders("sd15"), "--seed", 3, "--steps", 6,
        "--set", "cache.EasyCache.threshold=1e6", "--out", tmp_path / "cli.png",
    )  # fmt: skip
    ours, theirs = metadata.read(path)[0], metadata.read(tmp_path / "cli.png")[0]
    assert ours.pixels == theirs.pixels
    timeless = {"result": {"seconds"}}
    assert ours.model_dump(exclude=timeless) == theirs.model_dump(exclude=timeless)
    again = done("generate", "--like", path, "--out", tmp_path / "again.png")
    assert "identical" in again.stderr and typed.exit_code == 0
    assert path.name == "a-red-fox-3.png"


def test_a_result_tells_what_its_methods_did(perform):
    ended, folder, _ = perform()
    result = ended.result
    assert result.verdicts["cache.EasyCache"]["state"] == "ACTIVE"
    states = {state for _, _, _, state in result.events["cache.EasyCache"]}
    assert len(states) == 2 and result.steps == 6 and 0 < result.nfe < 12
    assert not result.partial and not result.clip
    with Image.open(folder / result.files["timeline"]) as timeline:
        timeline.load()


def test_fidelity_is_measured_against_another_job(perform, tmp_path):
    stock, folder, _ = perform(plan=Plan(), job="stock")
    path = folder / stock.result.files["picture"]
    other = Spec(request={"model": "x", "seed": 1}, plan=CACHE.to_dict())  # so the file is read
    there = Against(other, path)
    same, _, _ = perform(plan=Plan(), against=there, job="same")
    near, _, _ = perform(against=there, job="near")
    assert same.result.quality["psnr"] == "equal" and same.result.quality["perceptual"] == 0
    assert 0 < near.result.quality["psnr"] < 100 and near.result.quality["ssim"] < 1
    assert stock.result.quality == {}


def test_a_clip_is_compared_with_the_frames_and_not_with_the_film(perform):
    stock, folder, _ = perform(plan=Plan(), job="stock", model="animatediff", frames=3)
    assert stock.result.clip and set(stock.result.files) == {"picture", "record", "timeline"}
    path = folder / stock.result.files["picture"]
    assert path.suffix == ".mp4" and clips.read(path)[0].result.steps == 6
    record = json.loads((folder / stock.result.files["record"]).read_text())
    assert record["pixels"] == clips.read(path)[0].pixels
    there = Against(Spec(request=record["request"], plan={"plan": 1}), path)
    same, _, _ = perform(plan=Plan(), against=there, job="same", model="animatediff", frames=3)
    assert same.result.quality["psnr"] == "equal" and same.result.quality["flicker"] == 0


ROLES = {"baseline", "accelerated", "difference", "sheet", "timeline", "report"}


def test_a_second_comparison_runs_stock_once_more_and_not_again(perform, desk, monkeypatch):
    monkeypatch.setattr(performing, "DRIFT", 1e9)
    ran = desk[1]
    first, folder, _ = perform("compare")
    assert ran == ["0 followed", "1 followed", "bare", "1 timed", "1 timed", "bare"]
    assert set(first.result.files) == ROLES and len(first.measured.stock) == 2
    second, _, heard = perform("compare", job="again")
    assert ran == ["1 followed", "1 timed", "1 timed", "bare"]
    assert len(second.measured.stock) == 1 and "confirmed" in second.result.notes[-1]
    assert second.result.quality == first.result.quality
    for ended in (first, second):
        speedup = ended.result.speedup
        assert 0 < speedup.low <= speedup.ratio <= speedup.high
        assert speedup.baseline_seconds == pytest.approx(speedup.ratio * ended.result.seconds)
    pair = [
        metadata.read(place / "baseline.png")[0].pixels
        for place in (folder, folder.parent / "again")
    ]
    assert pair[0] == pair[1]
    assert [one.note for one in heard if getattr(one, "phase", "") == "measuring"] == [
        "timed run 1 of 2", "timed run 2 of 2", "one stock run, as a check",
    ]  # fmt: skip


@pytest.fixture
def light(monkeypatch):
    """Comparisons that only count and time: nothing is drawn or weighed."""
    monkeypatch.setattr(compare, "documents", lambda *_: {})
    monkeypatch.setattr(compare.nearness, "measure", lambda *_: {})


@pytest.mark.parametrize("doubt", ["another time", "other bits", "too few times"])
def test_a_kept_stock_side_in_doubt_is_measured_anew(light, perform, desk, monkeypatch, doubt):
    monkeypatch.setattr(performing, "DRIFT", 1.0 if doubt == "another time" else 1e9)
    perform("compare")
    if doubt == "other bits":
        real = metadata.pixels
        number = count()
        monkeypatch.setattr(metadata, "pixels", lambda pictures: f"{real(pictures)} {next(number)}")
    ended, _, _ = perform("compare", repeats=4 if doubt == "too few times" else 2)
    assert ended.state == "done" and desk[1].count("bare") >= 2
    assert desk[1].count("0 followed") == 1


def test_other_requests_have_other_stock_sides(light, perform, desk):
    perform("compare")
    for other in ({"seed": 4}, {"prompt": "a boat"}, {"steps": 5}):
        perform("compare", **other)
        assert desk[1].count("0 followed") == 1


def test_kept_sides_go_when_there_are_too_many(tmp_path, folders):
    session = Session.open(Source(model=folders("sd15"), device="cpu"))
    asked = Request(model=folders("sd15"), device="cpu", prompt="fox", steps=2)
    kept = Baselines(tmp_path / "kept", bytes=9_000)
    requests = [replace(asked, seed=seed) for seed in range(4)]
    for request in requests:
        kept.keep(request, session.model, Side(session.run(request, Plan()), Timing((1.0,))))
    there = [kept.has(request, session.model) for request in requests]
    assert there[-1] and not there[0]
    assert sum(path.stat().st_size for path in kept.folder.iterdir()) <= 9_000
    again = kept.read(requests[-1], session.model)
    fresh = session.run(requests[-1], Plan())
    assert metadata.pixels(again.outcome.pictures) == metadata.pixels(fresh.pictures)
    assert again.outcome.call == fresh.call and again.report.nfe == fresh.report.nfe
    assert again.timing.seconds == (1.0,)


@pytest.mark.parametrize(
    "note", ["warm-up 1/1 stock", "warm-up 1/1 cached", "timed run 1 of 4", "timed run 3 of 4"]
)
def test_a_comparison_stops_within_a_step_and_leaves_nothing(perform, desk, note):
    reference, folder, _ = perform()
    before = metadata.read(folder / reference.result.files["picture"])[0].pixels
    ended, folder, _ = perform("compare", job="stopped", stop=note)
    assert (ended.state, ended.result) == ("stopped", None) and not folder.exists()
    again, folder, _ = perform(job="after")
    assert metadata.read(folder / again.result.files["picture"])[0].pixels == before


def test_the_presets_that_fit_are_measured_in_turns(perform, desk, monkeypatch):
    attach, fastest = guidance.Adaptive.attach, [*Plan.preset("fastest")]

    def refuse(method, site):
        if method in fastest:
            raise UnsupportedModel("this one does not fit")
        yield from attach(method, site)

    monkeypatch.setattr(guidance.Adaptive, "attach", refuse)
    ended, folder, _ = perform("measure", plan=Plan(), repeats=1)
    assert ended.state == "done" and set(ended.measured.figures) == {"exact", "balanced", "fast"}
    assert "fastest is left out: this one does not fit" in ended.result.notes
    assert ended.measured.figures["exact"].quality["psnr"] == "equal"
    for figure in ended.measured.figures.values():
        assert figure.speedup.baseline_seconds == ended.result.seconds > 0
    told = json.loads((folder / ended.result.files["report"]).read_text())
    assert set(told) == set(ended.measured.figures)
    assert ended.measured.machine.startswith("cpu, ") and "threads" in ended.measured.machine
    sizes = [len(Plan.preset(name)) for name in ("balanced", "fast")]
    followed, timed = ([f"{size} {what}" for size in sizes] for what in ("followed", "timed"))
    assert desk[1] == ["0 followed", "0 followed", *followed, "bare", "0 timed", *timed]


def test_what_a_run_takes_depends_on_sizes_and_not_on_words(perform, tmp_path):
    start = picture(tmp_path / "start.png")
    perform(plan=Plan())
    same = [perform(plan=plan, **more)[0].measured.configuration for plan, more in (
        (Plan(), {}), (CACHE, {}), (Plan(), {"prompt": "a boat"}), (Plan(), {"seed": 9}),
    )]  # fmt: skip
    changed = ({"steps": 5}, {"guidance": 2.0}, {"width": 64}, {"image": str(start)})
    other = [perform(**more)[0].measured.configuration for more in changed]
    assert len(set(same)) == 1 and None not in same
    assert len({*same, *other}) == 5
