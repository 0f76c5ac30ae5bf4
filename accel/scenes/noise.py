"""Fractal value noise that is the same picture at every resolution.

All lattices are drawn whatever the size; a small picture leaves out the octaves it cannot show.
Arrays: `[H, W]` fields, `[W]` lines; x and y run over [0, 1).
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

FREQUENCIES: Final = (2, 4, 8, 16, 32, 64)


def _weights(positions: Array, frequency: int) -> Array:
    """Matrix that interpolates a periodic lattice smoothly at the positions. Shape [N, F]."""
    scaled = positions * frequency
    cell = np.floor(scaled).astype(np.int64)
    inside = (scaled - cell).astype(np.float32)
    blend = inside * inside * (3 - 2 * inside)
    rows = np.arange(len(positions))
    matrix = np.zeros((len(positions), frequency), np.float32)
    np.add.at(matrix, (rows, cell % frequency), 1 - blend)
    np.add.at(matrix, (rows, (cell + 1) % frequency), blend)
    return matrix


@dataclass(frozen=True, slots=True)
class Field:
    """Noise over the plane: one random lattice per octave."""

    lattices: tuple[Array, ...]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Field":
        """Draw the lattices of all octaves."""
        return cls(tuple(rng.normal(size=(f, f)).astype(np.float32) for f in FREQUENCIES))

    def sample(self, y: Array, x: Array, first: int = 2, roughness: float = 0.6) -> Array:
        """Fractal sum from frequency `first` up to what the grid can show. Shape [H, W]."""
        total = np.zeros((len(y), len(x)), np.float32)
        gain = 1.0
        for frequency, lattice in zip(FREQUENCIES, self.lattices, strict=True):
            if frequency < first or 2 * frequency > len(x):
                continue
            total += gain * (_weights(y, frequency) @ lattice @ _weights(x, frequency).T)
            gain *= roughness
        return total


@dataclass(frozen=True, slots=True)
class Line:
    """Noise over a line, for ridges."""

    lattices: tuple[Array, ...]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Line":
        """Draw the lattices of all octaves."""
        return cls(tuple(rng.normal(size=f).astype(np.float32) for f in FREQUENCIES))

    def sample(self, x: Array, last: int = 64, roughness: float = 0.5) -> Array:
        """Fractal sum up to frequency `last`. Shape [W]."""
        total = np.zeros(len(x), np.float32)
        gain = 1.0
        for frequency, lattice in zip(FREQUENCIES, self.lattices, strict=True):
            if frequency > last or 2 * frequency > len(x):
                continue
            total += gain * (_weights(x, frequency) @ lattice)
            gain *= roughness
        return total
