"""Which layers stay as they are: groups by name, and patterns of paths.

Few weights are in them, and much hangs on their rounding: what embeds pictures, texts and times,
what modulates norms, what writes the output, and the first and last block. After Q-Diffusion and
PTQ4DM, which leave input and output alone; `accel calibrate int8` measures it for a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

PARTS = {
    "embedders": ("*embed*", "*caption_projection*", "*text_proj*", "*time_proj*"),
    "modulation": ("*norm*", "*adaln*", "*modulation*", "*time_emb_proj*", "*.emb_layers.*"),
    "output": ("proj_out", "final_layer*", "all_final_layer*", "*norm_out*"),
}
"""Patterns of paths by group; the first group that matches counts."""

ENDS = "ends"
"""The first and the last block of a transformer. A UNet has none: its ends are convolutions."""

RECOMMENDED = "recommended"
"""All groups."""

GROUPS = (*PARTS, ENDS)


def skipped(core: nn.Module, paths: Mapping[str, Any], skip: tuple[str, ...]) -> dict[str, str]:
    """The layers that stay as they are, by path, and what they are of.

    Args:
        core: The network.
        paths: Its layers.
        skip: Groups, patterns of paths, or ``recommended``.
    """
    names = {name for one in skip for name in (GROUPS if one == RECOMMENDED else (one,))}
    patterns = {name: PARTS.get(name, (name,)) for name in (*PARTS, *skip) if name in names}
    if ENDS in names:
        patterns[ENDS] = _ends(core)
    return {
        path: name
        for path in paths
        for name in [_first(path, patterns)]
        if name is not None
    }


def _first(path: str, patterns: Mapping[str, tuple[str, ...]]) -> str | None:
    matching = (
        name
        for name, some in patterns.items()
        if any(fnmatchcase(path.lower(), pattern.lower()) for pattern in some)
    )
    return next(matching, None)


def _ends(core: nn.Module) -> tuple[str, ...]:
    """Patterns of what is in the first and the last block."""
    from accel.seams.blocks import end_blocks

    return tuple(f"{path}.*" for path in end_blocks(core))
