"""The benchmark of tuning: the sweep that it is held against, and what it says of both."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

import accel
import samplers
from accel import Plan, cache, guidance
from accel.tuning.bench import Case, Drawn, Line
from accel.tuning.targets import Targets

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import tuning

MODELS = ("scenes-unet", "scenes-flux", "scenes-wan")
CASES = [
    Case({"prompt": f"a house {number}", "num_inference_steps": 4}, number) for number in range(6)
]
WANTED = Targets.parse("ssim>=0.95")


def test_the_sweep_has_two_hundred_plans_and_stock_is_one():
    plans = tuning.grid()
    assert len(plans) == len(set(plans)) == 200
    assert Plan() in plans


@pytest.mark.parametrize("model", MODELS)
def test_every_plan_of_the_sweep_serves_every_bundled_model(model):
    pipe, _ = accel.load(model)
    for plan in tuning.grid():
        plan.attach(pipe).detach()


class Toy:
    """Draws plans whose seconds and nearness are known: a grey picture for each.

    Args:
        known: By plan its seconds, and on which cases it draws what stock draws.
    """

    def __init__(self, known):
        self.known, self.asked = known, []

    def figures(self, plan, case):
        self.asked.append((plan, case.seed))
        seconds, near = self.known[plan]
        held = {"ssim": 1.0 if case.seed in near else 0.5}
        return Line("", plan.to_json(), case.key, held, seconds, seconds)

    def time(self, plan, case):
        seconds, near = self.known[plan]
        shade = 100 if case.seed in near else 200
        return Drawn(
            [Image.linear_gradient("L").point(lambda x: x * shade // 100).convert("RGB")], seconds
        )


def test_the_sweep_ends_with_the_fastest_plan_that_holds_on_held_out_prompts(monkeypatch):
    everywhere, fast = range(6), cache.EasyCache(threshold=0.4)
    far, near = Plan(fast), Plan(cache.EasyCache(threshold=0.1))
    lucky = Plan(samplers.Steps(share=0.25))
    toy = Toy(
        {
            Plan(): (1.0, everywhere),
            far: (0.2, [0]),  # misses the second prompt of the search
            lucky: (0.3, range(4)),  # holds on all of the search's, and on none that are held out
            near: (0.5, everywhere),
            Plan(guidance.Adaptive()): (0.7, everywhere),
        }
    )
    monkeypatch.setattr(tuning, "grid", lambda: list(toy.known))
    found = tuning.swept(toy, (CASES[:4], CASES[4:5], CASES[5:]), WANTED)
    assert found.best == near
    assert found.holding == (lucky, near, Plan(guidance.Adaptive()), Plan())
    assert found.failed == 1 and found.refused == 0
    assert [seed for plan, seed in toy.asked if plan == far] == [0, 1]


def test_tuned_and_swept_plans_are_timed_in_turns():
    toy = Toy({Plan(): (1.0, range(6)), Plan(cache.EasyCache()): (0.4, range(6))})
    plans = {"accel.tune": Plan(cache.EasyCache()), "sweep": Plan()}
    found = tuning.timed(toy, plans, CASES)
    assert found["over"]["median"] == pytest.approx(0.4)
    assert found["plans"]["accel.tune"]["faster"]["median"] == pytest.approx(2.5)
    assert found["plans"]["sweep"]["faster"]["median"] == pytest.approx(1.0)


def test_a_plan_is_told_by_what_is_not_as_by_default():
    assert tuning.told(Plan()) == "stock"
    assert tuning.told(Plan(cache.EasyCache(threshold=0.4), guidance.Adaptive())) == (
        "guidance.Adaptive + cache.EasyCache (threshold 0.4)"
    )


def test_the_benchmark_says_how_near_tuning_came(tmp_path, monkeypatch, capsys):
    pipe, call = accel.load("scenes-unet")
    short = call | {"num_inference_steps": 4, "height": 64, "width": 64}
    monkeypatch.setattr(tuning.accel, "load", lambda _name: (pipe, short))
    axes = (({}, {"cache.EasyCache": {"threshold": 0.4}}),)
    monkeypatch.setattr(tuning, "AXES", axes)
    asked = ["--target", "ssim>=0.5", "--budget", "5", "--prompts", "1", "--choice", "1"]
    asked += ["--held-out", "1"]
    folders = ["--kept", str(tmp_path / "kept"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["tuning.py", *asked, *folders])
    tuning.main()
    result = json.loads((tmp_path / "tuning-scenes-unet.json").read_text())
    table = (tmp_path / "tuning-scenes-unet.md").read_text()
    assert table in capsys.readouterr().out
    over = result["over"]["median"]
    assert ("not reached" in table) == (over > tuning.NEAR)
    assert result["plans"]["sweep"]["tried"] == 2
    assert all(one["told"] in table for one in result["plans"].values())
