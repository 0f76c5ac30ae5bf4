"""The page to log in at, and the two routes behind it."""

from __future__ import annotations

import base64
import hashlib
from math import ceil
from typing import Annotated

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from markupsafe import Markup

from app.accounts import LONGEST, SESSION_SECONDS, Door, Locked, Refused
from app.rest import COOKIE, problem

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --paper: #fff; --bad: #8c1d18; --on: #1f5fa8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #161b22; --bad: #ffb4ab; --on: #7db3f0; }
}
body { font: 1rem system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0; }
main { max-width: 20rem; margin: 15vh auto; padding: 1rem; }
label { display: block; margin-top: 1rem; }
input, button { font: inherit; width: 100%; box-sizing: border-box; padding: 0.6rem; }
input { margin-top: 0.25rem; }
button { margin-top: 1.5rem; min-height: 44px; }
:focus-visible { outline: 3px solid var(--on); outline-offset: 2px; }
p { color: var(--bad); }
"""
_PAGE = Markup(
    "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Log in · accel</title>"
    "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    "<style>{style}</style></head><body><main><h1>Log in</h1>{told}"
    "<form method='post'><label>Name<input name='username' autocomplete='username' required "
    "autofocus></label><label>Password<input name='password' type='password' "
    "autocomplete='current-password' required></label><button>Log in</button></form>"
    "</main></body></html>"
)
_TOLD = Markup("<p role='alert'>{text}</p>")
_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_DIGEST}'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


def routes(door: Door, prefix: str) -> APIRouter:
    """``/login`` and ``/logout``.

    A browser gets the page and is sent on; other clients get JSON and the cookie.

    Args:
        door: Who may come in.
        prefix: The path under which a proxy serves the app.
    """
    router = APIRouter()

    @router.get("/login")
    def show() -> Response:
        return _page(200, "")

    @router.post("/login")
    def enter(
        request: Request,
        username: Annotated[str, Form(max_length=64)],
        password: Annotated[str, Form(max_length=LONGEST)],
    ) -> Response:
        place = request.client.host if request.client else ""
        try:
            token = door.enter(username.strip(), password, place)
        except Locked as error:
            return _refused(request, 429, error, {"Retry-After": str(ceil(error.seconds))})
        except Refused as error:
            return _refused(request, 401, error, {})
        answer = _sent_on(prefix) if _is_browser(request) else JSONResponse({"success": True})
        answer.set_cookie(
            COOKIE,
            token,
            max_age=int(SESSION_SECONDS),
            path=f"{prefix}/",
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="lax",
        )
        return answer

    @router.post("/logout")
    def leave(request: Request) -> Response:
        door.leave(request.cookies.get(COOKIE))
        answer = RedirectResponse(f"{prefix}/login", 303)
        answer.delete_cookie(COOKIE, path=f"{prefix}/")
        return answer

    return router


def _sent_on(prefix: str) -> Response:
    return RedirectResponse(f"{prefix}/", 303)


def _is_browser(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")


def _refused(request: Request, code: int, error: Exception, headers: dict[str, str]) -> Response:
    if _is_browser(request):
        return _page(code, str(error), headers)
    return problem(code, str(error), headers)


def _page(code: int, told: str, headers: dict[str, str] | None = None) -> Response:
    shown = _TOLD.format(text=told) if told else Markup("")
    text = _PAGE.format(style=Markup(_STYLE), told=shown)
    ours = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"}
    return HTMLResponse(text, code, {**(headers or {}), **ours})
