"""Judge a bundled model: `evaluate_scenes.py FOLDER` writes `evaluation.json` and its card.

Held-out captions, drawn at the folder's normal call with and without guidance, are judged by
the oracle (caption accuracy, of clips with their motion) and by the Fréchet distance to renders
that no caption shares. The yardsticks are the same distance for other renders (its floor) and for
blurred ones. Given the oracle's folder, it judges the oracle on renders. `--cost` measures the time
and memory of one normal call instead, and nothing else: run it alone, in a process of its own, on
an idle machine.
"""

import contextlib
import json
import platform
import resource
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DiffusionPipeline
from PIL import Image, ImageFilter

from accel.quality import frechet, kernel
from accel.scenes import (
    ATTRIBUTES,
    HELD_OUT,
    MOTIONS,
    Scene,
    clip,
    clip_scene,
    motion,
    oracle,
    picture,
    scene,
)
from accel.scenes.oracle import Accuracy

app = typer.Typer(add_completion=False)

REAL = 100_000
"""Renders to compare with start this far into the held-out seeds."""
BLUR = 2.0
"""Radius of the Gaussian blur in pixels, the yardstick of lost detail."""
CALLS = 3
"""Timed calls, after one to warm up; the median counts."""


def _draw(pipe: Any, scenes: list[Scene], call: dict[str, Any], batch: int) -> np.ndarray:
    """Pictures `[N, H, W, 3]` or clips `[N, F, H, W, 3]`, uint8."""
    parts = []
    for low in range(0, len(scenes), batch):
        captions = [s.caption for s in scenes[low : low + batch]]
        options = call | {"output_type": "np"}
        options["negative_prompt"] = [call.get("negative_prompt", "")] * len(captions)
        seeds = [torch.Generator().manual_seed(s.seed) for s in scenes[low : low + batch]]
        made = pipe(captions, generator=seeds, **options)
        shown = np.asarray(made.frames if hasattr(made, "frames") else made.images)
        parts.append((shown.clip(0, 1) * 255 + 0.5).astype(np.uint8))
        typer.echo(f"{time.strftime('%H:%M:%S')} drawn {low + len(captions)}")
    return np.concatenate(parts)


def _unguided(call: dict[str, Any]) -> dict[str, Any]:
    scale = "true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale"
    return call | {scale: 1.0}


def _real(seeds: range, call: dict[str, Any]) -> np.ndarray:
    size = call["height"]
    if "num_frames" in call:
        return np.stack([clip(clip_scene(s), size, call["num_frames"]) for s in seeds])
    return np.stack([picture(scene(s), size) for s in seeds])


def _blurred(drawn: np.ndarray) -> np.ndarray:
    flat = drawn.reshape(-1, *drawn.shape[-3:])
    soft = [Image.fromarray(p).filter(ImageFilter.GaussianBlur(BLUR)) for p in flat]
    return np.stack([np.asarray(picture) for picture in soft]).reshape(drawn.shape)


def _accuracy(drawn: np.ndarray, scenes: list[Scene]) -> dict[str, Any]:
    judge = motion.caption_accuracy if drawn.ndim == 5 else oracle.caption_accuracy
    found: Accuracy = judge(drawn, scenes)
    return {
        "mean": round(found.mean, 4),
        "all_correct": round(found.all_correct, 4),
        "by_attribute": {name: round(v, 4) for name, v in found.by_attribute.items()},
    }


def _judge(drawn: np.ndarray, scenes: list[Scene], real: np.ndarray) -> dict[str, Any]:
    return {
        "caption_accuracy": _accuracy(drawn, scenes),
        "frechet": round(frechet(drawn, real), 4),
        "kernel": round(kernel(drawn, real), 6),
    }


def _yardsticks(scenes: list[Scene], call: dict[str, Any], real: np.ndarray) -> dict[str, Any]:
    """What renders of the very captions score, sharp and blurred."""
    truth = _real(range(scenes[0].seed, scenes[-1].seed + 1), call)
    return {
        "renders": {
            "caption_accuracy": _accuracy(truth, scenes),
            "frechet": round(frechet(truth, real), 4),
        },
        "blurred": {"radius_px": BLUR, "frechet": round(frechet(_blurred(truth), real), 4)},
    }


def _verdict(report: dict[str, Any]) -> dict[str, Any]:
    ratio = report["guided"]["frechet"] / report["blurred"]["frechet"]
    faithful = report["guided"]["caption_accuracy"]["mean"] >= 0.9
    return {"frechet_ratio": round(ratio, 3), "accepted": bool(faithful and ratio <= 1 / 3)}


def _cost(pipe: Any, call: dict[str, Any], threads: int) -> dict[str, Any]:
    """Seconds of one normal call, and the most memory that this process has held."""
    tell, seconds = clip_scene if "num_frames" in call else scene, []
    for turn in range(CALLS + 1):
        start = time.perf_counter()
        pipe(tell(HELD_OUT[turn]).caption, generator=torch.Generator().manual_seed(0), **call)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {
        "seconds": round(median(seconds[1:]), 2),
        "peak_mib": round(peak),
        "threads": threads,
        "dtype": "float32",
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }


def _oracle_report(count: int) -> dict[str, Any]:
    """How the oracle reads held-out renders, every attribute asked, and what its distances see."""
    clips = {"height": 64, "num_frames": 17}
    calls = {"pictures of 64 px": {"height": 64}, "pictures of 128 px": {"height": 128}}
    report: dict[str, Any] = {"renders": count, "seeds": [HELD_OUT[0], HELD_OUT[0] + count]}
    for name, call in (calls | {"clips": clips}).items():
        asked = (*ATTRIBUTES, *MOTIONS) if name == "clips" else tuple(ATTRIBUTES)
        scenes = [replace(scene(seed), mentions=asked) for seed in HELD_OUT[:count]]
        truth = _real(HELD_OUT[:count], call)
        other = _real(HELD_OUT[REAL : REAL + count], call)
        sets = {"other renders": truth, f"blurred by {BLUR} px": _blurred(truth)}
        if name == "clips":
            sets["frozen in the middle"] = np.repeat(truth[:, 8:9], 17, axis=1)
        distances = {kind: round(frechet(drawn, other), 2) for kind, drawn in sets.items()}
        report[name] = {"accuracy": _accuracy(truth, scenes), "frechet": distances}
    return report


def _write(folder: Path, report: dict[str, Any]) -> None:
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "README.md").write_text(card(folder, report))


def _known(folder: Path) -> dict[str, Any]:
    path = folder / "evaluation.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return known


@app.command()
def main(
    folder: Path,
    count: Annotated[int, typer.Option(help="held-out captions")] = 256,
    batch: int = 16,
    threads: int = 1,
    bf16: Annotated[bool, typer.Option(help="draw under bf16 autocast")] = False,
    provisional: Annotated[bool, typer.Option(help="mark the card as provisional")] = False,
    samples: Annotated[Path | None, typer.Option(help="picture of the first drawings")] = None,
    cost: Annotated[bool, typer.Option("--cost", help="only time one call, on THREADS")] = False,
) -> None:
    """Judge the model, or the oracle, in FOLDER."""
    torch.set_num_threads(threads)
    if not (folder / "call.json").exists():
        report = _oracle_report(count)
        (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
        typer.echo(json.dumps(report, indent=2))
        return
    call = json.loads((folder / "call.json").read_text())
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    known = _known(folder)
    if cost:
        if "guided" not in known:
            raise typer.BadParameter(f"{folder} has no evaluation yet: run without --cost first")
        _write(folder, known | {"cost": _cost(pipe, call, threads)})
        typer.echo(json.dumps(_known(folder)["cost"], indent=2))
        return
    scenes = [(clip_scene if "num_frames" in call else scene)(s) for s in HELD_OUT[:count]]
    real = _real(HELD_OUT[REAL : REAL + count], call)
    report = {
        "model": folder.name,
        "provisional": provisional,
        "captions": count,
        "seeds": [HELD_OUT[0], HELD_OUT[0] + count],
        "call": call,
        "bf16": bf16,
        **_yardsticks(scenes, call, real),
    }
    context = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    with context:
        drawn = _draw(pipe, scenes, call, batch)
        plain = _draw(pipe, scenes, _unguided(call), batch)
    report["guided"] = _judge(drawn, scenes, real)
    report["unguided"] = _judge(plain, scenes, real)
    report |= _verdict(report)
    _write(folder, report | ({"cost": known["cost"]} if "cost" in known else {}))
    if samples is not None:
        _sheet(drawn, samples)
    typer.echo(json.dumps(report, indent=2))


def _sheet(drawn: np.ndarray, path: Path) -> None:
    """Thirty-two pictures, eight a row; or sixteen clips, two a row, every fourth frame."""
    if drawn.ndim == 5:
        shown = drawn[:16, ::4]
        tiles = shown.reshape(-1, *shown.shape[2:])
        columns = 2 * shown.shape[1]
    else:
        tiles, columns = drawn[:32], 8
    whole = tiles[: len(tiles) // columns * columns]
    rows = [np.concatenate(list(whole[i : i + columns]), 1) for i in range(0, len(whole), columns)]
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
{cost}{warning}
## Judged on {captions} held-out captions

| | caption accuracy | all correct | Fréchet distance |
|---|---|---|---|
{rows}

Accuracy is the share of the attributes mentioned in a caption that the oracle finds in the
{judged}; the Fréchet distance is taken in the oracle's features, against as many other held-out
renders. `evaluation.json` has every attribute. Written by `tools/evaluate_scenes.py`.

## Limits

Below 80 %: {weak}. Words outside the grammar, more than one house, people and other places are
not known.
"""


def _cost_line(report: dict[str, Any]) -> str:
    if "cost" not in report:
        return ""
    spent = report["cost"]
    return (
        f"* One normal call takes {spent['seconds']:.1f} s and {spent['peak_mib']} MiB at most, "
        f"on a CPU ({spent['threads']} threads, {spent['dtype']}, {spent['machine']}).\n"
    )


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
        cost=_cost_line(report),
        kind="video" if "num_frames" in report["call"] else "image",
        name=report["model"],
        judged="clip, its motion included" if "num_frames" in report["call"] else "picture",
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
