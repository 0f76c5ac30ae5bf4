"""Law 4: no memory between samples. A sample is decided about as if it were alone."""

from itertools import pairwise

import pytest
import torch
from roster import ROSTER, STEPS, full, in_ci
from test_laws_counts import computed_steps
from tiny import PIPELINES, PROMPTS

from accel import Plan

BATCH = 3
FEW = ("sd15", "sd_controlnet", "sd3", "flux", "flux_cfg", "flux_controlnet", "pixart_sigma")
FEW += ("zimage", "wan21", "wan22")

DIALS = [
    pytest.param(tiny.name, name, id=f"{tiny.name}-{name}", marks=full(not in_ci(tiny, name, FEW)))
    for name, row in ROSTER.items()
    for tiny in PIPELINES.values()
    if row.dial and row.acts(tiny) and tiny.batchable
]
FORMS = [
    pytest.param(
        tiny.name, row.active, id=f"{tiny.name}-{name}", marks=full(not in_ci(tiny, name, FEW))
    )
    for name, row in ROSTER.items()
    for tiny in PIPELINES.values()
    if row.acts(tiny) and tiny.batchable and tiny.name not in row.unsteady
]


def parting(bench, name, row, seen):
    """A threshold at which the samples of a batch decide apart.

    At the first decision every sample has the same history, so the middle of the widest gap
    between their values there parts them.
    """
    run = Plan(row.dial(1.0 if row.branches else 1e-12)).attach(bench.pipe(name))
    seen.clear()
    bench.call(name, steps=STEPS, batch=BATCH)
    run.detach()
    values = sorted(seen[:BATCH])
    gap, low = max((high - low, low) for low, high in pairwise(values))
    assert gap > 1e-4 * abs(low), "too close for any threshold"
    return low + gap / 2


@pytest.mark.parametrize(("name", "method"), DIALS)
def test_samples_decide_as_if_alone(bench, gauged, name, method):
    row = ROSTER[method]
    plan = Plan(row.dial(parting(bench, name, row, gauged)))
    run = plan.attach(bench.pipe(name))
    together = bench.call(name, steps=STEPS, batch=BATCH)
    steps = computed_steps(run, *plan)
    apart = {frozenset(steps[row.leads, sample]) for sample in range(BATCH)}
    assert len(apart) > 1, "no sub-batch occurred"
    for sample in range(BATCH):
        alone = bench.call(name, steps=STEPS, **only(sample))
        mine = computed_steps(run, *plan)
        assert mine == {(b, 0): s for (b, k), s in steps.items() if k == sample}
        assert close(bench, name, together, alone, sample)
    run.detach()


@pytest.mark.parametrize(("name", "method"), FORMS)
def test_a_sample_is_the_same_in_company(bench, name, method):
    assert same_in_company(bench, name, Plan(method), range(BATCH), of=BATCH)


def same_in_company(bench, name, plan, samples, *, of):
    """Whether samples of a batch are what they are alone.

    In float32; where rounding may turn a choice of keys or tokens over, at least in float64.
    """

    def same(dtype):
        run = plan.attach(bench.pipe(name, dtype))
        together = bench.call(name, dtype=dtype, steps=STEPS, batch=of)
        alone = {k: bench.call(name, dtype=dtype, steps=STEPS, **only(k)) for k in samples}
        run.detach()
        return all(close(bench, name, together, alone[k], k, of=of, dtype=dtype) for k in samples)

    chooses = any(method.name.startswith(("attention.", "tokens.")) for method in plan)
    return same(torch.float32) or (chooses and same(torch.float64))


DECIDING = [case for case in FORMS if "cache." in case.id and case.values[1].approximates]
"""Caches that decide. Lossless ones reuse what is equal, and branches share some of it: sizes that
a network is told."""


@pytest.mark.parametrize(("name", "method"), DECIDING)
def test_the_branches_of_a_sample_go_together(bench, name, method):
    with Plan(method).attach(bench.pipe(name)) as run:
        bench.call(name, steps=STEPS, batch=2)
    steps = computed_steps(run, method)
    for sample in range(2):
        sets = [steps[branch, sample] for branch in PIPELINES[name].order if branch != "skip"]
        assert all(same == sets[0] for same in sets)


def only(sample):
    """The call that gives one sample of the batch alone."""
    return {"prompts": [PROMPTS[sample]], "seeds": [sample]}


def close(bench, name, together, alone, sample, *, of=BATCH, dtype=torch.float32):
    """Whether a sample is that of a batch, within what rounding does to the stock pipeline.

    Extrapolation magnifies rounding at every skipped step, and a solver that overshoots magnifies
    it with all values (rho-RK from the high σ of SVD does): a neighbour would show by hundredths.
    """
    exact = {} if dtype == torch.float32 else {"dtype": dtype}
    stock = bench.stock(name, steps=STEPS, batch=of, **exact)[sample]
    lone = bench.stock(name, steps=STEPS, **only(sample), **exact)[0]
    error, rounding = (together[sample] - alone[0]).abs().max(), (stock - lone).abs().max()
    grown = max(together[sample].abs().max() / stock.abs().max(), 1.0)
    finer = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    return error <= grown * (100 * rounding + 1e-5 * finer * stock.abs().max())
