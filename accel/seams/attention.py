"""Every attention of a network as a function of queries, keys and values, whoever computes it.

The attention processors of diffusers, those behind its dispatcher and the older ones, end in one
call of `torch.nn.functional.scaled_dot_product_attention` within their module; linear attention
makes none, and neither does a network that was given a backend of its own. The call is taken there,
by a mode of torch that lasts as long as the call of the module: nothing is set for anybody else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from accel.errors import BadInput, UnsupportedModel
from accel.seams.layout import Layout
from accel.seams.modules import Module

MASKED = ("native", "_native_cudnn", "_native_efficient", "_native_math")
"""Backends that read masks as torch does; others read them otherwise (xformers adds booleans to the
scores), or not."""

SWITCHES = ("dropout_p", "is_causal", "enable_gqa")

UNREACHED = (
    "goes through torch's: it is linear, or computed otherwise (attention slicing, processors of "
    "xformers or your own, a backend set by set_attention_backend)"
)
"""Why none was taken; follows "no attention of …"."""

HIDDEN = -1e4
"""What is added to a score so that a key is not seen: this, or less; minus infinity as a rule."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What one attention is asked.

    Attributes:
        query: ``[B, H, S, D]``.
        key: ``[B, H, K, D]``; fewer heads where ``enable_gqa``.
        value: As ``key``.
        attn_mask: Boolean or additive, broadcast to ``[B, H, S, K]``.
        dropout_p: Share of weights to drop.
        is_causal: Whether a query sees no later key.
        scale: Factor of the logits; ``None`` is ``D**-0.5``.
        enable_gqa: Whether several query heads share one of keys and values.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def options(self) -> frozenset[str]:
        """Which of the options are not left as they are by default."""
        given = {name for name in ("attn_mask", "scale") if getattr(self, name) is not None}
        return frozenset(given | {name for name in SWITCHES if getattr(self, name)})

    def dense(self) -> Tensor:
        """What the network would have had, ``[B, H, S, D]``."""
        return functional.scaled_dot_product_attention(**vars(self))


Answer = Callable[[Asked], Tensor]


class Interception(TorchFunctionMode):
    """While it is entered, gives the answers of torch's attention."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call torch, but for attention; inside of it the mode is off."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._answer(Asked(*args, **kwargs))
        return func(*args, **kwargs)


def answer_attention(module: Module, answer: Answer) -> Callable[[], None]:
    """Compute an attention module's attention by ``answer``; returns the undo.

    Raises:
        UnsupportedModel: If the module is compiled: its attention is computed inside the graph.
    """
    if getattr(module.module, "_compiled_call_impl", None) is not None:
        raise UnsupportedModel(
            f"{module.denoiser.name}.{module.path} is compiled: its attention runs inside the "
            "graph, so methods of attention do not fit. Do not compile it."
        )

    def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with Interception(answer):
            return inner(*args, **kwargs)

    return module.wrap(around)


class Dispatched:
    """One of diffusers' attention backends.

    Args:
        name: As ``set_attention_backend`` takes it.
        owner: Name of the method that needs it, for the refusal.

    Raises:
        BadInput: If diffusers has no backend of that name.
        UnsupportedModel: If the package that it needs is not installed.
    """

    def __init__(self, name: str, owner: str) -> None:
        self._owner = owner
        known = [backend.value for backend in AttentionBackendName]
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"Did you mean {close[0]}?" if close else f"It has: {', '.join(known)}."
            raise BadInput(f"{owner}: diffusers has no attention backend {name!r}. {hint}")
        self._name = AttentionBackendName(name)
        try:
            attention_dispatch._check_attention_backend_requirements(self._name)
            attention_dispatch._maybe_download_kernel_for_backend(self._name)
        except (RuntimeError, ImportError, OSError) as error:
            raise UnsupportedModel(f"{owner}: {error}") from error
        registry = attention_dispatch._AttentionBackendRegistry
        self._checks = registry._constraints.get(self._name) or ()
        self._takes = frozenset(registry._supported_arg_names[self._name])

    def serves(self, asked: Asked) -> bool:
        """Whether it understands all that is asked: diffusers drops in silence what it does not."""
        takes = self._takes if self._name.value in MASKED else self._takes - {"attn_mask"}
        return asked.options <= takes

    def __call__(self, asked: Asked) -> Tensor:
        """Compute it, ``[B, H, S, D]``.

        Raises:
            UnsupportedModel: If the backend does not serve the device, the dtype or the width.
        """
        swapped = {name: getattr(asked, name).transpose(1, 2) for name in ("query", "key", "value")}
        given = vars(asked) | swapped
        try:
            for check in self._checks:
                check(**given)
        except ValueError as error:
            raise UnsupportedModel(
                f"{self._owner}: the backend {self._name.value} does not serve this network here: "
                f"{error} Choose another one, or leave it out of the plan."
            ) from error
        found: Tensor = attention_dispatch.dispatch_attention_fn(**given, backend=self._name)
        return found.transpose(1, 2)


def valid_text(mask: Tensor, layout: Layout) -> Tensor | None:
    """Which text tokens a mask of padding keeps. Reads the device once.

    Args:
        mask: As torch's attention takes it: booleans, or numbers that are added.
        layout: The tokens.

    Returns:
        Booleans ``[rows of the mask, text]`` on the CPU; ``None`` for a mask that is another:
        one that differs by query or head, hides image tokens, or adds something in between.
    """
    if mask.ndim != 4 or mask.shape[1:] != (1, 1, layout.tokens):
        return None
    keys = mask[:, 0, 0]
    kept = keys if keys.dtype == torch.bool else keys == 0
    hidden = keys.logical_not() if keys.dtype == torch.bool else keys <= HIDDEN
    plain = (kept | hidden).all() & kept[:, layout.image_span].all()
    told = torch.cat([kept[:, layout.text_span].flatten(), plain[None]]).cpu()
    return told[:-1].view(len(keys), layout.text) if told[-1] else None
