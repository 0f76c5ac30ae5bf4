"""A run that is not the usual one: guidance cut in its middle, two evaluations a step, other sizes.

Right or refused by name, never wrong – for every cache.
"""

import contextlib
from collections import defaultdict
from functools import partial
from typing import get_args

import diffusers
import pytest
import torch
from roster import CORE, LEADERS, ROSTER, STEPS, full
from test_caches import followed, run_tapped
from test_guidance import CUTS, cut_at
from test_laws_counts import computed_steps, counting
from tiny import PIPELINES

from accel import Plan, cache, errors
from accel.cache.fields import StaticCache
from accel.cache.predictors import Kind
from accel.cache.step_rehash import fit_steps
from accel.cache.table import build_from

CACHES = {name: row for name, row in ROSTER.items() if "cache" in row.active.layer}

HEUN = {
    "sd15": diffusers.HeunDiscreteScheduler,
    "sd3": diffusers.FlowMatchHeunDiscreteScheduler,
}


def each(names, *, ci=CORE):
    """Every cache × the pipelines of ``names`` that it acts on."""
    return pytest.mark.parametrize(
        ("name", "method"),
        [
            pytest.param(
                name,
                row.active,
                id=f"{name}-{method}",
                marks=full(name not in ci and method not in LEADERS.values()),
            )
            for method, row in CACHES.items()
            for name in names
            if row.acts(PIPELINES[name])
        ],
    )


@each(CUTS)
def test_a_cache_follows_guidance_that_is_cut(bench, same, name, method):
    """2B rows become B: cond goes on with its own state, uncond is no longer computed."""
    call = {"steps": STEPS, "batch": 2, **cut_at(2, *CUTS[name])}
    pipe = bench.pipe(name)
    with counting(pipe) as counts:
        run = Plan(method).attach(pipe)
        output = bench.call(name, **call)
        run.detach()
    assert torch.isfinite(output).all()
    assert run.report.nfe == counts["network"] / 2
    events = run.report.to_dict()["events"][method.name]
    assert {branch for step, branch, *_ in events if step > 2} <= {"cond"}
    with Plan(method).attach(pipe):
        assert same(bench.call(name, **call), output)


@each(HEUN)
def test_two_evaluations_a_step(bench, same, name, method):
    """Heun evaluates twice a step, some levels twice: a cache keeps its laws or refuses."""
    pipe = bench.pipe(name)
    before = pipe.scheduler
    try:
        pipe.scheduler = HEUN[name].from_config(before.config)
        try:
            run = Plan(method).attach(pipe)
        except errors.AccelError as error:
            assert method.name in str(error)
            assert "Heun" in str(error)
            return
        with run:
            first = bench.call(name, steps=STEPS)
            saved = run.report.to_dict()["events"][method.name]
            assert same(bench.call(name, steps=STEPS), first)
        assert torch.isfinite(first).all()
        assert {step for step, *_ in saved} <= set(range(2 * STEPS - 1))
        if isinstance(method, StaticCache):
            assert whole_steps(saved) == set(range(0, STEPS, method.interval))
    finally:
        pipe.scheduler = before


def whole_steps(events):
    """Steps of the solver that are computed, in both stages; no other stage is."""
    states = defaultdict(set)
    for step, _, _, state in events:
        states[step // 2].add(state)
    assert all(len(found) == 1 for found in states.values()), "a step is computed whole or not"
    return {step for step, found in states.items() if found == {"computed"}}


class Heun:
    """A tiny pipeline with a solver of two evaluations a step, for as long as it is entered."""

    def __init__(self, bench, name):
        self.pipe = bench.pipe(name)
        self.kind = HEUN.get(name, diffusers.HeunDiscreteScheduler)

    def __enter__(self):
        self.before = self.pipe.scheduler
        self.pipe.scheduler = self.kind.from_config(self.before.config)

    def __exit__(self, *_):
        self.pipe.scheduler = self.before


def evaluations(turns, count=STEPS):
    """Both evaluations of some steps of Heun; its last step makes one."""
    return {2 * turn + stage for turn in turns for stage in (0, 1)} & set(range(2 * count - 1))


RULES = {
    "every": (cache.Custom(interval=2, last=False), {0, 2, 4}, set()),
    "every, last": (cache.Custom(interval=3), {0, 3}, {2 * STEPS - 3, 2 * STEPS - 2}),
    "warm-up, cap": (
        cache.Custom(rule="within", interval=9, low=-1e9, high=1e9, warmup=2, max_skips=2),
        {0, 1, 4},
        {2 * STEPS - 3, 2 * STEPS - 2},
    ),
    "series": (cache.TaylorSeer(interval=3, warmup=2, site="network"), {0, 1, 4}, set()),
    "listed": (cache.StepRehash(steps=(0, 1, 2, 3, 7)), {0, 1}, {7}),
    "table": (
        cache.Custom(rule="table", table=tuple("11110001000"), stretch=True, last=False),
        {0, 1},
        {7},
    ),
    "measured": (cache.EasyCache(threshold=1e9, warmup=2), {0, 1}, {9, 10}),
    "nonuniform": (cache.DeepCache(interval=2, schedule="nonuniform", power=1.0), {0, 2, 4}, set()),
}
"""A method, the steps of Heun that it computes in both stages, and single evaluations."""


@pytest.mark.parametrize(("method", "turns", "more"), RULES.values(), ids=RULES)
def test_rules_count_in_steps_of_the_solver(bench, method, turns, more):
    """`Every(2)` counted in evaluations would leave out each corrector and no predictor."""
    with Heun(bench, "sd15"), Plan(method).attach(bench.pipe("sd15")) as run:
        bench.call("sd15", steps=STEPS)
    expected = evaluations(turns) | more
    assert all(found == expected for found in computed_steps(run, method).values())


@pytest.mark.parametrize("predictor", get_args(Kind))
@pytest.mark.parametrize("name", HEUN)
def test_a_stage_is_filled_in_from_its_own_evaluations(bench, name, predictor):
    """Against predictors fed by hand, one for each stage."""
    method = cache.Custom(interval=2, warmup=2, last=False, predictor=predictor)
    with Heun(bench, name):
        seen, times, run = followed(bench, name, Plan(method), steps=STEPS)
    (computed,) = {frozenset(steps) for steps in computed_steps(run, method).values()}
    assert computed == evaluations({0, 1, 3, 5})
    stages = [method.forecast.make(), method.forecast.make()]
    for index, ((x, v), time) in enumerate(zip(seen, times, strict=True)):
        at = time if predictor == "newton" else index // 2
        follow = x if predictor == "reuse" else 0.0
        if index in computed:
            stages[index % 2].update(at, v - follow)
        else:
            expected = stages[index % 2].predict(at) + follow
            assert torch.allclose(v, expected, atol=1e-4, rtol=1e-4)


def test_what_blocks_add_is_kept_for_each_stage(bench):
    """The gain that a skipped stage is given is that of the same stage."""
    method = cache.FirstBlock(threshold=1e9, warmup=1, last=False)
    with Heun(bench, "pixart_sigma"):
        tap, through, _ = run_tapped(bench, "pixart_sigma", method, 4)
    gains = [
        sum(after - before for index, (before, after) in whole.items() if index > 0)
        for whole in tap.calls[:2]
    ]
    assert not torch.allclose(*gains, atol=1e-2)
    for index in range(2, 7):
        assert set(tap.calls[index]) == {0}
        expected = tap.calls[index][0][1] + gains[index % 2]
        assert torch.allclose(through.outputs[index][1], expected, atol=1e-4)


@pytest.mark.parametrize("method", [cache.FORA(interval=2), cache.DeepCache(interval=2)])
def test_what_is_kept_doubles_with_the_stages(bench, method):
    """Modules and deep features too: a predictor for each stage."""
    kept = []
    for scheduler in (contextlib.nullcontext(), Heun(bench, "sd15")):
        with scheduler, Plan(method).attach(bench.pipe("sd15")) as run:
            bench.call("sd15", steps=STEPS)
        kept.append(run.report.tallies[0].memory())
    assert kept[1] == 2 * kept[0] > 0


@pytest.mark.parametrize(
    ("name", "calibrate"),
    [("StepRehash", fit_steps), ("Table", partial(build_from, threshold=0.1))],
)
def test_a_list_is_not_calibrated_on_two_evaluations_a_step(bench, name, calibrate):
    with (
        Heun(bench, "sd15"),
        pytest.raises(errors.UnsupportedModel, match=rf"{name}: .*HeunDiscreteScheduler makes 2"),
    ):
        calibrate(bench.pipe("sd15"), [{}])


@pytest.mark.parametrize("name", HEUN)
@pytest.mark.parametrize("method", [m for m, row in CACHES.items() if row.dial])
def test_heun_is_stock_where_nothing_is_skipped(bench, same, name, method):
    row, pipe = ROSTER[method], bench.pipe(name)
    if not row.acts(PIPELINES[name]):
        pytest.skip("not served")
    before = pipe.scheduler
    try:
        pipe.scheduler = HEUN[name].from_config(before.config)
        stock = bench.call(name, steps=STEPS)
        run = Plan(row.dial(1e-12)).attach(pipe)
        output = bench.call(name, steps=STEPS)
        run.detach()
        assert same(output, stock)
    finally:
        pipe.scheduler = before
