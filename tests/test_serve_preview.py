"""Previews: the estimate is exact where it can be, the map is that of the model, no bit changes."""

import io
from threading import Event
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import PIPELINES

from accel import Plan, cache
from accel.trajectory import Levels, Step, Trajectory, Update
from app import metadata
from app.request import Request, Source
from app.serve import following
from app.serve.following import Control, Follower
from app.serve.jobs import Progress
from app.serve.preview import SIDE, Painter
from app.serve.stopping import Estimate
from app.session import Session

SCHEDULERS = {
    "DDIMScheduler": ("epsilon", "v_prediction", "sample"),
    "EulerDiscreteScheduler": ("epsilon", "v_prediction", "sample"),
    "EulerAncestralDiscreteScheduler": ("epsilon",),
    "DPMSolverMultistepScheduler": ("epsilon", "v_prediction"),
    "FlowMatchEulerDiscreteScheduler": ("flow_prediction",),
}
STOCK = Plan()
PAIRS = [(name, kind) for name, kinds in SCHEDULERS.items() for kind in kinds]


@pytest.mark.parametrize(("name", "prediction"), PAIRS)
@given(index=st.integers(0, 9), seed=st.integers(0, 99))
def test_the_estimate_is_what_an_exact_network_means(name, prediction, index, seed):
    kind = getattr(diffusers, name)
    flows = prediction == "flow_prediction"
    scheduler = kind() if flows else kind(prediction_type=prediction)
    scheduler.set_timesteps(10)
    step = Step(index, 10, index, Levels(scheduler))
    noise = torch.Generator().manual_seed(seed)
    clean, epsilon = (torch.randn(1, 4, 3, 3, generator=noise) for _ in range(2))
    _, alpha, sigma = step.level
    sample = alpha * clean + sigma * epsilon
    output = {
        "epsilon": epsilon,
        "v_prediction": alpha * epsilon - sigma * clean,
        "sample": clean,
        "flow_prediction": epsilon - clean,
    }[prediction]
    if name.startswith("Euler"):  # these keep their sample over α
        sample = sample / alpha
    trajectory = Trajectory(SimpleNamespace(scheduler=scheduler), lambda scheduled: scheduled)
    trajectory.scheduler = scheduler
    estimate = Estimate(SimpleNamespace(trajectory=trajectory))
    assert not estimate.known
    [(_, editor)] = trajectory.editors
    assert editor(Update(step, output, sample, {})) is output
    assert estimate.known
    torch.testing.assert_close(estimate.latents(), clean, atol=2e-3, rtol=2e-3)


@pytest.fixture(scope="module")
def sessions():
    return {
        name: Session.open(Source(model=name, device="cpu"))
        for name in ("scenes-unet", "scenes-flux", "scenes-wan")
    }


def follow(session, plan=STOCK, watched=True, **more):
    """The previews of a run, and its pictures."""
    heard = []
    control = Control(Event(), Event(), heard.append)
    if watched:
        control.watched.set()
    follower = Follower("j", control, keeps=True)
    follower.painter = Painter.fit(session.model.pipe)
    request = Request(
        model=session.model.source.model, device="cpu", prompt="a red circle", seed=3, **more
    )
    with follower.guarding(session.model.pipe):
        outcome = session.run(request, plan, follower.follow)
        last = follower.picture()
    return heard, last, outcome


def colours(picture):
    small = picture.convert("RGB").resize((16, 16), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, dtype=np.float32).flatten())


@pytest.mark.parametrize("model", ["scenes-unet", "scenes-flux", "scenes-wan"])
def test_the_last_preview_looks_like_the_result(sessions, model):
    _, last, outcome = follow(sessions[model], steps=8)
    with Image.open(io.BytesIO(last)) as preview:
        assert max(preview.size) == SIDE
        final = outcome.pictures[len(outcome.pictures) // 2]
        both = torch.stack([colours(preview), colours(final)])
    assert float(torch.corrcoef(both)[0, 1]) > (0.6 if outcome.clip else 0.8)  # frames are blended


@pytest.mark.parametrize("model", ["scenes-unet", "scenes-flux"])
@pytest.mark.parametrize(
    "plan", [Plan(), Plan(cache.EasyCache(threshold=1e6))], ids=["stock", "cached"]
)
def test_watching_changes_no_bit(sessions, model, plan, monkeypatch):
    monkeypatch.setattr(following, "PAUSE", 0.0)
    monkeypatch.setattr(following, "LOOKS", 0.0)
    monkeypatch.setattr(following, "SHARE", 0)
    heard, _, watched = follow(sessions[model], plan, steps=6)
    seen = [one for one in heard if one.preview is not None]
    assert len(seen) == 6
    request = Request(model=model, device="cpu", prompt="a red circle", seed=3, steps=6)
    alone = sessions[model].run(request, plan)
    assert metadata.pixels(watched.pictures) == metadata.pixels(alone.pictures)


def test_progress_counts_steps_and_what_was_skipped(sessions, monkeypatch):
    monkeypatch.setattr(following, "PAUSE", 0.0)
    plan = Plan(cache.EasyCache(threshold=1e6))
    heard, _, _ = follow(sessions["scenes-flux"], plan, watched=False, steps=6)
    assert all(isinstance(one, Progress) and one.preview is None for one in heard)
    assert [one.phase for one in heard] == ["encoding", *["denoising"] * 5, "decoding"]
    assert [one.step for one in heard[1:]] == list(range(1, 7))
    assert {one.total for one in heard[1:]} == {6}
    assert [one.skipped for one in heard[1:]] == [0, 0, 0, 1, 2, 2]
    assert all(one.eta >= 0 for one in heard[1:]) and heard[-1].eta == 0


@pytest.mark.parametrize("spent", [0.0, 0.004, 0.02])
def test_previews_take_less_than_a_fiftieth_of_the_time(monkeypatch, spent):
    clock = [100.0]
    monkeypatch.setattr(following.time, "monotonic", lambda: clock[0])
    control = Control(Event(), Event(), lambda message: None)
    control.watched.set()
    follower = Follower("j", control)
    shown = []

    def paint():
        clock[0] += spent
        shown.append(clock[0])
        return b"png"

    monkeypatch.setattr(follower, "picture", paint)
    began = clock[0]
    for _ in range(1000):
        clock[0] += 0.01
        follower._look(clock[0])
    took = clock[0] - began
    assert 2 <= len(shown) <= 2 * took + 1
    assert len(shown) * spent <= took / 50 + spent


@pytest.mark.parametrize("name", [name for name, tiny in PIPELINES.items()])
def test_every_pipeline_gets_previews_or_none_but_never_an_error(name):
    pipe = PIPELINES[name].build()
    before = torch.get_rng_state()
    painter = Painter.fit(pipe)
    assert torch.equal(before, torch.get_rng_state())
    if painter is not None:
        channels = len(painter.weights) - 1
        for shape in ((channels, 6, 4), (channels, 3, 6, 4)):
            with Image.open(io.BytesIO(painter.paint(torch.randn(shape)))) as picture:
                assert picture.size == (171, 256)
        assert painter.paint(torch.randn(channels + 1, 6, 4)) is None
        assert painter.paint(torch.randn(channels, 6)) is None
