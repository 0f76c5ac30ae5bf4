"""The benchmark of caches: what it counts, that it goes on where it stopped, what it sums up."""

import argparse
import collections
import contextlib
import itertools
import json
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from hypothesis import given
from hypothesis import strategies as st
from tiny import PIPELINES

import accel
from accel import Plan, cache
from accel.errors import UnsupportedModel
from accel.seams.layout import Layout

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import attention
import caches
import calibrated
import clip_forms
import contest
import counting
import measure
import peers
import searches
import token_layers
import tokens
import video

STEPS = 8


class Counted:
    """A tiny pipeline whose blocks are counted."""

    def __init__(self, name):
        self.tiny = PIPELINES[name]
        self.pipe = self.tiny.build()
        self.counter = counting.Counter(self.pipe)
        self.counter.calibrate(lambda: self.tiny.call(self.pipe, steps=1))
        self.blocks = len(self.counter.blocks)
        self.branches = len(self.tiny.order)

    def rows(self, on=contextlib.nullcontext, **call):
        self.counter.reset()
        with on():
            self.tiny.call(self.pipe, **{"steps": STEPS} | call)
        return self.counter.rows

    def under(self, *methods):
        return self.rows(lambda: Plan(*methods).attach(self.pipe))

    def native(self, config, **call):
        @contextlib.contextmanager
        def on():
            self.pipe.transformer.enable_cache(config)
            yield
            self.pipe.transformer.disable_cache()

        return self.rows(on, **call)


@pytest.fixture(scope="module")
def flux():
    return Counted("flux_cfg")


@pytest.mark.parametrize("name", ["sd15", "flux_cfg", "wan21"])
def test_stock_is_every_block_at_every_step(name):
    counted = Counted(name)
    assert counted.rows() == STEPS * counted.branches * counted.blocks
    assert counted.rows(steps=3, batch=2) == 2 * 3 * counted.branches * counted.blocks


def test_ours_in_closed_form(flux):
    everything = dict(threshold=1e9, warmup=1, last=False)
    first = flux.under(cache.FirstBlock(**everything))
    assert first == flux.branches * (flux.blocks + STEPS - 1)
    assert (
        flux.under(cache.EasyCache(**everything | {"warmup": 2})) == flux.branches * 2 * flux.blocks
    )
    assert (
        flux.under(cache.DeltaDiT(interval=4, share=1.0, boundary=0.0))
        == flux.branches * 2 * flux.blocks
    )
    modules = flux.under(cache.FORA(interval=4))
    assert 2 < modules / flux.branches / flux.blocks < STEPS


def test_diffusers_first_block_in_closed_form(flux):
    """A hook on a block answers in its place: nothing inside is computed."""
    rows = flux.native(FirstBlockCacheConfig(threshold=1e9))
    assert rows == flux.branches * (flux.blocks + STEPS - 1)
    assert flux.native(FirstBlockCacheConfig(threshold=0.0)) == STEPS * flux.branches * flux.blocks


def test_diffusers_mag_in_closed_form(flux):
    """The first two by its retention ratio; then three skips, a compute, two skips."""
    config = MagCacheConfig(
        threshold=1e9, max_skip_steps=3, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    )
    assert flux.native(config) == 3 * flux.branches * flux.blocks


def test_diffusers_taylor_in_closed_form(flux):
    """It skips attention alone: what is left of a block is the same at each skipped step."""
    config = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=3, max_order=1)
    counts = [0.0] + [flux.native(config, steps=steps) for steps in range(1, STEPS + 1)]
    added = [after - before for before, after in pairwise(counts)]
    whole = flux.branches * flux.blocks
    computed = (0, 1, 2, 4, 7)
    skipped = {round(rows, 9) for index, rows in enumerate(added) if index not in computed}
    assert [added[index] for index in computed] == pytest.approx([whole] * 5)
    assert len(skipped) == 1
    assert 0 < skipped.pop() < whole


@pytest.mark.parametrize(("front", "order"), [(1, None), (2, None), (1, 1)])
def test_cache_dit_in_closed_form(front, order):
    cache_dit = pytest.importorskip("cache_dit", reason="the extra 'bench' is not installed")
    counted = Counted("flux_cfg")  # its settings say that two calls in turn are two branches
    enter = peers._dbcache(cache_dit, front, order, 1e9)
    rows = counted.rows(lambda: enter(counted.pipe, {"num_inference_steps": STEPS}))
    assert rows == counted.branches * (3 * counted.blocks + (STEPS - 3) * front)


@pytest.mark.parametrize("every", [2, 3])
def test_deepcache_in_closed_form(every):
    pytest.importorskip("DeepCache", reason="the extra 'bench' is not installed")
    counted = Counted("sd15")
    rows = counted.rows(lambda: peers._deepcache_helper(0, every)(counted.pipe, {}))
    computes = len(range(0, STEPS, every))
    shallow = counted.rows(lambda: peers._deepcache_helper(0, STEPS)(counted.pipe, {}))
    whole = counted.branches * counted.blocks
    left = (shallow - whole) / (STEPS - 1)
    assert 0 < left < whole / 2
    assert rows == pytest.approx(computes * whole + (STEPS - computes) * left)


# Going on.


@given(
    places=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1),
    measure=st.sampled_from(["ssim", "perceptual"]),
)
def test_the_front_has_what_nothing_is_faster_and_closer_than(places, measure):
    rows = [
        {"seconds": {"median": took}, "ssim": 1 - lost / 10, "perceptual": lost / 10}
        for took, lost in places
    ]
    found = contest.front(rows, measure)
    at = [(row["seconds"]["median"], round(10 * row["perceptual"])) for row in found]
    assert at == sorted(
        {
            one
            for one in places
            if not any(
                other != one and other[0] <= one[0] and other[1] <= one[1] for other in places
            )
        }
    )


def contestants():
    kinds = [(contest.OURS, "A"), (contest.OURS, "B"), ("peer", "C")]
    return [contest.Contestant(*kind, knob) for kind in kinds for knob in (1.0, 2.0)]


@pytest.fixture
def drawn(monkeypatch):
    """Pictures that cost nothing."""
    seen = []

    def draw(benches, who, subject, steps=None):
        seen.append((subject.seed, *who.key))
        return contest.Drawn(None, 1.0 if who.package == contest.STOCK else 0.5, 3.0)

    monkeypatch.setattr(contest, "draw", draw)
    monkeypatch.setattr(
        contest,
        "line_of",
        lambda who, subject, stock, drawn: {
            "seed": subject.seed,
            **dict(zip(("package", "method", "knob"), who.key, strict=True)),
            "seconds": drawn.seconds / who.knob,
            "stock_seconds": stock.seconds,
            "block_rows": drawn.blocks / who.knob,
            "psnr": 40.0,
            "ssim": 1 - who.knob / 100 - (who.package == "peer") / 50,
            "perceptual": who.knob / 100,
            "attributes_right": 1.0,
            "attributes_right_stock": 1.0,
        },
    )
    return seen


def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch, drawn):
    scenes, field = [contest.scene(seed) for seed in (1, 2, 3)], contestants()
    clock = iter(range(10**6))
    monkeypatch.setattr(contest.time, "monotonic", lambda: next(clock))
    path, begun = tmp_path / "caches.jsonl", 0
    for budget in (4, 1, 7, 10**6):
        lines = measure.Lines(path, {"model": "tiny"})
        assert len(lines.found) == begun
        contest.measure(None, field, scenes, lines, contest.time.monotonic() + budget)
        begun = len(lines.found)
    assert begun == len(scenes) * len(field)
    ours = [entry for entry in drawn if entry[1] != contest.STOCK]
    assert len(ours) == len(set(ours)) == begun
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == [{"model": "tiny"}, *lines.found]


def test_numbers_of_something_else_are_not_mixed_in(tmp_path):
    measure.Lines(tmp_path / "x.jsonl", {"call": {"steps": 8}, "threads": 1})
    measure.Lines(tmp_path / "x.jsonl", {"call": {"steps": 8}, "threads": 1})
    with pytest.raises(SystemExit, match=r"threads differ.*--fresh"):
        measure.Lines(tmp_path / "x.jsonl", {"call": {"steps": 8}, "threads": 2})


def test_numbers_of_other_code_are_not_mixed_in(tmp_path):
    """Every source of every package counts: its name, and what is in it; nothing else does."""
    sources, seen = [tmp_path / "a", tmp_path / "b"], []
    changes = {"a/x.py": "1", "b/deep/y.py": "1", "b/deep/z.py": "", "a/note.txt": "1"}
    for name, text in (*changes.items(), ("a/x.py", "2"), ("a/x.py", "1")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        seen.append(measure.code(sources))
    first, second, third, noted, changed, back = seen
    assert len({first, second, third, changed}) == 4 and third == noted == back
    path = tmp_path / "x.jsonl"
    measure.Lines(path, measure.here())
    with pytest.raises(SystemExit, match="code differ"):
        measure.Lines(path, measure.here() | {"code": changed})


def test_sums_are_over_captions_that_all_have_drawn(tmp_path, drawn):
    field = contestants()
    lines = measure.Lines(tmp_path / "x.jsonl", {})
    contest.measure(None, field, [contest.scene(1), contest.scene(2)], lines, float("inf"))
    lines.found.pop()  # the last point of the second caption
    rows, seeds = contest.rows_of(field, lines)
    assert seeds == [1]
    assert [row["seconds"]["repeats"] for row in rows] == [1] * len(field)
    assert {row["speedup"]["median"] for row in rows} == {2.0, 4.0}


def test_who_has_drawn_nothing_yet_is_named_and_holds_nothing_up(tmp_path, drawn):
    """A run that was cut off in its first caption sums up what it has, in order."""
    field, path = contestants(), tmp_path / "x.jsonl"
    lines = measure.Lines(path, {})
    contest.measure(None, field[:3], [contest.scene(1)], lines, float("inf"))
    lines.add({"package": field[3].package, "method": "B", "knob": 2.0, "refused": "no"})
    rows, seeds = contest.rows_of(field, lines)
    assert seeds == [1] and [(row["method"], row["knob"]) for row in rows] == [
        ("A", 1.0), ("A", 2.0), ("B", 1.0)
    ]  # fmt: skip
    left = contest.undrawn(field, lines)
    assert list(left) == ["B 2", "peer: C 1", "peer: C 2"]
    assert left["B 2"] == "no" and "time" in left["peer: C 1"]
    assert field[3] not in contest.missing(field, contest.scene(2), lines)


def test_who_is_refused_at_a_later_caption_leaves_the_others_all_of_theirs(tmp_path, drawn):
    """And is named, though it has drawn one; another of the same name is not taken for it."""
    twin = contest.Contestant("peer", "A", 1.0)
    field, lines = [*contestants(), twin], measure.Lines(tmp_path / "x.jsonl", {})
    contest.measure(None, field, [contest.scene(1)], lines, float("inf"))
    lines.add({**field[0].named(), "refused": "no more"})
    contest.measure(None, field, [contest.scene(2)], lines, float("inf"))
    rows, seeds = contest.rows_of(field, lines)
    assert seeds == [1, 2] and len(rows) == len(field) - 1
    assert (rows[-1]["package"], rows[-1]["method"], rows[-1]["knob"]) == twin.key
    assert contest.undrawn(field, lines) == {"A 1": "no more"}


def test_what_was_drawn_under_another_plan_is_drawn_again(tmp_path, monkeypatch):
    """A setting whose numbers were measured anew goes by its old name; refusals are as stale."""
    monkeypatch.setattr(contest, "draw", lambda *_: contest.Drawn(None, 1.0, 1.0))
    figures = ("psnr", "ssim", "perceptual", "attributes_right", "attributes_right_stock")
    monkeypatch.setattr(contest, "of_pictures", lambda *_: dict.fromkeys(figures, 1.0))
    old, new = (
        [contest.Contestant(contest.OURS, "Table", 0.1, plan=Plan(cache.FORA(interval=every)))]
        for every in (2, 3)
    )
    lines, subject = measure.Lines(tmp_path / "x.jsonl", {}), contest.scene(1)
    contest.measure(None, old, [subject], lines, float("inf"))
    assert not contest.missing(old, subject, lines) and contest.missing(new, subject, lines) == new
    lines.add({**old[0].named(), "refused": "no"})
    assert "time" in contest.undrawn(new, lines)["Table 0.1"]
    contest.measure(None, new, [subject], lines, float("inf"))
    ((row,), seeds) = contest.rows_of(new, measure.Lines(lines.path, {}))
    assert row["plan"] == new[0].plan.to_dict() and row["seconds"]["repeats"] == 1
    assert seeds == [1] and contest.rows_of(old, lines) == ([], [])


def test_what_is_refused_as_it_runs_is_written_down_and_stops_nothing(tmp_path, drawn, monkeypatch):
    real, field = contest.draw, contestants()

    def draw(benches, who, subject, steps=None):
        if who.key == field[0].key:
            raise UnsupportedModel("not here\nat all")
        return real(benches, who, subject, steps)

    monkeypatch.setattr(contest, "draw", draw)
    lines = measure.Lines(tmp_path / "x.jsonl", {})
    scenes = [contest.scene(seed) for seed in (1, 2)]
    contest.measure(None, field, scenes, lines, float("inf"), warm=True)
    refused = [line for line in lines.found if "refused" in line]
    assert [(line["method"], line["refused"]) for line in refused] == [("A", "not here")]
    assert len(contest.rows_of(field, lines)[0]) == len(field) - 1
    # each kind was drawn once more to warm up, and only once
    assert len([one for one in drawn if one[1] != contest.STOCK]) == 2 * (len(field) - 1) + 2


def test_what_rests_on_one_curve_is_warm_after_its_first_setting():
    one = contest.Contestant(contest.OURS, "x", 1, plan=Plan(cache.FORA(interval=2)))
    both = contest.Contestant(
        contest.OURS, "y", 1, plan=Plan(cache.FORA(interval=3), cache.TextKV())
    )
    assert one.kinds == {(contest.OURS, "cache.FORA")} < both.kinds


def test_levels_and_their_table(tmp_path, drawn):
    """At a level the fastest that holds it on either side; what is slower or worse is left out."""
    field = contestants()
    lines = measure.Lines(tmp_path / "x.jsonl", {})
    contest.measure(None, field, [contest.scene(1)], lines, float("inf"))
    rows, _ = contest.rows_of(field, lines)
    table = {(row["measure"], row["level"]): row for row in caches.levels(rows)}
    strict, loose = table["ssim", 0.98], table["ssim", 0.95]
    assert (strict["ours"]["knob"], strict["peer"], strict["ratio"]) == (2.0, None, None)
    assert (loose["ours"]["speedup"], loose["peer"]["speedup"], loose["ratio"]) == (4.0, 4.0, 1.0)
    near = table["perceptual", 0.01]
    assert (near["ours"]["knob"], near["peer"]["knob"], near["ratio"]) == (1.0, 1.0, 1.0)
    text = caches.markdown(list(table.values()), "Title")
    # the peer's sweep ends at 0.96: a larger knob might hold 0.95 too
    assert (loose["censored"], near["censored"], strict["censored"]) == (True, False, False)
    assert "| SSIM ≥ 0.95 | A 2 (4.00×) | peer: C 2 (4.00×) | 1.00× (censored) |" in text
    assert caches.CENSORED in text
    assert "| SSIM ≥ 0.98 | A 2 (4.00×) | none | – |" in text
    assert "| perceptual distance ≤ 0.005 | none | none | – |" in text
    pytest.importorskip("matplotlib")
    contest.plot(rows, tmp_path / "plot.png", "Title")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    for row in rows:  # where a larger knob computes no less, the sweep has come to its end
        row["block_rows"] = 1.0
    assert not any(row["censored"] for row in caches.levels(rows))


def level_row(package, method, knob, speed, ssim, **more):
    return {
        "package": package, "method": method, "knob": knob, "ssim": ssim, "perceptual": 1.0,
        "block_rows": 10 / speed, "seconds": measure.spread([10 / speed]),
        "speedup": measure.spread([speed]), "inactive": {},
    } | more  # fmt: skip


def ssim_levels(rows):
    return {row["level"]: row for row in caches.levels(rows) if row["measure"] == "ssim"}


def test_a_level_is_censored_where_any_peer_might_go_on():
    """Of the fastest peer's curve alone the contrary would be said: its sweep has fallen below."""
    fastest = [level_row("p", "F", 1, 2.0, 0.97), level_row("p", "F", 2, 3.0, 0.7)]
    slower = [level_row("p", "S", 1, 1.2, 0.99), level_row("p", "S", 2, 1.5, 0.96)]
    ours = [level_row(contest.OURS, "A", 1, 2.5, 0.99)]
    table = ssim_levels([*ours, *slower, *fastest])
    assert table[0.95]["peer"]["method"] == "F"
    censored = {level: row["censored"] for level, row in table.items()}
    assert censored == {0.99: False, 0.98: False, 0.95: True, 0.9: True, 0.8: True}
    assert not any(row["censored"] for row in ssim_levels([*ours, *fastest]).values())
    # of ours a sweep that ends early is no reason, and it is the last knob that counts
    uneven = [level_row("p", "F", 1, 2.0, 0.85), level_row("p", "F", 2, 3.0, 0.96)]
    assert ssim_levels(uneven)[0.95]["censored"]


def test_what_did_nothing_wins_no_level_and_is_listed(tmp_path):
    """It is as near to stock as can be, and by chance a little faster."""
    idle = level_row(contest.OURS, "Idle", 4, 1.1, 1.0, inactive={"cache.Idle": "no text"})
    rows = [idle, level_row(contest.OURS, "A", 1, 1.05, 0.995), level_row("p", "F", 1, 1.0, 0.99)]
    assert ssim_levels(rows)[0.99]["ours"]["method"] == "A"
    text = caches.markdown(caches.levels(rows), "Title", contest.idle(rows))
    assert "| Idle" not in text and "\n* Idle 4 is INACTIVE: cache.Idle: no text\n" in text


def test_what_did_nothing_is_not_plotted(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    seen, real = [], contest.looks
    monkeypatch.setattr(contest, "looks", lambda curves: seen.extend(curves) or real(curves))
    idle = level_row(contest.OURS, "Idle", 4, 1.1, 1.0, inactive={"cache.Idle": "no text"})
    rows = [idle, level_row(contest.OURS, "A", 1, 1.05, 0.995), level_row("p", "F", 1, 1.0, 0.99)]
    contest.plot(rows, tmp_path / "plot.png", "Title")
    assert seen == [("A", True), ("p: F", False)]


@pytest.mark.parametrize(("method", "steps"), [("A", caches.FEW), ("StepRehash", None)])
def test_a_trace_is_looked_for_in_a_run_that_the_method_serves(monkeypatch, method, steps):
    """The untouched pipeline, the method, its own without it, with as many steps.

    What was left there before is seen too. What was calibrated serves whole runs alone.
    """
    seen = []

    def draw(benches, who, subject, steps=None):
        seen.append((who.package, who.method, steps))
        changed = method == "A" and who.package == contest.OURS
        return contest.Drawn([changed], 1.0, 1.0)

    monkeypatch.setattr(caches, "draw", draw)
    who = contest.Contestant(contest.OURS, method, 1.0)
    assert caches.leaves_a_trace(None, who, contest.scene(1)) is (method == "A")
    stock, own = contest.STOCK, contest.OURS
    assert seen == [(stock, stock, steps), (own, method, steps), (own, stock, steps)]


def test_every_cache_is_swept_or_calibrated():
    """Custom is any of them; what is swept are fields that there are."""
    from app.calibrators import CALIBRATORS

    known = accel.methods()
    swept = {f"cache.{curve.split(',')[0]}" for curve in (*caches.SWEEPS, *calibrated.CURVES)}
    assert swept | {"cache.Custom"} == {name for name in known if name.startswith("cache.")}
    for curve, (knob, fields, values) in caches.SWEEPS.items():
        kind = known[f"cache.{curve.split(',')[0]}"]
        assert all(kind(**fields, **{knob: value}).why_off() is None for value in values)
    for curve, one in calibrated.CURVES.items():
        assert one.what in CALIBRATORS
        assert (one.knob is None) != (one.option is None)
        assert one.knob is None or one.knob in known[f"cache.{curve.split(',')[0]}"].model_fields


def test_the_benchmark_of_samplers_names_what_there_is():
    """Every sampler of the package is in it, and what it calibrates is offered."""
    import sampling

    import samplers
    from app.calibrators import CALIBRATORS

    solved = {method.name for plan in sampling.PLANS.values() for method in plan}
    fitted = {"samplers.DPMSolverV3", "samplers.OLSS"}
    methods = {f"samplers.{name}" for name in samplers.__all__ if not name.endswith("Scheduler")}
    assert solved | fitted | {"samplers.Steps"} == methods  # which is what the columns are
    assert {one.what[0] for one in sampling.CALIBRATIONS} <= set(CALIBRATORS)
    for names in sampling.STOCK.values():
        assert all(hasattr(sampling.diffusers, f"{name}Scheduler") for name in names)


def test_the_table_of_samplers_says_where_ours_are_nearer(tmp_path):
    import sampling

    found = {"stock A": (0.4, 0.2), "stock B": (0.3, 0.3), "ours": (0.2, 0.25), "worse": (0.5, 0.5)}
    points = [
        {"sampler": name, "ours": "stock" not in name, "steps": steps, "distance": distance}
        for name, row in found.items()
        for steps, distance in zip((4, 8), row, strict=True)
    ]
    points.append({"sampler": "ours", "ours": True, "steps": 20, "refused": "no"})
    table = sampling.markdown(points, "Title").splitlines()[4:]
    assert table == [
        "| stock A | 0.4000 | – | – | **0.2000** | – | – | – |  |",
        "| stock B | 0.3000 | – | – | 0.3000 | – | – | – |  |",
        "| ours | **0.2000** | – | – | 0.2500 | – | – | – | 4 |",
        "| worse | 0.5000 | – | – | 0.5000 | – | – | – | none |",
    ]
    pytest.importorskip("matplotlib")
    sampling.plot(points, tmp_path / "plot.png", "Title")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("model", ["scenes-flux", "scenes-unet"])
def test_the_benchmark_of_guidance_has_every_curve_on_the_bundled_models(tmp_path, model):
    import guidance

    from accel.guidance import LinearAG

    pipe, _ = accel.load(model)
    for _, name in guidance.LINEAR_AG.files():
        (tmp_path / name).write_text(Plan(LinearAG(every=1)).to_toml())
    field = guidance.field_of(pipe, tmp_path, 1)
    names = {who.method for who in field}
    curves = {*guidance.CURVES, "LinearAG"}
    assert names == curves | {f"{curve} + EasyCache" for curve in curves} | {"EasyCache alone"}
    assert len(field) == len(names)


@pytest.mark.filterwarnings("ignore")
def test_a_sampler_is_solved_and_judged(tmp_path):
    """Two steps of one caption: what is counted, and how far it is from four."""
    import sampling

    from accel.scenes import HELD_OUT, scene

    pipe, call = accel.load("scenes-flux")
    pipe.set_progress_bar_config(disable=True)
    entry = sampling.our_entries(tmp_path)[0]
    scenes = [scene(HELD_OUT[0])]
    exact = sampling.solve(pipe, call, scenes, 4)
    with entry.solve(pipe, 2):
        found = sampling.solve(pipe, call, scenes, 2)
    assert found[2] == 4  # two branches
    assert float(sampling.distance(found[0], exact[0])[0]) > 0
    assert float(sampling.distance(exact[0], exact[0])[0]) == 0


@pytest.fixture(scope="module")
def clips():
    """scenes-wan with two of its blocks, and a call of few steps."""
    pipe, call = accel.load("scenes-wan")
    pipe.transformer.blocks = pipe.transformer.blocks[:2]
    pipe.set_progress_bar_config(disable=True)
    return pipe, call | {"output_type": "latent"}


def test_the_benchmark_of_clips_has_every_method_or_says_why_not(clips):
    pipe, call = clips
    grid = clip_forms.grid_of(pipe, call)
    assert grid.grid == (5, 8, 8)
    forms = clip_forms.small(grid)
    field, left = video.fitting(pipe, forms)
    assert [who.method for who in field] == [name for name in forms if name not in left]
    assert list(left) == ["DeepCache"] and "UNet" in left["DeepCache"]
    drawn = {method.name for methods in forms.values() for method in methods}
    drawn |= {f"cache.{curve}" for curve, _ in video.CALIBRATED}
    of = {name for name in accel.methods() if name.split(".")[0] in video.FAMILIES}
    assert of - drawn == set(video.DENSE)
    for alone in (clip_forms.sparse(grid), clip_forms.reducers()):
        assert {f"{name} + {clip_forms.EASY}" for name in alone} < set(forms)
    assert set(clip_forms.LARGE) < set(clip_forms.sparse(grid))


def test_forms_of_clips_are_for_any_grid():
    """On grids of three frames and more of more than four rows each leaves something out."""
    for grid in ((3, 4, 4), (2, 12, 12), (5, 8, 8), (9, 32, 32), (5, 24, 40)):
        layout = Layout(0, *grid)
        fixed = [form for (form,) in clip_forms.sparse(layout).values() if hasattr(form, "pattern")]
        densities = [form.pattern(layout).density(layout) for form in fixed]
        assert len(densities) > 4
        assert max(densities) < 1 or grid[0] < 3 or grid[1] < 5
        assert clip_forms.EASY in clip_forms.large(layout)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["sparse", "reducers"])
def test_no_form_of_clips_is_idle(clips, family):
    pipe, call = clips
    grid = clip_forms.grid_of(pipe, call)
    made = clip_forms.sparse(grid) if family == "sparse" else clip_forms.reducers()
    for name, methods in made.items():
        steps = 6 if name == "tokens.SADA" else 2  # it judges by three computed ones
        with Plan(*methods).attach(pipe) as run:
            pipe("a house", **call | {"num_inference_steps": steps})
        (verdict,) = run.report.verdicts.values()
        assert verdict.state == "ACTIVE", (name, verdict.detail)
        row = {"verdicts": {methods[0].name: (verdict.state, verdict.detail)}}
        assert (video.density(row) or 0.5) < 1 and (family != "sparse" or video.density(row))


def clip_rows():
    """Rows as a run of clips gives them."""
    made = {
        "EasyCache": (2.0, 0.95, ("cache.EasyCache",)),
        "A": (1.5, 0.97, ("attention.GRAT",)),
        "B": (1.2, 0.99, ("attention.SVG",)),
        "C": (1.8, 0.5, ("attention.AdaSpa",)),
        "A + EasyCache": (2.8, 0.92, ("attention.GRAT", "cache.EasyCache")),
        "C + EasyCache": (3.6, 0.4, ("attention.AdaSpa", "cache.EasyCache")),
        "S + EasyCache": (4.0, 0.95, ("samplers.UniPC", "cache.EasyCache")),
        "D": (9.0, 1.0, ("attention.Radial",)),
    }
    figures = {key: 0.5 for key in video.COLUMNS}
    return [
        figures
        | {
            "package": contest.OURS,
            "method": name,
            "knob": 0,
            "seconds": measure.spread([10 / speed]),
            "speedup": measure.spread([speed]),
            "ssim": ssim,
            "verdicts": {one: ("ACTIVE", "a mean density of 0.25; fine") for one in methods},
            "inactive": {"attention.Radial": "all kept"} if name == "D" else {},
            "density": None,
        }
        for name, (speed, ssim, methods) in made.items()
    ]


def test_the_best_composition_of_clips_and_what_did_nothing():
    rows = clip_rows()
    assert video.best_sparse(rows) == ["A", "B"]
    best = video.composition(rows)
    assert best["method"] == "A + EasyCache" and best["ssim"] == 0.92
    assert video.composition(rows, judged=False)["method"] == "C + EasyCache"
    parts = {name: fast["median"] for name, fast in best["parts"].items()}
    assert parts == {"A": 1.5, "EasyCache": 2.0}
    assert "2.80×" in video.told(best) and "3.33×" in video.told(best)
    result = {
        "rows": rows, "composition": best, "left_out": {"E": "no"}, "trained_size": False,
        "stock": {"seconds": measure.spread([10.0])},
    }  # fmt: skip
    table = video.markdown("Title", result)
    assert "* D is INACTIVE: attention.Radial: all kept" in table and "| D |" not in table
    assert "* E is left out: no" in table and "not trained" in table
    joined = video.joined(Layout(0, 5, 8, 8), ["SVG", "Radial"])
    assert len(joined) == 2 * len(clip_forms.JOINED)
    assert video.composition(rows[:4]) is None and "No cache" in video.told(None)


@pytest.mark.filterwarnings("ignore")
def test_a_clip_is_drawn_and_judged(tmp_path, capsys):
    """A few frames, two steps, one caption; then once more from the file."""

    class Small(contest.Benches):
        def __init__(self):
            super().__init__("scenes-wan", 6)
            self.call |= {"num_frames": 9, "height": 32, "width": 32}

    pytest.importorskip("matplotlib")
    options = argparse.Namespace(
        model="scenes-wan", captions=1, only=["FORA", "TextKV"], budget=1e9,
        fresh=False, out=tmp_path,
    )  # fmt: skip
    benches = Small()
    first, second = video.measured(options, benches), video.measured(options, benches)
    assert first["rows"] == second["rows"]
    cached, lossless = first["rows"]
    assert cached["psnr"] < 100 and cached["flicker"] > 0
    assert (lossless["psnr"], lossless["flicker"]) == (100, 0)
    assert cached["block_rows"] < lossless["block_rows"]
    assert cached["ssim_worst_frame"] <= cached["ssim"] < 1
    assert lossless["motion_accuracy"] == first["stock"]["motion_accuracy"]
    assert lossless["caption_accuracy"] == first["stock"]["caption_accuracy"]
    table = (tmp_path / "video-scenes-wan.md").read_text()
    assert "| TextKV | " in table and "| stock | " in table and "torch" in table
    assert [row["verdicts"][f"cache.{row['method']}"][0] for row in first["rows"]] == 2 * ["ACTIVE"]
    assert first["composition"] is None and first["trained_size"]
    assert (tmp_path / "video-scenes-wan.png").stat().st_size > 10_000


# Attention and tokens by themselves.


@pytest.mark.filterwarnings("ignore")
def test_attention_is_measured_once_and_said(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    given = ["--tokens", "64", "256", "--spent", "0.001", "--repeats", "1", "--out", str(tmp_path)]
    attention.main(given)
    (path,) = tmp_path.glob("attention-*.json")
    first, raw = json.loads(path.read_text()), path.with_suffix(".jsonl").read_text()
    assert len(raw.splitlines()) == 3
    names = {row["pattern"] for row in first["rows"] if row["tokens"] == 256}
    assert {attention.DENSE, "window 10%", "window 25%"} <= names
    assert all(row["density"] < 1 or row["pattern"] == attention.DENSE for row in first["rows"])
    assert any("keeps all" in why for why in first["left_out"].values())
    searched = {row["method"] for row in first["searched"]}
    assert searched == {"AdaSpa", "Searched, low-bit", "SpargeAttn", "SVG2"}
    assert all(row["search_seconds"]["median"] > 0 for row in first["searched"])
    assert {attention.DENSE, "window 25%"} <= set(first["claims"]["slope"])
    attention.main(given)  # what is there is not measured again
    assert path.with_suffix(".jsonl").read_text() == raw
    table = path.with_suffix(".md").read_text()
    assert "| 256 | window 10% |" in table and "Seconds grow" in table and "SpargeAttn" in table


@torch.no_grad()
def test_searches_of_a_clip_have_sparse_videogen_among_them():
    """All keep about a tenth, but for the large clusters and the whole blocks of small clips."""
    layout = Layout(0, 4, 16, 16)
    qkv = torch.randn(3, 1, 2, layout.tokens, 8)
    found = searches.searched(layout, qkv, 0.001, lambda: None)
    by_name = {row["method"]: row for row in found}
    assert set(by_name) == {*searches.searches(layout), "SVG"}
    assert by_name["AdaSpa"]["density"] == pytest.approx(0.125)  # 2 of 16 cells
    assert all(0 < row["density"] < 0.5 for row in found)
    assert all(row["tokens"] == layout.tokens for row in found)


def test_a_search_is_compared_with_dense_attention_of_the_same_round(monkeypatch):
    """On a machine that becomes ten times slower from one round to the next."""
    rounds, seconds = itertools.count(), {"search": 0.4, "attend": 1.0, "dense": 2.0}
    run = {name: lambda value=value: value for name, value in seconds.items()}
    monkeypatch.setattr(searches, "scaled_dot_product_attention", run["dense"])
    monkeypatch.setattr(
        searches, "clocked", lambda one, sync: one() * 10.0 ** (next(rounds) // len(seconds))
    )
    row = searches.timed(run["search"], run["attend"], 0.5, (), 0.0, lambda: None)
    assert row["dense_seconds"]["high"] >= 10 * row["dense_seconds"]["low"]
    for name, faster in (("speedup", 2.0), ("speedup_with_search", 2.0 / 1.2)):
        assert row[name]["low"] == row[name]["high"] == pytest.approx(faster)


@torch.no_grad()
def test_the_first_search_of_sparse_videogen_is_none_of_those_that_are_repeated(monkeypatch):
    """Its seconds are those of the first, not those of one that is warm."""
    calls = itertools.count(1)
    monkeypatch.setattr(searches, "chosen_of", lambda *_: None)
    monkeypatch.setattr(searches, "clocked", lambda *_: float(next(calls)))
    layout = Layout(0, 4, 8, 8)
    row = searches.videogen(layout, torch.randn(3, 1, 2, layout.tokens, 8), 0.0, lambda: None)
    assert row["first_search_seconds"] == 1.0 and row["search_seconds"]["low"] >= 2.0


def test_a_budget_ends_a_run_of_attention(tmp_path):
    given = ["--tokens", "64", "--budget", "-1", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="go on"):
        attention.main(given)


def test_layouts_of_attention_have_windows_of_the_density():
    for name in attention.LAYOUTS:
        options = attention.options_of(["--layout", name])
        (layout,) = attention.layouts_of(options)
        assert (options.heads, options.dim) == attention.HEADS[name]
        for density in attention.DENSITIES:
            inside = attention.window(layout, density).density(Layout(0, *layout.grid))
            assert inside == pytest.approx(density, rel=0.1)
    assert attention.layout_of("16,3,4,5") == Layout(16, 3, 4, 5)
    assert attention.layouts_of(attention.options_of([]))[-1].tokens == 32768
    with pytest.raises(argparse.ArgumentTypeError, match="flux-4k"):
        attention.layout_of("16,3")


def test_a_denoiser_has_no_layout_of_another_model(capsys):
    with pytest.raises(SystemExit):
        attention.options_of(["--denoiser", "--layout", "flux-4k"])
    assert "give --tokens" in capsys.readouterr().err


def test_a_lowering_that_cannot_be_made_is_left_out(monkeypatch):
    """Be it refused as it is made or as it runs: both are errors of a kernel."""

    def lowered(name, table):
        def run(*qkv):
            raise RuntimeError("no kernel\nat all")

        return run() if name == "flex" else run

    monkeypatch.setattr(attention, "lowered", lowered)
    monkeypatch.setattr(attention, "refusals", lambda table, device: {})
    qkv = torch.zeros(3, 1, 1, 4, 4)
    runs, refused = attention.admitted(None, qkv)
    assert runs == {}
    assert refused == {name: "no kernel" for name in attention.NAMES if name != attention.DENSE}


def attention_row(pattern, tokens, seconds, speedup):
    return {
        "pattern": pattern, "lowering": "gather", "tokens": tokens, "density": 0.1,
        "seconds": {"median": seconds}, "speedup": {"median": speedup},
    }  # fmt: skip


@pytest.mark.parametrize(("slowest", "holds"), [(3.1, True), (2.9, False)])
def test_what_is_claimed_of_attention(slowest, holds):
    name = "window 10%"
    sizes = (4096, 8192, 16384)
    rows = [attention_row(name, n, 1e-9 * n**1.5, slowest if n > 8192 else 4.0) for n in sizes]
    rows.append(attention_row("window 25%", 8192, 1.0, 1.5))
    found = attention.claims(rows)
    said = found["claimed_speedup"]
    assert said["holds"] is holds and said["speedup"] == {8192: 4.0, 16384: slowest}
    assert found["slope"] == {name: pytest.approx(1.5)}
    assert ("does not hold" not in attention.claimed(found)[0]) is holds
    assert attention.claims(rows[:1])["claimed_speedup"]["holds"] is None
    whole = [{key: value for key, value in row.items() if key != "lowering"} for row in rows]
    assert attention.claims(whole)["claimed_speedup"]["holds"] is None


@pytest.mark.filterwarnings("ignore")
def test_a_whole_denoiser_is_timed(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    given = ["--denoiser", "--tokens", "256", "--spent", "0.001", "--out", str(tmp_path)]
    attention.main(given)
    (path,) = tmp_path.glob("attention-scenes-flux-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert rows[0]["pattern"] == attention.DENSE
    assert len(rows) > 1 and all(row["said"].startswith("ACTIVE") for row in rows[1:])
    assert "whole denoiser of scenes-flux" in path.with_suffix(".md").read_text()


def test_repeats_are_as_many_as_fit():
    def counted(seconds, spent, repeats=None):
        found = measure.repeated({"a": lambda: seconds, "b": lambda: seconds}, spent, repeats)
        assert len(found["a"]) == len(found["b"])
        return len(found["a"])

    assert counted(1.0, 1000.0) == measure.MOST
    assert counted(1.0, 10.0) == 5
    assert counted(10.0, 1.0) == counted(1.0, 4.1) == measure.FEWEST
    assert counted(10.0, 1.0, repeats=4) == 4


@pytest.mark.parametrize(("spent", "repeats"), [(1.0, None), (1000.0, None), (1.0, 4)])
def test_each_round_goes_back_where_the_one_before_it_went_there(spent, repeats):
    """Also from the first, which may not count, to the second: none is twice in a row at an end."""
    order = []
    visits = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    measure.repeated(visits, spent, repeats)
    turns = ["".join(order[low : low + 3]) for low in range(0, len(order), 3)]
    assert len(turns) >= measure.FEWEST >= 3
    assert all(turn == ("cba" if number % 2 else "abc") for number, turn in enumerate(turns))


class CountedDenoiser:
    """A network that counts how often it was called."""

    text = 0

    def __init__(self, *_):
        self.calls = 0
        self.pipe = self

    def seconds(self, layout, sync):
        self.calls += 1
        return float(self.calls)


def test_every_network_is_as_warm_as_the_others_when_it_is_measured(monkeypatch):
    """The first second that counts is of its second call, of dense attention too."""
    monkeypatch.setitem(attention.denoisers.KINDS, "scenes-flux", CountedDenoiser)
    verdict = argparse.Namespace(state="ACTIVE", detail="")
    report = argparse.Namespace(verdicts=collections.defaultdict(lambda: verdict))
    monkeypatch.setattr(Plan, "attach", lambda *_: argparse.Namespace(report=report))
    options = attention.options_of(["--denoiser", "--spent", "0.001"])
    rows = attention.denoised(Layout(0, 1, 16, 16), options, "cpu")["rows"]
    assert len(rows) > 1 and rows[0]["pattern"] == attention.DENSE
    assert [row["seconds"]["median"] for row in rows] == [3.0] * len(rows)


def test_token_layers_are_measured_for_all_ratios_in_one_file(tmp_path, capsys):
    given = ["--grids", "8x8", "8x16", "--ratios", "0.25", "0.5", "--channels", "16"]
    given += ["--spent", "0.001", "--repeats", "1", "--out", str(tmp_path)]
    token_layers.main(given)
    rows = json.loads((tmp_path / "token-layers.json").read_text())["rows"]
    of_ours = {"ToMe", "Importance", "ToMA", "Transforming"}
    for grid in ([8, 8], [8, 16]):
        for ratio in (0.25, 0.5):
            here = {r["reducer"] for r in rows if r["grid"] == grid and r["ratio"] == ratio}
            assert here - {"tomesd: ToMe"} == of_ours
    assert all((row["relative_error"] == 0) == (row["reducer"] == "whole") for row in rows)
    raw = (tmp_path / "token-layers.jsonl").read_text()
    token_layers.main(given)
    assert (tmp_path / "token-layers.jsonl").read_text() == raw
    if find_spec("tomesd") is None:
        assert token_layers.NO_TOMESD in (tmp_path / "token-layers.md").read_text()


def test_tomesd_merges_what_ours_merges():
    pytest.importorskip("tomesd", reason="the extra 'bench' is not installed")
    grid, layer = Layout(0, 1, 8, 12), token_layers.Layer(16)
    x = token_layers.picture(grid, 16, 1)
    made = token_layers._theirs(layer, grid, 0.5, x)(x)
    assert made.shape == x.shape and not torch.equal(made, layer(x, x))


def test_the_benchmark_of_tokens_says_who_is_missing_and_what_means_less():
    unet, call = accel.load("scenes-unet")
    wan, _ = accel.load("scenes-wan")
    names = {who.method.split(",")[0] for who in tokens.ours(unet, 1)}
    assert {f"tokens.{name}" for name in names} == {
        name for name in accel.methods() if name.startswith("tokens.")
    }
    assert "LEFT OUT" in tokens.notes(wan, call, call)[0] and not list(tokens.theirs(wan, 1))
    installed = find_spec("tomesd") is not None
    assert bool(list(tokens.theirs(unet, 1))) is installed
    usual = tokens.notes(unet, call, call)
    large = tokens.notes(unet, call | {"height": 256, "width": 256}, call)
    assert len(usual) == (not installed) and len(large) == len(usual) + 2
    row = {
        "package": "tomesd", "method": "ToMe", "knob": 0.5, "speedup": {"median": 1.5},
        "ssim": 0.9, "perceptual": 0.1, "caption_accuracy": 1.0, "inactive": {},
    }  # fmt: skip
    idle = row | {"knob": 0.25, "inactive": {"tokens.ToMe": "nothing to do"}}
    table = tokens.markdown([row, idle], "Title", large)
    assert "| 0.25 |" not in table
    assert "* tomesd: ToMe 0.25 is INACTIVE: tokens.ToMe: nothing to do" in table
    assert "| tomesd: ToMe | 0.5 | 1.50× |" in table and "trained on pictures of 64 to 128" in table


def test_the_benchmark_of_guards_promises_by_what_was_calibrated(tmp_path):
    import guard as guards

    assert len(guards.BUDGETS) == 3 and guards.rank(39) == 38
    calibrated = [
        [{"real": factor * budget} for budget in guards.BUDGETS]
        for factor in (*range(1, 39), 1000)  # one of them turned into another picture
    ]
    bounds = guards.bounds_of(calibrated)
    assert bounds == pytest.approx([38 * budget for budget in guards.BUDGETS])
    made = guards.guards_of(bounds)
    assert [guard.max_error for guard in made] == list(guards.PROMISES)
    assert made[0].scale == 1e9, "below the smallest bound nothing keeps it"
    assert made[-1].scale == pytest.approx(38)
    runs = [
        {"budget": 0.1, "spent": 0.05, "real": real, "nfe": 20, "stock": 40, "checks": 3}
        for real in (0.04, 0.06, 0.09, 0.12)
    ]
    told = guards.summary(0.1, runs)
    assert told["coverage"] == 0.75 and told["evaluations_saved"] == 0.5
    row = {
        "budgets": (0.1,), "bounds": [0.2], "calibrated_on": 39, "pictures": 4, "coverage": 0.75,
        "promises": [told],
    }  # fmt: skip
    assert "| 0.1 | 75.0% |" in guards.table({"EasyCache": row})
    pytest.importorskip("matplotlib")
    guards.diagram({"EasyCache": row}, {"EasyCache": [runs]}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_result_names_the_weights_that_it_was_made_with(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / "models" / name / "vae").mkdir(parents=True)
        (tmp_path / "models" / name / "vae" / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr("accel.bundled.root", lambda: tmp_path)
    saved = json.loads(measure.save("x", {"rows": []}, tmp_path).read_text())["weights"]
    assert saved.keys() == {"one", "two"} and saved["one"] == saved["two"]
    (tmp_path / "models" / "two" / "vae" / "model.safetensors").write_bytes(b"others")
    again = measure.weights()
    assert again["one"] == saved["one"] and again["two"] != saved["two"]
    monkeypatch.undo()
    assert measure.weights().keys() == {"oracle", "scenes-flux", "scenes-unet", "scenes-wan"}


def test_no_benchmark_has_the_name_of_a_package():
    """A script's folder comes first where modules are looked for."""
    packages = {"accel", "app", "samplers", "parallel"}
    found = (Path(__file__).parent.parent / "benchmarks").glob("*.py")
    assert not {path.stem for path in found} & packages
