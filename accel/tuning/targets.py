"""What a plan is tuned for: a fidelity to hold, a time to keep, or both.

Fidelity is measured against the stock run of the same prompt and seed. A plan holds a target where
its mean over the prompts does, and at least 95 % of the prompts do one by one; of ``accuracy``,
which says what the pictures show and compares nothing, the mean alone counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean, pstdev, stdev
from typing import Literal

from accel.errors import BadInput

Sense = Literal[">=", "<="]

SENSES: dict[str, Sense] = {
    "ssim": ">=",
    "psnr": ">=",
    "perceptual": "<=",
    "accuracy": ">=",
    "speedup": ">=",
    "seconds": "<=",
}
"""What may be asked for, and which way is better."""

TIMES = ("speedup", "seconds")
MEANS = ("accuracy",)
"""Judged by their mean over the prompts alone."""

ALIASES = {"lpips": "perceptual"}
"""LPIPS needs a network that does not ship: its like in the features of the scenes oracle does."""

SCALES = {"ssim": 0.05, "psnr": 3.0, "perceptual": 0.02, "accuracy": 0.05}
"""A difference that is felt about alike in each measure: what margins are told in."""

LEAST = 1e-6
"""What is lost where nothing is: its logarithm is to be finite."""

FAULTS: dict[str, Callable[[float], float]] = {
    "ssim": lambda value: math.log(max(1.0 - value, LEAST)),
    "psnr": lambda value: -value,
    "perceptual": lambda value: math.log(max(value, LEAST)),
}
"""What is lost in each measure that prompts hold one by one, on the scale of a logarithm."""

SHARE = 0.95
"""Of the prompts that must hold a target one by one."""

CHANCE = 0.25
"""That a plan of which more prompts miss in general than may seems to hold with room."""

WRITTEN = re.compile(r"\s*([a-z]+)\s*(>=|<=)\s*([0-9.eE+-]+)\s*")


@dataclass(frozen=True)
class Target:
    """One thing to hold.

    Attributes:
        measure: Its name, of `SENSES`.
        level: The bound: SSIM in [0, 1], PSNR in dB, perceptual distance ≥ 0, share of the
            attributes of a caption in [0, 1], times as fast as stock, seconds a call.
    """

    measure: str
    level: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``ssim>=0.95``.

        Raises:
            BadInput: If the measure is unknown, the sign the wrong way round, or no number follows.
        """
        found = WRITTEN.fullmatch(text)
        if found is None:
            raise BadInput(
                f"The target {text!r} is none: write a measure, >= or <=, and a number, such as "
                f"ssim>=0.95; measures are {', '.join(SENSES)}."
            )
        measure = ALIASES.get(found[1], found[1])
        if measure not in SENSES:
            raise BadInput(
                f"The target {text!r} names the measure '{found[1]}': known are "
                f"{', '.join((*SENSES, *ALIASES))}."
            )
        if found[2] != SENSES[measure]:
            raise BadInput(
                f"The target {text!r} asks for less than it could: write {found[1]}"
                f"{SENSES[measure]}{found[3]}."
            )
        return cls(measure, _number(text, found[3], measure))

    def __str__(self) -> str:
        return f"{self.measure}{SENSES[self.measure]}{self.level:g}"

    @property
    def sign(self) -> int:
        """1 where more is better, −1 where less is."""
        return 1 if SENSES[self.measure] == ">=" else -1

    @property
    def is_time(self) -> bool:
        """Whether it is about seconds."""
        return self.measure in TIMES

    def met_by(self, value: float) -> bool:
        """Whether a value is on the right side."""
        return self.sign * value >= self.sign * self.level

    def margin(self, value: float) -> float:
        """How far inside a value is, in units of `SCALES` (times: relative); negative: outside."""
        scale = self.level if self.is_time else SCALES[self.measure]
        return min(self.sign * (value - self.level) / scale, 100.0)

    def room(self, values: Sequence[float]) -> float:
        """How surely other prompts hold it too, by the values of some: from 1 on it is likely.

        In standard deviations from the mean to the level, over `tolerance`; of what is lost the
        logarithm (`FAULTS`), which differs from prompt to prompt about as a normal number does.
        """
        fault = FAULTS[self.measure]
        found = [fault(value) for value in values]
        away, apart = fault(self.level) - mean(found), pstdev(found)
        if apart == 0.0:
            return math.inf if away >= 0.0 else -math.inf
        return away / (stdev(found) * tolerance(len(found)))

    def held_by(self, values: Sequence[float]) -> bool:
        """Whether the values of some prompts hold it: in the mean, and nearly all one by one."""
        return self.met_by(mean(values)) and (self.measure in MEANS or self.share(values) >= SHARE)

    def share(self, values: Sequence[float]) -> float:
        """Which share of the prompts meets it one by one."""
        return sum(map(self.met_by, values)) / len(values)


def _number(text: str, digits: str, measure: str) -> float:
    try:
        level = float(digits)
    except ValueError:
        raise BadInput(f"The target {text!r} has no number after its sign.") from None
    top = 1.0 if measure in ("ssim", "accuracy") else float("inf")
    if not 0.0 < level <= top:
        raise BadInput(
            f"The target {text!r} cannot be held: {measure} lies above 0, up to {top:g}."
        )
    return level


@cache
def tolerance(count: int) -> float:
    """How many standard deviations the mean of so many prompts must be away from a level.

    Then 95 % of all prompts hold it, but for a chance of `CHANCE`, if their values are normal: the
    one-sided tolerance factor (Hahn and Meeker, Statistical Intervals, 1991, section 4.4). Of at
    least two prompts.
    """
    from scipy.stats import nct, norm  # type: ignore[import-untyped]

    away = math.sqrt(count) * norm.ppf(SHARE)
    return float(nct.ppf(1.0 - CHANCE, count - 1, away) / math.sqrt(count))


def may_miss(count: int) -> int:
    """Of so many prompts, how many may miss a target that they are to hold one by one."""
    return math.floor((1.0 - SHARE) * count + 1e-9)


def sure_misses(count: int) -> int:
    """Of so many prompts, how many may miss if others are to hold the target too: with room.

    Where 5 % of all prompts miss, as many or fewer do among so many in at most `CHANCE` of all
    draws; none, where even that is likelier. Of 128: 4.
    """
    from scipy.stats import binom

    return max(0, int(binom.ppf(CHANCE, count, 1.0 - SHARE)) - 1)


def likely_misses(count: int) -> int:
    """Of so many prompts, how many miss a target that others will just hold: the nearest number."""
    return round((1.0 - SHARE) * count)


@dataclass(frozen=True)
class Targets:
    """All that is to be held at once.

    Args:
        each: At least one, of each measure at most one.
    """

    each: tuple[Target, ...]

    @classmethod
    def parse(cls, texts: str | Iterable[str]) -> Targets:
        """Read one target, or several.

        Raises:
            BadInput: As `Target.parse`; if there is none, or two of one measure.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        each = tuple(Target.parse(text) for text in texts)
        if not each:
            raise BadInput("There is no target: name what is to be held, such as ssim>=0.95.")
        measures = [target.measure for target in each]
        if len(set(measures)) < len(measures):
            raise BadInput(f"The targets {', '.join(texts)} name one measure twice: keep one.")
        return cls(each)

    @property
    def fidelity(self) -> tuple[Target, ...]:
        """Those that pictures decide."""
        return tuple(target for target in self.each if not target.is_time)

    @property
    def singly(self) -> tuple[Target, ...]:
        """Those of fidelity that prompts are to hold one by one."""
        return tuple(target for target in self.fidelity if target.measure not in MEANS)

    @property
    def times(self) -> tuple[Target, ...]:
        """Those that a clock decides."""
        return tuple(target for target in self.each if target.is_time)

    @property
    def first(self) -> str:
        """The measure of fidelity that plots show: the first one that is asked for, else SSIM."""
        return self.fidelity[0].measure if self.fidelity else "ssim"

    def held_by(self, figures: Sequence[Mapping[str, float]]) -> bool:
        """Whether the figures of some prompts hold every target of fidelity."""
        return all(
            target.held_by([one[target.measure] for one in figures]) for target in self.fidelity
        )

    def missed(self, figures: Sequence[Mapping[str, float]], spare: int = 0) -> bool:
        """Whether more prompts than so many miss a target that is to be held one by one."""
        return any(
            sum(not target.met_by(one[target.measure]) for one in figures) > spare
            for target in self.singly
        )

    def room(self, figures: Sequence[Mapping[str, float]]) -> float:
        """How surely other prompts hold the targets of fidelity one by one: likely from 1 on.

        Infinite where none asks for that.
        """
        return min(
            (target.room([one[target.measure] for one in figures]) for target in self.singly),
            default=math.inf,
        )

    def slack(self, figures: Sequence[Mapping[str, float]], spare: int = 0) -> float:
        """The margin of the tightest target, in the mean and at the worst prompt but so many.

        100 where none asks for any. Of prompts there must be more than are spared.
        """
        worst = [100.0]
        for target in self.fidelity:
            values = [one[target.measure] for one in figures]
            worst.append(target.margin(mean(values)))
            if target.measure not in MEANS:
                worst.append(sorted(map(target.margin, values))[spare])
        return min(worst)
