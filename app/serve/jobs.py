"""What is asked of the server, what it answers, and what it says in between: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, FiniteFloat

from accel.errors import AccelError
from app.metadata import Entry

State = Literal["queued", "running", "done", "stopped", "failed", "quarantined"]
Kind = Literal["generate", "compare", "measure"]
Phase = Literal["loading", "encoding", "denoising", "decoding", "measuring", "writing"]

ENDED: tuple[State, ...] = ("done", "stopped", "failed", "quarantined")
"""States that a job does not leave."""


STOCK: dict[str, Any] = {"plan": 1}
"""The plan of the stock pipeline."""

PLACE = "/api/v1"
"""Below the app: where programs ask, and where a browser gets the files of a job."""

FIRST = "first"
"""Instead of an id in ``against``: the first job of those that are submitted together."""


class Busy(AccelError):
    """The queue is full.

    Attributes:
        retry_after: Seconds after which it is worth asking again.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NoSuchJob(AccelError):
    """There is no job of that id, or it is another owner's: the two are not told apart."""


class Spec(Entry):
    """What a job is to do.

    Attributes:
        kind: ``generate`` makes one picture or clip, ``compare`` both sides of a comparison,
            ``measure`` the figures of the presets.
        request: As ``Request.to_dict`` writes it. The seed is drawn at admission, so an admitted
            job has one.
        plan: As ``Plan.to_dict`` writes it; ``{"plan": 1}`` is the stock pipeline.
        title: What the person chose: ``balanced``, ``custom plan``, ….
        repeats: Timed runs of each side, 1 to 20 (compare, measure).
        against: Id of a job of the same owner, whose picture the fidelity is measured against
            (generate); ``first`` is the first one of those that are submitted together, and an
            admitted job has its id.
    """

    kind: Kind = "generate"
    request: dict[str, Any]
    plan: dict[str, Any] = Field(default_factory=STOCK.copy)
    title: str = Field("", max_length=200)
    repeats: int = Field(3, ge=1, le=20)
    against: str | None = None


class Speedup(Entry):
    """How many times faster than the stock pipeline, as timers measured it.

    Attributes:
        ratio: By the medians.
        low: Of the lowest pair, or by the lower quartile of the stock times.
        high: Of the highest pair, or by the upper quartile.
        baseline_seconds: Median of the stock runs.
        measured: Date of the latest stock run, ISO 8601.
    """

    ratio: float
    low: float
    high: float
    baseline_seconds: float
    measured: str


class Spent(Entry):
    """What a guard made of its budget in one sample: relative errors of the final latents."""

    spent: float
    budget: float
    checks: float


class Result(Entry):
    """What a job gave.

    Attributes:
        files: Role → file name in the job's folder. generate: ``picture`` (PNG or MP4), ``record``
            (MP4 only), ``timeline`` (PNG). compare: ``baseline``, ``accelerated``, ``difference``,
            ``sheet``, ``timeline``, ``report``, and ``film`` for clips. measure: ``report``.
        clip: Whether the picture is a clip.
        partial: Whether it was stopped before its last step.
        seed: The noise.
        seconds: The whole call (compare: median of the accelerated side; measure: of stock).
        steps: Steps of the sampler that were made.
        nfe: Network evaluations for one sample.
        verdicts: By method ``{"state": …, "detail": …}``.
        events: By method ``[step, branch, sample, state]``: for the heatmap.
        speedup: ``None`` while no stock time is known on this machine for this configuration.
        quality: By figure (``psnr``, ``ssim``, …) a number, or why there is none; empty where
            there was nothing to compare with.
        notes: Warnings of the run, and what was changed after it ran out of memory.
        guarded: What a guard spent, an entry for each sample; empty without one.
        guarded_by: What the guard's estimates rest on.
    """

    files: dict[str, str]
    clip: bool = False
    partial: bool = False
    seed: int
    seconds: float
    steps: int
    nfe: float
    verdicts: dict[str, dict[str, str]] = Field(default_factory=dict)
    events: dict[str, list[list[Any]]] = Field(default_factory=dict)
    speedup: Speedup | None = None
    quality: dict[str, FiniteFloat | str] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    guarded: list[Spent] = Field(default_factory=list)
    guarded_by: str = ""


@dataclass(frozen=True)
class Job:
    """A job as it is at this moment.

    Attributes:
        id: 32 hexadecimal digits.
        owner: Who may see it.
        group: Jobs that were submitted together, or ``None``.
        spec: What it does.
        state: See ``State``; those of ``ENDED`` are final.
        attempts: How often it was started: at most twice.
        created: Unix seconds, as are ``started``, ``ended`` and ``deleted``.
        position: Of a queued job: how many go before it; 0 is next.
        eta: Seconds until it ends, from measured seconds; ``None``: unknown, or ended.
        result: Of a job that is done, or was stopped and kept something.
        error: One sentence that names the fix.
        deleted: When it was put into the trash.
    """

    id: str
    owner: str
    group: str | None
    spec: Spec
    state: State
    attempts: int
    created: float
    started: float | None = None
    ended: float | None = None
    position: int | None = None
    eta: float | None = None
    result: Result | None = None
    error: str | None = None
    deleted: float | None = None


@dataclass(frozen=True)
class Progress:
    """Where a running job is.

    Attributes:
        job: Its id.
        phase: What it does at the moment.
        step: Steps made in the present run.
        total: Steps of the run; ``None`` where that is not known.
        skipped: Steps that a method answered, in whole or in part.
        seconds: Since the job was started.
        eta: Seconds until it ends; ``None``: unknown.
        preview: PNG, at most 256 px a side, of the estimated result; ``None``: as before.
        note: ``timed run 3 of 6``, ….
    """

    job: str
    phase: Phase
    step: int = 0
    total: int | None = None
    skipped: int = 0
    seconds: float = 0.0
    eta: float | None = None
    preview: bytes | None = None
    note: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """A model that the server offers.

    Attributes:
        name: What ``Request.model`` says.
        kind: What it draws.
        call: Arguments of a normal call (``height``, ``num_inference_steps``, …), if known.
        inputs: Which of ``prompt``, ``negative``, ``guidance``, ``image``, ``last``, ``mask``,
            ``control``, ``lora`` and ``frames`` it takes.
        bytes: Size of its files, or of their download; ``None`` where the hub has not told it.
        here: Whether its files are on this machine: else the first picture downloads them.
    """

    name: str
    kind: Literal["image", "video"]
    call: dict[str, Any]
    inputs: tuple[str, ...]
    bytes: int | None
    here: bool = True


class Figure(Entry):
    """What a preset does to a model on this machine.

    Attributes:
        speedup: Against stock, in turns.
        seconds: Median of a run.
        quality: ``psnr``, ``ssim``, ``perceptual``, … against the stock picture.
    """

    speedup: Speedup
    seconds: float
    quality: dict[str, FiniteFloat | str] = Field(default_factory=dict)
