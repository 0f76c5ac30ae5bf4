"""What the laws must know of one method."""

from collections.abc import Callable
from dataclasses import dataclass, field

from tiny import Tiny

from accel import Accelerator

STEPS = 6


@dataclass(frozen=True)
class Row:
    """What the laws must know of one method.

    Attributes:
        engine: What does the work. CI runs every engine on every layout and kind of block, and
            every method on the pipelines of ``CORE``.
        active: Acts within ``STEPS`` steps on every tiny pipeline that it serves.
        variants: Other active forms: every predictor, space, solver.
        unserved: Signatures of blocks (`Tiny.blocks`) that it refuses, or ``*`` for all.
        refused: Tiny pipelines that it refuses for another reason, such as their scheduler.
        branches: Whether it acts only where guidance has two branches.
        answers: How it answers for the unconditional branch where that is left out: ``reused`` from
            the conditional one, ``predicted`` by an estimate, or both; where ``branches`` is set.
        leads: The branch whose events show what a sample decides.
        dial: The method at a threshold, where it decides from the samples themselves.
        lossless: Whether its output is that of the stock pipeline to the bit while it acts;
            ``None``: up to the rounding of kernels, so on some machines.
        exact: Variants whose output is the stock pipeline's to the bit, unlike the active form's.
        also: Tiny pipelines of no matrix (`tiny.TINIES`) that the laws run it on as well.
        idle: Tiny pipelines that it attaches to but finds nothing to do in, or whose runs it
            refuses.
        unready: Tiny pipelines on which its default form is refused, unlike ``active``; ``*``: all,
            because it rests on numbers that have to be measured.
        follows: Branches whose tokens, steps or modules are chosen by what other branches answered:
            their answers change with the other's prompt, though nothing of it is in them.
        fixed: Whether it refuses runs of another number of steps than ``STEPS``.
        unsteady: Tiny pipelines on which it decides when rounding has grown, so that ties turn over
            between alone and together on some machines.
    """

    engine: str
    active: Accelerator
    variants: tuple[Accelerator, ...] = ()
    unserved: frozenset[str] = field(default_factory=frozenset)
    refused: frozenset[str] = field(default_factory=frozenset)
    branches: bool = False
    answers: frozenset[str] = frozenset({"reused"})
    leads: str = "cond"
    dial: Callable[[float], Accelerator] | None = None
    lossless: bool | None = False
    exact: tuple[Accelerator, ...] = ()
    also: tuple[str, ...] = ()
    idle: frozenset[str] = field(default_factory=frozenset)
    unready: frozenset[str] = field(default_factory=frozenset)
    follows: frozenset[str] = field(default_factory=frozenset)
    fixed: bool = False
    unsteady: frozenset[str] = field(default_factory=frozenset)

    def serves(self, tiny: Tiny) -> bool:
        """Whether it attaches to a pipeline."""
        return tiny.blocks not in self.unserved and tiny.name not in self.refused

    def acts(self, tiny: Tiny) -> bool:
        """Whether its active forms do something on a pipeline."""
        guided = len(tiny.order) > 1 or not self.branches
        return self.serves(tiny) and guided and tiny.name not in self.idle

    def ready(self, tiny: Tiny) -> bool:
        """Whether its default form attaches to a pipeline."""
        return self.serves(tiny) and not self.unready & {"*", tiny.name}
