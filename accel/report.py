"""What a run really did: events → counts, verdicts, text, JSON and a timeline picture."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from accel.peak import Peak, watching

if TYPE_CHECKING:
    from PIL import Image

State = Literal["computed", "reused", "predicted"]
ACTIVE = "ACTIVE"
INACTIVE = "INACTIVE"
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Event:
    """One decision of one method.

    Attributes:
        step: Index of the evaluation, 0-based.
        branch: Guidance branch.
        sample: Position in the batch.
        state: ``computed`` in full, ``reused`` as it was, or ``predicted`` from what was kept.
        parts: What of the site was not computed (kinds of modules, a range of blocks), where the
            method may leave out one part and compute another.
    """

    step: int
    branch: str
    sample: int
    state: State
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether a method did something.

    Attributes:
        state: ``ACTIVE`` or ``INACTIVE``.
        detail: What it did, or the reason why it did nothing.
        chosen: Whether doing nothing was asked for (the method is off).
    """

    state: str
    detail: str
    chosen: bool = False


@dataclass
class Tally:
    """What one method did in the present run.

    Attributes:
        method: Its name.
        off: Why it is off by its own fields, or ``None``.
        reason: Says why nothing was saved, asked at the end of a run in which nothing was.
        change: What was changed for good while attached (a sampler), or ``None``.
        site: What its events are about: the whole ``denoiser``, ``blocks``, ``modules``, ….
        memory: Bytes that the method keeps at this moment.
        peak: The most that it kept at the end of a step of the present run.
        planned: The most that it may come to keep, where it can tell that ahead; else 0.
        advice: What the user should change, in the present run; a warning at its end.
    """

    method: str
    off: str | None = None
    reason: Callable[[], str] = lambda: "it had nothing to do in this run"
    change: str | None = None
    site: str = ""
    memory: Callable[[], int] = lambda: 0
    peak: int = 0
    planned: int = 0
    events: list[Event] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Forget the run before."""
        self.events.clear()
        self.advice.clear()
        self.peak = self.planned = 0

    def advise(self, text: str) -> None:
        """Add to what the user should change; said once a run."""
        if text not in self.advice:
            self.advice.append(text)

    def aside(self) -> Callable[[], None]:
        """Begin what is not to be told; call what it returns at its end."""
        count, change, advice = len(self.events), self.change, len(self.advice)

        def restore() -> None:
            del self.events[count:], self.advice[advice:]
            self.change = change

        return restore

    def record(
        self, step: int, rows: Iterable[tuple[str, int]], state: State, parts: Iterable[str] = ()
    ) -> None:
        """Add what happened to some rows (branch, sample) at a step; see `Event`."""
        left_out = tuple(sorted(parts))
        self.events += [Event(step, branch, sample, state, left_out) for branch, sample in rows]

    @property
    def cost(self) -> str:
        """What it keeps in memory, in words: known from the first computed step on, if it plans."""
        kept, planned = self.peak / MIB, self.planned / MIB
        if self.planned > self.peak:
            return (
                f"keeps {kept:.1f} of {planned:.1f} MiB"
                if kept
                else f"would keep {planned:.1f} MiB"
            )
        return f"keeps {kept:.1f} MiB" if kept else ""

    def verdict(self) -> Verdict:
        """Whether the method did something in this run."""
        if self.off is not None:
            return Verdict(INACTIVE, f"off: {self.off}", chosen=True)
        if self.change is not None:
            return Verdict(ACTIVE, self.change)
        units = {(event.step, event.sample) for event in self.events}
        saved = {(e.step, e.sample) for e in self.events if e.state != "computed"}
        if not saved:
            return Verdict(INACTIVE, self.reason())
        kinds = Counter(event.state for event in self.events if event.state != "computed")
        return Verdict(ACTIVE, f"{len(saved)}/{len(units)} {kinds.most_common(1)[0][0]}")


class Guarding(Protocol):
    """What a guard tells of a run."""

    @property
    def note(self) -> str:
        """What its estimate rests on."""
        ...

    def told(self) -> list[dict[str, float]]:
        """For each sample ``spent`` and ``budget``, relative errors, and ``checks``."""
        ...


@dataclass
class Report:
    """The latest run under an attached plan.

    Attributes:
        pipeline: Class name of the pipeline.
        tallies: One a method, in the order of the plan.
        steps: Calls of ``scheduler.step``.
        calls: Calls of a network.
        rows: Rows that went through a network, over all calls.
        samples: Pictures or clips in the batch.
        step_seconds: Host time from one step to the next; waits for no device.
        peak: The most memory that the run took, if it was called under ``measuring_memory``.
        guard: What the guard tells of the run, where there is one with a budget.
    """

    pipeline: str
    tallies: list[Tally]
    steps: int = 0
    calls: int = 0
    rows: int = 0
    samples: int = 1
    step_seconds: list[float] = field(default_factory=list)
    peak: Peak | None = None
    guard: Guarding | None = None
    _clock: float = 0.0

    def start(self) -> None:
        """Forget the run before."""
        self.steps = self.calls = self.rows = 0
        self.step_seconds.clear()
        self.peak = None
        for tally in self.tallies:
            tally.start()
        self._clock = time.perf_counter()

    def count(self, rows: int) -> None:
        """Count one call of a network."""
        self.calls += 1
        self.rows += rows

    def tick(self) -> None:
        """Count one step."""
        now = time.perf_counter()
        self.step_seconds.append(now - self._clock)
        self._clock = now
        self.steps += 1
        for tally in self.tallies:
            tally.peak = max(tally.peak, tally.memory())

    @contextmanager
    def measuring_memory(self, device: Any) -> Iterator[None]:
        """Measure what the call of the pipeline inside takes at its peak, decoding included.

        Sets back a counter that others may read as well: see `accel.peak`. Without such a counter
        (MPS, a CPU under another system than Linux) ``peak`` stays ``None``.

        Args:
            device: Where the pipeline computes, as torch has it.
        """
        with watching(device) as read:
            yield
            self.peak = read()

    @property
    def cached_bytes(self) -> int:
        """The most that all methods together kept between steps."""
        return sum(tally.peak for tally in self.tallies)

    @property
    def nfe(self) -> float:
        """Network evaluations for one sample: rows computed, over samples."""
        return self.rows / max(self.samples, 1)

    @property
    def seconds(self) -> float:
        """Host time of the denoising loop."""
        return sum(self.step_seconds)

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """By method."""
        return {tally.method: tally.verdict() for tally in self.tallies}

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return {
            "pipeline": self.pipeline,
            "steps": self.steps,
            "calls": self.calls,
            "nfe": self.nfe,
            "samples": self.samples,
            "seconds": self.seconds,
            "step_seconds": list(self.step_seconds),
            "peak": self.peak and self.peak.to_dict(),
            "guard": self.guard and {"note": self.guard.note, "samples": self.guard.told()},
            "cached_bytes": {tally.method: tally.peak for tally in self.tallies},
            "planned_bytes": {t.method: t.planned for t in self.tallies if t.planned},
            "verdicts": {
                method: {"state": verdict.state, "detail": verdict.detail}
                for method, verdict in self.verdicts.items()
            },
            "sites": {tally.method: tally.site for tally in self.tallies},
            "events": {
                tally.method: [[e.step, e.branch, e.sample, e.state] for e in tally.events]
                for tally in self.tallies
            },
            "parts": {
                tally.method: [[e.step, e.branch, e.sample, list(e.parts)] for e in parted]
                for tally in self.tallies
                if (parted := [event for event in tally.events if event.parts])
            },
        }

    def __str__(self) -> str:
        head = (
            f"{self.pipeline}: {self.steps} steps, {self.nfe:g} network evaluations a sample, "
            f"{self.seconds:.2f} s in the loop"
        )
        if self.cached_bytes:
            head += f", {self.cached_bytes / MIB:.1f} MiB kept"
        if self.peak is not None:
            head += f"\n  {self.peak}"
        width = max((len(tally.method) for tally in self.tallies), default=0)
        lines = [
            f"  {tally.method:<{width}}  {verdict.state:<8}  "
            + "; ".join(filter(None, (verdict.detail, tally.cost)))
            for tally, verdict in zip(self.tallies, self.verdicts.values(), strict=True)
        ]
        told = [f"  guard  {line}" for line in self.guarded]
        return "\n".join([head, *lines, *told])

    @property
    def guarded(self) -> list[str]:
        """What the guard spent, a line for each sample; empty without a guard."""
        samples = [] if self.guard is None else self.guard.told()
        return [
            (f"{number}: " if len(samples) > 1 else "")
            + f"spent {one['spent']:.3g} of {one['budget']:.3g}, {one['checks']:g} checks"
            + f" ({self.guard.note if self.guard else ''})"
            for number, one in enumerate(samples)
        ]

    def timeline(self) -> Image.Image:
        """A picture of it: a row for each method, part of it and branch, a column for each step."""
        from accel.timeline import draw

        return draw(self)
