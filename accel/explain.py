"""What a pipeline is, and which methods fit it: found out by attaching each for a moment."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accel.attention.sparse import Sparse
from accel.errors import AccelError, UnsupportedModel
from accel.plan import Plan, methods

if TYPE_CHECKING:
    from accel.attention.sizes import Payoff
    from accel.expected import Expectation


UNASKED = (
    "From which resolution and length on sparse attention pays is measured by accel explain "
    "--sparse, or where explain is given the arguments of a call."
)


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
        sparse: From which resolution and length on each sparse attention pays, if that was asked
            for.
        presets: What each preset may be expected to do here, and how sure that is.
    """

    pipeline: str
    denoisers: tuple[str, ...]
    scheduler: str
    layout: str
    fits: tuple[Fit, ...]
    sparse: tuple[Payoff, ...] = ()
    presets: tuple[Expectation, ...] = ()

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
        presets = [f"preset {one.preset:<8} {one}" for one in self.presets]
        more = [f"  {line}" for line in (*self.paying, *presets, *self.measured)]
        return "\n".join([*head, *rows, *more])

    @property
    def measured(self) -> tuple[str, ...]:
        """What the figures of the presets were measured for, a line for each file of results."""
        figures = (figure for one in self.presets for figure in one.figures)
        return tuple(dict.fromkeys(figure.conditions for figure in figures))

    @property
    def paying(self) -> tuple[str, ...]:
        """From which resolution and length on sparse attention pays, or how to learn it."""
        if self.sparse:
            return tuple(f"{one.method} {one}" for one in self.sparse)
        if any(fit.fits and issubclass(methods()[fit.method], Sparse) for fit in self.fits):
            return (UNASKED,)
        return ()


def explain(
    pipe: Any,
    call: Mapping[str, Any] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
) -> Explanation:
    """Say what a pipeline is, which methods fit it, why not the others, and what presets do.

    Args:
        pipe: The pipeline.
        call: Arguments of a call of it, the prompt among them. With them it is measured from which
            resolution and length on sparse attention pays, in some ten seconds: the call is begun,
            up to the first answer of a network, and then attention alone is timed, as that network
            gave it and on larger and larger sizes.
        settings: Numbers of the call that is meant, such as ``num_inference_steps``: what is
            expected of the presets is for them, and what they do not name is not compared. By
            default those of ``call``.

    Raises:
        UnsupportedModel: If it has no denoiser that can be followed; with a call, if the order of
            its tokens is not known, or it has no attention over them.
    """
    from accel.expected import expected
    from accel.seams.branches import layout_of
    from accel.seams.denoisers import find_denoisers

    denoisers, branches = [], None
    for denoiser in find_denoisers(pipe):
        millions = sum(weight.numel() for weight in denoiser.core.parameters()) / 1e6
        denoisers.append(f"{denoiser.name}: {type(denoiser.core).__name__} ({millions:.1f} M)")
    try:
        layout = layout_of(pipe)
        described, branches = f"{layout.style}, {' + '.join(layout.order)}", len(layout.order)
    except AccelError as error:
        described = str(error)
    return Explanation(
        type(pipe).__name__,
        tuple(denoisers),
        type(pipe.scheduler).__name__,
        described,
        tuple(_try(name, kind, pipe) for name, kind in methods().items()),
        () if call is None else _sparse(pipe, call),
        expected(pipe, (call if settings is None else settings) or {}, branches),
    )


def _sparse(pipe: Any, call: Mapping[str, Any]) -> tuple[Payoff, ...]:
    import torch

    from accel.attention import sizes

    looking = sizes.Looking()
    run = Plan(looking).attach(pipe)
    with suppress(sizes.Enough), torch.random.fork_rng():
        try:
            pipe(**{name: _copied(value) for name, value in call.items()})
        finally:
            run.detach()
    if looking.found is None:
        raise UnsupportedModel(
            f"No attention of {type(pipe).__name__} looks from image tokens at image tokens, or it "
            "is linear: there is nothing for sparse attention to leave out."
        )
    kinds = [kind for kind in methods().values() if issubclass(kind, Sparse)]
    return sizes.paying(looking.found, [kind() for kind in kinds], sizes.BUDGET)


def _copied(value: Any) -> Any:
    """An argument of a call, so that no generator of the caller's draws anything."""
    import torch

    from accel.seams.seeding import restarted

    if isinstance(value, list):
        return [_copied(one) for one in value]
    return restarted(value) if isinstance(value, torch.Generator) else value


def _try(name: str, kind: Any, pipe: Any) -> Fit:
    try:
        Plan(kind()).attach(pipe).detach()
    except AccelError as error:
        return Fit(name, False, str(error))
    return Fit(name, True, kind.supports)
