"""Int8 and bfloat16 beside the stock pipeline: seconds, bytes, fidelity in one interleaved run.

    python benchmarks/int8.py [--model scenes-flux] [--captions 128]

Every held-out caption is drawn by the stock pipeline, by the same one in bfloat16, and by the
network in int8 – weights alone, scales of activations as they come, scales that were measured
before – with the usual layers left out and with all of them (``all``). How it is measured:
`contest`; pictures are kept (`album`), and from 64 captions on sets are compared by their Fréchet
distance to real scenes. The static scales are measured first, on prompts that are not among the
captions; that is not timed. The numbers lie in ``results/int8-MODEL.jsonl`` as they come; beside it
come ``.json`` and ``.md``.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import contest
import peers
import torch
from album import KEPT, Album
from contest import OURS, STOCK, Benches, Contestant, Stage
from measure import Lines, digest, here, save, signature

import accel
from accel import weights
from accel.scenes import HELD_OUT, clip_scene, scene
from accel.seams.denoisers import find_denoisers
from accel.seams.quantizing import size
from accel.weights.calibration import calibrate_int8

USUAL, EVERY = ("recommended",), ()
"""What stays as it is, by curve."""


def calls(call: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """The calls that scales are measured on."""
    prompts = accel.asset("prompts/scenes.txt").read_text().splitlines()
    for seed, prompt in enumerate(prompts[:count]):
        generator = torch.Generator().manual_seed(seed)
        yield {"prompt": prompt, **call, "generator": generator, "output_type": "latent"}


def calibrated(benches: Benches, path: Path, count: int) -> tuple[weights.Int8Static, str]:
    """The method with its file, and what the calibration found."""
    pipe, _ = benches.get(OURS)
    found = calibrate_int8(pipe, calls(benches.call, count), {})
    content = found.files["scales"]
    path.write_bytes(content)
    assert isinstance(found.method, weights.Int8Static)
    beside = Path(os.path.relpath(path))  # lines are to name no path of the machine
    told = {"scales": beside, "sha256": hashlib.sha256(content).hexdigest()}
    return found.method.model_copy(update=told), found.note


def forms(static: weights.Int8Static) -> dict[tuple[str, float], accel.Plan]:
    """Every form, with the usual layers left out and with none."""
    found: dict[tuple[str, float], accel.Plan] = {}
    for name, skip in (("", USUAL), (", all", EVERY)):
        found["weight only" + name, 0] = accel.Plan(weights.Int8WeightOnly(skip=skip))
        found["dynamic" + name, 0] = accel.Plan(weights.Int8Dynamic(skip=skip))
        own = static.skip if skip == USUAL else skip
        found["static" + name, 0] = accel.Plan(static.model_copy(update={"skip": own}))
    return found


def sizes(benches: Benches, field: list[Contestant]) -> dict[str, int]:
    """Bytes that the networks take under each setting."""
    found = {}
    for who in field:
        pipe, _ = benches.get(who.package)
        with who.on(pipe, benches.call):
            found[who.label] = sum(size(one.core) for one in find_denoisers(pipe))
    return found


def markdown(rows: list[dict[str, Any]], title: str, remarks: list[str]) -> str:
    """A line for each setting, and what a reader must know."""
    lines = [f"{title}. Times faster than stock (below 1: slower), and how near to it.", ""]
    lines += ["| form | seconds (quartiles) | faster | MiB | SSIM | Fréchet, real | right |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        took, far = row["seconds"], row["frechet_real"]
        cells = [row["method"], f"{took['median']:.3f} ({took['low']:.3f}–{took['high']:.3f})"]
        cells += [f"{row['speedup']['median']:.2f}×", f"{row['bytes'] / 2**20:.1f}"]
        cells += [f"{row['ssim']:.4f}", far if isinstance(far, str) else f"{far:.3f}"]
        cells += [f"{row['caption_accuracy']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"* {one}" for one in remarks)]) + "\n"


def main() -> None:
    """Measure, and write ``int8-MODEL`` with its endings."""
    parser = contest.options_of(__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8, help="prompts to measure scales on")
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder of what is drawn")
    parser.set_defaults(captions=128)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    benches = Benches(options.model, options.steps)
    name, call = f"int8-{options.model}", benches.call
    options.out.mkdir(parents=True, exist_ok=True)
    scales = options.kept / f"{name}.safetensors"
    scales.parent.mkdir(parents=True, exist_ok=True)
    static, note = calibrated(benches, scales, options.prompts)
    ours, left = contest.serving(forms(static), benches.get(OURS)[0], options.settings)
    half = peers.bfloat16()
    simple = Contestant(half.package, half.method, half.knob, peer=half)
    field = [Contestant(STOCK, STOCK, 0), simple, *ours]
    field = [who for who in field if not options.only or who.method in (STOCK, *options.only)]

    path = options.out / f"{name}.jsonl"
    if options.fresh:
        path.unlink(missing_ok=True)
    about, drawn_by = digest(benches.get(STOCK)[0]), here()
    lines = Lines(path, {"model": options.model, "call": call, "weights": about, **drawn_by})
    told = clip_scene if "num_frames" in call else scene
    scenes = [told(seed) for seed in HELD_OUT[: options.captions]]
    album = Album(options.kept / options.model / f"{about}-{drawn_by['code']}", 0, call)
    until = time.monotonic() + options.budget
    stage = Stage(keep=partial(album.keep, scenes=scenes))
    contest.measure(benches, field, scenes, lines, until, warm=True, stage=stage)
    rows, seeds = contest.rows_of(field, lines)
    if not rows:
        raise SystemExit(f"No caption is drawn by all yet: start again to go on. {path}")

    taken = sizes(benches, field)
    for row, who in zip(rows, [one for one in field if contest.drawn_by(one, lines)], strict=True):
        row["bytes"] = taken[who.label]
        row.update(album.frechet(who.named(), field[0].named(), seeds))
    contest.show(rows)
    remarks = [f"calibration: {note}", *(f"{who} is left out: {why}" for who, why in left.items())]
    remarks += [*contest.idle(rows), signature()]
    title = f"{options.model}, {call['num_inference_steps']} steps, {len(seeds)} captions"
    (options.out / f"{name}.md").write_text(markdown(rows, title, remarks))
    result = {"call": call, "captions": seeds, "remarks": remarks, "rows": rows}
    print(save(name, result, options.out))


if __name__ == "__main__":
    main()
