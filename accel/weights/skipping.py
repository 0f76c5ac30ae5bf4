"""Which layers stay as they are: groups by name, and patterns of paths.

Few weights are in them, and much hangs on their rounding: what embeds pictures, texts and times,
what modulates norms, what writes the output, and the first and last block. After Q-Diffusion and
PTQ4DM, which leave input and output alone; `accel calibrate int8` measures it for a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from accel.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

PARTS = {
    "embedders": ("*embed*", "*caption_projection*", "*text_proj*", "*time_proj*"),
    "modulation": (
        "*norm*",
        "*adaln*",
        "*modulation*",
        "*_mod.*",
        "*time_emb_proj*",
        "*distilled_guidance*",
    ),
    "output": ("proj_out", "proj_out_[12]", "final_layer*", "all_final_layer*", "*norm_out*"),
}
"""Patterns of paths by group; the first group that matches counts."""

ENDS = "ends"
"""The first and the last block of a transformer. A UNet has none: its ends are convolutions."""

RECOMMENDED = "recommended"
"""All groups."""

GROUPS = (*PARTS, ENDS)


def skipped(core: nn.Module, paths: Iterable[str], skip: tuple[str, ...]) -> dict[str, str]:
    """The layers that stay as they are, by path, and what of ``skip`` they are of.

    Args:
        core: The network.
        paths: Of its layers.
        skip: Groups, patterns of paths, or ``recommended``.
    """
    names = tuple(name for one in skip for name in (GROUPS if one == RECOMMENDED else (one,)))
    patterns = {name: _ends(core) if name == ENDS else PARTS.get(name, (name,)) for name in names}
    first = {path: _first(path, patterns) for path in paths}
    return {path: name for path, name in first.items() if name is not None}


def check_patterns(cores: Iterable[nn.Module], skip: tuple[str, ...]) -> None:
    """Refuse a pattern that fits no layer of any network.

    Raises:
        BadInput: Naming it.
    """
    from accel.seams.quantizing import linears

    paths = [path for core in cores for path in linears(core)]
    for pattern in skip:
        known = pattern in (*GROUPS, RECOMMENDED)
        if not known and not any(_fits(path, pattern) for path in paths):
            raise BadInput(
                f"skip: {pattern!r} is the path of no linear layer (such as {paths[-1:]}), and "
                f"none of the groups {', '.join((*GROUPS, RECOMMENDED))}."
            )


def _first(path: str, patterns: Mapping[str, tuple[str, ...]]) -> str | None:
    matching = (
        name for name, some in patterns.items() if any(_fits(path, pattern) for pattern in some)
    )
    return next(matching, None)


def _fits(path: str, pattern: str) -> bool:
    return fnmatchcase(path.lower(), pattern.lower())


def _ends(core: nn.Module) -> tuple[str, ...]:
    """Patterns of what is in the first and the last block."""
    from accel.seams.blocks import end_blocks

    return tuple(f"{path}.*" for path in end_blocks(core))
