"""What all sparse attentions share: how much stays dense, and by what they are computed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo

if TYPE_CHECKING:
    from accel.attention.account import Account
    from accel.attention.choice import Choice
    from accel.attention.patterns.pattern import Pattern
    from accel.attention.serving import Answers
    from accel.seams.layout import Layout


class Sparse(Accelerator):
    """Image tokens attend to some of the others; to text, and as text, to all. No step is left out.

    Cross-attention and attention along time stay as they are.
    """

    layer: ClassVar[str] = "attention"
    seam: ClassVar[str] = "attention"
    supports: ClassVar[str] = (
        "UNets, and transformers whose order of tokens is known, with softmax attention that is "
        "not compiled"
    )

    warm_up: float = Field(
        default=0.1,
        ge=0.0,
        le=1.0,
        description="share of the first steps that stay dense; 1 is off. Usual: 0.1 to 0.25",
    )
    dense_layers: int = Field(
        default=0, ge=0, description="how many of a network's first attentions stay dense"
    )
    lowering: Literal["auto", "auto-dense", "gather", "flex", "xformers", "dense"] = Field(
        default="auto",
        description="by what it is computed: 'auto' is the fastest that was measured here, and "
        "warns where dense attention is faster; 'auto-dense' leaves it dense there. A forced one "
        "gives the same bits again. 'dense' masks and saves nothing",
    )

    @classmethod
    def off(cls) -> Self:
        """All steps dense."""
        return cls.model_validate({"warm_up": 1.0})

    def why_off(self) -> str | None:
        """Dense at every step."""
        return "warm_up is 1: all steps are dense" if self.warm_up == 1 else None

    @abstractmethod
    def answers(self, choice: Choice, account: Account) -> Answers:
        """What computes the attentions of one pipeline.

        Args:
            choice: Says by which lowering a table is computed.
            account: Is told what was done.
        """

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it into every attention of the image.

        Raises:
            UnsupportedModel: For a network whose order of tokens is not known.
        """
        from accel.attention.account import Account
        from accel.attention.choice import Choice
        from accel.attention.serving import Serving

        yield site.claim("attention")
        yield site.claim("tokens")  # whose order must be the network's own
        yield site.claim("size of the picture")
        account = Account(site.tally)
        answers = self.answers(Choice(self.lowering), account)
        yield from Serving(answers, account, self.warm_up, self.dense_layers).attach(site)


class Patterned(Sparse):
    """Sparse attention by a pattern that is the same for all heads, layers, steps and samples."""

    @abstractmethod
    def pattern(self, layout: Layout) -> Pattern:
        """The pattern on a layout.

        Raises:
            BadInput: If there is none.
        """

    def answers(self, choice: Choice, account: Account) -> Answers:
        """One table for each layout."""
        from accel.attention.static import Static

        return Static(self.pattern, choice, account)
