"""What stands before every request, to the pages and to the REST interface alike.

In this order: only names that are ours in ``Host`` (DNS rebinding); nothing from pages of other
origins (cross-site requests); bodies no larger than what is admitted; a session where there is a
login; of files, results of the owner's jobs and Gradio's own copies alone. Every answer gets the
headers of ``HEADERS`` and a content security policy; answers to errors of ours say nothing about
the inside.

The policy for Gradio's page: scripts are files of ours or carry the nonce of the answer, so that a
script put into a page by a prompt does not run. ``'unsafe-eval'`` is there because Gradio makes
functions of the ``js`` of its events, ``'unsafe-inline'`` for styles because its components set
``style`` attributes and add ``<style>`` elements while they run. No other answer gets a nonce: what
somebody brought here as HTML is no page of ours.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.accounts import ANYBODY, Door
from app.rest import COOKIE, OWNER, problem
from app.serve.jobs import NoSuchJob
from app.serve.service import Service

MIB = 2**20
MESSAGE_BYTES, FORM_BYTES = 4 * MIB, 64 * 2**10
"""The largest body that is no upload; what a form adds to the file in it."""

SAFE = ("GET", "HEAD", "OPTIONS")
OPEN = ("/login", "/api/v1/health")
"""What is answered without a session."""
PAGE = "/"
"""Where Gradio's page is; its tabs are no pages of their own."""

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=(), payment=(), usb=(), "
    "serial=()",
}
FOR_PAGE = (
    "default-src 'self'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; worker-src 'self' blob:; connect-src 'self'; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
FOR_DATA = (
    "default-src 'none'; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'; "
    "form-action 'none'; frame-ancestors 'none'"
)

_UPLOADS = re.compile(r"/(api/v1/uploads|gradio_api/upload)/?")
_FILE = re.compile(r"/+gradio_api/+file[=/](?P<path>.*)", re.DOTALL)
_CLOSED = re.compile(
    r"/+(gradio_api/+(proxy=|deep_link|mcp|dev/|runs|run-history|vibe-|undo-vibe|profiling|stream/"
    r"|process_recording)|monitoring)"
)
"""What Gradio offers and the pages do not use."""
_SCRIPT = re.compile(rb"<script(?![^>]*\bsrc\s*=)", re.IGNORECASE)

MayRead = Callable[[str, str], bool]
"""Whether an owner may be sent the file of a path."""


@dataclass(frozen=True)
class Policy:
    """Who is answered, and what.

    Attributes:
        may_read: Which files Gradio's route of files sends.
        upload_bytes: The largest upload.
        names: What ``Host`` may be, beside addresses in numbers and ``localhost``.
        origins: ``HOST[:PORT]`` under which a proxy serves the pages.
        prefix: The path under which a proxy serves them.
        door: Who may come in; ``None``: everybody, as ``local``.
    """

    may_read: MayRead
    upload_bytes: int
    names: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    prefix: str = ""
    door: Door | None = None


def results_of(service: Service, copies: Path) -> MayRead:
    """Files of results to the owner of their job, and Gradio's copies.

    Args:
        service: Knows whose job it is.
        copies: Where Gradio keeps what it shows and what is brought to it, under names that are
            digests: who knows one has been shown it.
    """
    copies, outputs = copies.resolve(), service.outputs.resolve()

    def may_read(owner: str, text: str) -> bool:
        try:
            path = Path(text).resolve()
            if path.is_relative_to(copies):
                return True
            return path.is_relative_to(outputs) and path in _results(service, owner, path)
        except (OSError, ValueError, NoSuchJob):
            return False

    return may_read


def _results(service: Service, owner: str, path: Path) -> Iterator[Path]:
    """The files of the owner's job whose folder a path lies in."""
    job = service.job(owner, path.parent.name)
    roles = job.result.files if job.result is not None else ()
    yield from (service.file(owner, job.id, role).resolve() for role in roles)


class Guard:
    """Stands before an ASGI app.

    Args:
        app: What answers.
        policy: What comes through.
    """

    def __init__(self, app: ASGIApp, policy: Policy) -> None:
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have it answered."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, path = Request(scope), _below(self._policy.prefix, scope["path"])
        answer = Answer(send, page=path == PAGE)
        owner = self._owner(request)
        refusal = self._refusal(request, path) or self._unknown(request, path, owner)
        if refusal is None and owner is not None:
            refusal = await self._unreadable(path, owner)
        if refusal is not None:
            await refusal(scope, receive, answer)
            return
        headers = _uncompressed(scope, path)
        inner = {**scope, OWNER: owner, "path": path, "root_path": "", "headers": headers}
        await self._app(inner, _limited(receive, self._limit(path)), answer)

    def _owner(self, request: Request) -> str | None:
        door = self._policy.door
        return ANYBODY if door is None else door.user(request.cookies.get(COOKIE))

    def _refusal(self, request: Request, path: str) -> Response | None:
        """Of what nobody may ask."""
        if not self._is_ours(request.headers.get("host", "")):
            return problem(421, "This server has another name: see --allow-host and --root-path.")
        if self._is_foreign(request):
            return problem(403, "This comes from a page of another origin: open the app itself.")
        if _CLOSED.match(path):
            return problem(404, "There is nothing here.")
        return self._too_large(request.headers, self._limit(path))

    def _is_ours(self, host: str) -> bool:
        name = _name(host)
        return name == "localhost" or name in self._policy.names or _is_address(name)

    def _is_foreign(self, request: Request) -> bool:
        origin = request.headers.get("origin")
        if origin is not None:
            ours = {request.headers.get("host", "").lower(), *self._policy.origins}
            return _netloc(origin) not in ours
        site = request.headers.get("sec-fetch-site", "none")
        return request.method not in SAFE and site not in ("none", "same-origin")

    def _limit(self, path: str) -> int:
        if _UPLOADS.fullmatch(path):
            return self._policy.upload_bytes + FORM_BYTES
        return MESSAGE_BYTES

    def _too_large(self, headers: Headers, limit: int) -> Response | None:
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and len(length) < 16 and int(length) <= limit:
            return None
        return problem(413, _too_large(limit))

    def _unknown(self, request: Request, path: str, owner: str | None) -> Response | None:
        """Of whom has no session where one is needed."""
        if owner is not None or path in OPEN:
            return None
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse(f"{self._policy.prefix}/login", 303)
        return problem(401, "Log in first, at /login.")

    async def _unreadable(self, path: str, owner: str) -> Response | None:
        """Of a file that is not for this owner, before Gradio looks for it."""
        found = _FILE.match(path)
        if found is None or await run_in_threadpool(self._policy.may_read, owner, found["path"]):
            return None
        return problem(403, "This file is not yours, or not there.")


class Answer:
    """Sends an answer on, with our headers.

    Gradio's page is held back until it is whole and its scripts have got the nonce; failures are
    replaced by a sentence that tells nothing about the inside.

    Args:
        send: Where to.
        page: Whether it is Gradio's page, rather than data.
    """

    def __init__(self, send: Send, *, page: bool) -> None:
        self._send = send
        self._page = page
        self._nonce = secrets.token_urlsafe(16)
        self._policy = FOR_PAGE.format(nonce=self._nonce) if page else FOR_DATA
        self._held: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        """Send a part of the answer."""
        if message["type"] == "http.response.start":
            await self._start(message)
        elif self._held is None:
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_whole(self._held)

    async def _start(self, message: Message) -> None:
        headers = MutableHeaders(scope=message)
        for name in [name for name in headers if name.startswith("access-control-")]:
            del headers[name]
        headers.update(HEADERS)
        headers.setdefault("Content-Security-Policy", self._policy)
        kind = headers.get("content-type", "")
        failed = message["status"] >= 500 and not kind.startswith("application/json")
        if failed or (self._page and kind.startswith("text/html")):
            self._held = message
        else:
            await self._send(message)

    async def _send_whole(self, start: Message) -> None:
        headers = MutableHeaders(scope=start)
        body = _SCRIPT.sub(b'<script nonce="%s"' % self._nonce.encode(), self._body)
        if start["status"] >= 500:
            body = bytes(problem(500, "This failed, and the server's log says why.").body)
            headers["Content-Type"] = "application/json"
            del headers["Content-Encoding"]
        if body:
            headers["Content-Length"] = str(len(body))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})


def _limited(receive: Receive, limit: int) -> Receive:
    """A body that ends in an error as soon as it is larger than a limit."""
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise HTTPException(413, _too_large(limit))
        return message

    return limited


def _too_large(limit: int) -> str:
    return f"The body is too large: at most {limit} bytes are taken here; send less."


def _below(prefix: str, path: str) -> str:
    """A path as the app knows it, whether or not the proxy has left its prefix on."""
    if prefix and (path == prefix or path.startswith(f"{prefix}/")):
        return path[len(prefix) :] or "/"
    return path


def _uncompressed(scope: Scope, path: str) -> list[tuple[bytes, bytes]]:
    """The headers of a request; the page, which gets a nonce, is asked for as it is."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    return [one for one in headers if path != PAGE or one[0] != b"accept-encoding"]


def _name(netloc: str) -> str:
    """The host in ``HOST[:PORT]``, in small letters; empty where that is none."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    """``HOST[:PORT]`` of an origin, in small letters; empty where it is none, such as ``null``."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    """Whether it is an address in numbers, which no other name server can point elsewhere."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
