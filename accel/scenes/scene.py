"""What a scene contains: its attributes, and the draw of a scene from a seed.

Seeds are split once and for all: training draws from `TRAINING`, every figure that is reported
comes from `HELD_OUT`. Size and time do not enter: one seed is one scene at every resolution.
"""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import numpy as np

TRAINING: Final = range(0, 1_000_000)
HELD_OUT: Final = range(1_000_000, 2_000_000)

COLOURS: Final = ("red", "blue", "yellow", "white")
SIDES: Final = ("left", "right")

ATTRIBUTES: Final = MappingProxyType(
    {
        "time": ("dawn", "noon", "sunset", "night"),
        "land": ("mountains", "hills", "dunes", "sea"),
        "season": ("none", "snow", "green", "autumn"),
        "clouds": ("clear", "cloudy"),
        "light_side": SIDES,
        "house": ("none", *COLOURS),
        "house_side": ("none", *SIDES),
        "trees": ("0", "1", "2", "3"),
        "trees_side": ("none", *SIDES),
        "boat": ("none", *COLOURS),
        "boat_side": ("none", *SIDES),
        "birds": ("none", "some"),
    }
)
"""Every attribute with its possible values, in the oracle's order."""

MOVERS: Final = ("light", "clouds", "boat")
SPEEDS: Final = ("slowly", "fast")

MOTIONS: Final = MappingProxyType({"mover": MOVERS, "direction": SIDES, "speed": SPEEDS})
"""What a clip has besides, with its possible values: what moves, where to, how fast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Motion:
    """What moves in a clip: the mover, where it goes, and how fast."""

    mover: str
    direction: str
    speed: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One landscape: its attributes, its caption, and what the caption mentions.

    `mentions` names the attributes that the caption pins down, those of the motion too if it is
    a clip's; all others were left to chance, so a picture or clip is judged by `wanted` only.
    """

    seed: int
    time: str
    land: str
    season: str
    clouds: str
    light_side: str
    house: str
    house_side: str
    trees: str
    trees_side: str
    boat: str
    boat_side: str
    birds: str
    motion: Motion
    caption: str = ""
    mentions: tuple[str, ...] = ()

    @property
    def attributes(self) -> dict[str, str]:
        """Every attribute of the picture by name."""
        return {name: getattr(self, name) for name in ATTRIBUTES}

    @property
    def wanted(self) -> dict[str, str]:
        """The attributes that the caption mentions, with their values."""
        return {
            name: getattr(self.motion if name in MOTIONS else self, name) for name in self.mentions
        }

    def with_caption(self, caption: str, mentions: tuple[str, ...]) -> "Scene":
        """The same scene described by other words."""
        return replace(self, caption=caption, mentions=mentions)


def _pick(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]


def _other(side: str) -> str:
    return "right" if side == "left" else "left"


def _objects(rng: np.random.Generator, land: str) -> dict[str, str]:
    """Draw house, trees and boat; a house and trees never stand on the same side."""
    chance, side, colour = rng.random(), _pick(rng, SIDES), _pick(rng, COLOURS)
    count = _pick(rng, ("1", "2", "3"))
    found = {"house": "none", "house_side": "none", "trees": "0", "trees_side": "none"}
    found |= {"boat": "none", "boat_side": "none"}
    if land == "sea":
        return found | ({"boat": colour, "boat_side": side} if chance < 0.75 else {})
    if chance < (0.7 if land == "dunes" else 0.65):
        found |= {"house": colour, "house_side": side}
    if land != "dunes" and 0.35 < chance < 0.92:
        found |= {"trees": count, "trees_side": _other(side)}
    return found


def _motion(rng: np.random.Generator, boat: str, clouds: str) -> Motion:
    movers = ["light"] + ["clouds"] * (clouds == "cloudy") + ["boat"] * (boat != "none")
    mover = _pick(rng, tuple(movers))
    return Motion(mover=mover, direction=_pick(rng, SIDES), speed=_pick(rng, SPEEDS))


def draw(seed: int) -> Scene:
    """The scene of a seed, without a caption (`accel.scenes.scene` adds one)."""
    rng = np.random.default_rng([seed, 1])
    land = _pick(rng, ATTRIBUTES["land"])
    season = "none" if land in ("dunes", "sea") else _pick(rng, ATTRIBUTES["season"][1:])
    clouds = _pick(rng, ATTRIBUTES["clouds"])
    time, light_side = _pick(rng, ATTRIBUTES["time"]), _pick(rng, SIDES)
    birds = "some" if rng.random() < 0.3 else "none"
    found = _objects(rng, land)
    return Scene(
        seed=seed,
        time=time,
        land=land,
        season=season,
        clouds=clouds,
        light_side=light_side,
        house=found["house"],
        house_side=found["house_side"],
        trees=found["trees"],
        trees_side=found["trees_side"],
        boat=found["boat"],
        boat_side=found["boat_side"],
        birds=birds,
        motion=_motion(rng, found["boat"], clouds),
    )
