"""What a pipeline is, and which methods fit it: found out by attaching each for a moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accel.errors import AccelError
from accel.plan import Plan, methods


@dataclass(frozen=True)
class Fit:
    """Whether one method fits a pipeline.

    Attributes:
        method: Its name.
        fits: Whether it attaches.
        reason: Why not, or what it serves.
    """

    method: str
    fits: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What a pipeline is to us.

    Attributes:
        pipeline: Class name.
        denoisers: ``name: class (parameters in millions)``.
        scheduler: Class name.
        layout: How guidance is laid out, or why that is not known.
        fits: One entry a method.
    """

    pipeline: str
    denoisers: tuple[str, ...]
    scheduler: str
    layout: str
    fits: tuple[Fit, ...]

    def __str__(self) -> str:
        head = [
            f"{self.pipeline}",
            *(f"  denoiser   {denoiser}" for denoiser in self.denoisers),
            f"  scheduler  {self.scheduler}",
            f"  guidance   {self.layout}",
        ]
        rows = [
            f"  {'fits' if fit.fits else 'no  '}  {fit.method:<22} {fit.reason}"
            for fit in self.fits
        ]
        return "\n".join([*head, *rows])


def explain(pipe: Any) -> Explanation:
    """Say what a pipeline is, which methods fit it, and why not the others.

    Raises:
        UnsupportedModel: If it has no denoiser that can be followed.
    """
    from accel.seams.branches import layout_of
    from accel.seams.denoisers import find_denoisers

    denoisers = []
    for denoiser in find_denoisers(pipe):
        millions = sum(weight.numel() for weight in denoiser.core.parameters()) / 1e6
        denoisers.append(f"{denoiser.name}: {type(denoiser.core).__name__} ({millions:.1f} M)")
    try:
        layout = layout_of(pipe)
        described = f"{layout.style}, {' + '.join(layout.order)}"
    except AccelError as error:
        described = str(error)
    return Explanation(
        type(pipe).__name__,
        tuple(denoisers),
        type(pipe.scheduler).__name__,
        described,
        tuple(_try(name, kind, pipe) for name, kind in methods().items()),
    )


def _try(name: str, kind: Any, pipe: Any) -> Fit:
    try:
        Plan(kind()).attach(pipe).detach()
    except AccelError as error:
        return Fit(name, False, str(error))
    return Fit(name, True, kind.supports)
