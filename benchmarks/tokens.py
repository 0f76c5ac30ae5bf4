"""Every reduction of tokens swept over its knob, beside tomesd, in one interleaved run.

    python benchmarks/tokens.py [--model scenes-unet] [--size 256] [--captions 16]

Needs the extra `bench`, which brings tomesd (UNets alone). How it is measured: `contest`; the
attention of one layer by itself, as tokens grow, measures `token_layers`. ``--size`` draws larger
pictures than the model's own: attention costs the square of their area, and what a reduction saves
grows with it. The numbers lie in ``results/tokens-SIZE-MODEL.jsonl`` as they come; beside it come
``.json`` (the sums), ``.png`` and ``.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import contest
import torch
from contest import OURS, Benches, Contestant
from measure import save
from peers import LEVELS, Peer, tomesd_at

import accel

FINE = {"max_downsample": LEVELS}

SWEEPS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "ToMe": ("ratio", FINE, (0.25, 0.5, 0.75)),
    "ToMe, kept": ("ratio", FINE | {"steps": 4, "layers": 0}, (0.25, 0.5, 0.75)),
    "ToMe, counted": ("ratio", FINE | {"proportional": True}, (0.5,)),
    "Importance": ("ratio", FINE, (0.25, 0.5, 0.75)),
    "ToMA": ("ratio", FINE, (0.25, 0.5, 0.75)),
    "Transforming": ("ratio", FINE, (0.25, 0.5)),
    "ToDo": ("factor", {}, (2, 3)),
    "SADA": ("refresh", FINE | {"most": 64}, (2, 4)),
}
"""By curve: the field that is swept, the other fields, and the values."""

RATIOS = (0.25, 0.5, 0.75)

JUDGED = (64, 128)
"""Pixels a side, at least and at most, that the oracle was trained on."""


def plans(pipe: Any) -> dict[tuple[str, float], accel.Plan]:
    """Every setting of every reduction of ours by its curve and knob."""
    known, found = accel.methods(), {}
    for curve, (knob, fields, values) in SWEEPS.items():
        kind = known[f"tokens.{curve.split(',')[0]}"]
        deep = knob == "factor" and hasattr(pipe, "unet")  # the first level that has attention
        swept = "next_factor" if deep else knob
        found |= {(curve, value): accel.Plan(kind(**fields, **{swept: value})) for value in values}
    return found


def ours(pipe: Any, settings: int | None) -> list[Contestant]:
    """Every setting of every reduction of ours that serves the pipeline."""
    field, left = contest.serving(plans(pipe), pipe, settings)
    for curve, why in left.items():
        print(f"left out {curve}: {why}")
    return field


def why_not_theirs(pipe: Any) -> str | None:
    """Why tomesd is left out."""
    if not hasattr(pipe, "unet"):
        return "tomesd is LEFT OUT: it serves UNets alone; take --model scenes-unet"
    if find_spec("tomesd") is None:
        return "tomesd is LEFT OUT: it is not installed; the extra 'bench' brings it"
    return None


def theirs(pipe: Any, settings: int | None) -> Iterator[Contestant]:
    """Every ratio of tomesd, where it is installed and serves the pipeline."""
    if why_not_theirs(pipe):
        return
    for ratio in RATIOS[:settings]:
        peer = Peer("tomesd", "ToMe", ratio, tomesd_at(ratio))
        yield Contestant(peer.package, peer.method, ratio, peer=peer)


def notes(pipe: Any, call: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """What a reader must know: a peer that is missing, and sizes that mean less."""
    side, least, most = call["height"], *JUDGED
    found = [why for why in [why_not_theirs(pipe)] if why]
    if call != own:
        found.append(
            f"The model was trained on pictures of {own['height']} px: at {side} px SSIM and "
            "distance compare with what stock draws there, whatever that shows."
        )
    if not least <= side <= most:
        found.append(
            f"The oracle that says what is right was trained on pictures of {least} to {most} px: "
            f"at {side} px that column and the perceptual distance are marks, not figures."
        )
    return found


def markdown(rows: list[dict[str, Any]], title: str, remarks: list[str]) -> str:
    """Every setting as a line of a table, the fastest first, and what a reader must know."""
    lines = [f"{title}. Times faster than stock, and how near to it.", ""]
    lines += ["| reduction | setting | faster | SSIM | perceptual distance | right |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in sorted(contest.active(rows), key=lambda row: -row["speedup"]["median"]):
        who = row["method"] if row["package"] == OURS else f"{row['package']}: {row['method']}"
        cells = [who, f"{row['knob']:g}", f"{row['speedup']['median']:.2f}×", f"{row['ssim']:.4f}"]
        cells += [f"{row['perceptual']:.4f}", f"{row['caption_accuracy']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"* {one}" for one in [*remarks, *contest.idle(rows)])]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Measure, and write ``tokens-SIZE-MODEL`` with its endings."""
    parser = contest.options_of(__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, help="pixels a side; the model's own without it")
    parser.set_defaults(model="scenes-unet")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    benches = Benches(options.model, options.steps)
    own = dict(benches.call)
    if options.size is not None:
        benches.call |= {"height": options.size, "width": options.size}
    pipe, _ = benches.get(OURS)
    remarks = notes(pipe, benches.call, own)
    print("\n".join(remarks))
    field = [*ours(pipe, options.settings), *theirs(pipe, options.settings)]
    size = benches.call["height"]
    found = contest.run(f"tokens-{size}", options, benches, field)
    contest.show(found.rows)
    name = f"tokens-{size}-{options.model}"
    steps = benches.call["num_inference_steps"]
    title = f"{options.model}, {size}², {steps} steps, {len(found.seeds)} captions"
    remarks += [f"{who} is left out: {why}" for who, why in found.undrawn.items()]
    contest.plot(found.rows, options.out / f"{name}.png", title)
    (options.out / f"{name}.md").write_text(markdown(found.rows, title, remarks))
    result = {"call": benches.call, "captions": found.seeds, "stock": found.stock}
    result |= {"remarks": remarks, "left_out": found.undrawn}
    print(save(name, {**result, "rows": found.rows}, options.out))


if __name__ == "__main__":
    main()
