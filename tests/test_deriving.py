"""Presets as tuning finds them: the cheapest plans that hold a level on every model."""

import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import PIPELINES

from accel import Plan
from accel.cache import EasyCache
from accel.tuning.bench import Case, Line
from accel.tuning.space import FAMILIES

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import deriving

pytest.importorskip("optuna", reason="the extra 'tune' is not installed")


class Model:
    """Stands for a bench: what a threshold saves and loses, by closed formulas; noise at `odd`."""

    def __init__(self, name, harm, odd=0.0):
        self.mark, self.harm, self.odd = name, harm, odd
        self.odd_at = lambda _case: True
        self.pipe = PIPELINES["flux_cfg"].build()
        self.drawn = []

    def _of(self, plan):
        (threshold,) = (one.threshold for one in plan) if len(plan) else (0.0,)
        return threshold

    def figures(self, plan, case):
        """Of a case of the search by the formula; of others everything is lost or nothing."""
        at = self._of(plan)
        loss, cost = self.harm * at, 1.0 / (1.0 + 10.0 * at)
        if int(case.call["prompt"]) % 6 > 1:
            self.drawn.append((plan, case.key))
            loss = float(self.odd * at * self.odd_at(case) > 0.0)
        shown = {"ssim": 1.0 - loss, "psnr": 9.0, "accuracy": 1.0}
        return Line("m", plan.to_json(), case.key, shown, cost, cost)


def models(*harms, odd=0.0):
    numbers = count()
    found = []
    for harm in harms:
        cases = [Case({"prompt": str(next(numbers))}, 1) for _ in range(6)]
        name = f"m{len(found)}"
        bench = Model(name, harm, odd)
        found.append(deriving.Model(name, bench, bench, cases[:2], cases[2:4], cases[4:]))
    return found


@pytest.fixture
def easy(monkeypatch):
    """One knob is searched."""
    kinds = {"cache": {"cache.EasyCache": FAMILIES["cache"]["cache.EasyCache"][:1]}}
    monkeypatch.setattr(deriving, "space", lambda _: deriving.Rounded(1, kinds))


def derived(found, tmp_path, trials=40):
    until = count()
    return deriving.derived(
        found,
        "fast",
        trials,
        tmp_path,
        clock=lambda: next(until),
    )


def test_the_model_that_suffers_most_decides(easy, tmp_path):
    """Of the plans that were tried the largest threshold that is harmless enough on all of them."""
    result = derived(models(0.2, 1.0, 0.5), tmp_path)
    found = Plan.from_dict(result["plan"])
    (method,) = found
    assert 0.08 < method.threshold <= 0.1 and len(result["rows"]) == 3
    assert all(row["holds"] for row in result["rows"]) and result["failed"] == []
    assert result["computed"] == {
        f"m{at}": pytest.approx(1.0 / (1.0 + 10.0 * method.threshold)) for at in range(3)
    }
    text = deriving.markdown([result], 2)
    assert "| fast | 0.9 | cache.EasyCache | m0 |" in text


def test_what_fails_on_prompts_that_choose_is_no_preset(easy, tmp_path):
    """A miss ends it, and the next one is checked; stock holds in any case."""
    found = models(0.2, 0.3, odd=1.0)
    result = derived(found, tmp_path)
    assert result["failed"] and Plan.from_dict(result["plan"]) == Plan()
    assert {entry["chosen_not_by"] for entry in result["failed"]} == {"m0"}
    assert len(found[0].bench.drawn) == len(result["failed"]) + 2 + 2
    assert len(found[1].bench.drawn) == 2 + 2


def test_what_was_chosen_and_fails_on_held_out_prompts_is_no_preset(easy, tmp_path):
    """Whatever many plans hold on may be luck: what is promised is of prompts that chose none."""
    found = models(0.2, 0.3)
    for model in found:
        held_out = {case.key for case in model.held_out}
        model.bench.odd_at = lambda case, held_out=held_out: case.key in held_out
        model.bench.odd = 1.0
    result = derived(found, tmp_path)
    assert result["failed"] and Plan.from_dict(result["plan"]) == Plan()
    assert [[row["holds"] for row in entry["rows"]] for entry in result["failed"]] == [
        [False]
    ] * len(result["failed"])


def test_a_case_of_two_models_is_refused():
    (one,) = models(0.1)
    with pytest.raises(ValueError, match="one case"):
        deriving.Together([one, one])


@given(st.floats(0.001, 0.999))
def test_knobs_have_three_digits(value):
    plan = deriving.Rounded(1, {}).plan(1, {"cache.EasyCache": {"threshold": value}})
    (method,) = plan
    assert method == EasyCache(threshold=float(f"{value:.3g}"))
    assert abs(method.threshold - value) <= 0.005 * value


def test_only_what_serves_every_model_and_decides_by_itself_is_tried():
    found = deriving.space(
        [
            SimpleNamespace(bench=SimpleNamespace(pipe=PIPELINES[name].build()))
            for name in ("sd15", "flux_cfg", "wan22")
        ]
    )
    tried = {name for kinds in found.families.values() for name in kinds}
    assert {"guidance.Adaptive", "cache.EasyCache"} <= tried <= set(deriving.TRIED)
    assert "cache.FirstBlock" not in tried  # a UNet has no row of blocks
    for seed in found.seeds():
        assert seed["steps"] == 1
