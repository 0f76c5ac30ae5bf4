"""What a tuned plan promises, on what it was measured, and for which pipeline: its evidence."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator

from accel.errors import AccelWarning, PlanError, UnsupportedModel

if TYPE_CHECKING:
    from accel.attach import Run

NUMBERS = (
    "num_inference_steps",
    "height",
    "width",
    "num_frames",
    "guidance_scale",
    "true_cfg_scale",
    "strength",
)
"""Arguments of a call that what is promised depends on."""

Elsewhere = Literal["refuse", "warn"]


class Entry(BaseModel):
    """A part of the evidence: frozen, and without fields that are not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Network(Entry):
    """What figures are of: networks, and the scheduler that a pipeline has of its own.

    Attributes:
        identity: Of the denoisers (`accel.seams.identity`).
        scheduler: Class name.
        pipeline: Class name.
    """

    identity: str
    scheduler: str
    pipeline: str

    @classmethod
    def of(cls, pipe: Any) -> Self:
        """That of a pipeline."""
        from accel.seams.identity import identity

        return cls(
            identity=identity(pipe),
            scheduler=type(pipe.scheduler).__name__,
            pipeline=type(pipe).__name__,
        )

    def difference(self, here: Network) -> str | None:
        """In what another one differs, in words; ``None`` where figures of this one are its own."""
        from accel.seams.identity import difference

        found = difference(self.identity, here.identity)
        if found is None and here.scheduler != self.scheduler:
            found = f"another scheduler: {self.scheduler}, not {here.scheduler}"
        return found


class Figure(Entry):
    """One measure over the prompts that the plan was checked on.

    Attributes:
        measure: Its name.
        mean: Mean over the prompts; of ``speedup`` and ``seconds`` the median.
        low: Lower end of its 95 % confidence interval.
        high: Upper end.
        share: Of the prompts that meet the target one by one, if there is one for this measure.
        share_low: Lower end of the 95 % confidence interval of that share (Wilson).
    """

    measure: str
    mean: float
    low: float
    high: float
    share: float | None = None
    share_low: float | None = None


class Tuned(Entry):
    """The evidence that `accel.tune` and `accel.prove` leave in a plan.

    Attributes:
        targets: What was asked for, as in ``ssim>=0.95``.
        elsewhere: What attaching to another network does: ``refuse`` or ``warn``.
        methods: Digest of the methods that this is the evidence of.
        network: Identity of the denoisers (`accel.seams.identity`).
        pipeline: Class name.
        scheduler: Class name of the pipeline's own.
        call: Numbers of the call, by name.
        machine: What the seconds were measured on.
        versions: Of packages.
        prompts: How many the search saw; 0: there was none, the plan was written by hand.
        chosen_on: How many others chose among what it found; 0: the held-out ones did.
        held_out: On how many others the figures were measured.
        texts: Digest of the prompts that they were measured on.
        figures: What was measured on those.
        plans: How many plans were tried.
        minutes: What the search took, or the proof where there was none.
        date: When it was measured.
    """

    targets: tuple[str, ...]
    elsewhere: Elsewhere = "refuse"
    methods: str
    network: str
    pipeline: str
    scheduler: str
    call: tuple[tuple[str, float], ...]
    machine: str
    versions: tuple[tuple[str, str], ...]
    prompts: int
    chosen_on: int = 0
    held_out: int
    texts: str
    figures: tuple[Figure, ...] = Field(min_length=1)
    plans: int
    minutes: float
    date: str

    @field_validator("call", "versions", mode="before")
    @classmethod
    def _from_table(cls, value: Any) -> Any:
        return tuple(value.items()) if isinstance(value, Mapping) else value

    @field_serializer("call", "versions", when_used="json")
    def _as_table(self, value: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
        return {name: int(one) if _is_whole(one) else one for name, one in value}

    def figure(self, measure: str) -> Figure:
        """What was measured of one measure.

        Raises:
            KeyError: If it was not.
        """
        for figure in self.figures:
            if figure.measure == measure:
                return figure
        raise KeyError(measure)

    @property
    def seen(self) -> int:
        """How many prompts it was searched and chosen on: on others it is to be proven."""
        return self.prompts + self.chosen_on

    @property
    def measured(self) -> str:
        """The figures, in words: ``ssim 0.97 (0.96 to 0.98; 95% meet it), …``."""
        return ", ".join(
            f"{one.measure} {one.mean:.4g} ({one.low:.4g} to {one.high:.4g}"
            + (f"; {one.share:.0%} meet it" if one.share is not None else "")
            + ")"
            for one in self.figures
        )

    def check_methods(self, digest: str) -> None:
        """Refuse to be the evidence of other methods.

        Raises:
            PlanError: If they were changed by hand.
        """
        if digest != self.methods:
            raise PlanError(
                "The methods of this plan were changed after it was tuned, so its evidence is of "
                "another one: remove the table [tuned], or tune again (`accel tune`)."
            )

    def check(self, pipe: Any) -> None:
        """Compare the pipeline that the plan is about to be attached to.

        Raises:
            UnsupportedModel: If it is another network, and ``elsewhere`` is ``refuse``.
        """
        told = self.misfit(Network.of(pipe))
        if told is None:
            return
        if self.elsewhere == "refuse":
            raise UnsupportedModel(
                f'{told} Tune one for this pipeline (`accel tune`), or set elsewhere = "warn" in '
                "the plan's table [tuned] (`--set tuned.elsewhere=warn`)."
            )
        warnings.warn(told, AccelWarning, stacklevel=4)

    def misfit(self, here: Network) -> str | None:
        """Why what it promises is not promised for a pipeline; ``None``: it is."""
        there = Network(identity=self.network, scheduler=self.scheduler, pipeline=self.pipeline)
        found = there.difference(here)
        if found is None:
            return None
        return (
            f"The plan was tuned for {found} (a {self.pipeline}; this is a {here.pipeline}): what "
            "it promises does not hold here."
        )

    def watch(self, run: Run) -> None:
        """Have each run say so where its call is another one than those that were measured."""

        def compare() -> None:
            from accel.seams.underway import arguments_of

            other = differences(self.call, numbers_of(arguments_of(run.pipe)))
            if other:
                warnings.warn(
                    f"The plan was tuned for {other[0]}, this call has {other[1]}: what it "
                    "promises was not measured for that.",
                    AccelWarning,
                    stacklevel=2,
                )

        run.trajectory.starts.append(compare)


def numbers_of(call: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """The numbers of a call that figures depend on, by name."""
    return tuple(
        (name, float(call[name])) for name in NUMBERS if isinstance(call.get(name), int | float)
    )


def differences(
    expected: Sequence[tuple[str, float]], found: Sequence[tuple[str, float]]
) -> tuple[str, str] | None:
    """The numbers that are others, in words; what only one of them names is not compared."""
    known, now = dict(expected), dict(found)
    other = [name for name in known if name in now and known[name] != now[name]]
    if not other:
        return None
    expected_text, found_text = (
        ", ".join(f"{name}={one[name]:g}" for name in other) for one in (known, now)
    )
    return expected_text, found_text


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def digest_of(methods: Mapping[str, Any]) -> str:
    """A digest of methods as ``Plan.to_dict`` writes them."""
    return hashlib.sha256(json.dumps(methods, sort_keys=True).encode()).hexdigest()[:16]
