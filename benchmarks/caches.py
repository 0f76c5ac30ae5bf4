"""Every cache swept over its knob, beside the caches of other projects, in one interleaved run.

    python benchmarks/caches.py [--model scenes-flux] [--captions 16]

Needs the extra `bench`, which brings the peers. Every held-out caption is drawn by the stock
pipeline and by every setting of every cache, with the same seed, in rotating order; a first round
is left out as warm-up. Attaching and detaching is not timed. Fidelity is measured against the
stock picture of the same caption and seed. A second table gives, for each level of fidelity, the
fastest of our caches and the fastest peer.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from measure import RESULTS, ratio, save, spread
from PIL import Image

import accel
from accel import quality
from accel.errors import AccelError
from accel.scenes import HELD_OUT, Scene, oracle, scene

STOCK = "stock"
OURS = "diffusers-accel"
LAYERS = ("TransformerBlock", "SingleTransformerBlock", "ResnetBlock2D", "Transformer2DModel")
LEVELS = (0.99, 0.98, 0.95, 0.9, 0.8)

SWEEPS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "EasyCache": ("threshold", {}, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "EasyCache, paper": ("threshold", {"predictor": "reuse", "warmup": 5}, (0.05, 0.1, 0.2)),
    "FirstBlock": ("threshold", {"predictor": "newton"}, (0.05, 0.1, 0.2, 0.3)),
    "DBCache": ("threshold", {"predictor": "newton"}, (0.05, 0.1, 0.2, 0.3)),
    "TeaCache": ("threshold", {"coefficients": "identity"}, (0.1, 0.2, 0.4, 0.8)),
    "MagCache": ("threshold", {}, (0.06, 0.12, 0.24)),
    "DeltaDiT": ("interval", {}, (2, 3, 4)),
    "DeepCache": ("interval", {"predictor": "newton"}, (2, 3, 4, 5, 7)),
    "FORA": ("interval", {}, (2, 3, 4)),
    "PAB": ("spatial", {}, (2, 4, 6)),
    "TaylorSeer": ("interval", {}, (2, 3, 4, 6)),
    "TaylorSeer, whole network": ("interval", {"site": "network"}, (2, 3, 4, 6)),
    "HiCache": ("interval", {}, (3, 4, 6)),
    "FoCa": ("interval", {}, (3, 4, 6)),
    "DMD": ("interval", {}, (3, 4, 6)),
    "SADA": ("max_skips", {}, (1, 2, 4)),
    "ZEUS": ("interval", {}, (2, 3, 4)),
}
"""By curve: the field that is swept, the other fields, and the values."""


@dataclass
class Contestant:
    """One setting of one cache, and what came of it."""

    package: str
    method: str
    knob: float
    plan: accel.Plan | None = None
    peer: peers.Peer | None = None
    seconds: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)

    @contextmanager
    def on(self, pipe: Any, call: dict[str, Any]) -> Iterator[None]:
        """The cache on the pipeline."""
        if self.plan is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                with self.plan.attach(pipe):
                    yield
        elif self.peer is not None:
            with self.peer.enter(pipe, call):
                yield
        else:
            yield


def ours(pipe: Any) -> list[Contestant]:
    """Every setting of every cache of ours that serves the pipeline."""
    known, found = accel.methods(), []
    for curve, (knob, fields, values) in SWEEPS.items():
        kind = known[f"cache.{curve.split(',')[0]}"]
        for value in values:
            plan = accel.Plan(kind(**fields, **{knob: value}))
            try:
                plan.attach(pipe).detach()
            except AccelError as error:
                print(f"left out {curve}: {error}")
                break
            found.append(Contestant(OURS, curve, value, plan=plan))
    return found


class Counter:
    """Rows that went through blocks, by hooks that every project's cache leaves in place."""

    def __init__(self, pipe: Any) -> None:
        network = getattr(pipe, "unet", None) or pipe.transformer
        self.rows = 0
        for module in network.modules():
            if module is not network and type(module).__name__.endswith(LAYERS):
                module.register_forward_hook(self._count)

    def _count(self, module: Any, args: Any, output: Any) -> None:  # noqa: ARG002
        while not isinstance(output, torch.Tensor):
            output = output[0]
        self.rows += len(output)


class Benches:
    """A pipeline for each package: some leave theirs changed when they come off."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._pipes: dict[str, tuple[Any, Counter]] = {}
        self.call = accel.load(model)[1]

    def pipe(self, package: str) -> Any:
        """The pipeline of a package."""
        return self._get(package)[0]

    def counter(self, package: str) -> Counter:
        """What counts its blocks."""
        return self._get(package)[1]

    def _get(self, package: str) -> tuple[Any, Counter]:
        if package not in self._pipes:
            pipe, _ = accel.load(self._model)
            pipe.set_progress_bar_config(disable=True)
            self._pipes[package] = pipe, Counter(pipe)
        return self._pipes[package]


def draw(benches: Benches, who: Contestant, subject: Scene, keep: bool) -> None:
    """Draw one caption, timed from the prompt to the picture."""
    pipe, counter = benches.pipe(who.package), benches.counter(who.package)
    generator = torch.Generator().manual_seed(subject.seed)
    with who.on(pipe, benches.call):
        counter.rows = 0
        start = time.perf_counter()
        picture = pipe(subject.caption, generator=generator, **benches.call).images[0]
        seconds = time.perf_counter() - start
    if keep:
        who.seconds.append(seconds)
        who.blocks.append(counter.rows)
        who.pictures.append(picture)


def summary(who: Contestant, stock: Contestant, scenes: list[Scene]) -> dict[str, Any]:
    """Seconds and blocks beside fidelity."""
    pairs = list(zip(stock.pictures, who.pictures, strict=True))
    accuracy = oracle.caption_accuracy(who.pictures, scenes)
    return {
        "package": who.package,
        "method": who.method,
        "knob": who.knob,
        "plan": who.plan and who.plan.to_dict(),
        "seconds": spread(who.seconds),
        "speedup": ratio(stock.seconds, who.seconds),
        "block_rows": float(np.mean(who.blocks)),
        "psnr": float(np.mean([min(quality.psnr(a, b), 100.0) for a, b in pairs])),
        "ssim": float(np.mean([quality.ssim(a, b) for a, b in pairs])),
        "perceptual": float(np.mean([quality.perceptual(a, b) for a, b in pairs])),
        "caption_accuracy": accuracy.mean,
    }


def levels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each level of SSIM the fastest of our caches, the fastest peer, and their ratio."""
    table = []
    for level in LEVELS:
        good = [row for row in rows if row["ssim"] >= level]
        best = {}
        for side in (True, False):
            mine = [row for row in good if (row["package"] == OURS) == side]
            best[side] = min(mine, key=lambda row: row["seconds"]["median"], default=None)
        ours, peer = best[True], best[False]
        both = ours is not None and peer is not None
        table.append(
            {
                "ssim": level,
                "ours": ours and f"{ours['method']} {ours['knob']:g}",
                "peer": peer and f"{peer['package']} {peer['method']} {peer['knob']:g}",
                "ratio": peer["seconds"]["median"] / ours["seconds"]["median"] if both else None,
            }
        )
    return table


def leaves_a_trace(pipe: Any, call: dict[str, Any], who: Contestant, subject: Scene) -> bool:
    """Whether the pipeline draws something else after a cache has come off."""

    def stock() -> np.ndarray:
        generator = torch.Generator().manual_seed(subject.seed)
        return np.asarray(pipe(subject.caption, generator=generator, **call).images[0])

    before = stock()
    with who.on(pipe, call):
        pipe(subject.caption, generator=torch.Generator().manual_seed(0), **call)
    return not np.array_equal(before, stock())


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Seconds against lost SSIM: our curves in colour, those of peers dashed in grey tones."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    curves: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        curves.setdefault((row["package"], row["method"]), []).append(row)
    greys = iter(plt.get_cmap("Greys")(np.linspace(0.4, 0.95, 8)))
    colours = iter(plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(curves))))
    marks = iter("osv^<>DPX*hds" * 3)
    for (package, method), points in curves.items():
        mine = package == OURS
        axes.plot(
            [row["speedup"]["median"] for row in points],
            [max(1 - row["ssim"], 1e-4) for row in points],
            marker=next(marks),
            markersize=5,
            linestyle="-" if mine else "--",
            linewidth=1.6 if mine else 1.2,
            color=next(colours) if mine else next(greys),
            label=method if mine else f"{package}: {method}",
        )
    axes.set(yscale="log", xlabel="times faster than stock", ylabel="1 − SSIM (lower is closer)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, write ``results/caches-MODEL.json`` and the plot beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-flux")
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", action="append", help="curves to measure; all without it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    benches = Benches(options.model)
    call = benches.call
    stock = Contestant(STOCK, STOCK, 0)
    found = peers.of(benches.pipe("diffusers"), call)
    others = [Contestant(p.package, p.method, p.knob, peer=p) for p in found]
    mine = ours(benches.pipe(OURS))
    field_ = [who for who in (*mine, *others) if _asked(who, options.only)]
    scenes = [scene(seed) for seed in HELD_OUT[: options.captions]]
    for turn, subject in enumerate([scenes[0], *scenes]):
        order = [stock, *field_]
        shift = turn * 7 % len(order)
        for who in order[shift:] + order[:shift]:
            draw(benches, who, subject, turn > 0)
        print(f"{turn}/{len(scenes)}", end="\r", flush=True)
    rows = [summary(who, stock, scenes) for who in field_]
    first = {(who.package, who.method): who for who in field_}
    traces = {
        f"{package}: {method}": leaves_a_trace(benches.pipe(package), call, who, scenes[0])
        for (package, method), who in first.items()
    }
    result = {
        "call": call,
        "stock": summary(stock, stock, scenes),
        "levels": levels(rows),
        "leaves_a_trace": traces,
        "rows": rows,
    }
    for row in rows:
        print(
            f"{row['package']:<16}{row['method']:<26}{row['knob']:>6g}"
            f"{row['speedup']['median']:>8.2f}×  SSIM {row['ssim']:.4f}  {row['block_rows']:.0f}"
        )
    for row in result["levels"]:
        print(row)
    name = f"caches-{options.model}"
    title = f"{options.model}, {call['num_inference_steps']} steps, one cache at a time"
    plot(rows, RESULTS / f"{name}.png", title)
    print(save(name, result))


def _asked(who: Contestant, only: list[str] | None) -> bool:
    return not only or who.method in only


if __name__ == "__main__":
    main()
