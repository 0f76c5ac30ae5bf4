"""Law 6: honest counts. What a report says is what really ran, and what theory says ran."""

from collections import Counter, defaultdict
from contextlib import contextmanager

import pytest
from roster import CI, CORE, ROSTER, STEPS, cases, full, pipelines
from tiny import PIPELINES

from accel import Plan, cache, guidance
from accel.seams.blocks import find_blocks
from accel.seams.denoisers import find_denoisers


@contextmanager
def counting(pipe):
    """Count, below everything of ours, the rows that networks and blocks really compute."""
    counts = Counter()
    undos = []

    def watch(module, label, sample):
        inner = module.forward

        def forward(*args, **kwargs):
            rows = kwargs[sample] if sample in kwargs else args[0]
            counts[label] += len(rows)
            counts[f"{label} calls"] += 1
            return inner(*args, **kwargs)

        forward.__wrapped__ = inner
        module.forward = forward
        undos.append(lambda: delattr(module, "forward"))

    for denoiser in find_denoisers(pipe):
        watch(denoiser.module, "network", denoiser.sample_name)
        if denoiser.name != "unet":
            for block in find_blocks(denoiser):
                watch(block.module, f"block {block.index}", block.hidden)
    try:
        yield counts
    finally:
        for undo in undos:
            undo()


@cases(CI)
def test_nfe_is_what_ran(bench, name, method):
    pipe = bench.pipe(name)
    with counting(pipe) as counts, Plan(method).attach(pipe) as run:
        bench.call(name, steps=STEPS, batch=2)
    assert run.report.samples == 2
    assert run.report.nfe == counts["network"] / 2
    assert run.report.calls == counts["network calls"]
    with counting(pipe) as stock:
        bench.call(name, steps=STEPS, batch=2)
    saves = method.seam in ("denoiser", "branches", "steps")
    assert (counts["network"] < stock["network"]) == saves


@pipelines(CI)
def test_an_empty_plan_counts_too(bench, name):
    pipe = bench.pipe(name)
    with counting(pipe) as counts, Plan().attach(pipe) as run:
        bench.call(name, steps=STEPS, batch=2)
    assert run.report.nfe == counts["network"] / 2


@pipelines(CI, where=lambda tiny: tiny.blocks != "unet")
def test_the_first_block_always_runs_and_the_others_when_computed(bench, name):
    method = cache.FirstBlock(threshold=1e6, max_skips=2)
    pipe = bench.pipe(name)
    with counting(pipe) as stock:
        bench.call(name, steps=7)
    with counting(pipe) as counts, Plan(method).attach(pipe) as run:
        bench.call(name, steps=7)
    computed = sum(state == "computed" for *_, state in events(run, method))
    assert 0 < computed < len(events(run, method))
    assert counts["block 0"] == stock["block 0"]
    missed = [
        stock[key] - counts[key] for key in stock if key.startswith("block ") and key[-1] != "s"
    ]
    skipped = len(events(run, method)) - computed
    # a layer that skip-layer guidance leaves out does not run there in any case
    assert max(missed) == skipped


# Closed forms: which steps are computed where a threshold decides nothing.


def kept_up(total, warmup, max_skips, last):
    """The steps that guards alone compute."""
    steps, skips = set(), 0
    for step in range(total):
        if step < warmup or (last and step == total - 1) or 0 < max_skips <= skips:
            steps.add(step)
            skips = 0
        else:
            skips += 1
    return steps


def events(run, method):
    return run.report.to_dict()["events"][method.name]


def computed_steps(run, method):
    """Steps that were computed, by branch and sample."""
    steps = defaultdict(set)
    for step, branch, sample, state in events(run, method):
        steps[branch, sample]  # one that never computes counts as empty
        if state == "computed":
            steps[branch, sample].add(step)
    return steps


GUARDS = [(2, 0, True), (3, 1, True), (2, 2, False), (4, 0, False)]
CLOSED = ("sd15", "sd3", "flux_cfg", "flux_controlnet", "flux_img2img", "pixart_sigma", "zimage")
CACHES = [
    pytest.param(tiny.name, kind, marks=full(tiny.name not in CLOSED))
    for kind in (cache.EasyCache, cache.FirstBlock)
    for tiny in PIPELINES.values()
    if ROSTER[kind.name].serves(tiny) and len(tiny.denoisers) == 1
]


@pytest.mark.parametrize("guards", GUARDS, ids=str)
@pytest.mark.parametrize(("name", "kind"), CACHES)
def test_a_cache_computes_what_its_guards_say(bench, name, kind, guards):
    warmup, max_skips, last = guards
    method = kind(threshold=1e9, warmup=warmup, max_skips=max_skips, last=last)
    with Plan(method).attach(bench.pipe(name)) as run:
        bench.call(name, steps=9, batch=2)
    steps = computed_steps(run, method)
    expected = kept_up(run.report.steps, warmup, max_skips, last)
    branches = set(PIPELINES[name].order) - {"skip"}  # which is not there at every step
    assert {key: steps[key] for key in steps if key[0] in branches} == {
        (branch, sample): expected for branch in branches for sample in range(2)
    }


@pytest.mark.parametrize(("kind", "needs"), [(cache.EasyCache, 2), (cache.FirstBlock, 1)])
def test_state_is_per_denoiser(bench, kind, needs):
    """Wan 2.2 hands over to a second network, which computes first what it must know."""
    method = kind(threshold=1e9, warmup=2)
    pipe = bench.pipe("wan22")
    with Plan(method).attach(pipe) as run:
        bench.call("wan22", steps=10)
    switch = switch_of(pipe)
    assert 2 < switch < 8
    expected = {0, 1, *range(switch, switch + needs), 9}
    assert all(steps == expected for steps in computed_steps(run, method).values())


def switch_of(pipe):
    """The first step of the second network."""
    boundary = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
    return sum(bool(timestep >= boundary) for timestep in pipe.scheduler.timesteps)


@pytest.mark.parametrize("guided", [1, 3])
@pipelines(CI, where=lambda tiny: len(tiny.order) == 2)
def test_adaptive_evaluates_a_branch_a_step_and_guidance_while_guided(bench, name, guided):
    method = guidance.Adaptive(threshold=-1.0, min_steps=guided, min_guided=0.0)
    with Plan(method).attach(bench.pipe(name)) as run:
        bench.call(name, steps=STEPS)
    assert run.report.nfe == run.report.steps + guided
    with Plan(guidance.Adaptive(threshold=-1.0, min_steps=0, min_guided=0.5)).attach(
        bench.pipe(name)
    ) as run:
        bench.call(name, steps=STEPS)
    assert run.report.nfe == run.report.steps + -(-run.report.steps // 2)


@pytest.mark.parametrize("low, high", [(0.0, 2.0), (0.6, 8.0), (1.0, float("inf"))])
@pipelines(CI, where=lambda tiny: len(tiny.order) == 2)
def test_interval_guides_the_noise_levels_inside(bench, name, low, high):
    sigmas = []

    class Watching(guidance.Interval):
        name = "guidance.Watching"

        def attach(self, site):
            yield from super().attach(site)
            yield site.on_step(lambda step, _: sigmas.append(step.sigma))

    method = Watching(low=low, high=high)
    run = Plan(method).attach(bench.pipe(name))
    bench.call(name, steps=8)
    run.detach()
    inside = sum(low < sigma <= high for sigma in sigmas)
    assert run.report.nfe == len(sigmas) + inside


@pytest.mark.parametrize("name", CORE)
def test_a_method_that_does_nothing_counts_what_stock_does(bench, name):
    pipe = bench.pipe(name)
    with counting(pipe) as stock:
        bench.call(name, steps=STEPS)
    run = Plan(cache.EasyCache(threshold=1e-9, warmup=2)).attach(pipe)
    bench.call(name, steps=STEPS)
    run.detach()
    assert run.report.nfe == stock["network"]
    assert run.report.verdicts["cache.EasyCache"].state == "INACTIVE"
