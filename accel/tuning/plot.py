"""The plot of a tuning: what each plan costs and how near it is, and which one was proven."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image

from accel.errors import BadInput
from accel.tuning.targets import Target

if TYPE_CHECKING:
    from accel.tuning.tune import Tuning

WORDS = {
    "ssim": "SSIM to stock",
    "psnr": "PSNR to stock in dB",
    "perceptual": "perceptual distance to stock",
    "accuracy": "attributes of the caption that are right",
}


def draw(tuning: Tuning) -> Image.Image:
    """Times as fast as stock against fidelity, the front, the target and the chosen plan.

    Raises:
        BadInput: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadInput("The plot needs matplotlib: `pip install diffusers-accel[tune]`.") from error
    measure = tuning.targets.first
    figure = Figure(figsize=(8, 5.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    front = tuning.front()
    others = [point for point in tuning.points if point not in front]
    axes.scatter(
        [1 / point.cost for point in others],
        [point.mean(measure) for point in others],
        s=14,
        color="#9aa5b1",
        label=f"plans on all {tuning.evidence.prompts} prompts of the search",
    )
    speeds = [1 / point.cost for point in front]
    near = [point.mean(measure) for point in front]
    axes.plot(
        speeds, near, "o-", color="#1f6feb", ms=4, lw=1.2, label="front (by the model of costs)"
    )
    proven = tuning.evidence
    axes.plot(
        [proven.figure("speedup").mean],
        [proven.figure(measure).mean],
        "*",
        ms=16,
        color="#d1242f",
        label=f"chosen: measured on {proven.held_out} held-out prompts",
    )
    for text in proven.targets:
        target = Target.parse(text)
        if target.measure == measure:
            axes.axhline(target.level, color="#d1242f", lw=1, ls="--", label=f"target {text}")
        if target.measure == "speedup":
            axes.axvline(target.level, color="#d1242f", lw=1, ls="--", label=f"target {text}")
    axes.set(xlabel="times as fast as stock", ylabel=WORDS[measure])
    axes.set_title(f"{proven.pipeline}: {tuning.tried} plans tried", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="best")
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png")
        return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
