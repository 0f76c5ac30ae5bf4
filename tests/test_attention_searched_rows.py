"""Whose tensors a part of a network is given: the rows that are being computed say so."""

from functools import partial

import pytest

from accel import Plan, cache
from accel.cache.decisions import Decisions
from accel.seams.blocks import wrap_call
from accel.seams.modules import find_modules

SPLITTING = {
    "network": cache.Custom(site="network", rule="interval", interval=2),
    "blocks": cache.Custom(site="blocks", front=1),
    "modules": cache.Custom(site="modules"),
    "deep branch": cache.Custom(site="deep branch"),
}


def in_turns(decisions, call, values):
    """Decide for each sample apart, whatever is measured: even ones at even steps."""
    for sample in values:
        state = decisions.sample(call, sample)
        state.compute = (sample + call.step.index) % 2 == 0
        state.decided = call.step.index


@pytest.mark.parametrize(
    ("name", "place"),
    [("sd15", "deep branch"), ("sd15", "network")]
    + [(name, "blocks") for name in ("sd3", "flux_cfg", "wan22")]
    + [("sd3", "modules"), ("wan22", "network")],
)
def test_the_rows_that_are_computed_are_those_that_a_module_is_given(
    bench, monkeypatch, name, place
):
    monkeypatch.setattr(Decisions, "decide", in_turns)
    pipe, seen, undos = bench.pipe(name), [], []
    with Plan(SPLITTING[place]).attach(pipe) as run:

        def look(module, inner, *args, **kwargs):
            given = next(x for x in (*args, *kwargs.values()) if hasattr(x, "shape"))
            rows = module.denoiser.rows
            assert len(given) == len(rows)
            seen.append({row.sample for row in rows})
            return inner(*args, **kwargs)

        for denoiser in run.denoisers:
            for module in find_modules(denoiser):
                undos.append(wrap_call(module.module, partial(look, module)))
        bench.call(name, steps=4, batch=2)
        assert all(denoiser.rows == () for denoiser in run.denoisers)
        for undo in undos:
            undo()
    assert {0} in seen or {1} in seen, "no call was for some samples only"
