"""`accel.prove`: what a plan holds here, measured as that of a plan that was tuned."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accel.errors import AccelWarning, BadInput, NotReached
from accel.plan import Plan
from accel.tuned import Tuned
from accel.tuning import proof
from accel.tuning.cases import unseen
from accel.tuning.subject import Subject
from accel.tuning.targets import Targets

Told = Callable[[int, int], None]
"""Hears how many prompts are done, of how many."""


def prove(
    pipe: Any,
    plan: Plan,
    target: str | Sequence[str] = (),
    *,
    prompts: Sequence[str] | None = None,
    call: Mapping[str, Any] | None = None,
    held_out: int = 20,
    observe: Told = lambda _done, _total: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Plan:
    """Measure a plan on this pipeline and machine, and give it that as its evidence.

    A plan that was written by hand promises then what a tuned one does; a tuned one is measured
    anew: on another machine, with other versions, for another network, or on more prompts. Each
    prompt is drawn by stock and by the plan in turns.

    Args:
        pipe: A stock diffusers pipeline; it is left as it is.
        plan: Any plan that attaches to it.
        target: What it is to hold, as of `accel.tune`; what it holds already, if none is given.
        prompts: What to draw, noise from seeds 0, 1, …; captions of the scenes where none are
            given. Of a plan that was tuned those that it was searched and chosen on are left out:
            of as many prompts the first ones.
        call: Arguments of the pipeline's call.
        held_out: How many prompts to measure it on; one in twenty may miss the target.
        observe: Hears how far it is.
        clock: Tells seconds.

    Raises:
        BadInput: If there is no target, or prompts are missing.
        NotReached: If the plan does not hold the target.
        UnsupportedModel: If it cannot serve the pipeline.
    """
    known = plan.tuned
    asked = target or (known.targets if known else ())
    if not asked:
        raise BadInput("The plan holds no target yet: name what it is to hold, such as ssim>=0.95.")
    cases = unseen(prompts, dict(call or {}), held_out, known.seen if known else 0)
    bare = Plan(*plan, guard=plan.guard)
    subject = Subject.of(pipe, Targets.parse(asked), clock=clock)
    subject.check(cases)
    began = clock()
    subject.bench.time(Plan(), cases[0])  # the first call of a process takes longer
    _warn(subject.bench.time(bare, cases[0]).idle)
    checks = subject.checks(cases, lambda done: observe(done, len(cases)))
    pairs = checks.check(bare)
    if not checks.holds(pairs):
        raise NotReached(_missed(subject.targets, pairs, len(cases)))
    minutes = (clock() - began) / 60.0
    return bare.proven(_renewed(known, subject.evidence(bare, cases, pairs, minutes)))


def _warn(idle: Sequence[str]) -> None:
    """Say which methods did nothing: what is promised is not their doing."""
    if idle:
        warnings.warn(
            f"{' and '.join(idle)} did nothing at the first prompt: if that is so at most of them, "
            "the plan promises no more without.",
            AccelWarning,
            stacklevel=3,
        )


def _renewed(before: Tuned | None, now: Tuned) -> Tuned:
    """Evidence that was measured anew, of a plan that was found as it was."""
    if before is None:
        return now
    kept = ("elsewhere", "prompts", "chosen_on", "plans", "minutes")
    return now.model_copy(update={name: getattr(before, name) for name in kept})


def _missed(targets: Targets, pairs: Sequence[proof.Pair], count: int) -> str:
    """What it does instead, in words."""
    figures = proof.figures(pairs, targets)
    wanted = {target.measure for target in targets.each}
    told = "; ".join(
        f"{one.measure} {one.mean:.4g}"
        + ("" if one.share is None else f", met by {one.share:.0%} of them")
        for one in figures
        if one.measure in wanted
    )
    stopped = "" if len(pairs) == count else f", where the rest of {count} could not mend it"
    return (
        f"The plan does not hold {' and '.join(map(str, targets.each))} here. After {len(pairs)} "
        f"prompts{stopped}: {told}. Ask for less, or find another one by `accel tune`."
    )
