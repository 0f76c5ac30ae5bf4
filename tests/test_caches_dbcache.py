"""DBCache's caps: the sum of changes over skips, and which tokens count."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_caches import At

from accel import Plan, cache
from accel.cache.indicators import ProbeChange, relative_l1


@given(st.floats(0.01, 0.4), st.floats(0.05, 3.0))
def test_the_sum_of_changes_over_skips_is_capped(change, cap):
    """Every k-th step is computed, k the first number of steps whose changes reach the cap."""
    policy = cache.DBCache(threshold=0.5, accumulated=cap, warmup=1, last=False)._policy()
    computed = [index for index in range(40) if policy.compute(At(index), change)]
    gap = next(k for k in range(1, 400) if not sum([change] * k) < cap)
    assert computed == list(range(0, 40, gap))


def test_the_cap_is_beside_the_threshold_and_beside_listed_steps():
    method = cache.DBCache(threshold=0.5, accumulated=1.0, steps=(2, 9), warmup=1, last=False)
    policy, changes = method._policy(), [None, 0.4, 0.1, 0.4, 0.4, 0.4, 0.1, 0.6, 0.1, 0.1, 0.1]
    found = [index for index, change in enumerate(changes) if policy.compute(At(index), change)]
    assert found == [0, 2, 5, 7, 9]


def test_only_changed_tokens_count_where_there_are_any():
    old = torch.ones(4, 8)
    new = old.clone()
    new[0] += 0.5
    new[1] += 0.05

    def measured(above, residual):
        probe = ProbeChange(above)
        assert probe.measure(old) is None
        probe.learn(old)
        return probe.measure(residual).item()

    assert measured(0.0, new) == pytest.approx(0.55 / 4) == relative_l1(new, old).item()
    assert measured(0.01, new) == pytest.approx(0.55 / 2)
    assert measured(0.1, new) == pytest.approx(0.5)
    assert measured(0.9, new) == pytest.approx(0.55 / 4), "none: all of them"
    assert measured(0.1, old) == 0.0


def test_in_a_run_those_that_move_change_more_than_all_together(bench, gauged):
    values = []
    for changed in (0.0, 0.3):
        gauged.clear()
        method = cache.DBCache(threshold=1e-12, front=1, warmup=1, changed=changed)
        run = Plan(method).attach(bench.pipe("flux"))
        bench.call("flux", steps=6)
        run.detach()
        values.append(list(gauged))
    assert len(values[0]) == len(values[1]) == 5
    assert all(some >= every - 1e-6 for every, some in zip(*values, strict=True))
    assert values[0] != values[1]
