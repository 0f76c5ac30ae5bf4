"""Custom: every combination of rule, indicator, predictor and site. Step Rehash: lists of steps."""

from itertools import combinations
from typing import get_args

import pytest
import torch
from conftest import bits_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from roster import ROSTER
from test_laws_counts import computed_steps
from tiny import PIPELINES
from tiny.base import Ask

from accel import Plan, cache, errors
from accel.cache.custom import INDICATORS, READS, What, Where, Which
from accel.cache.fields import Cache
from accel.cache.predictors import Forecast, Kind
from accel.cache.step_rehash import Answers, calibrate, choose

STEPS = 6
SITES = {
    "flux_cfg": ("network", "blocks", "modules"),
    "sd15": ("network", "modules", "deep branch"),
}
EVERYWHERE = {"low": -1e9, "high": 1e9}
ACTS = {
    "interval": {"interval": 3},
    "steps": {"steps": (0, 1, 3)},
    "within": {"interval": 3, **EVERYWHERE},
    "accumulated": {"threshold": 1e9},
    "below": {"threshold": 1e9},
    "magnitude": {"threshold": 1e9},
    "clustered": {"interval": 3, "centre": 0.0, "power": 1.0},
    "table": {"table": ("1", "1", "0", "0", "1", "1")},
}
"""Fields with which a rule skips."""

COMPUTES = {
    "interval": {"warmup": 99},
    "steps": {"steps": tuple(range(20))},
    "within": {"low": -2.0, "high": -1.0},
    "accumulated": {"threshold": 1e-30},
    "below": {"threshold": 1e-30},
    "magnitude": {"threshold": 1e-30},
    "clustered": {"warmup": 99},
    "table": {"table": ("1", "0", "0", "0", "1", "1"), "warmup": 99},
}
"""Fields with which it computes every step."""


def fits(site, rule, indicator):
    return indicator in INDICATORS[site] and indicator in READS.get(rule, ("none",))


def combined(site, rule, indicator, **fields):
    front = {"front": 1} if indicator == "probe" else {}
    if rule == "magnitude" and indicator == "none":
        front["curve"] = (1.0, *(0.5,) * (STEPS - 1))
    if rule == "table" and site == "modules":
        fields["table"] = tuple(line * 4 for line in fields["table"])
        front["by"] = "kind"
    return cache.Custom(site=site, rule=rule, indicator=indicator, **front, **fields)


def legal():
    """Pipelines with the sites, rules and indicators that go together there."""
    for name, sites in SITES.items():
        for site in sites:
            for indicator in INDICATORS[site]:
                for rule in get_args(Which):
                    if fits(site, rule, indicator):
                        yield pytest.param(
                            name, site, rule, indicator, id=f"{name}-{site}-{rule}-{indicator}"
                        )


@pytest.mark.parametrize(("name", "site", "rule", "indicator"), list(legal()))
def test_every_legal_combination_attaches_acts_and_can_be_stock(
    bench, same, name, site, rule, indicator
):
    everything = combined(site, rule, indicator, **COMPUTES[rule])
    assert everything.why_off() is None, "it is to be attached"
    run = Plan(everything).attach(bench.pipe(name))
    output = bench.call(name, steps=STEPS)
    run.detach()
    assert run.report.verdicts["cache.Custom"].state == "INACTIVE"
    assert same(output, bench.stock(name, steps=STEPS))
    for predictor in get_args(Kind):
        method = combined(site, rule, indicator, predictor=predictor, warmup=2, **ACTS[rule])
        with Plan(method).attach(bench.pipe(name)) as run:
            output = bench.call(name, steps=STEPS)
        assert torch.isfinite(torch.as_tensor(output)).all()
        assert run.report.verdicts["cache.Custom"].state == "ACTIVE"
        assert not same(output, bench.stock(name, steps=STEPS))
        states = {state for *_, state in run.report.to_dict()["events"]["cache.Custom"]}
        assert states == {"computed", "reused" if predictor == "reuse" else "predicted"}


@settings(max_examples=200)
@given(
    st.sampled_from(get_args(Where)),
    st.sampled_from(get_args(Which)),
    st.sampled_from(get_args(What)),
)
def test_a_combination_is_legal_or_refused_in_one_line(site, rule, indicator):
    if fits(site, rule, indicator):
        combined(site, rule, indicator, **ACTS[rule])
        return
    with pytest.raises(ValidationError) as caught:
        combined(site, rule, indicator, **ACTS[rule])
    (problem,) = caught.value.errors()
    assert "\n" not in problem["msg"]
    assert site in problem["msg"] or rule in problem["msg"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rule": "steps", "steps": (0, 1), "interval": 3}, r"interval is read by rule 'interval'"),
        ({"threshold": 0.2}, r"threshold is read by rule 'accumulated' or 'below' or 'magnitude'"),
        ({"rule": "magnitude"}, r"needs either a curve or indicator 'gain'"),
        (
            {"rule": "magnitude", "site": "blocks", "indicator": "gain", "curve": (1.0,)},
            r"needs either a curve or indicator 'gain'",
        ),
        (
            {"rule": "below", "site": "blocks", "indicator": "gain"},
            r"rule 'below' needs indicator 'input' or 'probe', not 'gain'",
        ),
        ({"curve": (1.0,)}, r"curve is read by rule 'magnitude' only"),
        ({"centre": 0.1}, r"centre is read by rule 'clustered' only"),
        ({"rule": "table"}, r"rule 'table' needs a table"),
        ({"rule": "table", "table": ("10", "01")}, r"a table has one character a line"),
        ({"rule": "table", "table": ("1",), "by": "kind"}, r"by is read by site 'modules' only"),
        (
            {"rule": "table", "site": "modules", "table": ("1", "01")},
            r"the lines of a table are of one length",
        ),
        ({"low": 5.0}, r"low is read by rule 'within' only, not by 'interval'"),
        ({"front": 1}, r"front is read by site 'blocks' only, not by 'network'"),
        ({"branch": 1}, r"branch is read by site 'deep branch' only"),
        ({"site": "blocks", "memory_limit": 9.0}, r"memory_limit is read by site 'modules' only"),
        ({"rule": "steps"}, r"rule 'steps' needs steps that rise"),
        ({"rule": "steps", "steps": (0, 3, 2)}, r"needs steps that rise without repeats"),
        ({"rule": "steps", "steps": (0, 9), "total": 9}, r"step 9 is none of a run of 9"),
        ({"rule": "below"}, r"rule 'below' needs indicator 'input' or 'probe', not 'none'"),
        ({"indicator": "input"}, r"rule 'interval' needs indicator 'none', not 'input'"),
        ({"site": "blocks", "rule": "below", "indicator": "probe"}, r"needs front of at least 1"),
        (
            {"site": "blocks", "rule": "below", "indicator": "input", "front": 1},
            r"'input' needs front = 0",
        ),
        ({"rule": "below", "indicator": "probe"}, r"site 'network' has no indicator 'probe'"),
    ],
)
def test_what_means_nothing_is_refused(fields, words):
    with pytest.raises(ValidationError, match=words):
        cache.Custom(**fields)
    with pytest.raises(errors.PlanError, match=words):
        Plan.from_dict({"cache": {"Custom": fields}})


TWINS = {
    "EasyCache": (
        "sd15",
        cache.EasyCache(threshold=0.3),
        cache.Custom(
            rule="accumulated", indicator="input", threshold=0.3, warmup=3, predictor="newton"
        ),
    ),
    "FirstBlock": (
        "flux_cfg",
        cache.FirstBlock(threshold=0.5),
        cache.Custom(
            site="blocks", rule="below", indicator="probe", threshold=0.5, front=1, warmup=2
        ),
    ),
    "TeaCache": (
        "flux_cfg",
        cache.TeaCache(threshold=0.3, coefficients="identity", clamp_nonneg=True),
        cache.Custom(site="blocks", rule="accumulated", indicator="input", threshold=0.3),
    ),
    "FORA": (
        "flux_cfg",
        cache.FORA(interval=3),
        cache.Custom(site="modules", interval=3, last=False),
    ),
    "DeepCache": (
        "sd15",
        cache.DeepCache(interval=3, branch=1),
        cache.Custom(site="deep branch", interval=3, branch=1, last=False),
    ),
    "StepRehash": (
        "flux_cfg",
        cache.StepRehash(steps=(0, 1, 4)),
        cache.Custom(rule="steps", steps=(0, 1, 4), predictor="newton", last=False),
    ),
}
TWINS |= {
    "MagCache": (
        "flux_cfg",
        cache.MagCache(threshold=0.5, share=0.3, max_skips=2),
        cache.Custom(site="blocks", rule="magnitude", indicator="gain", threshold=0.5, share=0.3),
    ),
    "MagCache, curve": (
        "flux_cfg",
        cache.MagCache(threshold=0.5, share=0.0, curve=(1.0, 0.8)),
        cache.Custom(site="blocks", rule="magnitude", threshold=0.5, curve=(1.0, 0.8)),
    ),
    "DeepCache, nonuniform": (
        "sd15",
        cache.DeepCache(interval=3, schedule="nonuniform", centre=0.5),
        cache.Custom(site="deep branch", rule="clustered", interval=3, centre=0.5, last=False),
    ),
    "Table": (
        "flux_cfg",
        cache.Table(steps=("1111", "0110", "1001"), by="kind", stretch=True),
        cache.Custom(
            site="modules", rule="table", table=("1111", "0110", "1001"), by="kind", stretch=True
        ),
    ),
}
TWINS |= {
    f"TaylorSeer {site}": (
        "flux_cfg",
        cache.TaylorSeer(interval=3, warmup=2, site=site),
        cache.Custom(site=site, interval=3, warmup=2, predictor="taylor", last=False),
    )
    for site in ("network", "blocks", "modules")
}


@pytest.mark.parametrize(("name", "named", "custom"), TWINS.values(), ids=TWINS)
def test_a_named_method_is_a_point_of_custom(bench, same, name, named, custom):
    """The same output, bit for bit, where the fields are the same."""
    shared = type(named).model_fields.keys() & {"warmup", "max_skips", "last", "order", "damping"}
    custom = custom.model_copy(update={field: getattr(named, field) for field in shared})
    outputs = []
    for method in (named, custom):
        run = Plan(method).attach(bench.pipe(name))
        outputs.append(bench.call(name, steps=9))
        run.detach()
        assert run.report.verdicts[method.name].state == "ACTIVE"
    assert same(*outputs)
    assert not same(outputs[0], bench.stock(name, steps=9))


SUBCLASSES = {name: row for name, row in ROSTER.items() if isinstance(row.active, Cache)}


def test_every_cache_with_a_predictor_is_in_the_roster():
    def below(kind):
        return {kind, *(one for child in kind.__subclasses__() for one in below(child))}

    named = {getattr(kind, "name", None) for kind in below(Cache) if "accel." in kind.__module__}
    assert named - {None} == SUBCLASSES.keys()


@pytest.mark.parametrize("predictor", get_args(Kind))
@pytest.mark.parametrize("method", SUBCLASSES)
def test_any_predictor_fills_in_for_any_rule_from_python_and_from_a_plan(
    bench, same, method, predictor
):
    row = SUBCLASSES[method]
    name = next(name for name in ("flux", "sd15") if row.acts(PIPELINES[name]))
    form = row.active.model_copy(update={"predictor": predictor, "last": False})
    again = Plan.from_dict(Plan(form).to_dict())
    assert again == Plan(form)
    with again.attach(bench.pipe(name)) as run:
        output = bench.call(name, steps=4)
    assert torch.isfinite(output).all()
    states = {state for *_, state in run.report.to_dict()["events"][method]}
    assert states == {"computed", "reused" if predictor == "reuse" else "predicted"}
    assert not same(output, bench.stock(name, steps=4))


def test_custom_claims_its_site(bench):
    with pytest.raises(errors.Conflict, match=r"cache\.EasyCache"):
        Plan(cache.EasyCache(), cache.Custom()).attach(bench.pipe("flux"))
    with pytest.raises(errors.Conflict, match=r"cache\.FirstBlock"):
        Plan(cache.FirstBlock(), cache.Custom(site="blocks")).attach(bench.pipe("flux"))
    Plan(cache.EasyCache(), cache.Custom(site="blocks")).attach(bench.pipe("flux")).detach()


def test_a_site_that_is_not_there_is_refused(bench):
    for name, site in (("sd15", "blocks"), ("flux", "deep branch")):
        with pytest.raises(errors.UnsupportedModel):
            Plan(cache.Custom(site=site)).attach(bench.pipe(name))


# Step Rehash.


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_the_listed_steps_are_computed(bench, name):
    method = cache.StepRehash(steps=(0, 1, 4, 7), total=9)
    with Plan(method).attach(bench.pipe(name)) as run:
        bench.call(name, steps=9, batch=2)
    assert all(steps == {0, 1, 4, 7} for steps in computed_steps(run, method).values())


def test_another_number_of_steps_is_refused_by_name(bench):
    with (
        pytest.raises(errors.UnsupportedModel, match=r"cache\.StepRehash is for runs of 9 .* 8\."),
        Plan(cache.StepRehash(steps=(0, 1, 4), total=9)).attach(bench.pipe("flux")),
    ):
        bench.call("flux", steps=8)


@pytest.mark.parametrize("steps", [(1, 1), (2, 1), (0, 9)])
def test_what_is_no_list_is_refused(steps):
    with pytest.raises(ValidationError, match=r"without repeats|none of a run"):
        cache.StepRehash(steps=steps, total=9)


def test_lists_that_do_nothing_are_off():
    assert cache.StepRehash().why_off() == "no steps are listed"
    assert cache.StepRehash(steps=(0, 1, 2), total=3).why_off() == "every step is listed"


@settings(max_examples=30)
@given(st.data())
def test_the_chosen_list_is_the_best_of_all(data):
    """Against the cost of every list, for any costs, forced steps and caps."""
    total = data.draw(st.integers(2, 8))
    budget = data.draw(st.integers(1, total))
    longest = data.draw(st.integers(1, total))
    forced = data.draw(st.sets(st.integers(0, total - 1), max_size=2))
    costs = data.draw(st.lists(st.integers(0, 50), min_size=600, max_size=600))

    def cost(older, newer, step):
        return float(costs[((-1 if older is None else older) + 1) * 64 + newer * 8 + step])

    def price(steps):
        whole, found = [*steps, total], 0.0
        for place, newer in enumerate(steps):
            older = steps[place - 1] if place else None
            gap = range(newer + 1, whole[place + 1])
            if len(gap) > longest:
                return None
            found += sum(cost(older, newer, step) for step in gap)
        return found

    lists = [(0, *rest) for rest in combinations(range(1, total), budget - 1)]
    prices = [price(steps) for steps in lists if forced <= set(steps)]
    known = [found for found in prices if found is not None]
    if not known:
        with pytest.raises(errors.BadInput, match="Change the budget"):
            choose(cost, total, budget, forced, longest)
        return
    chosen = choose(cost, total, budget, forced, longest)
    assert len(chosen) == budget
    assert forced <= set(chosen)
    assert price(chosen) == min(known)


def arguments(name, steps):
    """A call of a tiny pipeline, and a prompt for it."""
    usual = PIPELINES[name].inputs(Ask(["a red fox"], [0], guidance=True))
    prompt = {"prompt": usual.pop("prompt")}
    generator = torch.Generator().manual_seed(1)
    usual |= {"num_inference_steps": steps, "generator": generator, "output_type": "latent"}
    return usual, prompt


@pytest.mark.parametrize("predictor", ["reuse", "newton"])
@pytest.mark.parametrize("name", ["sd15", "flux_cfg", "wan22"])
def test_a_calibrated_list_has_its_budget_and_leaves_no_trace(bench, same, name, predictor):
    call, prompt = arguments(name, 8)
    method = calibrate(bench.pipe(name), call, [prompt], 5, {"predictor": predictor})
    assert len(method.steps) == 5
    assert method.total == 8
    assert method.predictor == predictor
    assert same(bench.call(name, steps=4), bench.stock(name, steps=4))
    with Plan(method).attach(bench.pipe(name)) as run:
        bench.call(name, steps=8)
    assert all(steps == set(method.steps) for steps in computed_steps(run, method).values())


def test_calibration_needs_prompts_and_a_budget_that_can_be_met(bench):
    call, prompt = arguments("flux_cfg", 4)
    with pytest.raises(errors.BadInput, match="at least one prompt"):
        calibrate(bench.pipe("flux_cfg"), call, [], 3)
    for budget in (0, 5):
        with pytest.raises(errors.BadInput, match="Change the budget"):
            calibrate(bench.pipe("flux_cfg"), call, [prompt], budget)


def test_the_cost_is_the_error_of_the_predictor():
    """‖y − ŷ‖² of the answers themselves, for one and two computed steps."""
    from types import SimpleNamespace

    from accel.seams.denoisers import Row

    forecast = Forecast("newton", damping=0.25)
    answers, values = Answers(forecast), torch.randn(5, 7, dtype=torch.float64)
    for index in range(5):
        call = SimpleNamespace(
            step=SimpleNamespace(index=index, time=0.3 * index**1.5),
            denoiser=SimpleNamespace(name="transformer"),
            rows=(Row("cond", 0),),
            sample=torch.zeros(1, 7, dtype=torch.float64),
        )
        answers.note(call, SimpleNamespace(value=values[index : index + 1]))
    answers.close()
    size = (values @ values.T).diagonal().mean()
    for older, newer, step in ((None, 0, 1), (0, 1, 2), (0, 2, 4), (1, 3, 4)):
        predictor = forecast.make()
        for node in [newer] if older is None else [older, newer]:
            predictor.update(answers.positions[node], values[node])
        error = (predictor.predict(answers.positions[step]) - values[step]).square().sum()
        assert answers.cost(older, newer, step) == pytest.approx((error / size).item())
    assert not bits_equal(values[0], values[1])
