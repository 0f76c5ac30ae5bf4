"""Sparse VideoGen: each head looks around in space or along time, which it is found as it runs.

Source: Xi et al., "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal
Sparsity", arXiv 2502.01776, sections 4.1 and 4.2. The two patterns, with what the authors measure:
`accel.attention.patterns.sparse_videogen`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from accel.attention.sparse import Sparse

if TYPE_CHECKING:
    from accel.attention.account import Account
    from accel.attention.choice import Choice
    from accel.attention.patterns.pattern import Pattern
    from accel.attention.serving import Answers
    from accel.seams.layout import Layout


class SVG(Sparse):
    """At each layer and step, a head takes the one of two bands that comes nearer to dense.

    Which one it is, is measured on a few queries of each sample and branch; they are drawn by
    layer and step alone: the device is read once an attention. In a picture, which has one frame,
    both are the same, and nothing is measured or read.
    """

    name: ClassVar[str] = "attention.SVG"
    source: ClassVar[str] = "arXiv 2502.01776, sections 4.1 and 4.2"

    warm_up: float = Field(
        default=0.2,
        ge=0.0,
        le=1.0,
        description="share of the first steps that stay dense; 1 is off. The authors: 0.1 to 0.2",
    )
    dense_layers: int = Field(
        default=1,
        ge=0,
        description="how many of a network's first attentions stay dense. The authors: 3 %",
    )
    keep: float = Field(
        default=0.25,
        gt=0.0,
        le=1.0,
        description="share of the pairs without text that the band is made for; the authors "
        "call it sparsity and count text in: 0.25 to 0.3",
    )
    block: int = Field(
        default=128, ge=1, description="tokens to which the band's width is rounded, at least one"
    )
    sink: bool = Field(
        default=False,
        description="whether all queries attend to the first frame too, as the authors do on Wan",
    )
    samples: int = Field(
        default=64, ge=1, description="queries by which a head is judged. The authors: 32 to 64"
    )

    def patterns(self, layout: Layout) -> dict[str, Pattern]:
        """The two bands; of a picture the one that they both are."""
        from accel.attention.patterns.sparse_videogen import Spatial, Temporal

        given = (self.keep, self.block, False, self.sink)
        if layout.frames == 1:
            return {"spatial": Spatial(*given)}
        return {"spatial": Spatial(*given), "temporal": Temporal(*given)}

    def answers(self, choice: Choice, account: Account) -> Answers:
        """Two tables for each layout, and a choice for each head."""
        from accel.attention.profiling import Profiling

        return Profiling(self.patterns, self.samples, choice, account)
