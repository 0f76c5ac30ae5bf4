"""Law 3: no memory between runs. Every run is that of a fresh process."""

import pytest
import torch
from conftest import differences, trace
from roster import CORE, LEADERS, ROSTER, STEPS, cases, full, pipelines, takes_callback
from tiny import PIPELINES, TINIES, Ask

from accel import Plan

PAIR = ("sd15", "flux_cfg")
"""One of each guidance layout, for what is long."""


class Abort(Exception):
    """What a user's callback, or a network, raises in the middle of a run."""


def forms(name):
    """Plans of the leader of each engine that acts on a pipeline."""
    return [Plan(ROSTER[m].active) for m in LEADERS.values() if ROSTER[m].acts(PIPELINES[name])]


@cases(variants=True)
def test_a_second_run_equals_the_first(bench, same, name, method):
    with Plan(method).attach(bench.pipe(name)) as run:
        outputs, events = [], []
        for _ in range(2):
            outputs.append(bench.call(name, steps=STEPS))
            events.append((run.report.to_dict()["events"], run.report.nfe, run.report.steps))
    assert same(*outputs)
    assert events[0] == events[1]


# Aborted runs. Each way breaks a run at a place that it counts itself: the k-th time that a
# callback, `scheduler.step` or a layer is reached.


def callback_raises(pipe, at):
    def callback(pipe, index, timestep, state):
        if index == at:
            raise Abort
        return state

    return {"callback_on_step_end": callback}, lambda: None


def callback_interrupts(pipe, at):
    def callback(pipe, index, timestep, state):
        pipe._interrupt = index >= at
        return state

    return {"callback_on_step_end": callback}, lambda: None


def step_raises(pipe, at):
    inner = pipe.scheduler.step
    count = iter(range(1000))

    def step(*args, **kwargs):
        if next(count) == at:
            raise Abort
        return inner(*args, **kwargs)

    step.__wrapped__ = inner
    shadowed = vars(pipe.scheduler).get("step")
    pipe.scheduler.step = step

    def undo():
        del pipe.scheduler.step
        if shadowed is not None:
            pipe.scheduler.step = shadowed

    return {}, undo


def layer_raises(place):
    def raises(pipe, at):
        network = getattr(pipe, "unet", None) or pipe.transformer
        leaves = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
        count = iter(range(1000))

        def before(*_):
            if next(count) == at:
                raise Abort

        handle = leaves[int(place * (len(leaves) - 1))].register_forward_pre_hook(before)
        return {}, handle.remove

    return raises


WAYS = {
    "callback raises": callback_raises,
    "callback interrupts": callback_interrupts,
    "scheduler raises": step_raises,
    "first layer raises": layer_raises(0.0),
    "middle layer raises": layer_raises(0.6),
}


def aborted(bench, name, way, at):
    """Run and break it; whether it broke (the place was reached)."""
    arguments, undo = way(bench.pipe(name), at)
    try:
        bench.call(name, steps=STEPS, **arguments)
    except Abort:
        return True
    finally:
        undo()
    return way is callback_interrupts and bench.pipe(name)._interrupt


def in_turn(name, method, way):
    """Whether CI breaks a run in a way: a leader on ``PAIR``, on each in one way and its next."""
    if name not in PAIR or method not in LEADERS.values():
        return False
    turn = sorted(LEADERS.values()).index(method) + 2 * PAIR.index(name)
    return list(WAYS).index(way) in (turn % len(WAYS), (turn + 1) % len(WAYS))


ABORTED = [
    pytest.param(
        name,
        Plan(row.active),
        break_,
        id=f"{name}-{method}-{way}",
        marks=full(not in_turn(name, method, way)),
    )
    for name in PIPELINES
    for method, row in ROSTER.items()
    for way, break_ in WAYS.items()
    if row.acts(PIPELINES[name]) and (name in PAIR or method in LEADERS.values())
]
"""The leaders on every pipeline, all methods on two."""


@pytest.mark.parametrize(("name", "plan", "way"), ABORTED)
def test_a_run_after_an_aborted_one_is_fresh(bench, same, name, plan, way):
    pipe = bench.pipe(name)
    if "callback" in way.__name__ and not takes_callback(PIPELINES[name]):
        pytest.skip("the pipeline takes no callback")
    if way is callback_interrupts and not hasattr(type(pipe), "interrupt"):
        pytest.skip("the pipeline cannot be interrupted")
    fresh, report = bench.under(name, plan, steps=STEPS)
    broken = 0
    with plan.attach(pipe) as run:
        while aborted(bench, name, way, broken):
            broken += 1 + broken // 8  # all of the first ones; some of a method that makes many
            assert same(bench.call(name, steps=STEPS), fresh)
            assert run.report.to_dict()["events"] == report.to_dict()["events"]
    assert broken >= 2
    assert same(bench.call(name, steps=STEPS), bench.stock(name, steps=STEPS))


@pipelines(CORE, where=takes_callback)
def test_detach_after_an_abort(bench, same, name):
    pipe = bench.pipe(name)
    for plan in forms(name):
        before = trace(pipe)
        with pytest.raises(Abort), plan.attach(pipe):
            aborting, _ = callback_raises(pipe, 1)  # two are made of three quarters where half are
            bench.call(name, steps=STEPS, **aborting)
        assert not differences(before, trace(pipe))
    assert same(bench.call(name, steps=STEPS), bench.stock(name, steps=STEPS))


NEIGHBOURS = [
    pytest.param(
        tiny.name,
        method,
        id=f"{tiny.name}-{method}",
        marks=full(tiny.name != PAIR[place % 2]),
    )
    for place, method in enumerate(sorted(LEADERS.values()))
    for tiny in PIPELINES.values()
    if takes_callback(tiny) and ROSTER[method].acts(tiny)
]
"""The leaders on every pipeline that they serve; in CI on one of ``PAIR`` in turn."""


@pytest.mark.parametrize(("name", "method"), NEIGHBOURS)
def test_two_pipelines_of_one_class_share_nothing(bench, same, name, method):
    tiny, plans = PIPELINES[name], forms(name)
    plan = Plan(ROSTER[method].active)
    other = plans[(plans.index(plan) + 1) % len(plans)]
    first, second = bench.pipe(name), tiny.build()
    with other.attach(second):
        other_alone = tiny.call(second, steps=STEPS, seed=7)
    outputs = []

    def between(pipe, index, timestep, state):
        outputs.append(tiny.call(second, steps=STEPS, seed=7))
        return state

    with plan.attach(first), other.attach(second):
        together = tiny.call(first, steps=STEPS, callback_on_step_end=between)
    assert same(together, bench.under(name, plan, steps=STEPS)[0])
    assert outputs
    assert all(same(output, other_alone) for output in outputs)


@pytest.mark.parametrize(("name", "method"), NEIGHBOURS)
def test_one_plan_on_two_pipelines_shares_nothing(bench, same, name, method):
    tiny, plan = PIPELINES[name], Plan(ROSTER[method].active)
    first, second = bench.pipe(name), tiny.build()

    def between(pipe, index, timestep, state):
        tiny.call(second, steps=STEPS, seed=index + 1)
        return state

    with plan.attach(first), plan.attach(second):
        output = tiny.call(first, steps=STEPS, callback_on_step_end=between)
    assert same(output, bench.under(name, plan, steps=STEPS)[0])


def another_size(bench, name):
    """Half the height, or twice where the stock pipeline refuses that."""
    usual = TINIES[name].inputs(Ask(["a fox"], [0], guidance=True)).get("height")
    for height in (usual // 2, usual * 2) if usual else ():
        try:
            bench.stock(name, steps=2, height=height)
        except ValueError:
            continue
        return {"height": height}
    return {}


@cases(CORE, kin=False)
def test_another_size_batch_and_length_between_runs(bench, same, name, method):
    more, fewer = (0, 0) if ROSTER[method.name].fixed else (3, 1)
    calls = [
        {"steps": STEPS},
        {"steps": STEPS + more, "batch": 3},
        {"steps": STEPS - fewer, "guidance": False},
        {"steps": STEPS, "batch": 2, **another_size(bench, name)},
        {"steps": STEPS},
    ]
    with Plan(method).attach(bench.pipe(name)) as run:
        for call in calls:
            output = bench.call(name, **call)
            fresh, report = bench.under(name, Plan(method), **call)
            assert same(output, fresh)
            assert (run.report.nfe, run.report.samples) == (report.nfe, report.samples)


@pipelines(CORE)
def test_a_run_that_never_began_leaves_nothing(bench, same, name):
    """`set_timesteps` and a few calls of the network outside of a pipeline's loop."""
    for plan in forms(name):
        with plan.attach(bench.pipe(name)):
            count = STEPS if any(ROSTER[method.name].fixed for method in plan) else 3
            bench.pipe(name).scheduler.set_timesteps(count, **dynamic(bench.pipe(name)))
            output = bench.call(name, steps=STEPS)
        assert same(output, bench.under(name, plan, steps=STEPS)[0])


def dynamic(pipe):
    """What `set_timesteps` of a scheduler with dynamic shifting needs."""
    return {"mu": 0.5} if pipe.scheduler.config.get("use_dynamic_shifting") else {}


@pytest.mark.parametrize("name", ["flux_kontext", "flux_cfg"])
def test_tensors_that_change_roles_between_runs(bench, same, name):
    """What was the conditional text in one run may be the unconditional one in the next."""
    pipe = bench.pipe(name)
    texts = [pipe.encode_prompt(text, text, max_sequence_length=48)[:2] for text in ("a fox", "")]
    roles = [
        {
            "prompt": None,
            "negative_prompt": None,
            "prompt_embeds": cond[0],
            "pooled_prompt_embeds": cond[1],
            "negative_prompt_embeds": uncond[0],
            "negative_pooled_prompt_embeds": uncond[1],
        }
        for cond, uncond in (texts, texts[::-1])
    ]
    plan = Plan(ROSTER["guidance.Adaptive"].active)
    fresh = []
    for role in roles:
        with plan.attach(pipe):
            fresh.append(bench.call(name, steps=STEPS, **role))
    with plan.attach(pipe):
        assert same(bench.call(name, steps=STEPS, **roles[0]), fresh[0])
        assert same(bench.call(name, steps=STEPS, **roles[1]), fresh[1])
