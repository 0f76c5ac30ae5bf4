"""Reports: verdicts, text, JSON and the timeline."""

import json

import numpy as np
import pytest
from roster import ROSTER, STEPS, off_plans

from accel import Plan, cache, errors
from accel.report import ACTIVE, INACTIVE, Report, Tally
from accel.timeline import COLOURS


@pytest.fixture
def run(bench):
    run = Plan(*(ROSTER[n].active for n in ("cache.EasyCache", "guidance.Interval"))).attach(
        bench.pipe("flux_cfg")
    )
    bench.call("flux_cfg", steps=STEPS, batch=2)
    run.detach()
    return run


def test_a_verdict_counts_steps_of_samples():
    tally = Tally("a.Method")
    rows = [("cond", 0), ("uncond", 0), ("cond", 1), ("uncond", 1)]
    tally.record(0, rows, "computed")
    tally.record(1, rows[:2], "reused")
    tally.record(1, rows[2:], "computed")
    verdict = tally.verdict()
    assert (verdict.state, verdict.detail) == (ACTIVE, "1/4 reused")


def test_a_method_that_saved_nothing_is_inactive_with_its_reason():
    tally = Tally("a.Method", reason=lambda: "because")
    tally.record(0, [("cond", 0)], "computed")
    assert (tally.verdict().state, tally.verdict().detail) == (INACTIVE, "because")
    assert not tally.verdict().chosen


def test_a_method_that_is_off_is_inactive_by_choice():
    verdict = Tally("a.Method", off="threshold is 0").verdict()
    assert (verdict.state, verdict.detail) == (INACTIVE, "off: threshold is 0")
    assert verdict.chosen


def test_inactive_by_choice_is_no_warning_and_otherwise_is(bench, recwarn):
    with off_plans()["all"].attach(bench.pipe("flux")):
        bench.call("flux", steps=3)
    assert not recwarn
    with (
        pytest.warns(errors.AccelWarning, match=r"^cache\.EasyCache did nothing: "),
        Plan(cache.EasyCache()).attach(bench.pipe("flux")),
    ):
        bench.call("flux", steps=3)


def test_a_run_that_was_never_used_warns_of_nothing(bench, recwarn):
    with Plan(cache.EasyCache()).attach(bench.pipe("flux")):
        pass
    assert not recwarn


def test_a_run_that_failed_warns_of_nothing(bench, recwarn):
    with pytest.raises(KeyError), Plan(cache.EasyCache()).attach(bench.pipe("flux")):
        bench.call("flux", steps=3)
        raise KeyError
    assert not recwarn


def test_the_dictionary_is_json_and_says_all(run):
    said = run.report.to_dict()
    assert json.loads(json.dumps(said)) == said
    assert said["verdicts"]["cache.EasyCache"]["state"] == "ACTIVE"
    assert (said["steps"], said["samples"]) == (STEPS, 2)
    assert said["nfe"] == run.report.nfe
    assert len(said["step_seconds"]) == STEPS
    assert said["sites"] == {"cache.EasyCache": "denoiser", "guidance.Interval": "branches"}
    assert said["cached_bytes"]["cache.EasyCache"] > said["cached_bytes"]["guidance.Interval"] == 0
    assert said["seconds"] == pytest.approx(sum(said["step_seconds"]))
    assert all(second > 0 for second in said["step_seconds"])
    events = said["events"]["cache.EasyCache"]
    assert {tuple(event[1:3]) for event in events} == {
        (branch, sample) for branch in ("cond", "uncond") for sample in (0, 1)
    }


def test_the_text_has_a_line_for_each_method(run):
    head, *lines = str(run.report).splitlines()
    assert head.startswith("FluxPipeline: 6 steps, ")
    assert f"{run.report.nfe:g} network evaluations" in head
    assert [line.split()[0] for line in lines] == ["guidance.Interval", "cache.EasyCache"]
    assert all(line.split()[1] in ("ACTIVE", "INACTIVE") for line in lines)


def test_the_timeline_shows_the_share_of_the_states(run):
    """Coloured area = events, in proportion."""
    picture = run.report.timeline()
    pixels = np.asarray(picture.crop((220, 40, picture.width, picture.height - 34)))
    states = [event.state for tally in run.report.tallies for event in tally.events]
    for state, colour in COLOURS.items():
        area = (pixels == colour).all(-1).sum()
        assert area == pytest.approx(states.count(state) / run.report.samples * 18 * 18)


@pytest.mark.parametrize("report", [Report("Empty", []), Report("One", [Tally("a.Method")])])
def test_an_empty_report_can_be_shown(report):
    assert report.nfe == 0
    assert report.to_dict()["steps"] == 0
    assert report.pipeline in str(report)
    assert report.timeline().width > 0


def test_a_report_is_of_the_latest_run(bench):
    with Plan(ROSTER["cache.EasyCache"].active).attach(bench.pipe("flux")) as run:
        bench.call("flux", steps=9)
        bench.call("flux", steps=STEPS, batch=3)
        assert (run.report.steps, run.report.samples) == (STEPS, 3)
        assert {event.step for event in run.report.tallies[0].events} == set(range(STEPS))
