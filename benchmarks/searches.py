"""What sparse attentions that look for their tables spend on looking, and on attending.

Each method's own way of looking – AdaSpa's exact masses, those of 4-bit numbers, SpargeAttn's means
of blocks, Sparse VideoGen 2's clusters, Sparse VideoGen's trial of heads – with one and the same
selection: a tenth of the cells. Clusters differ in size, and those with the most mass are the large
ones, so that Sparse VideoGen 2 attends to more pairs by it than the others do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from measure import Visit, clocked, ratio, repeated, spread
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from accel.attention.blocks import compiled
from accel.attention.clusters import Centroids
from accel.attention.lowerings import lowered
from accel.attention.masses import Exact, Heads, Indicator, LowBit, Memory, Pooled
from accel.attention.patterns.sparse_videogen import Spatial, Temporal
from accel.attention.profiling import chosen_of
from accel.attention.selection import TopK
from accel.attention.serving import Moment
from accel.attention.tables import Found
from accel.seams.attention import Asked
from accel.seams.layout import Layout

KEEP = 0.1
"""Share of the cells that is kept."""

STEPS = 50
"""Of the run over which a search that is made twice is spread."""

SAMPLES = 64
"""Queries by which Sparse VideoGen judges a head."""


@dataclass(frozen=True)
class Search:
    """A way of looking.

    Attributes:
        indicator: What looks.
        often: Share of a run's steps at which it looks.
    """

    indicator: Indicator
    often: float = 1.0


def searches(layout: Layout) -> dict[str, Search]:
    """By method; clusters are as large as with the authors at 720p, and not more than theirs."""
    groups, cells = (max(4, min(most, layout.image // size)) for most, size in CLUSTERS)
    return {
        "AdaSpa": Search(Exact(64, 64), 2 / STEPS),
        "Searched, low-bit": Search(LowBit(64, 64)),
        "SpargeAttn": Search(Pooled(128, 64, likeness=-1.0)),
        "SVG2": Search(Centroids(groups, cells)),
    }


CLUSTERS = (300, 128), (1000, 32)
"""Most clusters of queries and of keys, and tokens in one."""


def heads_of(layout: Layout, qkv: Tensor) -> Heads:
    """Queries and keys as a search is given them."""
    query, key = (x[0][:, layout.image_span] for x in qkv[:2])
    return Heads(query, key, qkv[1][0][:, layout.text_span], None, qkv.shape[-1] ** -0.5)


def found_by(indicator: Indicator, heads: Heads, memory: Memory) -> tuple[Found, Memory]:
    """Look, and keep the share of cells with the most mass."""
    estimate = indicator(heads, memory)
    kept = TopK(KEEP)(estimate.mass[None])[0]
    return Found(estimate.groups, estimate.cells, kept), estimate.memory


def attend(found: Found, layout: Layout, qkv: Tensor) -> Tensor:
    """Attention by what was found, its lowering made anew as at every attention."""
    return lowered("gather", found.table(layout))(*qkv)


def timed(
    search: Callable[[], Any],
    attend: Callable[[], Any],
    often: float,
    qkv: Tensor,
    spent: float,
    sync: Callable[[], None],
) -> dict[str, Any]:
    """Seconds of a search and of attention, and how much faster than dense attention they are.

    Dense attention, by PyTorch and without a mask, comes in the same rounds: what is compared was
    measured side by side.

    Args:
        search: Looks once.
        attend: Attends by what was found.
        often: Share of a run's steps at which it looks.
        qkv: Queries, keys and values, ``[3, 1, H, S, D]``.
        spent: Seconds in which the rounds should fit.
        sync: Waits for the device.
    """
    runs = {
        "search": search,
        "attend": attend,
        "dense": lambda: scaled_dot_product_attention(*qkv),
    }
    visits: dict[str, Visit] = {part: partial(clocked, run, sync) for part, run in runs.items()}
    seconds = repeated(visits, spent)
    pairs = zip(seconds["attend"], seconds["search"], strict=True)
    whole = [own + often * looking for own, looking in pairs]
    return {
        "often": often,
        **{f"{part}_seconds": spread(taken) for part, taken in seconds.items()},
        "speedup": ratio(seconds["dense"], seconds["attend"]),
        "speedup_with_search": ratio(seconds["dense"], whole),
    }


def row_of(
    name: str, one: Search, layout: Layout, qkv: Tensor, spent: float, sync: Callable[[], None]
) -> dict[str, Any]:
    """Seconds of the first search, of one that goes on from it, and of attention (`timed`)."""
    heads, kept = heads_of(layout, qkv), list[tuple[Found, Memory]]()
    first = clocked(lambda: kept.append(found_by(one.indicator, heads, {})), sync)
    found, memory = kept[0]
    search = partial(found_by, one.indicator, heads, memory)
    return {
        "method": name,
        "parameters": repr(one.indicator),
        "density": found.density(layout),
        "first_search_seconds": first,
        **timed(search, partial(attend, found, layout, qkv), one.often, qkv, spent, sync),
    }


def videogen(layout: Layout, qkv: Tensor, spent: float, sync: Callable[[], None]) -> dict[str, Any]:
    """The same of Sparse VideoGen, whose search is a trial of both bands on a few queries."""
    patterns = [kind(keep=KEEP + 2 * layout.text / layout.tokens) for kind in (Spatial, Temporal)]
    tables = [compiled(pattern, layout, qkv.device) for pattern in patterns]
    first = SimpleNamespace(index=0)
    moment = Moment(Asked(*qkv), layout, None, first, (), first)
    # random heads have no liking: half of them take either band
    halves = [list(range(side, qkv.shape[2], 2)) for side in range(2)]
    lowerings = [lowered("gather", table) for table in tables]

    def attends() -> list[Tensor]:
        pairs = zip(lowerings, halves, strict=True)
        return [lowering(*qkv[:, :, some]) for lowering, some in pairs if some]

    search = partial(chosen_of, moment, patterns, SAMPLES)
    return {
        "method": "SVG",
        "parameters": " or ".join(map(repr, patterns)),
        "density": sum(table.density for table in tables) / len(tables),
        "first_search_seconds": clocked(search, sync),
        **timed(search, attends, 1.0, qkv, spent, sync),
    }


def searched(
    layout: Layout, qkv: Tensor, spent: float, sync: Callable[[], None]
) -> list[dict[str, Any]]:
    """A row for each method, beside dense attention.

    Args:
        layout: The tokens.
        qkv: Queries, keys and values, ``[3, 1, H, S, D]``.
        spent: Seconds in which a method's repeats should fit.
        sync: Waits for the device.
    """
    rows = [row_of(name, one, layout, qkv, spent, sync) for name, one in searches(layout).items()]
    if layout.frames > 1:
        rows.append(videogen(layout, qkv, spent, sync))
    return [row | {"tokens": layout.tokens} for row in rows]
