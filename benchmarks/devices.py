"""What several processes gain on one picture, and what it costs: seconds, bytes, fidelity.

    python benchmarks/devices.py [--model scenes-flux] [--processes 2] [--captions 4] [--size 128]

Every process has one thread, and so has the one that works alone: in each round the first process
makes the picture of the stock pipeline while the others wait, and then all make it together under
each plan in turn, there and back. What is compared with stock is the picture of the same seed.
Bytes are what one process sends for a picture, at most.

The file is not called `parallel.py`: beside the other benchmarks it would hide that package.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from measure import RESULTS, Visit, clocked, ratio, repeated, save, signature, spread

import accel
from accel import Accelerator, Plan, quality
from accel.scenes import HELD_OUT, scene
from accel.scenes.oracle import caption_accuracy
from parallel import CFG, PCPP, AsyncDiff, DistriFusion, Ulysses
from parallel.launch import Place
from parallel.launch import spread as together

STOCK = "one process"
ASKED = 1.6
"""How many times as fast two processes are to be."""

PLANS: dict[str, Accelerator] = {
    "CFG": CFG(),
    "DistriFusion, sync": DistriFusion(mode="sync"),
    "DistriFusion": DistriFusion(),
    "PCPP": PCPP(),
    "AsyncDiff": AsyncDiff(),
    "Ulysses": Ulysses(),
}


@dataclass(frozen=True)
class Asked:
    """What is measured.

    Attributes:
        model: A bundled model of pictures.
        size: Pixels a side; 0: that of a usual call.
        captions: Held-out captions, a picture each.
        repeats: Rounds that count, of each caption.
    """

    model: str
    size: int
    captions: int
    repeats: int


def plans(model: str, processes: int) -> dict[str, Plan]:
    """Those that serve a model, with so many processes."""
    pipe, _ = accel.load(model)
    found = {}
    for name, method in PLANS.items():
        if isinstance(method, CFG) and processes != method.degree:
            continue
        try:
            Plan(method).attach(pipe).detach()
        except accel.errors.UnsupportedModel:
            continue
        found[name] = Plan(method)
    return found


class Maker:
    """Makes pictures in one process: alone, while the others wait, or together.

    Attributes:
        latest: The latest picture by plan.
        sent: The most bytes that this process has sent for a picture, by plan.
    """

    def __init__(self, place: Place, asked: Asked, chosen: dict[str, Plan]) -> None:
        import torch

        torch.set_num_threads(1)
        self._place, self._chosen = place, chosen
        self._pipe, self._call = accel.load(asked.model)
        self._pipe.set_progress_bar_config(disable=True)
        if asked.size:
            self._call |= {"height": asked.size, "width": asked.size}
        self.latest: dict[str, Any] = {}
        self.sent = dict.fromkeys(chosen, 0)

    def picture(self, seed: int) -> Any:
        """That of a held-out caption, ``[H, W, 3]``."""
        import torch

        noise = torch.Generator().manual_seed(seed)
        made = self._pipe(scene(seed).caption, generator=noise, output_type="np", **self._call)
        return made.images[0]

    def alone(self, seed: int) -> float:
        """Seconds of the stock pipeline in the first process; the others wait."""
        from torch import distributed

        distributed.barrier()
        took = clocked(lambda: self._keep(STOCK, seed)) if self._place.rank == 0 else 0.0
        distributed.barrier()
        return took

    def together(self, name: str, seed: int) -> float:
        """Seconds of a plan in all processes."""
        from torch import distributed

        with self._chosen[name].attach(self._pipe) as run:
            distributed.barrier()
            took = clocked(lambda: self._keep(name, seed))
        [verdict] = run.report.verdicts.values()
        told = re.search(r"sent ([\d,]+) bytes", verdict.detail)
        self.sent[name] = max(self.sent[name], int(told[1].replace(",", "")) if told else 0)
        return took

    def _keep(self, name: str, seed: int) -> None:
        self.latest[name] = self.picture(seed)


def measured(place: Place, asked: Asked, chosen: dict[str, Plan]) -> dict[str, Any]:
    """Seconds, bytes and pictures of every plan; all processes make the same calls."""
    maker = Maker(place, asked, chosen)
    seconds: dict[str, list[float]] = {name: [] for name in (STOCK, *chosen)}
    pictures: dict[str, list[Any]] = {name: [] for name in (STOCK, *chosen)}
    for seed in HELD_OUT[: asked.captions]:
        visits: dict[str, Visit] = {STOCK: partial(maker.alone, seed)}
        visits |= {name: partial(maker.together, name, seed) for name in chosen}
        for name, each in repeated(visits, 0.0, asked.repeats).items():
            seconds[name] += each
            pictures[name].append(maker.latest.get(name))
    if place.rank:
        return {}
    shown = {name: np.stack(each) for name, each in pictures.items()}
    return {"seconds": seconds, "pictures": shown, "bytes": maker.sent}


def rows(found: dict[str, Any], asked: Asked) -> list[dict[str, Any]]:
    """A line for each plan."""
    scenes = [scene(seed) for seed in HELD_OUT[: asked.captions]]
    stock = found["pictures"][STOCK]
    lines = []
    for name, seconds in found["seconds"].items():
        shown = found["pictures"][name]
        lines.append(
            {
                "plan": name,
                "seconds": spread(seconds),
                "faster": ratio(found["seconds"][STOCK], seconds),
                "bytes": found["bytes"].get(name, 0),
                "ssim": quality.ssim(shown, stock),
                "psnr": quality.psnr(shown, stock),
                "perceptual": quality.perceptual(shown, stock),
                "accuracy": caption_accuracy(list(shown), scenes).mean,
            }
        )
    return lines


def markdown(lines: Sequence[dict[str, Any]], title: str) -> str:
    """The table."""
    head = "| plan | faster | quartiles | MB sent | SSIM | perceptual distance | right |"
    body = [
        f"| {one['plan']} | {one['faster']['median']:.2f}× | {one['faster']['low']:.2f}–"
        f"{one['faster']['high']:.2f} | {one['bytes'] / 1e6:.2f} | {one['ssim']:.4f} | "
        f"{one['perceptual']:.4f} | {one['accuracy']:.1%} |"
        for one in lines
    ]
    return "\n".join([title, "", head, "|---" * 7 + "|", *body, "", signature()]) + "\n"


def main() -> None:
    """Measure and write ``results/devices-N-MODEL-SIZE.json`` and ``.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-flux")
    parser.add_argument("--size", type=int, default=0, help="pixels a side; 0: as usual")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--captions", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    asked = Asked(options.model, options.size, options.captions, options.repeats)
    chosen = plans(asked.model, options.processes)
    found = together(options.processes, measured, asked, chosen)
    lines = rows(found, asked)
    size = asked.size or found["pictures"][STOCK].shape[1]
    name = f"devices-{options.processes}-{asked.model}-{size}"
    title = (
        f"{asked.model}, {size}², {asked.captions} captions: {options.processes} processes of one "
        "thread each against one of them, times as fast."
    )
    best = max(lines, key=lambda one: one["faster"]["median"])
    result = {"asked": asdict(asked), "processes": options.processes, "rows": lines}
    print(save(name, {**result, "wanted": ASKED, "best": best["plan"]}))
    text = markdown(lines, title)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
