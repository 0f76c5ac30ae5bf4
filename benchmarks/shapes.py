"""Full-size SDXL, FLUX.1-dev and Wan 2.1 on a GPU: seconds and memory under fixed schedules.

    python benchmarks/shapes.py [--shape flux] [--budget SECONDS] [--repeats 2]
    python benchmarks/shapes.py --tiny

Weights are random (`giants`), so that a rule which looks at what the network answers would decide
by noise: what is drawn here decides beforehand – caches with an interval, guidance within fixed
levels, shares of tokens, patterns of attention, fewer steps – and what it draws is not looked at.
Every setting is drawn without compiling and with the repeated blocks compiled; under caches of
modules, these. It warms up in a few steps, which is where compiling happens, and is timed then; the
stock pipeline is timed again after every few settings. Peers are those whose schedule is fixed too.

Each setting's numbers are written at once to ``results/shapes-SHAPE.jsonl``; a run that was cut
off, by ``--budget`` for each shape or otherwise, goes on there. Beside it come ``.json`` and
``.md``. Without CUDA it refuses; ``--tiny`` tries the code in small on the CPU, and writes
``shapes-tiny-SHAPE``.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import clip_forms
import peers
import torch
from contest import reason_of
from counting import Counter
from giants import GIANTS, Giant
from measure import RESULTS, Lines, here, save, signature, waiting
from peers import Peer
from table_field import grid

import samplers
from accel import Plan, cache, guidance, memory, tokens
from accel.attach import Accelerator
from accel.errors import AccelError
from app.compiling import Regions, parts_for

STOCK, EAGER, COMPILED = "stock", "eager", "compiled"
WARM = 6
"""Steps of a warm-up: a whole interval of each schedule."""

EVERY = 4
"""Settings between two of the stock pipeline."""

EVERY_THIRD = 3
HALF = 0.5
OVER = "the time was over before it was drawn"

FIXED = {
    ("DeepCache", "DeepCache branch 0"): EVERY_THIRD,
    ("tomesd", "ToMe"): HALF,
    ("diffusers", "TaylorSeer"): EVERY_THIRD,
    ("diffusers", "PyramidAttentionBroadcast"): 2,
    ("cache-dit", f"{peers.PRESETS} static"): 3,
}
"""Peers whose schedule is fixed, and the knob: its presets count from slow, 1."""


@dataclass(frozen=True)
class Setting:
    """What is put on the pipeline.

    Attributes:
        name: What it is called.
        plan: Of ours.
        peer: Of others. Neither: stock.
        call: What it asks for in the place of the call: fewer steps.
    """

    name: str
    plan: Plan | None = None
    peer: Peer | None = None
    call: dict[str, Any] = field(default_factory=dict)

    def on(self, pipe: Any, call: dict[str, Any]) -> AbstractContextManager[Any]:
        """Put it on, and off again."""
        if self.plan is not None:
            return self.plan.attach(pipe)
        return nullcontext() if self.peer is None else self.peer.enter(pipe, call)


def plans(pipe: Any, call: dict[str, Any]) -> dict[str, tuple[Accelerator, ...]]:
    """Ours whose schedule is fixed, by name; what does not fit is refused when it is drawn."""
    interval = guidance.Interval(low=0.28)
    whole = cache.TaylorSeer(interval=EVERY_THIRD, site="network")
    found: dict[str, tuple[Accelerator, ...]] = {
        "cache.TaylorSeer, network 3": (whole,),
        "cache.TaylorSeer, blocks 3": (cache.TaylorSeer(interval=EVERY_THIRD, site="blocks"),),
        "cache.TaylorSeer, modules 3": (cache.TaylorSeer(interval=EVERY_THIRD),),
        "cache.HiCache, network 3": (cache.HiCache(interval=EVERY_THIRD, site="network"),),
        "cache.FORA 3": (cache.FORA(interval=EVERY_THIRD),),
        "cache.DeltaDiT 2": (cache.DeltaDiT(interval=2),),
        "cache.DeepCache 3": (cache.DeepCache(interval=EVERY_THIRD),),
        "cache.PAB 2": (cache.PAB(),),
        "cache.ZEUS 3": (cache.ZEUS(interval=EVERY_THIRD),),
        "guidance.Interval 0.28": (interval,),
        "guidance.CFGCache 5": (guidance.CFGCache(),),
        "tokens.ToMe 0.5": (tokens.ToMe(ratio=HALF),),
        "tokens.ToMA 0.5": (tokens.ToMA(ratio=HALF),),
        "tokens.ToDo 2": (tokens.ToDo(),),
        "memory.FeatureSlicing": (memory.FeatureSlicing(),),
        "memory.OperatorGrouping": (memory.OperatorGrouping(),),
        "memory.LayerwiseCasting": (memory.LayerwiseCasting(),),
        "memory.GroupOffload": (memory.GroupOffload(),),
    }
    patterns = clip_forms.sparse(grid(pipe, call))
    for name in ("GRAT surrounding", "Neighbourhood", "Radial"):
        found[f"attention.{name}"] = patterns[name]
        found[f"attention.{name} + TaylorSeer"] = (*patterns[name], whole)
    found["Interval + TaylorSeer, network 3"] = (interval, whole)
    found["Interval + TaylorSeer + ToMe"] = (interval, whole, tokens.ToMe(ratio=HALF))
    return found


def settings(pipe: Any, call: dict[str, Any]) -> list[Setting]:
    """Everything that is drawn of a shape, without stock."""
    half = {"num_inference_steps": max(2, call["num_inference_steps"] // 2)}
    found = [Setting(name, Plan(*methods)) for name, methods in plans(pipe, call).items()]
    found.append(Setting("stock, half the steps", call=half))
    found.append(Setting("DPM++ 2M, half the steps", Plan(samplers.DPMSolverPP()), call=half))
    return found + [Setting(f"{one.package}: {one.method}", peer=one) for one in fixed(pipe, call)]


def fixed(pipe: Any, call: dict[str, Any]) -> Iterator[Peer]:
    """The peers whose schedule is fixed, at one knob each."""
    for one in peers.scheduled(pipe, call):
        if FIXED.get((one.package, one.method)) == one.knob:
            yield one


@dataclass
class Stand:
    """A shape on its device.

    Attributes:
        giant: The model.
        device: Where it is.
        tiny: Whether it is there in small.
        pipe: The pipeline.
        call: Its arguments.
        counter: What counts evaluations.
        regions: What compiles its blocks.
    """

    giant: Giant
    device: str
    tiny: bool
    pipe: Any
    call: dict[str, Any]
    counter: Counter
    regions: Regions

    @classmethod
    def of(cls, giant: Giant, device: str, tiny: bool, steps: int | None) -> Stand:
        """A shape, made on the device."""
        dtype = dtype_of(device)
        pipe = giant.build(device, dtype, tiny)
        asked = {} if steps is None else {"num_inference_steps": steps}
        call = giant.arguments(tiny) | giant.texts(device, dtype, tiny) | asked
        counter = Counter(pipe, layers=False)
        return cls(giant, device, tiny, pipe, call, counter, Regions(pipe))

    def renew(self, error: Exception) -> None:
        """Make the pipeline anew after an error that is not ours: it may be half changed."""
        if isinstance(error, AccelError):
            return
        del self.pipe, self.counter, self.regions
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()
        self.pipe = self.giant.build(self.device, dtype_of(self.device), self.tiny)
        self.counter, self.regions = Counter(self.pipe, layers=False), Regions(self.pipe)

    def draw(self, who: Setting, steps: int | None = None) -> dict[str, Any]:
        """Draw once: seconds, memory, evaluations, and what a report says."""
        call = self.call | who.call | ({} if steps is None else {"num_inference_steps": steps})
        sync = waiting(self.device)
        with quiet(), who.on(self.pipe, call) as run:
            self.counter.reset()
            forget_peak(self.device)
            sync()
            begin = time.perf_counter()
            drawn = self.pipe(generator=torch.Generator().manual_seed(0), **call)[0]
            sync()
            seconds = time.perf_counter() - begin
            peak = peak_of(self.device)
            said = {} if who.plan is None else run.report.verdicts
        return {
            "seconds": seconds,
            "peak": peak,
            "nfe": self.counter.evaluations,
            "finite": bool(torch.isfinite(drawn).all()),
            "inactive": {name: one.detail for name, one in said.items() if one.state != "ACTIVE"},
        }

    def compile(self, who: Setting, mode: str) -> None:
        """Have compiled what is compiled under a setting, or nothing.

        That is modules where a plan must reach into blocks: it refuses compiled ones.
        """
        self.regions.put_on(None)
        if mode != COMPILED:
            return
        self.regions.put_on(parts_for(who.plan) if who.plan is not None else "blocks")
        if who.plan is not None and not self._takes(who.plan):
            self.regions.put_on("modules")

    def _takes(self, plan: Plan) -> bool:
        """Whether the pipeline takes a plan as it is compiled now."""
        try:
            plan.attach(self.pipe).detach()
        except AccelError:
            return False
        return True

    def timed(self, who: Setting, mode: str, repeats: int) -> dict[str, Any]:
        """Warm up, and draw some times."""
        self.compile(who, mode)
        few = min(WARM, (self.call | who.call)["num_inference_steps"])
        first = self.draw(who, few)["seconds"]
        drawn = [self.draw(who) for _ in range(repeats)]
        seconds = [one["seconds"] for one in drawn]
        return drawn[-1] | {
            "seconds": statistics.median(seconds),
            "each": seconds,
            "warm_up_seconds": first,
            "peak": max((one["peak"] for one in drawn if one["peak"] is not None), default=None),
        }


def dtype_of(device: str) -> torch.dtype:
    """Of the weights there."""
    return torch.float32 if device == "cpu" else torch.bfloat16


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that a method which does nothing gives: the table names it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def forget_peak(device: str) -> None:
    """Begin to measure memory anew."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()


def peak_of(device: str) -> int | None:
    """Bytes at the peak; not known on a CPU."""
    return None if device == "cpu" else torch.cuda.max_memory_allocated()


def measure(stand: Stand, field_: list[Setting], lines: Lines, until: float, repeats: int) -> None:
    """Draw what is not in the file yet, each beside a stock picture drawn shortly before."""
    for mode in (EAGER, COMPILED):
        done = {line["name"] for line in lines.found if line["mode"] == mode}
        stock: dict[str, Any] = {}
        for place, who in enumerate(one for one in field_ if one.name not in done):
            if time.monotonic() > until:
                return
            try:
                if place % EVERY == 0 or not stock:
                    stock = stand.timed(Setting(STOCK), mode, 1)
                line = stand.timed(who, mode, repeats)
            except Exception as error:  # whatever peers, compilers and the device raise
                line = {"refused": reason_of(error)}
                stand.renew(error)
            lines.add({"name": who.name, "mode": mode, "stock": stock.get("seconds"), **line})
            print(mode, who.name, line.get("seconds", line.get("refused")), flush=True)


def rows_of(field_: list[Setting], lines: Lines) -> list[dict[str, Any]]:
    """What was drawn or refused, and who was not reached."""
    found = [line for line in lines.found if line["name"] in {one.name for one in field_}]
    known = {(line["name"], line["mode"]) for line in found}
    missing = [
        {"name": one.name, "mode": mode, "refused": OVER}
        for mode in (EAGER, COMPILED)
        for one in field_
        if (one.name, mode) not in known
    ]
    return [*found, *missing]


def markdown(title: str, rows: list[dict[str, Any]], device: str) -> str:
    """Seconds and memory, the fastest first; what did nothing or was refused below, with why."""
    heads = ("setting", "blocks", "seconds", "times faster", "NFE", "peak GiB", "warm-up s")
    lines = [f"{title}. {signature(device)}", "", f"| {' | '.join(heads)} |", f"|{'---|' * 7}"]
    drawn = [row for row in rows if "seconds" in row]
    for row in sorted(drawn, key=lambda row: -row["stock"] / row["seconds"]):
        if not row["inactive"]:
            lines.append(f"| {' | '.join(_cells(row))} |")
    lines += ["", *(f"* {one}" for one in _remarks(rows))]
    return "\n".join(lines).rstrip() + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    peak = "–" if row["peak"] is None else f"{row['peak'] / 2**30:.1f}"
    mark = "" if row["finite"] else " (not finite)"
    times = f"{row['stock'] / row['seconds']:.2f}×"
    figures = [f"{row['seconds']:.2f}", times, f"{row['nfe']:g}", peak]
    return [row["name"] + mark, row["mode"], *figures, f"{row['warm_up_seconds']:.1f}"]


def _remarks(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        for name, why in row.get("inactive", {}).items():
            yield f"{row['name']}, {row['mode']}, is INACTIVE: {name}: {why}"
        if "refused" in row:
            yield f"{row['name']}, {row['mode']}, is left out: {row['refused']}"


def one_shape(name: str, options: argparse.Namespace, device: str) -> Path:
    """Measure a shape, and write ``shapes-…`` with its endings."""
    giant, whole = GIANTS[name], f"shapes-{'tiny-' if options.tiny else ''}{name}"
    path = options.out / f"{whole}.jsonl"
    if options.fresh:
        path.unlink(missing_ok=True)
    until = time.monotonic() + options.budget
    stand = Stand.of(giant, device, options.tiny, options.steps)
    told = {key: one for key, one in stand.call.items() if not torch.is_tensor(one)}
    lines = Lines(path, {"shape": name, "call": told, **here()})
    chosen = [Setting(STOCK), *settings(stand.pipe, stand.call)]
    if options.only:
        chosen = [one for one in chosen if any(part in one.name for part in options.only)]
    measure(stand, chosen, lines, until, options.repeats)
    rows = rows_of(chosen, lines)
    kept = "in small, on a CPU: the seconds mean nothing" if options.tiny else "full size, bf16"
    title = f"{name} with random weights, {kept}; {told['num_inference_steps']} steps"
    (options.out / f"{whole}.md").write_text(markdown(title, rows, device))
    return save(whole, {"shape": name, "call": told, "rows": rows}, options.out)


def device_of(tiny: bool) -> str:
    """Where it is drawn.

    Raises:
        SystemExit: If there is no CUDA, and full size is asked for.
    """
    if tiny:
        return "cpu"
    if not torch.cuda.is_available():
        raise SystemExit(
            "Full-size shapes need CUDA, and this machine has none: run this on a GPU with 40 GB "
            "or more (80 for wan-14b), or try the code with --tiny."
        )
    return "cuda"


def main() -> None:
    """Measure the shapes that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", choices=[*GIANTS], help="all without it")
    parser.add_argument("--steps", type=int, help="of a picture; the shape's own without it")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for each shape")
    parser.add_argument("--repeats", type=int, default=2, help="timed pictures of each setting")
    parser.add_argument("--only", action="append", help="parts of the names of settings")
    parser.add_argument("--tiny", action="store_true", help="in small, on the CPU")
    parser.add_argument("--fresh", action="store_true", help="forget the numbers of earlier runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    device = device_of(options.tiny)
    for name in options.shape or [*GIANTS]:
        print(one_shape(name, options, device))


if __name__ == "__main__":
    main()
