"""MagCache on two experts: its share of forced steps is of the steps of each."""

from types import SimpleNamespace

import pytest
from test_laws_counts import computed_steps
from test_trajectory import Holder

from accel import Plan, cache
from accel.cache.magnitude import parts

STEPS = 12


def served(bench, name, steps):
    """For each network of a pipeline, the steps of a run that it serves."""
    found = {}
    with Plan().attach(bench.pipe(name)) as run:
        undos = [
            denoiser.module.register_forward_pre_hook(
                lambda *_, name=denoiser.name: found.setdefault(name, set()).add(
                    run.trajectory.now.index
                )
            )
            for denoiser in run.denoisers
        ]
        bench.call(name, steps=steps)
    for handle in undos:
        handle.remove()
    return list(found.values())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("curve", [(), (1.0,) * STEPS], ids=["measured", "curve"])
def test_the_share_is_of_the_steps_of_each_expert(bench, share, curve):
    experts = served(bench, "wan22", STEPS)
    assert len(experts) == 2
    method = cache.MagCache(threshold=1e9, share=share, max_skips=0, curve=curve, last=False)
    with Plan(method).attach(bench.pipe("wan22")) as run:
        bench.call("wan22", steps=STEPS)
    expected = set()
    for steps in experts:
        forced = max(1 if curve else 2, int(share * len(steps) + 0.5))  # γ needs two computes
        expected |= set(sorted(steps)[:forced])
    assert all(found == expected for found in computed_steps(run, method).values())
    assert set(range(int(share * STEPS + 0.5))) - expected or share < 0.1, "not of the whole run"


@pytest.mark.parametrize("order", [1, 2])
def test_the_parts_of_a_run_are_on_the_two_sides_of_the_boundary(order):
    """In steps of the solver, from wherever an img2img run begins."""
    timesteps = [1000.0, 900.0, 800.0, 700.0, 600.0, 500.0]
    timesteps = [timesteps[0], *(t for t in timesteps[1:] for _ in range(order))]
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000))
    pipe = Holder(scheduler)
    pipe.config = {"boundary_ratio": 0.75}
    part = parts(SimpleNamespace(pipe=pipe, denoisers=(1, 2)))
    levels = SimpleNamespace(timesteps=timesteps)
    for begin in (0, order):
        total = len(timesteps) - begin
        turns = -(-total // order)
        for index in range(total):
            place = begin + index
            step = SimpleNamespace(
                index=index,
                position=place,
                turns=turns,
                order=order,
                levels=levels,
                timestep=timesteps[place],
            )
            high = 3 - begin // order
            expected = range(high) if timesteps[place] >= 750 else range(high, turns)
            assert part(step) == expected
