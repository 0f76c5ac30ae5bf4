"""Law 8: together or refused. Two methods keep the laws as a pair, or attaching raises Conflict."""

from itertools import combinations

import pytest
from roster import CORE, LEADERS, ROSTER, STEPS, compatible, full, takes_callback
from test_laws_counts import counting
from test_laws_memory import Abort, callback_raises
from test_laws_samples import same_in_company
from tiny import PIPELINES

from accel import Plan
from accel.errors import Conflict

FEW = ("sd15", "sd3", "flux_cfg", "flux_controlnet", "wan22")


def together(tiny):
    """The pairs of active methods that a pipeline is served by, and one of each engine at once.

    On most pipelines the engines are paired, by their leaders; on those of ``CORE`` all methods.
    """
    rows = {name: row for name, row in ROSTER.items() if row.acts(tiny)}
    leaders = [row.active for name, row in rows.items() if name in LEADERS.values()]
    forms = [row.active for row in rows.values()] if tiny.name in CORE else leaders
    return [*combinations(forms, 2), *([tuple(leaders)] if len(leaders) > 2 else [])]


def names(methods):
    """What the methods are called."""
    return tuple(method.name for method in methods)


def in_turn():
    """Where CI runs a pair of leaders: on one of ``FEW`` that serves both, each in its turn.

    All leaders at once run on each of ``FEW``.
    """
    served = {}
    for name in FEW:
        for methods in together(PIPELINES[name]):
            if set(names(methods)) <= set(LEADERS.values()):
                served.setdefault(names(methods), []).append(name)
    turns = enumerate(served.items())
    return {
        (name, pair)
        for turn, (pair, places) in turns
        for name in (places if len(pair) > 2 else [places[turn % len(places)]])
    }


CHOSEN = {pair: turn for turn, pair in enumerate(sorted(in_turn()))}


def pairs(turn, groups=True):
    """Parametrize over all pairs; of those that CI has, a law runs in CI on every second one.

    Args:
        turn: Of the law: those of odd and of even number share the pairs.
        groups: Whether with those of more than two.
    """
    return pytest.mark.parametrize(
        ("name", "methods"),
        [
            pytest.param(
                tiny.name,
                methods,
                id=f"{tiny.name}-{'+'.join(names(methods))}",
                marks=full((CHOSEN.get((tiny.name, names(methods)), turn + 1) + turn) % 2 == 1),
            )
            for tiny in PIPELINES.values()
            for methods in together(tiny)
            if groups or len(methods) == 2
        ],
    )


@pytest.fixture
def plan(bench, name, methods):
    """The plan of a pair; where it is refused, both names are said and that is that.

    Of more methods than two, as many as go together.
    """
    if len(methods) > 2:
        return compatible(bench.pipe(name), methods)
    plan = Plan(*methods)
    try:
        plan.attach(bench.pipe(name)).detach()
    except Conflict as conflict:
        assert all(method.name in str(conflict) for method in methods)
        pytest.skip(f"refused: {conflict}")
    return plan


@pytest.fixture
def attached(bench, name, plan):
    """The plan on the pipeline."""
    run = plan.attach(bench.pipe(name))
    yield run
    run.detach()


@pairs(0)
def test_a_pair_keeps_the_laws(bench, same, attached, name, plan):
    pipe, run = bench.pipe(name), attached
    outputs = [bench.call(name, steps=STEPS) for _ in range(2)]
    assert same(*outputs)  # 3: no memory between runs
    arguments, _ = callback_raises(pipe, min(2, run.report.steps - 1))
    if takes_callback(PIPELINES[name]):
        with pytest.raises(Abort):
            bench.call(name, steps=STEPS, **arguments)
        assert same(bench.call(name, steps=STEPS), outputs[0])
    saved = run.report.verdicts.values()
    assert any(verdict.state == "ACTIVE" for verdict in saved)
    assert all(verdict.detail for verdict in saved)
    run.detach()  # 2: no trace
    assert same(bench.call(name, steps=STEPS), bench.stock(name, steps=STEPS))


@pairs(1)
def test_a_pair_counts_what_ran_and_keeps_samples_apart(bench, name, plan):
    pipe = bench.pipe(name)
    with counting(pipe) as counts:
        run = plan.attach(pipe)
        bench.call(name, steps=STEPS, batch=2)
        run.detach()
    assert run.report.nfe == counts["network"] / 2
    steady = all(name not in ROSTER[method.name].unsteady for method in plan)
    if PIPELINES[name].batchable and steady:
        assert same_in_company(bench, name, plan, [1], of=2)


@pairs(2, groups=False)
def test_a_method_beside_one_that_is_off_is_as_if_alone(bench, same, name, plan):
    for method, other in (plan.methods, plan.methods[::-1]):
        if other.off() is None:
            continue
        alone, _ = bench.under(name, Plan(method), steps=STEPS)
        run = Plan(method, other.off()).attach(bench.pipe(name))
        assert same(bench.call(name, steps=STEPS), alone)
        run.detach()


@pairs(3)
def test_the_order_of_writing_does_not_matter(bench, same, name, plan):
    outputs = []
    for methods in (plan.methods, plan.methods[::-1]):
        run = Plan(*methods).attach(bench.pipe(name))
        outputs.append(bench.call(name, steps=STEPS))
        run.detach()
    assert same(*outputs)
    assert Plan(*plan.methods[::-1]) == plan
