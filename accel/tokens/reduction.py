"""Reductions: fewer tokens in the place of many, and the way back.

A reduction takes N tokens to M (merge) and back (unmerge), both linear: ``Y = W X``, ``X' = U Y``,
and the rows of W and of U sum to 1. It sees image tokens only; `TextSpan` keeps the text of a joint
sequence out of its way. It holds indices or weights but no content, so that one can serve many
layers and steps: when it is made anew is up to who holds it.

Shapes: ``B`` rows of a call, ``N`` tokens, ``M`` ≤ N merged tokens, ``…`` any further axes. What
all rows share has a ``1`` in the place of ``B`` and goes with any batch.

Source: Token Transforming, arXiv 2506.05709 (W and U as the common form); ToMe for Stable
Diffusion, arXiv 2303.17604 (the matching).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal, Self

from accel.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Size = tuple[int, int, int]
"""Frames, height and width of a tile, in tokens."""

ROWS = 1024
"""Sources that are compared at a time: what bounds the memory of a matching."""


@dataclass(frozen=True)
class Grid:
    """Where image tokens lie: frame after frame, in each row after row.

    Attributes:
        height: Rows of tokens.
        width: Columns of tokens.
        frames: Frames of tokens; 1 for a picture.
    """

    height: int
    width: int
    frames: int = 1

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.frames) < 1:
            raise BadInput(f"{self}: a grid has at least one token on each axis.")

    @property
    def tokens(self) -> int:
        """N."""
        return self.frames * self.height * self.width

    def average(self, picture: Tensor) -> Tensor:
        """What a picture or clip ``[B, (F,) H, W]`` has on each token's area, ``[B, N]``."""
        from torch.nn.functional import adaptive_avg_pool3d

        clip = picture.reshape(len(picture), 1, -1, *picture.shape[-2:])
        return adaptive_avg_pool3d(clip, (self.frames, self.height, self.width)).flatten(1)

    def tiles(self, size: Size, device: torch.device | str | None = None) -> list[Tensor]:
        """The tokens of each tile, as ``[tiles, tokens of a tile]``, one tensor a shape of tile.

        Tiles start at the first token; where the grid does not end with a tile, the last ones are
        smaller, so that there are up to 8 shapes. Full tiles come first, if there are any.

        Raises:
            BadInput: For a tile without tokens.
        """
        import torch

        if min(size) < 1:
            raise BadInput(f"tiles of {size} tokens: give at least 1 on each axis.")
        shape = (self.frames, self.height, self.width)
        ids = torch.arange(self.tokens, device=device).reshape(shape)
        axes = [_spans(length, side) for length, side in zip(shape, size, strict=True)]
        found = []
        for (f, h, w), (tf, th, tw) in (zip(*spans, strict=True) for spans in product(*axes)):
            block = ids[f, h, w]
            count = [length // side for length, side in zip(block.shape, (tf, th, tw), strict=True)]
            cut = block.reshape(count[0], tf, count[1], th, count[2], tw)
            found.append(cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, tf * th * tw))
        return found


def _spans(length: int, side: int) -> list[tuple[slice, int]]:
    """The part of an axis that full tiles cover and the rest, each with the side of its tiles."""
    full = length - length % side
    spans = [(slice(0, full), side), (slice(full, length), length % side)]
    return [(span, part) for span, part in spans if span.stop > span.start]


def one_of_each(tiles: Tensor, generator: torch.Generator | None) -> Tensor:
    """The place in each tile of a token drawn from it, ``[tiles, 1]``.

    Args:
        tiles: As `Grid.tiles` gives them.
        generator: Draws, on its own device. ``None`` takes the first token of each tile.
    """
    import torch

    count, side = tiles.shape
    if generator is None:
        return torch.zeros(count, 1, dtype=torch.long, device=tiles.device)
    drawn = torch.randint(side, (count, 1), generator=generator, device=generator.device)
    return drawn.to(tiles.device)


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of each row: ``x[B, N, …]`` and ``index[B, M]`` give ``[B, M, …]``; either B may be 1.

    A copy of whole tokens: several times faster than ``Tensor.gather``.
    """
    import torch

    if len(index) == 1:
        return x.index_select(1, index[0])
    if len(x) > 1:
        first = torch.arange(len(x), device=index.device) * x.shape[1]
        index = index + first[:, None]
    found = x.flatten(0, 1).index_select(0, index.flatten())
    return found.reshape(*index.shape, *x.shape[2:])


def directions(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of windows, scaled to length 1: ``[B, w, n, C]``, in float32 at least.

    Args:
        x: ``[B, N, …]``.
        index: The tokens of each window, ``[w, n]``.
    """
    import torch
    from torch.nn.functional import normalize

    flat = x.reshape(*x.shape[:2], -1).index_select(1, index.flatten())
    exact = flat.to(torch.promote_types(x.dtype, torch.float32))
    return normalize(exact, dim=-1).reshape(len(x), *index.shape, -1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Reduction(ABC):
    """Fewer tokens in the place of many.

    Attributes:
        tokens: N.
        anchor: The token at whose place each merged token stands, ``[B, M]``: it lends its rotary
            row.
        size: How many tokens each merged token stands for, ``[B, M]``: the column sums of U.
    """

    tokens: int
    anchor: Tensor
    size: Tensor

    @property
    def length(self) -> int:
        """M."""
        return self.anchor.shape[1]

    @abstractmethod
    def merge(self, x: Tensor) -> Tensor:
        """``x[B, N, …]`` as ``[B, M, …]``.

        Whatever belongs to a token can be merged: its content, or its own modulation.

        Raises:
            BadInput: If ``x`` has not N tokens, or not B rows.
        """

    @abstractmethod
    def unmerge(self, y: Tensor) -> Tensor:
        """``y[B, M, …]`` as ``[B, N, …]``.

        Raises:
            BadInput: If ``y`` has not M tokens, or not B rows.
        """

    @abstractmethod
    def take(self, rows: Sequence[int]) -> Self:
        """The reduction of some rows, in that order; a row may be named more than once.

        With it both branches of a sample follow the matching of one, and a sub-batch its own. What
        all rows share stays as it is.
        """

    def rows(self, rotary: Tensor, dim: int = 0) -> Tensor:
        """The rotary rows of the anchors, as they were: positions are never renumbered.

        Args:
            rotary: A table with N tokens; the first axis is the batch (or 1) where ``dim`` > 0.
            dim: The axis of the tokens.

        Returns:
            The table with M tokens. A table without a batch gets one in front, ``[B, M, …]``,
            unless all rows share their anchors.

        Raises:
            BadInput: If the table has not N tokens along ``dim``.
        """
        if rotary.shape[dim] != self.tokens:
            raise BadInput(
                f"a rotary table of {tuple(rotary.shape)} has {rotary.shape[dim]} tokens along "
                f"axis {dim}, the reduction {self.tokens}: leave the text's rows out, or reduce "
                "with TextSpan.beside."
            )
        dim %= rotary.ndim
        if dim == 0:
            found = gathered(rotary[None], self.anchor)
            return found[0] if len(self.anchor) == 1 else found
        return gathered(rotary.movedim(dim, 1), self.anchor).movedim(1, dim)

    def key_bias(self, dtype: torch.dtype) -> Tensor:
        """log(size), ``[B, 1, 1, M]``, to add to the logits of merged keys.

        Attention then counts each as often as the tokens that it stands for.
        """
        import torch

        exact = self.size.to(torch.promote_types(dtype, torch.float32)).log()
        return exact.to(dtype)[:, None, None]


def matrices(reduction: Reduction, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W ``[B, M, N]`` and U ``[B, N, M]``: what the reduction does to the unit vectors."""
    import torch

    batch, device = len(reduction.anchor), reduction.anchor.device
    many = torch.eye(reduction.tokens, dtype=dtype, device=device).expand(batch, -1, -1)
    few = torch.eye(reduction.length, dtype=dtype, device=device).expand(batch, -1, -1)
    return reduction.merge(many), reduction.unmerge(few)


def identity(tokens: int, device: torch.device | str | None = None) -> Identity:
    """The reduction that is off."""
    import torch

    return Identity(
        tokens=tokens,
        anchor=torch.arange(tokens, device=device)[None],
        size=torch.ones(1, tokens, device=device),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Identity(Reduction):
    """All tokens as they are: what it is given is what it answers."""

    def merge(self, x: Tensor) -> Tensor:
        """``x`` itself."""
        return _checked(x, self.tokens, self.anchor)

    def unmerge(self, y: Tensor) -> Tensor:
        """``y`` itself."""
        return _checked(y, self.tokens, self.anchor)

    def take(self, rows: Sequence[int]) -> Self:  # noqa: ARG002
        """Itself."""
        return self


Pooling = Literal["average", "nearest"]
"""What stands for a group: the mean of its tokens, or its anchor."""


def exclusive(target: Tensor, anchor: Tensor, pooling: Pooling = "average") -> Exclusive:
    """The reduction to groups.

    Args:
        target: The group of each token, ``[B, N]``, in ``[0, M)``. No group may be empty.
        anchor: A token of each group, ``[B, M]``.
        pooling: What stands for a group.
    """
    import torch

    ordered, order = target.sort(dim=1, stable=True)
    groups = torch.arange(anchor.shape[1], device=target.device)
    start = torch.searchsorted(ordered, groups.repeat(len(target), 1))
    end = torch.full_like(start[:, :1], target.shape[1])
    return Exclusive(
        tokens=target.shape[1],
        anchor=anchor,
        size=start.diff(dim=1, append=end).float(),
        target=target,
        order=order,
        start=start,
        pooling=pooling,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Exclusive(Reduction):
    """Every token belongs to one group. Made by `exclusive`; no matrix is ever built.

    Sums run group by group in the order of the tokens: scattered sums would run in an order that a
    GPU does not fix.

    Attributes:
        target: The group of each token, ``[B, N]``.
        order: The tokens sorted by group, ``[B, N]``.
        start: Where each group begins in that order, ``[B, M]``.
        pooling: What stands for a group.
    """

    target: Tensor
    order: Tensor
    start: Tensor
    pooling: Pooling

    def merge(self, x: Tensor) -> Tensor:
        """The mean of each group, or its anchor."""
        import torch
        from torch.nn.functional import embedding_bag

        x = _checked(x, self.tokens, self.anchor)
        if self.pooling == "nearest":
            return gathered(x, self.anchor)
        batch = max(len(x), len(self.anchor))
        x = x.expand(batch, *x.shape[1:])
        first = torch.arange(batch, device=x.device)[:, None] * self.tokens
        means = embedding_bag(
            (self.order + first).flatten(),
            x.reshape(batch * self.tokens, -1),
            (self.start + first).flatten(),
            mode="mean",
        )
        return means.reshape(batch, self.length, *x.shape[2:])

    def unmerge(self, y: Tensor) -> Tensor:
        """Each token gets what its group has."""
        return gathered(_checked(y, self.length, self.anchor), self.target)

    def take(self, rows: Sequence[int]) -> Self:
        """The groups of some rows."""
        return dataclasses.replace(
            self,
            anchor=picked(self.anchor, rows),
            size=picked(self.size, rows),
            target=picked(self.target, rows),
            order=picked(self.order, rows),
            start=picked(self.start, rows),
        )


def absorbed(gone: Tensor, into: Tensor, tokens: int) -> Exclusive:
    """The reduction in which some tokens are merged into others.

    The merged tokens are in the order of their anchors, so that neighbours stay neighbours.

    Args:
        gone: Tokens that are merged, ``[B, r]``, each once.
        into: The token that each is merged into, ``[B, r]``; none of them is ``gone``.
        tokens: N.
    """
    import torch

    stays = torch.ones(len(gone), tokens, dtype=torch.bool, device=gone.device)
    stays = stays.scatter(1, gone, False)
    rank = stays.cumsum(1) - 1
    first = (~stays).to(torch.uint8).argsort(dim=1, stable=True)
    return exclusive(
        rank.scatter(1, gone, rank.gather(1, into)), first[:, : tokens - gone.shape[1]]
    )


@dataclass(frozen=True, eq=False)
class Partition:
    """Which tokens may be merged into which: the part of a matching that needs no content.

    Attributes:
        tokens: N.
        source: Tokens that may be merged, ``[B, S]``.
        destination: Tokens that others may be merged into, ``[B, D]``. A token in neither stays.
    """

    tokens: int
    source: Tensor
    destination: Tensor

    def match(self, x: Tensor, ratio: float) -> Reduction:
        """Merge the ``r`` sources that are most like a destination, each into its most similar one.

        ``r = min(int(N·ratio), S)``; similarity is the cosine, in the dtype of ``x``. Takes
        S·D·C multiply-adds a row – (3/16)N²C with a quarter of destinations, next to the 2N²C of
        the attention – and the memory of `ROWS` · D scores. Every row has a matching of its own.
        Does not read the device.

        Args:
            x: What is compared, ``[B, N, …]``.
            ratio: Share of the tokens to merge, in [0, 1); 0 is off.

        Raises:
            BadInput: For a ratio outside of [0, 1), or an ``x`` without N tokens.
        """
        import torch
        from torch.nn.functional import normalize

        flat = _checked(x, self.tokens, self.source).reshape(*x.shape[:2], -1)
        count = min(merged_of(self.tokens, ratio), self.source.shape[1])
        if count == 0:
            return identity(self.tokens, x.device)
        sources = gathered(flat, self.source)
        destinations = normalize(gathered(flat, self.destination), dim=-1).mT
        best = [(part @ destinations).max(dim=-1) for part in torch.split(sources, ROWS, dim=1)]
        # A source's own length does not change which destination is best: divided out only here.
        length = torch.linalg.vector_norm(sources, dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
        value = torch.cat([found.values for found in best], dim=1) / length
        index = torch.cat([found.indices for found in best], dim=1)
        chosen = value.topk(count, dim=1, sorted=False).indices
        gone = self.source.expand(len(chosen), -1).gather(1, chosen)
        into = self.destination.expand(len(chosen), -1).gather(1, index.gather(1, chosen))
        return absorbed(gone, into, self.tokens)

    def take(self, rows: Sequence[int]) -> Partition:
        """The partition of some rows; one that all rows share stays as it is."""
        return Partition(self.tokens, picked(self.source, rows), picked(self.destination, rows))


def merged_of(tokens: int, ratio: float) -> int:
    """How many of some tokens a ratio merges: ``int(tokens·ratio)``.

    Raises:
        BadInput: For a ratio outside of [0, 1).
    """
    if not 0.0 <= ratio < 1.0:
        raise BadInput(f"a ratio of {ratio}: give the share of tokens to merge, in [0, 1).")
    return int(tokens * ratio)


@dataclass(frozen=True, eq=False)
class Part:
    """Windows of one shape, each with matrices of its own.

    Attributes:
        index: The tokens of each window, ``[w, n]``.
        chosen: The places in its window of each window's anchors, ``[B, w, m]``.
        merge: W of each window, ``[B, w, m, n]``.
        unmerge: U of each window, ``[B, w, n, m]``.
    """

    index: Tensor
    chosen: Tensor
    merge: Tensor
    unmerge: Tensor


def untouched(index: Tensor, like: Tensor) -> Part:
    """Windows whose tokens stay as they are.

    Args:
        index: The tokens of each window, ``[w, n]``.
        like: A tensor of the dtype and the rows ``[B, …]`` that the matrices are to have.
    """
    import torch

    batch, (windows, side) = len(like), index.shape
    chosen = torch.arange(side, device=index.device).expand(batch, windows, -1)
    same = torch.eye(side, dtype=like.dtype, device=like.device).expand(batch, windows, -1, -1)
    return Part(index, chosen, same, same)


def mixture(parts: Sequence[Part]) -> Reduction:
    """The reduction by dense matrices inside windows that cover every token once.

    Off where no window has fewer tokens than before.
    """
    import torch

    if all(part.merge.shape[2] == part.merge.shape[3] for part in parts):
        return identity(sum(part.index.numel() for part in parts), parts[0].index.device)
    order = torch.cat([part.index.flatten() for part in parts])
    anchors = []
    for part in parts:
        index = part.index.expand(len(part.chosen), -1, -1)
        anchors.append(index.gather(2, part.chosen).flatten(1))
    return Mixture(
        tokens=len(order),
        anchor=torch.cat(anchors, dim=1),
        size=torch.cat([part.unmerge.sum(2).flatten(1) for part in parts], dim=1),
        parts=tuple(parts),
        back=order.argsort(),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Mixture(Reduction):
    """Merged tokens are mixtures of many, inside windows. Made by `mixture`.

    The merged tokens are in the order of the windows. Merge and unmerge take m·n·C multiply-adds a
    window each: next to attention's that is little only where windows are small.

    Attributes:
        parts: The windows and their matrices.
        back: Where each token is in the order of the windows, ``[N]``.
    """

    parts: tuple[Part, ...]
    back: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """W x in each window."""
        import torch

        x = _checked(x, self.tokens, self.anchor)
        flat = x.reshape(*x.shape[:2], -1)
        merged = []
        for part in self.parts:
            windows = flat.index_select(1, part.index.flatten())
            windows = windows.reshape(len(x), *part.index.shape, -1)
            merged.append((part.merge.to(x.dtype) @ windows).flatten(1, 2))
        y = torch.cat(merged, dim=1)
        return y.reshape(*y.shape[:2], *x.shape[2:])

    def unmerge(self, y: Tensor) -> Tensor:
        """U y in each window."""
        import torch

        y = _checked(y, self.length, self.anchor)
        flat = y.reshape(*y.shape[:2], -1)
        shapes = [part.merge.shape[1:3] for part in self.parts]
        pieces = torch.split(flat, [windows * few for windows, few in shapes], dim=1)
        spread = []
        for part, piece, shape in zip(self.parts, pieces, shapes, strict=True):
            windows = piece.reshape(len(y), *shape, -1)
            spread.append((part.unmerge.to(y.dtype) @ windows).flatten(1, 2))
        x = torch.cat(spread, dim=1).index_select(1, self.back)
        return x.reshape(*x.shape[:2], *y.shape[2:])

    def take(self, rows: Sequence[int]) -> Self:
        """The matrices of some rows."""
        parts = tuple(
            Part(
                part.index,
                picked(part.chosen, rows),
                picked(part.merge, rows),
                picked(part.unmerge, rows),
            )
            for part in self.parts
        )
        anchor, size = picked(self.anchor, rows), picked(self.size, rows)
        return dataclasses.replace(self, anchor=anchor, size=size, parts=parts)


@dataclass(frozen=True)
class TextSpan:
    """Where the text is in a joint sequence: at its start or at its end.

    Attributes:
        tokens: T, tokens of the text; padding counts.
        first: Whether they come before the image's.
    """

    tokens: int
    first: bool

    def split(self, x: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
        """The tokens of the text and those of the image.

        Raises:
            BadInput: If the sequence is shorter than the text.
        """
        image = x.shape[dim] - self.tokens
        if image < 0:
            raise BadInput(
                f"a sequence of {x.shape[dim]} tokens cannot hold {self.tokens} of a text: give "
                "the joint sequence, or the text's true length."
            )
        if self.first:
            return x.narrow(dim, 0, self.tokens), x.narrow(dim, self.tokens, image)
        return x.narrow(dim, image, self.tokens), x.narrow(dim, 0, image)

    def join(self, text: Tensor, image: Tensor, dim: int = 1) -> Tensor:
        """The joint sequence again."""
        import torch

        return torch.cat([text, image] if self.first else [image, text], dim=dim)

    def beside(self, image: Reduction) -> Joint:
        """The reduction of the joint sequence that leaves the text as it is."""
        import torch

        few = image.anchor
        text = torch.arange(self.tokens, device=few.device).expand(len(few), -1)
        if self.first:
            few = few + self.tokens
        else:
            text = text + image.tokens
        return Joint(
            tokens=self.tokens + image.tokens,
            anchor=self.join(text, few),
            size=self.join(torch.ones_like(text, dtype=image.size.dtype), image.size),
            image=image,
            span=self,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Joint(Reduction):
    """A reduction of the image tokens of a joint sequence. Made by `TextSpan.beside`.

    Attributes:
        image: The reduction of the image tokens.
        span: Where the text is.
    """

    image: Reduction
    span: TextSpan

    def merge(self, x: Tensor) -> Tensor:
        """The text as it is, the image merged."""
        text, image = self.span.split(_checked(x, self.tokens, self.anchor))
        image = self.image.merge(image)
        return self.span.join(text.expand(len(image), *text.shape[1:]), image)

    def unmerge(self, y: Tensor) -> Tensor:
        """The text as it is, the image unmerged."""
        text, image = self.span.split(_checked(y, self.length, self.anchor))
        image = self.image.unmerge(image)
        return self.span.join(text.expand(len(image), *text.shape[1:]), image)

    def take(self, rows: Sequence[int]) -> Self:
        """The joint reduction of some rows."""
        anchor, size = picked(self.anchor, rows), picked(self.size, rows)
        return dataclasses.replace(self, anchor=anchor, size=size, image=self.image.take(rows))


def picked(value: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of what has one entry a row, or one for all."""
    return value if len(value) == 1 else value[list(rows)]


def _checked(x: Tensor, tokens: int, index: Tensor) -> Tensor:
    """``x`` if it has ``tokens`` tokens and as many rows as ``index`` (1 goes with any)."""
    if x.ndim < 2 or x.shape[1] != tokens:
        raise BadInput(
            f"a tensor of {tuple(x.shape)} where [B, {tokens}, …] was needed: a reduction goes "
            "with one grid only; make another, or split the text off with TextSpan."
        )
    if len(x) != len(index) and 1 not in (len(x), len(index)):
        raise BadInput(
            f"a batch of {len(x)} rows for a reduction of {len(index)}: name the rows with take."
        )
    return x
