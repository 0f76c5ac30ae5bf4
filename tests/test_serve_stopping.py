"""Stopped, or out of memory, at any call of a network: what there is is kept, and nothing stays."""

from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image
from roster import LEADERS, ROSTER, STEPS
from saved import Folders, done, size
from tiny import PIPELINES

from accel import Plan
from app import metadata, models
from app.request import Request, Source
from app.serve.following import Control
from app.serve.jobs import Progress, Spec
from app.serve.performing import Task
from app.serve.worker import Worker
from app.session import Session

NETWORKS = {"sd15": "unet", "flux_cfg": "transformer"}


def leaders():
    """The stock pipeline, and of each family the first leader of an engine that acts on one."""
    found = {"stock": ("sd15", None), "stock flux": ("flux_cfg", None)}
    for turn, name in enumerate(sorted(set(LEADERS.values()))):
        row, family = ROSTER[name], name.partition(".")[0]
        served = [place for place in NETWORKS if row.acts(PIPELINES[place])]
        if served and family not in found:
            found[family] = (served[turn % len(served)], row.active)
    return found.values()


def others():
    """Every other method that acts on one of them."""
    known = {method and method.name for _, method in leaders()}
    for row in ROSTER.values():
        served = [place for place in NETWORKS if row.acts(PIPELINES[place])]
        if served and row.active.name not in known:
            yield served[0], row.active


def case(place, method, *marks):
    plan = Plan() if method is None else Plan(method)
    return pytest.param(place, plan, id=f"{place}-{method and method.name}", marks=marks)


CASES = [
    *(case(place, method) for place, method in leaders()),
    *(case(place, method, pytest.mark.laws_full) for place, method in others()),
]


class Bench:
    """A worker in this process, and what happens at some call of its network."""

    def __init__(self, folder: Path, model: str, network: str) -> None:
        self.folder = folder
        self.model = model
        self.calls = self.opens = 0
        self.at: dict[int, object] = {}
        self.stop = Event()
        self.heard: list[object] = []
        self._network = network
        self.worker = Worker(self._open)

    def _open(self, source: Source) -> Session:
        self.opens += 1
        session = Session.open(source)
        getattr(session.model.pipe, self._network).register_forward_pre_hook(self._call)
        return session

    def _call(self, _module: object, _args: object) -> None:
        act = self.at.get(self.calls)
        self.calls += 1
        if act is not None:
            act()

    def job(self, plan: Plan, at=None, act=None, **more):
        """Make a picture; do something at the given call of the network."""
        self.calls, self.at = 0, {} if at is None else {at: act}
        self.stop.clear()
        asked = {"model": self.model, "device": "cpu", "prompt": "a red fox", "seed": 3}
        request = Request(**{**asked, "steps": STEPS, **more})
        spec = Spec(request=request.to_dict(), plan=plan.to_dict())
        task = Task("j", spec, self.folder / "j", self.folder / "baselines")
        ended = self.worker.perform(task, Control(self.stop, Event(), self.heard.append))
        picture = None
        if ended.result is not None:
            picture = self.folder / "j" / ended.result.files["picture"]
        return ended, picture


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


@pytest.fixture(scope="module")
def benches(tmp_path_factory, folders):
    return {
        name: Bench(tmp_path_factory.mktemp(name), folders(name), network)
        for name, network in NETWORKS.items()
    }


def at_every_step(calls: int) -> list[int]:
    """A call of the network at every step: of two, the first and the second in turns."""
    each = calls // STEPS
    return [min(step * each + step % each, calls - 1) for step in range(STEPS)]


def pixels(path: Path) -> str:
    return metadata.read(path)[0].pixels


@pytest.mark.parametrize(("place", "plan"), CASES)
def test_a_stop_at_any_call_keeps_a_whole_picture_and_leaves_nothing(benches, place, plan):
    bench = benches[place]
    whole, picture = bench.job(plan)
    fresh, calls = pixels(picture), bench.calls
    full = size(picture)
    for at in at_every_step(calls):
        ended, picture = bench.job(plan, at, bench.stop.set)
        assert bench.calls <= at + calls / whole.result.steps + 1  # within a step
        if at == 0:
            assert (ended.state, ended.result) == ("stopped", None)
        elif ended.state == "done":  # it was at its last step already
            assert pixels(picture) == fresh and ended.result.steps == whole.result.steps
        else:
            made, [kept] = metadata.read(picture)
            assert ended.state == "stopped" and ended.result.partial and made.result.partial
            assert 0 < ended.result.steps < whole.result.steps
            assert kept.size == full and made.result.steps == ended.result.steps
        again, picture = bench.job(plan)
        assert again.state == "done" and pixels(picture) == fresh
    assert bench.opens == 1


@pytest.mark.parametrize(("place", "plan"), CASES)
def test_out_of_memory_at_any_call_is_declared_and_leaves_nothing(
    request, folders, tmp_path, place, plan
):
    every = request.node.get_closest_marker("laws_full") or (place, len(plan)) == ("sd15", 0)
    bench = Bench(tmp_path, folders(place), NETWORKS[place])
    _, picture = bench.job(plan)
    fresh, calls = pixels(picture), bench.calls

    def run_out():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    places = at_every_step(calls)
    for at in places if every else places[2:3]:
        opens = bench.opens
        ended, picture = bench.job(plan, at, run_out)
        assert ended.state == "done" and pixels(picture)
        [note] = [note for note in ended.result.notes if "out of memory" in note]
        assert "decoder in tiles" in note and ended.measured.configuration is None
        assert metadata.read(picture)[0].fingerprint.savings == ("decoder in tiles",)
        again, picture = bench.job(plan)
        assert again.result.notes == [] or "out of memory" not in again.result.notes[-1]
        assert pixels(picture) == fresh and bench.opens == opens + 1  # a fresh session
        assert metadata.read(picture)[0].fingerprint.savings == ()


def test_out_of_memory_again_and_again_is_refused_with_advice(benches):
    bench = benches["sd15"]

    def always():
        bench.at = dict.fromkeys(range(99), always)
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    ended, _ = bench.job(Plan(), 0, always)
    assert ended.state == "failed" and "Out of memory after 0 steps" in ended.error
    assert "decoder in tiles" in ended.error and "ask for fewer pixels" in ended.error
    assert bench.job(Plan())[0].state == "done"


def test_a_partial_picture_comes_nearer_with_every_step(benches):
    """The estimate that is decoded is one of the result: it ends at the result."""
    bench = benches["flux_cfg"]
    _, picture = bench.job(Plan())
    with Image.open(picture) as whole:
        final = np.asarray(whole.convert("RGB"), dtype=float)
    distances = []
    for at in range(3, bench.calls - 2, 4):  # two calls a step
        _, picture = bench.job(Plan(), at, bench.stop.set)
        with Image.open(picture) as part:
            seen = np.asarray(part.convert("RGB"), dtype=float)
        distances.append(float(((seen - final) ** 2).mean()))
    assert len(distances) > 1 and distances[-1] < distances[0]


def test_a_partial_picture_is_not_compared_when_it_is_made_again(benches, tmp_path):
    bench = benches["flux_cfg"]
    _, picture = bench.job(Plan(), 4, bench.stop.set)
    again = done("generate", "--like", picture, "--out", tmp_path / "again.png")
    assert "was stopped after 3 steps: not compared" in again.stderr


@pytest.mark.parametrize("watched", [True, False])
def test_a_pipeline_that_cannot_decode_early_keeps_its_preview(tmp_path, watched):
    pipe = PIPELINES["pixart_sigma"].build()
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "max_sequence_length": 16, "use_resolution_binning": False}
    session = Session(models.Model(Source(), pipe, call, ""))
    assert not hasattr(type(pipe), "interrupt")
    stop, heard = Event(), []

    def say(message):
        heard.append(message)
        if isinstance(message, Progress) and message.step == 2:
            stop.set()

    from app.serve import following

    worker = Worker(lambda source: session)
    spec = Spec(request={"prompt": "a red fox", "seed": 3, "steps": STEPS})
    task = Task("j", spec, tmp_path / "j", tmp_path / "baselines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following, "PAUSE", 0.0)
        ended = worker.perform(task, Control(stop, Event(), say))
    assert ended.state == "stopped" and ended.result.partial and ended.result.steps == 2
    with Image.open(tmp_path / "j" / ended.result.files["picture"]) as kept:
        assert max(kept.size) == 256
    stop.clear()
    again = worker.perform(task, Control(stop, Event(), heard.append))
    reference = Session(models.Model(Source(), _fresh(), call, ""))
    assert again.state == "done"
    expected = reference.run(task.request, Plan()).pictures
    assert pixels(tmp_path / "j" / again.result.files["picture"]) == metadata.pixels(expected)


def _fresh():
    pipe = PIPELINES["pixart_sigma"].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("model", ["scenes-unet", "scenes-flux"])
def test_bundled_models_stop_within_a_step_and_go_on_as_if_nothing_had_been(tmp_path, model):
    bench = Bench(tmp_path, model, "unet" if model == "scenes-unet" else "transformer")
    plan = Plan.preset("balanced")
    _, picture = bench.job(plan, steps=4)
    fresh = pixels(picture)
    ended, picture = bench.job(plan, bench.calls // 2, bench.stop.set, steps=4)
    assert ended.state == "stopped" and ended.result.partial
    with Image.open(picture) as kept:
        assert kept.size == (128, 128)
    _, picture = bench.job(plan, steps=4)
    assert pixels(picture) == fresh
