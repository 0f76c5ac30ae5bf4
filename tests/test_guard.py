"""Guarded runs: what is promised, what is charged, and what a guard leaves as it is."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from conftest import bits_equal
from roster import CORE, ROSTER
from tiny import PIPELINES, PROMPTS

import accel
from accel import Guard, Plan, cache, errors, guidance, memory, tokens
from accel.guard.account import Account, Ahead, Charge, Growth, Line
from accel.guard.file import Basis
from accel.guard.gain import gain, left
from accel.guard.spot import cosine, weights
from accel.promises import LEAST, calibrate_guard, measured, rank, reference
from accel.seams.identity import identity
from accel.trajectory import Step

STEPS = 6
ALMOST_NOTHING = 1e-12
"""No approximation fits into it, and every check is made: a budget that is not 0."""

WITHOUT_LIMIT = 1e9
BOLD = cache.EasyCache(threshold=1e6, warmup=2)
UNCOND_LEFT_OUT = guidance.Adaptive(threshold=-1.0, min_steps=2, min_guided=0.0)


def guarded(*methods, max_error=0.2, scale=1.0, **more):
    return Plan(*methods, guard=Guard(max_error=max_error, scale=scale, **more))


@pytest.fixture(autouse=True)
def _idle_is_no_news():
    """A guard that refuses all leaves a method idle, which is a warning to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.AccelWarning)
        yield


def run(bench, name, plan, **call):
    """Output and report of a run on the shared pipeline."""
    with plan.attach(bench.pipe(name)) as attached:
        output = torch.as_tensor(PIPELINES[name].call(attached.pipe, **{"steps": STEPS, **call}))
    return output, attached.report


# The promise of nothing: the bits of stock, whatever the method.

UNGATED = ("resolution", "weights")
"""Families whose error no step can check: they refuse a guard with a budget."""

ROWS = [
    pytest.param(name, place, id=f"{name}-{place}")
    for turn, (name, row) in enumerate(ROSTER.items())
    if row.active.approximates and row.active.name.partition(".")[0] != "parallel"
    for served in [[place for place in CORE if row.acts(PIPELINES[place])]]
    for place in served[turn % max(len(served), 1) :][:1]
    if not isinstance(row.active, memory.LayerwiseCasting)
]


@pytest.mark.parametrize(("name", "place"), ROWS)
def test_a_budget_for_nothing_makes_checks_and_changes_no_bit(bench, name, place):
    plan = guarded(ROSTER[name].active, max_error=ALMOST_NOTHING)
    if name.partition(".")[0] in UNGATED:
        with pytest.raises(errors.Conflict, match=f"{name} does not go with a guard"):
            plan.attach(bench.pipe(place))
        return
    output, report = run(bench, place, plan)
    (told,) = report.guard.told()
    assert bits_equal(output, bench.stock(place, steps=STEPS))
    assert told["spent"] == 0
    assert told["checks"] > 0
    assert report.verdicts[name].state == "INACTIVE"
    assert "the guard refused all" in report.verdicts[name].detail


@pytest.mark.parametrize(("name", "place"), ROWS)
def test_no_error_is_stock(bench, name, place):
    output, report = run(bench, place, Plan(ROSTER[name].active, guard=Guard(max_error=0)))
    assert bits_equal(output, bench.stock(place, steps=STEPS))
    assert report.verdicts[name].detail == "off: guard.max_error is 0: everything computes"
    assert report.guard is None


@pytest.mark.parametrize("place", CORE)
def test_an_infinite_error_is_no_guard(bench, place):
    plan = Plan(UNCOND_LEFT_OUT, BOLD)
    free, report = run(bench, place, plan)
    output, same = run(bench, place, Plan(*plan, guard=Guard(max_error=math.inf)))
    assert bits_equal(output, free)
    assert same.nfe == report.nfe
    assert same.guard is None


@pytest.mark.parametrize("place", CORE)
def test_with_a_budget_without_limit_the_method_does_what_it_would(bench, place):
    """But for the first time, which is a check."""
    plan = guarded(BOLD, max_error=WITHOUT_LIMIT, check_every=100)
    output, report = run(bench, place, plan)
    free, alone = run(bench, place, Plan(BOLD))
    assert bits_equal(output, free) or PIPELINES[place].denoisers != ("transformer",)
    assert report.nfe <= alone.nfe + 2
    assert report.verdicts["cache.EasyCache"].state == "ACTIVE"


@pytest.mark.parametrize("place", ["sd15", "sd3", "flux_cfg"])
@pytest.mark.parametrize("methods", [(BOLD,), (UNCOND_LEFT_OUT, BOLD), (tokens.ToMe(),)])
def test_a_larger_budget_saves_more_and_is_kept_to(bench, place, methods):
    exact = bench.stock(place, steps=12)
    saved, errs = [], []
    for budget in (ALMOST_NOTHING, 0.1, 1.0):
        output, report = run(bench, place, guarded(*methods, max_error=budget), steps=12)
        (told,) = report.guard.told()
        saved.append(sum(e.state != "computed" for t in report.tallies for e in t.events))
        errs.append(float((output - exact).norm() / exact.norm()))
        assert told["spent"] <= 2 * budget  # by the checks that came after
        assert errs[-1] <= 3 * budget
    assert saved[0] <= saved[1] <= saved[2]
    assert errs[0] == 0 < errs[2]


def test_what_is_below_a_check_computes_in_full(bench):
    """Tokens are merged inside of what a cache is checked by, unless it is checked now."""
    plan = guarded(BOLD, tokens.ToMe(), max_error=WITHOUT_LIMIT, check_every=2)
    _, report = run(bench, "sd15", plan, steps=12)
    assert report.verdicts["cache.EasyCache"].state == "ACTIVE"
    assert report.verdicts["tokens.ToMe"].state == "ACTIVE"
    almost, _ = run(bench, "sd15", guarded(BOLD, tokens.ToMe(), max_error=ALMOST_NOTHING))
    assert bits_equal(almost, bench.stock("sd15", steps=STEPS))


# A sample by itself, a run by itself.


@pytest.mark.parametrize("methods", [(BOLD,), (UNCOND_LEFT_OUT, BOLD), (cache.FORA(interval=2),)])
@pytest.mark.parametrize("place", ["sd3", "flux_cfg"])
def test_a_sample_spends_alone_what_it_spends_in_company(bench, place, methods):
    plan, budget = guarded(*methods, max_error=0.3), {}
    _, together = run(bench, place, plan, batch=3)
    for sample in range(3):
        _, alone = run(bench, place, plan, seeds=[sample], prompts=[PROMPTS[sample]])
        budget[sample] = alone.guard.told()[0]
        events = [(e.step, e.branch, e.state) for t in alone.tallies for e in t.events]
        company = [
            (e.step, e.branch, e.state)
            for t in together.tallies
            for e in t.events
            if e.sample == sample
        ]
        assert sorted(events) == sorted(company)
    for sample, told in enumerate(together.guard.told()):
        assert told["checks"] == budget[sample]["checks"]
        assert told["spent"] == pytest.approx(budget[sample]["spent"], rel=1e-3)


def test_a_run_remembers_nothing_of_the_run_before(bench):
    pipe = bench.pipe("sd3")
    with guarded(UNCOND_LEFT_OUT, BOLD).attach(pipe) as attached:
        first = torch.as_tensor(PIPELINES["sd3"].call(pipe, steps=STEPS))
        told = attached.report.guard.told()
        PIPELINES["sd3"].call(pipe, steps=4, seed=7)
        again = torch.as_tensor(PIPELINES["sd3"].call(pipe, steps=STEPS))
        assert attached.report.guard.told() == told
    assert bits_equal(first, again)


def test_a_run_after_an_aborted_one_is_as_ever(bench):
    class Enough(Exception):
        pass

    def stop(pipe, index, timestep, values):
        if index == 2:
            raise Enough
        return values

    pipe, tiny = bench.pipe("sd3"), PIPELINES["sd3"]
    plan = guarded(UNCOND_LEFT_OUT, BOLD)
    expected, _ = run(bench, "sd3", plan)
    with plan.attach(pipe):
        with pytest.raises(Enough):
            tiny.call(pipe, steps=STEPS, seed=3, callback_on_step_end=stop)
        assert bits_equal(torch.as_tensor(tiny.call(pipe, steps=STEPS)), expected)
    assert bits_equal(bench.call("sd3", steps=STEPS), bench.stock("sd3", steps=STEPS))


# What does not go with a guard.


@pytest.mark.parametrize("method", [memory.LayerwiseCasting()])
def test_what_cannot_be_checked_is_refused_by_name(bench, method):
    with pytest.raises(errors.Conflict, match=f"{method.name} does not go with a guard: .*Leave"):
        guarded(method).attach(bench.pipe("sd3"))


@pytest.mark.parametrize("name", ["parallel.DistriFusion", "parallel.AsyncDiff", "parallel.ASG"])
def test_what_rests_on_stale_answers_of_others_has_no_gate(name):
    assert ROSTER[name].active.approximates


def test_what_approximates_nothing_goes_with_a_guard(bench):
    samplers = pytest.importorskip("samplers")
    plan = (samplers.DPMSolverPP(), cache.TextKV())
    free, _ = run(bench, "sd15", Plan(*plan))
    for budget in (0.0, 0.1):
        output, report = run(bench, "sd15", guarded(*plan, max_error=budget))
        assert bits_equal(output, free)
        assert report.verdicts["samplers.DPMSolverPP"].state == "ACTIVE"


# The plan.


@pytest.mark.parametrize(
    "guard",
    [
        Guard(max_error=0.05),
        Guard(max_error=math.inf, scale=2.5, check_every=3),
        Guard(max_error=0, file="a-guard.json"),
    ],
)
def test_a_plan_with_a_guard_goes_round(guard):
    plan = Plan(BOLD, guard=guard)
    assert Plan.from_toml(plan.to_toml()) == Plan.from_json(plan.to_json()) == plan
    assert Plan.from_dict(plan.to_dict()) == plan
    assert hash(Plan.from_dict(plan.to_dict())) == hash(plan)
    assert plan != Plan(BOLD)
    assert f"guard={guard!r}" in repr(plan)
    assert plan.guard == guard


def test_a_file_is_taken_from_the_folder_of_the_plan(tmp_path):
    plan = Plan(BOLD, guard=Guard(max_error=0.1, file="a-guard.json")).beside(tmp_path)
    assert plan.guard.file == tmp_path / "a-guard.json"
    assert Plan(BOLD).beside(tmp_path) == Plan(BOLD)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("max_error = -1", "guard.max_error = -1: Input should be greater than or equal to 0"),
        ("max_error = nan", "guard.max_error"),
        (
            "max_error = 1\nmax_eror = 1",
            "guard has no field 'max_eror': it has max_error, file, scale",
        ),
        ("check_every = 2", "guard.max_error"),
        ("max_error = 1\nscale = 1\nfile = 'a'", "file and scale are both given"),
    ],
)
def test_a_wrong_guard_says_what_is_wrong(fields, message):
    with pytest.raises(errors.PlanError, match=message):
        Plan.from_toml(f"[guard]\n{fields}")


def test_what_is_no_guard_is_refused():
    with pytest.raises(errors.PlanError, match=r"guard is a float: write for example accel\.Guard"):
        Plan(BOLD, guard=0.05)
    with pytest.raises(errors.PlanError, match="guard: expected a table of fields, found 3"):
        Plan.from_dict({"guard": 3})


def test_the_command_line_sets_it():
    from app.plans import chosen
    from app.request import Choice

    plan = chosen(Choice(preset="balanced", changes=["guard.max_error=0.05"]))
    assert plan == Plan(*Plan.preset("balanced"), guard=Guard(max_error=0.05))
    changes = ["guard.max_error=0.05", "guard.check_every=3"]
    again = chosen(Choice(changes=changes), plan.to_dict())
    assert again.guard == Guard(max_error=0.05, check_every=3)
    with pytest.raises(errors.PlanError, match="this is no change of a plan"):
        chosen(Choice(changes=["guard=0.05"]))


def test_the_app_keeps_it():
    from app.serve.jobs import Spec
    from app.serve.limits import Limits, check_plan
    from app.ui import knobs, records, roundtrip

    plan = Plan(BOLD, guard=Guard(max_error=0.05, file="elsewhere.json"))
    assert knobs.read(knobs.shown(plan)) == plan
    assert ("guard", "max_error = 0.05, file = elsewhere.json, scale = None, check_every = 6") in (
        records._fields(plan.to_dict())
    )
    assert "guard.max_error=0.05" in " ".join(roundtrip._plan_options(plan, {}))
    with pytest.raises(errors.BadInput, match=r"guard\.file: elsewhere\.json is none of your"):
        check_plan(plan, Limits(), Path("/nowhere"))
    assert Spec(request={}, plan=plan.to_dict(), title="x").plan["guard"]["max_error"] == 0.05


def test_the_report_tells_it(bench):
    _, report = run(bench, "sd3", guarded(BOLD, max_error=0.5))
    (told,) = report.guard.told()
    assert report.to_dict()["guard"] == {"note": "scale 1 as given", "samples": [told]}
    line = f"guard  spent {told['spent']:.3g} of 0.5, {told['checks']} checks"
    assert f"  {line} (scale 1 as given)" in str(report).splitlines()
    assert json.dumps(report.to_dict())
    _, report = run(bench, "sd3", Plan(BOLD, guard=Guard(max_error=0.5)))
    assert "uncalibrated" in str(report)
    _, report = run(bench, "sd3", Plan(BOLD))
    assert "guard" not in str(report) and report.to_dict()["guard"] is None


# Numbers in closed form.


class Flow:
    """The levels of a flow in even steps."""

    prediction = "flow_prediction"
    sigmas = (1.0, 0.75, 0.5, 0.25, 0.0)
    timesteps = (1000.0, 750.0, 500.0, 250.0)

    def at(self, position):
        sigma = self.sigmas[min(position, 4)]
        return sigma / max(1 - sigma, 1e-9), 1 - sigma, sigma


class Noise(Flow):
    """The levels of a variance-preserving process, without a last one of its own."""

    sigmas = (8.0, 2.0, 0.5, 0.1)

    def __init__(self, prediction):
        self.prediction = prediction

    def at(self, position):
        ratio = self.sigmas[position]
        alpha = 1 / math.hypot(1, ratio)
        return ratio, alpha, ratio * alpha


def test_the_gain_of_a_step_is_what_the_solver_multiplies_an_error_by():
    flow = Step(0, 4, 0, Flow())
    assert gain(flow) == pytest.approx(0.25 / math.hypot(0.25, 0.75))
    assert gain(flow, 3) == pytest.approx(0.25)
    assert left(flow) == 3
    alpha = [1 / math.hypot(1, sigma) for sigma in Noise.sigmas]
    step = Step(1, 4, 1, Noise("epsilon"))
    assert gain(step) == pytest.approx(1.5 * alpha[2])
    assert gain(step, 2) == pytest.approx(0.1)  # down to the clean sample
    assert gain(Step(1, 4, 1, Noise("v_prediction"))) == pytest.approx(1.5 * alpha[1] * alpha[2])
    assert gain(Step(1, 4, 1, Noise("sample"))) == pytest.approx(1.5 * alpha[2] / 2.0)


def test_the_stages_of_a_solvers_step_have_its_gain():
    class Heun(Flow):
        sigmas = (1.0, 0.5, 0.5, 0.0, 0.0)

    first, second = Step(0, 3, 0, Heun(), order=2), Step(1, 3, 1, Heun(), order=2)
    assert gain(first) == gain(second) == gain(first, 1) > 0


def test_a_level_that_is_evaluated_twice_is_worth_the_step_that_leads_to_it():
    class Twice(Flow):
        sigmas = (1.0, 0.5, 0.5, 0.0)

    assert gain(Step(1, 3, 1, Twice())) == gain(Step(0, 3, 0, Twice()))


def test_an_error_grows_with_what_it_reaches():
    growth = Growth(grows=True)
    assert growth.at(1.0) == math.inf and growth.old(0, 5)
    growth.learn(0.4, 2.0, 3)
    assert [growth.at(h) for h in (1.0, 2.0, 4.0)] == pytest.approx([0.2, 0.4, 1.6])
    assert not growth.old(7, 5) and growth.old(8, 5)
    growth.learn(0.1, 2.0, 4)
    assert growth.at(2.0) == pytest.approx(0.2), "less than expected: halfway, in the logarithm"
    growth.learn(0.9, 2.0, 5)
    assert growth.at(2.0) == 0.9
    flat = Growth(grows=False)
    flat.learn(0.3, 0.0, 0)
    assert flat.at(0.0) == flat.at(9.0) == 0.3


@pytest.mark.parametrize("coherence", [0.0, 0.5, 1.0])
def test_errors_add_up_by_their_coherence(coherence):
    """E² = Σ_i Σ_j ρ^|i − j|·a_i·a_j over the stretches between checks; within one they add up."""
    line = Line(Growth(grows=False), 1.0, coherence=coherence)
    stretches = [(0.1, (0.5, 0.2)), (0.3, (0.4,)), (0.2, ()), (0.2, (0.1, 0.3, 0.2))]
    totals = []
    for index, (error, gains) in enumerate(stretches):
        line.growth.error = error
        line.charges = [Charge(one, 0.0) for one in gains]
        totals.append(error * sum(gains))
        expected = sum(
            coherence ** abs(i - j) * a * b
            for i, a in enumerate(totals)
            for j, b in enumerate(totals)
        )
        assert line.squared() == pytest.approx(expected)
        line._settle(line.growth)
        assert line.squared() == pytest.approx(expected), index
    assert line.charges == []


def test_a_check_corrects_what_was_charged():
    line = Line(Growth(grows=True), 1.0)
    line.learn(0.2, 1.0, 0, None)
    line.charges.append(Charge(0.5, 1.0))
    assert math.sqrt(line.squared()) == pytest.approx(0.1)
    line.learn(0.8, 2.0, 2, 0.0)
    assert math.sqrt(line.squared()) == pytest.approx(0.5 * 0.4)
    assert line.coherence == 0.5
    line.unknown(4)
    assert line.growth.at(1.0) == math.inf and math.sqrt(line.squared()) == pytest.approx(0.2)


def test_the_cheapest_for_what_they_save_are_bought():
    def account(budget):
        account = Account(budget, scale=1.0, unit=1.0)
        for name, saving, error in (("a", 1.0, 0.1), ("b", 0.5, 0.1)):
            account.lines[name, "net", 0] = line = Line(Growth(grows=False), saving)
            line.learn(error, 0.0, 0, None)
        return account

    later = [Ahead(1.0, 0.1)]
    for budget, buys in ((0.05, ""), (0.11, "a"), (0.17, "a"), (0.2, "ab")):
        lines = account(budget).lines
        bought = "".join(
            name
            for (name, *_), line in lines.items()
            if account(budget).affords(line, Charge(1.0, 0.0), later)
        )
        assert bought == buys, budget
    poor = account(0.15)
    (line, *_) = poor.lines.values()
    assert not poor.affords(line, Charge(1.0, 0.0), [Ahead(0.5, 0.1)] * 3), "others are cheaper"
    line.charges.append(Charge(1.6, 0.0))
    assert poor.left < 0 and poor.spent == pytest.approx(0.16)


def test_what_was_never_checked_is_never_bought():
    account = Account(0.5, scale=1.0)
    line = account.lines["a", "net", 0] = Line(Growth(grows=True), 1.0)
    assert not account.affords(line, Charge(1.0, 1.0), [])
    assert account.spent == 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_weights_of_branches_are_read_off_the_guided_output(sign):
    c, u, s = (torch.randn(50) for _ in range(3))
    guided = sign * (u + 4.0 * (c - u) + 2.5 * (c - s))
    found = weights(guided, {"uncond": u, "cond": c, "skip_layers": s})
    assert found == pytest.approx({"cond": 6.5, "uncond": -3.0, "skip_layers": -2.5}, rel=1e-4)
    assert weights(sign * c, {"cond": c}) == {"cond": 1.0}
    assert weights(c, {"cond": c, "uncond": c.clone()}) == {"cond": 1.0, "uncond": 0.0}
    assert float(cosine(c, -c)) == pytest.approx(-1.0)


# Calibration.


def calls(count, steps=5):
    for number in range(count):
        yield {
            "prompt": PROMPTS[number % len(PROMPTS)],
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(number),
            "output_type": "latent",
            "guidance_scale": 3.0,
        }


def test_a_scale_is_measured_and_its_file_serves(bench, tmp_path):
    pipe = bench.pipe("sd3")
    (tmp_path / "bold.toml").write_text(Plan(BOLD).to_toml())
    options = {"plan": tmp_path / "bold.toml", "budgets": (0.1, 1.0), "max_error": 0.1}
    found = calibrate_guard(pipe, calls(LEAST), options)
    file = tmp_path / "a-guard.json"
    file.write_bytes(found.files["file"])
    basis = Basis.model_validate_json(file.read_text())
    assert basis.captions == LEAST and basis.budgets == (0.1, 1.0)
    assert basis.bounds == tuple(map(max, basis.errors)), "of 19 the largest"
    assert 0 < basis.bounds[0] < basis.bounds[1]
    assert basis.model == identity(pipe)
    assert found.method == Guard(max_error=0.1) and found.beside == (BOLD,)
    promise = 1.01 * basis.bounds[0]
    plan = Plan(BOLD, guard=Guard(max_error=promise, file=file))
    _, report = run(bench, "sd3", plan)
    assert report.guard.note == "calibrated on 19 pictures"
    less = Plan(BOLD, guard=Guard(max_error=basis.bounds[0] / 2, file=file))
    output, report = run(bench, "sd3", less)
    assert bits_equal(output, bench.stock("sd3", steps=STEPS))
    assert "so everything computes" in report.guard.note
    assert report.guard.told()[0]["checks"] == 0
    _, report = run(bench, "sd3", Plan(UNCOND_LEFT_OUT, BOLD, guard=plan.guard))
    assert "with another plan" in report.guard.note
    with pytest.raises(errors.UnsupportedModel, match=r"a-guard\.json is for another network"):
        plan.attach(bench.pipe("sd15"))
    call = next(calls(1))
    (one,) = measured(pipe, call, plan, [plan.guard], reference(pipe, call, plan))
    assert one.real <= promise and one.nfe < one.stock


def test_a_file_that_is_none_is_refused(bench, tmp_path):
    file = tmp_path / "a-guard.json"
    plan = Plan(BOLD, guard=Guard(max_error=0.1, file=file))
    with pytest.raises(errors.BadInput, match=r"cannot be read \(No such file.*accel calibrate"):
        plan.attach(bench.pipe("sd3"))
    file.write_text("{}")
    with pytest.raises(errors.BadInput, match="is no file of a guard: `accel calibrate guard`"):
        plan.attach(bench.pipe("sd3"))


def test_what_may_be_spent_on_a_promise():
    rest = {"coverage": 0.95, "captions": 19, "steps": 8, "model": "", "plan": {}, "errors": ()}
    basis = Basis(budgets=(0.01, 0.02, 0.08, 0.2), bounds=(0.0, 0.02, 0.32, 0.32), **rest)
    wanted = {0.01: 0.01, 0.02: 0.02, 0.08: 0.04, 0.32: 0.2, 5.0: 0.2}
    assert {one: basis.spending(one) for one in wanted} == pytest.approx(wanted)
    basis = Basis(budgets=(0.01, 0.02), bounds=(0.03, 0.04), **rest)
    assert basis.spending(0.029) == 0, "below the smallest bound nothing keeps a promise"


def test_the_rank_of_a_promise():
    assert [rank(n) for n in (19, 20, 39, 40, 99)] == [19, 20, 38, 39, 95]
    with pytest.raises(errors.BadInput, match="rests on 19 at least, and there are 18"):
        rank(18)


def test_a_calibration_says_ahead_that_it_has_too_few(tmp_path):
    from app.calibrate import calibrate

    with pytest.raises(errors.BadInput, match="guard rests on 19 prompts at least, and --count"):
        calibrate({"what": "guard", "model": str(tmp_path)})


def test_the_guard_is_public():
    assert accel.Guard is Guard
