"""What is kept is valid for the conditions it was computed under: control that ends, scales."""

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
from test_caches import followed
from test_laws_counts import computed_steps

from accel import Plan, cache, hooks
from accel.cache.conditions import Watch
from accel.cache.predictors import Forecast
from accel.cache.step_rehash import StepRehash

STEPS = 6
END = 3
"""The first step without control at control_guidance_end = 0.5."""

CONTROLLED = {"sd_controlnet": 1, "sd3_controlnet": 1, "flux_controlnet": 2}
"""Pipelines with a ControlNet, with the calls that each makes a step."""

NETWORK = {
    "EasyCache": cache.EasyCache(threshold=1e9, warmup=2, last=False),
    "EasyCache reuse": cache.EasyCache(threshold=1e9, warmup=2, last=False, predictor="reuse"),
    "StepRehash": StepRehash(steps=(0, 1)),
    "Custom": cache.Custom(interval=99, last=False, predictor="newton", damping=0.0),
    "TaylorSeer": cache.TaylorSeer(interval=99, warmup=2, site="network"),
    "HiCache": cache.HiCache(interval=99, site="network"),
    "FoCa": cache.FoCa(interval=99, site="network"),
    "DMD": cache.DMD(interval=99),
}
"""Every cache around the whole network; each would never compute again by itself."""

MEASURED = ("EasyCache", "EasyCache reuse")
"""Those whose indicator begins anew, and so computes one step more."""

SOLVER = {
    "ZEUS": cache.ZEUS(start=0.0, stop=1.0, interval=9, max_skips=9),
    "SADA": cache.SADA(start=0.0, stop=1.0, lagrange=0.0, every=9, nodes=1, max_skips=9),
}


def ended(bench, name, method):
    """What is answered in a run whose control ends in the middle, call by call, and its report."""
    seen, times, run = followed(bench, name, Plan(method), steps=STEPS, control_guidance_end=0.5)
    return seen, times, computed_steps(run, method)


@pytest.mark.parametrize("name", CONTROLLED)
@pytest.mark.parametrize("method", NETWORK)
def test_the_step_where_control_ends_is_computed_and_nothing_older_is_used(bench, name, method):
    seen, times, steps = ended(bench, name, NETWORK[method])
    for found in steps.values():
        assert min(step for step in found if step >= END) == END
        assert (
            {step for step in found if step >= END} == {END, END + 1}
            if method in MEASURED
            else {END}
        )
    forecast: Forecast = NETWORK[method].forecast
    calls, computed = CONTROLLED[name], next(iter(steps.values()))
    for call in range(calls):
        predictor = forecast.make()
        for step in range(END, STEPS):
            x, v = seen[step * calls + call]
            position = times[step * calls + call] if forecast.kind == "newton" else float(step)
            follow = x if forecast.kind == "reuse" else 0.0
            if step in computed:
                predictor.update(position, v - follow)
            else:
                assert torch.allclose(v, predictor.predict(position) + follow, atol=1e-5)


@pytest.mark.parametrize("name", CONTROLLED)
@pytest.mark.parametrize("method", SOLVER)
def test_solver_coupled_caches_compute_where_control_ends(bench, name, method):
    *_, steps = ended(bench, name, SOLVER[method])
    with Plan(SOLVER[method]).attach(bench.pipe(name)) as run:
        bench.call(name, steps=STEPS)
    assert all(END not in found for found in computed_steps(run, SOLVER[method]).values())
    assert all(END in found for found in steps.values())


SITES = (
    ("sd_controlnet", cache.FORA(interval=99)),
    ("sd_controlnet", cache.DeepCache(interval=99)),
    ("flux_controlnet", cache.FORA(interval=99)),
    ("flux_controlnet", cache.FirstBlock(threshold=1e9)),
)


@pytest.mark.parametrize(("name", "method"), SITES, ids=lambda one: getattr(one, "name", one))
def test_every_site_follows_and_steady_control_changes_nothing(bench, name, method):
    """Stack residuals, module outputs and deep features hold the control's effect too."""
    for call, expected in (({"control_guidance_end": 0.5}, {END}), ({}, set())):
        with Plan(method).attach(bench.pipe(name)) as run:
            bench.call(name, steps=STEPS, **call)
        late = [found & set(range(2, STEPS - 1)) for found in computed_steps(run, method).values()]
        assert late
        assert all(found == expected for found in late)


def test_a_rescaled_control_is_computed_once_for_each_scale(bench):
    """The scale is read where the pipeline gives it to its ControlNet; no device is read."""
    name, method = "sd_controlnet", cache.Custom(interval=99, last=False)
    pipe, scales = bench.pipe(name), iter([1.0, 0.5, 0.5, 0.25, 0.25, 1.0])

    inner = pipe.controlnet.__class__.__call__

    class Scheduled(type(pipe.controlnet)):
        def __call__(self, *args, **kwargs):
            return inner(self, *args, **kwargs | {"conditioning_scale": next(scales)})

    kind = type(pipe.controlnet)
    pipe.controlnet.__class__ = Scheduled
    try:
        with Plan(method).attach(pipe) as run:
            bench.call(name, steps=STEPS)
    finally:
        pipe.controlnet.__class__ = kind
    assert all(found == {0, 1, 3, 5} for found in computed_steps(run, method).values())


class ACall(SimpleNamespace):
    """As a call, it can be referred to weakly."""


def a_call(**arguments):
    raw = arguments.get("sample", torch.ones(2, 4, 8, 8))
    return ACall(denoiser=SimpleNamespace(name="unet"), arguments=arguments, raw=raw)


def test_conditions_are_what_is_given_and_numbers_not_time_or_values_of_tensors():
    watch, x = Watch(), torch.ones(2)
    usual = watch.of(a_call(sample=x, timestep=3, residuals=None, more={"scale": 1.0}))
    assert watch.of(a_call(sample=x + 1, timestep=2, more={"scale": 1.0})) == usual
    assert watch.of(a_call(sample=x, residuals=[x], more={"scale": 1.0})) != usual
    assert watch.of(a_call(sample=x, more={"scale": 0.5})) != usual
    assert watch.of(a_call(sample=x, more={})) != usual


def test_a_picture_of_another_size_is_another_condition_and_more_rows_are_not():
    watch, x = Watch(), torch.ones(2, 4, 8, 8)
    usual = watch.of(a_call(sample=x))
    assert watch.of(a_call(sample=x[:1])) == usual
    assert watch.of(a_call(sample=list(x))) == usual
    assert watch.of(a_call(sample=x[..., :4])) != usual


def test_the_scale_of_an_ip_adapter_is_a_condition(bench):
    """Set on the attention processors, as `set_ip_adapter_scale` does, in the midst of a run."""
    pipe, method = bench.pipe("sd15"), cache.Custom(interval=99, last=False)
    processor = next(iter(pipe.unet.attn_processors.values()))
    processor.scale = [1.0]

    def rescale(inner, *args, **kwargs):
        if run.trajectory.index == 2:
            processor.scale = [0.4]
        return inner(*args, **kwargs)

    run = Plan(method).attach(pipe)
    undo = hooks.wrap(pipe.scheduler, "step", rescale)
    bench.call("sd15", steps=STEPS)
    undo()
    run.detach()
    del processor.scale
    assert all(found == {0, 3} for found in computed_steps(run, method).values())


def test_no_call_is_held_and_each_is_looked_at_once():
    """A call holds latents and residuals: what was read of it outlives it, not the call itself."""
    watch, call = Watch(), a_call(sample=torch.ones(2), scale=1.0)
    found = watch.of(call)
    assert watch.of(call) is found
    gone = weakref.ref(call)
    del call
    assert gone() is None
    assert watch.of(a_call(sample=torch.ones(2), scale=2.0)) != found


def test_residuals_may_be_numbered():
    """Z-Image's ControlNet gives a dict by number of block."""
    given, other = (a_call(control={0: torch.zeros(1), 4: scale}) for scale in (1.5, 2.5))
    assert Watch().of(given) != Watch().of(other)


def test_a_copy_of_a_controlnet_says_nothing_to_the_original(bench):
    pipe = bench.pipe("sd_controlnet")
    watch = Watch()
    undo = watch._follow(pipe.controlnet)
    copied = copy.deepcopy(pipe.controlnet)
    for one, heard in ((copied, None), (pipe.controlnet, 0.25)):
        for hear in one._forward_pre_hooks.values():
            hear(one, (), {"conditioning_scale": 0.25})
        assert watch._scale == heard
    undo()
    assert len(copied._forward_pre_hooks) == 1 and not pipe.controlnet._forward_pre_hooks
