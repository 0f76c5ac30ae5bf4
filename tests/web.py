"""The app behind its guard, without pages, workers or network: for tests of what stands before it.

``Memory`` is a service that keeps everything in memory and whose jobs are done at once.
"""

import asyncio
import io
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from PIL import Image
from starlette.testclient import TestClient

from accel import methods
from app import accounts, launch
from app.accounts import Accounts, Door
from app.request import Serving
from app.serve.fitting import Fits
from app.serve.jobs import Busy, Job, ModelInfo, NoSuchJob, Result, Spec
from app.serve.limits import Limits
from app.serve.service import Service

BASE = "http://127.0.0.1:7860"
PASSWORD = "correct horse battery"
SALT = bytes(16)
HASH = f"scrypt$16$8$1${SALT.hex()}${accounts._scrypt(PASSWORD, SALT, 16, 8, 1).hex()}"
"""Of the password; weak, so that it takes no time."""
T = TypeVar("T")
USERS = ("ada", "bob")


def png(side: int = 8) -> bytes:
    """A small picture."""
    held = io.BytesIO()
    Image.new("RGB", (side, side), "teal").save(held, "PNG")
    return held.getvalue()


class Memory(Service):
    """Everybody's jobs in a dictionary; a picture, and a sentence in place of an error."""

    paused = None

    def __init__(
        self,
        folder: Path,
        *,
        limits: Limits,
        devices: tuple[str, ...] = (),
        tuned: Path | None = None,
    ) -> None:
        self.plans = {}
        self.folder, self.limits = folder.resolve(), limits
        self.jobs: dict[str, Job] = {}
        self.full = False

    def start(self) -> None:
        self.outputs.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        (self.folder / "closed").touch()

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"

    def submit(self, owner, specs, group=None):
        if self.full:
            raise Busy("500 jobs wait already: ask again in 12 seconds.", 11.2)
        return [self._make(owner, spec) for spec in specs]

    def _make(self, owner: str, spec: Spec) -> Job:
        id = secrets.token_hex(16)
        folder = self.outputs / f"{owner}-folder" / id
        folder.mkdir(parents=True)
        (folder / "picture.png").write_bytes(png())
        result = Result(
            files={"picture": "picture.png"},
            seed=1,
            seconds=0.5,
            steps=4,
            nfe=4,
            quality={"psnr": "equal", "ssim": 1.0},
            notes=[f"written to {folder}/picture.png"],
        )
        job = Job(id, owner, None, spec, "done", 1, 1.0 + len(self.jobs), 2.0, 3.0, result=result)
        self.jobs[id] = job
        return job

    def job(self, owner, id):
        job = self.jobs.get(id)
        if job is None or job.owner != owner:
            raise NoSuchJob(f"There is no job {id}: see the gallery.")
        return job

    def cancel(self, owner, id):
        return self.job(owner, id)

    def history(self, owner, *, search="", deleted=False, limit=60, before=None):
        mine = [job for job in self.jobs.values() if job.owner == owner]
        kept = [job for job in mine if (job.deleted is not None) == deleted]
        return [job for job in kept if before is None or job.created < before][::-1][:limit]

    def delete(self, owner, id):
        self.jobs[id] = replace(self.job(owner, id), deleted=9.0)

    def restore(self, owner, id):
        self.jobs[id] = replace(self.job(owner, id), deleted=None)

    def file(self, owner, id, role):
        job = self.job(owner, id)
        if job.result is None or role not in job.result.files:
            raise NoSuchJob(f"Job {id} has no file '{role}'.")
        return self.outputs / f"{owner}-folder" / id / job.result.files[role]

    def upload(self, owner, name, content):
        folder = self.folder / "uploads" / owner
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{secrets.token_hex(8)}.png"
        read = getattr(content, "read_bytes", None) or getattr(content, "read", None)
        path.write_bytes(content if read is None else read())
        return path

    def fits(self, model):
        return Fits(methods=dict.fromkeys(methods()))

    def figures(self, model):
        return {}

    def models(self):
        return [ModelInfo("scenes-flux", "image", {"height": 128}, ("prompt",), 1000)]


def service(folder: Path, **limits: int) -> Memory:
    """A service in a folder."""
    made = Memory(folder, limits=Limits(**limits))
    made.outputs.mkdir(parents=True)
    (folder / "queue.sqlite").write_bytes(b"SQLite format 3\0")
    return made


def pages(service: Service) -> gr.Blocks:
    """Stand-in pages: events that say who asks, show a file, and take one."""
    with gr.Blocks(analytics_enabled=False, delete_cache=(60, 60)) as blocks:
        job, picture, said = gr.Textbox(), gr.Image(type="filepath"), gr.Textbox()

        def whoami(request: gr.Request) -> str:
            return request.username or "local"

        def show(id: str, request: gr.Request) -> str:
            return str(service.file(request.username or "local", id, "picture"))

        def take(path: str | None) -> str:
            return str(path)

        def fail(id: str) -> str:
            raise RuntimeError(f"/root/secret/place broke on {id}")

        gr.Button().click(whoami, None, said, api_name="whoami")
        gr.Button().click(show, job, picture, api_name="show")
        gr.Button().click(take, picture, said, api_name="take")
        gr.Button().click(fail, job, said, api_name="fail")
    return blocks


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def door(clock: Clock | None = None) -> Door:
    """Two users of one password."""
    accounts = Accounts(dict.fromkeys(USERS, HASH))
    return Door(accounts, clock) if clock else Door(accounts)


def in_loop(made: Callable[[], T]) -> T:
    """What Gradio makes while a loop runs: elsewhere it makes loops that it does not close."""

    async def make() -> T:
        return made()

    return asyncio.run(make())


def client(
    service: Service, door: Door | None = None, *, blocks: gr.Blocks | None = None, **asked: Any
) -> TestClient:
    """A client of the app, which follows no redirect.

    With pages it is the whole app; enter the client where their events are called.
    """
    guard = in_loop(lambda: launch.build(service, blocks, Serving(**asked), door))
    return TestClient(
        guard, BASE, raise_server_exceptions=False, follow_redirects=False, client=("10.0.0.9", 1)
    )


def logged_in(client: TestClient, name: str) -> dict[str, str]:
    """The headers of a user's session, which the client itself forgets."""
    answer = client.post("/login", data={"username": name, "password": PASSWORD})
    assert answer.status_code == 200, answer.text
    client.cookies.clear()
    return {"cookie": answer.headers["set-cookie"].partition(";")[0]}
