"""What several processes gain on one picture, and what it costs: seconds, bytes, fidelity.

    python benchmarks/devices.py [--model scenes-flux] [--processes 2] [--captions 4] [--size 128]
        [--steps 28]
    python benchmarks/devices.py --untimed [--model scenes-unet] [--processes 3] [--captions 8]
    python benchmarks/devices.py --patches [--model scenes-unet] [--size 256]

Every process has one thread, and so has the one that works alone: in each round the first process
makes the picture of the stock pipeline while the others wait, and then all make it together under
each plan in turn, there and back. What is compared with stock is the picture of the same seed.
Bytes are what one process sends for a picture, at most. With ``--predict`` the ratio that the model
of costs (`parallel.simulate`) predicts, from a step and a link measured on the spot, stands beside
the measured one.

With ``--patches`` all of them, and the process that works alone, make a picture larger than the
model's in patches (`resolution.Pixelsmith`), which `parallel.Windows` deals out.

With ``--untimed`` nothing is timed: each plan makes each picture once, with a warm-up of 0, 2, 4
and all steps where it has one. The table says what each costs in bytes and in likeness to stock.

The file is not called `parallel.py`: beside the other benchmarks it would hide that package.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from measure import RESULTS, Visit, clocked, ratio, repeated, rounds, save, signature, spread

import accel
from accel import Accelerator, Plan, quality
from accel.resolution import Pixelsmith
from accel.scenes import HELD_OUT, motion, oracle, scene
from parallel import CFG, PCPP, AsyncDiff, DistriFusion, PipeFusion, Ring, Ulysses, Windows
from parallel.launch import Place
from parallel.launch import spread as together

STOCK = "one process"
ASKED = 1.6
"""How many times as fast two processes are to be."""

FEWER = 0.6
"""Share of DistriFusion's bytes that PCPP is to save, at least."""

PLANS: dict[str, Accelerator] = {
    "CFG": CFG(),
    "DistriFusion, sync": DistriFusion(mode="sync"),
    "DistriFusion": DistriFusion(),
    "PCPP": PCPP(),
    "AsyncDiff": AsyncDiff(),
    "PipeFusion": PipeFusion(),
    "Ulysses": Ulysses(),
    "Ring": Ring(),
}
"""By name; what has a field ``warmup`` is drawn with several."""

PATCHES: dict[str, Accelerator] = {"CFG": CFG(), "Windows": Windows()}
"""What shares out a picture in patches."""

WARMUPS = (0, 2, 4)
"""And all steps."""


@dataclass(frozen=True)
class Asked:
    """What is measured.

    Attributes:
        model: A bundled model of pictures.
        size: Pixels a side; 0: that of a usual call.
        captions: Held-out captions, a picture each.
        repeats: Rounds that count, of each caption; 0: nothing is timed.
        predict: Whether it is predicted as well.
        steps: Of a picture; 0: those of a usual call.
        plain: What one process makes it with, and all together too.
    """

    model: str
    size: int
    captions: int
    repeats: int
    predict: bool = False
    steps: int = 0
    plain: Plan = field(default_factory=Plan)


def plans(
    methods: Mapping[str, Accelerator], asked: Asked, processes: int, *, warmups: bool = False
) -> dict[str, Plan]:
    """Those that serve a model, with so many processes.

    Args:
        methods: By name.
        asked: Of which model, and beside which methods.
        processes: How many.
        warmups: Whether with each warm-up, or the one by default.
    """
    pipe, call = accel.load(asked.model)
    found = {}
    for name, method in methods.items():
        if isinstance(method, CFG) and processes != method.degree:
            continue
        try:
            Plan(*asked.plain, method).attach(pipe).detach()
        except accel.errors.UnsupportedModel:
            continue
        forms = warmed(name, method, call["num_inference_steps"]) if warmups else {name: method}
        found |= {form: Plan(*asked.plain, each) for form, each in forms.items()}
    return found


def warmed(name: str, method: Accelerator, steps: int) -> dict[str, Accelerator]:
    """A method with each warm-up; by itself if it has none, or is fresh at every step."""
    if "warmup" not in type(method).model_fields or getattr(method, "mode", "") == "sync":
        return {name: method}
    return {
        f"{name}, warm-up {warmup}": method.model_copy(update={"warmup": warmup})
        for warmup in (*WARMUPS, steps)
    }


class Maker:
    """Makes pictures in one process: alone, while the others wait, or together.

    Attributes:
        latest: The latest picture by plan.
        sent: The most bytes that this process has sent for a picture, by plan.
    """

    def __init__(self, place: Place, asked: Asked, chosen: dict[str, Plan]) -> None:
        import torch

        torch.set_num_threads(1)
        self._place, self._chosen, self._plain = place, chosen, asked.plain
        self._pipe, self._call = accel.load(asked.model)
        self._pipe.set_progress_bar_config(disable=True)
        if asked.size:
            self._call |= {"height": asked.size, "width": asked.size}
        if asked.steps:
            self._call["num_inference_steps"] = asked.steps
        self.latest: dict[str, Any] = {}
        self.sent = dict.fromkeys(chosen, 0)

    def picture(self, seed: int) -> Any:
        """That of a held-out caption, ``[H, W, 3]``; of a model of clips ``[F, H, W, 3]``."""
        import torch

        noise = torch.Generator().manual_seed(seed)
        made = self._pipe(scene(seed).caption, generator=noise, output_type="np", **self._call)
        return made[0][0]

    def predicted(self) -> dict[str, float]:
        """How many times as fast each way is, by the model of costs; all processes take part."""
        from parallel.probe import measured as probed
        from parallel.simulate import predict

        call = {"prompt": scene(HELD_OUT[0]).caption, **self._call}
        work, decoding, cluster = probed(self._place, self._pipe, call)
        steps = self._call["num_inference_steps"]
        return {one.method: one.faster for one in predict(work, cluster, steps, decoding)}

    def alone(self, seed: int) -> float:
        """Seconds of the first process; the others wait."""
        from torch import distributed

        distributed.barrier()
        took = 0.0
        if self._place.rank == 0:
            with self._plain.attach(self._pipe):
                took = clocked(lambda: self._keep(STOCK, seed))
        distributed.barrier()
        return took

    def together(self, name: str, seed: int) -> float:
        """Seconds of a plan in all processes."""
        from torch import distributed

        with self._chosen[name].attach(self._pipe) as run:
            distributed.barrier()
            took = clocked(lambda: self._keep(name, seed))
        each = [sent(verdict.detail) for verdict in run.report.verdicts.values()]
        self.sent[name] = max(self.sent[name], *each)
        return took

    def _keep(self, name: str, seed: int) -> None:
        self.latest[name] = self.picture(seed)


def sent(detail: str) -> int:
    """The bytes that a verdict tells of."""
    told = re.search(r"sent ([\d,]+) bytes", detail)
    return int(told[1].replace(",", "")) if told else 0


def measured(place: Place, asked: Asked, chosen: dict[str, Plan]) -> dict[str, Any]:
    """Seconds, bytes and pictures of every plan; all processes make the same calls."""
    from torch import distributed

    maker = Maker(place, asked, chosen)
    seconds: dict[str, list[float]] = {name: [] for name in (STOCK, *chosen)}
    pictures: dict[str, list[Any]] = {name: [] for name in (STOCK, *chosen)}
    for seed in HELD_OUT[: asked.captions]:
        visits: dict[str, Visit] = {STOCK: partial(maker.alone, seed)}
        visits |= {name: partial(maker.together, name, seed) for name in chosen}
        found = repeated(visits, 0.0, asked.repeats) if asked.repeats else rounds(visits, 1)
        for name, each in found.items():
            seconds[name] += each
            pictures[name].append(maker.latest.get(name))
    ways = maker.predicted() if asked.predict else {}
    told: list[Any] = [None] * place.size
    distributed.all_gather_object(told, maker.sent)
    most = {name: max(one[name] for one in told) for name in chosen}
    if place.rank:
        return {}
    shown = {name: np.stack(each) for name, each in pictures.items()}
    return {"seconds": seconds, "pictures": shown, "bytes": most, "ways": ways}


def way_of(plan: str) -> str:
    """What the model of costs calls a plan."""
    name, _, form = plan.partition(", ")
    return f"parallel.{name} ({form})" if form == "sync" else f"parallel.{name}"


def rows(found: Mapping[str, Any], asked: Asked) -> list[dict[str, Any]]:
    """A line for each plan."""
    scenes = [scene(seed) for seed in HELD_OUT[: asked.captions]]
    stock = found["pictures"][STOCK]
    judge: Any = motion if stock.ndim == 5 else oracle
    lines = []
    for name, shown in found["pictures"].items():
        line: dict[str, Any] = {"plan": name}
        if asked.repeats:
            seconds = found["seconds"]
            line["seconds"] = spread(seconds[name])
            line["faster"] = ratio(seconds[STOCK], seconds[name])
        if way_of(name) in found.get("ways", ()):
            line["predicted"] = found["ways"][way_of(name)]
        lines.append(
            line
            | {
                "bytes": found["bytes"].get(name, 0),
                "ssim": quality.ssim(shown, stock),
                "psnr": quality.psnr(shown, stock),
                "perceptual": quality.perceptual(shown, stock),
                "accuracy": judge.caption_accuracy(list(shown), scenes).mean,
            }
        )
    return lines


def saved(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Which share of DistriFusion's bytes PCPP does not send, by warm-up."""
    by_plan = {one["plan"]: one["bytes"] for one in lines}
    return {
        name.removeprefix("PCPP").removeprefix(", "): 1 - sent / whole
        for name, sent in by_plan.items()
        if name.startswith("PCPP") and (whole := by_plan[name.replace("PCPP", "DistriFusion", 1)])
    }


def told_of(saving: Mapping[str, float]) -> str:
    """That in words."""
    if not saving:
        return ""
    most = max(saving.values())
    each = ", ".join(f"{share:.0%} ({form or 'as by default'})" for form, share in saving.items())
    verdict = "reached" if most >= FEWER else "not reached"
    return f"PCPP sends fewer bytes than DistriFusion by {each}; {FEWER:.0%} asked: {verdict}.\n\n"


def markdown(lines: Sequence[Mapping[str, Any]], title: str, wanted: str = "") -> str:
    """The table; with seconds where they were measured."""
    timed, predicted = "seconds" in lines[0], any("predicted" in one for one in lines)
    heads = [*(("faster", "quartiles") if timed else ()), *(("predicted",) if predicted else ())]
    heads += ["MB sent", "SSIM", "PSNR"]
    heads = ["plan", *heads, "perceptual distance", "right"]
    body = []
    for one in lines:
        cells = [one["plan"]]
        if timed:
            speed = one["faster"]
            cells += [f"{speed['median']:.2f}×", f"{speed['low']:.2f}–{speed['high']:.2f}"]
        if predicted:
            cells.append(f"{one['predicted']:.2f}×" if "predicted" in one else "–")
        cells += [f"{one['bytes'] / 1e6:.2f}", f"{one['ssim']:.4f}", f"{one['psnr']:.1f}"]
        body.append([*cells, f"{one['perceptual']:.4f}", f"{one['accuracy']:.1%}"])
    table = [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *body)]
    return f"{title}\n\n" + "\n".join(table) + f"\n\n{wanted}{signature()}\n"


def asked_of(options: argparse.Namespace) -> Asked:
    """What a command line asks for."""
    usual = accel.load(options.model)[1]["height"]
    return Asked(
        options.model,
        options.size,
        options.captions,
        0 if options.untimed else options.repeats,
        options.predict,
        options.steps,
        Plan(Pixelsmith(base=usual)) if options.patches else Plan(),
    )


def main() -> None:
    """Measure and write ``results/devices-N-MODEL-SIZE.json`` and ``.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-flux")
    parser.add_argument("--size", type=int, default=0, help="pixels a side; 0: as usual")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--captions", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plans", nargs="*", choices=PLANS, help="some of them alone")
    parser.add_argument("--patches", action="store_true", help="pictures in patches")
    parser.add_argument("--untimed", action="store_true", help="bytes and likeness alone")
    parser.add_argument("--predict", action="store_true", help="by the model of costs as well")
    parser.add_argument("--steps", type=int, default=0, help="0: as usual")
    options = parser.parse_args()
    asked = asked_of(options)
    methods = PATCHES if options.patches else PLANS
    chosen = plans(methods, asked, options.processes, warmups=options.untimed)
    chosen = {name: plan for name, plan in chosen.items() if name in (options.plans or chosen)}
    found = together(options.processes, measured, asked, chosen)
    lines = rows(found, asked)
    size = asked.size or found["pictures"][STOCK].shape[-2]
    form = "bytes" if options.untimed else "patches" if options.patches else "devices"
    name = f"{form}-{options.processes}-{asked.model}-{size}"
    steps = f", {asked.steps} steps" if asked.steps else ""
    patches = " in patches by Pixelsmith" * options.patches
    title = f"{asked.model}, {size}²{patches}{steps}, {asked.captions} captions, "
    title += f"{options.processes} processes"
    if options.untimed:
        title += ": what they send, and how like stock the picture is."
    else:
        title += " of one thread each against one of them, times as fast."
    asked_for = asdict(asked) | {"plain": asked.plain.to_dict()}
    result = {"asked": asked_for, "processes": options.processes, "rows": lines}
    result |= {"wanted": ASKED, "fewer_wanted": FEWER, "fewer": saved(lines)}
    print(save(name, result))
    text = markdown(lines, title, told_of(saved(lines)))
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
