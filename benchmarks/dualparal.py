"""Clips of any length by parallel.DualParal: memory, calls, bytes sent, and whether they hold.

    python benchmarks/dualparal.py [--model scenes-wan] [--frames 17 65 257] [--captions 2]

Memory is resident memory above the loaded model, of the loop and of decoding apart. Windows of 17
frames, as long as the clips that the model was trained on, are judged by the oracle of clips. A
jump is the mean absolute difference of neighbouring frames, in shares of the range; at a seam the
two are of neighbouring blocks. Stock clips are there as far as the network's table of positions
goes. Bytes are what each of two processes sends for the first caption's clip; ``apart`` is how far
that clip is from the one of one process, at most. Nothing is timed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, save, signature

import accel
from accel import Plan
from accel.peak import watching
from accel.scenes import HELD_OUT
from accel.scenes.grammar import clip_scene
from accel.scenes.motion import caption_accuracy
from parallel import DualParal
from parallel.launch import Place, spread

STOCK = "stock"
WINDOW = 17
PROCESSES = 2


@dataclass(frozen=True)
class Asked:
    """What is measured.

    Attributes:
        model: A bundled model of clips.
        frames: Frames of the clips.
        captions: Held-out captions, a clip each.
        steps: Of each run.
    """

    model: str
    frames: tuple[int, ...]
    captions: int
    steps: int


class Maker:
    """Makes clips of held-out captions in this process."""

    def __init__(self, asked: Asked) -> None:
        import torch

        torch.set_num_threads(1)
        self.pipe, self._call = accel.load(asked.model)
        self.pipe.set_progress_bar_config(disable=True)
        self._call |= {"num_inference_steps": asked.steps, "output_type": "latent"}

    def latents(self, seed: int, frames: int, plan: Plan) -> tuple[Any, Any]:
        """Of a clip, and the run that made them."""
        import torch

        noise = torch.Generator().manual_seed(seed)
        asked = self._call | {"num_frames": frames, "generator": noise}
        run = plan.attach(self.pipe)
        with run.report.measuring_memory("cpu"):
            made = self.pipe(clip_scene(seed).caption, **asked).frames
            run.detach()
        return made, run

    def decoded(self, latents: Any) -> Any:
        """The frames ``[F, H, W, 3]`` in [0, 1], as the pipeline decodes them."""
        import torch

        vae = self.pipe.vae
        shape = (1, -1, 1, 1, 1)
        spread_, mean = (
            torch.tensor(vae.config[name]).view(shape) for name in ("latents_std", "latents_mean")
        )
        with torch.no_grad():
            video = vae.decode(latents / (1.0 / spread_) + mean, return_dict=False)[0]
        return self.pipe.video_processor.postprocess_video(video, output_type="np")[0]


def seams(method: DualParal, latent_frames: int, each: int = 4) -> set[int]:
    """Frames behind which another block begins; the first latent frame is one frame."""
    return {each * (start - 1) for start in range(method.frames, latent_frames, method.frames)}


def row(
    maker: Maker, asked: Asked, frames: int, plan: Plan, name: str, show: Path
) -> tuple[dict[str, Any], Any]:
    """The line of a plan and a length, and the first clip's latents."""
    clips, loops, decoders, made, run = [], [], [], [], None
    seeds = HELD_OUT[: asked.captions]
    for seed in seeds:
        latents, run = maker.latents(seed, frames, plan)
        made.append(latents)
        loops.append(run.report.peak.bytes - run.report.peak.before)
        with watching("cpu") as read:
            clips.append(maker.decoded(latents))
            peak = read()
        decoders.append(peak.bytes - peak.before)
    np.save(show / f"{name}-{frames}.npy", (clips[0] * 255).round().astype(np.uint8))
    windows = [
        (clip[start : start + WINDOW], clip_scene(seed))
        for seed, clip in zip(seeds, clips, strict=True)
        for start in range(0, frames - WINDOW + 1, WINDOW - 1)
    ]
    shown, scenes = zip(*windows, strict=True)
    jumps = np.stack([np.abs(np.diff(clip, axis=0)).mean((1, 2, 3)) for clip in clips])
    method = next(iter(plan.methods), None)
    cut = seams(method, made[0].shape[2]) if isinstance(method, DualParal) else set()
    at = [place in cut for place in range(jumps.shape[1])]
    line = {
        "plan": name,
        "frames": frames,
        "calls": run.report.calls,
        "kept": run.report.cached_bytes,
        "loop": max(loops),
        "decoding": max(decoders),
        "clip": clips[0].nbytes,
        "windows": len(windows),
        "accuracy": caption_accuracy(np.stack(shown), scenes).mean,
        "seams": int(sum(at)),
        "at_seams": float(jumps[:, at].mean()) if cut else None,
        "elsewhere": float(jumps[:, np.logical_not(at)].mean()),
        "verdicts": [str(each.detail) for each in run.report.verdicts.values()],
    }
    return line, made[0]


def together(_place: Place, asked: Asked, method: DualParal) -> list[dict[str, Any]]:
    """By length: what this process sent for the first caption's clip, and its latents."""
    from torch import distributed

    maker, found = Maker(asked), []
    for frames in asked.frames:
        latents, run = maker.latents(HELD_OUT[0], frames, Plan(method))
        [verdict] = run.report.verdicts.values()
        told = re.search(r"sent ([\d,]+) bytes", verdict.detail)
        sent: list[Any] = [None] * PROCESSES
        mine = int(told[1].replace(",", "")) if told else 0
        distributed.all_gather_object(sent, (mine, run.report.cached_bytes))
        found.append({"sent": sent, "latents": latents.numpy()})
    return found


def markdown(lines: Sequence[dict[str, Any]], title: str) -> str:
    """The table."""
    head = (
        "| plan | frames | calls | loop, MiB | queue, MiB | decoding, MiB | of it the clip | right "
        "| jump at seams | elsewhere | MB sent, by process |"
    )
    body = []
    for one in lines:
        at = f"{one['at_seams']:.4f}" if one["at_seams"] is not None else "–"
        sent = " and ".join(f"{each / 1e6:.2f}" for each in one.get("sent", ())) or "–"
        sizes = [one[name] / 2**20 for name in ("loop", "kept", "decoding", "clip")]
        body.append(
            f"| {one['plan']} | {one['frames']} | {one['calls']} | "
            + " | ".join(f"{size:.1f}" for size in sizes)
            + f" | {one['accuracy']:.1%} | {at} | {one['elsewhere']:.4f} | {sent} |"
        )
    return "\n".join([title, "", head, "|---" * 11 + "|", *body, "", signature()]) + "\n"


def main() -> None:
    """Measure and write ``results/dualparal-MODEL.json`` and ``.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-wan")
    parser.add_argument("--frames", type=int, nargs="+", default=[17, 65, 257])
    parser.add_argument("--captions", type=int, default=2)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--show", type=Path, default=Path("/tmp"), help="where clips go")
    options = parser.parse_args()
    options.show.mkdir(parents=True, exist_ok=True)
    asked = Asked(options.model, tuple(options.frames), options.captions, options.steps)
    method = DualParal()
    shared = spread(PROCESSES, together, asked, method)
    maker = Maker(asked)
    table = maker.pipe.transformer.config.rope_max_seq_len
    lines = []
    for frames, several in zip(asked.frames, shared, strict=True):
        if (frames - 1) // 4 + 1 <= table:
            lines.append(row(maker, asked, frames, Plan(), STOCK, options.show)[0])
        one, alone = row(maker, asked, frames, Plan(method), "DualParal", options.show)
        one["sent"], one["kept_by_process"] = map(list, zip(*several["sent"], strict=True))
        one["apart"] = float(np.abs(several["latents"] - alone.numpy()).max())
        lines.append(one)
        print(one, flush=True)
    name = f"dualparal-{asked.model}"
    title = (
        f"{asked.model}, clips of {asked.captions} captions, {asked.steps} steps: blocks of "
        f"{method.frames} latent frames that see {method.context} of each neighbour. Memory above "
        f"the loaded model; bytes with {PROCESSES} processes."
    )
    result = {"asked": asdict(asked), "method": method.model_dump(), "rows": lines}
    print(save(name, result))
    text = markdown(lines, title)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
