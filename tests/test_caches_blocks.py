"""Caches of ranges of blocks: closed forms, references made by hand, and what stays live."""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.hunyuan_transformer_2d import HunyuanDiTBlock
from hypothesis import given
from hypothesis import strategies as st
from test_caches import At, Through, Wiretap, injections, stream
from test_laws_counts import computed_steps, counting
from tiny import PIPELINES, videos

from accel import Plan, cache, errors, hooks
from accel.cache import decisions, indicators
from accel.cache.indicators import Magnitudes, SignalChange, polynomial
from accel.cache.magnitude import Magnitude, resampled
from accel.cache.policies import Accumulated, Below, Either, Guarded, Listed
from accel.cache.rescaling import POLYNOMIALS
from accel.seams import modulation
from accel.seams.blocks import Block, find_blocks
from accel.seams.denoisers import find_denoisers

SKIPPING = {
    "DBCache": cache.DBCache(threshold=1e9, front=1, back=1, warmup=1, last=False),
    "TeaCache": cache.TeaCache(threshold=1e9, max_skips=0, last=False),
    "MagCache": cache.MagCache(threshold=1e9, share=0.0, max_skips=0, curve=(1.0,), last=False),
    "DeltaDiT rear": cache.DeltaDiT(interval=99, boundary=1.0),
    "DeltaDiT front": cache.DeltaDiT(interval=99, boundary=0.0),
    "DeltaDiT all": cache.DeltaDiT(interval=99, share=1.0),
}
"""Each computes step 0 and skips what it can of the others."""

IDLE = (
    cache.DBCache(threshold=1e-12, front=1, back=1, warmup=1),
    cache.DBCache(threshold=1e-12, front=1, warmup=1, predictor="newton", order=3),
    cache.TeaCache(threshold=1e-12, predictor="taylor"),
    cache.MagCache(threshold=1e-12, share=0.0),
    cache.MagCache(threshold=1e-12, share=0.0, curve=(0.5,)),
    cache.DeltaDiT(interval=2, warmup=99),
)
"""Each has all its machinery in place and skips nothing."""


def computed(policy, total, value=None):
    return [i for i in range(total) if policy.compute(At(i, total), value)]


def forms(**chosen):
    return pytest.mark.parametrize("method", chosen.values(), ids=list(chosen))


# MagCache.


SKIPS = {6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22, 24, 25, 27}
"""Of γ ≡ 0.98, threshold 0.06, K 3, share 0.2, 28 steps."""


@pytest.mark.parametrize("last", [True, False])
def test_magcache_closed_form(last):
    for curve, value in (((0.98,), None), ((), 0.98)):
        policy = Guarded(Magnitude(0.06, 0.2, curve), warmup=1, max_skips=3, last=last)
        expected = set(range(28)) - (SKIPS - {27} if last else SKIPS)
        assert set(computed(policy, 28, value)) == expected


def test_k_caps_the_skips_of_an_even_curve():
    policy = Guarded(Magnitude(0.06, 0.0, (1.0,)), warmup=1, max_skips=3, last=False)
    assert computed(policy, 12) == [0, 4, 8]


def test_magcache_in_a_run(bench, monkeypatch):
    """With a curve the closed form holds for every branch and sample, and nothing is read."""
    read, original = [], decisions._read
    monkeypatch.setattr(decisions, "_read", lambda values: read.append(values) or original(values))
    method = cache.MagCache(threshold=0.06, share=0.2, max_skips=3, curve=(0.98,) * 28)
    with Plan(method).attach(bench.pipe("flux_cfg")) as run:
        bench.call("flux_cfg", steps=28, batch=2)
    steps = computed_steps(run, method)
    assert set(steps) == {(branch, sample) for branch in ("cond", "uncond") for sample in (0, 1)}
    assert all(found == set(range(28)) - (SKIPS - {27}) for found in steps.values())
    assert all(value is None for values in read for value in values.values())


def test_a_curve_is_resampled_to_the_run():
    curve = [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [resampled(curve, i, 5) for i in range(5)] == curve
    assert [resampled(curve, i, 3) for i in range(3)] == [0.0, 2.0, 4.0]
    assert [resampled(curve, i, 9) for i in (0, 3, 8)] == [0.0, 2.0, 4.0]
    assert resampled(curve, 0, 1) == 0.0


@given(st.floats(0.5, 1.5), st.integers(1, 7), st.integers(1, 4))
def test_gamma_is_found_from_any_two_computes(gamma, gap, first):
    magnitudes, residual = Magnitudes(), torch.randn(6, 8)
    magnitudes.added(first, [residual * gamma**first])
    assert magnitudes.measure(residual) is None
    magnitudes.added(first + gap, [residual * gamma ** (first + gap)])
    assert magnitudes.measure(residual).item() == pytest.approx(gamma, rel=1e-3)


def test_the_run_measures_gamma_as_a_calibration_would(bench, monkeypatch):
    """The first decision after two computes rests on the mean ratio of the tokens' norms."""
    name, seen, inner = "pixart_sigma", [], Guarded.compute
    monkeypatch.setattr(
        Guarded,
        "compute",
        lambda policy, step, value: seen.append(value) or inner(policy, step, value),
    )
    pipe = bench.pipe(name)
    with Wiretap(pipe) as tap:
        run = Plan(cache.MagCache(threshold=1e9, share=0.0, warmup=2)).attach(pipe)
        bench.call(name, steps=4)
        run.detach()
    order = PIPELINES[name].order
    sizes = [(call[2][1] - call[0][0])[order.index("cond")].norm(dim=-1) for call in tap.calls[:2]]
    assert seen[:2] == [None, None]
    assert seen[2] == pytest.approx((sizes[1] / sizes[0]).mean().item(), rel=1e-4)


def test_magcache_measures_each_sample(bench, gauged):
    """A sample's γ does not depend on its company, and samples differ."""
    plan = Plan(cache.MagCache(threshold=1e-12, share=0.0))
    for name in ("sd3", "flux_cfg", "zimage"):
        run = plan.attach(bench.pipe(name))
        gauged.clear()
        bench.call(name, steps=5, batch=2)
        together = list(gauged)
        gauged.clear()
        bench.call(name, steps=5)
        run.detach()
        assert len(together) == 2 * len(gauged) > 0
        assert together[::2] == pytest.approx(gauged, rel=1e-3)
        assert together[0] != together[1]


# TeaCache.


@given(st.integers(1, 60), st.floats(0.3, 7.7))
def test_teacache_computes_when_the_sum_is_full(total, share):
    """Identity and a constant change ρ: every ⌈δ/ρ⌉-th step."""
    rho = 0.1
    interval = math.ceil(share)
    if abs(share - round(share)) < 1e-3:
        return
    policy = Guarded(Accumulated(share * rho), warmup=1, max_skips=0, last=False)
    found = [i for i in range(total) if policy.compute(At(i, total), rho if i else None)]
    assert found == list(range(0, total, interval))


@pytest.mark.parametrize(("threshold", "interval"), [(0.25, 3), (0.35, 4), (0.05, 1)])
def test_teacache_in_a_run_of_constant_change(bench, monkeypatch, threshold, interval):
    monkeypatch.setattr(indicators, "relative_l1", lambda new, old: torch.tensor(0.1))
    method = cache.TeaCache(threshold=threshold, max_skips=0, last=False)
    run = Plan(method).attach(bench.pipe("flux_cfg"))
    bench.call("flux_cfg", steps=12, batch=2)
    run.detach()
    assert all(
        steps == set(range(0, 12, interval)) for steps in computed_steps(run, method).values()
    )


def test_the_signal_is_followed_over_skipped_steps():
    change = SignalChange()
    assert change.measure(torch.tensor([1.0, 1.0])) is None
    assert change.measure(torch.tensor([2.0, 2.0])).item() == pytest.approx(1.0)
    assert change.measure(torch.tensor([3.0, 3.0])).item() == pytest.approx(0.5)
    assert change.measure(torch.tensor([1.0])) is None, "another size: nothing is known"


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("flux", 0.0, 0.264),
        ("flux", 0.1, 0.207),
        ("flux", 0.3, 0.522),
        ("wan2.1-14b", 0.0, -13.0),
        ("wan2.1-14b", 0.1, -0.64),
        ("cogvideox-5b", 0.4, -3.8),
        ("identity", 0.3, 0.3),
    ],
)
def test_polynomials(name, at, value):
    found = polynomial(POLYNOMIALS[name], torch.tensor(at, dtype=torch.float64)).item()
    assert found == pytest.approx(value, rel=0.02)


def test_an_estimate_below_zero_counts_as_zero_unless_told():
    signals = [torch.full((4,), 1.0), torch.full((4,), 1.1)]
    for clamp, expected in ((True, 0.0), (False, -0.64)):
        change = SignalChange(POLYNOMIALS["wan2.1-14b"], clamp=clamp)
        change.measure(signals[0])
        assert change.measure(signals[1]).item() == pytest.approx(expected, rel=0.05)


def test_a_fit_that_is_wild_does_not_lock_in(bench):
    """Wan 14B's polynomial far from where it was fitted: the cap computes."""
    for clamp in (True, False):
        method = cache.TeaCache(
            threshold=0.2, coefficients=(0.0, 0.0, 0.0, 0.0, -13.0), clamp_nonneg=clamp, last=False
        )
        run = Plan(method).attach(bench.pipe("flux"))
        bench.call("flux", steps=14)
        run.detach()
        assert computed_steps(run, method)["cond", 0] == {0, 6, 12}


@pytest.mark.parametrize("value", ["fluks", (1.0, 2.0), [1, 2, 3, 4, 5, 6], 3])
def test_coefficients_that_are_none(value):
    with pytest.raises(errors.PlanError, match=r"coefficients.*five numbers, or one of identity"):
        Plan.from_dict({"cache": {"TeaCache": {"coefficients": value}}})


def test_coefficients_round_trip():
    for chosen in ("flux", (1.0, 2.0, 3.0, 4.0, 5.0)):
        plan = Plan(cache.TeaCache(coefficients=chosen))
        assert Plan.from_toml(plan.to_toml()) == plan
        assert plan.methods[0].polynomial[0] in (498.651651, 1.0)


INPUT = ("sd3", "sd35_skip_layer", "flux_cfg", "chroma", "hunyuanimage", "lumina2", "cogview4")
INPUT += ("dit", "cogvideox", "hunyuanvideo", "mochi")
MODULATED = ("qwenimage", "pixart_sigma", "sana", "zimage", "wan21", "wan22", "ltx")


@pytest.mark.parametrize("name", INPUT)
def test_the_signal_is_what_the_blocks_own_norm_gives(bench, same, name):
    """Ours and the block's call of ``norm1`` give the same: at each computed step it runs twice."""
    pipe = bench.pipe(name)
    norm = find_blocks(find_denoisers(pipe)[0])[0].module.norm1
    outputs = []
    handle = norm.register_forward_hook(
        lambda module, args, returned: outputs.append(
            (returned if torch.is_tensor(returned) else returned[0]).clone()
        )
    )
    run = Plan(cache.TeaCache(threshold=1e-12)).attach(pipe)
    output = bench.call(name, steps=2, guidance=False)
    run.detach()
    handle.remove()
    pairs = list(zip(outputs[::2], outputs[1::2], strict=True))
    assert len(pairs) == 2
    assert all(same(ours, theirs) for ours, theirs in pairs)
    assert same(output, bench.stock(name, steps=2, guidance=False))


def attention_of(block):
    """The first attention of a block."""
    names = ("attn1", "attn", "attention")
    return next(getattr(block, name) for name in names if hasattr(block, name))


@pytest.mark.parametrize("name", MODULATED)
def test_the_signal_is_what_the_first_attention_is_given(bench, same, monkeypatch, name):
    """Blocks that scale and shift what a plain norm gives, by a table or a projection."""
    pipe, given, signals = bench.pipe(name), [], []
    handles = [
        attention_of(find_blocks(denoiser)[0].module).register_forward_pre_hook(
            lambda _, args, named: given.append((args or (named["hidden_states"],))[0].clone()),
            with_kwargs=True,
        )
        for denoiser in find_denoisers(pipe)
    ]
    inner = modulation.Modulated.signal

    def noted(modulated, block, arguments):
        signals.append(inner(modulated, block, arguments))
        return signals[-1]

    monkeypatch.setattr(modulation.Modulated, "signal", noted)
    run = Plan(cache.TeaCache(threshold=1e-12)).attach(pipe)
    output = bench.call(name, steps=2, guidance=False)
    run.detach()
    for handle in handles:
        handle.remove()
    assert signals
    assert all(same(ours, theirs) for ours, theirs in zip(signals, given, strict=True))
    assert same(output, bench.stock(name, steps=2, guidance=False))


WIDTH = 4


class Plain(torch.nn.Module):
    """A norm and a table, and a time of each form that blocks are given it in."""

    def __init__(self, vectors):
        super().__init__()
        self.norm1 = torch.nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.scale_shift_table = torch.nn.Parameter(torch.randn(vectors, WIDTH))


class ShiftFirst(Plain):
    def forward(self, hidden_states, temb):
        shift, scale, gate = self.scale_shift_table[None].unbind(1)
        return self.norm1(hidden_states) * (1 + scale) + shift, gate


class ScaleFirst(Plain):
    def forward(self, hidden_states, temb):
        prescale, preshift, _ = self.scale_shift_table[None].unbind(1)
        return self.norm1(hidden_states) * (1 + prescale) + preshift


class ScaleAlone(Plain):
    def forward(self, hidden_states, temb):
        scale_msa, gate_msa, _ = self.scale_shift_table[None].unbind(1)
        return self.norm1(hidden_states) * (1 + scale_msa), gate_msa


class Unnamed(Plain):
    def forward(self, hidden_states, temb):
        a, b, _ = self.scale_shift_table[None].unbind(1)
        return self.norm1(hidden_states) * (1 + a) + b


TIMES = {
    "flat": lambda time: time.flatten(1),
    "one row": lambda time: time[:1].flatten(1),
    "vectors": lambda time: time,
    "tokens": lambda time: time[:, None].expand(-1, 6, -1, -1).flatten(2),
    "tokens apart": lambda time: time[:, None].expand(-1, 6, -1, -1),
    "frames": lambda time: time[:, None].expand(-1, 2, -1, -1),
    "vectors, then frames": lambda time: time[:, :, None].expand(-1, -1, 2, -1),
}


@forms(**{key.replace(" ", "_").replace(",", ""): make for key, make in TIMES.items()})
@pytest.mark.parametrize(
    ("kind", "scale", "shift"), [(ShiftFirst, 1, 0), (ScaleFirst, 0, 1), (ScaleAlone, 0, None)]
)
def test_the_modulation_by_hand(method, kind, scale, shift):
    """norm(x)·(1 + scale) + shift, with the vectors that the block's own names tell."""
    block = Block(0, kind(3))
    hidden, time = torch.randn(2, 6, WIDTH), torch.randn(1, 3, WIDTH).expand(2, -1, -1)
    found = modulation.input_signal(block)(block, {"hidden_states": hidden, "temb": method(time)})
    table = block.module.scale_shift_table
    expected = block.module.norm1(hidden) * (1 + table[scale] + time[:, None, scale])
    if shift is not None:
        expected = expected + table[shift] + time[:, None, shift]
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_table_that_waits_elsewhere_is_brought():
    block = Block(0, ShiftFirst(3))
    given = {"hidden_states": torch.ones(2, 6, WIDTH), "temb": torch.ones(2, 3 * WIDTH)}
    there = {name: value.to("meta") for name, value in given.items()}
    assert modulation.input_signal(block)(block, there).device.type == "meta"
    assert block.module.scale_shift_table.device.type == "cpu"


def test_names_that_do_not_tell_leave_the_time(bench, gauged, monkeypatch):
    """It does not depend on the sample: all of a batch decide alike."""
    block, time = Block(0, Unnamed(3)), torch.randn(2, 3 * WIDTH)
    given = {"hidden_states": torch.randn(2, 6, WIDTH), "temb": time}
    assert modulation.input_signal(block)(block, given) is time
    monkeypatch.setattr(modulation, "_places", lambda kind: None)
    run = Plan(cache.TeaCache(threshold=1e-12)).attach(bench.pipe("pixart_sigma"))
    gauged.clear()
    bench.call("pixart_sigma", steps=4, batch=2)
    run.detach()
    assert len(gauged) == 6
    assert gauged[::2] == pytest.approx(gauged[1::2], rel=1e-5)
    assert min(gauged) > 0


def test_named_polynomials_of_the_time_measure_the_time(bench, gauged):
    """CogVideoX has an adaptive norm, and coefficients for its time embedding."""
    pipe = bench.pipe("cogvideox")
    block = find_blocks(find_denoisers(pipe)[0])[0]
    times = []
    handle = block.module.register_forward_pre_hook(
        lambda module, args, kwargs: times.append(kwargs["temb"][-1].clone()), with_kwargs=True
    )
    run = Plan(
        cache.TeaCache(threshold=1e-12, coefficients="cogvideox-2b", clamp_nonneg=False)
    ).attach(pipe)
    gauged.clear()
    bench.call("cogvideox", steps=4)
    run.detach()
    handle.remove()
    changes = [indicators.relative_l1(new, old) for old, new in pairwise(times)]
    expected = [polynomial(POLYNOMIALS["cogvideox-2b"], change).item() for change in changes]
    assert gauged == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["sd3", "flux_cfg", "cogview4", *MODULATED])
def test_teacache_decides_for_each_sample(bench, gauged, name):
    """Where the input is in the signal, samples decide apart, each as if alone."""
    pipe = bench.pipe(name)
    run = Plan(cache.TeaCache(threshold=1e-12)).attach(pipe)
    gauged.clear()
    bench.call(name, steps=5, batch=2)
    run.detach()
    first, second = gauged[:2]
    assert abs(first - second) > 1e-4 * first
    method = cache.TeaCache(threshold=(first + second) / 2, last=False)
    run = Plan(method).attach(pipe)
    together = bench.call(name, steps=5, batch=2)
    steps = computed_steps(run, method)
    alone = bench.call(name, steps=5)
    mine = computed_steps(run, method)
    run.detach()
    assert steps["cond", 0] != steps["cond", 1]
    assert mine["cond", 0] == steps["cond", 0]
    assert torch.allclose(together[0], alone[0], atol=1e-3)


def test_an_offloaded_norm_is_brought_to_its_input():
    """A block's weights are elsewhere until it runs; its norm is called before."""
    norm = torch.nn.Linear(4, 4)
    here, there = (torch.ones(2, 4, device=device) for device in ("cpu", "meta"))
    assert modulation._run(norm, (here,), {}, here.device).shape == (2, 4)
    there = modulation._run(norm, (), {"input": there}, there.device)
    assert there.device.type == "meta"
    assert norm.weight.device.type == "cpu"


# What indicators keep is counted.


@pytest.mark.parametrize("name", ["pixart_sigma", "sana", "dit", "wan21"])
def test_the_memory_of_a_cache_in_closed_form(bench, name):
    """By row what fills in; by sample, of its leading row, what the indicator compares with."""
    pipe, batch, seen = bench.pipe(name), 2, {}
    denoiser = find_denoisers(pipe)[0]
    block = find_blocks(denoiser)[0]

    def note(inner, *args, **kwargs):
        hidden = block.inputs(block.bind(args, kwargs))["hidden"]
        seen["stream"], seen["tokens"] = hidden[0].nbytes, hidden.shape[1]
        return inner(*args, **kwargs)

    def note_call(inner, *args, **kwargs):
        returned = inner(*args, **kwargs)
        seen["x"] = (args or (kwargs["hidden_states"],))[0][0].nbytes
        seen["v"] = returned[0][0].nbytes
        return returned

    undos = [block.wrap(note), hooks.wrap(denoiser.module, "forward", note_call)]
    bench.call(name, steps=1, batch=batch)
    for undo in undos:
        undo()
    rows = batch * len(PIPELINES[name].order)
    stream, scalar = seen["stream"], 4
    closed = {
        cache.EasyCache(threshold=1e-12, predictor="reuse"): rows * seen["v"]
        + batch * (2 * seen["x"] + min(seen["x"], seen["v"]) + scalar),
        cache.FirstBlock(threshold=1e-12): (rows + batch) * stream,
        cache.DBCache(threshold=1e-12, front=1, warmup=1): (rows + batch) * stream,
        cache.TeaCache(threshold=1e-12): (rows + batch) * stream,
        cache.MagCache(threshold=1e-12, share=0.0): rows * stream
        + batch * (4 * seen["tokens"] + scalar),
        cache.MagCache(threshold=1e-12, share=0.0, curve=(0.5,)): rows * stream,
    }
    for method, expected in closed.items():
        run = Plan(method).attach(pipe)
        bench.call(name, steps=4, batch=batch)
        said = run.report.to_dict()["cached_bytes"][method.name]
        run.detach()
        assert said == expected, method


# DBCache.


@pytest.mark.parametrize("predictor", ["reuse", "newton", "taylor"])
@pytest.mark.parametrize("name", ["sd3", "flux_cfg", "flux_controlnet", "pixart_sigma", "wan22"])
def test_one_block_in_front_is_first_block(bench, same, name, predictor):
    outputs, events = [], []
    for kind, more in ((cache.FirstBlock, {}), (cache.DBCache, {"front": 1, "back": 0})):
        method = kind(threshold=0.3, warmup=2, predictor=predictor, max_skips=2, **more)
        run = Plan(method).attach(bench.pipe(name))
        outputs.append(bench.call(name, steps=8, batch=2))
        run.detach()
        events.append(run.report.to_dict()["events"][method.name])
    assert same(*outputs)
    assert events[0] == events[1]
    assert {state for *_, state in events[0]} > {"computed"}


@pytest.mark.parametrize(("front", "back"), [(8, 0), (2, 2), (1, 3), (4, 0)])
@pytest.mark.parametrize("name", ["flux_cfg", "wan21", "sd35_skip_layer"])
def test_no_block_in_the_middle_is_stock(bench, same, name, front, back):
    method = cache.DBCache(threshold=1e9, front=front, back=back, warmup=1)
    with (
        pytest.warns(errors.AccelWarning, match="no block is left to skip"),
        Plan(method).attach(bench.pipe(name)) as run,
    ):
        output = bench.call(name, steps=4)
    assert same(output, bench.stock(name, steps=4))
    assert run.report.verdicts["cache.DBCache"].state == "INACTIVE"


def test_front_and_back_always_run(bench):
    method = cache.DBCache(threshold=1e9, front=2, back=1, warmup=1, last=False)
    pipe = bench.pipe("flux")
    with counting(pipe) as counts, Plan(method).attach(pipe):
        bench.call("flux", steps=7)
    ran = [counts[f"block {index}"] for index in range(4)]
    assert ran == [7, 7, 1, 7]


def test_listed_steps_and_a_budget(bench):
    for more, expected in (
        ({"steps": (2, 5)}, {0, 2, 5}),
        ({"budget": 3}, {0, 4, 5, 6, 7}),
        ({"steps": (1,), "max_skips": 2}, {0, 1, 4, 7}),
        ({"steps": (99,), "last": True}, {0, 7}),
    ):
        method = cache.DBCache(threshold=1e9, front=1, warmup=1, **{"last": False} | more)
        run = Plan(method).attach(bench.pipe("flux"))
        bench.call("flux", steps=8)
        run.detach()
        assert computed_steps(run, method)["cond", 0] == expected


def test_either_rule_is_asked_and_told():
    first, second = Accumulated(0.5), Listed((2,))
    policy = Guarded(Either((first, second)), warmup=0, max_skips=0, last=False)
    assert [i for i in range(7) if policy.compute(At(i), 0.2)] == [2, 5]
    assert Either((Below(1.0), Listed((3,)))).due(At(3), 0.5)


# Δ-DiT.


@pytest.mark.parametrize("boundary", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("interval", "share"), [(2, 0.5), (3, 0.67), (4, 1.0), (2, 0.25)])
def test_delta_dit_runs_the_other_blocks(bench, interval, share, boundary):
    """Σ (L or L − Nc) block calls: which of them, by the place in the run."""
    total, length = 10, max(1, round(share * 4))
    method = cache.DeltaDiT(interval=interval, share=share, boundary=boundary)
    pipe = bench.pipe("flux")
    with counting(pipe) as counts, Plan(method).attach(pipe):
        bench.call("flux", steps=total)
    expected = Counter()
    for step in range(total):
        skipped = range(0)
        if step % interval:
            rear = step < boundary * total
            skipped = range(4 - length, 4) if rear else range(length)
        expected.update(index for index in range(4) if index not in skipped)
    assert [counts[f"block {index}"] for index in range(4)] == [expected[i] for i in range(4)]
    computes = len(range(0, total, interval))
    assert sum(expected.values()) == computes * 4 + (total - computes) * (4 - length)


@forms(**SKIPPING)
@pytest.mark.parametrize("name", ["pixart_sigma", "sana", "wan21", "flux"])
def test_exact_where_the_blocks_add_a_constant(bench, monkeypatch, name, method):
    """A network whose blocks are h ↦ h + c is served without error, at any interval."""
    pipe = bench.pipe(name)
    if name == "wan21":  # UniPC would correct the computed steps alone, whatever the cache gives
        monkeypatch.setattr(pipe, "scheduler", FlowMatchEulerDiscreteScheduler(shift=3.0))
    blocks = find_blocks(find_denoisers(pipe)[0])
    undos = []
    for block in blocks:

        def adds(inner, *args, block=block, **kwargs):
            block.outputs(inner(*args, **kwargs))  # in which form it returns
            streams = block.inputs(block.bind(args, kwargs))
            shift = {"hidden": 0.1 * (block.index + 1), "encoder": 0.05}
            return block.returns({key: value + shift[key] for key, value in streams.items()})

        undos.append(block.wrap(adds))
    try:
        stock = bench.call(name, steps=6)
        run = Plan(method).attach(pipe)
        output = bench.call(name, steps=6)
        run.detach()
    finally:
        for undo in reversed(undos):
            undo()
    assert torch.allclose(output, stock, atol=1e-4)
    assert run.report.verdicts[method.name].state == "ACTIVE"


def test_long_skips_are_refused(bench, monkeypatch):
    block = HunyuanDiTBlock(16, 2, skip=True)
    assert Block(0, block).long_skip
    monkeypatch.setattr(Block, "long_skip", True)
    for method in (cache.DeltaDiT(), cache.DBCache(back=1)):
        with pytest.raises(errors.UnsupportedModel, match=f"{method.name}.*FirstBlock"):
            Plan(method).attach(bench.pipe("flux"))
    Plan(cache.DBCache(back=0)).attach(bench.pipe("flux")).detach()


# What is injected between blocks.


class Calls(Wiretap):
    """A wiretap for calls of a network in which the first block may be left out."""

    def __init__(self, pipe):
        super().__init__(pipe)
        self._network = find_denoisers(pipe)[0].module

    def __enter__(self):
        begin = lambda *_: self.calls.append({})  # noqa: E731
        self._handle = self._network.register_forward_pre_hook(begin)
        return super().__enter__()

    def _tap(self, block, inner):
        def forward(*args, **kwargs):
            returned = inner(*args, **kwargs)
            before, after = stream(block, args, kwargs, returned)
            self.calls[-1][block.index] = (before.clone(), after.clone())
            return returned

        forward.__wrapped__ = inner
        return forward

    def __exit__(self, *_):
        super().__exit__()
        self._handle.remove()


class Inside:
    """What comes to the first block, as the network sees it: above everything of ours."""

    def __init__(self, pipe):
        self.first = find_blocks(find_denoisers(pipe)[0])[0]
        self.inputs = []

    def __enter__(self):
        self._handle = self.first.module.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def _note(self, module, args, kwargs):
        bound = self.first.bind(args, kwargs)
        self.inputs.append(self.first.inputs(bound)["hidden"].clone())

    def __exit__(self, *_):
        self._handle.remove()


def check_once(pipe, call, method, injected, steps=4):
    """Skipped out = in + Σ live gains + Σ kept gains + Σ live injections, in any order."""
    controls = []

    def note(inner, *args, **kwargs):
        returned = inner(*args, **kwargs)
        controls.append(injected(kwargs))
        return returned

    with Calls(pipe) as taps, Inside(pipe) as inside, Through(pipe) as through:
        run = Plan(method).attach(pipe)
        undo = hooks.wrap(pipe.transformer, "forward", note)
        call(steps)
        undo()
        run.detach()
    calls = len(controls) // steps
    assert len(taps.calls) == len(inside.inputs) == len(controls)
    for index in range(calls, len(controls)):
        whole, ran = taps.calls[index % calls], taps.calls[index]
        assert set(ran) < set(whole)
        gains = sum(
            ran[block][1] - ran[block][0] if block in ran else after - before
            for block, (before, after) in whole.items()
        )
        live = sum(controls[index])
        assert live.abs().max() > 1e-2
        expected = inside.inputs[index] + gains + live
        assert torch.allclose(through.outputs[index][1], expected, atol=1e-3)


@forms(**SKIPPING)
@pytest.mark.parametrize("name", ["sd3_controlnet", "flux_controlnet"])
def test_control_acts_once_on_skipped_steps(bench, name, method):
    pipe = bench.pipe(name)
    check_once(
        pipe,
        lambda steps: bench.call(name, steps=steps),
        method,
        lambda arguments: injections(pipe.transformer, arguments),
    )


@pytest.fixture(scope="module")
def wan_vace():
    return videos.VACE.build()


@forms(**SKIPPING, FirstBlock=cache.FirstBlock(threshold=1e9, warmup=1, last=False))
def test_vace_acts_once_on_skipped_steps(wan_vace, method):
    pipe, hints = wan_vace, []
    handles = [
        block.register_forward_hook(lambda module, args, returned: hints.append(returned[0]))
        for block in pipe.transformer.vace_blocks
    ]

    def injected(arguments):
        found, hints[:] = list(hints), []
        scales = arguments["control_hidden_states_scale"].tolist()
        return [hint * scale for hint, scale in zip(found, scales, strict=True)]

    check_once(pipe, lambda steps: videos.VACE.call(pipe, steps=steps), method, injected)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["flux_controlnet", "sd3_controlnet", "sd35_skip_layer", "wan21"])
def test_what_skips_nothing_is_the_stock_pipeline(bench, same, name):
    """The machinery itself changes no bit."""
    for method in IDLE:
        run = Plan(method).attach(bench.pipe(name))
        output = bench.call(name, steps=4)
        run.detach()
        assert same(output, bench.stock(name, steps=4)), method


@pytest.mark.parametrize("method", IDLE, ids=repr)
def test_vace_is_stock_where_nothing_is_skipped(wan_vace, same, method):
    """And the control is not forgotten; off forms and other caches: test_caches_runs.py."""
    stock = torch.as_tensor(videos.VACE.call(wan_vace))
    run = Plan(method).attach(wan_vace)
    assert same(torch.as_tensor(videos.VACE.call(wan_vace)), stock)
    run.detach()
    without = videos.VACE.call(wan_vace, conditioning_scale=0.0)
    assert not same(torch.as_tensor(without), stock)


@forms(**SKIPPING, FirstBlock=cache.FirstBlock(threshold=1e9, warmup=1))
def test_vace_is_another_where_something_is_skipped(wan_vace, same, method):
    stock = torch.as_tensor(videos.VACE.call(wan_vace))
    with Plan(method).attach(wan_vace):
        assert not same(torch.as_tensor(videos.VACE.call(wan_vace)), stock)
    assert same(torch.as_tensor(videos.VACE.call(wan_vace)), stock)


@forms(**SKIPPING)
def test_skip_layer_guidance_has_a_state_of_its_own(bench, method):
    """The branch that leaves layers out is computed before it is skipped; cond is not its state."""
    with Plan(method).attach(bench.pipe("sd35_skip_layer")) as run:
        output = bench.call("sd35_skip_layer", steps=6)
    assert torch.isfinite(output).all()
    events = run.report.to_dict()["events"][method.name]
    states = [state for _, branch, _, state in events if branch == "skip_layers"]
    assert states[:1] in ([], ["computed"])  # DBCache: its layers are all that it could skip


@forms(**SKIPPING)
def test_nan_is_computed_not_reused(bench, method):
    """Where a signal is measured: a network that gives NaN is asked again at every step."""
    if method.name not in ("cache.DBCache", "cache.TeaCache"):
        pytest.skip("its rule measures nothing")
    pipe = bench.pipe("flux_cfg")
    weight = pipe.transformer.x_embedder.weight
    kept = weight.data.clone()
    weight.data.fill_(math.nan)
    run = Plan(method).attach(pipe)
    bench.call("flux_cfg", steps=6)
    run.detach()
    weight.data.copy_(kept)
    assert {state for *_, state in run.report.to_dict()["events"][method.name]} == {"computed"}


@pytest.mark.parametrize("method", [m for m in IDLE if m.name != "cache.DBCache"], ids=repr)
def test_a_run_without_a_skip_says_why(bench, method):
    with (
        pytest.warns(errors.AccelWarning, match=f"{method.name} did nothing: .+"),
        Plan(method).attach(bench.pipe("flux")) as run,
    ):
        bench.call("flux", steps=4)
    detail = run.report.verdicts[method.name].detail
    assert any(word in detail for word in ("threshold", "warm-up"))
