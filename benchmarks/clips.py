"""What Video-Infinity costs on clips of a bundled model: likeness to stock, captions, bytes.

    python benchmarks/clips.py [--model scenes-wan] [--processes 2] [--frames 17 33 65]

One process makes the stock clip of each caption, then all make it together under each plan, of the
same seed: with different reaches, frames that all see, and weights. Nothing is timed. Likeness is
of frames (SSIM) and by the clip oracle (perceptual distance), which also judges captions and
motion; bytes are the most that one process sends for a clip. Frames are latent ones: those that a
process has, and those that its attention sees, at most. Clips longer than those that the model was
trained on are judged too: what stock makes of them is in the table.

Tables of other lengths that were measured before stay. Beside them come sheets of frames,
``-FRAMES.webp``: stock and some plans, one below the other.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from contest import of_clips
from measure import RESULTS, save, signature
from PIL import Image

import accel
from accel import Plan
from accel.scenes import HELD_OUT, clip_scene
from parallel import VideoInfinity
from parallel.launch import Place
from parallel.launch import spread as together
from parallel.scopes import Scope

STOCK = "one process"
PUBLISHED = 10.0

KNOBS = (
    *((0, 0, 0.0), (1, 0, 0.0), (2, 0, 0.0)),
    *((0, 1, 0.0), (0, 2, 0.0)),
    *((1, 1, 0.0), (1, 2, 0.0), (2, 2, 0.0), (2, 4, 0.0)),
    *((1, 2, 1.0), (1, 2, PUBLISHED)),
)
"""Reach, frames that all see, and bias."""

WHOLE = 99
"""A reach that covers every clip."""

SHOWN, QUALITY = 9, 88
"""Frames of a sheet, and its quality as WebP."""


@dataclass(frozen=True)
class Asked:
    """What is measured.

    Attributes:
        model: A bundled model of clips.
        frames: Of the clips.
        captions: Held-out captions, a clip each.
    """

    model: str
    frames: int
    captions: int


def plans() -> dict[str, VideoInfinity]:
    """By name."""
    found = {
        f"reach {reach}, {anchors} over the clip" + (f", bias {bias:g}" if bias else ""): (
            VideoInfinity(reach=reach, anchors=anchors, bias=bias)
        )
        for reach, anchors, bias in KNOBS
    }
    found["reach 2, 2 over the clip, stale"] = VideoInfinity(
        reach=2, anchors=2, bias=0.0, mode="stale"
    )
    found["the whole clip"] = VideoInfinity(reach=WHOLE, anchors=0, bias=0.0)
    return found


def sent(detail: str) -> tuple[int, int]:
    """The bytes that a verdict tells of, and the latent frames of the clip."""
    told = re.search(r"of (\d+) frames each.* sent ([\d,]+) bytes", detail)
    if told is None:
        raise ValueError(f"a verdict that tells of no frames: {detail}")
    return int(told[2].replace(",", "")), int(told[1])


def measured(place: Place, asked: Asked, chosen: Mapping[str, VideoInfinity]) -> dict[str, Any]:
    """Clips and bytes of every plan; all processes make the same calls."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    pipe, call = accel.load(asked.model)
    pipe.set_progress_bar_config(disable=True)
    call["num_frames"] = asked.frames

    def clip(seed: int) -> Any:
        noise = torch.Generator().manual_seed(seed)
        caption = clip_scene(seed).caption
        return pipe(caption, generator=noise, output_type="np", **call).frames[0]

    clips: dict[str, list[Any]] = {name: [] for name in (STOCK, *chosen)}
    told: dict[str, tuple[int, int]] = {}
    for seed in HELD_OUT[: asked.captions]:
        if place.rank == 0:
            clips[STOCK].append(clip(seed))
        distributed.barrier()
        for name, method in chosen.items():
            with Plan(method).attach(pipe) as run:
                clips[name].append(clip(seed))
            [verdict] = run.report.verdicts.values()
            told[name] = sent(verdict.detail)
    every: list[Any] = [None] * place.size
    distributed.all_gather_object(every, told)
    if place.rank:
        return {}
    most = {name: max(one[name][0] for one in every) for name in chosen}
    return {"clips": clips, "bytes": most, "latents": max(one[1] for one in told.values())}


def rows(
    found: Mapping[str, Any], asked: Asked, processes: int, chosen: Mapping[str, VideoInfinity]
) -> list[dict[str, Any]]:
    """A line for each plan."""
    lines = []
    for name, clips in found["clips"].items():
        each = [
            of_clips(stock, clip, clip_scene(seed))
            for seed, stock, clip in zip(
                HELD_OUT[: asked.captions], found["clips"][STOCK], clips, strict=True
            )
        ]
        figures = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
        latents = found["latents"]
        method = chosen.get(name)
        ranks = range(processes)
        scope = Scope(latents, processes, method.reach, method.anchors) if method else None
        lines.append(
            {
                "plan": name,
                "own": max(scope.lengths) if scope else latents,
                "seen": max(len(scope.seen(rank)) for rank in ranks) if scope else latents,
                "bytes": found["bytes"].get(name, 0),
                **figures,
            }
        )
    return lines


def markdown(table: Mapping[str, Any]) -> str:
    """A table to read."""
    asked = table["asked"]
    title = (
        f"{asked['model']}, {asked['frames']} frames ({table['latents']} latent), "
        f"{asked['captions']} captions, {table['processes']} processes."
    )
    head = "| plan | frames | seen | MB sent | SSIM | perceptual | flicker | captions | motion |"
    body = [
        f"| {one['plan']} | {one['own']} | {one['seen']} | {one['bytes'] / 1e6:.2f} | "
        f"{one['ssim']:.4f} | {one['perceptual']:.4f} | {one['flicker']:.4f} | "
        f"{one['attributes_right']:.1%} | {one['motion_right']:.1%} |"
        for one in table["rows"]
    ]
    return "\n".join([title, "", head, "|---" * 9 + "|", *body]) + "\n"


def write(name: str, table: dict[str, Any]) -> None:
    """Put a table among those that were measured before, in the place of one of its kind."""

    def kind(one: Mapping[str, Any]) -> tuple[int, int]:
        return one["processes"], one["asked"]["frames"]

    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text())["tables"] if path.exists() else []
    tables = sorted([one for one in known if kind(one) != kind(table)] + [table], key=kind)
    save(name, {"tables": tables})
    text = "\n".join([*map(markdown, tables), signature()])
    (RESULTS / f"{name}.md").write_text(text + "\n")


def sheet(clips: Mapping[str, Sequence[Any]], names: Sequence[str]) -> Image.Image:
    """Some frames of the first clip under some plans, one below the other."""
    lines = []
    for name in names:
        clip = clips[name][0]
        chosen = np.linspace(0, len(clip) - 1, SHOWN).round().astype(int)
        lines.append(np.concatenate([clip[one] for one in chosen], axis=1))
    whole = np.concatenate(lines, axis=0)
    return Image.fromarray((whole * 255).round().astype(np.uint8))


SHEET = (
    STOCK,
    "reach 0, 0 over the clip",
    "reach 2, 0 over the clip",
    "reach 2, 2 over the clip",
    "reach 1, 2 over the clip, bias 10",
)


def main() -> None:
    """Measure and write ``results/clips-MODEL.json``, ``.md`` and sheets of frames."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-wan")
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--frames", type=int, nargs="+", default=[17, 33, 65])
    parser.add_argument("--captions", type=int, default=4)
    options = parser.parse_args()
    for processes in options.processes:
        for frames in options.frames:
            asked, chosen = Asked(options.model, frames, options.captions), plans()
            found = together(processes, measured, asked, chosen)
            lines = rows(found, asked, processes, chosen)
            about = {"asked": asdict(asked), "processes": processes, "latents": found["latents"]}
            write(f"clips-{options.model}", {**about, "rows": lines})
            print(markdown({**about, "rows": lines}), flush=True)
            path = RESULTS / f"clips-{options.model}-{frames}.webp"
            sheet(found["clips"], SHEET).save(path, quality=QUALITY)


if __name__ == "__main__":
    main()
