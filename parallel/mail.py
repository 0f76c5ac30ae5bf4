"""What the sites of a network send at one step and read at the next: letters, in few messages.

A site is a layer that looks outside of its band. It writes to all other processes, or to its
neighbours, and reads what they have written at the step before. Letters are sent together, as soon
as they are many bytes or the call of the network ends: a UNet has hundreds of sites, and a message
costs as much as many bytes do. All processes have to write the same letters in the same order.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parallel.exchange import Borders, Exchange, Pending, fits, padded

LIMIT = 2**20
"""Bytes from which on letters are sent."""

ALIGNED = 16
"""Letters begin at multiples of so many bytes: then they can be read as numbers of any type."""


@dataclass(eq=False)
class Bundle:
    """Letters that are sent together.

    Attributes:
        exchange: Whose.
        flats: Bytes that are yet to be sent: one list to all, or two, to the process before and to
            the one after.
        bytes: Of the letters, each way.
        unread: Letters that nobody has read yet.
        sent: What is under way, or has arrived; ``None`` before it is sent.
    """

    exchange: Exchange
    flats: tuple[list[Tensor], ...]
    bytes: int = 0
    unread: int = 0
    sent: Pending | Borders | None = None

    def add(self, tensors: Sequence[Tensor]) -> int:
        """Write a letter; where it begins."""
        begin = self.bytes
        for flat, tensor in zip(self.flats, tensors, strict=True):
            flat.append(_flat(tensor))
        self.bytes += self.flats[0][-1].numel()
        self.unread += 1
        return begin

    def send(self, kept: Pending | None) -> None:
        """Send what has been written, and wait for nothing yet.

        Args:
            kept: An earlier one to all of as many bytes, which nobody reads any more.
        """
        flats = [torch.cat(flat) for flat in self.flats]
        for flat in self.flats:
            flat.clear()
        if len(flats) == 1:
            self.sent = self.exchange.begin(flats[0], kept=kept)
        else:
            self.sent = self.exchange.begin_borders(*flats)

    def wait(self) -> None:
        """Wait until they are here."""
        if self.sent is not None:
            self.sent.wait()


@dataclass(eq=False)
class Letter:
    """What one site has written, and the others likewise.

    Attributes:
        bundle: What it is sent with.
        begin: Where it begins there.
        written: Its shape.
        dtype: Its type.
    """

    bundle: Bundle
    begin: int
    written: torch.Size
    dtype: torch.dtype

    def wait(self) -> None:
        """Wait until it is here."""
        self.bundle.wait()

    def _in(self, flat: Tensor) -> Tensor:
        size = self.written.numel() * self.dtype.itemsize
        return flat[self.begin : self.begin + size].view(self.dtype).reshape(self.written)


@dataclass(eq=False)
class ToAll(Letter):
    """A letter to all.

    Attributes:
        lengths: Of each process along ``dim``; shorter ones are padded.
        dim: The axis.
    """

    lengths: tuple[int, ...]
    dim: int

    def fits(self, x: Tensor, lengths: Sequence[int] | None, dim: int) -> bool:
        """Whether it was written for tensors of this shape and these lengths."""
        return fits(self.written, self.dtype, self.lengths, self.dim, x, lengths, dim)

    def parts(self) -> list[Tensor]:
        """What each process has written; waits. To be read once, before the call ends."""
        assert isinstance(self.bundle.sent, Pending)
        self.bundle.unread -= 1
        found = zip(self.bundle.sent.parts(), self.lengths, strict=True)
        return [self._in(flat).narrow(self.dim, 0, length) for flat, length in found]


@dataclass(eq=False)
class ToNeighbours(Letter):
    """A letter to the process before, and one to the process after."""

    @property
    def shape(self) -> torch.Size:
        """Of either."""
        return self.written

    def pair(self) -> tuple[Tensor | None, Tensor | None]:
        """The last slice of the process before, and the first of the process after; waits."""
        assert isinstance(self.bundle.sent, Borders)
        self.bundle.unread -= 1
        before, after = self.bundle.sent.pair()
        return (
            None if before is None else self._in(before),
            None if after is None else self._in(after),
        )


@dataclass
class Mail:
    """The letters of one network, by the site that writes them and for what."""

    _known: dict[Hashable, Pending | Borders | ToAll | ToNeighbours] = field(default_factory=dict)
    _open: dict[int, Bundle] = field(default_factory=dict)
    _sent: list[Bundle] = field(default_factory=list)
    _spare: dict[int, list[Pending]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory of what is kept."""
        alone = [one for one in self._known.values() if isinstance(one, (Pending, Borders))]
        together = [bundle.sent for bundle in self._sent if bundle.sent is not None]
        spare = [one for many in self._spare.values() for one in many]
        return sum(one.bytes for one in (*alone, *together, *spare))

    def take(self, key: Hashable) -> Pending | Borders | ToAll | ToNeighbours | None:
        """What was last sent under a key, or ``None``; it is not kept any longer."""
        return self._known.pop(key, None)

    def drop(self, sent: Pending | Borders | Letter) -> None:
        """What was taken is not read: let it arrive."""
        sent.wait()
        if isinstance(sent, Letter):
            sent.bundle.unread -= 1

    def put(self, key: Hashable, sent: Pending | Borders) -> None:
        """Keep what has been sent by itself."""
        self._known[key] = sent

    def write_all(
        self, exchange: Exchange, key: Hashable, x: Tensor, lengths: Sequence[int] | None, dim: int
    ) -> None:
        """Write to all; arguments as for `Exchange.begin`."""
        told = tuple(lengths or [x.shape[dim]] * exchange.size)
        whole = padded(x, max(told), dim)
        bundle = self._bundle(exchange, 1)
        begin = bundle.add([whole])
        self._known[key] = ToAll(bundle, begin, whole.shape, x.dtype, told, dim)
        self._send_full()

    def write_borders(self, exchange: Exchange, key: Hashable, first: Tensor, last: Tensor) -> None:
        """Write to the neighbours; arguments as for `Exchange.begin_borders`."""
        bundle = self._bundle(exchange, 2)
        begin = bundle.add([first, last])
        self._known[key] = ToNeighbours(bundle, begin, first.shape, first.dtype)
        self._send_full()

    def close(self) -> None:
        """The call of the network ends: send what is written, and use again what has been read."""
        for ways in sorted(self._open):
            self._send(ways)
        for bundle in [bundle for bundle in self._sent if not bundle.unread]:
            self._sent.remove(bundle)
            bundle.wait()
            if isinstance(bundle.sent, Pending):
                self._spare.setdefault(bundle.bytes, []).append(bundle.sent)

    def reset(self) -> None:
        """Let everything arrive, so that nobody is left waiting, and forget it."""
        for sent in (*self._known.values(), *self._sent):
            sent.wait()
        self._known.clear()
        self._open.clear()
        self._sent.clear()
        self._spare.clear()

    def _bundle(self, exchange: Exchange, ways: int) -> Bundle:
        if ways not in self._open:
            self._open[ways] = Bundle(exchange, tuple([] for _ in range(ways)))
        return self._open[ways]

    def _send_full(self) -> None:
        for ways in [ways for ways, bundle in self._open.items() if bundle.bytes >= LIMIT]:
            self._send(ways)

    def _send(self, ways: int) -> None:
        bundle = self._open.pop(ways)
        spare = self._spare.get(bundle.bytes)
        bundle.send(spare.pop() if spare and ways == 1 else None)
        self._sent.append(bundle)


def _flat(x: Tensor) -> Tensor:
    """The bytes of a tensor, to the next multiple of ``ALIGNED``."""
    flat = x.contiguous().reshape(-1).view(torch.uint8)
    return padded(flat, -(-flat.numel() // ALIGNED) * ALIGNED, 0)
