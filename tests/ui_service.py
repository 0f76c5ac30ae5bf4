"""A service without processes and without a queue, for tests of the pages: a job runs when watched.

It runs real sessions on real models, so that what the pages show are real pictures.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import copyfile
from types import SimpleNamespace
from typing import Any, TypeVar
from uuid import uuid4

import gradio as gr
from PIL import Image

from accel import Plan
from accel import methods as all_methods
from accel.errors import AccelWarning, BadInput
from accel.tuned import Network
from app import clips, metadata, nearness
from app.request import Request, Source, make
from app.serve.fitting import Fits
from app.serve.folders import Folders
from app.serve.jobs import ENDED, Figure, Job, ModelInfo, NoSuchJob, Progress, Result, Spec, Speedup
from app.serve.limits import Limits
from app.session import Session

T = TypeVar("T")
INPUTS = ("prompt", "negative", "guidance", "image", "mask", "control", "lora")
FASTER = Speedup(ratio=2.5, low=2.2, high=2.8, baseline_seconds=1.0, measured="2026-11-29T12:00:00")


def browser(username: str | None = None, language: str = "en") -> Any:
    """What Gradio tells an event of the browser that sent it."""
    return SimpleNamespace(username=username, headers={"accept-language": language})


def drawn(draw: Callable[[], T]) -> tuple[T, gr.Blocks]:
    """Draw in a block of Gradio, where an event loop runs: else it opens some and leaves them."""

    async def inside() -> tuple[T, gr.Blocks]:
        with gr.Blocks() as demo:
            return draw(), demo

    return asyncio.run(inside())


def informed(name: str, kind: str = "image", **call: Any) -> ModelInfo:
    """A model as the service describes it."""
    inputs = INPUTS if kind == "image" else ("prompt", "negative", "guidance", "frames")
    return ModelInfo(name, kind, call, inputs, 1_000_000)  # type: ignore[arg-type]


@dataclass
class Fake:
    """The service's contract, in one process.

    Attributes:
        folder: Where files go.
        offered: The models.
        matrix: Which methods fit them.
        measured: By model, what was measured of the presets.
        refused: What ``submit`` raises, if anything.
        plans: Tuned plans of the server.
        paused: As of the service.
    """

    folder: Path
    offered: list[ModelInfo]
    matrix: Fits = field(default_factory=lambda: Fits(methods=dict.fromkeys(all_methods())))
    measured: dict[str, dict[str, Figure]] = field(default_factory=dict)
    refused: Exception | None = None
    plans: dict[Path, Plan] = field(default_factory=dict)
    paused: str | None = None
    jobs: dict[str, Job] = field(default_factory=dict)
    sessions: dict[Source, Session] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)

    @property
    def limits(self) -> Limits:
        return Limits(models=tuple(info.name for info in self.offered))

    def models(self) -> list[ModelInfo]:
        return self.offered

    def fits(self, model: str) -> Fits:
        return self.matrix

    def figures(self, model: str) -> dict[str, Figure]:
        return self.measured.get(model, {})

    def tuned(self, model: str) -> dict[Path, Plan]:
        return {p: one for p, one in self.plans.items() if self.refusal(model, one) is None}

    def refusal(self, model: str, plan: Plan) -> str | None:
        pipe = self._session(Source(model=model)).model.pipe
        return None if plan.tuned is None else plan.tuned.misfit(Network.of(pipe))

    def submit(self, owner: str, specs: Sequence[Spec], group: str | None = None) -> list[Job]:
        if self.refused is not None:
            raise self.refused
        jobs = [self._job(owner, spec, group) for spec in specs]
        self.jobs |= {job.id: job for job in jobs}
        return jobs

    def _job(self, owner: str, spec: Spec, group: str | None) -> Job:
        seeded = make(Request, spec.request, where="").seeded().to_dict()
        whole = spec.model_copy(update={"request": seeded})
        return Job(uuid4().hex, owner, group, whole, "queued", 0, time.time(), position=0, eta=3.0)

    def measure(self, owner: str, model: str) -> Job:
        return self.submit(owner, [Spec(kind="measure", request={"model": model})])[0]

    def job(self, owner: str, id: str) -> Job:
        job = self.jobs.get(id)
        if job is None or job.owner != owner:
            raise NoSuchJob(f"There is no job {id}: it was deleted, or is another person's.")
        return job

    def history(self, owner: str, **_: Any) -> list[Job]:
        return [job for job in reversed(self.jobs.values()) if job.owner == owner]

    def cancel(self, owner: str, id: str) -> Job:
        job = self.job(owner, id)
        if job.state in ENDED:
            return job
        self.cancelled.add(id)
        return self._put(replace(job, state="stopped", ended=time.time(), position=None))

    def watch(self, owner: str, id: str) -> Iterator[Job | Progress]:
        job = self.job(owner, id)
        yield job
        if job.state in ENDED:
            return
        running = self._put(replace(job, state="running", position=None))
        yield running
        yield Progress(id, "denoising", 1, 4, 0, 0.1, 0.5, _dot(self.folder))
        yield Progress(id, "denoising", 3, 4, 1, 0.3, 0.2)
        if id in self.cancelled:
            yield self.job(owner, id)
            return
        yield self._put(self._run(running))

    def _put(self, job: Job) -> Job:
        self.jobs[job.id] = job
        return job

    def _run(self, job: Job) -> Job:
        try:
            result = KINDS[job.spec.kind](self, job)
        except Exception as error:
            return replace(job, state="failed", error=str(error), ended=time.time())
        return replace(job, state="done", result=result, ended=time.time())

    def _generate(self, job: Job) -> Result:
        session, request, plan = self._asked(job)
        outcome, notes = _outcome(session, request, plan)
        suffix = clips.CLIP if outcome.clip else clips.PICTURE
        self._write(job, f"picture{suffix}", session, request, plan, outcome)
        roles = {"picture": f"picture{suffix}"}
        return _result(job, outcome, roles, notes, FASTER if len(plan) else None, {})

    def _compare(self, job: Job) -> Result:
        session, request, plan = self._asked(job)
        stock, _ = _outcome(session, request, Plan())
        fast, notes = _outcome(session, request, plan)
        suffix = clips.CLIP if stock.clip else clips.PICTURE
        roles = {"baseline": f"baseline{suffix}", "accelerated": f"accelerated{suffix}"}
        self._write(job, roles["baseline"], session, request, Plan(), stock)
        self._write(job, roles["accelerated"], session, request, plan, fast)
        quality = nearness.measure(stock.pictures, fast.pictures)
        plain = {
            name: "equal" if value == float("inf") else value for name, value in quality.items()
        }
        for role in ("difference", "sheet", "timeline"):
            roles[role] = f"{role}.png"
            Image.new("RGB", (8, 8)).save(self._folder(job) / roles[role])
        return _result(job, fast, roles, notes, FASTER, plain)

    def _measure(self, job: Job) -> Result:
        model = job.spec.request["model"]
        self.measured[model] = {
            name: Figure(speedup=FASTER, seconds=0.4, quality={"ssim": 0.984})
            for name in ("exact", "balanced", "fast", "fastest")
        }
        return Result(files={}, seed=0, seconds=1.0, steps=4, nfe=4)

    def _asked(self, job: Job) -> tuple[Session, Request, Plan]:
        request = make(Request, job.spec.request, where="")
        return self._session(request.source), request, Plan.from_dict(job.spec.plan)

    def _session(self, source: Source) -> Session:
        if source not in self.sessions:
            self.sessions[source] = Session.open(source)
        return self.sessions[source]

    def _folder(self, job: Job) -> Path:
        folder = self.outputs / job.id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _write(self, job: Job, name: str, session: Session, request: Request, *run: Any) -> None:
        plan, outcome = run
        made = metadata.record(request, plan, session.model, outcome)
        path = self._folder(job) / name
        for file, content in clips.files(path, outcome.pictures, made, request.fps).items():
            file.write_bytes(content)

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"

    def uploads(self, owner: str) -> Path:
        folder = Folders(self.folder).uploads(owner)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def upload(self, owner: str, name: str, content: bytes | Path) -> Path:
        assert isinstance(content, Path)
        if content.suffix not in (".png", ".safetensors"):
            raise BadInput(f"{name} is neither a picture nor safetensors: give one of these.")
        digest = hashlib.sha256(content.read_bytes()).hexdigest()
        path = self.uploads(owner) / f"{digest}{content.suffix}"
        if path != content:
            copyfile(content, path)
        return path

    def file(self, owner: str, id: str, role: str) -> Path:
        job = self.job(owner, id)
        if job.result is None or role not in job.result.files:
            raise NoSuchJob(f"Job {id} has no file '{role}'.")
        path = self.outputs / id / job.result.files[role]
        if not path.is_file():
            raise NoSuchJob(f"Job {id} has no file '{role}'.")
        return path


KINDS: dict[str, Callable[[Fake, Job], Result]] = {
    "generate": Fake._generate,
    "compare": Fake._compare,
    "measure": Fake._measure,
}


def _outcome(session: Session, request: Request, plan: Plan) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AccelWarning)
        outcome = session.run(request, plan)
    return outcome, [str(one.message) for one in caught]


def _result(
    job: Job,
    outcome: Any,
    files: dict[str, str],
    notes: list[str],
    speedup: Speedup | None,
    quality: dict[str, float | str],
) -> Result:
    told = outcome.report.to_dict()
    guard = told["guard"] or {"samples": [], "note": ""}
    return Result(
        files=files,
        clip=outcome.clip,
        seed=job.spec.request["seed"],
        seconds=outcome.seconds,
        steps=outcome.report.steps,
        nfe=outcome.report.nfe,
        verdicts=told["verdicts"],
        events=told["events"],
        speedup=speedup,
        quality=quality,
        notes=notes,
        guarded=guard["samples"],
        guarded_by=guard["note"],
    )


def _dot(folder: Path) -> bytes:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "preview.png"
    Image.new("RGB", (4, 4), "teal").save(path)
    return path.read_bytes()
