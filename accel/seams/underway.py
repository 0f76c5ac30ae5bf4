"""The call of a pipeline that is under way: what it was given that the pipeline keeps nowhere."""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from typing import Any

import torch
from torch import Tensor

from accel.errors import AccelWarning
from accel.seams.identity import SEPARATOR, count_changed, decoded, encoded

TEXT = "negative_prompt"

TOKENS = 256
"""Tokens of an embedding that are looked at, from its start."""

STRIDE = 7919
"""From the value of one token that is looked at to that of the next; prime to all widths."""

SPREAD = 2.0**-4
"""Of the median size of an embedding's values: more than encoders differ by between devices and
dtypes, less than two texts do."""


def arguments_of(pipe: Any) -> dict[str, Any]:
    """The parameters of the call that is under way, by name, as they are now.

    They are read from the frame of that call, so this must be asked from inside it (as at the
    start of a run); elsewhere the answer is empty. A pipeline may have changed them by then.
    """
    frame = inspect.currentframe()
    while frame is not None:
        here = frame.f_locals
        if frame.f_code.co_name == "__call__" and here.get("self") is pipe:
            names = inspect.signature(type(pipe).__call__).parameters
            return {name: here[name] for name in names if name in here}
        frame = frame.f_back
    return {}


def negative_texts(pipe: Any) -> dict[str, tuple[str, ...]]:
    """The distinct negative prompts of the call that is under way, by the argument's name.

    None was given where the tuple is empty; it counts as ``""`` unless the pipeline makes
    something else of it (SDXL's zeros).
    """
    zeros = bool(getattr(pipe, "config", {}).get("force_zeros_for_empty_prompt", False))
    missing: tuple[str, ...] = () if zeros else ("",)
    return {
        name: tuple(sorted({value} if isinstance(value, str) else set(value or missing)))
        for name, value in arguments_of(pipe).items()
        if name.startswith(TEXT)
        and (value is None or isinstance(value, str | list | tuple))
        and not name.endswith(("embeds", "mask", "ids"))
    }


def negative_prompt(pipe: Any) -> str:
    """What tells one negative prompt from another, of the call that is under way.

    A digest of the texts; where the prompts were given as embeddings, a sample of the negative
    ones (a read of the device). Negative embeddings beside a prompt in words are not told apart:
    the pipelines put their own in the same place.
    """
    given = arguments_of(pipe)
    if given.get("prompt") is None:
        names = sorted(name for name in given if name.startswith("negative_") and "embeds" in name)
        samples = [_sample(given[name]) for name in names]
        kept = [sample for sample in samples if sample is not None]
        if kept:
            return SEPARATOR + encoded(kept)
    text = json.dumps(negative_texts(pipe), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_another(expected: str, found: str, owner: str) -> bool:
    """Whether two answers of `negative_prompt` are of two; warns where that is not known.

    Embeddings that were computed on another device or in another dtype are the same.

    Args:
        expected: Of the calls that numbers were fitted on.
        found: Of the call at hand.
        owner: Whose numbers they are, for the warning.
    """
    embedded = [text.startswith(SEPARATOR) for text in (expected, found)]
    if not any(embedded):
        return expected != found
    if not all(embedded):
        warnings.warn(
            f"{owner}: one negative prompt is in words and the other one in embeddings, so whether "
            "it is that which it was fitted with is not known. If in doubt, calibrate again.",
            AccelWarning,
            stacklevel=3,
        )
        return False
    a, b = (decoded(text.removeprefix(SEPARATOR)) for text in (expected, found))
    return count_changed(a, b, SPREAD * float(a.abs().median())) != 0


def _sample(value: Any) -> Tensor | None:
    """A value of each of the first tokens of the first prompt, or those of its one vector."""
    if isinstance(value, list | tuple) and value:
        first = value[0]  # one tensor a prompt: ``[tokens, dim]``
    else:
        first = value[0] if isinstance(value, Tensor) else None
    if not isinstance(first, Tensor) or not first.numel():
        return None
    rows = first.detach().reshape(-1, first.shape[-1])
    rows = rows.T if len(rows) == 1 else rows
    rows = rows[:TOKENS]
    places = STRIDE * torch.arange(len(rows), device=rows.device) % rows.shape[1]
    return rows.gather(1, places[:, None])[:, 0].float()
