"""Reports: verdicts, text, JSON and the timeline."""

import json

import numpy as np
import pytest
from roster import ROSTER, STEPS, off_plans

from accel import Plan, cache, errors, timeline
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


def parted():
    """A method that leaves out one kind of modules, another, both, or none."""
    tally = Tally("cache.PAB", site="modules")
    rows = [("cond", 0), ("uncond", 0)]
    tally.record(0, rows, "computed")
    tally.record(1, rows, "reused", {"self", "cross"})
    tally.record(2, rows, "reused", ["cross"])
    tally.record(3, rows[:1], "reused", ["self"])
    return Report("Some", [tally], steps=4, samples=1)


def test_the_timeline_has_a_row_for_each_part_that_is_left_out():
    """Where one part of a site is reused the others are computed."""
    rows = timeline._rows(parted())
    blue, peach = "computed", "reused"
    assert {
        label: [states for _, (states,) in sorted(cells.items())] for label, cells in rows.items()
    } == {
        "cache.PAB · cross · cond": [blue, peach, peach, blue],
        "cache.PAB · self · cond": [blue, peach, blue, peach],
        "cache.PAB · cross · uncond": [blue, peach, peach],
        "cache.PAB · self · uncond": [blue, peach, blue],
    }
    picture = np.asarray(parted().timeline())
    reused = (picture[40:-34] == timeline.COLOURS["reused"]).all(-1).sum()
    assert reused == 7 * 18 * 18


def test_a_method_without_parts_has_its_site_in_the_label(run):
    labels = list(timeline._rows(run.report))
    assert "cache.EasyCache · denoiser · cond" in labels
    assert "guidance.Interval · branches · uncond" in labels


def test_the_dictionary_tells_the_parts_and_leaves_events_as_they_are():
    said = parted().to_dict()
    assert said["events"]["cache.PAB"][2] == [1, "cond", 0, "reused"]
    assert said["parts"]["cache.PAB"][0] == [1, "cond", 0, ["cross", "self"]]
    assert len(said["parts"]["cache.PAB"]) == 5
    assert json.loads(json.dumps(said)) == said
    assert Report("Plain", [Tally("a.Method")]).to_dict()["parts"] == {}


@pytest.mark.parametrize(
    ("peak", "planned", "said"),
    [
        (0, 0, ""),
        (3 * 2**20, 0, "; keeps 3.0 MiB"),
        (2**20, 3 * 2**20, "; keeps 1.0 of 3.0 MiB"),
        (0, 3 * 2**20, "; would keep 3.0 MiB"),
        (3 * 2**20, 3 * 2**20, "; keeps 3.0 MiB"),
    ],
)
def test_the_text_says_what_a_method_costs(peak, planned, said):
    tally = Tally("a.Method", peak=peak, planned=planned, reason=lambda: "because")
    assert str(Report("One", [tally])).endswith(f"a.Method  INACTIVE  because{said}")


def test_a_cache_of_modules_tells_its_cost_after_the_first_step(bench):
    """Before its histories are full: order 2 keeps three values of each module."""
    told = []
    pipe = bench.pipe("flux")
    run = Plan(cache.TaylorSeer(interval=2, order=2, warmup=1)).attach(pipe)
    run.trajectory.observers.append(lambda *_: told.append(str(run.report)))
    bench.call("flux", steps=STEPS)
    run.detach()
    planned = run.report.to_dict()["planned_bytes"]["cache.TaylorSeer"] / 2**20
    assert f"; keeps {planned / 3:.1f} of {planned:.1f} MiB" in told[0]
    assert told[-1].endswith(f"; keeps {planned:.1f} MiB")


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
