"""What processes of one axis tell each other: whole tensors, borders, sums; now or a step later.

*Sync* means that everybody waits for what is fresh. *Stale* means that a site works with what the
others sent when it was last computed, while what is fresh travels: the answer is an approximation,
and no process waits. Both count the bytes that this process sends.

Every process has to ask for the same things in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import P2POp, ProcessGroup


class Exchange:
    """The processes of one axis.

    Attributes:
        size: How many they are.
        rank: Which of them this is.
        bytes: What this process has sent, in all.
        messages: In how many messages; one to all others counts once.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.size = distributed.get_world_size(group)
        self.rank = distributed.get_rank(group)
        self.bytes = self.messages = 0

    def reset(self) -> None:
        """Count from here."""
        self.bytes = self.messages = 0

    def count(self, size: int) -> None:
        """A message of so many bytes is sent."""
        self.bytes += size
        self.messages += 1

    def gather(self, x: Tensor, lengths: Sequence[int] | None = None, dim: int = 0) -> Tensor:
        """The tensors of all processes one after the other.

        Args:
            x: What this one has; alike in all but ``dim``.
            lengths: Of each process along ``dim``; ``None``: all as long as this one.
            dim: The axis.
        """
        return torch.cat(self.begin(x, lengths, dim).parts(), dim)

    def begin(
        self,
        x: Tensor,
        lengths: Sequence[int] | None = None,
        dim: int = 0,
        kept: Pending | None = None,
    ) -> Pending:
        """Send a tensor to all others, and wait for nothing yet.

        Args:
            x: As for `gather`.
            lengths: As for `gather`; shorter tensors are padded on their way.
            dim: As for `gather`.
            kept: What an earlier call for tensors of this shape returned, which nobody reads any
                more: its buffers are used again.
        """
        lengths = tuple(lengths or [x.shape[dim]] * self.size)
        whole = padded(x, max(lengths), dim).contiguous()
        buffers = kept.buffers if kept is not None else _empty(whole, self.size)
        work = distributed.all_gather(buffers, whole, group=self._group, async_op=True)
        self.count((self.size - 1) * whole.nbytes)
        return Pending(buffers, lengths, dim, [work], whole)

    def begin_borders(self, first: Tensor, last: Tensor) -> Borders:
        """Send the first slice to the process before, and the last one to the process after.

        Args:
            first: Of what this process has; as large as ``last`` is.
            last: Likewise.
        """
        operations: list[P2POp] = []
        found: list[Tensor | None] = []
        for other, border in ((self.rank - 1, first), (self.rank + 1, last)):
            if not 0 <= other < self.size:
                found.append(None)
                continue
            mine = border.contiguous()
            theirs = torch.empty_like(mine)
            peer = distributed.get_global_rank(self._group, other)
            operations += [
                P2POp(distributed.isend, mine, peer, self._group),
                P2POp(distributed.irecv, theirs, peer, self._group),
            ]
            self.count(mine.nbytes)
            found.append(theirs)
        works = distributed.batch_isend_irecv(operations) if operations else []
        tensors = [operation.tensor for operation in operations]
        return Borders(found[0], found[1], works, tensors, first.shape)

    def begin_parts(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> Parts:
        """Send a part to each other process, and get one of each; wait for nothing yet.

        Args:
            parts: What each process gets, in one message; this one's own is not sent, nor is what
                is empty.
            shapes: Of what each process sends to this one.
        """
        operations: list[P2POp] = []
        found: list[Tensor] = []
        for other, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
            found.append(part.new_empty(tuple(shape) if other != self.rank else (0,)))
            if other == self.rank:
                continue
            peer = distributed.get_global_rank(self._group, other)
            if part.numel():
                mine = part.contiguous()
                operations.append(P2POp(distributed.isend, mine, peer, self._group))
                self.count(mine.nbytes)
            if found[-1].numel():
                operations.append(P2POp(distributed.irecv, found[-1], peer, self._group))
        works = distributed.batch_isend_irecv(operations) if operations else []
        return Parts(found, works, [operation.tensor for operation in operations])

    def share(self, mine: Sequence[Tensor], like: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Give everybody what everybody has.

        Args:
            mine: Tensors of this process.
            like: By process, tensors of the shapes and types that it gives; they are not read.

        Returns:
            By process, what it has given: new tensors, but for this one's own.
        """
        flat: list[Tensor | None] = []
        works = []
        for rank, theirs in enumerate(like):
            given = mine if rank == self.rank else [torch.empty_like(each) for each in theirs]
            if not given:
                flat.append(None)
                continue
            one = _packed(given)
            source = distributed.get_global_rank(self._group, rank)
            works.append(distributed.broadcast(one, source, group=self._group, async_op=True))
            if rank == self.rank:
                self.count((self.size - 1) * one.nbytes)
            flat.append(one)
        for work in works:
            work.wait()
        return [
            list(mine) if rank == self.rank else _unpacked(flat[rank], theirs)
            for rank, theirs in enumerate(like)
        ]

    def agreed(self, value: Tensor, rank: int) -> Tensor:
        """What one process has, for all.

        Args:
            value: Of the same shape and type in all.
            rank: Whose it is.
        """
        like = [[value] if each == rank else [] for each in range(self.size)]
        return self.share([value.contiguous()] if self.rank == rank else [], like)[rank][0]

    def send(self, tensors: Sequence[Tensor], to: int) -> Sent:
        """Send tensors to one process in one message, and wait for nothing yet.

        Args:
            tensors: What it gets; all empty: nothing is sent.
            to: Its rank along the axis.
        """
        flat = _packed(tensors)
        if not flat.numel():
            return Sent(flat, None)
        self.count(flat.nbytes)
        peer = distributed.get_global_rank(self._group, to)
        return Sent(flat, distributed.isend(flat, peer, group=self._group))

    def receive(self, like: Sequence[Tensor], source: int) -> list[Tensor]:
        """What a process has sent to this one; waits for it.

        Args:
            like: Tensors of the shapes and types that come; they are not read.
            source: Its rank along the axis.
        """
        size = sum(each.nbytes for each in like)
        flat = torch.empty(size, dtype=torch.uint8, device=like[0].device)
        if size:
            distributed.recv(flat, distributed.get_global_rank(self._group, source), self._group)
        return _unpacked(flat, like)

    def rotated(self, x: Tensor, lengths: Sequence[int], dim: int) -> Iterator[Tensor]:
        """Own tensor, then those of the processes before, each while the next is under way.

        Args:
            x: What this process has; alike in all but ``dim``.
            lengths: Of each process along ``dim``.
            dim: The axis.
        """
        before, after = (
            distributed.get_global_rank(self._group, (self.rank + step) % self.size)
            for step in (-1, 1)
        )
        current = x.contiguous()
        for turn in range(1, self.size + 1):
            works: list[Any] = []
            if turn < self.size:
                shape = list(x.shape)
                shape[dim] = lengths[(self.rank - turn) % self.size]
                coming = current.new_empty(shape)
                pair = [
                    P2POp(distributed.isend, current, after, self._group),
                    P2POp(distributed.irecv, coming, before, self._group),
                ]
                works = distributed.batch_isend_irecv(pair)
                self.count(current.nbytes)
            yield current
            for work in works:
                work.wait()
            if turn < self.size:
                current = coming

    def heads_for_tokens(
        self, tensors: Sequence[Tensor], lengths: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Give away the other heads of own tokens for the other tokens of own heads.

        All tensors travel in one message to each process.

        Args:
            tensors: Each ``[B, heads, own tokens, width]``; the processes divide the heads.
            lengths: Of each tensor, the tokens of each process.

        Returns:
            Each ``[B, own heads, all tokens, width]``, tokens in the order of the processes.
        """
        each = tensors[0].shape[1] // self.size
        parts = [torch.split(one.transpose(1, 2), each, 2) for one in tensors]
        shapes = [
            [(one.shape[0], count, each, one.shape[3]) for count in told]
            for one, told in zip(tensors, lengths, strict=True)
        ]
        found = self._swap(list(zip(*parts, strict=True)), list(zip(*shapes, strict=True)))()
        return [torch.cat(one, 1).transpose(1, 2) for one in zip(*found, strict=True)]

    def tokens_for_heads(self, x: Tensor, lengths: Sequence[int]) -> Callable[[], Tensor]:
        """The way back; waits for nothing yet.

        Args:
            x: ``[B, own heads, all tokens, width]``.
            lengths: Tokens of each process.

        Returns:
            What waits, and answers ``[B, all heads, own tokens, width]``.
        """
        parts = [[part] for part in torch.split(x.transpose(1, 2), list(lengths), 1)]
        own = [tuple(part.shape) for part in parts[self.rank]]
        found = self._swap(parts, [own] * self.size)
        return lambda: torch.cat([one for (one,) in found()], 2).transpose(1, 2)

    def _swap(
        self, parts: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]]
    ) -> Callable[[], list[Sequence[Tensor]]]:
        """Send some tensors to each process, and get some of the given shapes from each.

        What this one has for itself stays where it is.
        """
        nothing = parts[self.rank][0].new_empty(0)
        messages = [_flat(one) if to != self.rank else nothing for to, one in enumerate(parts)]
        sizes = [[math.prod(shape) for shape in each] for each in shapes]
        begun = self.begin_parts(messages, [(sum(each),) for each in sizes])

        def arrived() -> list[Sequence[Tensor]]:
            found: list[Sequence[Tensor]] = []
            for source, flat in enumerate(begun.arrived()):
                if source == self.rank:
                    found.append(parts[source])
                    continue
                pairs = zip(torch.split(flat, sizes[source]), shapes[source], strict=True)
                found.append([part.view(shape) for part, shape in pairs])
            return found

        return arrived


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other, copied once whatever their strides are."""
    sizes = [one.numel() for one in tensors]
    flat = tensors[0].new_empty(sum(sizes))
    for place, one in zip(torch.split(flat, sizes), tensors, strict=True):
        place.view(one.shape).copy_(one)
    return flat


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.reshape(-1).view(torch.uint8) for each in tensors])


def _unpacked(flat: Tensor | None, like: Sequence[Tensor]) -> list[Tensor]:
    found = () if flat is None else torch.split(flat, [each.nbytes for each in like])
    return [
        part.view(each.dtype).reshape(each.shape) for part, each in zip(found, like, strict=True)
    ]


def padded(x: Tensor, length: int, dim: int) -> Tensor:
    """A tensor with zeros behind its end along ``dim``, up to a length."""
    missing = length - x.shape[dim]
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape)], dim)


def fits(
    written: torch.Size,
    dtype: torch.dtype,
    known: tuple[int, ...],
    along: int,
    x: Tensor,
    lengths: Sequence[int] | None,
    dim: int,
) -> bool:
    """Whether what was sent, padded to one shape, is of the shape and lengths of another tensor."""
    asked = tuple(lengths or [x.shape[dim]] * len(known))
    shape = [*x.shape]
    shape[dim] = max(asked)
    return (tuple(shape), x.dtype, asked, dim) == (tuple(written), dtype, known, along)


def _empty(like: Tensor, count: int) -> list[Tensor]:
    return [torch.empty_like(like) for _ in range(count)]


@dataclass(eq=False)
class Pending:
    """Tensors of all processes that are under way.

    Attributes:
        buffers: Where they arrive, one a process, as long as the longest.
        lengths: Of each along ``dim``.
        dim: The axis.
    """

    buffers: list[Tensor]
    lengths: tuple[int, ...]
    dim: int
    works: list[Any]
    sent: Tensor

    def fits(self, x: Tensor, lengths: Sequence[int] | None, dim: int) -> bool:
        """Whether it was begun for tensors of this shape and these lengths."""
        sent = self.sent
        return fits(sent.shape, sent.dtype, self.lengths, self.dim, x, lengths, dim)

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sum(tensor.nbytes for tensor in (*self.buffers, self.sent))

    def parts(self) -> list[Tensor]:
        """They, one a process; waits until they are here."""
        self.wait()
        found = zip(self.buffers, self.lengths, strict=True)
        return [buffer.narrow(self.dim, 0, length) for buffer, length in found]

    def wait(self) -> None:
        """Wait until they are here."""
        for work in self.works:
            work.wait()
        self.works.clear()


@dataclass(eq=False)
class Sent:
    """A message that is under way to one process."""

    flat: Tensor
    work: Any

    def wait(self) -> None:
        """Wait until it is there."""
        if self.work is not None:
            self.work.wait()


@dataclass(eq=False)
class Borders:
    """Slices of the neighbours that are under way; ``None`` where there is no neighbour."""

    before: Tensor | None
    after: Tensor | None
    works: list[Any]
    tensors: list[Tensor]
    shape: torch.Size

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def pair(self) -> tuple[Tensor | None, Tensor | None]:
        """The last slice of the process before, and the first of the process after; waits."""
        self.wait()
        return self.before, self.after

    def wait(self) -> None:
        """Wait until they are here."""
        for work in self.works:
            work.wait()
        self.works.clear()


@dataclass(eq=False)
class Parts:
    """What each other process sends to this one; in its own place there is nothing."""

    found: list[Tensor]
    works: list[Any]
    tensors: list[Tensor]

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def arrived(self) -> list[Tensor]:
        """They, one a process; waits until they are here."""
        self.wait()
        return self.found

    def wait(self) -> None:
        """Wait until they are here."""
        for work in self.works:
            work.wait()
        self.works.clear()
