"""How many rows go into one call: what measures fastest, fits, and gives the same pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from accel.errors import BadInput
from accel.plan import Plan
from app import nearness
from app.memory import free, out_of_memory
from app.request import Request
from app.session import Session

STEPS = 2
"""Steps of a run that is timed: its loop; text and decoding come with it."""

WORTH = 0.97
"""A larger size is taken where it needs at most this share of the seconds a row."""

ALIKE = 30.0
"""PSNR in dB from which on a picture made in company is the one that is made alone: rounding of
half precision stays above, another picture is far below."""


@dataclass(frozen=True)
class Found:
    """See `app.batch.tasks.Measured`."""

    size: int
    seconds: dict[int, float] = field(default_factory=dict)
    note: str = ""


def measured(session: Session, requests: Sequence[Request]) -> Found:
    """Try sizes 1, 2, 4, … up to the number of requests, for as long as it gets faster.

    The stock pipeline is timed: the plan of the rows may not go with so few steps.

    Args:
        session: With the model.
        requests: Of one group.
    """
    short = [request if request.image else replace(request, steps=STEPS) for request in requests]
    if len(short) == 1 or short[0].last:
        note = "the two pictures of a clip fill a call" if short[0].last else "a single row"
        return Found(1, note=note)
    alone = [session.together([one], Plan())[0] for one in short[:2]]  # warms up, too
    try:
        company = session.together(short[:2], Plan())
    except BadInput as error:
        return Found(1, note=str(error))
    except Exception as error:
        if out_of_memory(error):
            free()
            return Found(1, note="out of memory with 2 in a call")
        return Found(1, note=f"no two in a call: {type(error).__name__}")
    for one, other in zip(alone, company, strict=True):
        if nearness.psnr(one.pictures, other.pictures) < ALIKE:  # infinite where they are equal
            return Found(1, note="in company this pipeline makes other pictures than alone")
    return _fastest(session, short)


def _fastest(session: Session, short: Sequence[Request]) -> Found:
    seconds: dict[int, float] = {}
    best, size, note = 1, 1, ""
    while size <= len(short):
        try:
            seconds[size] = _timed(session, short[:size])
        except Exception as error:
            if not out_of_memory(error):
                raise
            free()
            note = f"out of memory with {size} in a call"
            break
        if seconds[size] < WORTH * seconds[best] or size == 1:
            best = size
        elif size > 2 * best:
            break
        size *= 2
    return Found(best, seconds, note)


def _timed(session: Session, requests: Sequence[Request]) -> float:
    start = time.perf_counter()
    session.bare_together(requests)
    return (time.perf_counter() - start) / len(requests)
