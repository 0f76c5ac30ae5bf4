"""What a network is told beside the latents and the time: what a kept answer is valid for.

A pipeline may change it in the midst of a run: a ControlNet ends (its residuals become zeros, or
are not given any more) or is rescaled, an adapter's residuals come or go, an IP-Adapter is given
another scale. A method that owns the loop may ask about a picture of another size. What was kept
before then answers another question. Only signs that lie on the host
are looked at, so that nothing reads the device: which arguments are given, the numbers among them,
the scale that a pipeline gives to its ControlNet, and the scales of attention processors.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from accel import hooks

if TYPE_CHECKING:
    from accel.attach import Site, Undo
    from accel.seams.denoisers import Call

TIME = "timestep"
"""Arguments whose names begin so change at every step: they are no condition."""

SCALE = "conditioning_scale"
"""The argument of every ControlNet of diffusers that its residuals are multiplied by."""

Conditions = Hashable
"""Equal where a network is asked under the same conditions."""


class Watch:
    """Reads the conditions of a pipeline's calls. Before `attach` it sees their arguments alone."""

    def __init__(self) -> None:
        self._scale: Conditions = None
        self._processors: dict[str, list[Any]] = {}
        self._call: Callable[[], Call | None] = lambda: None  # weak: a call holds many tensors
        self._found: Conditions = None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Follow the pipeline's ControlNet and the processors of its denoisers."""

        def start() -> None:
            self._scale, self._call = None, lambda: None
            for denoiser in site.denoisers:
                self._processors[denoiser.name] = _scaled(denoiser.core)

        yield site.on_start(start)
        controlnet = getattr(site.pipe, "controlnet", None)
        if controlnet is not None:
            yield self._follow(controlnet)

    def of(self, call: Call) -> Conditions:
        """The conditions of a call."""
        if self._call() is not call:
            scales = [_frozen(p.scale) for p in self._processors.get(call.denoiser.name, ())]
            told = _given(call.arguments)
            self._found = (_size(call), told, self._scale, tuple(scales))
            self._call = weakref.ref(call)
        return self._found

    def _follow(self, controlnet: Any) -> Undo:
        """Hear the scale that each call of a ControlNet is given, after other libraries' hooks."""
        core = getattr(controlnet, "_orig_mod", controlnet)
        parameters = tuple(inspect.signature(type(core).forward).parameters)[1:]

        def hear(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is not controlnet:
                return  # of a deep copy, which takes the hook with it
            arguments = dict(zip(parameters, args, strict=False)) | kwargs
            self._scale = _frozen(arguments.get(SCALE))

        def around(inner: Any, *args: Any, **kwargs: Any) -> Any:
            hear(controlnet, args, kwargs)
            return inner(*args, **kwargs)

        if getattr(controlnet, "_compiled_call_impl", None) is not None:
            return hooks.wrap(controlnet, "_compiled_call_impl", around)
        handle = controlnet.register_forward_pre_hook(hear, with_kwargs=True)
        remove: Undo = handle.remove
        return remove


def _size(call: Call) -> Conditions:
    """The size of one row of the input."""
    raw = call.raw
    return tuple(raw.shape[1:] if hasattr(raw, "shape") else raw[0].shape)


def _given(arguments: Mapping[str, Any]) -> Conditions:
    """Names of the arguments that are given, with the values of those that are numbers."""
    return tuple(
        (name, _sign(value))
        for name, value in sorted(arguments.items(), key=lambda item: str(item[0]))
        if value is not None and not str(name).startswith(TIME)
    )


def _sign(value: Any) -> Conditions:
    if isinstance(value, Mapping):
        return _given(value)
    return value if isinstance(value, (bool, int, float)) else None


def _frozen(scale: Any) -> Conditions:
    """A scale, or lists of scales, of which none is a tensor's value."""
    if isinstance(scale, (list, tuple)):
        return tuple(map(_frozen, scale))
    return scale if isinstance(scale, (bool, int, float)) else None


def _scaled(network: Any) -> list[Any]:
    """The attention processors that have a scale: those of IP-Adapters."""
    processors = (getattr(module, "processor", None) for module in network.modules())
    return [processor for processor in processors if hasattr(processor, "scale")]
