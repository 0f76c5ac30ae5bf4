"""Fewer steps: the simplest way to less time, as a part of the plan like all others.

What a run asks its scheduler for is a share of what the call asks for. The picture is the one that
the same call gives with that number of steps, to the bit, except where a pipeline derives something
else from that number beforehand (Flux 2: its shift).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo


class Steps(Accelerator):
    """Make a share of the steps that a call asks for; a solver of higher order needs fewer.

    A pipeline's own ramp of noise levels is made anew for the smaller number; a list that the
    caller gives is thinned out along its length, its ends stay.
    """

    name: ClassVar[str] = "samplers.Steps"
    layer: ClassVar[str] = "sampler"
    seam: ClassVar[str] = "steps"
    supports: ClassVar[str] = "every pipeline with a scheduler that takes a number of steps"
    source: ClassVar[str] = "arXiv 2010.02502, section 4.2"
    approximates: ClassVar[bool] = False

    share: float = Field(
        default=0.5,
        gt=0.0,
        le=1.0,
        description="of the steps that are asked for, rounded, at least one; 1 is off",
    )

    @classmethod
    def off(cls) -> Self:
        """All steps."""
        return cls(share=1.0)

    def why_off(self) -> str | None:
        """Whether all steps are made."""
        return "share is 1" if self.share == 1.0 else None

    def of(self, count: int) -> int:
        """How many steps are made of so many."""
        return max(1, round(self.share * count))

    def attach(self, site: Site) -> Iterator[Undo]:
        """Stand in front of ``set_timesteps``, and of what cuts a schedule for image-to-image."""
        from accel import hooks
        from accel.seams.lists import bound
        from samplers.schedule_method import refuse_own_levels

        scheduler, tally = site.pipe.scheduler, site.tally
        refuse_own_levels(scheduler, self.name)
        yield site.claim(self.seam)
        asked: list[int] = []

        def ask(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            given, count = bound(type(scheduler).set_timesteps, (scheduler, *args), kwargs)
            given.pop("self", None)
            asked[:] = [count]
            fewer = self.of(count)
            tally.change = f"{fewer} of {count} steps" if fewer < count else None
            tally.reason = lambda: f"{self.share:g} of {count} steps is {fewer}"
            return inner(**_thinned(given, fewer)) if fewer < count else inner(*args, **kwargs)

        yield hooks.wrap(scheduler, "set_timesteps", ask)
        if hasattr(site.pipe, "get_timesteps"):
            cut = type(site.pipe).get_timesteps

            def shorten(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                given = dict(inspect.signature(cut).bind(site.pipe, *args, **kwargs).arguments)
                given.pop("self")
                if asked and given["num_inference_steps"] == asked[0]:
                    given["num_inference_steps"] = self.of(asked[0])
                return inner(**given)

            yield hooks.wrap(site.pipe, "get_timesteps", shorten)
        tally.change = f"{self.share:g} of the steps that are asked for"


def _thinned(given: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The arguments of ``set_timesteps`` for another number of steps."""
    lists = {name: given[name] for name in ("sigmas", "timesteps") if given.get(name) is not None}
    found = dict(given) | {name: _resampled(values, count) for name, values in lists.items()}
    if given.get("num_inference_steps") is not None:
        found["num_inference_steps"] = count
    return found


def _resampled(values: Any, count: int) -> Any:
    """A list of another length: a pipeline's ramp down to 1/N anew, others along their length."""
    import numpy as np

    before = np.asarray(values)
    for ramp in (_with_last, _without_end, _single):
        if np.array_equal(before, ramp(len(before)).astype(before.dtype)):
            return _as(values, ramp(count))
    places = np.linspace(0, len(before) - 1, count)
    found = np.interp(places, np.arange(len(before)), before)
    return _as(values, found.round() if before.dtype.kind in "iu" else found)


def _with_last(count: int) -> Any:
    import numpy as np

    return np.linspace(1.0, 1.0 / count, count)


def _without_end(count: int) -> Any:
    import numpy as np

    return np.linspace(1.0, 0.0, count + 1)[:-1]


def _single(count: int) -> Any:
    """As torch has it, whose single precision rounds elsewhere (Z-Image)."""
    import torch

    return torch.linspace(1.0, 1.0 / count, count).double().numpy()


def _as(values: Any, found: Any) -> Any:
    """New values in the container and dtype of the old ones."""
    import numpy as np

    if isinstance(values, np.ndarray):
        return found.astype(values.dtype)
    if isinstance(values, list | tuple):
        return type(values)(type(values[0])(value) for value in found)
    return values.new_tensor(found)
