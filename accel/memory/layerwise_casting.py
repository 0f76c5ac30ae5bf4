"""Layerwise casting: weights are stored in fewer bits and widened, layer by layer, to compute.

Source: diffusers' layerwise casting (`ModelMixin.enable_layerwise_casting`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from accel.attach import Accelerator, Site, Undo

if TYPE_CHECKING:
    from accel.seams.casting import Casting

MIB = 2**20


class LayerwiseCasting(Accelerator):
    """Store the linear and convolution weights of the networks in 8 or 16 bits.

    Rounds the weights, so the output changes. Norms, position and patch embeddings stay as they
    are, and what diffusers' models say of themselves. Computes in the dtype that the network was
    loaded in. The original weights wait on the CPU (their bytes are in the report) and are put
    back, bit for bit, when the plan comes off: memory is saved on an accelerator, not on a CPU.
    Text encoders are left alone: they tell their dtype by their first weight.
    """

    name: ClassVar[str] = "memory.LayerwiseCasting"
    layer: ClassVar[str] = "memory"
    seam: ClassVar[str] = "weights"
    supports: ClassVar[str] = (
        "every denoiser that is wider than the storage, not compiled and not yet cast; with "
        "memory.GroupOffload where that uses no stream"
    )
    source: ClassVar[str] = (
        "https://huggingface.co/docs/diffusers/optimization/memory, Layerwise casting"
    )

    storage: Literal["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"] = Field(
        default="float8_e4m3fn",
        description="dtype of the weights between the calls of their layer; 'bfloat16' and "
        "'float16' for a network in float32 only",
    )

    @classmethod
    def off(cls) -> None:
        """Leave it out: its off is detached."""

    def why_off(self) -> None:
        """It always acts."""

    def attach(self, site: Site) -> Iterator[Undo]:
        """Cast the layers of every network.

        Raises:
            Conflict: Beside group offloading with a stream, which keeps copies of its own.
            UnsupportedModel: If a network is cast already, compiled, or no wider.
        """
        import torch

        from accel.seams.casting import cast_layers

        yield site.claim("weights on the CPU")
        castings: list[Casting] = []
        for denoiser in site.denoisers:
            found = cast_layers(
                f"pipe.{denoiser.name}", denoiser.core, getattr(torch, self.storage)
            )
            yield found.undo
            castings.append(found)
        layers, before, after, kept = (
            sum(getattr(casting, what) for casting in castings)
            for what in ("layers", "before", "after", "kept")
        )
        site.tally.memory = lambda: kept
        site.tally.change = (
            f"{layers} layers of {', '.join(denoiser.name for denoiser in site.denoisers)} are "
            f"stored in {self.storage}: {after / MIB:.3g} MiB in place of {before / MIB:.3g}; the "
            f"originals, {kept} bytes, wait on the CPU"
        )
