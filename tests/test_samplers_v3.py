"""DPM-Solver-v3: order, degenerate statistics, corrector, and what its scheduler does."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_samplers import FLOW, TABLE, mixture_solved, network, noise, numbers, run
from tiny import PIPELINES
from toy import (
    END,
    GRIDS,
    PROCESSES,
    START,
    mixture_data,
    mixture_path,
)

from accel import Plan
from accel.errors import BadInput, UnsupportedModel
from samplers import DPMSolverPPScheduler, DPMSolverV3, DPMSolverV3Scheduler
from samplers.dpmsolver_v3_step import residual_weights, step
from samplers.dpmsolverpp import update
from samplers.ems import EMS
from samplers.ems_numbers import Scalars
from samplers.prediction import Level

ENDS = (-8.0, 8.0)


def table(l, s, b, low=ENDS[0], high=ENDS[1], count=64):  # noqa: E741
    """Statistics from functions of λ, or from numbers."""
    lams = np.linspace(low, high, count + 1)
    values = [v(lams) if callable(v) else np.full(len(lams), float(v)) for v in (l, s, b)]
    return EMS(lams, *values)


CURVES = (
    lambda x: 1 / (1 + np.exp(x)),
    lambda x: 0.4 * np.sin(x),
    lambda x: 0.3 * np.cos(x),
)
WAVY, FINE = table(*CURVES), table(*CURVES, count=4096)
STRAIGHT = table(
    lambda x: 0.5 - 0.1 * x, lambda x: 0.1 * x - 0.3, lambda x: 0.1 - 0.05 * x, count=2
)
LIKE_PP, LIKE_DEIS = table(1, 0, 0), table(0, -1, 0)


def inline(ems, **more):
    return ems.to_scalars(12).model_dump(mode="json") | more


def noise_of(data, x, level):
    return (x - level.alpha * data) / level.sigma


def residual(ems, x, level, predict=mixture_data):
    of_noise, of_x = residual_weights(ems, level)
    return of_noise * noise_of(predict(x, level), x, level) + of_x * x


def take(weights, x, values):
    """One step in float64 numpy."""
    total = weights.sample * x + weights.constant
    return total + sum(w * f for w, f in zip(weights.history, values, strict=True))


def solve(ems, levels, exact, order, pseudo=False):
    """Run the update formulas from exact first states; returns the final state."""
    history = [residual(ems, exact(i), levels[i]) for i in range(order - 1)][::-1]
    x = exact(order - 1)
    for i in range(order - 1, len(levels) - 1):
        history.insert(0, residual(ems, x, levels[i]))
        nodes = levels[i - order + 1 : i + 1][::-1]
        x = take(step(ems, levels[i + 1], nodes, pseudo=pseudo), x, history[:order])
    return x


# Theory


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    ("order", "pseudo", "expected"),
    [(1, False, 1), (2, False, 2), (3, False, 3), (4, False, 4), (3, True, 2), (4, True, 2)],
)
def test_order_on_a_mixture(process, order, pseudo, expected):
    """Whatever the statistics; the pseudo-order drops to 2.

    Those here have no bends: with bends, the order shows as long as a step spans some of them.
    """
    path, errors, grids = mixture_path(process), [], GRIDS[:4]
    for count in grids:
        levels = [PROCESSES[process](lam) for lam in np.linspace(START, END, count + 1)]
        exact = path[:: GRIDS[-1] // count].__getitem__
        end = solve(STRAIGHT, levels, exact, order, pseudo)
        errors.append(np.sqrt(np.mean((end - path[-1]) ** 2)))
    found = -np.polyfit(np.log(grids[-3:]), np.log(errors[-3:]), 1)[0]
    assert found == pytest.approx(expected, abs=0.2)


lams = st.lists(st.floats(-4.0, 4.0), min_size=2, max_size=4, unique=True).filter(
    lambda found: min(np.diff(sorted(found))) > 0.02
)


@given(lams, st.sampled_from(sorted(PROCESSES)))
def test_with_l_1_it_is_dpm_solver_pp(found, process):
    """f is −m then, for orders 1, 2 (heun) and 3."""
    target, *nodes = (PROCESSES[process](lam) for lam in sorted(found, reverse=True))
    ours, theirs = step(LIKE_PP, target, nodes), update(target, nodes, "heun")
    assert ours.sample == pytest.approx(theirs.sample, rel=1e-7)
    scale = max(map(abs, theirs.history))
    assert -np.array(ours.history) == pytest.approx(np.array(theirs.history), abs=1e-7 * scale)
    assert ours.constant == 0


@given(lams, st.sampled_from(sorted(PROCESSES)))
def test_with_s_minus_1_it_interpolates_the_noise(found, process):
    """f is σε/α then, and ``x/α`` changes by the integral of e^{−λ} times the interpolant of ε."""
    target, *nodes = (PROCESSES[process](lam) for lam in sorted(found, reverse=True))
    ours, here = step(LIKE_DEIS, target, nodes), nodes[0]
    points, shares = np.polynomial.legendre.leggauss(40)
    middle, half = (target.lam + here.lam) / 2, (target.lam - here.lam) / 2
    fine = middle + half * points
    for k, node in enumerate(nodes):
        others = [other for other in nodes if other is not node]
        basis = [(fine - other.lam) / (node.lam - other.lam) for other in others]
        interpolant = np.prod([*basis, np.ones_like(fine)], axis=0)
        expected = -target.alpha * half * (shares @ (np.exp(-fine) * interpolant))
        found_weight = ours.history[k] * node.sigma / node.alpha
        assert found_weight == pytest.approx(expected, rel=1e-5, abs=1e-8 * target.alpha)
    assert ours.sample == pytest.approx(target.alpha / here.alpha, rel=1e-9)


@given(lams, st.sampled_from(sorted(PROCESSES)), st.booleans())
def test_what_the_statistics_say_is_followed_exactly(found, process, pseudo):
    """f with df/dλ = s·f + b: g is constant, and every order gives the solution."""
    target, *nodes = (PROCESSES[process](lam) for lam in sorted(found, reverse=True))
    fine = np.linspace(min(found), max(found), 40001)
    l, s, b = FINE.at(fine)  # noqa: E741
    scale = np.exp(integral(s, fine))
    f = scale * (0.7 + integral(b / scale, fine))
    kept = np.exp(-integral(l, fine))  # d(x/α)/dλ = −f − l·x/α
    y = kept * (0.3 - integral(f / kept, fine))
    values = [np.interp(node.lam, fine, f) for node in nodes]
    x = nodes[0].alpha * np.interp(nodes[0].lam, fine, y)
    end = take(step(FINE, target, nodes, pseudo=pseudo), x, values)
    assert end == pytest.approx(target.alpha * y[-1], rel=1e-6, abs=1e-7)


def integral(values, places):
    """From the first place on, by the trapezoidal rule."""
    parts = (values[1:] + values[:-1]) / 2 * np.diff(places)
    return np.concatenate([[0.0], np.cumsum(parts)])


def test_a_wide_range_does_not_overflow():
    wild = table(40.0, 30.0, 5.0, -400, 400)
    for lam in (-390.0, 0.0, 390.0):
        weights = step(wild, Level(1.0, math.exp(-lam - 0.5)), [Level(1.0, math.exp(-lam))])
        assert np.isfinite([weights.sample, *weights.history, weights.constant]).all()


# The scheduler


def ready(count=10, ems=WAVY, **settings):
    scheduler = DPMSolverV3Scheduler(inline(ems), **settings)
    scheduler.set_timesteps(count)
    return scheduler


@pytest.mark.parametrize("settings", [TABLE, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_with_l_1_a_run_is_one_of_dpm_solver_pp(order, settings):
    """The corrector off; the end at σ = 0 is a clean sample in both."""
    ours = ready(20, LIKE_PP, order=order, corrector="none", lower_order_final=False, **settings)
    theirs = DPMSolverPPScheduler(order=order, variant="heun", **settings)
    theirs.set_timesteps(20)
    expected, found = run(theirs, noise()), run(ours, noise())
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def beside_dpm_solver_pp(order, **settings):
    """A scheduler with l = 1, and the DPM-Solver++ that it then is."""
    solver = {"order": order, "lower_order_final": False}
    ours = DPMSolverV3Scheduler(inline(LIKE_PP), corrector="none", **solver, **settings)
    theirs = DPMSolverPPScheduler(variant="heun", **solver, **settings)
    return ours, theirs


def loud(x, i):
    """Outputs far outside [−1, 1]."""
    return 3.0 * network(x, i)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_thresholding_is_that_of_dpm_solver_pp(prediction, order):
    model = {"prediction_type": prediction} | ({} if prediction == "flow_prediction" else TABLE)
    ends = {}
    for thresholding in (False, True):
        pair = beside_dpm_solver_pp(order, thresholding=thresholding, **model)
        for scheduler in pair:
            scheduler.set_timesteps(12)
        ends[thresholding] = [run(scheduler, noise(), predict=loud) for scheduler in pair]
    found, expected = ends[True]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not torch.allclose(found, ends[False][0], atol=1e-2)


def test_a_learned_variance_is_cut_off():
    with_variance, plain = (ready(10, variance_type=v, **TABLE) for v in ("learned_range", None))

    def wide(x, i):
        return torch.cat([network(x, i), 9.0 * noise(x.shape)], 1)

    assert torch.equal(run(with_variance, noise(), predict=wide), run(plain, noise()))


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        (TABLE, {"timesteps": [900, 640, 310, 90]}),
        (FLOW, {"sigmas": [1.0, 0.6, 0.3], "mu": 0.8}),
        (FLOW, {"num_inference_steps": 5, "mu": 1.3}),
    ],
    ids=["timesteps", "sigmas and mu", "mu"],
)
def test_every_argument_of_set_timesteps_gives_the_levels_of_dpm_solver_pp(settings, asked):
    shifted = {"use_dynamic_shifting": True} if "mu" in asked else {}
    pair = beside_dpm_solver_pp(2, **settings, **shifted)
    for scheduler in pair:
        scheduler.set_timesteps(**asked)
    for name in ("timesteps", "sigmas"):
        assert torch.equal(*(getattr(scheduler, name) for scheduler in pair))
    found, expected = (run(scheduler, noise()) for scheduler in pair)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    if "mu" in asked:
        other = beside_dpm_solver_pp(2, **settings, **shifted)[0]
        other.set_timesteps(**asked | {"mu": 0.1})
        assert not torch.equal(other.sigmas, pair[0].sigmas)


def by_hand(scheduler, ems, x, predict, order, extra):
    """Predictor and pseudo-corrector as in the paper: x and ε of the new point are replaced."""
    levels, history, start = scheduler._levels, [], x
    for i in range(len(levels) - 1):
        here = levels[i]
        of_noise, of_x = residual_weights(ems, here)
        eps = predict(x, i)
        f = of_noise * eps + of_x * x
        if i:
            before = history[1 : order + extra - 1]
            nodes = [levels[i - 1], here, *(node for node, _ in before)]
            values = [history[0][1], f, *(value for _, value in before)]
            corrected = take(step(ems, here, nodes, pseudo=True), start, values)
            l = ems.at(np.array([here.lam]))[0][0]  # noqa: E741
            eps = eps + l * (corrected - x) / here.sigma
            x = corrected
            assert torch.allclose(of_noise * eps + of_x * x, f, atol=1e-9)  # g is as it was
        history.insert(0, (here, f))
        if levels[i + 1].sigma == 0.0:
            return (x - here.sigma * eps) / here.alpha
        used = history[: min(order, len(levels) - 1 - i)]
        weights = step(ems, levels[i + 1], [node for node, _ in used])
        start, x = x, take(weights, x, [value for _, value in used])
    raise AssertionError


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_corrector_is_that_of_the_paper(order):
    scheduler = ready(9, order=order, **TABLE)
    x = noise(dtype=torch.float64)
    expected = by_hand(scheduler, scheduler._ems, x, network, order, 1)
    assert torch.allclose(run(scheduler, x), expected, atol=1e-8)


def test_the_step_from_pure_noise_is_redone_with_the_average_of_both_ends():
    """A flow: Euler's step becomes the trapezoidal one."""
    x, outputs, ends = noise(dtype=torch.float64), [noise(seed=i).double() for i in range(2)], {}
    for corrector in ("pseudo", "none"):
        scheduler = ready(6, corrector=corrector, **FLOW)
        first, second, third = scheduler._levels[:3]
        moved = scheduler.step(outputs[0], scheduler.timesteps[0], x).prev_sample
        data = [x - outputs[0], moved - second.sigma * outputs[1]]
        assert torch.allclose(moved, second.sigma * x + second.alpha * data[0])
        ends[corrector] = scheduler.step(outputs[1], scheduler.timesteps[1], moved).prev_sample
    weights = step(scheduler._ems, third, [second])
    expected = float(weights.sample) * second.alpha / 2 * (data[1] - data[0])
    assert first.alpha == 0
    assert torch.allclose(ends["pseudo"] - ends["none"], expected, atol=1e-9)


def test_a_corrected_run_is_nearer_to_the_solution():
    """On the analytic mixture, with made-up statistics, at no evaluation more."""

    def predict(scheduler):
        def network(x, i):
            level = scheduler._levels[i]
            data = torch.from_numpy(mixture_data(x.numpy(), level))
            return (x - level.alpha * data) / level.sigma

        return network

    ends = {}
    x = torch.linspace(-2, 2, 64, dtype=torch.float64)
    for name, count, solver in (
        ("reference", 300, {"order": 3}),
        ("with", 12, {"order": 3}),
        ("without", 12, {"order": 3, "corrector": "none"}),
    ):
        scheduler = ready(count, use_karras_sigmas=True, **solver, **TABLE)
        ends[name] = run(scheduler, x, predict=predict(scheduler))
    errors = {name: (end - ends["reference"]).norm() for name, end in ends.items()}
    assert errors["with"] < errors["without"]


def test_what_others_wrote_into_the_sample_stays():
    """As an inpainting pipeline does: the correction is added to the sample that is handed over."""
    plain, pasted = ready(8, **TABLE), ready(8, **TABLE)
    outputs, x = [noise(seed=i) for i in range(3)], noise()
    ends = []
    for scheduler in (plain, pasted):
        sample = x
        for i in range(2):
            sample = scheduler.step(outputs[i], scheduler.timesteps[i], sample).prev_sample
        ends.append(sample)
    level, delta = plain._levels[2], 0.5 * noise(seed=9)
    shifted = outputs[2] + delta * float(plain._ems.at(np.array([level.lam]))[0][0]) / level.sigma
    ends[0] = plain.step(outputs[2], plain.timesteps[2], ends[0]).prev_sample
    ends[1] = pasted.step(shifted, pasted.timesteps[2], ends[1] + delta).prev_sample
    weights = step(plain._ems, plain._levels[3], [level])  # f is equal in both, and so all else
    assert torch.allclose(ends[1] - ends[0], float(weights.sample) * delta, atol=1e-5)


def test_the_corrector_keeps_to_its_range_and_can_be_skipped():
    x, outputs = noise(), [noise(seed=i) for i in range(8)]

    def end(scheduler, skip=()):
        sample = x
        for i, output in enumerate(outputs):
            if i in skip:
                scheduler.skip_corrector(None)
            sample = scheduler.step(output, scheduler.timesteps[i], sample).prev_sample
        return sample

    full, none = end(ready(8, **TABLE)), end(ready(8, corrector="none", **TABLE))
    assert not torch.equal(full, none)
    assert torch.equal(end(ready(8, corrector_high=1e-6, **TABLE)), none)
    assert torch.equal(end(ready(8, **TABLE), skip=range(8)), none)
    half = end(ready(8, corrector_high=1.6, **TABLE))
    ratios = [level.sigma / level.alpha for level in ready(8, **TABLE)._levels[:8]]
    high = [i for i, ratio in enumerate(ratios) if ratio > 1.6]
    assert 1 < len(high) < 7
    assert torch.equal(end(ready(8, **TABLE), skip=high), half)
    rows = ready(8, **TABLE)
    for i in range(2):
        rows.step(outputs[i], rows.timesteps[i], x)
    other = copy.deepcopy(rows)
    rows.skip_corrector([1])
    a, b = (s.step(outputs[2], s.timesteps[2], x).prev_sample for s in (rows, other))
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


def test_a_forgotten_history_makes_a_step_of_first_order():
    x, outputs = noise(), [noise(seed=i) for i in range(6)]
    dropped, first = ready(20, order=3, **TABLE), ready(20, order=1, corrector="none", **TABLE)
    for i in range(5):
        dropped.step(outputs[i], dropped.timesteps[i], x)
    assert len(dropped.history) == 4
    dropped.reset_history()
    first.set_begin_index(5)
    a, b = (s.step(outputs[5], s.timesteps[5], x).prev_sample for s in (dropped, first))
    assert torch.equal(a, b)


@pytest.mark.parametrize("settings", [TABLE, FLOW], ids=["vp", "flow"])
def test_two_runs_are_bit_identical(settings):
    scheduler, results = ready(8, order=3, **settings), []
    for _ in range(2):
        scheduler.set_timesteps(8)
        results.append(run(scheduler, noise()))
    assert torch.equal(*results)
    scheduler.set_timesteps(8)  # an aborted run leaves nothing behind
    for i in range(3):
        scheduler.step(noise(), scheduler.timesteps[i], noise())
    scheduler.set_timesteps(8)
    assert torch.equal(run(scheduler, noise()), results[0])


levels = st.lists(st.floats(2**-10, 1.0, width=32), min_size=1, max_size=9, unique=True).map(
    lambda values: sorted(values, reverse=True)
)


@settings(max_examples=40)
@given(levels, st.sampled_from([1, 2, 3, 4]), st.sampled_from(["pseudo", "same", "none"]))
def test_a_straight_flow_ends_at_its_data_on_any_grid(sigmas, order, corrector):
    """With l = 1, f is −m, and m is constant."""
    wide = inline(table(1, 0, 0, -20, 20))
    scheduler = DPMSolverV3Scheduler(wide, order, corrector=corrector, **FLOW)
    scheduler.set_timesteps(sigmas=sigmas)
    data, eps = noise((1, 2, 4), 1, torch.float64), noise((1, 2, 4), 2, torch.float64)
    x = (1 - scheduler.sigmas[0].double()) * data + scheduler.sigmas[0].double() * eps
    end = run(scheduler, x, predict=lambda *_: eps - data)
    assert torch.allclose(end, data, atol=1e-6)


@pytest.mark.parametrize("thresholding", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("kind", ["scalar", "channel", "none"])
def test_a_step_reads_nothing_from_the_device(prediction, thresholding, kind, tmp_path):
    """Tensors of the meta device hold no numbers: reading one would raise."""
    path = spread(kind, tmp_path)
    scheduler = DPMSolverV3Scheduler(path, 3, prediction_type=prediction, thresholding=thresholding)
    scheduler.set_timesteps(12, device="meta")
    scheduler.set_begin_index(0)
    assert run(scheduler, noise().to("meta")).shape == (2, 4, 8, 8)


def spread(kind, folder, shape=(4, 8, 8)):
    """`WAVY` for each channel or element, as the path of its file."""
    extra = {"scalar": (), "channel": shape[:1], "none": shape}[kind]
    tables = [np.multiply.outer(t, np.ones(extra)) for t in (WAVY.l, WAVY.s, WAVY.b)]
    EMS(WAVY.lams, *tables).write(folder / f"{kind}.safetensors")
    return str(folder / f"{kind}.safetensors")


def test_equal_numbers_a_channel_or_element_are_one_number(tmp_path):
    ends = []
    for kind in ("scalar", "channel", "none"):
        scheduler = DPMSolverV3Scheduler(spread(kind, tmp_path), 3, **TABLE)
        scheduler.set_timesteps(9)
        ends.append(run(scheduler, noise()))
    assert all(torch.allclose(end, ends[0], atol=1e-6) for end in ends)


def test_statistics_of_another_size_are_refused(tmp_path):
    for kind, told in (("channel", r"for \(4,\)"), ("none", r"for \(4, 8, 8\)")):
        scheduler = DPMSolverV3Scheduler(spread(kind, tmp_path), **TABLE)
        scheduler.set_timesteps(4)
        with pytest.raises(BadInput, match=told):
            run(scheduler, noise((2, 16, 8, 9)))


def test_copies_pickles_and_files(tmp_path):
    scheduler = ready(8, order=3, corrector="same", **FLOW, shift=2.5)
    scheduler.save_pretrained(tmp_path)
    loaded = DPMSolverV3Scheduler.from_pretrained(tmp_path)
    expected = run(scheduler, noise())
    for other in (loaded, copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert (other.config.order, other.config.corrector) == (3, "same")
        other.set_timesteps(8)
        assert torch.equal(run(other, noise()), expected)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "accel calibrate ems"),
        ({"statistics": "none/of.safetensors"}, "none/of.safetensors cannot be read"),
        ({"statistics": {"low": 1.0}}, "statistics: high"),
        ({"statistics": inline(WAVY), "order": 5}, "orders 1, 2, 3 and 4"),
        ({"statistics": inline(WAVY), "corrector": "half"}, "pseudo, same, none"),
        ({"statistics": inline(WAVY), "warmth": 1}, "warmth"),
    ],
)
def test_what_cannot_be_is_refused(settings, told):
    with pytest.raises(BadInput, match=told):
        DPMSolverV3Scheduler(**settings, **TABLE)


def test_statistics_of_another_range_are_refused():
    scheduler = DPMSolverV3Scheduler(inline(table(1, 0, 0, 20, 30)), **TABLE)
    with pytest.raises(BadInput, match="only 0 of the 10 noise levels"):
        scheduler.set_timesteps(10)


# In pipelines


@pytest.mark.parametrize("name", ["sd15", "flux", "wan21"])
def test_as_a_method_of_a_plan(name):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    stock, before = numbers(tiny.call(pipe)), pipe.scheduler
    by_hand = tiny.build()
    by_hand.scheduler = DPMSolverV3Scheduler.from_config(before.config, statistics=inline(WAVY))
    with Plan(DPMSolverV3(numbers=WAVY.to_scalars(12))).attach(pipe) as attached:
        found = [numbers(tiny.call(pipe)) for _ in range(2)]
    assert torch.equal(*found)
    assert torch.equal(found[0], numbers(tiny.call(by_hand)))
    assert attached.report.verdicts["samplers.DPMSolverV3"].state == "ACTIVE"
    assert torch.equal(numbers(tiny.call(pipe)), stock)


def test_a_plan_without_statistics_says_what_to_do():
    pipe = PIPELINES["sd15"].build()
    before = pipe.scheduler
    with pytest.raises(UnsupportedModel, match=r"found neither.*accel calibrate ems"):
        Plan(DPMSolverV3()).attach(pipe)
    both = DPMSolverV3(numbers=WAVY.to_scalars(), statistics="ems.safetensors")
    with pytest.raises(UnsupportedModel, match="found both"):
        Plan(both).attach(pipe)
    assert pipe.scheduler is before


def test_numbers_of_a_plan_are_checked():
    for numbers_, told in (
        ({"low": 1, "high": 0, "l": (0, 0), "s": (0, 0), "b": (0, 0)}, "must be below high"),
        ({"low": 0, "high": 1, "l": (0, 0), "s": (0, 0, 0), "b": (0, 0)}, "of one length"),
        ({"low": 0, "high": 1, "l": (0,), "s": (0,), "b": (0,)}, "at least 2"),
        ({"low": 0, "high": math.inf, "l": (0, 0), "s": (0, 0), "b": (0, 0)}, "finite number"),
        ({"low": 0, "high": 1, "l": (0, math.inf), "s": (0, 0), "b": (0, 0)}, "finite number"),
    ):
        with pytest.raises(ValidationError, match=told):
            Scalars(**numbers_)


@pytest.mark.parametrize("ems", [LIKE_PP, WAVY], ids=["degenerate", "made up"])
@pytest.mark.parametrize("count", [8, 20])
def test_from_zero_terminal_snr_it_beats_first_order(ems, count):
    """The first level has α = 2⁻¹²: f, which is over α, would be noise there."""
    exact = mixture_solved(DPMSolverPPScheduler, 500)
    first = mixture_solved(DPMSolverPPScheduler, count, order=1)
    found = mixture_solved(DPMSolverV3Scheduler, count, statistics=inline(ems))
    assert (found - exact).norm() < 0.7 * (first - exact).norm()
