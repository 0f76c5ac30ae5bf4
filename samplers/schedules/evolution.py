"""AutoDiffusion: an evolutionary search over subsets of timesteps, with any fitness.

Li et al., arXiv 2309.10438, section 3.3 (the part about time steps). A gene is an ascending set of
nodes of a dense grid. Each generation keeps the best, and fills up with mutations and crossovers of
them and with random sets. A gene in which a node is there twice is rejected, as the authors' code
does not, and no gene is evaluated twice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from accel.errors import BadInput

Gene = tuple[int, ...]
Fitness = Callable[[Gene], float]
"""How far a gene is from the best: the lower the better."""

TRIES = 100


class Evolution(BaseModel):
    """Settings of the search; the defaults are the authors'."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    population: int = Field(default=50, ge=2, description="genes in a generation")
    epochs: int = Field(default=10, ge=0, description="generations after the first")
    parents: int = Field(default=10, ge=1, description="best genes so far that have offspring")
    mutations: int = Field(default=25, ge=0, description="offspring of one parent, a generation")
    crossovers: int = Field(default=12, ge=0, description="offspring of two parents, a generation")
    chance: float = Field(
        default=0.1, ge=0.0, le=1.0, description="that a mutation replaces a node"
    )


@dataclass
class Search:
    """One search.

    Attributes:
        size: Nodes in a gene.
        nodes: Nodes to choose from, 0 … nodes − 1.
        fitness: Asked once for each gene.
        settings: How it is done.
        rng: Where chance comes from.
        fixed: Nodes that every gene has.
        known: What every gene that was tried came to.
        best: The lowest of these after each generation.
    """

    size: int
    nodes: int
    fitness: Fitness
    settings: Evolution
    rng: np.random.Generator
    fixed: frozenset[int] = frozenset({0})
    known: dict[Gene, float] = field(default_factory=dict)
    best: list[float] = field(default_factory=list)

    def run(self, seed: Gene) -> Gene:
        """The best gene found; never a worse one than ``seed``.

        Raises:
            BadInput: If ``seed`` is no such gene.
        """
        if not self.valid(seed):
            raise BadInput(
                f"The first gene {list(seed)} must be {self.size} ascending nodes below "
                f"{self.nodes}, with {sorted(self.fixed)} among them."
            )
        wanted = min(self.settings.population, self._possible())
        first = {seed} | self._several(wanted // 2, self.draw)
        first |= self._several(wanted - len(first), lambda: self.mutate(seed))
        self._judge(self._filled(first, wanted))
        for _ in range(self.settings.epochs):
            parents = self.ranking[: self.settings.parents]
            self._judge(self._filled(self._offspring(parents), wanted))
        return self.ranking[0]

    def _offspring(self, parents: list[Gene]) -> set[Gene]:
        young = self._several(self.settings.mutations, lambda: self.mutate(self._one(parents)))
        return young | self._several(
            self.settings.crossovers, lambda: self.cross(self._one(parents), self._one(parents))
        )

    @property
    def ranking(self) -> list[Gene]:
        """All genes that were tried, the best first."""
        return sorted(self.known, key=lambda gene: (self.known[gene], gene))

    def valid(self, gene: Gene) -> bool:
        """Whether it has the right number of different nodes, in order, and the fixed ones."""
        ascending = all(a < b for a, b in itertools.pairwise(gene))
        inside = all(0 <= node < self.nodes for node in gene)
        return len(gene) == self.size and ascending and inside and self.fixed <= set(gene)

    def draw(self) -> Gene:
        """A random gene."""
        free = sorted(set(range(self.nodes)) - self.fixed)
        chosen = self.rng.choice(free, self.size - len(self.fixed), replace=False)
        return tuple(sorted([*self.fixed, *map(int, chosen)]))

    def mutate(self, gene: Gene) -> Gene | None:
        """The gene with some nodes replaced, each by any; ``None`` if one is there twice."""
        changed = self.rng.random(len(gene)) < self.settings.chance
        drawn = self.rng.integers(0, self.nodes, len(gene))
        return self._checked(
            int(new) if change and old not in self.fixed else old
            for old, change, new in zip(gene, changed, drawn, strict=True)
        )

    def cross(self, one: Gene, other: Gene) -> Gene | None:
        """Each position from either; ``None`` if a node is there twice."""
        which = self.rng.random(len(one)) < 0.5
        return self._checked(a if w else b for a, b, w in zip(one, other, which, strict=True))

    def _checked(self, nodes: object) -> Gene | None:
        gene = tuple(sorted(nodes))  # type: ignore[call-overload]
        return gene if self.valid(gene) else None

    def _one(self, genes: list[Gene]) -> Gene:
        return genes[int(self.rng.integers(len(genes)))]

    def _several(self, count: int, make: Callable[[], Gene | None]) -> set[Gene]:
        """Up to ``count`` genes, none of them tried before."""
        found: set[Gene] = set()
        for _ in range(TRIES * max(count, 0)):
            if len(found) >= count:
                break
            gene = make()
            if gene is not None and gene not in self.known:
                found.add(gene)
        return found

    def _filled(self, genes: set[Gene], wanted: int) -> set[Gene]:
        room = self._possible() - len(self.known) - len(genes - set(self.known))
        fresh = min(wanted - len(genes), room)
        more = self._several(fresh, lambda: self._unless(genes)) if fresh > 0 else set()
        return genes | more

    def _unless(self, genes: set[Gene]) -> Gene | None:
        gene = self.draw()
        return None if gene in genes else gene

    def _judge(self, genes: set[Gene]) -> None:
        for gene in sorted(genes):
            if gene not in self.known:
                self.known[gene] = self.fitness(gene)
        self.best.append(min(self.known.values()))

    def _possible(self) -> int:
        return math.comb(self.nodes - len(self.fixed), self.size - len(self.fixed))
