"""The free combination: any rule × any predictor at any site, from Python and from a plan.

Not a method of a paper but the engine's own form, in which the methods of papers are points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from accel.attach import Site, Undo
from accel.cache.clustered import Clustered
from accel.cache.columns import By, Column, Line, grouping, unfit
from accel.cache.fields import Cache, Limited
from accel.cache.forecasting import ByPlace
from accel.cache.magnitude import Magnitude, parts
from accel.cache.policies import Accumulated, Below, Every, Guarded, Listed, Rule, Within

if TYPE_CHECKING:
    from accel.cache.decisions import Decisions

Where = Literal["network", "blocks", "modules", "deep branch"]
Which = Literal[
    "interval", "steps", "within", "clustered", "table", "accumulated", "below", "magnitude"
]
What = Literal["none", "input", "probe", "gain"]

MEASURED = ("accumulated", "below")
"""Rules that compare what an indicator measures with a threshold."""

READS: dict[Which, tuple[What, ...]] = {
    "accumulated": ("input", "probe"),
    "below": ("input", "probe"),
    "magnitude": ("none", "gain"),
}
"""The indicators of rules that have any; 'magnitude' has none where there is a curve."""

BY_RULE = {
    "interval": ("interval", "within", "clustered"),
    "steps": ("steps",),
    "total": ("steps",),
    "low": ("within",),
    "high": ("within",),
    "threshold": (*MEASURED, "magnitude"),
    "share": ("magnitude",),
    "curve": ("magnitude",),
    "centre": ("clustered",),
    "power": ("clustered",),
    "table": ("table",),
    "by": ("table",),
    "stretch": ("table",),
}
"""Fields that only some rules read."""

BY_SITE = {
    "front": ("blocks",),
    "back": ("blocks",),
    "branch": ("deep branch",),
    "by": ("modules",),
    "memory_limit": ("modules",),
}
"""Fields that only some sites have."""

INDICATORS = {
    "network": ("none", "input"),
    "blocks": ("none", "input", "probe", "gain"),
    "modules": ("none",),
    "deep branch": ("none", "input"),
}
"""What can be measured at a site."""


class Custom(Cache, Limited):
    """Cache a site by a rule of your choice; the predictor fields say what fills in.

    EasyCache is ``network``, ``accumulated``, ``input``; First-Block-Cache ``blocks``, ``below``,
    ``probe`` with ``front=1``; TeaCache with the identity ``blocks``, ``accumulated``, ``input``;
    MagCache ``blocks``, ``magnitude``, ``gain``; FORA ``modules``, ``interval``; DeepCache ``deep
    branch``, ``interval`` or ``clustered``; HarmoniCa's form ``modules``, ``table``. Reads the
    device once a step where an indicator measures, else never.
    """

    name: ClassVar[str] = "cache.Custom"
    layer: ClassVar[Any] = ByPlace("block cache", network="step cache")
    seam: ClassVar[Any] = ByPlace("blocks", network="denoiser", modules="modules")
    supports: ClassVar[str] = (
        "site 'network': every denoiser; 'blocks': transformers with a list of blocks; 'modules': "
        "networks whose blocks hold attention modules; 'deep branch': UNets"
    )
    source: ClassVar[str] = "parts of arXiv 2411.19108, 2503.06923 and 2507.02860 (docs/design.md)"

    site: Where = Field(
        default="network",
        description="what is left out: the whole 'network', a range of its 'blocks', its "
        "attention and feed-forward 'modules', or a UNet's 'deep branch'",
    )
    rule: Which = Field(
        default="interval",
        description="when to compute: each 'interval'-th step; listed 'steps'; each interval-th "
        "'within' a range of timesteps; one step in 'interval', 'clustered' around a centre; by a "
        "'table'; when the indicator's sum since the last compute has ('accumulated'), or its "
        "present value is not 'below', the threshold; when the 'magnitude' of what is kept is off "
        "by more than it",
    )
    indicator: What = Field(
        default="none",
        description="what 'accumulated' and 'below' compare: the estimated change of the output "
        "from the 'input' (at blocks: from the modulated input of the first), or the change of "
        "what the 'probe', the blocks in front, adds. For 'magnitude' without a curve: how the "
        "size of the blocks' 'gain' changes",
    )
    interval: int = Field(default=2, ge=1, description="steps from compute to compute; 1 is off")
    steps: tuple[NonNegativeInt, ...] = Field(
        default=(), description="indices of computed steps for rule 'steps', from 0, rising"
    )
    total: int = Field(
        default=0,
        ge=0,
        description="evaluations of the runs that the steps are for; 0: of any run",
    )
    low: float = Field(
        default=100.0, description="timesteps at or below are computed by rule 'within'"
    )
    high: float = Field(
        default=850.0, description="timesteps at or above are computed by rule 'within'"
    )
    threshold: float = Field(
        default=0.05, ge=0.0, description="of 'accumulated', 'below' and 'magnitude'; 0 is off"
    )
    share: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="share of the steps, at the start, that 'magnitude' always computes",
    )
    curve: tuple[PositiveFloat, ...] = Field(
        default=(),
        description="the ratio of sizes at each step, for 'magnitude' (see cache.MagCache); empty: "
        "measured by indicator 'gain'",
    )
    centre: float = Field(
        default=0.3, ge=0.0, le=1.0, description="where 'clustered' is densest, as a share"
    )
    power: float = Field(default=1.4, ge=1.0, le=4.0, description="how much denser; 1 is even")
    table: tuple[Line, ...] = Field(
        default=(),
        description="for 'table': a line of 0s and 1s for each evaluation, 1 computes; one "
        "character a line, or at site 'modules' one for each column (see cache.Table)",
    )
    by: By = Field(
        default="block", description="what one character stands for, as cache.Table has it"
    )
    stretch: bool = Field(
        default=False,
        description="serve runs of another number of steps by the table's nearest line",
    )
    front: int = Field(
        default=0, ge=0, description="blocks at the start that always run; the probe"
    )
    back: int = Field(default=0, ge=0, description="blocks at the end that always run")
    branch: int = Field(
        default=0,
        ge=0,
        description="layers of the up path that a skipped step runs besides the last one, at "
        "site 'deep branch'",
    )

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        problems = (self._idle_field(), self._mismatch(), self._bad_steps(), self._bad_table())
        for problem in problems:
            if problem:
                raise ValueError(problem)
        return self

    def _idle_field(self) -> str | None:
        fields = type(self).model_fields
        for chosen, table in (("rule", BY_RULE), ("site", BY_SITE)):
            value = getattr(self, chosen)
            for name, readers in table.items():
                if value not in readers and getattr(self, name) != fields[name].default:
                    needed = " or ".join(f"'{reader}'" for reader in readers)
                    return f"{name} is read by {chosen} {needed} only, not by '{value}'"
        return None

    def _mismatch(self) -> str | None:
        if self.indicator not in INDICATORS[self.site]:
            return f"site '{self.site}' has no indicator '{self.indicator}'"
        if self.rule == "magnitude" and bool(self.curve) == (self.indicator == "gain"):
            return "rule 'magnitude' needs either a curve or indicator 'gain'"
        if self.indicator not in READS.get(self.rule, ("none",)):
            readers = " or ".join(f"'{one}'" for one in READS.get(self.rule, ("none",)))
            needs = f"indicator {readers}"
            return f"rule '{self.rule}' needs {needs}, not '{self.indicator}'"
        if self.indicator == "probe" and self.front == 0:
            return "indicator 'probe' needs front of at least 1: the blocks that are the probe"
        if self.indicator == "input" and self.front > 0:
            return "indicator 'input' needs front = 0: behind the front, the 'probe' is measured"
        return None

    def _bad_steps(self) -> str | None:
        if self.rule != "steps":
            return None
        if not self.steps or any(after <= before for before, after in pairwise(self.steps)):
            return "rule 'steps' needs steps that rise without repeats"
        if 0 < self.total <= self.steps[-1]:
            return f"step {self.steps[-1]} is none of a run of {self.total} evaluations"
        return None

    def _bad_table(self) -> str | None:
        if self.rule != "table":
            return None
        if not self.table:
            return "rule 'table' needs a table"
        if self.site != "modules" and {len(line) for line in self.table} != {1}:
            return f"at site '{self.site}' a table has one character a line: there is one thing"
        return unfit(self.table, self.by)

    @classmethod
    def off(cls) -> Self:
        """Interval 1."""
        return cls(interval=1)

    def why_off(self) -> str | None:
        """Why the rule computes every step."""
        if self.rule in READS:
            return "threshold is 0" if self.threshold == 0 else None
        if self.rule == "table":
            whole = not any("0" in line for line in self.table)
            return "the table computes everything" if whole else None
        if self.rule == "steps":
            return "every step is listed" if len(self.steps) == self.total else None
        if self.interval == 1:
            return "interval is 1"
        if self.rule == "within" and self.low >= self.high:
            return "no timestep is between low and high"
        return None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put the cache at its site.

        Raises:
            UnsupportedModel: For a network without such a site.
        """
        yield site.claim("denoiser" if self.site == "network" else "blocks")
        if self.site == "blocks":
            yield site.claim("decisions for all branches")
        yield from {
            "network": self._around_network,
            "blocks": self._around_blocks,
            "modules": self._around_modules,
            "deep branch": self._around_deep_branch,
        }[self.site](site)

    def _policy(self, site: Site, column: Any = 0) -> Guarded:
        """A fresh policy for one sample; for one column of a table."""
        rules: dict[Which, Callable[[], Rule]] = {
            "interval": lambda: Every(self.interval),
            "steps": lambda: Listed(self.steps, self.total or None),
            "within": lambda: Within(self.interval, self.low, self.high),
            "clustered": lambda: Clustered(
                self.interval, self.centre, self.power, "rule='interval'"
            ),
            "table": lambda: Column.of(self.table, column, self.stretch),
            "accumulated": lambda: Accumulated(self.threshold),
            "below": lambda: Below(self.threshold),
            "magnitude": lambda: Magnitude(self.threshold, self.share, self.curve, parts(site)),
        }
        return self.guarded(rules[self.rule]())

    def _decisions(self, site: Site) -> Decisions[Any]:
        from accel.cache import indicators
        from accel.cache.decisions import Decisions
        from accel.cache.indicators import Unmeasured

        of_input = indicators.SignalChange if self.site == "blocks" else indicators.InputChange
        kinds = {
            "none": Unmeasured,
            "input": of_input,
            "probe": indicators.ProbeChange,
            "gain": indicators.Magnitudes,
        }
        decisions: Decisions[Any] = Decisions(kinds[self.indicator], lambda: self._policy(site))
        site.tally.reason = (
            (lambda: decisions.why_idle("the indicator", self.threshold))
            if self.rule in MEASURED
            else (lambda: f"rule '{self.rule}' and the guards computed every step")
        )
        return decisions

    def _around_network(self, site: Site) -> Iterator[Undo]:
        from accel.cache.network import NetworkCache

        yield from NetworkCache(site.tally, self._decisions(site), self.forecast).attach(site)

    def _around_blocks(self, site: Site) -> Iterator[Undo]:
        from accel.cache.block_range import BlockRangeCache, Spans, picture_in
        from accel.cache.indicators import Magnitudes
        from accel.seams.modulation import input_signal

        gain = self.indicator == "gain"
        entry = picture_in if gain else None
        if self.indicator == "input":
            signal = cache(input_signal)  # looked up once a block
            for denoiser in site.denoisers:
                signal(site.blocks(denoiser)[0])  # refuses here, not amid a run
            entry = lambda block, arguments: signal(block)(block, arguments)  # noqa: E731
        range_cache = BlockRangeCache(
            site.tally,
            self._decisions(site),
            lambda count: Spans((range(self.front, count - self.back),), front=self.front),
            self.forecast,
            entry=entry,
            told=Magnitudes.added if gain else None,
        )
        yield from range_cache.attach(site)

    def _around_modules(self, site: Site) -> Iterator[Undo]:
        from accel.cache.modules import ModuleCache

        tabled = self.rule == "table"
        module_cache = ModuleCache(
            site.tally,
            grouping(site, self.table, self.by) if tabled else lambda module: 0,  # noqa: ARG005
            lambda column: self._policy(site, column),
            self.forecast,
            self.memory_limit,
        )
        yield from module_cache.attach(site)

    def _around_deep_branch(self, site: Site) -> Iterator[Undo]:
        from accel.cache.deep_branch import DeepBranchCache

        decisions = self._decisions(site)
        yield from DeepBranchCache(site.tally, decisions, self.branch, self.forecast).attach(site)
