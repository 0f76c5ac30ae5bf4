"""The benchmark of samplers: its verdicts on made-up points, and the plans that it keeps."""

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import calibrated
import sampling
import verdicts


def points_of(rows, figure="distance"):
    """Points of samplers, with a figure by the number of steps; those of diffusers are stock."""
    return [
        {"sampler": name, "ours": "diffusers" not in name, "steps": steps, figure: value}
        for name, row in rows.items()
        for steps, value in row.items()
    ]


ROWS = {
    "diffusers DPMSolverMultistep": {5: 0.40, 6: 0.20, 8: 0.2, 10: 0.1},
    "diffusers DDIM": {6: 0.15},
    "DPM++ 2M": {5: 0.50, 6: 0.30, 8: 0.1, 10: 0.1},
    "OLSS": {5: 0.20, 6: 0.10, 8: 0.05, 10: 0.05},
    "DPM-Solver-v3": {5: 0.44, 6: 0.16, 8: 0.1, 10: 0.2},
    "DPM++ 2M, GITS": {6: 0.15, 8: 0.2},
}


def test_a_claim_is_held_against_the_nearest_of_the_others():
    rows = verdicts.figures(points_of(ROWS), "distance", (5, 6, 8, 10))
    ratios = verdicts.Claim("DPM-Solver-v3", verdicts.SECOND_ORDER, (5, 6, 8, 10)).ratios(rows)
    assert ratios == pytest.approx({5: 1.1, 6: 0.8, 8: 1.0, 10: 2.0})


def test_verdicts_say_yes_and_no_with_the_ratio():
    told = verdicts.verdicts(points_of(ROWS), sampling.EVALUATIONS)
    pair = "DPM++ 2M or diffusers DPMSolverMultistep"
    assert f"| OLSS | {pair} | 5: 0.50 yes, 6: 0.50 yes, 8: 0.50 yes, 10: 0.50 yes | yes |" in told
    assert "| 5: 1.10 no, 6: 0.80 yes, 8: 1.00 no, 10: 2.00 no | at 1 of 4 |" in told
    assert "| DPM++ 2M, GITS | DPM++ 2M | 6: 0.50 yes, 8: 2.00 no | at 1 of 2 |" in told
    assert "| DPM++ 2M, OSS | DPM++ 2M | 6: –, 8: – | not measured |" in told


def test_a_claim_holds_only_where_all_of_it_is_measured():
    points = points_of({"a": {5: 1.0}, "b": {5: 2.0, 6: 2.0}})
    line = verdicts.Claim("a", ("b",), (5, 6)).line(verdicts.figures(points, "distance", (5, 6)))
    assert line == "| a | b | 5: 0.50 yes, 6: – | at 1 of 2 |"


def test_ours_that_win_nowhere_are_listed():
    """Not DPM++ 2M, which is nearest at 8 alone, and not what has no stock one beside it."""
    told = verdicts.verdicts(points_of(ROWS), sampling.EVALUATIONS)
    assert "nowhere nearer than every stock scheduler: DPM++ 2M, GITS.\n" in told
    everything = verdicts.verdicts(points_of({"diffusers A": {4: 2.0}, "B": {4: 1.0}}), (4,))
    assert "stock scheduler: none." in everything


def test_refusals_are_listed_once_for_each_reason():
    points = [
        {"sampler": "OLSS", "ours": True, "steps": n, "refused": "calibrated for 4"} for n in (5, 6)
    ]
    assert "* OLSS at 5, 6: calibrated for 4\n" in verdicts.verdicts(points, (4, 5, 6))


def test_the_other_figures_have_a_table_each_with_the_exact_solution():
    points = points_of({"diffusers A": {4: 8.0}, "B": {4: 7.5, 8: 7.25}}, "frechet")
    points.append({"sampler": sampling.OWN, "steps": sampling.EXACT, "frechet": 7.0, "kernel": 0.5})
    told = verdicts.fidelity(points, (4, 8))
    assert "many steps: 7.000)" in told and "biased upwards" in told
    assert "| diffusers A | 8.000 | – |" in told and "| B | 7.500 | 7.250 |" in told
    assert "ernel" not in told  # of which no sampler has a point


def test_every_claim_is_of_what_the_benchmark_runs(tmp_path):
    ours = {entry.name for entry in sampling.our_entries(tmp_path)}
    stock = {f"diffusers {name}" for names in sampling.STOCK.values() for name in names}
    calibrated = {one.name: one.steps for one in sampling.CALIBRATIONS}
    for claim in verdicts.CLAIMS:
        assert claim.ours in ours and set(claim.against) <= ours | stock
        assert set(claim.steps) <= set(calibrated[claim.ours] or sampling.EVALUATIONS)
        assert set(claim.steps) <= set(sampling.EVALUATIONS)


BINARY = b"\xff\x00"
"""No text: numbers of DPM-Solver-v3 lie beside its plan."""


def test_plans_are_kept_with_the_result_and_come_back(tmp_path):
    """Those of another network's weights do not, and what is there is not written over."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    for name in ("OLSS-4.toml", "DPM++ 2M, GITS-6-levels.json", "LinearAG.toml", "prompts.txt"):
        (old / name).write_text(name)
    (old / "DPM-Solver-v3.safetensors").write_bytes(BINARY)
    kept = sampling.embedded(old)
    names = ["DPM++ 2M, GITS-6-levels.json", "DPM-Solver-v3.safetensors", "OLSS-4.toml"]
    assert list(kept) == names
    result = tmp_path / "result.json"
    sampling.unpack(result, new, "abc")  # there is none
    result.write_text(json.dumps({"header": {"weights": "abc"}, "plans": kept}))
    sampling.unpack(result, new, "other")
    assert not [*new.iterdir()]
    (new / "OLSS-4.toml").write_text("mine")
    sampling.unpack(result, new, "abc")
    assert (new / "OLSS-4.toml").read_text() == "mine"
    for name in names[:2]:
        assert (new / name).read_bytes() == (old / name).read_bytes()


def test_points_of_another_plan_do_not_hold(tmp_path):
    """A plan of another text, or with another table beside it; what has none always holds."""
    (tmp_path / "DPM-Solver-v3.toml").write_text("plan = 1")
    (tmp_path / "DPM-Solver-v3.safetensors").write_bytes(BINARY)
    stock = sampling.Entry("diffusers DDIM", False, None)
    entries = [stock, *sampling.our_entries(tmp_path)]
    points = [
        {"sampler": entry.name, "steps": steps, "plan": entry.plan(steps)}
        for entry in entries
        for steps in (4, 7)
    ]
    points.append({"sampler": sampling.OWN, "steps": sampling.EXACT})
    assert sampling.standing(entries, points) == points
    assert len({one["plan"] for one in points if one["sampler"] in sampling.PLANS}) == len(
        sampling.PLANS
    )
    (tmp_path / "DPM-Solver-v3.safetensors").write_bytes(BINARY * 2)
    (tmp_path / "OLSS-4.toml").write_text("plan = 1")
    now = sampling.standing([*entries[:1], *entries[2:]], points)
    gone = [one for one in points if one not in now]
    first = next(iter(sampling.PLANS))
    assert [(one["sampler"], one["steps"]) for one in gone] == [
        (first, 4), (first, 7), ("DPM-Solver-v3", 4), ("DPM-Solver-v3", 7), ("OLSS", 4)
    ]  # fmt: skip


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What `accel calibrate` is asked for; a plan is written, nothing is measured."""
    seen = []

    def invoke(_, app, given):
        seen.append(given)
        Path(given[given.index("--out") + 1]).write_text("plan = 1\n[cache.FORA]\ninterval = 2\n")
        return argparse.Namespace(exit_code=0)

    monkeypatch.setattr("typer.testing.CliRunner.invoke", invoke)
    monkeypatch.setattr(sampling, "PLANS_KEPT", tmp_path)
    return seen


def test_caches_are_calibrated_for_the_weights_and_steps_that_are_drawn(asked):
    """Once for each; others never serve, and after `forget` it is done anew."""
    benches = [calibrated.Bench("tiny", *of) for of in (("abc", 8), ("abc", 28), ("other", 8))]
    for bench in benches * 2:
        calibrated.plan_of("Table", 0.1, bench)
    assert [given[given.index("--steps") + 1] for given in asked] == ["8", "28", "8"]
    assert len({bench.folder for bench in benches}) == 3
    benches[0].forget()
    for bench in benches:
        calibrated.plan_of("Table", 0.1, bench)
    assert len(asked) == 4 and asked[3] == asked[0]


def test_steps_are_fitted_to_the_run_that_stock_makes(asked):
    """As long a run as is drawn, and what is said is what the calibration takes."""
    from samplers.olss_calibration import Options

    for steps in (8, 28):
        calibrated.plan_of("OLSS of stock's run", 7, calibrated.Bench("tiny", "abc", steps))
    for given, steps in zip(asked, ("8", "28"), strict=True):
        told = [given[at + 1] for at, one in enumerate(given) if one == "--set"]
        parts = (one.split("=") for one in told)
        found = Options.model_validate({name: json.loads(value) for name, value in parts})
        assert (found.evaluations, found.teacher_steps) == (7, int(steps))
        assert given[given.index("--steps") + 1] == steps


def test_a_calibration_for_a_number_of_steps_keeps_to_it(asked, tmp_path):
    one = sampling.Calibration("OLSS", ("olss",), (4, 5))
    sampling.calibrate(one, "tiny", tmp_path, 28)
    assert [given[given.index("--steps") + 1] for given in asked] == ["4", "5"]
    sampling.calibrate(sampling.Calibration("v3", ("ems", "--steps", "100")), "tiny", tmp_path)
    assert asked[2].count("--steps") == 1


def test_calibrations_are_forgotten_with_the_tables_beside_them(tmp_path):
    for name in ("DPM-Solver-v3.toml", "DPM-Solver-v3.safetensors", "LinearAG.toml"):
        (tmp_path / name).write_bytes(BINARY)
    sampling.forget(tmp_path, sampling.CALIBRATIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["LinearAG.toml"]
