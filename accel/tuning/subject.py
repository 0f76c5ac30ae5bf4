"""What is tuned or proven: a pipeline on a machine, and what is to be held there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from accel.errors import BadInput
from accel.machine import processor
from accel.plan import Plan
from accel.tuned import Tuned, numbers_of
from accel.tuning import proof
from accel.tuning.bench import Bench, Case, Ledger
from accel.tuning.targets import Targets

PACKAGES = ("diffusers-accel", "diffusers", "torch", "transformers")


@dataclass(frozen=True)
class Subject:
    """A pipeline here, and what draws and measures with it.

    Attributes:
        pipe: The stock pipeline.
        targets: What is to be held.
        network: Identity of its denoisers.
        measures: Figures of fidelity that are taken.
        bench: What draws.
    """

    pipe: Any
    targets: Targets
    network: str
    measures: tuple[str, ...]
    bench: Bench

    @classmethod
    def of(
        cls,
        pipe: Any,
        targets: Targets,
        folder: Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Self:
        """That of a pipeline; trials are kept in a folder, if there is one."""
        from accel.seams.identity import identity

        network = identity(pipe)
        measures = dict.fromkeys(["ssim", "psnr", "perceptual"])
        measures |= dict.fromkeys(target.measure for target in targets.fidelity)
        text = f"{network} {machine(pipe)} {versions()}"
        mark = hashlib.sha256(text.encode()).hexdigest()[:12]
        path = None if folder is None else folder / "trials.jsonl"
        bench = Bench(pipe, tuple(measures), Ledger(path, mark), clock)
        return cls(pipe, targets, network, tuple(measures), bench)

    def check(self, cases: Iterable[Case]) -> None:
        """What a picture shows is known of captions of the scenes alone.

        Raises:
            BadInput: If it is asked for of others.
        """
        asked = any(target.measure == "accuracy" for target in self.targets.each)
        if asked and any(case.scene is None for case in cases):
            raise BadInput(
                "The target accuracy asks what a picture shows, which only captions of the scenes "
                "tell: give no prompts of your own, or ask for ssim, psnr or perceptual."
            )

    def checks(self, cases: Sequence[Case], told: Callable[[int], None]) -> proof.Checks:
        """What checks plans on held-out prompts."""
        return proof.Checks(self.bench, cases, self.targets, self.measures, told)

    def evidence(
        self,
        plan: Plan,
        held_out: Sequence[Case],
        pairs: Sequence[proof.Pair],
        minutes: float,
        *,
        prompts: int = 0,
        chosen_on: int = 0,
        plans: int = 1,
    ) -> Tuned:
        """What was measured of a plan, with all that it depends on; arguments as of `Tuned`."""
        return Tuned(
            targets=tuple(map(str, self.targets.each)),
            methods=plan.digest,
            network=self.network,
            pipeline=type(self.pipe).__name__,
            scheduler=type(self.pipe.scheduler).__name__,
            call=numbers_of(held_out[0].call),
            machine=machine(self.pipe),
            versions=versions(),
            prompts=prompts,
            chosen_on=chosen_on,
            held_out=len(held_out),
            texts=proof.texts(held_out),
            figures=proof.figures(pairs, self.targets),
            plans=plans,
            minutes=round(minutes, 2),
            date=datetime.now().astimezone().date().isoformat(),
        )


def machine(pipe: Any) -> str:
    """What seconds depend on: device, processor, threads and dtype."""
    import torch

    device = str(getattr(pipe, "device", "cpu"))
    threads = "" if device.startswith("cuda") else f", {torch.get_num_threads()} threads"
    dtype = str(pipe.dtype).removeprefix("torch.")
    return f"{device}, {processor(device)}{threads}, {dtype}"


def versions() -> tuple[tuple[str, str], ...]:
    """Of the packages that a picture depends on."""
    return tuple((name, version(name)) for name in PACKAGES)
