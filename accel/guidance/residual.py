"""Residual guidance: a virtual negative answer, read off the picture that a run starts from.

Source: Kodaira et al., "StreamDiffusion: A Pipeline-level Solution for Real-time Interactive
Generation", arXiv 2312.12491, section 3.2 (RCFG). Its recursion over the levels of a stream is the
closed form that stands here; the form for flows is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo
from accel.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

    from accel.guidance.branches import Missing, Pair
    from accel.seams.denoisers import Call


class Residual(Accelerator):
    """Guide from δ·s, s = (x − α·x0)/σ: e = δ·s + w(c − δ·s), where s leads back to the input x0.

    ``self`` takes for x0 the latents of the input picture (N evaluations for N steps), ``onetime``
    what the network makes of the negative prompt at the first step (N + 1). For image-to-image and
    clip-to-clip: a run that starts from noise alone has no input, is guided as usual, and the
    report says so. No device read, but one a run for packed tokens.
    """

    name: ClassVar[str] = "guidance.Residual"
    layer: ClassVar[str] = "guidance"
    seam: ClassVar[str] = "branches"
    supports: ClassVar[str] = "image-to-image with batched or two-call guidance"
    source: ClassVar[str] = "arXiv 2312.12491, section 3.2 (RCFG)"

    negative: Literal["none", "self", "onetime"] = Field(
        default="onetime",
        description="what the virtual negative leads back to: the input ('self'; the negative "
        "prompt is not used), the negative prompt's picture at the first step ('onetime'), or "
        "'none': off",
    )
    delta: float = Field(
        default=1.0,
        ge=0.0,
        description="δ, scale of the virtual noise; below 1 guides less. At pure noise of a flow, "
        "and where the network itself answered, it is 1",
    )

    @classmethod
    def off(cls) -> Self:
        """No virtual negative."""
        return cls(negative="none")

    def why_off(self) -> str | None:
        """Without a virtual negative guidance is as usual."""
        return "negative is none" if self.negative == "none" else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around every denoiser, and watch what noise is added to."""
        from accel.guidance.branches import Unconditional, claim_all
        from accel.seams.noising import watch

        yield from claim_all(site)
        origin = Origin(self, site)
        yield site.on_start(origin.reset)
        if self.negative == "self":
            yield site.on_start(lambda: _look_for_negative(site))
        yield from watch(site.pipe.scheduler, origin.begin)
        engine = Unconditional(site.tally, origin.needed, origin.keep, origin.estimate)
        yield from engine.attach(site)
        idle = site.tally.reason
        site.tally.reason = lambda: origin.why_idle() or idle()


def _look_for_negative(site: Site) -> None:
    """Say so where a call has a negative prompt, which ``self`` does not use."""
    from accel.seams.underway import negative_texts

    if any(any(texts) for texts in negative_texts(site.pipe).values()):
        site.tally.advise(
            "the negative prompt of this run is not used: with negative='self' the input picture "
            "stands in its place. Use negative='onetime', or leave the negative prompt out"
        )


class Origin:
    """The clean latents that each sample of a run is guided away from."""

    def __init__(self, method: Residual, site: Site) -> None:
        self._method = method
        self._trajectory = site.trajectory
        self._input: Tensor | None = None
        self._negative: dict[int, Tensor] = {}
        self._asked = False

    def reset(self) -> None:
        """Forget the input of the run before."""
        self._input = None
        self._negative.clear()
        self._asked = False

    def begin(self, clean: Tensor) -> None:
        """Keep what noise is added to before the first step; inpainting adds more, later."""
        if self._trajectory.index == 0 and self._input is None:
            self._input = clean.detach().clone()

    def why_idle(self) -> str | None:
        """Why there was no virtual negative."""
        if self._asked and self._input is None:
            return "the run starts from noise alone: residual guidance needs an input picture"
        return None

    def needed(self, _call: Call, sample: int) -> bool:
        """Whether the network answers for the negative prompt."""
        self._asked = True
        if self._input is None:
            return True
        return self._method.negative == "onetime" and sample not in self._negative

    def keep(self, call: Call, pairs: dict[int, Pair]) -> None:
        """Keep the clean latents that the negative prompt leads to at the first step."""
        from accel.seams.spaces import convert, matching

        if self._input is None:
            return
        network = type(call.denoiser.core).__name__
        for sample, pair in pairs.items():
            x, y = matching(pair.x, pair.uncond)
            self._negative[sample] = convert(y.float(), x.float(), call.step, "x0", network)

    def estimate(self, missing: Missing) -> Tensor:
        """The virtual negative, in the network's own terms."""
        from accel.seams.spaces import answer, matching

        step, network = missing.call.step, type(missing.call.denoiser.core).__name__
        x, _ = matching(missing.x, missing.cond)
        clean = self._negative.get(missing.sample)
        if clean is None:
            clean = self._as_row(missing, x)
        delta = 1.0 if step.level[1] == 0.0 else self._method.delta
        virtual = answer(x.float(), clean, step, network, delta)
        if virtual.shape == missing.cond.shape:
            return virtual
        whole = missing.cond.float().clone()  # PixArt's variance is that of the conditional answer
        whole[: virtual.shape[0]] = virtual
        return whole

    def _as_row(self, missing: Missing, x: Tensor) -> Tensor:
        """The input's latents in the form of a row of the network's input."""
        from accel.seams.grids import grid_of

        assert self._input is not None
        clean = self._input[missing.sample % len(self._input)].float()
        if clean.shape != x.shape:
            if clean.numel() != x.numel():
                raise UnsupportedModel(
                    f"{self._method.name}: noise is added to latents {tuple(clean.shape)}, and the "
                    f"network is given {tuple(x.shape)}: leave it out of the plan."
                )
            clean = grid_of(missing.call).pack(clean, x.float())
        self._negative[missing.sample] = clean
        return clean
