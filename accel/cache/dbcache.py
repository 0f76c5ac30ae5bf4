"""DBCache: blocks in front decide, blocks in the middle are skipped, blocks at the end always run.

Source: cache-dit's Dual Block Cache (2025). F1B0 is First-Block-Cache.

Its caps are all here: ``warmup``, ``max_skips`` in a row, the ``budget`` of a run, ``accumulated``
change, a mask of ``steps``, and the mean over ``changed`` tokens; its calibrators are the
predictors. Not offered: DBPrune, which judges every block by its own input and so reads the device
once a block where this reads it once a step; and cache-dit's counting of calls in pairs for
guidance, in place of which every branch has its own state here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

from pydantic import Field, NonNegativeInt

from accel.attach import Site, Undo
from accel.cache.fields import AdaptiveCache
from accel.cache.policies import Accumulated, Below, Either, Guarded, Listed, Rule


class DBCache(AdaptiveCache):
    """Skip the middle blocks while the residual of those in front changes little.

    The change is that of the front blocks' residual since the last compute, for each sample. What
    is injected between blocks (ControlNet) stays live on skipped steps. Where front and back
    leave no block in the middle, everything is computed, and the report says so. Reads the device
    once a step.
    """

    name: ClassVar[str] = "cache.DBCache"
    layer: ClassVar[str] = "block cache"
    seam: ClassVar[str] = "blocks"
    supports: ClassVar[str] = "transformers with a list of blocks, every guidance layout"
    source: ClassVar[str] = "cache-dit, DBCache (2025): https://github.com/vipshop/cache-dit"

    threshold: float = Field(
        default=0.08,
        ge=0.0,
        description="relative L1 change of the front blocks' residual below which the middle is "
        "skipped; 0 is off. Usual: 0.08 (8 blocks in front) to 0.2",
    )
    front: int = Field(
        default=2,
        ge=1,
        description="blocks at the start that always run and tell the change; cache-dit takes 8 "
        "of FLUX's 57",
    )
    back: int = Field(default=0, ge=0, description="blocks at the end that always run")
    warmup: int = Field(
        default=4, ge=1, description="steps at the start that are always computed; cache-dit: 8"
    )
    budget: int = Field(
        default=0,
        ge=0,
        description="skips in the whole run after which every step is computed; 0: no cap",
    )
    accumulated: float = Field(
        default=0.0,
        ge=0.0,
        description="sum of the changes over consecutive skips at which a step is computed; 0: no "
        "cap",
    )
    changed: float = Field(
        default=0.0,
        ge=0.0,
        description="only tokens whose own relative change is above it count in the change, where "
        "there are any: what stands still does not hide what moves; 0: all tokens",
    )
    steps: tuple[NonNegativeInt, ...] = Field(
        default=(), description="steps, counted from 0, that are computed in any case"
    )

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache into every denoiser.

        Raises:
            UnsupportedModel: For a network without a plain list of blocks (every UNet), or one
                with long skips to blocks at the end that would run.
        """
        from accel.cache.block_range import BlockRangeCache, Spans, check_skips
        from accel.cache.decisions import Decisions
        from accel.cache.indicators import ProbeChange

        yield site.claim("blocks")
        yield site.claim("decisions for all branches")
        if self.back:
            check_skips(site, self.name)
        decisions = Decisions(lambda: ProbeChange(self.changed), self._policy)
        site.tally.reason = lambda: decisions.why_idle("the front blocks' change", self.threshold)
        front, back = self.front, self.back
        cache = BlockRangeCache(
            site.tally,
            decisions,
            lambda count: Spans((range(front, count - back),), front=front),
            self.forecast,
        )
        yield from cache.attach(site)

    def _policy(self) -> Guarded:
        rules: list[Rule] = [Below(self.threshold)]
        if self.accumulated:
            rules.append(Accumulated(self.accumulated))
        if self.steps:
            rules.append(Listed(self.steps))
        return replace(self.guarded(Either(rules)), budget=self.budget)
