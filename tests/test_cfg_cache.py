"""CFG-Cache: frequencies, weights, tokens as pictures, and what it evaluates."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws_branches import Forced
from test_laws_counts import computed_steps

from accel import Plan, cache, errors, guidance
from accel.guidance.branches import Missing, Pair
from accel.guidance.cfg_cache import Deltas, low_frequencies
from accel.seams.grids import Grid, grid_of
from accel.trajectory import Levels, Step


def dense_low(x):
    """The low frequencies as the paper's code takes them: a disc around the shifted centre."""
    height, width = x.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    radius = min(height, width) // 5
    mask = (rows - height // 2) ** 2 + (columns - width // 2) ** 2 <= radius**2
    return torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1)), mask


@settings(max_examples=30)
@given(st.integers(3, 24), st.integers(3, 24), st.integers(0, 99))
def test_low_frequencies_are_those_of_the_disc(height, width, seed):
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    shifted, mask = dense_low(x)
    low = torch.fft.ifft2(torch.fft.ifftshift(shifted * mask, dim=(-2, -1))).real
    assert torch.allclose(low_frequencies(x), low, atol=1e-5)


def test_a_constant_is_low_and_a_chessboard_is_not():
    flat = torch.ones(1, 10, 10)
    board = (torch.arange(10)[:, None] + torch.arange(10)) % 2 * 2.0 - 1.0
    assert torch.allclose(low_frequencies(flat), flat, atol=1e-6)
    assert low_frequencies(board[None]).abs().max() < 1e-6


# One sample by itself, against the formula with transforms.


def call_at(index, shape=(4, 16, 16), steps=10):
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(steps)
    core = SimpleNamespace()
    denoiser = SimpleNamespace(name="unet", core=core)
    row = SimpleNamespace(sample=0)
    step = Step(index, steps, index, Levels(scheduler))
    sample = torch.zeros(1, *shape)
    return SimpleNamespace(step=step, denoiser=denoiser, sample=sample, rows=(row,), arguments={})


def kept(method, shape=(4, 16, 16), seed=0):
    """State after a full step, with that step's c and u."""
    cond, uncond = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    deltas = Deltas(method)
    deltas.keep(call_at(5, shape), {0: Pair(cond, uncond, cond)})
    return deltas, cond, uncond


def estimate(deltas, index, cond, shape=(4, 16, 16)):
    return deltas.estimate(Missing(call_at(index, shape), 0, cond, True))


@pytest.mark.parametrize("shape", [(4, 16, 16), (4, 15, 9), (4, 3, 12, 16), (3, 4, 8, 8)])
def test_without_weights_and_change_u_is_u(shape):
    deltas, cond, uncond = kept(guidance.CFGCache(low=1.0, high=1.0), shape)
    assert torch.allclose(estimate(deltas, 6, cond, shape), uncond, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 16, 16), (4, 15, 9), (4, 3, 12, 16)])
def test_the_estimate_is_the_papers(shape):
    """û = Re ifft(F(c) + w₁ᵏ·Δ_low + w₂ᵏ·Δ_high), k estimates after a full step."""
    method = guidance.CFGCache(low=1.3, high=0.8, low_range=(0.0, 2000.0), high_range=(0.0, 2000.0))
    deltas, old, uncond = kept(method, shape)
    shifted_u, mask = dense_low(uncond)
    delta = shifted_u - dense_low(old)[0]
    for times in (1, 2, 3):
        cond = torch.randn(shape, generator=torch.Generator().manual_seed(times))
        weights = torch.where(mask, 1.3**times, 0.8**times)
        whole = dense_low(cond)[0] + weights * delta
        expected = torch.fft.ifft2(torch.fft.ifftshift(whole, dim=(-2, -1))).real
        assert torch.allclose(estimate(deltas, 5 + times, cond, shape), expected, atol=1e-5)


def test_weights_are_those_of_the_timestep():
    method = guidance.CFGCache(low=1.1, high=1.2, low_range=(99, 901), high_range=(-1, 301))
    weights = {index: method.weights(call_at(index).step) for index in range(10)}
    assert weights[0] == (1.1, 1.0)  # timestep 900
    assert weights[5] == (1.1, 1.0)  # 400
    assert weights[6] == (1.1, 1.2)  # 300
    assert weights[9] == (1.0, 1.2)  # 0


def test_a_full_step_starts_the_weights_anew():
    method = guidance.CFGCache(low=2.0, low_range=(-1.0, 2000.0))
    deltas, cond, uncond = kept(method)
    first = estimate(deltas, 6, cond)
    assert not torch.allclose(estimate(deltas, 7, cond), first)
    deltas.keep(call_at(8), {0: Pair(cond, uncond, cond)})
    assert torch.equal(estimate(deltas, 9, cond), first)


# Tokens as pictures.


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2))
def test_packing_is_undone(height, width, channels, more):
    for grid, tokens, size in (
        (Grid(0, height, width, 2), height * width, 4 * channels),
        (Grid(3, height, width), 3 * height * width, channels),
    ):
        row = torch.randn(tokens + more, size)
        picture = grid.unpack(row)
        assert picture.shape[-2:] == (height * grid.patch, width * grid.patch)
        assert torch.equal(grid.pack(picture, row), row)
    plain = torch.randn(2, 3, 4)
    assert Grid().unpack(plain) is plain
    last = torch.randn(3, 4, 5, 2)
    assert Grid(last=True).unpack(last).shape == (2, 3, 4, 5)
    assert torch.equal(Grid(last=True).pack(Grid(last=True).unpack(last), last), last)


@pytest.mark.parametrize(
    "kind",
    [diffusers.FluxPipeline, diffusers.ChromaPipeline, diffusers.QwenImagePipeline],
)
def test_tokens_are_packed_as_the_pipelines_do(kind):
    picture = torch.randn(1, 4, 6, 10)
    tokens = kind._pack_latents(picture, 1, 4, 6, 10)[0]
    grid = Grid(0, 3, 5, 2)
    assert torch.equal(grid.unpack(tokens), picture[0])
    assert torch.equal(grid.pack(picture[0], tokens), tokens)


def test_clips_are_packed_as_the_pipeline_does():
    clip = torch.randn(1, 4, 3, 6, 10)
    tokens = diffusers.LTXPipeline._pack_latents(clip)[0]
    assert torch.equal(Grid(3, 6, 10).unpack(tokens), clip[0])


SIZES = {
    "flux_cfg": ((4, 16, 16), 64),
    "flux_kontext": ((4, 16, 16), 64),  # and as many tokens of the reference
    "qwenimage": ((4, 16, 16), 64),
    "chroma": ((4, 16, 16), 64),
    "ltx": ((8, 3, 8, 8), 192),
    "wan21": ((4, 3, 16, 16), 0),
    "cogvideox": ((3, 4, 16, 16), 0),
    "sd15": ((4, 16, 16), 0),
    "zimage": ((4, 1, 16, 16), 0),  # a list of rows
    "hunyuanimage": ((8, 16, 16), 0),  # a guider
}


@pytest.mark.parametrize("name", SIZES)
def test_the_picture_of_each_layout_is_found(bench, name):
    seen = []

    class Looking(guidance.CFGCache):
        name = "guidance.Looking"

        def attach(self, site):
            def look(call, inner):
                result = inner(call)
                grid = grid_of(call)
                seen.append((tuple(grid.unpack(result.value[0]).shape), grid.tokens))
                return result

            for denoiser in site.denoisers:
                yield site.around(denoiser, look)

    run = Plan(Looking()).attach(bench.pipe(name))
    bench.call(name, steps=2)
    run.detach()
    assert set(seen) == {SIZES[name]}


def test_unknown_tokens_are_refused():
    call = SimpleNamespace(
        denoiser=SimpleNamespace(core=SimpleNamespace()),
        arguments={},
        sample=torch.zeros(1, 64, 16),
    )
    with pytest.raises(errors.UnsupportedModel, match="order in the picture is not known"):
        grid_of(call)


# In a run.


@pytest.mark.parametrize(
    ("name", "interval", "share"),
    [
        *(
            (name, *fields)
            for name in ("sd15", "flux_cfg", "wan21")
            for fields in ((2, 1.0), (3, 1.0), (5, 0.5), (8, 0.3))
        ),
        ("zimage", 3, 1.0),
        ("hunyuanimage", 3, 1.0),
    ],
)
def test_it_evaluates_every_so_many_steps_below_a_timestep(bench, name, interval, share):
    start = 1000 * share + 1
    timesteps = []

    class Watching(guidance.CFGCache):
        name = "guidance.Watching"

        def attach(self, site):
            yield from super().attach(site)
            yield site.on_step(lambda step, _: timesteps.append(step.timestep))

    method = Watching(interval=interval, start=start)
    run = Plan(method).attach(bench.pipe(name))
    bench.call(name, steps=11)
    run.detach()
    full = {i for i, t in enumerate(timesteps) if t >= start or i % interval == 0} | {0}
    assert computed_steps(run, method)["uncond", 0] == full
    assert run.report.nfe == len(timesteps) + len(full)


def test_interval_1_is_off(bench, same):
    with Plan(guidance.CFGCache(interval=1)).attach(bench.pipe("sd15")) as run:
        assert same(bench.call("sd15"), bench.stock("sd15"))
    assert run.report.verdicts["guidance.CFGCache"].detail == "off: interval is 1"


def test_an_estimate_is_what_the_pipeline_gets(bench):
    """Along the latents of a stock run: û at step 1 from the answers at steps 0 and 1."""
    forced = Forced("sd15", bench.pipe("sd15"))
    method = guidance.CFGCache(interval=2, start=5000.0, low=1.0, high=1.0)
    answers, _ = forced.run(Plan(method))
    expected = answers["cond", 1] + answers["uncond", 0] - answers["cond", 0]
    assert torch.allclose(answers["uncond", 1], expected, atol=1e-5)


def test_steps_of_a_cache_leave_the_difference_as_it_is(bench, monkeypatch):
    method = guidance.CFGCache(interval=2, start=5000.0)
    plan = Plan(method, cache.EasyCache(threshold=1e6, warmup=3, last=False))
    kept_at = []
    inner = Deltas.keep

    def keep(self, call, pairs):
        if pairs:
            kept_at.append(call.step.index)
        inner(self, call, pairs)

    monkeypatch.setattr(Deltas, "keep", keep)
    run = plan.attach(bench.pipe("flux_cfg"))
    bench.call("flux_cfg", steps=8)
    run.detach()
    assert kept_at == [0, 2]  # steps 3 on are the cache's


def test_what_is_kept_is_counted(bench):
    method = guidance.CFGCache(interval=2, start=5000.0)
    with Plan(method).attach(bench.pipe("sd15")) as run:
        bench.call("sd15", steps=4, batch=2)
    latents = 2 * 4 * 16 * 16 * 4  # samples, channels, sides, bytes
    assert run.report.to_dict()["cached_bytes"]["guidance.CFGCache"] == 2 * latents


@pytest.mark.parametrize(
    "other",
    [
        guidance.Adaptive(),
        guidance.Interval(),
        guidance.Residual(),
        guidance.LinearAG(coefficients=((-1.0, 1.0, 1.0),)),
    ],
)
def test_one_method_answers_for_the_branch(bench, other):
    with pytest.raises(errors.Conflict, match="branches: "):
        Plan(guidance.CFGCache(), other).attach(bench.pipe("sd15"))
