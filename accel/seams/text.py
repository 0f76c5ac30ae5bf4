"""The modules of a network that may see nothing but the text, found by structure.

Two kinds: keys and values of cross-attention, and what embeds a text, a caption or a label on its
way in. What is listed here in vain (its input turns out to change from step to step) does no harm.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from accel.seams.blocks import wrap_call
from accel.seams.denoisers import Denoiser
from accel.seams.modules import inside_graph

KEYS_AND_VALUES = re.compile(r"(^|_)(k|v|kv|key|value)(_|$)")
"""Children of a cross-attention: ``to_k``, ``norm_k``, ``add_v_proj``, ``to_k_ip``, …"""

TEXTUAL = re.compile(
    r"text|txt|caption|cap_|context|condition|prompt|clip|image_emb|add_emb|add_time|encoder_"
)
"""Names of what embeds a text, or another condition that is given once for a run."""

LABELS = re.compile(r"class_emb|y_emb")
"""Names of what embeds a label; some networks do it in every block."""

TIMED = re.compile(r"time|guidance|^act")
"""Names beside textual ones of what embeds the step."""


@dataclass(frozen=True)
class TextModule:
    """One module of one input that may depend on the text alone.

    Attributes:
        path: Where it is in the network.
        module: What stands there; below a LoRA, which may be switched while a run is under way.
        denoiser: The network.
    """

    path: str
    module: Any
    denoiser: Denoiser

    def wrap(self, around: Callable[..., Any]) -> Callable[[], None]:
        """Put ``around(inner, *args, **kwargs)`` around the module; returns the undo."""
        return wrap_call(self.module, around)


def find_text_modules(denoiser: Denoiser) -> tuple[TextModule, ...]:
    """The modules of a network whose calls may be repeated with the same text.

    Those inside a compiled graph are left out: nothing but the graph sees their calls.
    """
    paths = sorted({*_keys_and_values(denoiser.core), *_embedders(denoiser.core)})
    modules = dict(denoiser.core.named_modules())
    return tuple(
        TextModule(path, getattr(modules[path], "base_layer", modules[path]), denoiser)
        for path in paths
        if not inside_graph(denoiser, path) and not _is_random(modules[path])
    )


def _keys_and_values(core: Any) -> Iterator[str]:
    for path, owner in core.named_modules():
        if _is_cross(path.rsplit(".", 1)[-1], owner):
            yield from _outermost(owner, path)


def _outermost(owner: Any, path: str, named: bool = False) -> Iterator[str]:
    """The outermost modules of one input that are keys or values, or parts of such."""
    for name, child in owner.named_children():
        inherits = named or bool(KEYS_AND_VALUES.search(name))
        if inherits and takes_one(child):
            yield f"{path}.{name}"
        else:
            yield from _outermost(child, f"{path}.{name}", inherits)


def _is_cross(name: str, module: Any) -> bool:
    second = name.endswith("2") or "cross" in name
    attends = "Attention" in type(module).__name__
    return second and attends and bool(getattr(module, "is_cross_attention", True))


def _embedders(owner: Any, path: str = "", textual: bool = False) -> Iterator[str]:
    """The outermost modules of one input under a textual name."""
    for name, child in owner.named_children():
        where = f"{path}.{name}" if path else name
        inherits = textual and not TIMED.search(name)
        blocks = any(part.isdigit() for part in where.split("."))
        named = LABELS.search(name) or (TEXTUAL.search(name) and (textual or not blocks))
        if (named or inherits) and takes_one(child):
            yield where
        else:
            yield from _embedders(child, where, bool(named or inherits))


def takes_one(module: Any) -> bool:
    """Whether a module needs one input, and is no mere container."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    needed = [p for p in parameters if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    return len(needed) == 1


def _is_random(module: Any) -> bool:
    parts = module.modules()
    return any(isinstance(part, nn.Dropout) and part.p > 0 and part.training for part in parts)
