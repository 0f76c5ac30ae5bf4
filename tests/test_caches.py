"""Caches: the answers they give where nothing is computed, and what must stay live."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from roster import CI, pipelines
from tiny import PIPELINES

from accel import Plan, cache, errors, hooks
from accel.cache.decisions import Decisions
from accel.cache.indicators import InputChange, ProbeChange, relative_l1
from accel.cache.policies import Accumulated, Below, Every, Guarded, Listed, Within
from accel.seams.blocks import find_blocks
from accel.seams.denoisers import find_denoisers


class At:
    """A step, to a policy."""

    def __init__(self, index, total=100):
        self.index, self.total, self.last = index, total, index == total - 1
        self.turn, self.turns, self.closing = index, total, self.last
        self.timestep = 999 - 20 * index


# Policies: closed forms.


def test_accumulated_computes_when_the_sum_reaches_the_threshold():
    policy = Guarded(Accumulated(1.0), warmup=0, max_skips=0, last=False)
    computed = [i for i in range(12) if policy.compute(At(i), 0.3)]
    assert computed == [3, 7, 11]


def test_below_does_not_accumulate():
    policy = Guarded(Below(0.5), warmup=2, max_skips=3, last=True)
    computed = [i for i in range(11) if policy.compute(At(i, 11), 0.3)]
    assert computed == [0, 1, 5, 9, 10]


def computed_set(rule, total=50, **guards):
    policy = Guarded(rule, **{"warmup": 1, "max_skips": 0, "last": False} | guards)
    return [i for i in range(total) if policy.compute(At(i, total), None)]


@given(st.integers(1, 12), st.integers(1, 60))
def test_every_computes_each_interval_th_step(interval, total):
    assert computed_set(Every(interval), total) == list(range(0, total, interval))


def test_the_interval_begins_anew_at_a_forced_step():
    """TaylorSeer's sets: interval 4 after 2 forced steps, interval 6 after 3."""
    assert computed_set(Every(4), warmup=2) == [0, *range(1, 50, 4)]
    assert computed_set(Every(6), warmup=3) == [0, 1, *range(2, 50, 6)]


def test_within_a_range_of_timesteps_every_second_step_is_computed():
    """Pyramid Attention Broadcast's closed form: 50 steps, range 2 in (100, 800)."""
    computed = computed_set(Within(2, 100, 800))
    assert len(computed) == 33
    assert [i for i in range(50) if i not in computed] == list(range(11, 45, 2))


def test_a_list_is_refused_for_another_number_of_steps():
    assert computed_set(Listed((0, 3, 7), total=10), 10) == [0, 3, 7]
    assert computed_set(Listed((0, 3, 7)), 20) == [0, 3, 7]
    with pytest.raises(errors.UnsupportedModel, match=r"10 evaluations.*has 50"):
        computed_set(Listed((0, 3, 7), total=10))


def test_a_budget_caps_the_skips_in_all():
    policy = Guarded(Every(99), warmup=1, max_skips=0, last=False, budget=3)
    assert [i for i in range(8) if policy.compute(At(i), None)] == [0, 4, 5, 6, 7]


@pytest.mark.parametrize("rule", [Below(1e9), Accumulated(1e9)])
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_not_known_computes(rule, value):
    policy = Guarded(rule, warmup=0, max_skips=0, last=False)
    assert policy.compute(At(5), value)
    assert not policy.compute(At(6), 0.1), "a NaN must not stay in the sum"


# Indicators.


def test_the_probe_measures_relative_to_the_last_compute():
    probe = ProbeChange()
    old = torch.tensor([1.0, -2.0, 3.0])
    assert probe.measure(old) is None
    probe.learn(old)
    assert probe.measure(old + 0.5).item() == pytest.approx(0.25)
    assert probe.measure(old + 1.0).item() == pytest.approx(0.5)


def test_easycache_predicts_the_change_of_a_linear_network():
    """For v = a·x the estimate k·|Δx|/|v| is the relative change of v itself."""
    indicator, a = InputChange(), 3.0
    xs = [torch.full((4,), float(k)) for k in (1, 2, 4, 5)]
    for x in xs[:3]:
        indicator.measure(x)
        indicator.learn(x, a * x)
    assert indicator.measure(xs[3]).item() == pytest.approx(
        relative_l1(a * xs[3], a * xs[2]).item()
    )


def test_a_new_leader_is_measured_afresh():
    """Where an outer method leaves a call out, another branch leads: it is not compared."""

    def asked(index, *branches):
        rows = [SimpleNamespace(sample=0, branch=branch) for branch in branches]
        step = SimpleNamespace(index=index, stage=0)
        denoiser = SimpleNamespace(name="transformer")
        raw = torch.ones(len(rows), 4, 8, 8)
        return Asked(rows=rows, step=step, denoiser=denoiser, arguments={}, raw=raw)

    class Asked(SimpleNamespace):
        """As a call, it can be referred to weakly."""

    decisions = Decisions(ProbeChange, lambda: None)
    first = asked(0, "uncond", "cond")
    assert decisions.leaders(first) == {0: 1}
    sample = decisions.sample(first, 0)
    sample.indicator.learn(torch.ones(3))
    assert decisions.leaders(asked(1, "cond")) == {0: 0}
    assert sample.indicator.measure(torch.ones(3)) == 0.0
    assert decisions.leaders(asked(2, "uncond")) == {0: 0}
    assert sample.indicator.measure(torch.ones(5)) is None


def test_indicators_keep_no_tensor_of_others():
    indicator, x, v = InputChange(), torch.ones(3), torch.ones(3)
    indicator.measure(x)
    indicator.learn(x, v)
    x.mul_(3.0)
    v.mul_(5.0)
    indicator.measure(x)
    indicator.learn(x, v)
    x.add_(1.0)
    # k = |5 − 1| / |3 − 1| = 2, over |v| = 5, times |4 − 3|
    assert indicator.measure(x).item() == pytest.approx(2 / 5)


@pytest.mark.parametrize("method", [cache.EasyCache, cache.FirstBlock])
def test_nan_latents_are_computed_not_reused(bench, method):
    """A network that gives NaN is asked again at every step: nothing is hidden."""
    pipe = bench.pipe("flux_cfg")
    weight = pipe.transformer.x_embedder.weight
    kept = weight.data.clone()
    weight.data.fill_(math.nan)
    run = Plan(method(threshold=1e9)).attach(pipe)
    bench.call("flux_cfg", steps=6)
    run.detach()
    weight.data.copy_(kept)
    states = {state for *_, state in run.report.to_dict()["events"][method.name]}
    assert states == {"computed"}


# What a skipped step answers, against references made by hand.


def answers(bench, name, plan, **call):
    """What the pipeline gets from its network, call by call, with its inputs, and when."""
    seen, times, _ = followed(bench, name, plan, **call)
    return seen, times


def followed(bench, name, plan, **call):
    """The same, and the run."""
    pipe = bench.pipe(name)
    seen, times = [], []

    def write(inner, *args, **kwargs):
        native = inner(*args, **kwargs)
        denoiser = find_denoisers(pipe)[0]
        x = kwargs.get(denoiser.sample_name, args[0] if args else None)
        x, v = (part if torch.is_tensor(part) else torch.stack(part) for part in (x, native[0]))
        seen.append((x.clone(), v.clone()))
        times.append(run.trajectory.now.time)
        return native

    run = plan.attach(pipe)
    undo = hooks.wrap(find_denoisers(pipe)[0].module, "forward", write)
    bench.call(name, **call)
    undo()
    run.detach()
    return seen, times, run


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "flux_schnell", "zimage", "cogvideox"])
def test_easycache_reuse_keeps_the_difference_to_the_input(bench, name):
    method = cache.EasyCache(threshold=1e9, warmup=2, predictor="reuse")
    seen, _ = answers(bench, name, Plan(method), steps=6)
    (x1, v1), *skipped = seen[1:5]
    for x, v in skipped:
        assert torch.allclose(v, x + (v1 - x1), atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "flux_schnell", "zimage", "cogvideox"])
def test_easycache_newton_draws_a_line(bench, name):
    """Through the last two computed answers, over `Step.time`; damped, a part of the way."""
    times = []

    class Timed(cache.EasyCache):
        def attach(self, site):
            times.clear()
            yield from super().attach(site)
            yield site.on_step(lambda step, _: times.append(step.time))

    for damping in (0.0, 0.4):
        method = Timed(threshold=1e9, warmup=2, predictor="newton", order=1, damping=damping)
        seen, _ = answers(bench, name, Plan(method), steps=6)
        (_, v0), (_, v1), *skipped = seen[:5]
        slope = (1 - damping) * (v1 - v0) / (times[1] - times[0])
        for (_, v), time in zip(skipped, times[2:5], strict=True):
            assert torch.allclose(v, v1 + (time - times[1]) * slope, atol=1e-4, rtol=1e-4)


def stream(block, args, kwargs, returned):
    """Hidden stream in and out of a block."""
    before = block.inputs(block.bind(args, kwargs))["hidden"]
    return before, block.outputs(returned)["hidden"]


class Wiretap:
    """Notes the picture's stream into and out of each block, below everything of ours."""

    def __init__(self, pipe):
        self.blocks = find_blocks(find_denoisers(pipe)[0])
        self.calls = []
        self._undos = []

    def __enter__(self):
        for block in self.blocks:
            inner = block.module.forward
            self._undos.append(lambda module=block.module: delattr(module, "forward"))
            block.module.forward = self._tap(block, inner)
        return self

    def _tap(self, block, inner):
        def forward(*args, **kwargs):
            if block.index == 0:
                self.calls.append({})
            returned = inner(*args, **kwargs)
            before, after = stream(block, args, kwargs, returned)
            self.calls[-1][block.index] = (before.clone(), after.clone())
            return returned

        forward.__wrapped__ = inner
        return forward

    def __exit__(self, *_):
        for undo in self._undos:
            undo()


class Through:
    """What leaves the last block, as the network sees it: above everything of ours."""

    def __init__(self, pipe):
        self.last = find_blocks(find_denoisers(pipe)[0])[-1]
        self.outputs = []

    def __enter__(self):
        self._handle = self.last.module.register_forward_hook(self._note, with_kwargs=True)
        return self

    def _note(self, module, args, kwargs, returned):
        self.outputs.append(stream(self.last, args, kwargs, returned))

    def __exit__(self, *_):
        self._handle.remove()


def run_tapped(bench, name, method, steps):
    pipe = bench.pipe(name)
    with Wiretap(pipe) as tap, Through(pipe) as through:
        run = Plan(method).attach(pipe)
        bench.call(name, steps=steps)
        run.detach()
    return tap, through, run.report


@pytest.mark.parametrize("name", ["pixart_sigma", "sana", "ltx"])
def test_first_block_adds_what_the_others_added(bench, name):
    """One stream, nothing injected: skipped out = first block's out + Σ (out − in)."""
    method = cache.FirstBlock(threshold=1e9, warmup=1, last=False)
    tap, through, _ = run_tapped(bench, name, method, 4)
    whole = tap.calls[0]
    gain = sum(after - before for index, (before, after) in whole.items() if index > 0)
    for call, (_, output) in zip(tap.calls[1:], through.outputs[1:], strict=True):
        assert set(call) == {0}
        assert torch.allclose(output, call[0][1] + gain, atol=1e-4)


def injections(network, arguments):
    """What a ControlNet adds to the picture's stream before the output of the last block."""
    pairs = (
        (network.transformer_blocks, "block_controlnet_hidden_states", "controlnet_block_samples"),
        (getattr(network, "single_transformer_blocks", ()), "controlnet_single_block_samples"),
    )
    added = []
    for blocks, *names in pairs:
        given = next((arguments[name] for name in names if arguments.get(name) is not None), ())
        if len(given):
            added += [given[int(index * len(given) / len(blocks))] for index in range(len(blocks))]
    return [part.clone() for part in added[:-1]]


@pytest.mark.parametrize(("name", "calls"), [("sd3_controlnet", 1), ("flux_controlnet", 2)])
def test_control_is_added_once_on_skipped_steps(bench, name, calls):
    """The residuals of a ControlNet are injected between blocks: live, and not in the cache."""
    pipe = bench.pipe(name)
    controls = []

    def note(inner, *args, **kwargs):
        controls.append(injections(pipe.transformer, kwargs))
        return inner(*args, **kwargs)

    with Wiretap(pipe) as tap, Through(pipe) as through:
        run = Plan(cache.FirstBlock(threshold=1e9, warmup=1, last=False)).attach(pipe)
        undo = hooks.wrap(pipe.transformer, "forward", note)
        bench.call(name, steps=4)
        undo()
        run.detach()
    assert len(tap.calls) == len(controls) == 4 * calls
    for call in range(calls, 4 * calls):
        assert set(tap.calls[call]) == {0}
        whole = tap.calls[call % calls]
        gain = sum(after - before for index, (before, after) in whole.items() if index > 0)
        live = sum(controls[call])
        assert live.abs().max() > 1e-2
        expected = tap.calls[call][0][1] + gain + live
        assert torch.allclose(through.outputs[call][1], expected, atol=1e-4)


@pipelines(CI, where=lambda tiny: tiny.blocks != "unet")
def test_a_first_block_that_skips_nothing_is_the_stock_pipeline(bench, same, name):
    """The machinery itself changes no bit."""
    for method in (
        cache.FirstBlock(threshold=1e-12),
        cache.FirstBlock(threshold=1e-12, predictor="newton", order=3),
        cache.EasyCache(threshold=1e-12),
    ):
        run = Plan(method).attach(bench.pipe(name))
        output = bench.call(name, steps=4)
        run.detach()
        assert same(output, bench.stock(name, steps=4))


@pytest.mark.parametrize("kind", [cache.EasyCache, cache.FirstBlock])
@pytest.mark.parametrize("name", ["flux_cfg", "pixart_sigma"])
def test_inference_mode(same, name, kind):
    """Tensors of inference mode have no version: the sums are the same, to rounding."""
    tiny = PIPELINES[name]
    outputs = []
    for mode in (torch.no_grad, torch.inference_mode):
        pipe = tiny.build()
        with mode(), Plan(kind(threshold=1e9)).attach(pipe):
            outputs.append(torch.as_tensor(tiny.call(pipe, steps=6)))
            again = torch.as_tensor(tiny.call(pipe, steps=6))
        assert same(outputs[-1], again)
    assert torch.allclose(*outputs, atol=1e-3)


def test_few_steps_are_inactive_with_a_reason(bench):
    """A turbo model's 4 steps: nothing to skip, and the user hears it."""
    for method in (cache.EasyCache(), cache.FirstBlock(warmup=3)):
        with (
            pytest.warns(errors.AccelWarning, match=r"did nothing: .*too few steps"),
            Plan(method).attach(bench.pipe("flux_schnell")) as run,
        ):
            bench.call("flux_schnell", steps=4)
        verdict = run.report.verdicts[method.name]
        assert verdict.state == "INACTIVE"
        assert "warm-up" in verdict.detail


def test_a_threshold_never_met_says_how_close_it_came(bench):
    with (
        pytest.warns(errors.AccelWarning, match=r"never fell below threshold 1e-09 \(lowest"),
        Plan(cache.FirstBlock(threshold=1e-9)).attach(bench.pipe("flux")),
    ):
        bench.call("flux", steps=6)
