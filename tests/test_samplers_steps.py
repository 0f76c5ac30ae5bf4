"""`samplers.Steps`: a run under it is the same call with fewer steps."""

import itertools

import numpy as np
import pytest
import roster
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from tiny import PIPELINES

import accel
from accel import Plan
from samplers import DPMSolverPP, Schedule, Steps
from samplers.steps import _resampled

OWN = {"mochi"}
"""Its ramp is bent in another place for every number of steps."""


@roster.pipelines()
def test_half_of_the_steps_is_the_call_with_half_as_many(bench, name, same):
    found, report = bench.under(name, Plan(Steps(share=0.5)), steps=6)
    assert report.verdicts["samplers.Steps"].state == "ACTIVE"
    if name not in OWN:
        assert same(found, bench.stock(name, steps=3))


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_a_solver_and_a_schedule_see_the_smaller_number(bench, name, same):
    others = [DPMSolverPP(order=2)] + [Schedule()] * (name == "flux_cfg")
    alone, _ = bench.under(name, Plan(*others), steps=3)
    both, report = bench.under(name, Plan(Steps(share=0.5), *others), steps=6)
    assert same(alone, both)
    assert report.verdicts["samplers.Steps"].detail == "3 of 6 steps"


def test_a_share_that_leaves_all_steps_says_so(bench, same):
    with pytest.warns(accel.errors.AccelWarning, match="0.9 of 3 steps is 3"):
        pipe = bench.pipe("sd15")
        with Plan(Steps(share=0.9)).attach(pipe) as run:
            found = torch.as_tensor(PIPELINES["sd15"].call(pipe, steps=3))
    assert run.report.verdicts["samplers.Steps"].state == "INACTIVE"
    assert same(found, bench.stock("sd15", steps=3))


@given(st.integers(1, 60), st.floats(0.01, 1.0))
def test_there_is_always_one_step_and_never_more_than_asked_for(count, share):
    assert 1 <= Steps(share=share).of(count) <= count


@given(st.integers(2, 40), st.integers(1, 40))
def test_ramps_of_pipelines_are_made_anew_and_other_lists_keep_their_ends(before, after):
    after = min(after, before)
    ramp = np.linspace(1.0, 1 / before, before)
    assert np.array_equal(_resampled(ramp, after), np.linspace(1.0, 1 / after, after))
    own = sorted(np.random.default_rng(before).random(before), reverse=True)
    found = _resampled(own, after)
    assert isinstance(found, list) and len(found) == after
    assert found[0] == own[0] and (after == 1 or found[-1] == own[-1])
    assert all(a > b for a, b in itertools.pairwise(found))


def test_a_callers_own_list_is_thinned_out():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=_resampled([1.0, 0.8, 0.6, 0.3, 0.1], 3))
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.6, 0.1, 0.0])
