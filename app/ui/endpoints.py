"""What ``gradio_client`` may call, by stable names: generate, compare, status, cancel, methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import gradio as gr
from pydantic import TypeAdapter, ValidationError

from accel.errors import BadInput
from accel.plan import methods
from app.listing import described
from app.request import FILES
from app.serve.jobs import STOCK, Job, Progress, Spec
from app.ui import records
from app.ui.browser import refusals
from app.ui.events import owner_of, stored
from app.ui.forms import title_of

if TYPE_CHECKING:
    from app.serve.service import Service

Answer = tuple[dict[str, Any], list[str]]
"""A job as JSON, while it runs with its ``progress``, and the files of it that are there."""

_JOB = TypeAdapter(Job)


class Endpoints:
    """The functions behind the endpoints.

    Args:
        service: What runs the jobs.
    """

    def __init__(self, service: Service) -> None:
        self.service = service

    def generate(
        self,
        request: gr.Request,
        settings: dict[str, Any],
        plan: dict[str, Any] | None = None,
        image: str | None = None,
        last: str | None = None,
        mask: str | None = None,
        control: str | None = None,
        lora: str | None = None,
    ) -> Iterator[Answer]:
        """Make a picture or clip. Streams the job until it has ended; its files come last.

        Args:
            request: Who asks.
            settings: Fields of a request: ``prompt``, ``model``, ``seed``, ``steps``, ….
            plan: As ``Plan.to_dict`` writes it; by default the stock pipeline.
            image: A file, as are the following four.
            last: What the clip ends with.
            mask: Inpaint where this is white.
            control: For the ControlNet.
            lora: Safetensors.
        """
        files = (image, last, mask, control, lora)
        yield from self._run(request, settings, plan, {}, files)

    def compare(
        self,
        request: gr.Request,
        settings: dict[str, Any],
        plan: dict[str, Any] | None = None,
        repeats: int = 3,
        image: str | None = None,
        mask: str | None = None,
        control: str | None = None,
        lora: str | None = None,
    ) -> Iterator[Answer]:
        """Measure a plan against the stock pipeline. Streams the job until it has ended.

        Args:
            request: Who asks.
            settings: Fields of a request.
            plan: As ``Plan.to_dict`` writes it.
            repeats: Timed runs of each side, 1 to 20.
            image: A file, as are the following three.
            mask: Inpaint where this is white.
            control: For the ControlNet.
            lora: Safetensors.
        """
        files = (image, None, mask, control, lora)  # a clip between two pictures has no stock
        more = {"kind": "compare", "repeats": repeats}
        yield from self._run(request, settings, plan, more, files)

    def status(self, request: gr.Request, job: str) -> Answer:
        """A job as it is now, by its id, and the files of it that are there."""
        with refusals():
            return self._answer(self.service.job(owner_of(request), job))

    def cancel(self, request: gr.Request, job: str) -> dict[str, Any]:
        """Stop a job, by its id: a waiting one at once, a running one within a step."""
        with refusals():
            return as_json(self.service.cancel(owner_of(request), job))

    def methods(self, model: str = "") -> list[dict[str, Any]]:
        """Every method with its fields; of a model also why it does not fit (``unfit``)."""
        with refusals():
            unfit = self.service.fits(model).methods if model else {}
        return [
            {**described(kind), **({"unfit": unfit.get(name)} if model else {})}
            for name, kind in methods().items()
        ]

    def _run(
        self,
        request: gr.Request,
        settings: Mapping[str, Any],
        plan: Mapping[str, Any] | None,
        more: Mapping[str, Any],
        files: tuple[str | None, ...],
    ) -> Iterator[Answer]:
        owner = owner_of(request)
        with refusals():
            spec = _spec(request=settings, plan=plan or STOCK, **more)
            uploads = stored(self.service, owner, dict(zip(FILES, files, strict=True)))
            given = {name: str(path) for name, path in uploads.items()}
            whole = {"request": {**spec.request, **given}, "title": title_of(spec.plan)}
            job = self.service.submit(owner, [spec.model_copy(update=whole)])[0]
            for now in self.service.watch(owner, job.id):
                if isinstance(now, Progress):
                    yield {**as_json(job), "progress": _plain(now)}, []
                else:
                    job = now
                    yield self._answer(job)

    def _answer(self, job: Job) -> Answer:
        return as_json(job), list(map(str, records.files(self.service, job).values()))


def _spec(**fields: Any) -> Spec:
    """A job from what a client sent.

    Raises:
        BadInput: Names the first field that is of a wrong type or out of its range.
    """
    try:
        return Spec(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise BadInput(f"{name} {first['input']!r}: {first['msg']}.") from error


def as_json(job: Job) -> dict[str, Any]:
    """A job as JSON types; its files by name."""
    found: dict[str, Any] = _JOB.dump_python(records.told(job), mode="json")
    return found


def _plain(now: Progress) -> dict[str, Any]:
    names = ("phase", "step", "total", "skipped", "seconds", "eta", "note")
    return {name: getattr(now, name) for name in names}


def add(service: Service) -> None:
    """Add the endpoints to the present block; nothing of them is seen."""
    ends = Endpoints(service)
    with gr.Column(visible=False):
        settings, plan = gr.JSON(label="settings"), gr.JSON(label="plan")
        repeats = gr.Number(value=3, precision=0, label="repeats")
        files = [gr.File(label=name) for name in FILES]
        both = [file for file in files if file.label != "last"]
        name, model = gr.Textbox(label="job"), gr.Textbox(label="model")
        job, found = gr.JSON(label="job"), gr.JSON(label="methods")
        left = gr.File(file_count="multiple", label="files")
        trigger = gr.Button()
    inputs = {
        "generate": ([settings, plan, *files], [job, left]),
        "compare": ([settings, plan, repeats, *both], [job, left]),
        "status": ([name], [job, left]),
        "cancel": ([name], [job]),
        "methods": ([model], [found]),
    }
    for what, (given, answers) in inputs.items():
        trigger.click(getattr(ends, what), given, answers, api_name=what, concurrency_limit=None)
