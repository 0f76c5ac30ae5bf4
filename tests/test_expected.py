"""What is expected of presets: every figure has its source, and says how sure it is."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from diffusers import FlowMatchHeunDiscreteScheduler

import accel
from accel import Plan, cache, expected, explain, guidance
from accel.expected import Certainty, Measured
from accel.plan import PRESETS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def flux():
    return accel.load("scenes-flux")


def by_preset(said):
    return {one.preset: one for one in said.presets}


def tool():
    spec = importlib.util.spec_from_file_location("write_figures", ROOT / "tools/write_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_that_ship_are_those_of_the_committed_results() -> None:
    made = tool().figures()
    assert expected.measured().figures == made
    assert expected.measured().sources == tool().sources(made)
    assert {one.model for one in made} == set(expected.measured().networks)


@pytest.mark.parametrize("order", [(2, 3), (3, 2)])
def test_of_several_results_of_a_model_the_one_of_most_captions_counts(
    tmp_path, monkeypatch, order
) -> None:
    figures, fast = tool(), Plan.preset("fast")
    row = {"plan": fast.to_dict(), "ssim": 0.9, "psnr": 30.0}
    row |= {"speedup": {"median": 2.0, "low": 1.0, "high": 3.0}}
    machine = {"device": "cpu", "processor": "p", "threads": 1, "date": "2026-12-03"}
    for name, captions in zip(("caches", "guidance"), order, strict=True):
        result = {"machine": machine, "call": {}, "rows": [row], "captions": [*range(captions)]}
        (tmp_path / f"{name}-scenes-flux.json").write_text(json.dumps(result))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    [one] = figures.figures()
    assert one.captions == 3 and one.plan == fast.digest


def test_on_a_model_that_was_measured_it_says_what_was_measured(flux) -> None:
    pipe, call = flux
    result = json.loads((RESULTS / "presets-scenes-flux.json").read_text())["variants"]
    said = explain(pipe, settings=call)
    for name, one in by_preset(said).items():
        assert one.certainty == Certainty.MEASURED and one.reason is None
        [figures] = one.figures
        spread = {"median": figures.speedup, "low": figures.low, "high": figures.high}
        assert spread == {key: result[name]["speedup"][key] for key in spread}
        assert (figures.ssim, figures.ssim_worst) == tuple(
            result[name][key] for key in ("ssim", "ssim_worst")
        )
        assert (figures.nfe, figures.stock_nfe) == (result[name]["nfe"], result["stock"]["nfe"])
        assert f"{figures.speedup:.2f} times" in str(one) and "measured on this model" in str(one)
    assert "presets-scenes-flux.json: scenes-flux, num_inference_steps=28" in str(said)


def test_for_other_steps_or_another_scheduler_it_is_not_measured(flux, monkeypatch) -> None:
    pipe, call = flux
    other = by_preset(explain(pipe, settings={**call, "num_inference_steps": 8}))["fast"]
    assert other.certainty == Certainty.TRANSFERRED and other.own
    assert "not measured for these numbers of the call" in str(other)
    heun = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    monkeypatch.setattr(pipe, "scheduler", heun)
    elsewhere = by_preset(explain(pipe, settings=call))["fast"]
    assert (elsewhere.certainty, elsewhere.own) == (Certainty.TRANSFERRED, False)
    assert elsewhere.evaluations is None and not elsewhere.bound  # two evaluations a step


@pytest.mark.parametrize("name", ["flux_cfg", "sd15"])
def test_on_another_model_it_says_whose_figures_they_are(bench, name) -> None:
    said = explain(bench.pipe(name), settings={"num_inference_steps": 12})
    for one in said.presets:
        everywhere = expected.measured().of(Plan.preset(one.preset))
        assert one.reason is None
        if one.preset == "exact":
            assert one.certainty == Certainty.DERIVED
        else:
            assert (one.certainty, one.figures) == (Certainty.TRANSFERRED, everywhere)
            assert str(one).startswith("not measured on this model")
            assert f"accel compare --preset {one.preset}" in str(one)
    assert json.loads(json.dumps(asdict(said)))["presets"][0]["certainty"] == "derived"


def test_a_preset_that_cannot_be_put_on_says_why(bench) -> None:
    pipe = bench.pipe("flux_cfg")
    with Plan(cache.EasyCache()).attach(pipe):
        with pytest.raises(accel.errors.Conflict) as refused:
            Plan.preset("fast").attach(pipe)
        fast = by_preset(explain(pipe))["fast"]
    assert fast.reason == str(refused.value) and not fast.figures
    assert str(fast) == f"does not serve this pipeline: {refused.value}"


def test_without_any_figures_nothing_is_known(bench, monkeypatch) -> None:
    monkeypatch.setattr(expected, "measured", lambda: Measured({}, (), {}))
    said = by_preset(explain(bench.pipe("flux_cfg")))
    assert said["balanced"].certainty == Certainty.UNKNOWN
    assert not any(one.figures for one in said.values())
    assert "times as fast" not in str(said["balanced"])


@pytest.mark.parametrize("steps", [5, 9])
@pytest.mark.parametrize("name", ["flux_cfg", "sd15"])
def test_what_is_computed_in_any_case_is_reached_where_everything_else_is_left_out(
    bench, name, steps
) -> None:
    plan = Plan(cache.EasyCache(threshold=1e9), guidance.Adaptive(threshold=-1.0, min_guided=0.25))
    with plan.attach(bench.pipe(name)) as run:
        bench.call(name, steps=steps)
    assert run.report.nfe == expected.computed_at_least(plan, steps, 2)


def test_a_bound_is_said_only_where_methods_state_it() -> None:
    tome = accel.methods()["tokens.ToMe"]
    assert expected.computed_at_least(Plan(tome(ratio=0.5)), 9, 2) is None
    assert expected.computed_at_least(Plan(tome.off()), 9, 2) == 18
    for name in PRESETS:
        least = expected.computed_at_least(Plan.preset(name), 28, 2)
        assert least is not None and (least == 56) == (name == "exact")


def test_the_bound_that_the_readme_names_is_that_of_the_preset() -> None:
    least = expected.computed_at_least(Plan.preset("fast"), 28, 2)
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"`fast` computes at least {least} of 56 evaluations at 28 guided steps" in text
