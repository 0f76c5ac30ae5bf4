"""The clean latents that a run starts from: what a pipeline gives its scheduler to add noise to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from accel import hooks

if TYPE_CHECKING:
    from torch import Tensor

CLEAN = {"add_noise": "original_samples", "scale_noise": "sample"}
"""Methods of a scheduler that add noise, and what they call the clean samples."""


def watch(scheduler: Any, told: Callable[[Tensor], None]) -> Iterator[Callable[[], None]]:
    """Call ``told`` with the clean samples ``[B, …]`` whenever noise is added; yields the undos."""
    for method, name in CLEAN.items():
        if not hasattr(scheduler, method):
            continue

        def listen(inner: Callable[..., Any], *args: Any, name: str = name, **kwargs: Any) -> Any:
            told(kwargs[name] if name in kwargs else args[0])
            return inner(*args, **kwargs)

        yield hooks.wrap(scheduler, method, listen)
