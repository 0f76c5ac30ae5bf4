"""A run that is not the usual one: guidance cut in its middle, two evaluations a step, other sizes.

Right or refused by name, never wrong – for every cache.
"""

import diffusers
import pytest
import torch
from roster import CORE, LEADERS, ROSTER, STEPS, full
from test_guidance import CUTS, cut_at
from test_laws_counts import counting
from tiny import PIPELINES

from accel import Plan, errors

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
    finally:
        pipe.scheduler = before


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
