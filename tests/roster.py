"""One row a method: what the laws must know of it. A method that has no row here is not accepted.

A newcomer adds a row: an `active` form that acts within `STEPS` steps on every tiny pipeline that
the method serves, and what it does not serve. The laws do the rest.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from tiny import PIPELINES, Tiny

from accel import Accelerator, Plan, cache, guidance
from samplers import DPMSolverPP

STEPS = 6


@dataclass(frozen=True)
class Row:
    """What the laws must know of one method.

    Attributes:
        active: Acts within ``STEPS`` steps on every tiny pipeline that it serves.
        variants: Other active forms: every predictor, space, solver.
        unserved: Signatures of blocks (`Tiny.blocks`) that it refuses, or ``*`` for all.
        branches: Whether it acts only where guidance has two branches.
        leads: The branch whose events show what a sample decides.
        dial: The method at a threshold, where it decides from the samples themselves.
    """

    active: Accelerator
    variants: tuple[Accelerator, ...] = ()
    unserved: frozenset[str] = field(default_factory=frozenset)
    branches: bool = False
    leads: str = "cond"
    dial: Callable[[float], Accelerator] | None = None

    def serves(self, tiny: Tiny) -> bool:
        """Whether it attaches to a pipeline."""
        return tiny.blocks not in self.unserved

    def acts(self, tiny: Tiny) -> bool:
        """Whether its active forms do something on a pipeline."""
        return self.serves(tiny) and (len(tiny.order) > 1 or not self.branches)


ROSTER: dict[str, Row] = {
    "cache.EasyCache": Row(
        active=cache.EasyCache(threshold=1e6, warmup=2),
        variants=(
            cache.EasyCache(threshold=1e6, warmup=2, predictor="reuse"),
            cache.EasyCache(threshold=1e6, warmup=2, order=2, max_skips=1, last=False),
        ),
        dial=lambda threshold: cache.EasyCache(threshold=threshold, warmup=2),
    ),
    "cache.FirstBlock": Row(
        active=cache.FirstBlock(threshold=1e6, warmup=1),
        variants=(
            cache.FirstBlock(threshold=1e6, warmup=2, predictor="newton"),
            cache.FirstBlock(threshold=1e6, max_skips=1, predictor="newton", order=2, last=False),
        ),
        unserved=frozenset({"unet"}),
        dial=lambda threshold: cache.FirstBlock(threshold=threshold, warmup=1),
    ),
    "guidance.Adaptive": Row(
        active=guidance.Adaptive(threshold=-1.0, min_steps=2, min_guided=0.0),
        variants=(
            guidance.Adaptive(threshold=-1.0, min_steps=1, min_guided=0.0, space="x0"),
            guidance.Adaptive(threshold=-1.0, min_steps=0, min_guided=0.5, space="v"),
        ),
        branches=True,
        leads="uncond",
        dial=lambda threshold: guidance.Adaptive(threshold=threshold, min_steps=2, min_guided=0.0),
    ),
    "guidance.Interval": Row(
        active=guidance.Interval(low=0.5, high=4.0),
        variants=(guidance.Interval(low=1.5), guidance.Interval(low=0.0, high=1.5)),
        branches=True,
    ),
    "samplers.DPMSolverPP": Row(
        active=DPMSolverPP(order=2),
        variants=(DPMSolverPP(order=3), DPMSolverPP(order=2, eta=1.0, variant="heun")),
    ),
}

EXTRA = ("sd_controlnet", "sd35_skip_layer", "flux_img2img", "wan22")
"""Pipelines that CI runs beside one for each (branch layout × block signature)."""


def _one_each() -> tuple[str, ...]:
    chosen = {(tiny.layout, tiny.blocks): tiny.name for tiny in reversed(PIPELINES.values())}
    return tuple(name for name in PIPELINES if name in {*chosen.values(), *EXTRA})


CI = _one_each()
CORE = ("sd15", "sd3", "flux_cfg", "wan22")
"""What CI runs of the longest laws: batched and two calls, UNet and blocks, two denoisers."""


NO_CALLBACK = ("pixart_sigma", "dit")
"""Pipelines without ``callback_on_step_end``."""


def takes_callback(tiny: Tiny) -> bool:
    """Whether a run can be watched, broken or interrupted at the end of a step."""
    return tiny.name not in NO_CALLBACK


def pipelines(ci: Iterable[str] = CI, *, where: Callable[[Tiny], bool] = lambda _: True) -> Any:
    """Parametrize a test over the tiny pipelines; those that CI leaves out are ``laws_full``."""
    return pytest.mark.parametrize("name", [p for p in params(ci) if where(PIPELINES[p.values[0]])])


def params(ci: Iterable[str]) -> list[Any]:
    """Every tiny pipeline as a parameter."""
    return [pytest.param(name, marks=full(name not in ci)) for name in PIPELINES]


def cases(ci: Iterable[str] = CI, *, variants: bool = False) -> Any:
    """Parametrize over ``(name, method)``: every active form × every pipeline it acts on.

    Args:
        ci: Pipelines that CI runs.
        variants: Whether CI runs the variants too (`laws-full` always does).
    """
    return pytest.mark.parametrize(
        ("name", "method"),
        [
            pytest.param(
                tiny.name,
                method,
                marks=full(tiny.name not in ci or (place > 0 and not variants)),
                id=f"{tiny.name}-{method.name}{place or ''}",
            )
            for row in ROSTER.values()
            for place, method in enumerate((row.active, *row.variants))
            for tiny in PIPELINES.values()
            if row.acts(tiny)
        ],
    )


def full(condition: bool) -> tuple[Any, ...]:
    """The marks of a case that only `make laws-full` runs."""
    return (pytest.mark.laws_full,) if condition else ()


def off_plans() -> dict[str, Plan]:
    """Every method at its ``off()`` alone, all of them together, and the empty plan."""
    offs = [off for row in ROSTER.values() if (off := row.active.off()) is not None]
    return {"empty": Plan(), "all": Plan(*offs)} | {off.name: Plan(off) for off in offs}
