"""Caches over runs of other lengths, cut schedules, cut guidance, and pipelines with a second call.

Where a rule has a closed form the steps are counted; where values are filled in they are compared
with a reference made by hand, one branch of one sample at a time.
"""

import pytest
import torch
from roster import ROSTER, full, off_plans
from test_guidance import CUTS, cut_at
from test_laws_counts import computed_steps, counting
from tiny import PIPELINES, videos

from accel import Plan, cache, errors, hooks
from accel.seams.blocks import find_blocks
from accel.seams.denoisers import find_denoisers

CACHES = {name: row.active for name, row in ROSTER.items() if name.startswith("cache.")}


# A plan of one length used for another.


def every(interval, *, last):
    return lambda total: {*range(0, total, interval), *([total - 1] if last else [])}


def listed(*steps):
    return lambda total: {*steps, total - 1}


def after_two(interval):
    """Two steps of warm-up, then every ``interval``-th, and the last one."""
    return lambda total: {0, *range(1, total, interval), total - 1}


CLOSED = {
    "cache.Custom": after_two(3),
    "cache.DBCache": listed(0),
    "cache.DMD": every(2, last=False),
    "cache.DeepCache": every(3, last=False),
    "cache.DeltaDiT": every(2, last=False),
    "cache.EasyCache": listed(0, 1),
    "cache.FORA": every(2, last=False),
    "cache.FirstBlock": listed(0),
    "cache.FoCa": every(2, last=False),
    "cache.HiCache": every(2, last=False),
    "cache.MagCache": after_two(4),  # γ is known from two computed steps; then K = 3
    "cache.PAB": every(2, last=True),  # of joint attention alone on Flux, of self-attention
    "cache.SADA": lambda total: {0, *range(1, total, 2)},  # the nodes
    "cache.StepRehash": lambda _: {0, 1, 3},
    "cache.Table": lambda total: {k for k in range(total) if round(3 * k / (total - 1)) == 0},
    "cache.TaylorSeer": every(2, last=False),
    "cache.TeaCache": every(6, last=True),
    "cache.TextKV": None,  # skips no step
    "cache.ZEUS": lambda total: {0, 1, *range(3, total, 3)},
}
"""The steps that the active form of the roster computes in a run of ``total``."""


def test_every_cache_has_a_closed_form_or_none():
    assert CLOSED.keys() == CACHES.keys()


def place(method):
    """The cheapest tiny pipeline that a cache acts on."""
    return next(n for n in ("flux", "sd15") if ROSTER[method].acts(PIPELINES[n]))


@pytest.mark.parametrize(
    "lengths", [(6, 11), pytest.param((28, 50), marks=full(True))], ids=lambda pair: f"{pair[1]}"
)
@pytest.mark.parametrize("method", CACHES)
def test_one_plan_serves_runs_of_any_length_size_and_batch(bench, same, method, lengths):
    """A 28-step plan used for 50 steps, another resolution, another batch: attached once."""
    name, (short, long) = place(method), lengths
    calls = [
        {"steps": short},
        {"steps": long},
        {"steps": short, "height": 64},
        {"steps": short, "batch": 3},
    ]
    with Plan(CACHES[method]).attach(bench.pipe(name)) as run:
        first = bench.call(name, **calls[0])
        for call in calls:
            output = bench.call(name, **call)
            assert run.report.steps == call["steps"]
            check_steps(run, CACHES[method], call)
            if ROSTER[method].lossless:
                assert same(output, bench.stock(name, **call))
        assert same(bench.call(name, **calls[0]), first)


def check_steps(run, method, call):
    closed = CLOSED[method.name]
    if closed is not None:
        steps = computed_steps(run, method)
        assert {sample for _, sample in steps} == set(range(call.get("batch", 1)))
        assert set(map(frozenset, steps.values())) == {frozenset(closed(call["steps"]))}


LISTS = {
    "StepRehash": cache.StepRehash(steps=(0, 1, 3), total=6),
    "Table": cache.Table(steps=("1111", *["0000"] * 5), by="kind"),
}
"""What is a list of steps for one length, and says so."""


@pytest.mark.parametrize("method", LISTS.values(), ids=LISTS)
def test_a_list_for_one_length_refuses_another(bench, same, method):
    with Plan(method).attach(bench.pipe("flux")) as run:
        first = bench.call("flux", steps=6)
        with pytest.raises(
            errors.UnsupportedModel, match=r"runs of 6 evaluations; this one has 11"
        ):
            bench.call("flux", steps=11)
        assert same(bench.call("flux", steps=6), first)
    assert run.report.verdicts[method.name].state == "ACTIVE"


def test_a_curve_of_one_length_serves_another(bench):
    """MagCache's γ is that of the nearest calibrated step: here 2 in the last quarter."""
    curve = (*[1.0] * 21, *[2.0] * 7)
    method = cache.MagCache(threshold=0.5, share=0.2, curve=curve, max_skips=0, last=False)
    with Plan(method).attach(bench.pipe("flux")) as run:
        for total in (28, 50):
            bench.call("flux", steps=total)
            forced = set(range(int(0.2 * total + 0.5)))
            grown = {k for k in range(total) if round(k * 27 / (total - 1)) >= 21}
            assert computed_steps(run, method)["cond", 0] == forced | grown


# Picture to picture: shares are of the steps that really run.

HALVED = {
    "MagCache share": (
        cache.MagCache(threshold=1e9, share=0.5, curve=(1.0,), max_skips=0, last=False),
        {0, 1, 2},
    ),
    "SADA start": (
        cache.SADA(start=0.5, stop=1.0, lagrange=0.0, every=2, nodes=1),
        {0, 1, 2, 3, 5},
    ),
    "SADA stop": (
        cache.SADA(start=0.0, stop=0.5, lagrange=0.0, every=2, nodes=1),
        {0, 1, 3, 4, 5},
    ),
    "ZEUS start": (cache.ZEUS(start=0.5, stop=1.0), {0, 1, 2, 3}),
    "ZEUS stop": (cache.ZEUS(start=0.0, stop=0.5), {0, 1, 3, 4, 5}),
    "DeepCache nonuniform": (
        # c = 3; two nodes between −√3 and √3 at ∓√3/3, squared 1/3: floor(3 ∓ 1/3)
        cache.DeepCache(interval=2, schedule="nonuniform", centre=0.5, power=2.0),
        {0, 2, 3},
    ),
    "Table stretch": (
        cache.Table(steps=("1111", "0000", "1111"), by="kind", stretch=True),
        {0, 1, 4, 5},
    ),
}
"""With the steps that are computed of 6: 12 steps at strength 0.5."""


@pytest.mark.parametrize("name", ["sd_img2img", "flux_img2img"])
@pytest.mark.parametrize(("method", "expected"), HALVED.values(), ids=HALVED)
def test_shares_are_of_the_steps_that_a_strength_leaves(bench, name, method, expected):
    if not ROSTER[method.name].acts(PIPELINES[name]):
        pytest.skip("not served")
    with Plan(method).attach(bench.pipe(name)) as run:
        bench.call(name, steps=12, strength=0.5)
    assert run.report.steps == 6
    steps = computed_steps(run, method)
    assert set(steps) == {(branch, 0) for branch in PIPELINES[name].order}
    assert all(found == expected for found in steps.values())


def test_delta_dit_switches_in_the_middle_of_what_a_strength_leaves(bench):
    """Odd steps are skipped: 1 leaves out the rear, 3 and 5 the front."""
    pipe, name = bench.pipe("flux_img2img"), "flux_img2img"
    method = cache.DeltaDiT(interval=2, share=0.25, boundary=0.5)
    with counting(pipe) as counts, Plan(method).attach(pipe):
        bench.call(name, steps=12, strength=0.5)
    blocks = len(find_blocks(find_denoisers(pipe)[0]))
    ran = [counts[f"block {index}"] for index in range(blocks)]
    assert ran == [4, *[6] * (blocks - 2), 5]


# One branch of one sample alone, by hand.


class Alone:
    """What each row of a run's calls must be, from a bare network given that row alone.

    Args:
        pipe: A pipeline without a plan, of the weights of the one that ran.
        whole: Whether the cache fills in the whole network's v − x; else what the blocks behind the
            first one add to their streams.
    """

    def __init__(self, pipe, whole):
        self._network = pipe.transformer
        self._blocks = find_blocks(find_denoisers(pipe)[0])
        self._whole = whole
        self._kept = {}

    def row(self, key, arguments, computed):
        """The answer for a row, with what was kept of the same branch and sample (``key``)."""
        if self._whole:
            x = arguments["hidden_states"]
            if computed:
                self._kept[key] = self._network(**arguments)[0] - x
            return x + self._kept[key]
        undos = [block.wrap(self._block(key, block, computed)) for block in self._blocks[1:]]
        if computed:
            self._kept[key] = {}
        try:
            return self._network(**arguments)[0]
        finally:
            for undo in undos:
                undo()

    def _block(self, key, block, computed):
        def run(inner, *args, **kwargs):
            streams, gains = block.inputs(block.bind(args, kwargs)), self._kept[key]
            if computed:
                returned = inner(*args, **kwargs)
                after = block.outputs(returned)
                gains[block.index] = {name: after[name] - streams[name] for name in after}
                return returned
            gained = gains[block.index].items()
            return block.returns({name: streams[name] + gain for name, gain in gained})

        return run


def recorded(pipe, run):
    """The calls that the pipeline makes of its network, above the plan: arguments and answers."""
    calls = []

    def note(inner, *args, **kwargs):
        answer = inner(*args, **kwargs)
        calls.append((run.trajectory.now.index, dict(kwargs), answer[0].clone()))
        return answer

    return calls, hooks.wrap(pipe.transformer, "forward", note)


def taken(arguments, row, count):
    """The arguments of one row."""
    return {
        name: value[row : row + 1] if torch.is_tensor(value) and len(value) == count else value
        for name, value in arguments.items()
    }


def branches_of(arguments, batch):
    """The branch and sample of each row, as SD3's pipeline stacks them."""
    rows = len(arguments["hidden_states"])
    if arguments.get("skip_layers") is not None:
        names = ["skip_layers"]
    else:
        names = ["uncond", "cond"] if rows == 2 * batch else ["cond"]
    return [(name, sample) for name in names for sample in range(batch)]


BY_HAND = {
    "FirstBlock": cache.FirstBlock(threshold=0.3, warmup=1, last=False),
    "FirstBlock always": cache.FirstBlock(threshold=1e9, warmup=2, max_skips=2, last=False),
    "EasyCache": cache.EasyCache(threshold=0.3, warmup=2, predictor="reuse", last=False),
}
AT = {"sd35_skip_layer": {"batch": 1}, "sd3": {"batch": 2, **cut_at(3, *CUTS["sd3"])}}
"""A third branch that comes and goes; guidance that ends behind step 3."""


@pytest.mark.parametrize("name", AT)
@pytest.mark.parametrize("method", BY_HAND.values(), ids=BY_HAND)
def test_each_branch_is_what_it_is_alone(bench, name, method):
    """Computed or filled in, a row is what the bare network, or its own kept value, makes of it."""
    pipe, batch = bench.pipe(name), AT[name]["batch"]
    run = Plan(method).attach(pipe)
    calls, undo = recorded(pipe, run)
    bench.call(name, steps=10, **AT[name])
    undo()
    run.detach()
    events = run.report.to_dict()["events"][method.name]
    states = {(step, branch, sample): state for step, branch, sample, state in events}
    reference = Alone(PIPELINES[name].build(), whole=method.seam == "denoiser")
    seen = set()
    with torch.no_grad():
        for step, arguments, answer in calls:
            rows = branches_of(arguments, batch)
            for index, key in enumerate(rows):
                computed = states[step, *key] == "computed"
                expected = reference.row(key, taken(arguments, index, len(rows)), computed)
                assert torch.allclose(answer[index], expected[0], rtol=0, atol=1e-4)
                seen.add((key[0], step > 3, computed))
    assert {("cond", True, True), ("cond", True, False)} <= seen
    branches = {branch for branch, *_ in seen}
    assert branches == {"uncond", "cond", *(["skip_layers"] if "skip" in name else [])}


# Wan VACE: control enters between the blocks.


def idle(method):
    """A cache with all its machinery in place that skips nothing in a few steps."""
    fields = type(method).model_fields
    if "warmup" in fields:
        return method.model_copy(update={"warmup": 99})
    return method.model_copy(update={"start": 0.99}) if "start" in fields else method


@pytest.fixture(scope="module")
def wan_vace():
    pipe = videos.VACE.build()
    return pipe, torch.as_tensor(videos.VACE.call(pipe, steps=3))


@pytest.mark.parametrize("method", [m for m in CACHES if ROSTER[m].acts(PIPELINES["wan21"])])
def test_vace_is_stock_where_a_cache_skips_nothing(wan_vace, same, method):
    """With the machinery of every cache in place, and with its off form."""
    pipe, stock = wan_vace
    active = ROSTER[method].active
    for form in (idle(active), active.off()):
        if form is not None:
            run = Plan(form).attach(pipe)
            output = torch.as_tensor(videos.VACE.call(pipe, steps=3))
            run.detach()
            assert same(output, stock)
            assert run.report.steps == 3
            verdict = run.report.verdicts[method]
            assert verdict.state == "INACTIVE" or ROSTER[method].lossless
            assert verdict.chosen == (form == active.off())


@pytest.mark.parametrize(
    "plan", [pytest.param(p, id=n, marks=full(n != "all")) for n, p in off_plans().items()]
)
def test_vace_is_stock_under_what_is_off(wan_vace, same, plan):
    pipe, stock = wan_vace
    with plan.attach(pipe):
        assert same(torch.as_tensor(videos.VACE.call(pipe, steps=3)), stock)
