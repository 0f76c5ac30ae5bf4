"""Int8 weights and activations, these scaled by what was measured at each noise level.

Source: Shang et al., "Post-training Quantization on Diffusion Models" (PTQ4DM), arXiv 2211.15736,
section 3; scales for bins of noise levels are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from accel.attach import Site, Undo
from accel.errors import BadInput, UnsupportedModel
from accel.weights.fields import Form, Int8

if TYPE_CHECKING:
    from accel.seams.denoisers import Call, Inner, Layer, Result
    from accel.seams.quantizing import Quantized
    from accel.weights.scales import Scales


class Int8Static(Int8):
    """Compute the linear layers in int8, with scales of activations that were measured before.

    Needs the file of `accel calibrate int8`, which holds for one network and is refused for
    another. A layer has one scale for all tokens at a noise level; each call takes those of its
    step, by the host: no device is read, and nothing is searched while it runs. Meant for devices
    that cannot scale as they go; `weights.Int8Dynamic` needs no calibration. The original weights
    wait on the CPU and come back bit for bit when the plan comes off.
    """

    name: ClassVar[str] = "weights.Int8Static"
    source: ClassVar[str] = "arXiv 2211.15736, section 3"
    integers: ClassVar[bool] = True

    scales: Path | None = Field(
        default=None, description="file of scales; in a plan file relative to it"
    )
    sha256: str = Field(
        default="",
        pattern="^([0-9a-f]{64})?$",
        description="what the content of that file hashes to; empty: not checked",
    )

    def attach(self, site: Site) -> Iterator[Undo]:
        """Quantize the layers of every network.

        Raises:
            Conflict: Beside what takes a projection of the text for the same at every step, too.
        """
        yield site.claim("text projections")
        yield from super().attach(site)

    def known(self) -> Scales:
        """The scales.

        Raises:
            BadInput: If there are none, or their file is not what it should be.
        """
        from accel.weights.scales import read

        if self.scales is None:
            raise BadInput(
                f"{self.name} needs scales of the model's activations. Run `accel calibrate int8`: "
                "the plan that it writes has them; or take weights.Int8Dynamic, which needs none."
            )
        return read(self.scales, self.sha256)

    def _form(self, site: Site) -> Form:
        from accel.seams.identity import compared, identity

        try:
            known = self.known()
        except BadInput as error:
            raise UnsupportedModel(str(error)) from error
        differs = compared(known.model, identity(site.pipe), self.name) if known.model else None
        if differs is not None:
            raise UnsupportedModel(
                f"The scales of {self.name} were measured for {differs}. Calibrate it for this one "
                "(`accel calibrate int8`), or leave it out of the plan."
            )
        return Measured(known)


class Measured(Form):
    """Layers are quantized by scales that are known for each noise level."""

    def __init__(self, known: Scales) -> None:
        self._known = known

    def config(self, network: str, path: str) -> Any:
        """With the scale of the first bin: each call chooses its own."""
        import torch

        from accel.seams.quantizing import static

        scales = self._known.of(network, path)
        return None if scales is None else static(torch.from_numpy(scales[0].copy()))

    def follow(self, site: Site, done: Mapping[str, Quantized]) -> Iterator[Undo]:
        """Before each call take the scales of its noise level."""
        for denoiser in site.denoisers:
            yield site.around(denoiser, self._at_each(denoiser.name, done[denoiser.name]))

    def _at_each(self, network: str, done: Quantized) -> Layer:
        chosen: list[int] = []

        def layer(call: Call, inner: Inner) -> Result:
            now = self._known.bin(network, call.step.sigma) if done.originals else 0
            if chosen != [now]:
                chosen[:] = [now]
                for original in done.originals:
                    scales = self._known.of(network, original.path)
                    assert scales is not None
                    original.set_scale(float(scales[now].item()))
            return inner(call)

        return layer
