"""`accel tune`: what it promises holds, and what it writes knows what it is for."""

import json
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from saved import Folders, done, run
from scipy.stats import binom
from tiny import PIPELINES
from tune_calls import NAME, STEPS, call_of

import accel
from accel import Plan, errors
from accel.tuned import Figure, Tuned
from accel.tuning import proof
from accel.tuning.bench import Case, Ledger, Line
from accel.tuning.cases import cases
from accel.tuning.proof import Checks, Finalist, Pair, Sample
from accel.tuning.targets import TIMES, Targets, may_miss, sure_misses
from accel.tuning.tune import Session, Tuning, front
from app import metadata, plans
from app.request import Choice
from app.tune import seconds
from samplers import Steps

SHIPPED = sorted((Path(__file__).parent.parent / "benchmarks" / "tuned").glob("*.toml"))


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


class Clock:
    """Every look at it takes a tenth of a second."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.1
        return self.now


# The proof


class Painter:
    """Stands in for a bench: stock takes 2 s, a plan 1 s, with pictures as near as it is told."""

    def __init__(self, near):
        self.near = near
        self.order = []

    def time(self, plan, case):
        self.order.append((len(plan) > 0, case.seed))
        grey = np.zeros((16, 16, 3), np.uint8)
        if len(plan) and not self.near(case.seed):
            grey[:8] = 255
        return SimpleNamespace(pictures=[Image.fromarray(grey)], seconds=1.0 if len(plan) else 2.0)

    def figures(self, plan, case):
        (one,) = self.time(plan, case).pictures
        return Line("", "", "", {"ssim": 0.5 if np.asarray(one).any() else 1.0}, 0.5, 0.5)


class Painters(Painter):
    """Plans are told apart by their share of the steps: each misses some prompts of its own."""

    def __init__(self, misses):
        super().__init__(lambda _: True)
        self.misses = misses

    def time(self, plan, case):
        if len(plan):
            self.near = lambda seed: seed not in self.misses[next(iter(plan)).share]
        return super().time(plan, case)


FAST = Plan(Steps(share=0.5))


def checks(near, count, targets="ssim>=0.9"):
    some = [Case({"prompt": "x"}, number) for number in range(count)]
    return Checks(Painter(near), some, Targets.parse(targets), ["ssim"])


@given(st.sets(st.integers(0, 39), max_size=6))
def test_a_plan_passes_where_at_most_one_in_twenty_misses_and_is_given_up_at_the_next(misses):
    proving = checks(lambda seed: seed not in misses, 40, "ssim>=0.6")
    pairs = proving.check(FAST)
    assert proving.holds(pairs) == (len(misses) <= 2)
    if len(misses) > 2:
        assert len(pairs) == sorted(misses)[2] + 1
    else:
        assert len(pairs) == 40


def test_stock_goes_first_every_other_time_and_again_beside_a_further_plan_at_one_in_five():
    proving = checks(lambda _: True, 11)
    assert proving.holds(proving.check(FAST))
    assert proving.bench.order[:8] == [
        (False, 0), (True, 0), (True, 1), (False, 1), (False, 2), (True, 2), (True, 3), (False, 3)
    ]  # fmt: skip
    assert sum(not fast for fast, _ in proving.bench.order) == 11
    proving.bench.order.clear()
    pairs = proving.check(FAST)
    assert [seed for fast, seed in proving.bench.order if not fast] == [0, 5, 10]
    assert [at for at, pair in enumerate(pairs) if pair.stock is not None] == [0, 5, 10]
    assert proof.ratios(pairs) == [2.0] * 3


COUNT, MAY, SURE = 128, 6, 4
MISSES = st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from([0.8, 1.0, 1.2]))
"""Of a plan: prompts of the choice that miss, held-out ones that do, and its room in the search."""


def chosen(ranked, late=lambda: False):
    """Which of some plans is proven, which of them failed at the choice and after it, the proof."""
    plans = [Plan(Steps(share=round(0.9 - 0.1 * at, 1))) for at in range(len(ranked))]
    misses = dict(zip((next(iter(plan)).share for plan in plans), ranked, strict=True))
    painters = [
        Painters({share: set(range(one[stage])) for share, one in misses.items()})
        for stage in (0, 1)
    ]
    held_out = checks(lambda _: True, COUNT, "ssim>=0.6")
    held_out.bench = painters[1]
    choice = Sample(painters[0], held_out.cases, held_out.targets)
    order = [Finalist(plan, room) for plan, (_, _, room) in zip(plans, ranked, strict=True)]
    found = proof.first(order, choice, held_out, late)
    at = None if found is None else plans.index(found.plan)
    return at, *(list(map(plans.index, one.failed)) for one in (choice, held_out)), found


@settings(max_examples=40, deadline=None)
@given(st.lists(MISSES, max_size=4))
def test_the_first_plan_is_proven_that_was_chosen_with_room_and_holds_on_others(ranked):
    """Whoever fails before is named; the choice asks for more than the proof does."""
    at, not_chosen, refuted, found = chosen(ranked)
    proven = [one for one, (m, held, _) in enumerate(ranked) if m <= SURE and held <= MAY]
    assert at == (proven or [None])[0]
    seen = ranked[:at]
    assert not_chosen == [one for one, (m, _, _) in enumerate(seen) if m > SURE]
    assert refuted == [one for one, (m, held, _) in enumerate(seen) if m <= SURE and held > MAY]
    if found is not None:
        assert len(found.pairs) == COUNT
        assert sum(pair.figures["ssim"] < 0.6 for pair in found.pairs) == ranked[at][1]


def test_without_time_unlikely_plans_are_not_looked_at():
    sure, lucky = (0, 0, 1.2), (0, 0, 0.9)
    assert chosen([lucky, sure])[0] == 0
    assert chosen([lucky, (SURE + 1, 0, 1.1), sure], lambda: True)[:3] == (2, [1], [])


def test_nothing_is_drawn_to_choose_among_plans_that_only_times_decide():
    painter = Painter(lambda _: False)
    choice = Sample(painter, checks(None, 4).cases, Targets(()))
    assert choice.chooses(FAST) and not painter.order


@given(st.integers(1, 400))
def test_a_plan_that_misses_too_often_seldom_holds_with_room(count):
    sure = sure_misses(count)
    assert 0 <= sure <= may_miss(count)
    assert sure == 0 or binom.cdf(sure, count, 0.05) <= 0.25
    assert binom.cdf(sure + 1, count, 0.05) > 0.25


def test_times_are_targets_too():
    assert not checks(lambda _: True, 4, ["speedup>=3"]).holds([Pair(2.0, 1.0, {})] * 4)
    assert checks(lambda _: True, 4, ["speedup>=2", "seconds<=1"]).holds([Pair(2.0, 1.0, {})] * 4)
    assert not checks(lambda _: True, 4, ["seconds<=0.9"]).holds([Pair(2.0, 1.0, {})] * 4)


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=30), st.booleans())
def test_intervals_hold_what_they_are_of(values, of_median):
    centre, low, high = proof.interval(values, of_median=of_median)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert centre == pytest.approx(np.median(values) if of_median else np.mean(values))


def test_a_share_of_a_few_prompts_promises_little():
    assert proof.lowest_share(20, 20) == pytest.approx(0.8389, abs=1e-3)
    assert proof.lowest_share(128, 128) > 0.97 > proof.lowest_share(8, 8)


# All of it


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A tuning of a tiny pipeline, by a clock that counts looks at it."""
    pipe = PIPELINES[NAME].build()
    folder = tmp_path_factory.mktemp("trials")
    return pipe, session(pipe, folder=folder).run(), folder


def session(pipe, target="ssim>=0.9", budget=150.0, folder=None, **more):
    prompts = ["a fox", "a boat", "a tower", "rain", "a crane", "a lamp", "snow"]
    some, choice, held_out = cases(prompts, call_of(), (2, 2, 3))
    return Session(
        pipe=pipe, targets=Targets.parse(target), cases=some, choice=choice, held_out=held_out,
        budget=budget, folder=folder, clock=Clock(), **more,
    )  # fmt: skip


def test_a_tuned_plan_holds_its_evidence_and_attaches_where_it_was_tuned(found):
    pipe, tuning, _ = found
    assert isinstance(tuning, Tuning) and isinstance(tuning.evidence, Tuned)
    proven = tuning.evidence
    assert proven.targets == ("ssim>=0.9",) and proven.prompts == proven.chosen_on == 2
    assert proven.held_out == 3
    figure = proven.figure("ssim")
    assert figure.mean >= 0.9 and figure.share == 1.0 and figure.low <= figure.mean <= figure.high
    assert dict(proven.call)["num_inference_steps"] == STEPS
    assert {one.measure for one in proven.figures} == {"ssim", "psnr", "perceptual", *TIMES}
    tuning.plan.attach(pipe).detach()
    assert proven.date and proven.plans == tuning.tried > 5
    for text in (str(tuning), repr(tuning.plan)):
        assert "ssim" in text


def test_it_is_the_same_plan_in_toml_json_and_dicts(found):
    plan = found[1].plan
    assert Plan.from_toml(plan.to_toml()) == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.beside(Path("elsewhere")) == plan
    assert hash(Plan.from_toml(plan.to_toml())) == hash(plan)
    assert Plan(*plan) != plan and Plan(*plan).methods == plan.methods


def test_it_goes_on_where_it_stopped_and_draws_nothing_twice(found):
    pipe, _, folder = found
    again = session(pipe, folder=folder)
    before = len(Ledger(folder / "trials.jsonl", again.bench.mark))
    assert before > 10
    again.run()
    written = [json.loads(text) for text in (folder / "trials.jsonl").read_text().splitlines()]
    keys = [(one["plan"], one["case"]) for one in written]
    assert len(keys) == len(set(keys)) >= before


def test_the_front_is_what_no_other_point_beats(found):
    points = front(found[1].points, "ssim")
    assert points == found[1].front()
    for one in found[1].points:
        assert any(
            better.cost <= one.cost and better.mean("ssim") >= one.mean("ssim") for better in points
        )
    costs = [point.cost for point in points]
    assert costs == sorted(set(costs))


def test_the_plot_is_a_picture_of_it(found):
    picture = found[1].plot()
    assert picture.size[0] > 600 and len(picture.convert("L").getcolors()) > 20


def test_the_pipeline_is_left_as_it_was(bench, same):
    pipe = bench.pipe(NAME)
    before = bench.call(NAME, steps=STEPS)
    session(pipe, budget=110.0).run()
    assert same(bench.call(NAME, steps=STEPS), before)


def test_on_another_pipeline_it_refuses_or_warns_by_choice(found):
    """Whatever the methods say themselves: those that are chosen, not measured, say nothing."""
    plan, other = FAST.proven(found[1].evidence), PIPELINES["sd3"].build()
    with pytest.raises(errors.UnsupportedModel, match=r"tuned for another network.*accel tune"):
        plan.attach(other)
    careless = Plan(*plan, tuned=plan.tuned.model_copy(update={"elsewhere": "warn"}))
    pipe = PIPELINES[NAME].build()
    with torch.no_grad():
        for weight in pipe.transformer.parameters():
            weight.add_(1.0)
    with pytest.raises(errors.UnsupportedModel, match="other weights"):
        plan.attach(pipe)
    with pytest.warns(errors.AccelWarning, match="other weights"):
        careless.attach(pipe).detach()


def test_on_another_scheduler_it_refuses(found):
    pipe = PIPELINES[NAME].build()
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    with pytest.raises(errors.UnsupportedModel, match="another scheduler"):
        found[1].plan.attach(pipe)


def test_another_call_is_told_of(found):
    pipe, tuning, _ = found
    call = {**call_of(steps=STEPS + 2), "prompt": "a fox", "output_type": "latent"}
    plan = FAST.proven(tuning.evidence)  # of fitted steps, another number is refused
    with warnings.catch_warnings(record=True) as told, plan.attach(pipe):
        warnings.simplefilter("always")
        pipe(**call)
    told = [str(one.message) for one in told if one.category is errors.AccelWarning]
    assert any("num_inference_steps=8" in text for text in told)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_tuned_plan_that_ships_is_of_the_model_that_ships(path):
    """And holds what its name says, by its own evidence."""
    name, _, level = path.stem.rpartition("-")
    plan = Plan.from_toml(path.read_text())
    pipe, call = accel.load(name)
    plan.attach(pipe).detach()
    assert (
        plan.tuned.targets == (f"ssim>={level}",) and dict(plan.tuned.call).items() <= call.items()
    )
    near = plan.tuned.figure("ssim")
    assert near.mean >= float(level) and near.share >= 0.95
    assert plan.tuned.figure("speedup").low > 1


def test_methods_that_were_changed_have_no_evidence(found):
    document = found[1].plan.to_dict()
    family = next(name for name in document if name not in ("plan", "tuned"))
    kind = next(iter(document[family]))
    del document[family][kind]
    with pytest.raises(errors.PlanError, match=r"changed after it was tuned.*\[tuned\]"):
        Plan.from_dict(document)
    document = found[1].plan.to_dict() | {"tuned": {"targets": 3}}
    with pytest.raises(errors.PlanError, match=r"^tuned\."):
        Plan.from_dict(document)


def test_changes_on_the_command_line_drop_the_evidence_but_for_where_it_may_be_used(found):
    Path("plan.toml").write_text(found[1].plan.to_toml())
    file = Path("plan.toml")
    assert plans.chosen(Choice(plan=file)) == found[1].plan
    changed = plans.chosen(Choice(plan=file, changes=["cache.EasyCache.threshold=0.3"]))
    assert changed.tuned is None
    elsewhere = plans.chosen(Choice(plan=file, changes=["tuned.elsewhere=warn"]))
    assert elsewhere.tuned.elsewhere == "warn" and elsewhere.methods == found[1].plan.methods
    for change in ("tuned.targets=3", "tuned.elsewhere.x=1"):
        with pytest.raises(errors.PlanError, match=r"only tuned\.elsewhere"):
            plans.chosen(Choice(plan=file, changes=[change]))
    with pytest.raises(errors.PlanError, match=r"only tuned\.elsewhere"):
        plans.chosen(Choice(preset="fast", changes=["tuned.elsewhere=warn"]))


# Tuned plans in a folder


def kept(folder, tuning, name, level, speedup, network=None):
    """A plan file that says that it was proven for an SSIM, at a speed."""
    tuned = tuning.evidence
    figures = tuple(
        one.model_copy(update={"mean": speedup}) if one.measure == "speedup" else one
        for one in tuned.figures
    )
    more = {"targets": (f"ssim>={level}",), "figures": figures, "network": network or tuned.network}
    plan = FAST.proven(tuned.model_copy(update=more))
    (folder / name).write_text(plan.to_toml())
    return plan


def test_a_goal_takes_the_fastest_plan_that_was_proven_to_hold_it(found, tmp_path):
    tuning = found[1]
    near = kept(tmp_path, tuning, "near.toml", 0.98, 1.5)
    fast = kept(tmp_path, tuning, "fast.toml", 0.95, 2.5)
    kept(tmp_path, tuning, "faster.toml", 0.9, 3.5)
    (tmp_path / "untuned.toml").write_text(Plan.preset("fast").to_toml())
    goals = {"ssim>=0.97": near, "ssim>=0.95": fast, "ssim>=0.93": fast}
    for goal, plan in goals.items():
        assert plans.chosen(Choice(goal=[goal], tuned=tmp_path)) == plan
    assert plans.chosen(Choice(goal=["ssim>=0.95", "speedup>=2"], tuned=tmp_path)) == fast
    for goal in (["ssim>=0.99"], ["psnr>=20"], ["ssim>=0.97", "speedup>=2"]):
        with pytest.raises(
            errors.BadInput, match=r"proven to hold .*near.toml: ssim>=0.98 at 1.50"
        ):
            plans.chosen(Choice(goal=goal, tuned=tmp_path))
    kept(tmp_path, tuning, "other.toml", 0.95, 2.5, network="abc:")
    with pytest.raises(errors.BadInput, match="several networks"):
        plans.chosen(Choice(goal=["ssim>=0.95"], tuned=tmp_path))


def test_a_goal_without_tuned_plans_says_how_to_get_them(tmp_path):
    for choice, said in (
        (Choice(goal=["ssim>=0.9"]), "by --tuned"),
        (Choice(goal=["ssim>=0.9"], tuned=tmp_path / "none"), "There is no folder"),
        (Choice(goal=["ssim>=0.9"], tuned=tmp_path), "accel tune --target"),
        (Choice(goal=["ssim>=0.9"], preset="fast"), "both given"),
    ):
        with pytest.raises(errors.BadInput, match=said):
            plans.chosen(choice)
    (tmp_path / "bad.toml").write_text("plan = 1\n[cache.Nonsense]\n")
    with pytest.raises(errors.PlanError, match=r"bad\.toml"):
        plans.chosen(Choice(goal=["ssim>=0.9"], tuned=tmp_path))


def test_a_job_and_its_rows_have_goals(found, tmp_path_factory):
    folder = Path("tuned")
    folder.mkdir()
    near = kept(folder, found[1], "near.toml", 0.98, 1.5)
    fast = kept(folder, found[1], "fast.toml", 0.95, 2.5)
    rows = [
        {"prompt": "a fox"},
        {"prompt": "a boat", "goal": "ssim>=0.98"},
        {"prompt": "rain", "preset": "exact"},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = Folders(tmp_path_factory.getbasetemp() / "saved-models")(NAME)
    asked = ["--model", model, "--goal", "ssim>=0.9", "--tuned", "tuned", "--batch", "1"]
    result = run("batch", "rows.jsonl", "--out", "out", "--device", "cpu", *asked)
    assert result.exit_code == 0, result.output
    made = {int(path.name[:5]): metadata.record_of(path) for path in Path("out").glob("*.png")}
    assert [Plan.from_dict(made[at].plan) for at in range(3)] == [fast, near, Plan()]


# What cannot be done


def test_what_nothing_holds_is_said_with_the_nearest():
    with pytest.raises(errors.NotReached, match=r"None of \d+ plans .* speedup>=500.*nearest"):
        session(PIPELINES[NAME].build(), ["ssim>=0.5", "speedup>=500"]).run()


def test_a_budget_that_is_too_short_for_the_proof_is_refused_before_the_search():
    with pytest.raises(errors.BadInput, match="budget of 5 s is too short"):
        session(PIPELINES[NAME].build(), budget=5.0).run()


@pytest.mark.parametrize(
    ("prompts", "split", "said"),
    [
        (["a", "b"], (2, 1, 2), "found 2 different prompts, needed are 2 to search, 1 to choose"),
        (["a", "a", "a", "a"], (2, 1, 1), "found 1 different prompts"),
        *((None, split, "at least 1 each") for split in ((0, 1, 2), (1, 0, 2), (1, 2, 0))),
    ],
)
def test_too_few_prompts_are_refused(prompts, split, said):
    with pytest.raises(errors.BadInput, match=said):
        cases(prompts, {}, split)


def test_prompts_of_the_proof_are_none_of_the_search():
    for video in ({}, {"num_frames": 17}):
        searched, choice, held_out = cases(None, video, (8, 30, 20))
        found = [*searched, *choice, *held_out]
        assert list(map(len, (searched, choice, held_out))) == [8, 30, 20]
        assert len({one.seed for one in found}) == len({one.key for one in found}) == 58
        assert {one.seed >= 1_000_000 for one in searched} == {False}
        assert {one.seed >= 1_000_000 for one in (*choice, *held_out)} == {True}


def test_prompts_of_the_proof_stay_when_more_choose():
    assert cases(None, {}, (8, 5, 20))[2] == cases(None, {}, (8, 30, 20))[2]


def test_accuracy_is_asked_of_captions_of_scenes_alone():
    pipe = PIPELINES[NAME].build()
    with pytest.raises(errors.BadInput, match="only captions of the scenes tell"):
        session(pipe, "accuracy>=0.5").run()


def test_a_call_without_steps_is_refused():
    some = [replace(one, call={k: v for k, v in one.call.items() if k != "num_inference_steps"})
            for part in cases(["a", "b", "c"], call_of(), (1, 1, 1)) for one in part]  # fmt: skip
    asked = Session(
        pipe=PIPELINES["flux_cfg"].build(), targets=Targets.parse("ssim>=0.9"), cases=some[:1],
        choice=some[1:2], held_out=some[2:], budget=1e6, clock=Clock(),
    )  # fmt: skip
    with pytest.raises(errors.BadInput, match="no num_inference_steps"):
        asked.run()


def test_without_optuna_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(errors.BadInput, match=r"pip install diffusers-accel\[tune\]"):
        session(PIPELINES[NAME].build()).run()


# The command


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90), ("10m", 600), ("2h", 7200), ("45", 45), ("1.5m", 90)]
)
def test_budgets_are_times(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "soon", "-3s", "0s", "10 days"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(errors.BadInput, match="no time"):
        seconds(text)


def test_the_command_writes_a_plan_that_the_others_take(tmp_path_factory):
    model = Folders(tmp_path_factory.getbasetemp() / "saved-models")(NAME)
    asked = ["--model", model, "--target", "ssim>=0.8", "--captions", "1", "--choice", "1"]
    asked += ["--held-out", "2"]
    told = done("tune", *asked, "--budget", "25s", "--out", "fast.toml", "--format", "json")
    document = json.loads(told.stdout)
    assert document["plan"]["tuned"]["held_out"] == 2
    assert "use it by: accel generate" in told.stderr
    with Image.open("fast.png") as plot:
        assert plot.size[0] > 600
    assert Path("fast-trials/trials.jsonl").is_file()
    assert plans.read(Path("fast.toml")).tuned is not None
    done(
        "generate", "a fox", "--model", model, "--plan", "fast.toml", "--seed", 1, "--out", "a.png"
    )
    looser = ["--target", "ssim>=0.7", "--trials", "fast-trials", "--out", "faster.toml"]
    done("tune", *asked[:2], *asked[4:], *looser, "--budget", "20s")
    assert not Path("faster-trials").exists()
    done("generate", "--like", "a.png", "--out", "b.png")
    with Image.open("a.png") as one, Image.open("b.png") as other:
        assert one.tobytes() == other.tobytes()
    again = run("tune", *asked, "--out", "fast.toml")
    assert again.exit_code == 2 and "there already" in again.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "beauty>=1"], "names the measure"),
        ([], "no target"),
        (["--target", "ssim>=0.9", "--budget", "soon"], "no time"),
        (["--target", "ssim>=0.9", "--prompts", "none.txt"], "cannot be read"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(options, said):
    result = run("tune", "--model", "scenes-flux", *options)
    assert result.exit_code == 2 and said in result.output
    assert not list(Path().iterdir())


def test_a_figure_says_what_it_is_of():
    figure = Figure(measure="ssim", mean=0.9, low=0.8, high=1.0)
    assert math.isclose(figure.mean, 0.9)
    with pytest.raises(ValueError, match="finite"):
        Figure(measure="ssim", mean=math.nan, low=0.0, high=1.0)
