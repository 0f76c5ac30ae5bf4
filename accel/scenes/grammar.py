"""Captions: a grammar of several wordings per attribute, small enough to be learnt whole.

Objects are always named when they are there, so that what a caption does not name is absent;
season, time, clouds, sides and the light may be left out and are then up to chance.
"""

import re
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from accel.scenes.scene import MOTIONS, SIDES, SPEEDS, Motion, Scene, draw

LONGEST: Final = 28
"""Most words and commas in a caption; text encoders are given room for 32 tokens."""

COUNTS: Final = {"1": "one pine tree", "2": "two pine trees", "3": "three pine trees"}
TIMES: Final = {
    "dawn": ("at dawn", "at sunrise", "in the early morning"),
    "noon": ("at noon", "in daylight", "under a blue sky"),
    "sunset": ("at sunset", "in the evening", "under a red sky"),
    "night": ("at night", "under a starry sky", "under the stars"),
}
SEASONED: Final = {
    "snow": ("snowy {}", "{} in winter", "{} covered in snow"),
    "green": ("green {}", "{} in summer", "grassy {}"),
    "autumn": ("autumn {}", "{} in autumn", "orange {}"),
}
BARE: Final = {
    "dunes": ("sand dunes", "a desert", "desert dunes"),
    "sea": ("the sea", "a calm sea", "the ocean"),
}
CLOUDS: Final = {
    "clear": ("a clear sky", "no clouds"),
    "cloudy": ("clouds", "a cloudy sky"),
}
BIRDS: Final = ("birds", "birds in the sky", "flying birds")
MOVES: Final = {
    "the sun moving": "light",
    "the moon moving": "light",
    "clouds drifting": "clouds",
    "sailing": "boat",
}
ENDING: Final = re.compile(
    f"(?:.*, )?({'|'.join(MOVES)}) ({'|'.join(SPEEDS)}) to the ({'|'.join(SIDES)})"
)
"""How a clip's caption ends."""
OPENINGS: Final = ("", "", "", "a picture of ", "a landscape with ")


@dataclass(slots=True)
class _Telling:
    """A caption in the making: its random choices and what has been mentioned so far."""

    scene: Scene
    rng: np.random.Generator
    mentions: list[str] = field(default_factory=list)

    def maybe(self, chance: float) -> bool:
        return float(self.rng.random()) < chance

    def pick(self, wordings: tuple[str, ...]) -> str:
        return wordings[int(self.rng.integers(len(wordings)))]

    def mention(self, *names: str) -> None:
        self.mentions += [name for name in names if name not in self.mentions]


def _side(telling: _Telling, name: str, thing: str) -> str:
    side = getattr(telling.scene, name)
    telling.mention(name)
    return f"{thing} on the {side}"


def _pair(telling: _Telling, house: str, trees: str) -> str:
    """House and trees together: where one stands decides where the other does."""
    scene, way = telling.scene, int(telling.rng.integers(4))
    if way == 3:
        return f"{house} and {trees}"
    telling.mention("house_side", "trees_side")
    if way == 0:
        return f"{house} {scene.house_side} of {trees}"
    if way == 1:
        return f"{trees} {scene.trees_side} of {house}"
    return f"{house} on the {scene.house_side} and {trees} on the {scene.trees_side}"


def _objects(telling: _Telling) -> str:
    scene = telling.scene
    if scene.boat != "none":
        telling.mention("boat")
        kind = telling.pick(("boat", "sailing boat"))
        boat = f"a {scene.boat} {kind}"
        return _side(telling, "boat_side", boat) if telling.maybe(0.6) else boat
    house, trees = f"a {scene.house} house", COUNTS.get(scene.trees, "")
    if scene.house != "none":
        telling.mention("house")
    if trees:
        telling.mention("trees")
    if scene.house != "none" and trees:
        return _pair(telling, house, trees)
    name, thing = ("house_side", house) if scene.house != "none" else ("trees_side", trees)
    return _side(telling, name, thing) if thing and telling.maybe(0.6) else thing


def _land(telling: _Telling) -> str:
    scene = telling.scene
    telling.mention("land")
    if scene.season == "none":
        return telling.pick(BARE[scene.land])
    if not telling.maybe(0.85):
        return scene.land
    telling.mention("season")
    return telling.pick(SEASONED[scene.season]).format(scene.land)


def _extras(telling: _Telling) -> list[str]:
    scene, extras = telling.scene, []
    if scene.birds == "some":
        telling.mention("birds")
        extras.append(telling.pick(BIRDS))
    if telling.maybe(0.3):
        telling.mention("clouds")
        extras.append(telling.pick(CLOUDS[scene.clouds]))
    if telling.maybe(0.3):
        body = "the moon" if scene.time == "night" else "the sun"
        extras.append(_side(telling, "light_side", body))
    return extras


def _compose(telling: _Telling, objects: str, land: str, time: str) -> str:
    """Order objects, land and time in one of several ways."""
    placed = f"{land} {time}".strip()
    if not objects:
        return placed
    joint = "on" if telling.scene.land == "sea" else "in front of"
    return telling.pick(
        (
            f"{objects} {joint} {placed}",
            f"{placed} with {objects}",
            f"{objects}, {placed}",
            f"{placed}, {objects}",
        )
    )


def _tell(scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    telling = _Telling(scene, rng)
    objects, land = _objects(telling), _land(telling)
    time = ""
    if telling.maybe(0.85):
        telling.mention("time")
        time = telling.pick(TIMES[scene.time])
    extras = _extras(telling)
    parts = [_compose(telling, objects, land, time), *extras]
    text = telling.pick(OPENINGS) + ", ".join(parts)
    return text, tuple(telling.mentions)


def words(caption: str) -> list[str]:
    """Words and commas of a caption."""
    return caption.replace(",", " ,").split()


def describe(scene: Scene, wording: int = 0) -> Scene:
    """Give the scene a caption; another `wording` gives other words for the same scene."""
    rng = np.random.default_rng([scene.seed, 2, wording])
    while True:
        caption, mentions = _tell(scene, rng)
        if len(words(caption)) <= LONGEST:
            return scene.with_caption(caption, mentions)


def describe_clip(scene: Scene, wording: int = 0) -> Scene:
    """Give the scene a caption that ends with what moves, how fast and where to."""
    motion = scene.motion
    light = "moon" if scene.time == "night" else "sun"
    mover = {"light": f"the {light} moving", "clouds": "clouds drifting", "boat": "sailing"}
    ending = f", {mover[motion.mover]} {motion.speed} to the {motion.direction}"
    room = LONGEST - len(words(ending))
    rng = np.random.default_rng([scene.seed, 3, wording])
    while True:
        caption, mentions = _tell(scene, rng)
        if len(words(caption)) <= room:
            return scene.with_caption(caption + ending, (*mentions, *MOTIONS))


def motion_of(caption: str) -> Motion | None:
    """What a caption says to move, or ``None`` where it does not end as a clip's caption does."""
    found = ENDING.fullmatch(caption.strip(" .").lower())
    if found is None:
        return None
    moves, speed, direction = found.groups()
    return Motion(mover=MOVES[moves], direction=direction, speed=speed)


def scene(seed: int, wording: int = 0) -> Scene:
    """The scene of a seed with its caption, for a picture."""
    return describe(draw(seed), wording)


def clip_scene(seed: int, wording: int = 0) -> Scene:
    """The scene of a seed with its caption, for a clip."""
    return describe_clip(draw(seed), wording)


def vocabulary() -> tuple[str, ...]:
    """Every word that the grammar can say, sorted."""
    phrases = [
        *COUNTS.values(),
        *BIRDS,
        *OPENINGS,
        "house boat sailing a the and on of with in front",
    ]
    for table in (TIMES, SEASONED, BARE, CLOUDS):
        phrases += [phrase.format("mountains hills") for many in table.values() for phrase in many]
    phrases += ["red blue yellow white", *SIDES, "sun moon moving drifting slowly fast to , ."]
    return tuple(sorted({word for phrase in phrases for word in words(phrase)}))
