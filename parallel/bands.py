"""Which rows of a picture each process has, at every level of a UNet.

A latent is cut into bands of whole rows. Bands begin at multiples of 2^L rows, where L counts how
often the network halves its input: then they begin at whole rows at every level. Any number of
processes and any height will do: bands differ in height by one multiple, and the last one has what
is left over.
"""

from __future__ import annotations

from dataclasses import dataclass

from accel.errors import BadInput


@dataclass(frozen=True)
class Bands:
    """The bands of a latent.

    Attributes:
        height: Rows of the latent.
        width: Its columns.
        unit: Bands begin at multiples of so many rows: 2^L.
        ends: Where the band of each process ends, in rows of the latent.
    """

    height: int
    width: int
    unit: int
    ends: tuple[int, ...]

    @classmethod
    def of(cls, height: int, width: int, unit: int, count: int) -> Bands:
        """Bands as alike as can be.

        Raises:
            BadInput: If the latent is not high enough for so many.
        """
        units = -(-height // unit)
        if units < count:
            raise BadInput(
                f"A latent of {height} rows has {units} bands of {unit} rows, and {count} "
                f"processes share it: ask for a picture {-(-count // units)} times as high, or "
                f"start {units} processes."
            )
        shares = [units // count + (rank < units % count) for rank in range(count)]
        ends = [min(sum(shares[: rank + 1]) * unit, height) for rank in range(count)]
        return cls(height, width, unit, tuple(ends))

    def span(self, rank: int) -> slice:
        """The rows of a process, in the latent."""
        return slice(self.ends[rank - 1] if rank else 0, self.ends[rank])

    def lengths(self, factor: int) -> tuple[int, ...]:
        """Rows of each process where the network has halved its input to a 1/factor."""
        ends = [-(-end // factor) for end in self.ends]
        return tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False))

    def columns(self, factor: int) -> int:
        """Columns there."""
        return -(-self.width // factor)

    @property
    def factors(self) -> list[int]:
        """1, 2, …, 2^L."""
        return [1 << level for level in range(self.unit.bit_length())]

    def of_rows(self, rank: int, rows: int, columns: int) -> tuple[int, ...] | None:
        """Rows of each process at the level where a process has so many; ``None``: at no level."""
        for factor in self.factors:
            lengths = self.lengths(factor)
            if (lengths[rank], self.columns(factor)) == (rows, columns):
                return lengths
        return None

    def of_tokens(self, rank: int, tokens: int) -> tuple[int, ...] | None:
        """Tokens of each process at the level where a process has so many; ``None``: at none."""
        for factor in self.factors:
            lengths, columns = self.lengths(factor), self.columns(factor)
            if lengths[rank] * columns == tokens:
                return tuple(length * columns for length in lengths)
        return None

    def part(self, rank: int, rows: int) -> slice | None:
        """The rows of a process in a whole tensor of so many; ``None``: that is no level's."""
        for factor in self.factors:
            if -(-self.height // factor) == rows:
                lengths = self.lengths(factor)
                begin = sum(lengths[:rank])
                return slice(begin, begin + lengths[rank])
        return None
