"""Plot how far a bundled model moves from step to step: `plot_trajectories.py NAME`.

For the network's output and every block's output, the relative change between adjacent steps,
mean |now − before| / mean |before|, over a few held-out captions at the model's normal call. What
reuses earlier steps lives on this being small. Numbers go to
`benchmarks/results/trajectory-NAME.json`, the picture to `docs/pictures/trajectory-NAME.png`.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import numpy as np
import torch
import typer
from torch import Tensor, nn

import accel
from accel.scenes import HELD_OUT, clip_scene, scene

mpl.use("Agg")
from matplotlib import pyplot as plt

app = typer.Typer(add_completion=False)

LISTS = {
    "transformer_blocks": "double",
    "single_transformer_blocks": "single",
    "blocks": "block",
    "down_blocks": "down",
    "up_blocks": "up",
}
OUTPUT = "output"


def _watched(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The network and its blocks in their order of execution, by a short name."""
    for attribute, short in LISTS.items():
        middle = getattr(denoiser, "mid_block", None)
        if attribute == "up_blocks" and isinstance(middle, nn.Module):
            yield "middle", middle
        for index, block in enumerate(getattr(denoiser, attribute, ())):
            yield f"{short} {index}", block
    yield OUTPUT, denoiser


def _picture_stream(returned: Any) -> Tensor:
    """What a block returns for the picture: last where text comes too, first of a UNet's."""
    if isinstance(returned, Tensor):
        return returned
    first, last = returned[0], returned[-1]
    return last if isinstance(last, Tensor) else first


class Recorder:
    """Relative changes of one module's output, `[steps - 1, captions]`.

    A pipeline calls its network once a step, or once for each guidance branch; `branches` calls
    make a step, and each is compared with the same branch a step earlier.
    """

    def __init__(self, branches: int, captions: int) -> None:
        self.branches, self.captions = branches, captions
        self.before: list[Tensor] = []
        self.changes: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, returned: Any) -> None:
        """Compare an output with that of the step before."""
        del module, args
        now = _picture_stream(returned).detach().float()
        if len(self.before) == self.branches:
            before = self.before.pop(0)
            rows = (now - before).abs().flatten(1).mean(1) / before.abs().flatten(1).mean(1)
            self.changes.append(rows.reshape(-1, self.captions).mean(0))
        self.before.append(now)

    def table(self) -> np.ndarray:
        """All changes, branches averaged."""
        every = torch.stack(self.changes)
        return every.reshape(-1, self.branches, self.captions).mean(1).numpy()


def _denoiser(pipe: Any) -> nn.Module:
    network: nn.Module = pipe.unet if "unet" in pipe.components else pipe.transformer
    return network


def _branches(pipe: Any, captions: list[str], call: dict[str, Any]) -> int:
    """Calls of the network in a run of one step."""
    count = 0

    def tick(*_: Any) -> None:
        nonlocal count
        count += 1

    handle = _denoiser(pipe).register_forward_hook(tick)
    _run(pipe, captions[:1], call | {"num_inference_steps": 1})
    handle.remove()
    return count


def _run(pipe: Any, captions: list[str], call: dict[str, Any]) -> None:
    options = call | {"negative_prompt": [call.get("negative_prompt", "")] * len(captions)}
    seeds = [torch.Generator().manual_seed(i) for i in range(len(captions))]
    pipe(captions, generator=seeds, output_type="latent", **options)


def record(pipe: Any, call: dict[str, Any], captions: list[str]) -> dict[str, np.ndarray]:
    """Relative changes `[steps - 1, captions]` of the output and of every block, by name."""
    branches = _branches(pipe, captions, call)
    recorders = {}
    with ExitStack() as stack:
        for name, module in _watched(_denoiser(pipe)):
            recorders[name] = Recorder(branches, len(captions))
            stack.callback(module.register_forward_hook(recorders[name]).remove)
        _run(pipe, captions, call)
    return {name: recorder.table() for name, recorder in recorders.items()}


def _report(name: str, call: dict[str, Any], tables: dict[str, np.ndarray]) -> dict[str, Any]:
    def rounded(values: np.ndarray) -> list[Any]:
        listed: list[Any] = np.round(values.astype(np.float64), 5).tolist()
        return listed

    output = tables[OUTPUT]
    return {
        "model": name,
        "seeds": [HELD_OUT[0], HELD_OUT[0] + output.shape[1]],
        "call": call,
        "torch": torch.__version__,
        "measure": "mean |now - before| / mean |before|, adjacent steps, branches averaged",
        "output": {"mean": rounded(output.mean(1)), "by_caption": rounded(output.T)},
        "blocks": {n: rounded(table.mean(1)) for n, table in tables.items() if n != OUTPUT},
    }


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the report: the output with the spread of captions, and the blocks by their depth."""
    figure, axes = plt.subplots(figsize=(8.4, 4.4), layout="constrained")
    every = np.array(report["output"]["by_caption"])
    steps = np.arange(2, every.shape[1] + 2)
    blocks, colours = report["blocks"], mpl.colormaps["viridis"]
    for i, (name, values) in enumerate(blocks.items()):
        shade = colours(0.92 * i / max(1, len(blocks) - 1))
        axes.plot(steps, values, color=shade, linewidth=1.1, label=name)
    low, high = np.quantile(every, (0.1, 0.9), axis=0)
    axes.fill_between(steps, low, high, color="black", alpha=0.12, linewidth=0)
    axes.plot(steps, report["output"]["mean"], color="black", linewidth=2.4, label="network output")
    axes.set_xlabel("step")
    axes.set_ylabel("relative change since the step before")
    axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(0)
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{report['model']}: {len(every)} held-out captions, {every.shape[1] + 1} steps "
        "(band: 10 to 90 % of captions)",
        loc="left",
        fontsize=10,
    )
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@app.command()
def main(
    name: Annotated[str, typer.Argument(help="bundled model, or a model folder")],
    captions: Annotated[int, typer.Option(help="held-out captions to average over")] = 8,
    threads: int = 1,
    results: Path = Path("benchmarks/results"),
    pictures: Path = Path("docs/pictures"),
) -> None:
    """Record and plot the trajectory of a model."""
    torch.set_num_threads(threads)
    pipe, call = accel.load(name)
    pipe.set_progress_bar_config(disable=True)
    tell, short = clip_scene if "num_frames" in call else scene, Path(name).name
    told = [tell(seed).caption for seed in HELD_OUT[:captions]]
    report = _report(short, call, record(pipe, call, told))
    (results / f"trajectory-{short}.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(report, pictures / f"trajectory-{short}.png")
    mean = report["output"]["mean"]
    middle = mean[len(mean) // 3 : -len(mean) // 3]
    typer.echo(f"output: first {mean[0]:.3f}, middle {np.mean(middle):.3f}, last {mean[-1]:.3f}")


if __name__ == "__main__":
    app()
