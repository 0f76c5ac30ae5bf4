"""Group offload: weights wait elsewhere and come, group by group, when they are needed.

Source: diffusers' group offloading (`diffusers.hooks.apply_group_offloading`), the layer streaming
of Superpipeline (arXiv 2410.08791) in diffusers' own form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from accel.attach import Accelerator, Site, Undo

if TYPE_CHECKING:
    from accel.seams.offload import Placement


class GroupOffload(Accelerator):
    """Keep the networks' weights on one device and bring them to another in groups. Lossless.

    What a cache skips is not brought. The hooks sit below all others of a plan and come off with
    it; weights go back to where they were.
    """

    name: ClassVar[str] = "memory.GroupOffload"
    layer: ClassVar[str] = "memory"
    seam: ClassVar[str] = "weights"
    supports: ClassVar[str] = "every denoiser, text encoder and autoencoder, not yet offloaded"
    source: ClassVar[str] = "diffusers.hooks.apply_group_offloading; arXiv 2410.08791"
    approximates: ClassVar[bool] = False

    offload_type: Literal["block_level", "leaf_level"] = Field(
        default="block_level",
        description="a group is some blocks of a list, or ('leaf_level': least memory, most "
        "transfers) each layer by itself",
    )
    num_blocks_per_group: int = Field(
        default=1, ge=1, description="blocks in a group at 'block_level'; with a stream always 1"
    )
    use_stream: bool = Field(
        default=False,
        description="bring the next group while one computes; needs an accelerator, and pinned "
        "memory for all weights",
    )
    onload_device: str = Field(
        default="auto",
        description="where the networks compute; 'auto': this machine's accelerator, or its CPU",
    )
    offload_device: str = Field(default="cpu", description="where weights wait")
    text_encoders: bool = Field(default=False, description="the text encoders too")
    vae: bool = Field(default=False, description="the autoencoder too")

    @classmethod
    def off(cls) -> None:
        """Leave it out: its off is detached."""

    def why_off(self) -> None:
        """It always acts."""

    def attach(self, site: Site) -> Iterator[Undo]:
        """Hook the networks, and the other parts that were asked for.

        Raises:
            BadInput: If this machine has no such device.
            Conflict: With a stream, beside another method that keeps weights on the CPU.
            UnsupportedModel: If a part is offloaded already, or waits on another device.
        """
        from accel.seams.offload import check_devices, check_others, compute_device, offload

        yield site.claim("places of weights")
        if self.use_stream:  # weights come from pinned copies of the attached ones
            yield site.claim("weights on the CPU")
        onload = compute_device(self.onload_device)
        check_devices(self.name, onload, self.offload_device, self.use_stream)
        parts = self._parts(site)
        check_others(self.name, site.pipe, parts, onload)
        groups = 0
        for part, module in parts.items():
            placed: Placement = offload(
                f"pipe.{part}",
                module,
                onload_device=onload,
                offload_device=self.offload_device,
                offload_type=self.offload_type,
                num_blocks_per_group=self.num_blocks_per_group,
                use_stream=self.use_stream,
            )
            yield placed.undo
            groups += placed.groups
        site.tally.change = (
            f"{groups} groups of {', '.join(parts)} wait on {self.offload_device}, compute on "
            f"{onload}"
        )

    def _parts(self, site: Site) -> dict[str, object]:
        parts = {denoiser.name: denoiser.core for denoiser in site.denoisers}
        for name, part in site.pipe.components.items():
            texts = self.text_encoders and name.startswith("text_encoder")
            if part is not None and (texts or (self.vae and name == "vae")):
                parts[name] = part
        return parts
