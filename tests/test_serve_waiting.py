"""How long jobs wait: the queue laid out over the devices, checked against a simulation by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.serve.waiting import Load, ends

SECONDS = st.integers(0, 9).map(float)
DEVICES = st.integers(1, 3).map(lambda count: [f"cuda:{number}" for number in range(count)])


def loads(prefix, seconds=SECONDS, **more):
    return st.lists(st.builds(Load, st.just(""), st.none(), seconds, **more), max_size=6).map(
        lambda made: [replace(load, job=f"{prefix}{at}") for at, load in enumerate(made)]
    )


def simulated(running, waiting, count):
    """Second by second: whoever is free takes the next job."""
    left, queue, now, found = [], [*waiting], 0, {}
    left = [[load.job, load.seconds] for load in running]
    while left or queue:
        for one in [one for one in left if one[1] <= 0]:
            found[one[0]] = now
            left.remove(one)
        while queue and len(left) < count:
            load = queue.pop(0)
            if load.seconds:
                left.append([load.job, load.seconds])
            else:
                found[load.job] = now
        for one in left:
            one[1] -= 1
        now += bool(left)
    return found


@given(DEVICES, st.data())
def test_the_next_job_goes_to_the_device_that_is_free_first(devices, data):
    running = data.draw(loads("r"))[: len(devices)]
    waiting = data.draw(loads("w"))
    assert ends(running, waiting, devices) == simulated(running, waiting, len(devices))


@given(loads("w"))
def test_on_one_device_they_go_one_after_another(waiting):
    found = ends([], waiting, [None])
    assert [found[load.job] for load in waiting] == [
        sum(load.seconds for load in waiting[: at + 1]) for at in range(len(waiting))
    ]


@given(DEVICES, loads("w", st.none() | SECONDS), st.data())
def test_what_gives_way_holds_up_nothing_but_its_like(devices, waiting, data):
    measuring = data.draw(loads("m", yields=st.just(True)))[: len(devices)]
    ahead, without = ends(measuring, waiting, devices), ends([], waiting, devices)
    assert all(ahead[load.job] == without[load.job] for load in waiting)
    assert all(ahead[load.job] == load.seconds for load in measuring)
    last = Load("last", None, 1.0, yields=True)
    after = ends(measuring, [*waiting, last], devices)["last"]
    freed = min((load.seconds for load in measuring), default=0.0)
    if len(measuring) == len(devices):
        assert after is None or after >= freed + 1.0


@given(DEVICES, loads("w"), st.data())
def test_a_job_for_one_device_waits_for_that_one_alone(devices, waiting, data):
    wanted = data.draw(st.sampled_from(devices))
    pinned = [replace(load, device=wanted) for load in waiting]
    found = ends([], [*pinned, Load("other", None, 1.0)], devices)
    assert [found[load.job] for load in pinned] == [
        sum(load.seconds for load in pinned[: at + 1]) for at in range(len(pinned))
    ]
    if len(devices) > 1:
        assert found["other"] == 1.0
    assert ends([], [Load("lost", "cuda:9", 1.0)], devices) == {"lost": None}


@pytest.mark.parametrize(("count", "eta"), [(1, None), (2, 2.0)])
def test_what_takes_an_unknown_time_holds_up_its_device(count, eta):
    devices = ["a", "b"][:count]
    found = ends([Load("r", None, None)], [Load("w", None, 2.0)], devices)
    assert found == {"r": None, "w": eta}
