"""Attention by another of diffusers' backends: flash, sage, cuDNN, xformers, Flex and others.

Source: https://huggingface.co/docs/diffusers/optimization/attention_backends. Beyond its
``set_attention_backend`` this serves networks with processors of the older kind (UNets, SD3,
PixArt, CogVideoX, …) as well, and leaves no backend set for the networks that come after.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from accel.attach import Accelerator, Site, Undo

if TYPE_CHECKING:
    from torch import Tensor

    from accel.report import Tally
    from accel.seams.attention import Asked, Dispatched


class Backend(Accelerator):
    """Compute attention by a backend of diffusers. Exact, or as exact as the backend's numbers.

    A backend is not asked what it does not take, such as masks that it reads otherwise than torch:
    such calls, those of padded texts for the most part, stay as they were, and the report counts
    them.
    """

    name: ClassVar[str] = "attention.Backend"
    layer: ClassVar[str] = "attention"
    seam: ClassVar[str] = "attention"
    supports: ClassVar[str] = (
        "every network with softmax attention that is not compiled; what the backend itself needs "
        "(package, device, dtype) is checked"
    )
    source: ClassVar[str] = "https://huggingface.co/docs/diffusers/optimization/attention_backends"
    approximates: ClassVar[bool] = False

    backend: str = Field(
        default="native",
        description="name as diffusers has it: native, _native_cudnn, _native_flash, "
        "_native_efficient, _native_math, flex, xformers, flash, _flash_3, flash_hub, sage, "
        "sage_hub and more",
    )

    @classmethod
    def off(cls) -> None:
        """Leave it out: a backend always computes."""

    def why_off(self) -> None:
        """It always acts."""

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the backend into every attention of every network.

        Raises:
            BadInput: If diffusers has no such backend.
            UnsupportedModel: If its package is missing, or a network's attention cannot be reached.
        """
        from accel.seams.attention import Dispatched, answer_attention
        from accel.seams.modules import find_modules

        yield site.claim("attention")
        computed = Computed(site.tally, Dispatched(self.backend, self.name), self.backend)
        yield site.on_start(computed.reset)
        for denoiser in site.denoisers:
            for module in find_modules(denoiser):
                if module.kind != "mlp":
                    yield answer_attention(module, computed)


class Computed:
    """What the backend computed in a run."""

    def __init__(self, tally: Tally, backend: Dispatched, name: str) -> None:
        self._tally = tally
        self._backend = backend
        self._name = name
        tally.reason = self._why_idle
        self.reset()

    def reset(self) -> None:
        """Forget the run before."""
        self._done = self._left = 0
        self._tally.change = None

    def __call__(self, asked: Asked) -> Tensor:
        """Compute one attention, ``[B, H, S, D]``."""
        served = self._backend.serves(asked)
        answer = self._backend(asked) if served else asked.dense()
        self._done, self._left = self._done + served, self._left + (not served)
        self._tally.change = self._said() if self._done else None
        return answer

    def _said(self) -> str:
        said = f"{self._done} attentions by {self._name}"
        return said + (
            f"; {self._left} that it does not take stayed as they were" if self._left else ""
        )

    def _why_idle(self) -> str:
        if self._left:
            return (
                f"{self._name} takes none of the {self._left} attentions (masks, causality, groups)"
            )
        from accel.seams.attention import UNREACHED

        return f"no attention of the network {UNREACHED}"
