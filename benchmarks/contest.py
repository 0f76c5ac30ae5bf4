"""Settings drawn beside the stock pipeline in one interleaved run, each number written at once.

Every caption is drawn by the stock pipeline and by every setting, with the same seed, in rotating
order; the stock picture is drawn again after every few others, and each time is compared with the
stock time just before. Attaching and detaching is not timed. Fidelity is measured against the
stock picture of the same caption and seed; what was computed is counted below all hooks
(`counting`). A model that draws clips is given captions of clips, and its clips are measured frame
by frame and by what moves. A run that was cut off goes on where it stopped, and sums up the
captions that all settings have drawn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from counting import Counter
from measure import RESULTS, Lines, digest, here, save_plot, spread
from PIL import Image

import accel
from accel import quality
from accel.attach import Run
from accel.errors import AccelError
from accel.scenes import HELD_OUT, MOTIONS, Scene, clip_scene, motion, oracle, scene

STOCK = "stock"
OURS = "diffusers-accel"
EVERY = 8
"""Pictures between two of the stock pipeline."""

BESIDES = {
    "nfe": "nfe",
    "compile_seconds": "compile_seconds",
    "ssim_worst_frame": "ssim_worst_frame",
    "flicker": "flicker",
    "motion_accuracy": "motion_right",
}
"""What is summed up besides where all lines have it, and its name there: clips have more."""

MEETS = (0.9, 0.95, 0.98)
"""SSIM of which it is said how many captions reach it."""


@dataclass(frozen=True)
class Contestant:
    """One setting of one method, or of some together.

    Attributes:
        package: Whose it is.
        method: Name of the curve.
        knob: Value of what is swept.
        plan: Of ours.
        peer: Of others. Neither: the stock pipeline.
        call: What it asks of the pipeline in the place of the model's own call: fewer steps.
    """

    package: str
    method: str
    knob: float
    plan: accel.Plan | None = None
    peer: peers.Peer | None = None
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, float]:
        """What tells it from the others."""
        return self.package, self.method, self.knob

    @property
    def label(self) -> str:
        """What it is called in a list."""
        return label({"package": self.package, "method": self.method, "knob": self.knob})

    @cached_property
    def written(self) -> dict[str, Any] | None:
        """Its plan as a line holds it."""
        if self.plan is None:
            return None
        found: dict[str, Any] = json.loads(json.dumps(self.plan.to_dict()))
        return found

    def wrote(self, line: dict[str, Any]) -> bool:
        """Whether a line is of this setting, with the plan and the call that it has now."""
        same = _key(line) == self.key and line.get("call", {}) == dict(self.call)
        return same and line.get("plan") == self.written

    def named(self) -> dict[str, Any]:
        """What each of its lines begins with."""
        plan = {} if self.plan is None else {"plan": self.written}
        call = {"call": dict(self.call)} if self.call else {}
        return {"package": self.package, "method": self.method, "knob": self.knob, **plan, **call}

    @property
    def kinds(self) -> frozenset[tuple[str, str]]:
        """What it is made of: methods of ours, or the peer's."""
        if self.plan is None:
            return frozenset({(self.package, self.method)})
        return frozenset((self.package, method.name) for method in self.plan)

    @property
    def apart(self) -> dict[str, float]:
        """What was spent once, before anything was timed."""
        return {} if self.peer is None else dict(self.peer.apart)

    @contextmanager
    def on(self, pipe: Any, call: dict[str, Any]) -> Iterator[Run | None]:
        """The cache on the pipeline; of ours the run, whose report says what was done."""
        if self.plan is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                with self.plan.attach(pipe) as run:
                    yield run
        elif self.peer is not None:
            with self.peer.enter(pipe, call):
                yield None
        else:
            yield None


class Benches:
    """A pipeline for each package: some leave theirs changed when they come off."""

    def __init__(self, model: str, steps: int | None) -> None:
        self._model = model
        self._pipes: dict[str, tuple[Any, Counter]] = {}
        self.call = accel.load(model)[1]
        if steps is not None:
            self.call["num_inference_steps"] = steps

    def get(self, package: str) -> tuple[Any, Counter]:
        """The pipeline of a package, and what counts its blocks."""
        if package not in self._pipes:
            pipe, _ = accel.load(self._model)
            pipe.set_progress_bar_config(disable=True)
            counter = Counter(pipe, layers=package != peers.COMPILED)
            counter.calibrate(lambda: pipe("a house", **self.call | {"num_inference_steps": 2}))
            self._pipes[package] = pipe, counter
        return self._pipes[package]

    def drop(self, package: str) -> None:
        """Give up a package's pipeline: what failed on it may have left it half changed."""
        self._pipes.pop(package, None)


@dataclass(frozen=True)
class Drawn:
    """A picture, or the frames of a clip, what it took, and by method whether something was done.

    Attributes:
        picture: The picture, or the frames.
        seconds: What it took.
        blocks: Rows of blocks that were computed.
        evaluations: Of the network, a row each; below all hooks, as the blocks.
        verdicts: By method of ours, ``ACTIVE`` or ``INACTIVE``, and what it did or why not.
    """

    picture: Image.Image | list[Image.Image]
    seconds: float
    blocks: float
    evaluations: float = 0.0
    verdicts: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)


def draw(benches: Benches, who: Contestant, subject: Scene, steps: int | None = None) -> Drawn:
    """Draw one caption, timed from the prompt to the picture."""
    call = benches.call | dict(who.call)
    call |= {} if steps is None else {"num_inference_steps": steps}
    pipe, counter = benches.get(who.package)
    generator = torch.Generator().manual_seed(subject.seed)
    call = call | {"output_type": "pil"}
    with who.on(pipe, call) as run:
        counter.reset()
        start = time.perf_counter()
        picture = pipe(subject.caption, generator=generator, **call)[0][0]
        seconds = time.perf_counter() - start
        said = {} if run is None else run.report.verdicts
    verdicts = {name: (one.state, one.detail) for name, one in said.items()}
    return Drawn(picture, seconds, counter.rows, counter.evaluations, verdicts)


def line_of(who: Contestant, subject: Scene, stock: Drawn, drawn: Drawn) -> dict[str, Any]:
    """The numbers of one picture."""
    figures = of_clips if isinstance(drawn.picture, list) else of_pictures
    return {
        "seed": subject.seed,
        **who.named(),
        "seconds": drawn.seconds,
        "stock_seconds": stock.seconds,
        "block_rows": drawn.blocks,
        "nfe": drawn.evaluations,
        **who.apart,
        **({"verdicts": drawn.verdicts} if drawn.verdicts else {}),
        **figures(stock.picture, drawn.picture, subject),
    }


def of_pictures(stock: Any, drawn: Any, subject: Scene) -> dict[str, float]:
    """What is measured of a picture."""
    return {
        "psnr": min(quality.psnr(stock, drawn), 100.0),
        "ssim": quality.ssim(stock, drawn),
        "perceptual": quality.perceptual(stock, drawn),
        "attributes_right": oracle.caption_accuracy([drawn], [subject]).mean,
        "attributes_right_stock": oracle.caption_accuracy([stock], [subject]).mean,
    }


def of_clips(stock: Any, drawn: Any, subject: Scene) -> dict[str, float]:
    """What is measured of a clip: means over frames, the worst frame, flicker, and the motion.

    The perceptual distance is that of the clip oracle, which sees motion too.
    """
    frames = list(zip(stock, drawn, strict=True))
    similar = [quality.ssim(*pair) for pair in frames]
    judge = motion.load()
    told, told_stock = (
        motion.caption_accuracy([clip], [subject], judge) for clip in (drawn, stock)
    )
    return {
        "psnr": float(np.mean([min(quality.psnr(*pair), 100.0) for pair in frames])),
        "ssim": float(np.mean(similar)),
        "ssim_worst_frame": min(similar),
        "perceptual": quality.perceptual([stock], [drawn], judge),
        "flicker": quality.flicker(stock, drawn),
        "attributes_right": told.mean,
        "attributes_right_stock": told_stock.mean,
        "motion_right": _moving(told),
        "motion_right_stock": _moving(told_stock),
    }


def _moving(told: oracle.Accuracy) -> float:
    """The share of what moves, where to and how fast that is as the caption says."""
    return float(np.mean([told.by_attribute[name] for name in MOTIONS]))


def serving(
    plans: Mapping[tuple[str, float], accel.Plan], pipe: Any, settings: int | None
) -> tuple[list[Contestant], dict[str, str]]:
    """Of plans by curve and knob those that serve a pipeline, and why the other curves do not.

    Args:
        plans: In the order of each curve.
        pipe: The pipeline.
        settings: So many of each curve at most.
    """
    field: list[Contestant] = []
    left: dict[str, str] = {}
    for (curve, knob), plan in plans.items():
        drawn = sum(who.method == curve for who in field)
        if curve in left or (settings is not None and drawn >= settings):
            continue
        try:
            plan.attach(pipe).detach()
        except AccelError as error:
            left[curve] = reason_of(error)
            continue
        field.append(Contestant(OURS, curve, knob, plan=plan))
    return field, left


@dataclass(frozen=True)
class Stage:
    """How a round of captions is drawn.

    Attributes:
        mark: What each of its lines begins with.
        refusals: Errors that are written down as a refusal, and stop nothing.
        keep: Is given whatever was drawn.
    """

    mark: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    refusals: type[Exception] = AccelError
    keep: Callable[[Contestant, Scene, Drawn], None] = lambda *_: None

    def refuse(self, benches: Benches, who: Contestant, error: Exception, lines: Lines) -> None:
        """Write down why somebody drew nothing; what an error of others left behind is given up."""
        lines.add({**self.mark, **who.named(), "refused": reason_of(error)})
        if not isinstance(error, AccelError):
            benches.drop(who.package)


ORDINARY = Stage()


def measure(
    benches: Benches,
    field: list[Contestant],
    scenes: list[Scene],
    lines: Lines,
    until: float,
    warm: bool = False,
    stage: Stage = ORDINARY,
) -> None:
    """Draw what is not in the file yet, until the time is over; what is refused says so there.

    Args:
        benches: The pipelines.
        field: The settings.
        scenes: The captions.
        lines: The file.
        until: When the time is over, on the monotonic clock.
        warm: Whether a method draws once before it is first measured: imports and first
            allocations. Whole, since what is calibrated is for a number of steps.
        stage: How these captions are drawn.
    """
    stock = Contestant(STOCK, STOCK, 0)
    warmed: set[tuple[str, str]] = set()
    for turn, subject in enumerate(scenes):
        shift, reference, age = turn * 7 % len(field), None, 0
        for who in missing(field[shift:] + field[:shift], subject, lines):
            if time.monotonic() > until:
                return
            try:
                if warm and not who.kinds <= warmed:
                    warmed |= who.kinds
                    draw(benches, who, subject)
                if reference is None or age == EVERY:
                    reference, age = draw(benches, stock, subject), 0
                age += 1
                drawn = draw(benches, who, subject)
            except stage.refusals as error:
                stage.refuse(benches, who, error, lines)
                continue
            lines.add({**stage.mark, **line_of(who, subject, reference, drawn)})
            stage.keep(who, subject, drawn)
        print(f"{turn + 1}/{len(scenes)}", end="\r", flush=True)


def reason_of(error: Exception) -> str:
    """Why something was refused, on one line; an error that is not ours with its kind."""
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, AccelError) else f"{type(error).__name__}: {first}"


def missing(field: list[Contestant], subject: Scene, lines: Lines) -> list[Contestant]:
    """Who has not drawn a caption yet, and was not refused; under another plan does not count."""
    done = [one for one in lines.found if "refused" in one or one.get("seed") == subject.seed]
    by_key = grouped(done)
    return [who for who in field if not any(map(who.wrote, by_key.get(who.key, ())))]


def grouped(lines: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Lines by the setting that they are of."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(_key(line), []).append(line)
    return found


def summary(who: Contestant, points: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds and blocks beside fidelity, over the captions."""
    verdicts = points[0].get("verdicts", {})
    return {
        "package": who.package,
        "method": who.method,
        "knob": who.knob,
        "plan": who.written,
        "verdicts": verdicts,
        "inactive": {
            name: why
            for name, (_, why) in verdicts.items()
            if all(point["verdicts"][name][0] == "INACTIVE" for point in points)
        },
        "seconds": spread([point["seconds"] for point in points]),
        "speedup": spread([point["stock_seconds"] / point["seconds"] for point in points]),
        **fidelity(points),
    }


def fidelity(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What holds on any machine: how close to stock, and with how much computed."""

    def mean(name: str) -> float:
        return float(np.mean([point[name] for point in points]))

    return {
        "block_rows": mean("block_rows"),
        "psnr": mean("psnr"),
        "ssim": mean("ssim"),
        "perceptual": mean("perceptual"),
        "caption_accuracy": mean("attributes_right"),
        "meets": {
            str(level): float(np.mean([point["ssim"] >= level for point in points]))
            for level in MEETS
        },
        **{n: mean(key) for n, key in BESIDES.items() if all(key in point for point in points)},
    }


def rows_of(field: list[Contestant], lines: Lines) -> tuple[list[dict[str, Any]], list[int]]:
    """Sums over the captions that all contestants have drawn, and those captions' seeds.

    Who is `undrawn` is left out: it would leave no caption to the others.
    """
    points = [(who, drawn_by(who, lines)) for who in field if why_undrawn(who, lines) is None]
    seeds = [{line["seed"] for line in own} for _, own in points]
    common = set.intersection(*seeds) if seeds else set()
    if not common:
        return [], []
    rows = [summary(who, [one for one in own if one["seed"] in common]) for who, own in points]
    return rows, sorted(common)


def drawn_by(who: Contestant, lines: Lines) -> list[dict[str, Any]]:
    """What a setting has drawn with the plan that it has now."""
    return [line for line in lines.found if "seed" in line and who.wrote(line)]


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["package"], line["method"], line.get("knob")


def undrawn(field: list[Contestant], lines: Lines) -> dict[str, str]:
    """Who was refused, at whichever caption, or has drawn nothing: by label, and why."""
    reasons = {who.label: why_undrawn(who, lines) for who in field}
    return {name: why for name, why in reasons.items() if why is not None}


def together(left: Mapping[str, str]) -> list[str]:
    """Why they are left out, those who have one reason on one line."""
    names: dict[str, list[str]] = {}
    for name, why in left.items():
        names.setdefault(why, []).append(name)
    return sorted(f"{', '.join(sorted(those))}: {why}" for why, those in names.items())


def why_undrawn(who: Contestant, lines: Lines) -> str | None:
    """Why a setting is not summed up; ``None`` where it is."""
    for line in lines.found:
        if "refused" in line and who.wrote(line):
            return str(line["refused"])
    return None if drawn_by(who, lines) else "the time was over before it was drawn"


def label(row: dict[str, Any]) -> str:
    """A setting's name in a list, with its package unless it is ours; a knob of zero is none."""
    whose = "" if row["package"] == OURS else f"{row['package']}: "
    knob = f" {row['knob']:g}" if row["knob"] else ""
    return f"{whose}{row['method']}{knob}"


def active(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of which every method did something: the others are not what they are called."""
    return [row for row in rows if not row["inactive"]]


def idle(rows: list[dict[str, Any]]) -> list[str]:
    """The others, and why they did nothing."""
    return [
        f"{label(row)} is INACTIVE: {name}: {why}"
        for row in rows
        for name, why in row["inactive"].items()
    ]


def stock_of(lines: Lines, seeds: list[int]) -> dict[str, Any]:
    """What the stock pipeline took."""
    found = [line for line in lines.found if line.get("seed") in set(seeds)]
    times = sorted({line["stock_seconds"] for line in found})
    shares = {"caption_accuracy": "attributes_right_stock", "motion_accuracy": "motion_right_stock"}
    right = {
        name: {line["seed"]: line[key] for line in found if key in line}
        for name, key in shares.items()
    }
    means = {name: float(np.mean([*one.values()])) for name, one in right.items() if one}
    return {"seconds": spread(times), **means}


def show(rows: list[dict[str, Any]]) -> None:
    """Print a line for each setting."""
    for row in rows:
        print(
            f"{row['package']:<16}{row['method']:<28}{row['knob']:>6g}"
            f"{row['speedup']['median']:>8.2f}×  SSIM {row['ssim']:.4f}  {row['block_rows']:.0f}"
        )


def looks(curves: Sequence[tuple[str, bool]]) -> Iterator[dict[str, Any]]:
    """How to draw each curve, given by its name and whether it is ours: the others are dashed."""
    import matplotlib.pyplot as plt

    count = sum(mine for _, mine in curves)
    greys = iter(plt.get_cmap("Greys")(np.linspace(0.45, 1.0, max(1, len(curves) - count))))
    colours = iter(plt.get_cmap("turbo")(np.linspace(0.03, 0.97, max(1, count))))
    marks = cycle("os^vDPX<>*hd")
    for name, mine in curves:
        yield {
            "label": name,
            "marker": next(marks),
            "markersize": 6 if mine else 7,
            "markerfacecolor": None if mine else "white",
            "linestyle": "-" if mine else "--",
            "linewidth": 1.5,
            "color": next(colours) if mine else next(greys),
        }


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Seconds against lost fidelity: our curves in colour, those of peers dashed in grey tones.

    Settings that did nothing are left out.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(15, 7.5), layout="constrained", sharex=True)
    curves: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in active(rows):
        curves.setdefault((row["package"], row["method"]), []).append(row)
    names = [(m if p == OURS else f"{p}: {m}", p == OURS) for p, m in curves]
    for points, look in zip(curves.values(), looks(names), strict=True):
        for side, measure in zip(axes, ("ssim", "perceptual"), strict=True):
            where = [_where(row, measure) for row in points]
            side.plot(*zip(*where, strict=True), **look)
    for side, name in zip(axes, ("1 − SSIM", "perceptual distance"), strict=True):
        side.set(yscale="log", xlabel="seconds for one", ylabel=f"{name} (lower is closer)")
        side.grid(alpha=0.3, which="both")
    figure.suptitle(f"{title}. Faster is left, closer to stock is down")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=9, ncols=6)
    save_plot(figure, path, dpi=130)


def plot_kinds(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """As `plot`, for many plans of one setting: a colour for each kind, and names on the front.

    The kind of a plan is which layers its methods work at. A plan is on the front if none is as
    fast and closer. The dotted line is stock's time.
    """
    import matplotlib.pyplot as plt

    shown = active(rows)
    stock = statistics.median(row["seconds"]["median"] * row["speedup"]["median"] for row in shown)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in shown:
        kinds.setdefault(" + ".join(sorted(row["plan"].keys() - {"plan", "guard"})), []).append(row)
    figure, axes = plt.subplots(1, 2, figsize=(15, 7), layout="constrained", sharex=True)
    figure.suptitle(f"{title}. Faster is left, closer to stock is down")
    measures = (("ssim", "1 − SSIM"), ("perceptual", "perceptual distance"))
    for side, (measure, name) in zip(axes, measures, strict=True):
        for number, (kind, points) in enumerate(sorted(kinds.items())):
            where = [_where(row, measure) for row in points]
            side.plot(*zip(*where, strict=True), "o", color=f"C{number}", ms=6, label=kind)
        for row in front(shown, measure):
            at = _where(row, measure)
            beside = {"ha": "right", "va": "top", "textcoords": "offset points"}  # it is free there
            side.annotate(row["method"], at, (-5, -2), fontsize=8, **beside)
        side.axvline(stock, color="0.4", ls=":", label="stock's time")
        side.set(yscale="log", xlabel="seconds for one", ylabel=f"{name} (lower is closer)")
        side.grid(alpha=0.3, which="both")
        fast, slow = side.get_xlim()
        side.set_xlim(fast - 0.25 * (slow - fast))  # room for the names
    axes[0].legend(loc="lower right")
    save_plot(figure, path, dpi=110)


def front(rows: list[dict[str, Any]], measure: str) -> list[dict[str, Any]]:
    """Those than which none is both faster and closer, the fastest first.

    Args:
        rows: Of plans.
        measure: ``ssim`` or ``perceptual``.
    """
    found: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: _where(row, measure)):
        if not found or _where(row, measure)[1] < _where(found[-1], measure)[1]:
            found.append(row)
    return found


def _where(row: dict[str, Any], measure: str) -> tuple[float, float]:
    """Where a plan is on a plot: seconds, and how far from stock."""
    lost = 1 - row["ssim"] if measure == "ssim" else row[measure]
    return row["seconds"]["median"], max(lost, 1e-4)


def options_of(title: str) -> argparse.ArgumentParser:
    """The command line that such a benchmark has."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--model", default="scenes-flux")
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", action="append", help="curves to measure; all without it")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds to draw for")
    parser.add_argument("--fresh", action="store_true", help="forget the numbers of earlier runs")
    parser.add_argument("--steps", type=int, help="steps of a picture; the model's own without it")
    parser.add_argument("--settings", type=int, help="settings of each curve; all without it")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


@dataclass(frozen=True)
class Outcome:
    """What a run has measured so far.

    Attributes:
        rows: For each setting its seconds beside its fidelity.
        seeds: The captions that they are over.
        lines: The raw numbers.
        undrawn: Settings that were refused or have drawn nothing yet, and why.
        until: When the time is over, on the monotonic clock.
    """

    rows: list[dict[str, Any]]
    seeds: list[int]
    lines: Lines
    undrawn: dict[str, str]
    until: float

    @property
    def stock(self) -> dict[str, Any]:
        """What the stock pipeline took."""
        return stock_of(self.lines, self.seeds)


def run(
    name: str,
    options: argparse.Namespace,
    benches: Benches,
    field: list[Contestant],
    warm: bool = True,
) -> Outcome:
    """Measure what is missing in ``NAME-MODEL.jsonl``, until the time is over.

    Args:
        name: Of the benchmark.
        options: The command line.
        benches: The pipelines.
        field: The settings; those that are not asked for are taken out of it.
        warm: Whether each method draws once before it is measured.

    Raises:
        SystemExit: If no caption is drawn by all that have begun.
    """
    field[:] = [who for who in field if not options.only or who.method in options.only]
    told = clip_scene if "num_frames" in benches.call else scene
    scenes = [told(seed) for seed in HELD_OUT[: options.captions]]
    path = options.out / f"{name}-{options.model}.jsonl"
    if options.fresh:
        path.unlink(missing_ok=True)
    weights = digest(benches.get(STOCK)[0])
    lines = Lines(
        path, {"model": options.model, "call": benches.call, "weights": weights, **here()}
    )
    until = time.monotonic() + options.budget
    measure(benches, field, scenes, lines, until, warm)
    rows, seeds = rows_of(field, lines)
    if not rows:
        raise SystemExit(f"No caption is drawn by all yet: start again to go on. {path}")
    return Outcome(rows, seeds, lines, undrawn(field, lines), until)
