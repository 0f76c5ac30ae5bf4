"""``accel ui``: pages and REST interface on one port, in front of the service.

The process stands in a fresh, empty folder while it runs, which is its folder for temporary files
as well: Gradio may send what lies in either.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import tempfile
import webbrowser
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import typer

from accel.errors import AccelError, BadInput
from app import accounts
from app.exits import say
from app.flags import Given
from app.request import Serving, make

if TYPE_CHECKING:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    from app.security import Guard
    from app.serve.service import Service

THREADS = 256
"""For followers of jobs, of which each holds a thread while it waits, and everybody else."""

GRACE = 3
"""Seconds that open answers get when the server ends."""

FORWARDERS = ["127.0.0.1", "::1"]
"""Where proxies and tunnels stand whose word is taken for where a visitor comes from."""

COPIES = (3600, 24 * 3600)
"""How often Gradio looks for old copies of what it showed, and how old they get: seconds."""

LOOK = 0.02
"""Seconds between two looks of Gradio's queue for work, of its own and of others' progress.

Left alone it looks a thousand times a second for each, which disturbs the threads that compute.
"""


def ui(given: Given) -> None:
    """Serve until interrupted, or add a user to the file of ``--auth``.

    Args:
        given: The options that were typed.

    Raises:
        BadInput: If an option will not do, others could reach it without a login, or the port is
            taken.
    """
    asked = make(Serving, given)
    if asked.add_user is not None:
        _add_user(asked)
        return
    check_reach(asked)
    _check_gradio()
    door = None if asked.auth is None else accounts.Door(accounts.Accounts.read(asked.auth))
    asked = replace(
        asked,
        out=_folder(asked.out),
        model=[_model(name) for name in asked.model],
        tuned=None if asked.tuned is None else asked.tuned.resolve(),
    )
    with _listening(asked) as listener, _empty_folder():
        _run(asked, listener, door)


def check_reach(asked: Serving) -> None:
    """Refuse to be reached by others without a login, unless that is said.

    Raises:
        BadInput: If the address is not this machine's own, or shared, and there is neither
            ``--auth`` nor ``--public``.
    """
    if asked.auth is not None or asked.public:
        return
    if asked.share or not is_loopback(asked.host):
        how = "--share" if asked.share else f"--host {asked.host}"
        raise BadInput(
            f"{how} lets others run models here and see all results: give --auth FILE (`accel ui "
            "--add-user NAME --auth FILE` writes it), or --public if that is wanted."
        )


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def build(
    service: Service,
    blocks: gr.Blocks | None,
    asked: Serving,
    door: accounts.Door | None,
    names: frozenset[str] = frozenset(),
) -> Guard:
    """The whole app: pages, REST interface, login, and what stands before them.

    Args:
        service: What does the work.
        blocks: The pages; ``None``: the REST interface alone.
        asked: Where it is served.
        door: Who may come in; ``None``: everybody.
        names: What ``Host`` may be, beside addresses in numbers and ``localhost``.
    """
    from app.security import Guard, Policy, results_of

    app, copies = _outer(service, asked, door), Path(tempfile.gettempdir()) / "gradio"
    if blocks is not None:
        _mount(app, blocks, service, asked, door)
    proxy = urlsplit(asked.root_path)
    policy = Policy(
        may_read=results_of(service, copies),
        upload_bytes=service.limits.largest_upload,
        names=names,
        origins=frozenset(filter(None, [proxy.netloc.lower()])),
        prefix=proxy.path.rstrip("/"),
        door=door,
    )
    return Guard(app, policy)


def _outer(service: Service, asked: Serving, door: accounts.Door | None) -> FastAPI:
    from fastapi import FastAPI

    from app import login, rest

    prefix = urlsplit(asked.root_path).path.rstrip("/")
    app = FastAPI(openapi_url=None, lifespan=_with_threads)
    if door is not None:
        app.include_router(login.routes(door, prefix))
    app.mount("/api/v1", rest.build(service, login=door is not None, prefix=prefix))
    return app


def _mount(
    app: FastAPI,
    blocks: gr.Blocks,
    service: Service,
    asked: Serving,
    door: accounts.Door | None,
) -> None:
    import gradio as gr

    from app.rest import OWNER
    from app.ui import look, words

    def owner(request: Any) -> str | None:
        return request.scope.get(OWNER)  # type: ignore[no-any-return]

    blocks.delete_cache = COPIES
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=asked.host,
        server_port=asked.port,
        auth_dependency=None if door is None else owner,
        root_path=asked.root_path or None,
        allowed_paths=[str(service.outputs)],
        show_error=False,
        max_file_size=service.limits.largest_upload,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        footer_links=[],
        run_history=False,
        theme=look.theme(),
        css=look.CSS,
        head=look.HEAD,
        i18n=words.translator(),
    )
    # without this, Gradio takes any path of this machine as a file that was uploaded
    blocks.has_launched = True
    blocks._queue.sleep_when_free = blocks._queue.progress_update_sleep_when_free = LOOK


@asynccontextmanager
async def _with_threads(_app: FastAPI) -> AsyncIterator[None]:
    from anyio.to_thread import current_default_thread_limiter

    current_default_thread_limiter().total_tokens = THREADS
    yield


def _run(asked: Serving, listener: socket.socket, door: accounts.Door | None) -> None:
    import uvicorn

    from app.serve.limits import Limits
    from app.serve.service import Service
    from app.ui import page

    limits = Limits()
    limits = replace(limits, models=(*limits.models, *asked.model))
    if asked.tuned is not None:  # calibrated numbers of its plans lie beside them
        limits = replace(limits, roots=(*limits.roots, asked.tuned))
    service = Service(asked.out, limits=limits, devices=tuple(asked.device), tuned=asked.tuned)
    address = f"http://{_shown(asked.host)}:{listener.getsockname()[1]}"
    with _ended_by_signals(), _started(service):
        shared = _tunnel(listener) if asked.share else None
        app = build(service, page.build(service), asked, door, _names(asked, shared))
        say(f"{shared or asked.root_path or address} (results in {asked.out}; Ctrl-C ends it)")
        if asked.open:
            webbrowser.open(address)
        uvicorn.Server(_config(app, asked)).run(sockets=[listener])


def _config(app: Guard, asked: Serving) -> uvicorn.Config:
    """How it is served.

    Behind a proxy or a tunnel of this machine, and from those alone, the addresses of visitors are
    taken from what they forward: else all visitors would be one, whose failed logins lock out all.
    """
    import uvicorn

    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=asked.share or bool(asked.root_path),
        forwarded_allow_ips=FORWARDERS,
        timeout_graceful_shutdown=GRACE,
    )


@contextmanager
def _started(service: Service) -> Iterator[None]:
    service.start()
    try:
        yield
    finally:
        service.close()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C and a polite kill end the server in the same, orderly way."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        say("ended; what was queued goes on when it is started again")
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _listening(asked: Serving) -> Iterator[socket.socket]:
    try:
        family = socket.AF_INET6 if ":" in asked.host else socket.AF_INET
        listener = socket.create_server((asked.host, asked.port), family=family)
    except OSError as error:
        raise BadInput(
            f"--host {asked.host} --port {asked.port}: cannot listen there ({error.strerror}); "
            "give another --port, or an address of this machine."
        ) from error
    with listener:
        yield listener


@contextmanager
def _empty_folder() -> Iterator[Path]:
    """Stand in a new folder, and put temporary files there; as it was at the end.

    Gradio is told all by arguments: its environment variables are taken away.
    """
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    here, before = Path.cwd(), tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="accel-ui-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        try:
            os.chdir(folder)
            tempfile.tempdir = name
            yield folder
        finally:
            tempfile.tempdir = before
            os.chdir(here)


def _folder(out: Path) -> Path:
    """The folder of the results, made and in full: the process goes elsewhere."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"--out {out}: this folder cannot be made ({error.strerror}); give another one."
        ) from error
    return out.resolve()


def _model(name: str) -> str:
    """A folder in full, for the same reason; a name or hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _names(asked: Serving, shared: str | None) -> frozenset[str]:
    urls = (asked.root_path, shared or "")
    names = (urlsplit(url).hostname or "" for url in urls)
    given = (asked.host, socket.gethostname(), *asked.allow_host, *names)
    return frozenset(name.lower().rstrip(".") for name in given if name)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _tunnel(listener: socket.socket) -> str:
    """A public address that leads here."""
    from gradio.networking import setup_tunnel

    port = listener.getsockname()[1]
    try:
        return str(setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None))
    except Exception as error:
        raise AccelError(
            f"--share: Gradio's tunnel cannot be reached ({error}); it needs the network."
        ) from error


def _add_user(asked: Serving) -> None:
    if asked.auth is None:
        raise BadInput("--add-user needs --auth FILE: the file that the user is written to.")
    assert asked.add_user is not None
    password = typer.prompt("password", hide_input=True, confirmation_prompt=True, err=True)
    accounts.add(asked.auth, asked.add_user, password)
    say(f"{asked.add_user} may log in with --auth {asked.auth}")


def _check_gradio() -> None:
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise BadInput("The app needs Gradio: pip install 'diffusers-accel[ui]'.")
