"""Which calls of a network a calibration rests on: drawn along the model's own trajectory.

PTQ4DM draws t ~ N(0.4·T, 0.4·T), held within [0, T − 1], t = 0 being the last step: more of the
nearly clean samples, some of all. A call is kept whole – x_t, t and condition together – with every
branch of guidance, so that what is replayed is what the network was asked.

Source: Shang et al., arXiv 2211.15736, section 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import PrivateAttr

from accel.attach import Site, Undo
from accel.calibration import Recorder
from accel.errors import UnsupportedModel
from accel.weights.int8_static import Int8Static
from accel.weights.scales import noise_share

if TYPE_CHECKING:
    from torch import Tensor

    from accel.seams.denoisers import Call, Inner, Result

CENTRE = SPREAD = 0.4

Draw = Literal["normal", "all"]


def drawn_steps(total: int, count: int, generator: np.random.Generator) -> Counter[int]:
    """How often each step is drawn, by its index: 0 is the noisiest."""
    times = generator.normal(CENTRE * total, SPREAD * total, count)
    held = np.clip(np.rint(times), 0, total - 1).astype(int)
    return Counter((total - 1 - held).tolist())


@dataclass(frozen=True)
class Sample:
    """One call of a network.

    Attributes:
        call: As it was, tensors copied.
        run: Which run of the pipeline it is of.
        share: Its noise level, see `accel.weights.scales`.
        weight: How often it was drawn.
    """

    call: Call
    run: int
    share: float
    weight: int

    def replay(self) -> Tensor:
        """What the network answers, ``[rows, …]``."""
        import torch

        from accel.seams.denoisers import Packing

        given = copied(self.call.arguments)
        with torch.no_grad():
            native = self.call.denoiser.module(**given)
        return Packing().unpack(native, bool(given.get("return_dict", True)))


def copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call, with containers and tensors of their own."""
    import torch
    from torch.utils._pytree import tree_map_only

    found: dict[str, Any] = tree_map_only(torch.Tensor, torch.clone, dict(arguments))
    return found


class Samples(Recorder):
    """Keeps some calls of a run, and changes nothing."""

    name: ClassVar[str] = "weights.Samples"
    layer: ClassVar[str] = "weights"
    seam: ClassVar[str] = "weights"
    supports: ClassVar[str] = Int8Static.supports
    source: ClassVar[str] = "arXiv 2211.15736, section 3"

    _how: tuple[Draw, int] = PrivateAttr(default=("normal", 32))
    _generator: np.random.Generator = PrivateAttr()
    _run: int = PrivateAttr(default=0)
    _drawn: Counter[int] | None = PrivateAttr(default=None)
    _kept: list[Sample] = PrivateAttr(default_factory=list)

    def drawing(self, draw: Draw, count: int, seed: int) -> Self:
        """The same, with so many draws a run."""
        self._how, self._generator = (draw, count), np.random.default_rng(seed)
        return self

    @property
    def kept(self) -> list[Sample]:
        """The calls, in the order in which they were made."""
        return self._kept

    def _look(self, site: Site) -> Iterator[Undo]:
        yield site.on_start(self._begin)
        for denoiser in site.denoisers:
            yield site.around(denoiser, self._keep)

    def _begin(self) -> None:
        self._run, self._drawn = self._run + 1, None

    def _keep(self, call: Call, inner: Inner) -> Result:
        weight = self._weight(call)
        if weight:
            own = replace(call, arguments=copied(call.arguments))
            self._kept.append(Sample(own, self._run, noise_share(call.step.sigma), weight))
        return inner(call)

    def _weight(self, call: Call) -> int:
        draw, count = self._how
        if draw == "all":
            return 1
        if self._drawn is None:
            if call.step.total is None:
                raise UnsupportedModel(
                    "int8: this pipeline cuts its schedule where no public call shows it, so steps "
                    "cannot be drawn of it: calibrate with draw=all."
                )
            self._drawn = drawn_steps(call.step.total, count, self._generator)
        return self._drawn[call.step.index]
