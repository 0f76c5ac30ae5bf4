"""Sparse attention, alone and in a denoiser: seconds beside dense attention, by tokens and density.

    python benchmarks/attention.py [--tokens 1024 … 32768] [--heads 4] [--threads 1] [--repeats 5]
    python benchmarks/attention.py --denoiser [--tokens 1024 … 16384] [--threads 2] [--repeats 2]

For every number of tokens (a picture of twice as many, or as many, columns as rows) and for
every share of pairs to keep, neighbourhood attention in strides of 8×16 tokens is compiled and run
by the gather lowering; GRAT's two patterns with boxes of 16×16 come beside. Dense attention is
PyTorch's own, without a mask. Repeats are interleaved: each takes dense and all patterns in turn,
and ratios are of the same repeat. Reported are medians and quartiles, the density, and what
building a table took, once.

With ``--denoiser`` it is the whole network: one block of a PixArt-Σ, of its published width and
with random weights, under the plans that a user would attach to its pipeline. What is timed is one
call of the network, everything but attention included; tables are compiled, and it is measured
whether they pay, in a call before. More blocks take that many times as much.

Beside ``attention-DEVICE.json`` and ``attention-denoiser-DEVICE.json`` comes a ``.png``: seconds
and speed-ups by tokens.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, ratio, save, spread
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from accel import Plan, attention
from accel.attention.blocks import compiled
from accel.attention.lowerings.gather import Gather
from accel.attention.patterns.grat import CrissCross, Surrounding
from accel.attention.patterns.neighbourhood import Neighbourhood
from accel.attention.patterns.pattern import Pattern
from accel.attention.sparse import Patterned
from accel.seams.layout import Layout

TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
DENSITIES = (0.05, 0.1, 0.25, 0.5)
STRIDE = (1, 8, 16)
DENSE = "dense"

DENOISER_TOKENS = (1024, 4096, 16384)
DENOISER_DENSITIES = (0.1, 0.25)
PIXELS = 16
"""Pixels a side of a token: 8 of the autoencoder, 2 of the patch."""

TEXT, TEXT_WIDTH = 120, 4096

Run = Callable[[], Tensor]
Visit = Callable[[], float]
"""Does something once, and says how many seconds of it count."""


def picture(tokens: int, text: int) -> Layout:
    """A layout of a power of two of image tokens: a square, or two side by side."""
    height = 2 ** (int(math.log2(tokens)) // 2)
    return Layout(text, 1, height, tokens // height)


def window(layout: Layout, density: float) -> Neighbourhood:
    """A window of that share of the image, of the image's shape."""
    sides = [max(1, round(side * math.sqrt(density))) for side in layout.grid]
    strides = [min(pair) for pair in zip(STRIDE, sides, strict=True)]
    return Neighbourhood((1, sides[1], sides[2]), (1, strides[1], strides[2]))


def patterns(layout: Layout) -> dict[str, Pattern]:
    """What is measured on a layout, by its name in the plot."""
    found: dict[str, Pattern] = {f"window {d:.0%}": window(layout, d) for d in DENSITIES}
    return found | {"GRAT surrounding": Surrounding(), "GRAT criss-cross": CrissCross()}


def rounds(visits: dict[str, Visit], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other, that many times."""
    seconds: dict[str, list[float]] = {name: [] for name in visits}
    for _ in range(repeats):
        for name, visit in visits.items():
            seconds[name].append(visit())
    return seconds


def clocked(run: Callable[[], Any], sync: Callable[[], None]) -> float:
    """Seconds that something takes."""
    sync()
    begin = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - begin


def waiting(device: str) -> Callable[[], None]:
    """What waits for a device."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


@torch.no_grad()
def measured(
    layout: Layout, heads: int, dim: int, repeats: int, device: str
) -> list[dict[str, Any]]:
    """Rows of one layout: dense attention, then each pattern."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape = (3, 1, heads, layout.tokens, dim)
    qkv = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    rows: list[dict[str, Any]] = [{"pattern": DENSE, "density": 1.0, "computed": 1.0}]
    runs: dict[str, Run] = {DENSE: lambda: scaled_dot_product_attention(*qkv)}
    for name, pattern in patterns(layout).items():
        begin = time.perf_counter()
        table = compiled(pattern, layout, device)
        lowering = Gather(table)
        row = {"pattern": name, "parameters": repr(pattern), "density": table.density}
        rows.append(
            row | {"computed": table.computed, "build_seconds": time.perf_counter() - begin}
        )
        runs[name] = lambda lowering=lowering: lowering(*qkv)
    sync = waiting(device)
    visits = {name: partial(clocked, run, sync) for name, run in runs.items()}
    rounds(visits, 1)  # warms up
    return summed(rows, rounds(visits, repeats), layout.tokens)


def summed(
    rows: list[dict[str, Any]], seconds: dict[str, list[float]], tokens: int
) -> list[dict[str, Any]]:
    """The rows with their times."""
    for row in rows:
        row["tokens"] = tokens
        row["seconds"] = spread(seconds[row["pattern"]])
        row["speedup"] = ratio(seconds[DENSE], seconds[row["pattern"]])
    return rows


def pixart(device: str) -> Any:
    """A pipeline around one block of a PixArt-Σ; the same random weights each time."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_layers=1,
        sample_size=128,
        out_channels=8,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )
    pipe = PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=transformer.to(device),
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe if device == "cpu" else pipe.to(torch.bfloat16)


def denoised(pipe: Any, layout: Layout, sync: Callable[[], None]) -> float:
    """Seconds of the network in one step of a picture."""
    network = pipe.transformer
    source = torch.Generator().manual_seed(0)
    text = torch.randn(1, TEXT, TEXT_WIDTH, generator=source).to(network.device, network.dtype)
    moments: list[float] = []

    def note(*_: Any) -> None:
        sync()
        moments.append(time.perf_counter())

    undos = [network.register_forward_pre_hook(note), network.register_forward_hook(note)]
    pipe(
        prompt_embeds=text,
        prompt_attention_mask=torch.ones(1, TEXT, device=network.device),
        negative_prompt=None,
        guidance_scale=1.0,
        height=PIXELS * layout.height,
        width=PIXELS * layout.width,
        num_inference_steps=1,
        generator=source,
        use_resolution_binning=False,
        output_type="latent",
    )
    for undo in undos:
        undo.remove()
    begin, end = moments
    return end - begin


def methods(layout: Layout) -> dict[str, Patterned]:
    """What a denoiser is run under, by its name in the plot."""
    found: dict[str, Patterned] = {}
    for density in DENOISER_DENSITIES:
        shape = window(layout, density)
        fields = {"window": shape.window, "stride": shape.stride, "warm_up": 0.0}
        found[f"window {density:.0%}"] = attention.Neighbourhood(**fields)
    return found | {"GRAT criss-cross": attention.GRAT(warm_up=0.0)}


@torch.no_grad()
def denoiser(layout: Layout, repeats: int, device: str) -> list[dict[str, Any]]:
    """Rows of one layout: the dense network, then under each plan."""
    rows: list[dict[str, Any]] = [{"pattern": DENSE, "density": 1.0}]
    sync = waiting(device)
    visits: dict[str, Visit] = {DENSE: partial(denoised, pixart(device), layout, sync)}
    visits[DENSE]()
    for name, method in methods(layout).items():
        pipe, plan = pixart(device), Plan(method)
        run = plan.attach(pipe)
        visits[name] = partial(denoised, pipe, layout, sync)
        visits[name]()
        said = run.report.verdicts[method.name].detail
        density = method.pattern(layout).density(layout)
        rows.append({"pattern": name, "density": density, "plan": plan.to_dict(), "said": said})
    return summed(rows, rounds(visits, repeats), layout.tokens)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Seconds and speed-up by tokens; dense attention dashed in grey."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(14, 6.5), layout="constrained", sharex=True)
    names = list(dict.fromkeys(row["pattern"] for row in rows))
    colours = plt.get_cmap("turbo")
    for number, name in enumerate(names):
        points = [row for row in rows if row["pattern"] == name]
        look: dict[str, Any] = {"marker": "os^vDPX<>*hd"[number % 12], "label": name}
        look["color"] = "grey" if name == DENSE else colours(number / len(names))
        look["linestyle"] = "--" if name == DENSE else "-"
        tokens = [row["tokens"] for row in points]
        for side, key in zip(axes, ("seconds", "speedup"), strict=True):
            found = [row[key] for row in points]
            side.plot(tokens, [one["median"] for one in found], **look)
            low, high = ([one[end] for one in found] for end in ("low", "high"))
            side.fill_between(tokens, low, high, color=look["color"], alpha=0.2)
    for side, what in zip(axes, ("seconds", "times faster than dense attention"), strict=True):
        side.set(xscale="log", yscale="log", xlabel="tokens", ylabel=what)
        side.grid(alpha=0.3, which="both")
    figure.suptitle(title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=9, ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--denoiser", action="store_true", help="the whole network")
    parser.add_argument("--tokens", type=int, nargs="+", help="powers of two")
    parser.add_argument("--text", type=int, default=0, help="text tokens, always kept")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, help="5; 2 of a denoiser")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args()


def main() -> None:
    """Measure and write ``results/attention-DEVICE.json`` with its plot, or that of a denoiser."""
    given = options()
    torch.set_num_threads(given.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    repeats = given.repeats or (2 if given.denoiser else 5)
    rows: list[dict[str, Any]] = []
    for tokens in given.tokens or (DENOISER_TOKENS if given.denoiser else TOKENS):
        if given.denoiser:
            found = denoiser(picture(tokens, 0), repeats, device)
        else:
            layout = picture(tokens, given.text)
            found = measured(layout, given.heads, given.dim, repeats, device)
        for row in found:
            print(
                f"{row['tokens']:>6} tokens, {row['pattern']:<18} {row['density']:6.1%} "
                f"{row['seconds']['median']:.4f} s, {row['speedup']['median']:.2f} times",
                flush=True,
            )
        rows += found
    name, setting = f"attention-{device}", {"repeats": repeats}
    title = f"Attention alone on {device}, {given.heads} heads of {given.dim}"
    if given.denoiser:
        name = f"attention-denoiser-{device}"
        title = f"One block of PixArt-Σ, random weights, on {device}"
    else:
        setting |= {key: getattr(given, key) for key in ("text", "heads", "dim")}
    path = save(name, {"setting": setting, "rows": rows}, given.out)
    plot(rows, path.with_suffix(".png"), title)
    print(path)


if __name__ == "__main__":
    # that a pattern does not pay is what is measured here
    warnings.simplefilter("ignore", UserWarning)
    main()
