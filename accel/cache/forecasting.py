"""What forecasting caches share: computed steps at an interval, a forecast in between, any site."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from accel.attach import Accelerator, Site, Undo
from accel.cache.fields import Limited, StaticCache
from accel.cache.policies import Every, Guarded

if TYPE_CHECKING:
    from accel.cache.decisions import Decisions

Where = Literal["modules", "blocks", "network"]


class ByPlace:
    """What a method is by its ``site``: of an instance, of a class by the field's default.

    Args:
        usual: What it is at a site that is not named.
        **others: What it is at others.
    """

    def __init__(self, usual: str, **others: str) -> None:
        self._usual = usual
        self._others = others

    def __get__(self, method: Any, owner: type[Accelerator]) -> str:
        site = owner.model_fields["site"].default if method is None else method.site
        return self._others.get(site, self._usual)


class Forecasting(StaticCache, Limited):
    """Compute every ``interval``-th step after the warm-up; forecast all others."""

    layer: ClassVar[Any] = ByPlace("block cache", network="step cache")
    seam: ClassVar[Any] = ByPlace("modules", blocks="blocks", network="denoiser")
    supports: ClassVar[str] = (
        "site 'network': every denoiser; 'modules': transformers and UNets whose blocks hold "
        "attention modules; 'blocks': transformers with a list of blocks"
    )

    site: Where = Field(
        default="modules",
        description="what is forecast: the outputs of attention and feed-forward 'modules' "
        "(the paper; most memory), what all 'blocks' together add, or what the 'network' answers "
        "(least memory, most is left out)",
    )
    last: bool = Field(default=False, description="always compute the last step")

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache around the network, its blocks or its modules.

        Raises:
            UnsupportedModel: For a network without what is to be forecast.
        """
        yield from {
            "modules": self._around_modules,
            "blocks": self._around_blocks,
            "network": self._around_network,
        }[self.site](site)

    def _policy(self) -> Guarded:
        return self.guarded(Every(self.interval))

    def _decisions(self, site: Site) -> Decisions[Any]:
        from accel.cache.decisions import Decisions
        from accel.cache.indicators import Unmeasured

        site.tally.reason = lambda: (
            f"the run had no step to skip after {self.warmup} of warm-up, at interval "
            f"{self.interval}"
        )
        return Decisions(Unmeasured, self._policy)

    def _around_modules(self, site: Site) -> Iterator[Undo]:
        from accel.cache.modules import ModuleCache

        yield site.claim("blocks")
        cache = ModuleCache(
            site.tally,
            lambda module: "all",  # noqa: ARG005
            lambda group: self._policy(),  # noqa: ARG005
            self.forecast,
            self.memory_limit,
        )
        yield from cache.attach(site)

    def _around_blocks(self, site: Site) -> Iterator[Undo]:
        from accel.cache.block_range import BlockRangeCache, Spans

        yield site.claim("blocks")
        cache = BlockRangeCache(
            site.tally,
            self._decisions(site),
            lambda count: Spans((range(count),)),
            self.forecast,
        )
        yield from cache.attach(site)

    def _around_network(self, site: Site) -> Iterator[Undo]:
        from accel.cache.network import NetworkCache

        yield site.claim("denoiser")
        yield from NetworkCache(site.tally, self._decisions(site), self.forecast).attach(site)
