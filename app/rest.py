"""The REST interface: jobs in, states and files out. Described by ``/api/v1/openapi.json``.

Whoever asks is the owner of what is made; ``app.security`` has found out who that is before a
request comes here. There are no pages with documentation: FastAPI's load scripts from elsewhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response, UploadFile
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import APIKeyCookie
from pydantic import BaseModel, ConfigDict, Field, JsonValue, create_model, model_validator

from accel.errors import AccelError, BadInput, NotWritten
from accel.plan import Plan, Preset, methods
from app import request as vocabulary
from app.files import without_folders
from app.listing import described
from app.request import FILES, Source
from app.serve.jobs import (
    ENDED,
    PLACE,
    STOCK,
    Busy,
    Job,
    ModelInfo,
    NoSuchJob,
    Result,
    Spec,
    State,
)
from app.serve.service import Service

COOKIE = "accel_session"
OWNER = "accel.owner"
"""Where in an ASGI scope stands who asks."""

VERSION = "1.0.0"
NOT_OFFERED = {"device", "variant", "revision"}
UPLOAD = r"^[A-Za-z0-9._-]{1,128}(/[A-Za-z0-9._-]{1,128}){0,4}$"
SHOWN = ("id", "state", "group", "created", "started", "ended", "deleted", "position", "eta")
TYPES = {".png": "image/png", ".mp4": "video/mp4", ".json": "application/json"}
STATUS: tuple[tuple[type[AccelError], int], ...] = (
    (NoSuchJob, 404),
    (Busy, 429),
    (NotWritten, 507),
    (AccelError, 422),
)
"""The status of an error: that of the first class that it is of."""


class Problem(BaseModel):
    """What went wrong."""

    detail: str = Field(examples=["steps: 1000, and this server admits at most 200: ask for less."])


def _offered() -> dict[str, Any]:
    """The fields of a request as the command line has them, with uploads in the place of paths."""
    hints = get_type_hints(vocabulary.Request, include_extras=True)
    return {
        one.name: _field(hints[one.name], one.default)
        for one in fields(vocabulary.Request)
        if one.name not in NOT_OFFERED
    }


def _field(annotation: Any, default: Any) -> tuple[Any, Any]:
    kind, *notes = get_args(annotation)
    option = next(note for note in notes if type(note).__module__ == "typer.models")
    bounds = [note for note in notes if note is not option]
    if Path in get_args(kind):
        described_as = Field(
            pattern=UPLOAD, description=f"{option.help}; the `upload` of POST /uploads"
        )
        return Annotated[str | None, described_as], default
    assert default is not MISSING
    return Annotated[kind, *bounds, Field(description=option.help)], default


Picture = create_model(
    "Picture",
    __config__=ConfigDict(extra="forbid"),
    __doc__="What to draw. What is left out is left to the model's own call arguments.",
    **_offered(),
)


class Order(BaseModel):
    """A picture or clip, or a comparison of it with the stock pipeline's."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"request": {"prompt": "a boat on the sea", "seed": 3}, "preset": "balanced"},
                {
                    "kind": "compare",
                    "request": {"prompt": "a boat on the sea"},
                    "plan": {"plan": 1, "cache": {"EasyCache": {"threshold": 0.05}}},
                },
            ]
        },
    )

    kind: Literal["generate", "compare"] = "generate"
    request: Picture
    preset: Preset | None = Field(None, description="a plan by name; or give `goal` or `plan`")
    goal: list[Annotated[str, Field(max_length=100)]] | None = Field(
        None,
        min_length=1,
        max_length=8,
        description="the fastest plan that was proven to hold this, such as `ssim>=0.95`; of those "
        "that the server was given by `accel ui --tuned`",
    )
    plan: dict[str, JsonValue] | None = Field(
        None, description="as `accel methods --toml`, in JSON; neither: the stock pipeline"
    )
    title: str = Field("", max_length=200, description="shown in the history")
    repeats: int = Field(3, ge=1, le=20, description="timed runs of each side of a comparison")
    against: str | None = Field(
        None,
        pattern="^[0-9a-f]{32}$",
        description="id of a job whose picture the fidelity is measured against",
    )

    @model_validator(mode="before")
    @classmethod
    def _is_json(cls, values: Any) -> Any:
        """Refuse what Python reads as JSON though it is none: NaN, halves of characters."""
        try:
            json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
        except RecursionError as error:
            raise ValueError("nested too deep") from error
        except TypeError as error:
            raise ValueError("not read as JSON: send Content-Type: application/json") from error
        return values

    def spec(self, service: Service) -> Spec:
        """The job that is asked for.

        Args:
            service: Has the uploads, which are named relative to its folder, and the tuned plans.

        Raises:
            BadInput: If more than one of plan, preset and goal is given, or no plan holds the goal.
        """
        asked = self.request.model_dump(exclude_unset=True, exclude_none=True)
        files = {name: str(service.folder / asked[name]) for name in FILES if name in asked}
        named = self.preset or " and ".join(self.goal or ())
        return Spec(
            kind=self.kind,
            request={**asked, **files},
            plan=self._plan(service, asked.get("model", Source.model)),
            title=self.title or named,
            repeats=self.repeats,
            against=self.against,
        )

    def _plan(self, service: Service, model: str) -> dict[str, Any]:
        given = [name for name in ("plan", "preset", "goal") if getattr(self, name) is not None]
        if len(given) > 1:
            raise BadInput(f"{' and '.join(given)} are given together: choose one.")
        if self.goal:
            return service.for_goal(model, self.goal).to_dict()
        return Plan.preset(self.preset).to_dict() if self.preset else self.plan or STOCK


class JobView(BaseModel):
    """A job as it is at this moment."""

    id: str = Field(examples=["0f3a5c0e9d7b4d0f8a5b6c7d8e9f0a1b"])
    kind: str
    state: State
    title: str
    group: str | None
    request: dict[str, Any]
    plan: dict[str, Any]
    created: float = Field(description="unix seconds")
    started: float | None
    ended: float | None
    deleted: float | None = Field(description="when it was put into the trash")
    position: int | None = Field(description="how many go before it; 0 is next")
    eta: float | None = Field(description="seconds until it ends; null: unknown, or ended")
    result: Result | None
    error: str | None = Field(description="one sentence that names the fix")
    files: dict[str, str] = Field(description="role → where to get it")


class UploadView(BaseModel):
    """An uploaded file."""

    upload: str = Field(description="for `image`, `last`, `mask`, `control` or `lora` of a request")


class Health(BaseModel):
    """Whether jobs are taken and run."""

    status: Literal["ok", "paused"]
    detail: str | None = Field(description="why the queue stands still")


class GoalView(BaseModel):
    """What a tuned plan of the server was proven to hold, and how fast it is."""

    targets: tuple[str, ...] = Field(description="what a goal may ask, or less of it")
    speedup: float = Field(description="times the stock pipeline's")
    low: float = Field(description="lower end of its 95 % interval")
    high: float = Field(description="upper end of it")


class FieldView(BaseModel):
    """A field of a method."""

    default: Any
    range: str
    description: str


class MethodView(BaseModel):
    """A method that a plan can hold."""

    name: str
    layer: str
    seam: str
    supports: str
    source: str
    summary: str
    fields: dict[str, FieldView]


def _service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def _owner(request: Request) -> str:
    return str(request.scope[OWNER])


Served = Annotated[Service, Depends(_service)]
Owner = Annotated[str, Depends(_owner)]
Id = Annotated[str, InPath(pattern="^[0-9a-f]{32}$", description="of a job")]
Role = Annotated[str, InPath(pattern="^[a-z]{1,32}$", description="picture, timeline, …")]


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    said = {
        400: "the body cannot be read",
        401: "log in first",
        404: "there is no such job, or it is not yours",
        409: "the job has no such file yet",
        413: "the body is too large",
        422: "what was asked for cannot be done, and why",
        429: "the queue is full; Retry-After says when to ask again",
        507: "the disk is full",
    }
    return {code: {"model": Problem, "description": said[code]} for code in codes}


router = APIRouter()


@router.post("/generate", status_code=202, responses=_problems(404, 422, 429, 507))
def generate(order: Order, service: Served, owner: Owner, request: Request) -> JobView:
    """Queue a picture, a clip or a comparison; ask for the job until it has ended."""
    [job] = service.submit(owner, [order.spec(service)])
    return _view(job, service, request)


@router.get("/jobs", responses=_problems(422))
def history(
    service: Served,
    owner: Owner,
    request: Request,
    search: Annotated[str, Query(max_length=100, description="words that all occur")] = "",
    deleted: Annotated[bool, Query(description="those in the trash")] = False,
    limit: Annotated[int, Query(ge=1, le=200)] = 60,
    before: Annotated[
        float | None, Query(allow_inf_nan=False, description="created before: unix seconds")
    ] = None,
) -> list[JobView]:
    """Your jobs, the newest first."""
    found = service.history(owner, search=search, deleted=deleted, limit=limit, before=before)
    return [_view(job, service, request) for job in found]


@router.get("/jobs/{id}", responses=_problems(404, 422))
def job(id: Id, service: Served, owner: Owner, request: Request) -> JobView:
    """A job as it is now."""
    return _view(service.job(owner, id), service, request)


@router.post("/jobs/{id}/cancel", responses=_problems(404, 422, 507))
def cancel(id: Id, service: Served, owner: Owner, request: Request) -> JobView:
    """Stop a job: a queued one at once, a running one within a step; an ended one stays."""
    return _view(service.cancel(owner, id), service, request)


@router.delete("/jobs/{id}", status_code=204, responses=_problems(404, 422, 507))
def delete(id: Id, service: Served, owner: Owner) -> None:
    """Put a job into the trash."""
    service.delete(owner, id)


@router.post("/jobs/{id}/restore", responses=_problems(404, 422, 507))
def restore(id: Id, service: Served, owner: Owner, request: Request) -> JobView:
    """Take a job out of the trash."""
    service.restore(owner, id)
    return _view(service.job(owner, id), service, request)


@router.get(
    "/jobs/{id}/files/{role}",
    response_class=FileResponse,
    responses={
        200: {"content": {kind: {} for kind in TYPES.values()}, "description": "the file"},
        **_problems(404, 409, 422),
    },
)
def file(id: Id, role: Role, service: Served, owner: Owner) -> Response:
    """A file of a job's result."""
    found = service.job(owner, id)
    if found.result is None or role not in found.result.files:
        has = "has none, and never will" if found.state in ENDED else f"is {found.state}"
        code = 404 if found.state in ENDED else 409
        raise HTTPException(code, f"No file '{role}': the job {has}.")
    path = service.file(owner, id, role)
    if not path.is_file():
        raise HTTPException(404, f"The file '{role}' of this job is gone.")
    return FileResponse(
        path,
        media_type=TYPES.get(path.suffix, "application/octet-stream"),
        filename=path.name,
        content_disposition_type="inline",
        headers={"Cache-Control": "private, no-cache"},
    )


@router.post("/uploads", status_code=201, responses=_problems(422, 507))
def upload(file: UploadFile, service: Served, owner: Owner) -> UploadView:
    """Bring a picture (PNG, JPEG, WebP) or a LoRA (safetensors) for later requests."""
    limit = service.limits.largest_upload
    if (file.size or 0) > limit:
        raise HTTPException(413, f"The file is too large: at most {limit} bytes are taken here.")
    path = service.upload(owner, file.filename or "", file.file)
    return UploadView(upload=path.relative_to(service.folder).as_posix())


@router.get("/methods")
def list_methods() -> list[MethodView]:
    """Every method that a plan can hold, with its fields."""
    return [MethodView.model_validate(described(kind)) for _, kind in sorted(methods().items())]


@router.get("/models")
def models(service: Served) -> list[ModelInfo]:
    """The models that a request can name."""
    return service.models()


@router.get("/goals", responses=_problems(422))
def goals(
    service: Served,
    model: Annotated[str, Query(max_length=200, description="as an order names it")] = Source.model,
) -> list[GoalView]:
    """What the server's tuned plans for a model hold; waits until it knows what the model is."""
    plans = [plan.tuned for plan in service.tuned(model).values() if plan.tuned]
    speeds = [tuned.figure("speedup") for tuned in plans]
    return [
        GoalView(targets=tuned.targets, speedup=fast.mean, low=fast.low, high=fast.high)
        for tuned, fast in zip(plans, speeds, strict=True)
    ]


@router.get("/health")
def health(service: Served) -> Health:
    """Whether the server is there, and the queue moves."""
    paused = service.paused
    return Health(status="paused" if paused else "ok", detail=paused and without_folders(paused))


def build(service: Service, *, login: bool, prefix: str = "") -> FastAPI:
    """The REST interface of a service, to be mounted at ``/api/v1``.

    Args:
        service: What does the work.
        login: Whether a session is asked for; then the description says so.
        prefix: The path under which a proxy serves the app.
    """
    wanted = [Depends(APIKeyCookie(name=COOKIE, auto_error=False))] if login else []
    app = FastAPI(
        title="diffusers-accel",
        version=VERSION,
        summary="Accelerated pictures and clips, with what they cost in quality.",
        docs_url=None,
        redoc_url=None,
        servers=[{"url": prefix + PLACE}],
        root_path_in_servers=False,
        dependencies=wanted,
        responses=_problems(400, 413, *([401] if login else [])),
    )
    app.state.service, app.state.base = service, prefix + PLACE
    app.include_router(router)
    app.add_exception_handler(AccelError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    return app


def problem(code: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as every route gives it: without the folders of this machine."""
    plain = without_folders(detail).encode("utf-8", "replace").decode()
    return JSONResponse({"detail": plain}, code, headers)


def _on_error(_request: Request, error: Exception) -> Response:
    code = next(code for kind, code in STATUS if isinstance(error, kind))
    later = {"Retry-After": str(math.ceil(error.retry_after))} if isinstance(error, Busy) else None
    return problem(code, str(error), later)


def _on_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:]) or "body"
    return problem(422, f"{name}: {first['msg']}.")


def _view(job: Job, service: Service, request: Request) -> JobView:
    spec, result = job.spec, job.result
    base = f"{request.app.state.base}/jobs/{job.id}/files"
    return JobView(
        **{name: getattr(job, name) for name in SHOWN},
        kind=spec.kind,
        title=spec.title,
        request=_relative(spec.request, service.folder),
        plan=spec.plan,
        result=None if result is None else _said(result),
        error=None if job.error is None else without_folders(job.error),
        files={role: f"{base}/{role}" for role in (result.files if result else {})},
    )


def _relative(asked: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A request with its uploads named as ``POST /uploads`` did."""
    return {
        name: _relative_path(Path(value), folder) if name in FILES else value
        for name, value in asked.items()
    }


def _relative_path(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def _said(result: Result) -> Result:
    """A result whose notes name no folders."""
    return result.model_copy(update={"notes": [without_folders(note) for note in result.notes]})
