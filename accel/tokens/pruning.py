"""Blocks that compute some tokens and keep what they answered for the others.

A sample's tokens are chosen once a step, for all blocks of a level and all branches. A block keeps
the last answer that it gave for all tokens, for each branch of each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from accel.errors import UnsupportedModel
from accel.seams.blocks import Block, Streams
from accel.seams.denoisers import Call, Denoiser, Inner, Result, Row
from accel.seams.layout import Layout
from accel.seams.memory import bytes_of
from accel.seams.rows import scatter
from accel.seams.token_stream import (
    Stream,
    downsampling,
    parameters_of,
    pictures_of,
    stream_of,
    token_blocks,
    wrap_inside,
)
from accel.seams.tokens import Layouts, refuse_row_by_row, refuse_unknown
from accel.tokens.joint import beside_text
from accel.tokens.layers import SEAM, Left, Seen
from accel.tokens.sada import SADA, instability, kept, refreshes, unstable
from accel.tokens.stability import Stability

if TYPE_CHECKING:
    from accel.attach import Site, Undo
    from accel.report import Tally
    from accel.seams.solvers import Solver
    from accel.trajectory import Step, Update

INSTEAD = "Use tokens.ToMe, which works at the attention."

MASKS = "ip_adapter_masks"
"""Keyword of UNets' blocks for what is laid out by tokens, but cut to size only inside."""


class Place(NamedTuple):
    """A block, and the branch of the sample that it answered for."""

    denoiser: str
    path: str
    row: Row


class Full(NamedTuple):
    """An answer for all image tokens, ``[N, C]``, and its step."""

    step: int
    value: Tensor


class Pruning:
    """Runs the blocks of every network on the tokens that are unstable.

    Args:
        method: Its fields.
        tally: Where it says what it did.
        solver: The pipeline's scheduler.
    """

    def __init__(self, method: SADA, tally: Tally, solver: Solver) -> None:
        self._method = method
        self._tally = tally
        self._solver = solver
        self._seen = Seen()
        self._layouts = Layouts()
        self._call: Call | None = None
        self._tracks: dict[int, Stability] = {}
        self._full: dict[Place, Full] = {}
        self._chosen: dict[tuple[int, Layout], Tensor | None] = {}

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around the blocks, and in front of ``scheduler.step``.

        Raises:
            UnsupportedModel: For blocks that need the whole grid.
        """
        yield site.claim(SEAM)
        yield site.claim("size of the picture")
        yield site.claim("blocks")
        site.tally.memory = self._bytes
        site.tally.reason = self._why_idle
        yield site.on_start(self._reset)
        for denoiser in site.denoisers:
            refuse_unknown(denoiser, self._method.name)
            refuse_row_by_row(denoiser, self._method.name)
            yield site.around(denoiser, self)
            for path, block in token_blocks(denoiser, self._method.name, INSTEAD):
                names = parameters_of(block.module)
                around = partial(self._block, denoiser, path, block, names)
                yield wrap_inside(block.module, around)
        yield site.edit_step(self._edit)
        yield site.on_step(self._judge)

    def _reset(self) -> None:
        self._seen.reset()
        self._layouts = Layouts()
        self._call, self._tally.change = None, None
        self._tracks.clear()
        self._full.clear()
        self._chosen.clear()

    def _bytes(self) -> int:
        return bytes_of(self._full) + sum(track.bytes for track in self._tracks.values())

    def _why_idle(self) -> str:
        judged = "no block had fewer tokens to compute: it takes three computed steps to judge"
        return f"{judged}; {self._seen.why_idle()}" if self._seen.left else judged

    # At the solver.

    def _edit(self, update: Update) -> Tensor:
        self._solver.check(update.options)
        for number, track in self._tracks.items():
            rows = self._rows(number)
            if set(range(len(update.sample))[rows]) & set(update.filled):
                track.forget()
            else:
                track.learn(update.step, update.output[rows], update.sample[rows])
        output: Tensor = update.output
        return output

    def _judge(self, step: Step, result: Any) -> None:
        self._chosen.clear()
        if step.total is not None and step.index == step.total - 1:
            return
        for number, track in self._tracks.items():
            track.judge(step, result[0][self._rows(number)])

    def _rows(self, number: int) -> slice:
        """Rows of a sample's latents: DiT's pipeline steps its two branches side by side."""
        return slice(number, None, len(self._tracks))

    # At the network.

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Run the network."""
        for row in call.rows:
            self._tracks.setdefault(row.sample, Stability(self._solver))
        before, self._call = self._call, call
        try:
            result = inner(call)
        finally:
            self._call = before
        self._tally.change = self._seen.said()
        return result

    def _block(
        self,
        denoiser: Denoiser,
        path: str,
        block: Block,
        names: tuple[str, ...],
        inner: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        call, rows = self._call, denoiser.rows
        if call is None or call.denoiser is not denoiser:
            return inner(*args, **kwargs)
        stream = stream_of(call, self._layouts, names, args, kwargs)
        if len(stream.hidden) != len(rows):
            raise UnsupportedModel(
                f"{denoiser.name}.{path} is given {len(stream.hidden)} entries for {len(rows)} "
                f"rows: they cannot be told apart, so {self._method.name} does not fit."
            )
        self._refuse_masks(stream)
        try:
            self._check(call, stream)
        except Left as why:
            self._seen.left.setdefault((denoiser.name, path), str(why))
            return inner(*args, **kwargs)
        parts = self._parts(call, stream, denoiser, path, rows)
        answers = [
            (some, self._run(call, stream, block, (path, rows), some, index, inner))
            for some, index in parts
        ]
        return block.returns(_joined(answers, len(rows)))

    def _check(self, call: Call, stream: Stream) -> None:
        factor = downsampling(call, stream.own)
        if factor > self._method.max_downsample:
            raise Left(f"downsampled {factor}× (max_downsample is {self._method.max_downsample})")

    def _refuse_masks(self, stream: Stream) -> None:
        keywords = (value for value in stream.values if isinstance(value, Mapping))
        if any(value.get(MASKS) is not None for value in keywords):
            raise UnsupportedModel(
                f"{self._method.name} does not fit {stream.network} with {MASKS}: they are laid "
                "over the whole grid of tokens. Leave them out, or use tokens.ToMe, which works at "
                "the self-attention."
            )

    def _parts(
        self, call: Call, stream: Stream, denoiser: Denoiser, path: str, rows: Sequence[Row]
    ) -> list[tuple[list[int], Tensor | None]]:
        """Rows that run together, with the tokens that they compute; ``None``: all."""
        whole: list[int] = []
        parts: dict[int, tuple[list[int], Tensor | None]] = {}
        for place, row in enumerate(rows):
            index = self._tokens(call, stream, row.sample)
            full = self._full.get(Place(denoiser.name, path, row))
            latest = None if full is None else full.step
            if index is None or refreshes(call.step.index, latest, self._method.refresh):
                whole.append(place)
            else:
                parts.setdefault(row.sample, ([], index))[0].append(place)
        return [*([(whole, None)] if whole else []), *parts.values()]

    def _tokens(self, call: Call, stream: Stream, sample: int) -> Tensor | None:
        """The tokens of a sample that are computed at this step, ``[M]``; ``None``: all."""
        image = replace(stream.own, text=0, text_first=True)
        key = (sample, image)
        if key not in self._chosen:
            self._chosen[key] = self._choose(call, image, sample)
        return self._chosen[key]

    def _choose(self, call: Call, layout: Layout, sample: int) -> Tensor | None:
        criterion = self._tracks[sample].criterion
        if criterion is None:
            return None
        picture = pictures_of(call, criterion)
        if not _covers(picture, layout):
            raise UnsupportedModel(
                f"{self._method.name} does not fit: the scheduler steps latents of "
                f"{tuple(criterion.shape[1:])} where {type(call.denoiser.core).__name__} computes "
                f"{' × '.join(map(str, layout.grid))} tokens, so that they cannot be told apart. "
                "Use tokens.ToMe, which works at the attention."
            )
        flat = picture.mean(-1) if picture.ndim == 3 else instability(picture, layout)
        method, generator = self._method, torch.Generator()
        generator.manual_seed((method.seed * 1_000_003 + call.step.index) % 2**63)
        cell = (1, method.cell, method.cell)
        index = unstable(flat.mean(0), layout, method.most, generator, cell)
        return None if len(index) == layout.image else index

    def _run(
        self,
        call: Call,
        stream: Stream,
        block: Block,
        where: tuple[str, Sequence[Row]],
        some: list[int],
        index: Tensor | None,
        inner: Callable[..., Any],
    ) -> Streams:
        path, rows = where
        places = [Place(call.denoiser.name, path, rows[place]) for place in some]
        part = stream if len(some) == len(rows) else stream.rows(some, len(rows), 1)
        span = stream.own.image_span
        if index is None:
            args, kwargs = part.given
            answer = block.outputs(inner(*args, **kwargs))
            for place, value in zip(places, answer["hidden"], strict=True):
                self._full[place] = Full(call.step.index, value[span].clone())
            return answer
        before = torch.stack([self._full[place].value for place in places])
        image = kept(index.to(before.device), before)
        own, joint = beside_text(stream.own, image), beside_text(stream.joint, image)
        args, kwargs = part.reduced(own, image, joint)
        answer = block.outputs(inner(*args, **kwargs))
        self._seen.served[call.denoiser.name, path] = (stream.own.image, len(index))
        return answer | {"hidden": own.unmerge(answer["hidden"])}


def _covers(picture: Tensor, layout: Layout) -> bool:
    """Whether a picture, clip or tokens ``[B, …]`` lie under a layout, each token on its share.

    Levels of a UNet are rounded up, so that the last shares of a side may be smaller.
    """
    if picture.ndim == 3:
        return picture.shape[1] == layout.image
    frames, *sides = (1, *picture.shape[2:])[-3:]
    shares = [-(-length // count) for length, count in zip(sides, layout.grid[1:], strict=True)]
    counts = [-(-length // share) for length, share in zip(sides, shares, strict=True)]
    return frames % layout.frames == 0 and counts == list(layout.grid[1:])


def _joined(parts: list[tuple[list[int], Streams]], count: int) -> Streams:
    if len(parts) == 1:
        return parts[0][1]
    names = parts[0][1]
    return {name: scatter([(rows, found[name]) for rows, found in parts], count) for name in names}
