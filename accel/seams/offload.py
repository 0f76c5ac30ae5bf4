"""Diffusers' group offloading: put on as one change that comes off without trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import (
    _GROUP_OFFLOADING,
    _LAYER_EXECUTION_TRACKER,
    _LAZY_PREFETCH_GROUP_OFFLOADING,
    _is_group_offload_enabled,
)
from torch import nn

from accel import hooks
from accel.errors import BadInput, UnsupportedModel
from accel.seams.bare import is_bare

HOOKS = (_LAZY_PREFETCH_GROUP_OFFLOADING, _LAYER_EXECUTION_TRACKER, _GROUP_OFFLOADING)
"""Outermost first."""


@dataclass(frozen=True)
class Placement:
    """One module under group offloading.

    Attributes:
        groups: How many groups its weights travel in.
        undo: Takes the hooks off and the weights back to where they were.
    """

    groups: int
    undo: Callable[[], None]


def offload(name: str, module: Any, **options: Any) -> Placement:
    """Put diffusers' group offloading on a module.

    Args:
        name: What to call it in an error.
        module: The module.
        **options: Of `apply_group_offloading`. Without weights, groups are made and stay there.

    Raises:
        UnsupportedModel: If it is offloaded already, by diffusers or accelerate.
    """
    if _is_group_offload_enabled(module):
        raise UnsupportedModel(
            f"{name} carries diffusers' group offloading already: leave memory.GroupOffload out of "
            "the plan, or load the pipeline without."
        )
    if is_bare(module):
        options |= {"onload_device": "cpu", "offload_device": "meta", "use_stream": False}
    own = own_attributes(module)
    undo = _restorer(module, own)
    try:
        apply_group_offloading(module, **options)
    except ValueError as error:
        undo()
        raise UnsupportedModel(
            f"{name} cannot be offloaded in groups ({error}). Where accelerate offloads it, call "
            "pipe.remove_all_hooks() first."
        ) from error
    except BaseException:
        undo()
        raise
    mark_hooks(module, HOOKS, own)
    _forget_children(module)
    return Placement(len(groups_of(module)), undo)


def check_whole(name: str, module: Any) -> None:
    """Check that no layer has to be called for its weights to be there.

    Args:
        name: Of the network, for the refusal.
        module: The network, whose layers' weights a method is going to read.

    Raises:
        UnsupportedModel: If accelerate or diffusers offloads it layer by layer.
    """
    for part in module.modules():
        weights = list(part.parameters(recurse=False))
        if hasattr(part, "_hf_hook") and any(weight.is_meta for weight in weights):
            way = "pipe.enable_model_cpu_offload()"
            raise _in_layers(name, "accelerate (pipe.enable_sequential_cpu_offload)", way)
        if weights and not list(part.children()) and groups_of(part):
            way = "offload_type='block_level'"
            raise _in_layers(name, "diffusers (offload_type='leaf_level')", way)


def _in_layers(name: str, by: str, way: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"pipe.{name} is offloaded layer by layer by {by}, and a method that computes a part of "
        f"the picture reads the weights of layers that it does not call: take {way}, or leave the "
        "method out of the plan."
    )


def groups_of(module: Any) -> list[Any]:
    """The groups in which diffusers offloads the weights of a module, each once."""
    hooked = (part._diffusers_hook for part in module.modules() if hasattr(part, "_diffusers_hook"))
    found = (registry.get_hook(_GROUP_OFFLOADING) for registry in hooked)
    return list({id(hook.group): hook.group for hook in found if hook is not None}.values())


def _restorer(module: Any, own: dict[int, set[str]]) -> Callable[[], None]:
    """What puts all hooks and weights back to where they are now."""
    tensors = [*module.parameters(), *module.buffers()]
    places = {id(tensor): (tensor, tensor.device) for tensor in tensors}

    def undo() -> None:
        for part in module.modules():
            unhook(part, own.get(id(part), set()), HOOKS)
        _forget_children(module)
        first = tensors[0].device if not places else next(iter(places.values()))[1]
        for tensor in [*module.parameters(), *module.buffers()]:
            _, device = places.get(id(tensor), (tensor, first))  # a LoRA that came later
            if tensor.device != device:
                tensor.data = tensor.data.to(device)

    return undo


def mark_hooks(module: Any, names: Sequence[str], own: dict[int, set[str]]) -> None:
    """Note on the hooks of some names, and on the registries made for them, that they are a plan's.

    Args:
        module: The network.
        names: Of the hooks.
        own: What `own_attributes` gave before.
    """
    for part in module.modules():
        registry = vars(part).get("_diffusers_hook")
        if registry is not None and "_diffusers_hook" not in own.get(id(part), set()):
            registry.of_plan = True
        for name in names if registry is not None else ():
            hook = registry.get_hook(name)
            if hook is not None:
                hook.of_plan = True


def own_attributes(module: Any) -> dict[int, set[str]]:
    """By module, the attributes that it has without a plan's hooks."""
    return {id(part): _without_hooks(part) for part in module.modules()}


def _without_hooks(part: Any) -> set[str]:
    registry = vars(part).get("_diffusers_hook")
    found = [] if registry is None else list(registry.hooks.values())
    own = set(vars(part))
    if found and all(hasattr(hook, "of_plan") for hook in found):
        own.discard("forward")
    return own - {"_diffusers_hook"} if hasattr(registry, "of_plan") else own


def unhook(part: Any, own: set[str], names: Sequence[str]) -> None:
    """Take hooks of diffusers off one module, whatever is above or below them.

    Args:
        part: The module.
        own: Attributes that it is to keep.
        names: Of the hooks, outermost first.
    """
    registry = vars(part).get("_diffusers_hook")
    if registry is None:
        return
    with hooks.aside(part, "forward"):
        for name in names:
            registry.remove_hook(name, recurse=False)
        if "forward" not in own and hooks.is_plain(part, "forward"):
            del part.forward
    if "_diffusers_hook" not in own and not registry.hooks:
        del part._diffusers_hook


def _forget_children(module: Any) -> None:
    """Registries remember which modules below them have some."""
    for part in module.modules():
        if "_diffusers_hook" in vars(part):
            part._diffusers_hook._child_registries_cache = None


def compute_device(asked: str) -> str:
    """The device that was asked for; for ``auto`` the accelerator, or the CPU."""
    if asked != "auto":
        return asked
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else str(found)


def check_devices(method: str, onload: str, wait: str, stream: bool) -> None:
    """Check that this machine has the devices.

    Raises:
        BadInput: If it has not.
    """
    for device in (onload, wait):
        if not _is_there(device):
            raise BadInput(
                f"{method} asks for the device '{device}', which this machine does not have. Set "
                "onload_device and offload_device to devices that it has, such as 'cpu'."
            )
    if stream and _kind(onload) == "cpu":
        raise BadInput(
            f"{method} with use_stream needs an accelerator to bring weights to, not "
            f"onload_device='{onload}'. Set use_stream=False."
        )


def _kind(device: str) -> str:
    return device.partition(":")[0]


def _is_there(device: str) -> bool:
    available = getattr(getattr(torch, _kind(device), None), "is_available", lambda: False)
    return _kind(device) == "cpu" or bool(available())


def check_others(method: str, pipe: Any, parts: dict[str, Any], onload: str) -> None:
    """Check that the parts which stay are where the networks compute.

    Raises:
        UnsupportedModel: If one is not.
    """
    kind = _kind(onload)
    for name, part in pipe.components.items():
        if name in parts or not isinstance(part, nn.Module) or hasattr(part, "_hf_hook"):
            continue
        first = None if is_bare(part) else next(part.parameters(), None)
        if first is not None and first.device.type != kind:
            raise UnsupportedModel(
                f"{method}: pipe.{name} is on {first.device}, but the networks will compute on "
                f"{onload}. Move it there (pipe.{name}.to('{onload}')), or offload it as well "
                "(text_encoders=True, vae=True)."
            )
