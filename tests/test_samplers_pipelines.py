"""Every sampler as the scheduler of every tiny pipeline, without a plan: served, or refused."""

import numpy as np
import pytest
import torch
from roster import full
from roster.solvers import ROWS, STATISTICS
from tiny import PIPELINES

import samplers
from accel import Plan
from accel.errors import BadInput, UnsupportedModel
from samplers.olss import first_order_rows
from samplers.sampler import TOKEN_TIMES, Sampler

STEPS = 3

SCHEDULERS = [name for name in samplers.__all__ if name.endswith("Scheduler")]
CI = (
    *("sd15", "sd_img2img", "pixart_sigma", "dit"),  # tables; from the middle; a learned variance
    *("cogvideox", "cogview4"),  # no signal at the start; sigmas and timesteps
    *("flux_schnell", "flux_cfg", "hunyuanvideo"),  # sigmas, with mu and without
    *("qwenimage", "ltx", "mochi", "sana", "wan22"),  # terminal, inverted, shared; two networks
)
"""One for each way to say what the levels are; `make laws-full` runs the others."""


def numbers(output):
    return torch.as_tensor(np.asarray(output)).float()


def first_order(pipe, tiny):
    """Numbers of OLSS for first order on the levels that the pipeline asks for; where that ends;
    whether it starts from pure noise.
    """
    pipe.scheduler = samplers.DPMSolverPPScheduler.from_config(pipe.scheduler.config, order=1)
    end = numbers(tiny.call(pipe, steps=STEPS))
    used = pipe.scheduler
    rows = first_order_rows(used.config.prediction_type, used._levels)
    weights = {"noise": [row[0] for row in rows], "outputs": [row[1:] for row in rows]}
    return weights, end, not used.begin_index


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=full(name not in CI)) for name in PIPELINES]
)
def test_every_sampler_makes_all_steps_or_says_why_not(bench, name):
    """Those that rest on numbers too: V3 with made-up ones, OLSS with those of first order."""
    tiny, pipe = PIPELINES[name], bench.pipe(name)
    stock = pipe.scheduler
    try:
        rows, end, whole = first_order(pipe, tiny)
        given = {
            "DPMSolverV3Scheduler": {"statistics": STATISTICS.model_dump()},
            "OLSSScheduler": rows,
        }
        for kind in SCHEDULERS:
            made = getattr(samplers, kind).from_config(stock.config, **given.get(kind, {}))
            pipe.scheduler = made
            if kind == "OLSSScheduler" and not whole:
                with pytest.raises(BadInput, match="a strength below 1"):
                    tiny.call(pipe, steps=STEPS)
                continue
            found = numbers(tiny.call(pipe, steps=STEPS))
            assert found.isfinite().all(), kind
            assert made.step_index == len(made.timesteps), kind
            if kind == "OLSSScheduler":
                assert (found - end).abs().max() < 1e-4 * end.abs().max()
    finally:
        pipe.scheduler = stock


@pytest.mark.parametrize("pipeline", TOKEN_TIMES)
def test_no_sampler_attaches_where_each_token_has_a_noise_level(pipeline):
    pipe = PIPELINES["ltx"].build()
    methods = [row.active for row in ROWS.values() if isinstance(row.active, Sampler)]
    assert len(methods) > 8
    for method in methods:
        Plan(method).attach(pipe).detach()
    pipe.__class__ = type(pipeline, (type(pipe),), {})
    before = pipe.scheduler
    for method in methods:
        with pytest.raises(UnsupportedModel, match=f"leave {method.name} out of the plan"):
            Plan(method).attach(pipe)
        assert pipe.scheduler is before


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_samplers_that_rest_on_numbers_say_so_without_any(bench, name):
    """`from_config` with no plan: refused before or at the first run, with what to do."""
    pipe = bench.pipe(name)
    stock = pipe.scheduler
    with pytest.raises(BadInput, match="accel calibrate ems"):
        samplers.DPMSolverV3Scheduler.from_config(stock.config)
    pipe.scheduler = samplers.OLSSScheduler.from_config(stock.config)
    try:
        with pytest.raises(BadInput, match="accel calibrate olss"):
            bench.call(name, steps=STEPS)
    finally:
        pipe.scheduler = stock
