"""The prompts of a tuning: those of the search, of the choice and of the proof.

Captions of the scenes are taken from three places that stay apart whatever their numbers: those of
the search from what the bundled models were trained on, of the choice from the middle of the
held-out ones, of the proof from their end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from accel.errors import BadInput
from accel.tuning.bench import Case


def cases(
    prompts: Sequence[str] | None, call: Mapping[str, Any], split: tuple[int, int, int]
) -> tuple[list[Case], list[Case], list[Case]]:
    """The prompts of the search, of the choice and of the proof, each with noise of its own.

    Raises:
        BadInput: If there are too few, or two of them are the same.
    """
    searched, choosing, proving = split
    told = f"{searched} to search, {choosing} to choose and {proving} to prove it"
    if min(split) < 1:
        raise BadInput(f"found prompts: {told}. Give at least 1 each.")
    if prompts is None:
        from accel.scenes import HELD_OUT, TRAINING

        middle = len(HELD_OUT) // 2
        parts = TRAINING[-searched:], HELD_OUT[middle : middle + choosing], HELD_OUT[-proving:]
        some, choice, held_out = (_scenes(call, part) for part in parts)
        return some, choice, held_out
    found, rest = _numbered(prompts, call), searched + choosing
    if len(found) < rest + proving:
        raise BadInput(
            f"found {len(found)} different prompts, needed are {told}: give more, or lower one."
        )
    return found[:searched], found[searched:rest], found[rest : rest + proving]


def unseen(
    prompts: Sequence[str] | None, call: Mapping[str, Any], count: int, seen: int = 0
) -> list[Case]:
    """The prompts of a proof alone: those of `cases`, whose first two parts were so many.

    Raises:
        BadInput: If there are too few.
    """
    if count < 1:
        raise BadInput(f"found {count} prompts to prove it: give at least 1.")
    if prompts is None:
        from accel.scenes import HELD_OUT

        return _scenes(call, HELD_OUT[-count:])
    found = _numbered(prompts, call)
    if len(found) < seen + count:
        before = f"{seen} that it was tuned on and " if seen else ""
        raise BadInput(
            f"found {len(found)} different prompts, needed are {before}{count} to prove it: give "
            "more, or lower the number."
        )
    return found[seen : seen + count]


def _scenes(call: Mapping[str, Any], seeds: Iterable[int]) -> list[Case]:
    """Captions of the scenes."""
    from accel.scenes import clip_scene, scene

    describe = clip_scene if "num_frames" in call else scene
    scenes = [describe(seed) for seed in seeds]
    return [Case({**call, "prompt": one.caption}, one.seed, one) for one in scenes]


def _numbered(prompts: Sequence[str], call: Mapping[str, Any]) -> list[Case]:
    """Each of some prompts once, with noise from its number."""
    return [Case({**call, "prompt": one}, at) for at, one in enumerate(dict.fromkeys(prompts))]
