"""Judge a bundled model: `evaluate_scenes.py FOLDER` writes `evaluation.json` and its card.

Held-out captions, drawn at the folder's normal call with and without guidance, are judged by
the oracle (caption accuracy) and by the Fréchet distance to renders that no caption shares. The
yardsticks are the same distance for other renders (its floor) and for blurred ones.
"""

import contextlib
import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DiffusionPipeline
from PIL import Image, ImageFilter

from accel.quality import frechet, kernel
from accel.scenes import HELD_OUT, Scene, clip, clip_scene, picture, scene
from accel.scenes.oracle import Accuracy, caption_accuracy

app = typer.Typer(add_completion=False)

REAL = 100_000
"""Renders to compare with start this far into the held-out seeds."""
BLUR = 2.0
"""Radius of the Gaussian blur in pixels, the yardstick of lost detail."""


def _draw(pipe: Any, scenes: list[Scene], call: dict[str, Any], batch: int) -> np.ndarray:
    """Pictures `[N, H, W, 3]` uint8; of clips, every fourth frame."""
    parts = []
    for low in range(0, len(scenes), batch):
        captions = [s.caption for s in scenes[low : low + batch]]
        options = call | {"output_type": "np"}
        options["negative_prompt"] = [call.get("negative_prompt", "")] * len(captions)
        seeds = [torch.Generator().manual_seed(s.seed) for s in scenes[low : low + batch]]
        made = pipe(captions, generator=seeds, **options)
        shown = made.frames[:, ::4] if hasattr(made, "frames") else made.images[:, None]
        parts.append((np.asarray(shown).clip(0, 1) * 255 + 0.5).astype(np.uint8))
        typer.echo(f"{time.strftime('%H:%M:%S')} drawn {low + len(captions)}")
    return np.concatenate(parts)


def _unguided(call: dict[str, Any]) -> dict[str, Any]:
    scale = "true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale"
    return call | {scale: 1.0}


def _real(seeds: range, size: int, frames: int) -> np.ndarray:
    if frames > 1:
        return np.concatenate([clip(clip_scene(s), size, frames)[::4] for s in seeds])
    return np.stack([picture(scene(s), size) for s in seeds])


def _blurred(pictures: np.ndarray) -> np.ndarray:
    soft = [Image.fromarray(p).filter(ImageFilter.GaussianBlur(BLUR)) for p in pictures]
    return np.stack([np.asarray(picture) for picture in soft])


def _shares(found: Accuracy) -> dict[str, Any]:
    return {
        "mean": round(found.mean, 4),
        "all_correct": round(found.all_correct, 4),
        "by_attribute": {name: round(v, 4) for name, v in found.by_attribute.items()},
    }


def _judge(drawn: np.ndarray, scenes: list[Scene], real: np.ndarray) -> dict[str, Any]:
    flat = drawn.reshape(-1, *drawn.shape[-3:])
    accuracy = _shares(caption_accuracy(drawn[:, 0], scenes))
    return {
        "caption_accuracy": accuracy,
        "frechet": round(frechet(flat, real), 4),
        "kernel": round(kernel(flat, real), 6),
    }


@app.command()
def main(
    folder: Path,
    count: Annotated[int, typer.Option(help="held-out captions")] = 256,
    batch: int = 16,
    threads: int = 1,
    bf16: Annotated[bool, typer.Option(help="draw under bf16 autocast")] = False,
    unguided: Annotated[bool, typer.Option(help="judge without guidance too")] = True,
    provisional: Annotated[bool, typer.Option(help="mark the card as provisional")] = False,
    samples: Annotated[Path | None, typer.Option(help="picture of the first drawings")] = None,
) -> None:
    """Judge the model in FOLDER."""
    torch.set_num_threads(threads)
    call = json.loads((folder / "call.json").read_text())
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    frames, size = call.get("num_frames", 1), call["height"]
    tell = clip_scene if frames > 1 else scene
    scenes = [tell(seed) for seed in HELD_OUT[:count]]
    real = _real(HELD_OUT[REAL : REAL + count], size, frames)
    truth = _real(HELD_OUT[:count], size, frames)
    report: dict[str, Any] = {
        "model": folder.name,
        "provisional": provisional,
        "captions": count,
        "seeds": [HELD_OUT[0], HELD_OUT[0] + count],
        "call": call,
        "bf16": bf16,
        "renders": {
            "caption_accuracy": _shares(
                caption_accuracy(truth[:: max(1, (frames + 3) // 4)], scenes)
            ),
            "frechet": round(frechet(truth, real), 4),
        },
        "blurred": {"radius_px": BLUR, "frechet": round(frechet(_blurred(truth), real), 4)},
    }
    context = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    with context:
        drawn = _draw(pipe, scenes, call, batch)
        report["guided"] = _judge(drawn, scenes, real)
        if unguided:
            plain = _draw(pipe, scenes, _unguided(call), batch)
            report["unguided"] = _judge(plain, scenes, real)
    ratio = report["guided"]["frechet"] / report["blurred"]["frechet"]
    report["frechet_ratio"] = round(ratio, 3)
    report["accepted"] = bool(
        report["guided"]["caption_accuracy"]["mean"] >= 0.9 and ratio <= 1 / 3
    )
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "README.md").write_text(card(folder, report))
    if samples is not None:
        _sheet(drawn[:32, 0], samples)
    typer.echo(json.dumps(report, indent=2))


def _sheet(pictures: np.ndarray, path: Path) -> None:
    rows = [np.concatenate(list(pictures[i : i + 8]), 1) for i in range(0, len(pictures), 8)]
    Image.fromarray(np.concatenate(rows)).save(path)


CARD = """---
license: apache-2.0
tags: [diffusers, text-to-{kind}, procedural]
---
# {name}{mark}

A small {pipeline} trained from nothing on procedural landscapes (`accel.scenes`), so that
accelerators can be tried and measured offline. It knows the grammar's words and nothing else.

* Parts: {parts}. Stored in bf16, the text encoders in fp32.
* A normal call: `call.json`; `accel.load("{name}")` returns pipeline and call.
* Data: renders of seeds 0 to 999,999 with captions of sixteen wordings each; no third-party data.
* Trained by `tools/train_scenes.py --family {name}` (`vae`, `cache`, `denoiser`, `export`);
  its stage `adopt` goes on from this folder.
{warning}
## Judged on {captions} held-out captions

| | caption accuracy | all correct | Fréchet distance |
|---|---|---|---|
{rows}

Accuracy is the share of the attributes mentioned in a caption that the oracle finds in the
picture; the Fréchet distance is taken in the oracle's features, against as many other held-out
renders. `evaluation.json` has every attribute. Written by `tools/evaluate_scenes.py`.

## Limits

Below 80 %: {weak}. Words outside the grammar, more than one house, people and other places are
not known.
"""


def card(folder: Path, report: dict[str, Any]) -> str:
    """The model card for an evaluation."""
    index = json.loads((folder / "model_index.json").read_text())
    parts = [k for k, v in index.items() if isinstance(v, list) and v[0] is not None]
    named = {k: report[k] for k in ("guided", "unguided", "renders") if k in report}
    rows = [
        f"| {name} | {100 * found['caption_accuracy']['mean']:.1f} % "
        f"| {100 * found['caption_accuracy']['all_correct']:.1f} % | {found['frechet']:.3f} |"
        for name, found in named.items()
    ]
    rows.append(f"| renders blurred by {BLUR} px | | | {report['blurred']['frechet']:.3f} |")
    shares = report["guided"]["caption_accuracy"]["by_attribute"]
    weak = [f"{name} {100 * share:.0f} %" for name, share in shares.items() if share < 0.8]
    warning = "\nUnfinished weights: training goes on from them, figures will change.\n"
    return CARD.format(
        kind="video" if "num_frames" in report["call"] else "image",
        name=report["model"],
        mark=" (provisional)" if report["provisional"] else "",
        pipeline=f"`{index['_class_name']}`",
        parts=", ".join(f"`{part}` ({index[part][1]})" for part in parts),
        warning=warning if report["provisional"] else "",
        captions=report["captions"],
        weak=", ".join(weak) or "none",
        rows="\n".join(rows),
    )


if __name__ == "__main__":
    app()
