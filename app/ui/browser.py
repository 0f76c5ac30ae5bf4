"""The browser at the other end: whether it is here, and how it is told of errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import gradio as gr
from markupsafe import escape

from accel.errors import AccelError
from app.files import without_folders

PASSED_ON = ("x-forwarded-for", "x-real-ip", "forwarded")
"""Headers of a browser that sits behind a proxy, wherever that is."""


def is_here(request: gr.Request | None) -> bool:
    """Whether the browser runs on the machine of the server."""
    client = None if request is None else request.client
    if request is None or client is None or any(name in request.headers for name in PASSED_ON):
        return False
    try:
        return ip_address(client.host).is_loopback
    except ValueError:
        return False


def who(request: gr.Request | None) -> str:
    """The page of a browser: what two of them do is kept apart."""
    return (request.session_hash if request else None) or "here"


@contextmanager
def refusals() -> Iterator[None]:
    """Tell the browser of an error in its own words, which name the fix; files without folders.

    Raises:
        gr.Error: For every ``AccelError``.
    """
    try:
        yield
    except AccelError as error:
        raise gr.Error(str(escape(without_folders(str(error)))), print_exception=False) from error
