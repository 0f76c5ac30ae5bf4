"""One row a method: what the laws must know of it. A method that has no row here is not accepted.

A newcomer adds a row to the file of its engine: an `active` form that acts within `STEPS` steps on
every tiny pipeline that the method serves, and what it does not serve. The laws do the rest.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from tiny import PIPELINES, TINIES, Tiny

from accel import Accelerator, Plan, errors
from roster import (
    attention,
    blocks,
    guidance,
    loop,
    lossless,
    memory,
    modules,
    network,
    parallel,
    region,
    resolution,
    solver_coupled,
    solvers,
    tokens,
    unet,
    weights,
)
from roster.row import STEPS as STEPS
from roster.row import Row as Row

ROWS: dict[str, Row] = (
    network.ROWS
    | blocks.ROWS
    | solver_coupled.ROWS
    | guidance.ROWS
    | solvers.ROWS
    | unet.ROWS
    | modules.ROWS
    | lossless.ROWS
    | memory.ROWS
    | attention.ROWS
    | tokens.ROWS
    | parallel.ROWS
    | resolution.ROWS
    | loop.ROWS
    | region.ROWS
    | weights.ROWS
)
LEADERS = {row.engine: name for name, row in reversed(ROWS.items()) if not row.also}
"""The first method of each engine: CI runs it on more pipelines than its kin. What has pipelines of
its own (`Row.also`) runs on those, and has no turn on others."""

ROSTER: dict[str, Row] = dict(sorted(ROWS.items()))

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


def in_ci(tiny: Tiny, name: str, ci: Iterable[str]) -> bool:
    """Whether CI runs a method on a pipeline.

    The leaders run on ``CORE`` and, in turn, on a third of the others; their kin on one of
    ``CORE``.
    """
    if tiny.name in ROSTER[name].also:
        return True
    if tiny.name not in ci:
        return False
    leaders = list(LEADERS.values())
    if name not in leaders:
        return tiny.name == TURNS[name]
    return tiny.name in CORE or (CI.index(tiny.name) + leaders.index(name)) % 3 == 0


def _turns() -> dict[str, str | None]:
    """The one of ``CORE`` that each method has in CI: of those that serve it, the next in turn."""
    found = {}
    for turn, (name, row) in enumerate(ROSTER.items()):
        served = [place for place in CORE if row.acts(PIPELINES[place])]
        found[name] = served[turn % len(served)] if served else None
    return found


TURNS = _turns()


def cases(ci: Iterable[str] = CI, *, variants: bool = False, kin: bool = True) -> Any:
    """Parametrize over ``(name, method)``: every active form × every pipeline it acts on.

    Args:
        ci: Pipelines that CI runs.
        variants: Whether CI runs the variants too, on one of ``CORE`` (`laws-full` always does).
        kin: Whether CI runs more than the leader of each engine.
    """
    return pytest.mark.parametrize(
        ("name", "method"),
        [
            pytest.param(
                tiny.name,
                method,
                marks=full(
                    not in_ci(tiny, name, ci)
                    or (place > 0 and not (variants and tiny.name == TURNS[name]))
                    or (name not in LEADERS.values() and not kin)
                ),
                id=f"{tiny.name}-{method.name}{place or ''}",
            )
            for name, row in ROSTER.items()
            for place, method in enumerate((row.active, *row.variants))
            for tiny in (
                *filter(row.acts, PIPELINES.values()),
                *(TINIES[also] for also in row.also),
            )
        ],
    )


def full(condition: bool) -> tuple[Any, ...]:
    """The marks of a case that only `make laws-full` runs."""
    return (pytest.mark.laws_full,) if condition else ()


def off_plans() -> dict[str, Plan]:
    """Every method at its ``off()`` alone, all of them together, and the empty plan."""
    offs = [off for row in ROSTER.values() if (off := row.active.off()) is not None]
    return {"empty": Plan(), "all": Plan(*offs)} | {off.name: Plan(off) for off in offs}


def compatible(pipe: Any, methods: Iterable[Accelerator]) -> Plan:
    """As many of the methods, from the first on, as go together on a pipeline."""
    chosen = Plan()
    for method in methods:
        with contextlib.suppress(errors.Conflict):
            more = Plan(*chosen, method)
            more.attach(pipe).detach()
            chosen = more
    return chosen
