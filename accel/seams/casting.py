"""Diffusers' layerwise casting: put on as one change that comes off without trace.

Diffusers itself cannot take it off: what was rounded is lost. Here the originals are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks._common import _GO_LC_SUPPORTED_PYTORCH_LAYERS
from diffusers.hooks.layerwise_casting import (
    _LAYERWISE_CASTING_HOOK,
    _PEFT_AUTOCAST_DISABLE_HOOK,
    _is_layerwise_casting_active,
)
from torch import Tensor, nn

from accel.errors import BrokenAttachment, UnsupportedModel
from accel.seams.bare import is_bare
from accel.seams.offload import mark_hooks, own_attributes, unhook

HOOKS = (_PEFT_AUTOCAST_DISABLE_HOOK, _LAYERWISE_CASTING_HOOK)
"""Outermost first."""

HOLDS = {
    torch.float8_e4m3fn: (torch.float32, torch.bfloat16, torch.float16),
    torch.float8_e5m2: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.float32,),
    torch.float16: (torch.float32,),
}
"""By dtype of storage, the wider ones that hold each of its numbers: casts there and back again
change nothing more than the first one did."""


@dataclass(frozen=True)
class Original:
    """A weight as it was.

    Attributes:
        path: Where it is, for an error.
        weight: The parameter or buffer.
        value: Its numbers, on the CPU; of a network without weights none, on ``meta``.
    """

    path: str
    weight: Tensor
    value: Tensor


@dataclass(frozen=True)
class Casting:
    """One network under layerwise casting.

    Attributes:
        layers: How many layers are cast.
        before: Bytes that their weights took.
        after: Bytes that they take.
        kept: Bytes of the originals, on the CPU.
        undo: Takes the hooks off and puts the originals back.
    """

    layers: int
    before: int
    after: int
    kept: int
    undo: Callable[[], None]


def cast_layers(name: str, module: Any, storage: torch.dtype) -> Casting:
    """Put diffusers' layerwise casting on a network, to compute in the network's own dtype.

    Args:
        name: What to call it in an error.
        module: The network.
        storage: The dtype between calls of a layer.

    Raises:
        UnsupportedModel: If it is cast already, is compiled, has weights that are not there, or
            is no wider than the storage.
    """
    _check(name, module, storage)
    own = own_attributes(module)
    originals = dict(_originals(module))

    def undo() -> None:
        layers = [part for part in module.modules() if _is_cast(part)]
        for layer in layers:  # diffusers' hook refuses to be taken off
            layer._diffusers_hook.get_hook(_LAYERWISE_CASTING_HOOK).deinitalize_hook = _as_it_is
        for part in module.modules():
            unhook(part, own.get(id(part), set()), HOOKS)
        changed = [*_restore(originals.values(), storage), *_added(layers, originals)]
        if changed:
            raise BrokenAttachment(
                f"{name}: {len(changed)} weights ({changed[0]}, …) were changed while they were "
                f"stored as {storage}: they stay as changed, rounded to it. Fuse or load weights "
                "before the plan is attached."
            )

    try:
        module.enable_layerwise_casting(storage_dtype=storage, compute_dtype=module.dtype)
        mark_hooks(module, HOOKS, own)
    except BaseException:
        undo()
        raise
    layers = [part for part in module.modules() if _is_cast(part)]
    cast = {id(tensor) for layer in layers for tensor in _tensors(layer)}
    for number in originals.keys() - cast:
        del originals[number]
    before = sum(original.value.nbytes for original in originals.values())
    after = sum(original.weight.nbytes for original in originals.values())
    return Casting(len(layers), before, after, before, undo)


def _check(name: str, module: Any, storage: torch.dtype) -> None:
    if not hasattr(module, "enable_layerwise_casting"):
        problem = "is none of diffusers' models: layerwise casting does not fit it"
    elif _is_layerwise_casting_active(module):
        problem = "carries diffusers' layerwise casting already: load the pipeline without"
    elif any(getattr(p, "_compiled_call_impl", None) is not None for p in module.modules()):
        problem = "is compiled, and casts do not fit inside a graph: attach without compiling"
    elif any(weight.is_meta for weight in module.parameters()) and not is_bare(module):
        problem = "has weights that accelerate took away: call pipe.remove_all_hooks() first"
    elif module.dtype not in HOLDS[storage]:
        problem = (
            f"computes in {module.dtype}, which is no wider than {storage} or does not hold all of "
            "its numbers: choose a float8 storage"
        )
    else:
        return
    raise UnsupportedModel(f"{name} {problem}. Or leave memory.LayerwiseCasting out of the plan.")


def _originals(module: nn.Module) -> Iterator[tuple[int, Original]]:
    """What may be cast. On the CPU the present tensors are the originals: nothing is copied."""
    for path, layer in module.named_modules():
        if isinstance(layer, _GO_LC_SUPPORTED_PYTORCH_LAYERS):
            for tensor in _tensors(layer):
                value = tensor.data if tensor.is_meta else tensor.data.cpu()
                yield id(tensor), Original(path, tensor, value)


def _tensors(layer: nn.Module) -> list[Tensor]:
    own = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    return [tensor for tensor in own if tensor.is_floating_point()]


def _is_cast(part: nn.Module) -> bool:
    registry = vars(part).get("_diffusers_hook")
    return registry is not None and registry.get_hook(_LAYERWISE_CASTING_HOOK) is not None


def _as_it_is(layer: nn.Module) -> nn.Module:
    return layer


def _restore(originals: Iterable[Original], storage: torch.dtype) -> Iterator[str]:
    """Put the originals back; yields the places of weights that are others by now."""
    for original in originals:
        weight, value = original.weight, original.value
        if weight.is_meta or _same_bits(weight.data.to(storage).cpu(), value.to(storage)):
            weight.data = value.to(weight.device)
        else:
            weight.data = weight.data.to(value.dtype)
            yield original.path


def _added(layers: Iterable[nn.Module], originals: dict[int, Original]) -> Iterator[str]:
    """Widen weights that came to a cast layer later; yields what layer they are of."""
    widths = {id(original.weight): original.value.dtype for original in originals.values()}
    wide = next(iter(widths.values()), torch.float32)
    for layer in layers:
        for tensor in _tensors(layer):
            if id(tensor) not in widths:
                tensor.data = tensor.data.to(wide)
                yield type(layer).__name__


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )
