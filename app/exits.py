"""How a command ends: one line on stderr, and an exit code.

==== =====================================================================================
0    done
1    failed while running: a damaged model, NaN or infinite latents, a full disk, a bug
2    what was typed cannot be done: options, plan, files that are not there, methods that do
     not fit each other or the model
3    some rows of a batch were made, some were not
130  interrupted; nothing was written, of a batch what had been made
==== =====================================================================================
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import typer

FAILED, USAGE, PARTIAL, INTERRUPTED = 1, 2, 3, 130


@contextmanager
def told(debug: bool) -> Iterator[None]:
    """Turn errors into one line and an exit code, warnings into one line each.

    Args:
        debug: Raise errors as they are instead, with their traceback.
    """
    with warnings.catch_warnings():
        _show_warnings()
        try:
            yield
        except (typer.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            say("interrupted: nothing was written")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if debug:
                raise
            say(f"error: {_message(error)}")
            raise typer.Exit(_code(error)) from error


def say(text: str) -> None:
    """Write one line for a human: to stderr, whatever is in it."""
    typer.echo(" ".join(text.split()), err=True)


def _code(error: Exception) -> int:
    from accel.errors import BadInput, BadModel, PlanError, UnsupportedModel

    if isinstance(error, BadModel):
        return FAILED
    return USAGE if isinstance(error, (PlanError, BadInput, UnsupportedModel)) else FAILED


def _message(error: Exception) -> str:
    from accel.errors import AccelError

    if isinstance(error, AccelError):
        return str(error)
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first} (--debug shows where)"


def _show_warnings() -> None:
    """Show each warning once, in one line."""
    shown: set[str] = set()

    def show(
        message: Warning | str,
        _category: type[Warning],
        _filename: str,
        _lineno: int,
        _file: TextIO | None = None,
        _line: str | None = None,
    ) -> None:
        text = str(message)
        if text not in shown:
            shown.add(text)
            say(f"warning: {text}")

    warnings.simplefilter("default", UserWarning)
    show_warning: Any = show
    warnings.showwarning = show_warning
