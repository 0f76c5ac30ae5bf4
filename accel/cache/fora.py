"""FORA: keep what attention and feed-forward modules answer for some steps.

Source: Selvaraju et al., "FORA: Fast-Forward Caching in Diffusion Transformer Acceleration",
arXiv 2407.01425, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from accel.attach import Site, Undo
from accel.cache.fields import Limited, StaticCache
from accel.cache.policies import Every


class FORA(StaticCache, Limited):
    """Compute all modules every ``interval``-th step; in between, reuse their outputs.

    What is kept is not yet gated: the block's present modulation and gate act on it, and norms,
    embeddings and residual sums run at every step. It never reads the device.
    """

    name: ClassVar[str] = "cache.FORA"
    layer: ClassVar[str] = "block cache"
    seam: ClassVar[str] = "modules"
    supports: ClassVar[str] = "transformers and UNets whose blocks hold attention modules"
    source: ClassVar[str] = "arXiv 2407.01425, section 3"

    interval: int = Field(
        default=3, ge=1, description="steps from compute to compute; 1 is off. The authors use 3"
    )
    last: bool = Field(default=False, description="always compute the last step")

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache into every module.

        Raises:
            UnsupportedModel: For a network without such modules, or with compiled blocks.
        """
        from accel.cache.modules import ModuleCache

        yield site.claim("blocks")
        cache = ModuleCache(
            site.tally,
            lambda module: "all",  # noqa: ARG005
            lambda group: self.guarded(Every(self.interval)),  # noqa: ARG005
            self.forecast,
            self.memory_limit,
        )
        yield from cache.attach(site)
