"""`accel prove`: any plan promises what was measured of it here, as one that was tuned does."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved import Folders, done, run
from tiny import PIPELINES
from tune_calls import NAME, STEPS, call_of

import accel
from accel import Plan, errors
from accel.cache import EasyCache
from accel.guard import Guard
from accel.tuned import Network
from accel.tuning import proof, prove
from accel.tuning.cases import cases, unseen
from accel.tuning.subject import Subject
from accel.tuning.targets import TIMES, Targets
from app import plans
from samplers import Steps

PROMPTS = ["a fox", "a boat", "a tower", "rain", "a crane", "a lamp", "snow"]
FAST = Plan(Steps(share=0.5))
FIDELITY = ("ssim", "psnr", "perceptual")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def pipe():
    return PIPELINES[NAME].build()


def proven(pipe, plan=FAST, target="ssim>=0.01", **more):
    asked = {"prompts": PROMPTS, "call": call_of(), "held_out": 3} | more
    return prove(pipe, plan, target, **asked)


def stock(pipe):
    noise = torch.Generator().manual_seed(5)
    return pipe(**call_of(), prompt="a fox", generator=noise, output_type="pt").images


# What is drawn


@given(st.tuples(*[st.integers(1, 40)] * 3), st.integers(1, 60), st.booleans())
@settings(max_examples=20)
def test_a_proof_draws_what_tuning_would_prove_on_and_never_what_it_saw(split, count, video):
    call = {"num_frames": 9} if video else {}
    some, choice, held_out = cases(None, call, split)
    assert unseen(None, call, split[2]) == held_out
    fresh = unseen(None, call, count)
    assert not {one.seed for one in fresh} & {one.seed for one in (*some, *choice)}
    assert len({one.key for one in fresh}) == count
    own = [f"prompt {number}" for number in range(sum(split))]
    assert unseen(own, call, split[2], split[0] + split[1]) == cases(own, call, split)[2]
    with pytest.raises(errors.BadInput, match="that it was tuned on"):
        unseen(own, call, split[2] + 1, split[0] + split[1])


def test_it_measures_what_a_proof_measures_and_leaves_the_pipeline_as_it_was(pipe):
    before = stock(pipe)
    found = proven(pipe)
    told = found.tuned
    assert found.methods == FAST.methods and told.targets == ("ssim>=0.01",)
    assert (told.prompts, told.chosen_on, told.held_out, told.plans) == (0, 0, 3, 1)
    assert {one.measure for one in told.figures} == {*FIDELITY, *TIMES}
    subject = Subject.of(pipe, Targets.parse("ssim>=0.01"))
    held_out = unseen(PROMPTS, call_of(), 3)
    checks = subject.checks(held_out, lambda _: None)
    again = proof.figures(checks.check(FAST), subject.targets)
    for name in FIDELITY:
        assert told.figure(name) == next(one for one in again if one.measure == name)
    assert told.texts == proof.texts(held_out)
    assert torch.equal(stock(pipe), before)
    found.attach(pipe).detach()
    assert Plan.from_toml(found.to_toml()) == found


def test_a_plan_with_evidence_holds_what_it_held_and_keeps_how_it_was_found(pipe):
    """Here as if tuned on the first three prompts: those are left out, and stay told."""
    first = proven(pipe)
    tuned = first.tuned.model_copy(
        update={"prompts": 2, "chosen_on": 1, "plans": 44, "minutes": 7.0, "elsewhere": "warn"}
    )
    again = proven(pipe, FAST.proven(tuned), ()).tuned
    assert again.targets == tuned.targets
    for name in ("prompts", "chosen_on", "plans", "minutes", "elsewhere"):
        assert getattr(again, name) == getattr(tuned, name)
    assert again.texts == proof.texts(unseen(PROMPTS, call_of(), 3, 3)) != tuned.texts


def test_a_plan_of_another_network_is_proven_for_this_one(pipe):
    other = PIPELINES[NAME].build()
    with torch.no_grad():
        for weight in other.transformer.parameters():
            weight.mul_(1.5)
    first = proven(pipe)
    with pytest.raises(errors.UnsupportedModel, match="other weights"):
        first.attach(other)
    again = proven(other, first)
    assert again.tuned.misfit(Network.of(other)) is None and again.tuned.misfit(Network.of(pipe))
    again.attach(other).detach()


def test_a_guard_is_part_of_what_is_proven(pipe):
    plan = Plan(EasyCache(threshold=0.5), guard=Guard(max_error=0.5))
    assert proven(pipe, plan).guard == plan.guard


# What does not hold


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("ssim>=1", r"does not hold ssim>=1 here\. After 1 prompts.*met by 0% of them"),
        ("speedup>=1000", r"After 3 prompts: speedup .*met by 0% of them"),
    ],
)
def test_what_it_does_not_hold_is_told_with_what_it_does(pipe, target, said):
    before = stock(pipe)
    with pytest.raises(errors.NotReached, match=said):
        proven(pipe, target=target)
    assert torch.equal(stock(pipe), before)


def test_a_method_that_does_nothing_is_told_of(pipe):
    with pytest.warns(errors.AccelWarning, match=r"cache\.EasyCache did nothing"):
        found = proven(pipe, Plan(EasyCache(threshold=1e-9)), "ssim>=1")
    assert found.tuned.figure("ssim").mean == 1.0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"target": ()}, "no target yet: name what it is to hold"),
        ({"target": "beauty>=1"}, "names the measure"),
        ({"target": "accuracy>=0.5"}, "only captions of the scenes"),
        ({"held_out": 8}, "found 7 different prompts, needed are 8"),
        ({"held_out": 0}, "at least 1"),
    ],
)
def test_bad_input_is_refused(pipe, more, said):
    with pytest.raises(errors.BadInput, match=said):
        proven(pipe, **more)


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")(NAME)


def test_the_command_writes_a_plan_whose_files_lie_where_they_lay(model):
    for name in ("made", "kept"):
        Path(name).mkdir()
    asked = ["--model", model, "--steps", STEPS]
    done("calibrate", "ems", *asked, "--count", 1, "--out", "made/v3.toml")
    told = done(
        "prove", *asked, "--plan", "made/v3.toml", "--target", "psnr>=1", "--held-out", 2,
        "--out", "kept/v3.toml",
    )  # fmt: skip
    assert "psnr>=1: held on 2 prompts: ssim" in told.stderr
    found = plans.read(Path("kept/v3.toml"))
    assert found.tuned.held_out == 2
    done("generate", "a fox", *asked, "--plan", "kept/v3.toml", "--out", "a.png")
    done("prove", *asked, "--plan", "kept/v3.toml", "--held-out", 1, "--out", "again.toml")
    assert plans.read(Path("again.toml")).tuned.targets == ("psnr>=1",)
    taken = run("prove", *asked, "--plan", "again.toml", "--out", "again.toml")
    assert taken.exit_code == 2 and "there already" in taken.output


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--target", "ssim>=0.9"], 2, "no plan to prove"),
        (["--preset", "fast"], 2, "holds no target yet"),
        (["--preset", "fast", "--target", "beauty>=1"], 2, "names the measure"),
        (["--set", "samplers.Steps.share=0.5", "--target", "ssim>=1"], 1, "does not hold"),
    ],
)
def test_nothing_is_written_where_nothing_is_proven(model, options, code, said):
    result = run("prove", "--model", model, "--steps", str(STEPS), *options)
    assert result.exit_code == code and said in result.output
    assert not list(Path().iterdir())


def test_what_the_plan_saw_is_told_apart_from_what_is_asked_for(pipe, model):
    known = proven(pipe)
    known = known.proven(known.tuned.model_copy(update={"prompts": 2, "chosen_on": 1}))
    Path("plan.toml").write_text(known.to_toml())
    Path("few.txt").write_text("\n".join(PROMPTS[:4]))
    asked = ["--plan", "plan.toml", "--prompts", "few.txt", "--held-out", "2"]
    result = run("prove", "--model", model, "--steps", str(STEPS), *asked)
    said = "has 4 prompts, --held-out asks for 2 beside the 3 that the plan was tuned on"
    assert result.exit_code == 2 and said in " ".join(result.output.split())


def test_it_is_a_function_of_the_package():
    assert accel.prove is prove
