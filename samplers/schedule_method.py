"""Another noise schedule, on whatever scheduler the pipeline has.

Where a run evaluates its network matters as much as the solver. Closed forms, published tables and
lists that were searched for (`accel calibrate schedule`) all become the arguments of the
scheduler's own ``set_timesteps``, so that image-to-image strength, begin indices and time shifts
work as before.

Source: `samplers.schedules` names a paper for each kind.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from accel.attach import Accelerator, Site, Undo
from accel.errors import AccelWarning, BadInput, Conflict, UnsupportedModel
from samplers.fingerprint import Fingerprint, model_digest
from samplers.schedules.tables import Table

if TYPE_CHECKING:
    from accel.seams.lists import Lists

Kind = Literal[
    "own", "uniform_lambda", "logsnr", "arctan", "polynomial", "sqrt_time", "ays", "listed"
]

Levels = tuple[float, ...]


def _descending(levels: Levels) -> Levels:
    """The levels, if they are σ/α from noise to data."""
    if any(not level > 0.0 for level in levels) or any(math.isinf(x) for x in levels[1:]):
        raise ValueError(
            "levels must be σ/α above 0, of which the first may be inf; the end of a run is not "
            "among them"
        )
    if any(b >= a for a, b in itertools.pairwise(levels)):
        raise ValueError("levels must fall from noise to data without repeats")
    return levels


class Searched(BaseModel):
    """What the file of a searched schedule holds.

    Attributes:
        format: Of this file.
        method: Name of the search.
        levels: σ/α of each evaluation, descending; ``inf`` at pure noise.
        sampler: What it was searched with, as in ``samplers.DPMSolverPP``.
        fingerprint: What it was searched on.
        note: How, in a line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    method: str
    levels: Levels = Field(min_length=1)
    sampler: str = ""
    fingerprint: Fingerprint
    note: str = ""

    @field_validator("levels")
    @classmethod
    def _levels_descend(cls, levels: Levels) -> Levels:
        return _descending(levels)

    def to_bytes(self) -> bytes:
        """The file's content: JSON, with infinity as text."""
        document = self.model_dump(mode="json")
        document["levels"] = ["inf" if math.isinf(x) else x for x in self.levels]
        return (json.dumps(document, indent=1) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> Self:
        """The content of a file.

        Raises:
            BadInput: If it is not there, or is no such file.
        """
        try:
            return cls.model_validate(json.loads(path.read_bytes()))
        except OSError as error:
            raise BadInput(
                f"The schedule {path} cannot be read ({error.strerror}): give the path of a file "
                "that `accel calibrate schedule` wrote."
            ) from error
        except (ValueError, ValidationError) as error:
            raise BadInput(
                f"{path} holds no schedule ({str(error).splitlines()[0]}): write one by `accel "
                "calibrate schedule`."
            ) from error


class Schedule(Accelerator):
    """Choose where the run evaluates: other noise levels, the same number of them.

    The ends of the pipeline's own schedule stay, except where the kind has ends of its own
    (``logsnr``, ``ays``, ``listed``); ``arctan`` keeps the first evaluation and where the run ends.
    Levels are σ/α, so that one list serves every process; schedulers that take whole timesteps get
    the nearest. Schedules are best for the network, guidance and solver that they were made for.
    """

    name: ClassVar[str] = "samplers.Schedule"
    layer: ClassVar[str] = "sampler"
    seam: ClassVar[str] = "schedule"
    supports: ClassVar[str] = (
        "our samplers; stock Euler, DPM-Solver++, DDPM, and UniPC for flows; no scheduler that "
        "takes no list, such as DDIM"
    )
    source: ClassVar[str] = "arXiv 2206.00927, 2206.00364, 2204.13902, 2404.14507, 2405.11326"
    approximates: ClassVar[bool] = False

    kind: Kind = Field(
        default="arctan",
        description="uniform_lambda: even in λ = −ln(σ/α) between the schedule's own ends; logsnr: "
        "even in log-SNR (2λ) over the whole range that was trained; arctan: even in "
        "arctan(σ/(α·c)); polynomial: even in (σ/α)^(1/rho); sqrt_time: even in the root of the "
        "training time, as DEIS has it; ays: Align Your Steps; listed: levels or file; own leaves "
        "the schedule as it is",
    )
    c: float = Field(
        default=1.0,
        gt=0.0,
        description="arctan: standard deviation of the data, 1 for latents, 0.5 for pixels; times "
        "the time shift for a flow that is shifted",
    )
    rho: float = Field(default=7.0, gt=0.0, description="polynomial: its degree; 7 in EDM")
    noise: float = Field(
        default=20.0,
        gt=0.0,
        description="uniform_lambda, polynomial: σ/α that pure noise counts as, for where the "
        "other levels lie; SD starts at 14.6",
    )
    table: Table = Field(default="sd", description="ays: the model it was found for")
    levels: Levels = Field(
        default=(),
        description="listed: σ/α of each evaluation, descending; inf is pure noise; without the "
        "end of the run",
    )
    file: Path | None = Field(
        default=None, description="listed: what accel calibrate schedule wrote"
    )
    interpolate: bool = Field(
        default=False, description="listed: serve other numbers of steps, log-linearly (ays does)"
    )

    @field_validator("levels")
    @classmethod
    def _levels_descend(cls, levels: Levels) -> Levels:
        return _descending(levels)

    @model_validator(mode="after")
    def _one_list(self) -> Self:
        given = bool(self.levels) + (self.file is not None)
        if given != (self.kind == "listed"):
            raise BadInput(
                f"samplers.Schedule with kind={self.kind!r} has {given} lists: kind='listed' "
                "needs one, levels or file, and other kinds none."
            )
        return self

    @classmethod
    def off(cls) -> Self:
        """The pipeline's own schedule."""
        return cls(kind="own")

    def why_off(self) -> str | None:
        """Whether the schedule stays as it is."""
        return "kind is own" if self.kind == "own" else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Stand in front of the scheduler's ``set_timesteps``."""
        from accel import hooks
        from accel.seams.lists import Lists, bound

        scheduler = site.pipe.scheduler
        refuse_own_levels(scheduler, self.name)
        lists = Lists(scheduler, self.name)
        listed, searched = self._listed(site.pipe)
        if self.kind == "ays" and lists.flow:
            raise UnsupportedModel(
                "samplers.Schedule with kind='ays' does not fit: its tables are for Stable "
                "Diffusion, and this pipeline is a flow. Use kind='arctan', or search one by "
                "`accel calibrate schedule`."
            )
        yield site.claim(self.seam)

        def ask(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            given, count = bound(type(scheduler).set_timesteps, (scheduler, *args), kwargs)
            if searched is not None:
                _warn_of_guidance(site.pipe, searched.fingerprint)
            if self.kind == "listed":
                levels = self._resampled(listed, count)
            else:
                inner(*args, **kwargs)
                levels = self._ramp(lists, count)
            result = inner(**lists.arguments(levels, given))
            lists.check(levels)
            return result

        yield hooks.wrap(scheduler, "set_timesteps", ask)
        site.tally.change = f"{self._summary()} in place of the {type(scheduler).__name__}'s own"

    def _summary(self) -> str:
        if self.kind == "listed":
            return f"a list of levels{f' ({self.file.name})' if self.file else ''}"
        settings = {"arctan": f", c {self.c:g}", "polynomial": f", rho {self.rho:g}"}
        settings["ays"] = f" for {self.table}"
        return f"{self.kind}{settings.get(self.kind, '')}"

    def _listed(self, pipe: Any) -> tuple[Levels, Searched | None]:
        """The levels of the list, and the file, checked against the pipeline, they are from."""
        if self.file is None:
            return self.levels, None
        found = Searched.read(self.file)
        try:
            found.fingerprint.check(f"the schedule {self.file.name}", **_facts(pipe))
        except BadInput as error:
            raise UnsupportedModel(str(error)) from error
        return found.levels, found

    def _resampled(self, levels: Levels, count: int) -> list[float]:
        from samplers.schedules.ramps import resample

        if len(levels) == count:
            return list(levels)
        if not self.interpolate:
            raise BadInput(
                f"samplers.Schedule has a list of {len(levels)} levels, and the run asks for "
                f"{count} steps. Ask for {len(levels)}, search a schedule of {count}, or set "
                "interpolate=True."
            )
        import numpy as np

        return [float(level) for level in resample(np.array(levels), count)]

    def _ramp(self, lists: Lists, count: int) -> list[float]:
        """Levels of a closed form between the ends of the scheduler's present schedule."""
        import numpy as np

        from samplers.schedules import ramps
        from samplers.schedules.tables import align_your_steps

        levels, end = lists.now()
        first, last = levels[0], levels[-1]
        if self.kind == "ays":
            found = align_your_steps(self.table, count)
        elif self.kind == "uniform_lambda":
            found = ramps.uniform_lambda(count, first, last, self.noise)
        elif self.kind == "polynomial":
            found = ramps.polynomial(count, first, last, self.rho, self.noise)
        elif self.kind == "sqrt_time":
            table = None if lists.flow else np.array(lists.table())
            found = ramps.sqrt_time(count, first, last, table)
        elif self.kind == "logsnr":
            top, bottom = lists.known()
            found = ramps.uniform_lambda(count, top, last if lists.terminal else bottom)
            found[0] = first if math.isinf(first) else top
        elif lists.terminal:
            found = ramps.arctan(count, first, last, self.c)
        else:
            found = ramps.arctan(count + 1, first, end, self.c)[:-1]
        return [float(level) for level in found]


def refuse_own_levels(scheduler: Any, method: str) -> None:
    """Refuse a sampler of ours whose levels, and their number, are part of it.

    Raises:
        Conflict: Naming both.
    """
    from samplers.base import SolverScheduler

    if isinstance(scheduler, SolverScheduler):
        kind = type(scheduler)
        if kind._schedule is not SolverScheduler._schedule:
            raise Conflict(
                f"samplers.{kind.__name__.removesuffix('Scheduler')} has noise levels of its own, "
                f"and {method} sets others: leave one of them out of the plan."
            )


def _facts(pipe: Any) -> dict[str, str]:
    """What a fingerprint is compared with: the network, and its process where it is served."""
    from samplers.dpmsolverpp_scheduler import DPMSolverPPScheduler
    from samplers.fingerprint import process_digest

    try:
        scheduler = DPMSolverPPScheduler.from_config(pipe.scheduler.config)
    except BadInput:
        return {"model": model_digest(pipe)}
    return {
        "model": model_digest(pipe),
        "process": process_digest(scheduler),
        "prediction": scheduler.config.prediction_type,
    }


def _warn_of_guidance(pipe: Any, searched: Fingerprint) -> None:
    """Say so where the call that is under way has another guidance than the search had."""
    from accel.seams.pipelines import guidance_of

    found = tuple(sorted(guidance_of(pipe).items()))
    if found and found != searched.guidance:
        shown = [
            ", ".join(f"{k}={v:g}" for k, v in one) or "none" for one in (found, searched.guidance)
        ]
        warnings.warn(
            f"samplers.Schedule: this run has guidance {shown[0]}, and its levels were searched "
            f"with {shown[1]}: they serve, but may not be the best.",
            AccelWarning,
            stacklevel=2,
        )
