"""What clips are drawn under: every method of three families, at knobs that fit a clip's grid.

The published boxes, windows and clusters are for clips of 30,000 tokens and more; on the 5 × 8 × 8
tokens of scenes-wan most of them would keep everything. So the sides of what is kept are parts of
the grid's sides, whatever the grid.
"""

from __future__ import annotations

from typing import Any

import samplers
from accel import attention, cache, tokens
from accel.attach import Accelerator
from accel.seams.layout import Layout

Forms = dict[str, tuple[Accelerator, ...]]

EASY = "EasyCache"
EASY_CACHE = cache.EasyCache(threshold=0.1)
"""The cache that everything else is drawn under once more."""

EASY_FEW = cache.EasyCache(threshold=0.4)
"""The same for large clips, which are drawn in some eight steps: each changes more."""

JOINED = (
    ("FirstBlock", cache.FirstBlock(threshold=0.1, predictor="newton")),
    ("TaylorSeer", cache.TaylorSeer(interval=4, site="network")),
    ("MagCache", cache.MagCache(threshold=0.12)),
)
"""The caches that the best sparse attentions are drawn under besides."""


def grid_of(pipe: Any, call: dict[str, Any]) -> Layout:
    """The tokens of a clip of Wan's make."""
    patch = pipe.transformer.config.patch_size
    every, side = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
    frames = ((call["num_frames"] - 1) // every + 1) // patch[0]
    return Layout(0, frames, call["height"] // side // patch[1], call["width"] // side // patch[2])


def sparse(grid: Layout) -> Forms:
    """Sparse attentions: boxes and windows of a quarter and a half of a frame's sides."""
    rows, columns = max(1, grid.height // 4), max(1, grid.width // 4)
    box, block = (1, rows, columns), max(8, min(64, grid.frame // 4))
    near = min(3, grid.frames)
    window = (near, max(1, grid.height // 2), max(1, grid.width // 2))
    tube = f"Surrounding({box}) | Neighbourhood((None, {rows}, {columns}), {box})"
    band, cell = max(1, grid.frame // 16), block // 2
    groups, cells = max(8, grid.image // 128), max(16, grid.image // 32)
    found: dict[str, Accelerator] = {
        "GRAT surrounding": attention.GRAT(form="surrounding", box=box),
        "Neighbourhood": attention.Neighbourhood(window=window, stride=box),
        "AdaSpa": attention.AdaSpa(block=block, keep=0.3),
        "SpargeAttn": attention.SpargeAttn(block=block, cell=cell, share=0.8, likeness=-1.0),
        "Radial": attention.Radial(decay=0.25, block=2 * band, warm_up=0.2),
        "SVG": attention.SVG(keep=0.4, block=band),
        "SVG2": attention.SVG2(groups=groups, cells=cells, share=0.8, first=10, later=1),
        "GRAT criss-cross": attention.GRAT(box=box),
        "sliding tile": attention.Neighbourhood(
            form="sliding tile", window=(1 if near < 3 else 3, 3, 3), stride=box
        ),
        "Pattern": attention.Pattern(expression=tube),
        "Searched, low-bit": attention.Searched(
            indicator="low-bit", block=block, cell=cell, share=0.8, warm_up=0.2
        ),
    }
    return {name: (method,) for name, method in found.items()}


def caches() -> Forms:
    """Caches, each at a knob that loses little on scenes-wan."""
    found: dict[str, Accelerator] = {
        EASY: EASY_CACHE,
        **dict(JOINED),
        "EasyCache 0.2": cache.EasyCache(threshold=0.2),
        "ZEUS": cache.ZEUS(interval=3),
        "SADA": cache.SADA(),
        "DMD": cache.DMD(interval=4),
        "HiCache": cache.HiCache(interval=4, site="blocks"),
        "FoCa": cache.FoCa(interval=4, site="blocks"),
        "TaylorSeer, modules": cache.TaylorSeer(interval=4),
        "DBCache": cache.DBCache(threshold=0.1, back=1, predictor="newton"),
        "TeaCache": cache.TeaCache(threshold=0.2),
        "DeltaDiT": cache.DeltaDiT(interval=2),
        "FORA": cache.FORA(interval=2),
        "PAB": cache.PAB(),
        "Custom": cache.Custom(interval=3, predictor="newton"),
        "TextKV": cache.TextKV(),
        "DeepCache": cache.DeepCache(),
    }
    return {name: (method,) for name, method in found.items()}


def reducers() -> Forms:
    """Reductions of tokens, in windows that fit a frame of 8 × 8."""
    found: dict[str, Accelerator] = {
        "ToMe": tokens.ToMe(),
        "ToMe, kept": tokens.ToMe(steps=4, layers=0),
        "ToDo": tokens.ToDo(),
        "tokens.SADA": tokens.SADA(refresh=2, most=64),
        "ToMA": tokens.ToMA(window=4),
        "Importance": tokens.Importance(),
        "Transforming": tokens.Transforming(window=4),
    }
    return {name: (method,) for name, method in found.items()}


def solvers() -> Forms:
    """Samplers, which are drawn under EasyCache alone: by themselves they take as long as stock."""
    return {
        "DPM++ 2M": (samplers.DPMSolverPP(),),
        "UniPC": (samplers.UniPC(),),
    }


def under(forms: Forms, name: str, method: Accelerator) -> Forms:
    """Forms with a cache beside."""
    return {f"{form} + {name}": (*methods, method) for form, methods in forms.items()}


def small(grid: Layout) -> Forms:
    """All of them, the most important first: a run that is cut off has those."""
    sides = sparse(grid)
    first = {EASY: caches()[EASY]} | sides | under(sides, EASY, EASY_CACHE) | caches()
    folded = reducers()
    solved = under(solvers(), EASY, EASY_CACHE)
    return first | folded | under(folded, EASY, EASY_CACHE) | solved


LARGE = ("Neighbourhood", "GRAT surrounding", "Radial", "SVG", "AdaSpa")


def large(grid: Layout) -> Forms:
    """A few, for clips that take minutes: the sparse attentions that lead, and EasyCache."""
    found: Forms = {EASY: (EASY_FEW,)}
    for name, methods in sparse(grid).items():
        if name in LARGE:
            found |= {name: methods} | under({name: methods}, EASY, EASY_FEW)
    return found
