"""UniPC: equal to the stock on equal levels, of its orders, and no correction by filled outputs."""

import math
from contextlib import contextmanager

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from test_samplers import FLOW, TABLE, noise, numbers, run
from test_samplers_v3 import LIKE_PP
from tiny import PIPELINES, PROMPTS
from toy import END, GRIDS, PROCESSES, START, mixture_data, mixture_path, slope, take

import accel
import samplers
from accel import cache, guidance
from accel.errors import AccelWarning, BadInput
from samplers import DPMSolverPPScheduler, UniPCScheduler
from samplers.adams import correct, predict
from samplers.multistep import phi


def pair(count, stock_settings, **settings):
    """The stock and ours, ready for a run over the same levels."""
    stock = UniPCMultistepScheduler(**stock_settings)
    ours = UniPCScheduler.from_config(stock.config, **settings)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(count)
    return stock, ours


@pytest.mark.parametrize("corrector", [True, False])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_equals_the_stock(prediction, order, variant, corrector):
    """Ending above zero: there the stock's bh1 divides infinity by infinity."""
    stock, ours = pair(
        12,
        TABLE
        | {
            "prediction_type": prediction,
            "solver_order": order,
            "solver_type": variant,
            "final_sigmas_type": "sigma_min",
            "disable_corrector": [] if corrector else list(range(12)),
        },
        order=order,
        variant=variant,
        corrector=corrector,
    )
    x = noise(dtype=torch.float64)
    expected, found = run(stock, x), run(ours, x)
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_equals_the_stock_to_zero_noise(count):
    stock, ours = pair(count, TABLE | {"solver_order": 3}, order=3)
    x = noise(dtype=torch.float64)
    expected, found = run(stock, x), run(ours, x)
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_equals_the_stock_on_a_flow_below_pure_noise(order):
    """The stock starts at 1 − 10⁻⁶; without its first two steps both start at the same level."""
    flow = FLOW | {"use_flow_sigmas": True, "flow_shift": 3.0}
    stock, ours = pair(10, flow | {"solver_order": order}, order=order)
    for scheduler in (stock, ours):
        scheduler.set_begin_index(2)
    x = noise(dtype=torch.float64)
    expected, found = run(stock, x, start=2), run(ours, x, start=2)
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


def test_is_almost_the_stock_on_a_flow_from_pure_noise():
    flow = FLOW | {"use_flow_sigmas": True}
    stock, ours = pair(10, flow | {"solver_order": 2}, order=2)
    x = noise(dtype=torch.float64)
    expected, found = run(stock, x), run(ours, x)
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def solve(levels, x, order, variant, corrector):
    """Run the formulas with their ordinary warm-up in float64; returns the final state."""
    history, before = [], None
    for i in range(len(levels) - 1):
        m = mixture_data(x, levels[i])
        if corrector and before is not None:
            known = len(history)
            redone = correct(levels[i], levels[i - known : i][::-1], rule=variant)
            x = take(redone, before, [m, *history])
        history = [m, *history][:order]
        before = x
        nodes = levels[i - len(history) + 1 : i + 1][::-1]
        x = take(predict(levels[i + 1], nodes, rule=variant), x, history)
    return x


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize(("order", "expected"), [(1, 2.0), (2, 3.0), (3, 3.9)])
def test_the_corrector_adds_one_to_the_order(process, variant, order, expected):
    path = mixture_path(process)
    errors = []
    for count in GRIDS:
        levels = [PROCESSES[process](lam) for lam in np.linspace(START, END, count + 1)]
        end = solve(levels, path[0], order, variant, corrector=True)
        errors.append(np.sqrt(np.mean((end - path[-1]) ** 2)))
    assert slope(errors) == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("order", "expected"), [(1, 1.0), (2, 2.0)])
def test_the_order_without_the_corrector(process, order, expected):
    path = mixture_path(process)
    errors = []
    for count in GRIDS:
        levels = [PROCESSES[process](lam) for lam in np.linspace(START, END, count + 1)]
        end = solve(levels, path[0], order, "bh2", corrector=False)
        errors.append(np.sqrt(np.mean((end - path[-1]) ** 2)))
    assert slope(errors) == pytest.approx(expected, abs=0.2)


@given(st.data(), st.integers(1, 3), st.sampled_from(["bh1", "bh2"]), st.booleans())
def test_weights_solve_the_authors_linear_system(data, order, variant, corrects):
    """Σ ρ_k r_k^{q−1} = q!·hh·φ_{q+1}(hh)/B; with one unknown the authors take ρ = ½."""
    gaps = data.draw(st.lists(st.floats(0.1, 2), min_size=order, max_size=order))
    target, *nodes = (PROCESSES["vp"](float(lam)) for lam in 1.5 - np.cumsum([0.0, *gaps]))
    h = gaps[0]
    big = -h if variant == "bh1" else math.expm1(-h)
    ratios = [(node.lam - nodes[0].lam) / h for node in nodes[1:]] + [1.0] * corrects
    count = len(ratios)
    if count == 1:
        rho = np.array([0.5])
    else:
        matrix = np.array([[r ** (q - 1) for r in ratios] for q in range(1, count + 1)])
        right = [math.factorial(q) * -h * phi(q + 1, -h) / big for q in range(1, count + 1)]
        rho = np.linalg.solve(matrix, right) if count else np.array([])
    values = data.draw(st.lists(st.floats(-2, 2), min_size=order, max_size=order))
    ahead = data.draw(st.floats(-2, 2))
    differences = [value - values[0] for value in values[1:]] + [ahead - values[0]] * corrects
    x = 0.7
    base = target.sigma / nodes[0].sigma * x - target.alpha * math.expm1(-h) * values[0]
    extra = sum(p * d / r for p, d, r in zip(rho, differences, ratios, strict=True))
    expected = base - target.alpha * big * extra
    made = (correct if corrects else predict)(target, nodes, rule=variant)
    found = take(made, x, [ahead, *values] if corrects else values)
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("settings", [TABLE, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_predictor_alone_is_dpm_solver_pp(order, settings):
    ours = UniPCScheduler(order, corrector=False, **settings)
    other = DPMSolverPPScheduler(order, **settings)
    for scheduler in (ours, other):
        scheduler.set_timesteps(10)
    assert torch.equal(run(ours, noise()), run(other, noise()))


# The corrector, on and off


def ready(count=10, **settings):
    scheduler = UniPCScheduler(**(TABLE | settings))
    scheduler.set_timesteps(count)
    return scheduler


def test_a_run_that_never_corrects_is_one_without_corrector():
    skipping, without = ready(), ready(corrector=False)
    x = y = noise()
    for i, t in enumerate(skipping.timesteps):
        skipping.skip_corrector()
        x = skipping.step(torch.tanh(x + i), t, x).prev_sample
        y = without.step(torch.tanh(y + i), t, y).prev_sample
    assert torch.equal(x, y)
    assert not torch.equal(run(ready(), noise()), run(ready(corrector=False), noise()))


def test_some_rows_are_left_uncorrected_once():
    together, corrected, not_corrected = ready(), ready(), ready()
    x = noise((3, 4, 8, 8))
    states = [x, x, x]
    for i in range(4):
        schedulers = (together, corrected, not_corrected)
        if i == 2:
            together.skip_corrector([1])
            not_corrected.skip_corrector()
        states = [
            s.step(torch.tanh(state + i), s.timesteps[i], state).prev_sample
            for s, state in zip(schedulers, states, strict=True)
        ]
    assert torch.equal(states[0][[0, 2]], states[1][[0, 2]])
    assert torch.equal(states[0][1], states[2][1])
    assert not torch.equal(states[0][1], states[1][1])


def test_what_a_pipeline_pastes_into_a_sample_stays():
    """The correction does not depend on the sample: it is a sum of predictions."""
    ends = []
    for change in (0.0, 0.5):
        scheduler = ready(prediction_type="sample")
        x = scheduler.step(noise(seed=1), scheduler.timesteps[0], noise()).prev_sample + change
        ends.append(scheduler.step(noise(seed=2), scheduler.timesteps[1], x).prev_sample)
    share = scheduler._choices[1][0].sample
    assert torch.allclose(ends[1] - ends[0], torch.full_like(ends[0], 0.5 * share), atol=1e-5)


def test_nothing_is_corrected_after_history_is_dropped():
    corrected, without = ready(), ready(corrector=False)
    x = noise()
    for scheduler in (corrected, without):
        scheduler.step(noise(seed=1), scheduler.timesteps[0], x)
        scheduler.reset_history()
    ends = [s.step(noise(seed=2), s.timesteps[1], x).prev_sample for s in (corrected, without)]
    assert torch.equal(*ends)


def test_an_aborted_run_leaves_nothing_behind():
    scheduler = ready()
    expected = run(scheduler, noise())
    scheduler.set_timesteps(10)
    scheduler.step(noise(), scheduler.timesteps[0], noise())
    scheduler.skip_corrector()
    scheduler.set_timesteps(10)
    assert torch.equal(run(scheduler, noise()), expected)


def skipped(scheduler):
    """Steps and rows at which a scheduler is told not to correct."""
    seen = []
    inner = scheduler.skip_corrector

    def note(rows=None):
        seen.append((scheduler.step_index or 0, tuple(rows)))
        inner(rows)

    scheduler.skip_corrector = note
    return seen


CORRECTING = {
    "unipc": samplers.UniPC(),
    "sa": samplers.SASolver(tau=0.0),
    "v3": samplers.DPMSolverV3(numbers=LIKE_PP.to_scalars()),
    "pseudo": samplers.PseudoCorrector(),
}


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        *((name, "unipc") for name in ("sd15", "flux_cfg", "wan22", "dit")),
        *((name, kind) for name in ("flux_cfg", "dit") for kind in ("sa", "v3", "pseudo")),
    ],
)
def test_steps_that_a_cache_fills_in_are_not_corrected(name, sampler):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    method = cache.Custom(rule="steps", steps=(0, 1, 4), predictor="taylor")
    batch = 2 if tiny.batchable else 1
    with accel.Plan(CORRECTING[sampler], method).attach(pipe) as attached:
        seen = skipped(pipe.scheduler)
        tiny.call(pipe, steps=7, batch=batch)
        del pipe.scheduler.skip_corrector
    events = attached.report.tallies[1].events
    filled = {event.step for event in events if event.state != "computed"}
    rows = 2 * batch if name == "dit" else batch
    assert filled
    assert seen == [(step, tuple(range(rows))) for step in sorted(filled)]


STOCK = {
    "UniPCMultistepScheduler": "multistep_uni_c_bh_update",
    "SASolverScheduler": "stochastic_adams_moulton_update",
}


@contextmanager
def correcting(scheduler):
    """Steps at which a stock scheduler runs its corrector: on the class, below all hooks."""
    kind, seen = type(scheduler), []
    name = STOCK[kind.__name__]
    inner = getattr(kind, name)

    def count(self, *args, **kwargs):
        seen.append(self.step_index)
        return inner(self, *args, **kwargs)

    setattr(kind, name, count)
    try:
        yield seen
    finally:
        setattr(kind, name, inner)


def stock_corrector(kind, config):
    if kind == "SASolverScheduler":
        return diffusers.SASolverScheduler.from_config(config, tau_func=lambda _: 0.0)
    return UniPCMultistepScheduler.from_config(config)


@pytest.mark.parametrize(
    ("name", "kind"), [("wan21", "UniPCMultistepScheduler"), ("sd15", "SASolverScheduler")]
)
def test_a_stock_scheduler_corrects_no_step_that_a_cache_fills_in(name, kind):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    pipe.scheduler = scheduler = stock_corrector(kind, pipe.scheduler.config)
    before, method = numbers(tiny.call(pipe, steps=9)), cache.EasyCache(threshold=0.5, warmup=3)
    kept = {key: id(value) for key, value in vars(scheduler).items() if callable(value)}
    with correcting(scheduler) as seen, accel.Plan(method).attach(pipe) as attached:
        tiny.call(pipe, steps=9)
    events = attached.report.tallies[0].events
    computed = {event.step for event in events if event.state == "computed"}
    filled = {event.step for event in events} - computed
    assert filled and len(computed) > 2
    assert seen == sorted(computed - {0})
    assert {key: id(value) for key, value in vars(scheduler).items() if callable(value)} == kept
    assert torch.equal(numbers(tiny.call(pipe, steps=9)), before)


@pytest.mark.parametrize("kind", STOCK)
def test_of_a_batch_a_stock_scheduler_corrects_the_computed_rows(kind):
    """Row by row it is what the scheduler does with and without its corrector."""
    pipe = PIPELINES["sd15"].build()
    x = noise((3, 4, 8, 8))
    pipe.scheduler = stock_corrector(kind, pipe.scheduler.config)
    attached, ends = accel.Plan(cache.EasyCache()).attach(pipe), []
    for filled in ((), (1,), (0, 1, 2)):
        state = x
        pipe.scheduler.set_timesteps(8)
        for i in range(4):
            for row in range(3):
                attached.trajectory.answered(row, "cond", i != 2 or row not in filled)
            t = pipe.scheduler.timesteps[i]
            state = pipe.scheduler.step(torch.tanh(state + i), t, state).prev_sample
        ends.append(state)
    attached.detach()
    assert torch.allclose(ends[1][[0, 2]], ends[0][[0, 2]])
    assert torch.allclose(ends[1][1], ends[2][1])
    assert not torch.allclose(ends[1][1], ends[0][1])


def test_a_scheduler_of_ours_that_the_pipeline_has_is_told_too():
    """Without a sampler in the plan."""
    tiny = PIPELINES["sd15"]
    pipe = tiny.build()
    pipe.scheduler = UniPCScheduler.from_config(pipe.scheduler.config)
    method = cache.Custom(rule="steps", steps=(0, 1, 4), predictor="taylor")
    with accel.Plan(method).attach(pipe):
        seen = skipped(pipe.scheduler)
        tiny.call(pipe, steps=7)
        del pipe.scheduler.skip_corrector
    assert [step for step, _ in seen] == [2, 3, 5]


def test_a_corrector_that_is_not_where_it_was_is_warned_of(monkeypatch):
    pipe = PIPELINES["sd15"].build()
    pipe.scheduler = stock_corrector("UniPCMultistepScheduler", pipe.scheduler.config)
    monkeypatch.delattr(UniPCMultistepScheduler, STOCK["UniPCMultistepScheduler"])
    with pytest.warns(AccelWarning, match="UniPCMultistepScheduler of this version"):
        accel.Plan(cache.EasyCache()).attach(pipe).detach()


def test_each_sample_of_a_batch_is_corrected_by_itself():
    tiny = PIPELINES["sd3"]
    pipe = tiny.build()
    plan = accel.Plan(samplers.UniPC(), cache.EasyCache(threshold=0.2, warmup=2))

    def steps_of(**call):
        with plan.attach(pipe):
            seen = skipped(pipe.scheduler)
            output = numbers(tiny.call(pipe, steps=10, **call))
            del pipe.scheduler.skip_corrector
        return output, seen

    together, seen = steps_of(batch=3)
    for sample, (prompt, seed) in enumerate(zip(PROMPTS, range(3), strict=False)):
        alone, mine = steps_of(prompts=[prompt], seed=seed)
        assert [step for step, _ in mine] == [step for step, rows in seen if sample in rows]
        assert torch.allclose(alone[0], together[sample], atol=1e-3 * float(alone.abs().max()))
    assert any(len(rows) < 3 for _, rows in seen)


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_steps_without_guidance_are_corrected(name):
    """A conditional branch that was computed is an output that was computed."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    method = guidance.Adaptive(threshold=-1.0, min_guided=0.0, min_steps=1)
    with accel.Plan(samplers.UniPC(), method).attach(pipe) as attached:
        seen = skipped(pipe.scheduler)
        tiny.call(pipe, steps=5)
        del pipe.scheduler.skip_corrector
    assert not seen
    assert attached.report.verdicts["guidance.Adaptive"].state == "ACTIVE"


def test_a_sampler_alone_is_told_nothing():
    tiny = PIPELINES["sd15"]
    pipe = tiny.build()
    with accel.Plan(samplers.UniPC(order=3)).attach(pipe):
        seen = skipped(pipe.scheduler)
        found = numbers(tiny.call(pipe, steps=5))
        del pipe.scheduler.skip_corrector
    assert not seen
    pipe.scheduler = UniPCScheduler.from_config(pipe.scheduler.config, order=3)
    assert torch.equal(found, numbers(tiny.call(pipe, steps=5)))


def test_misuse_is_refused():
    with pytest.raises(BadInput, match="orders 1, 2 and 3"):
        UniPCScheduler(4)
    with pytest.raises(BadInput, match="bh1 or bh2"):
        UniPCScheduler(2, "midpoint")
    with pytest.raises(ValidationError):
        samplers.UniPC(order=0)
