"""What a row is called: its id, its seed, its file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from string import Formatter
from typing import Any, Literal

from accel.errors import BadInput

FIELDS = ("index", "id", "slug", "seed", "model", "width", "height", "steps", "frames")
LONGEST = 200
"""Bytes of a part of a name; file systems take 255."""

LONGEST_ID = 128
DIGITS = 12
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]')


def identity(prompt: str, negative: str | None, occurrence: int) -> str:
    """The id of a row that brings none: it follows from what the row shows, not from its place.

    Args:
        prompt: What to draw.
        negative: The negative prompt.
        occurrence: How many rows before it show the same.
    """
    text = "\0".join((prompt, "" if negative is None else f"-{negative}", str(occurrence)))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def seed(kind: Literal["random", "fixed", "increment"], base: int, index: int, id: str) -> int:
    """The seed of a row that brings none, 0 to 2⁶³ - 1; it depends on no worker and no order.

    Args:
        kind: ``random`` follows from base and id, ``increment`` from base and place.
        base: Of the job.
        index: Place of the row in the input, from 0.
        id: Of the row.
    """
    match kind:
        case "fixed":
            return base
        case "increment":
            return (base + index) % 2**63
        case "random":
            return int.from_bytes(hashlib.sha256(f"{base}\0{id}".encode()).digest()[:4])


def check_template(template: str) -> None:
    """Refuse a template of names that cannot be filled, or that leads out of the folder.

    Raises:
        BadInput: If it does.
    """
    try:
        asked = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise BadInput(f"--name {template!r}: {error}.") from error
    for name in asked:
        if name not in FIELDS:
            raise BadInput(
                f"--name {template!r}: there is no {{{name}}}; there are "
                f"{', '.join(f'{{{field}}}' for field in FIELDS)}."
            )
    parts = template.split("/")
    if template.startswith("/") or "\\" in template or any(p in ("", ".", "..") for p in parts):
        raise BadInput(
            f"--name {template!r} leads out of the folder, or nowhere: write names such as "
            "'{index:05d}_{slug}' or '{model}/{id}'."
        )
    sample = dict.fromkeys(FIELDS, 1) | {"id": "a", "slug": "a", "model": "a"}
    filled(template, sample, "")


def filled(template: str, values: Mapping[str, Any], suffix: str) -> str:
    """The name of a file below the folder: no part of it is hidden, too long, or a way out.

    Raises:
        BadInput: If the template does not go with the values.
    """
    plain = {
        key: _FORBIDDEN.sub("_", value) if isinstance(value, str) else value
        for key, value in values.items()
    }
    try:
        made = template.format(**plain)
    except (ValueError, IndexError, KeyError) as error:
        raise BadInput(f"--name {template!r} cannot be filled: {error}.") from error
    *folders, last = made.split("/")
    return "/".join([*(_part(folder) for folder in folders), _part(last, suffix)])


def _part(text: str, suffix: str = "") -> str:
    """A part of a name: not empty, not hidden, not too long."""
    kept = _FORBIDDEN.sub("_", text).strip(". ") or "_"
    return kept.encode()[: LONGEST - len(suffix)].decode(errors="ignore") + suffix
