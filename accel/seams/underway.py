"""The call of a pipeline that is under way: what it was given that the pipeline keeps nowhere."""

from __future__ import annotations

import hashlib
import inspect
import json
from typing import Any

from torch import Tensor

TEXT = "negative_prompt"


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


def negative_digest(pipe: Any) -> str:
    """What tells one negative prompt from another, of the call that is under way.

    Of the texts; where the prompts were given as embeddings, of the negative embeddings, rounded
    to bfloat16. Negative embeddings beside a prompt in words are not told apart: the pipelines put
    their own in the same place.
    """
    given = arguments_of(pipe)
    known: dict[str, Any] = {**negative_texts(pipe)}
    if given.get("prompt") is None:
        embedded = (name for name in given if name.startswith("negative_") and "embeds" in name)
        known |= {name: _content(given[name]) for name in embedded}
    text = json.dumps(known, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _content(value: Any) -> str:
    """Digest of the first sample of an embedding."""
    if isinstance(value, list | tuple) and value:
        value = value[0]
    if not isinstance(value, Tensor):
        return ""
    first = value.detach()[:1].bfloat16().float().cpu().contiguous()
    return hashlib.sha256(first.numpy().tobytes()).hexdigest()
