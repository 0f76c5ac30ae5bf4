"""The benchmark of caches: what it counts, that it goes on where it stopped, what it sums up."""

import contextlib
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from tiny import PIPELINES

from accel import Plan, cache

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import caches
import contest
import counting
import measure
import peers

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
            "block_rows": drawn.blocks,
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


def test_sums_are_over_captions_that_all_have_drawn(tmp_path, drawn):
    field = contestants()
    lines = measure.Lines(tmp_path / "x.jsonl", {})
    contest.measure(None, field, [contest.scene(1), contest.scene(2)], lines, float("inf"))
    lines.found.pop()  # the last point of the second caption
    rows, seeds = contest.rows_of(field, lines)
    assert seeds == [1]
    assert [row["seconds"]["repeats"] for row in rows] == [1] * len(field)
    assert {row["speedup"]["median"] for row in rows} == {2.0, 4.0}


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
    assert "| SSIM ≥ 0.95 | A 2 (4.00×) | peer: C 2 (4.00×) | 1.00× |" in text
    assert "| SSIM ≥ 0.98 | A 2 (4.00×) | none | – |" in text
    assert "| perceptual distance ≤ 0.005 | none | none | – |" in text
    pytest.importorskip("matplotlib")
    contest.plot(rows, tmp_path / "plot.png", "Title")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_benchmark_of_samplers_names_what_there_is():
    """Every sampler of the package is in it, and what it calibrates is offered."""
    import sampling

    import samplers
    from app.calibrators import CALIBRATORS

    solved = {method.name for plan in sampling.PLANS.values() for method in plan}
    fitted = {"samplers.DPMSolverV3", "samplers.OLSS"}
    methods = {f"samplers.{name}" for name in samplers.__all__ if not name.endswith("Scheduler")}
    assert solved | fitted == methods
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

    import accel
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

    import accel
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


def test_the_benchmark_of_clips_has_every_method_or_says_why_not():
    import video

    import accel

    pipe, _ = accel.load("scenes-wan")
    field, left = video.field_of(pipe)
    names = [who.method for who in field]
    of = {name for name in accel.methods() if name.split(".")[0] in video.FAMILIES}
    assert set(names) | set(left) >= of - set(video.DENSE)
    assert len(names) == len(set(names)) and not set(names) & set(left)
    assert all(left.values())
    assert video.EASY in names
    sparse = [name for name in names if name.startswith("attention.") and "+" not in name]
    assert all(f"{name} + {video.EASY}" in names for name in sparse)


@pytest.mark.filterwarnings("ignore")
def test_a_clip_is_drawn_and_judged(tmp_path, capsys):
    """A few frames, two steps, one caption; then once more from the file."""
    import argparse

    import video

    class Small(contest.Benches):
        def __init__(self):
            super().__init__("scenes-wan", 6)
            self.call |= {"num_frames": 9, "height": 32, "width": 32}

    pytest.importorskip("matplotlib")
    options = argparse.Namespace(
        model="scenes-wan", captions=1, only=["cache.FORA", "cache.TextKV"], budget=1e9,
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
    assert "| cache.TextKV | " in table and "| stock | " in table and "torch" in table
    assert all(f"* {name} is left out: " in table for name in first["left_out"])
    assert (tmp_path / "video-scenes-wan.png").stat().st_size > 10_000
