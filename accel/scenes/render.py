"""The renderer: a Scene becomes a picture `[H, W, 3]` or a clip `[F, H, W, 3]`, uint8.

Everything is drawn back to front as soft-edged masks in coordinates of [0, 1], so that a scene
is the same at every size; fractal texture adds detail up to the finest pixel.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from accel.scenes.noise import Array, Field, Line
from accel.scenes.scene import MOVERS, Scene

Colour = tuple[float, float, float]

SKIES: Final[dict[str, tuple[Colour, Colour, Colour]]] = {
    "dawn": ((0.50, 0.60, 0.86), (0.86, 0.74, 0.86), (1.00, 0.80, 0.78)),
    "noon": ((0.18, 0.46, 0.90), (0.42, 0.68, 0.96), (0.76, 0.90, 0.99)),
    "sunset": ((0.30, 0.15, 0.40), (0.84, 0.32, 0.24), (1.00, 0.66, 0.22)),
    "night": ((0.02, 0.03, 0.13), (0.06, 0.08, 0.24), (0.13, 0.17, 0.36)),
}
AMBIENT: Final[dict[str, Colour]] = {
    "dawn": (0.92, 0.82, 0.90),
    "noon": (1.00, 1.00, 1.00),
    "sunset": (0.94, 0.68, 0.54),
    "night": (0.36, 0.42, 0.64),
}
LIGHTS: Final[dict[str, Colour]] = {
    "dawn": (1.00, 0.93, 0.72),
    "noon": (1.00, 0.97, 0.62),
    "sunset": (1.00, 0.82, 0.30),
    "night": (0.95, 0.95, 0.86),
}
CLOUDS: Final[dict[str, Colour]] = {
    "dawn": (1.00, 0.90, 0.90),
    "noon": (1.00, 1.00, 1.00),
    "sunset": (0.98, 0.52, 0.42),
    "night": (0.30, 0.33, 0.46),
}
GROUNDS: Final[dict[str, Colour]] = {
    "snow": (0.92, 0.95, 1.00),
    "green": (0.34, 0.62, 0.20),
    "autumn": (0.82, 0.47, 0.12),
}
ROCKS: Final[dict[str, Colour]] = {
    "snow": (0.52, 0.55, 0.62),
    "green": (0.44, 0.50, 0.40),
    "autumn": (0.56, 0.40, 0.30),
}
PAINTS: Final[dict[str, Colour]] = {
    "red": (0.86, 0.12, 0.10),
    "blue": (0.12, 0.30, 0.88),
    "yellow": (0.98, 0.82, 0.10),
    "white": (0.96, 0.95, 0.92),
}
SAND: Final[Colour] = (0.90, 0.72, 0.42)
TIDE: Final[Colour] = (0.10, 0.42, 0.55)
SPEED: Final = {"slowly": 0.18, "fast": 0.42}
"""How far a mover goes during a clip, in picture widths."""


@dataclass(slots=True)
class _Canvas:
    """A picture in the making: pixels `[H, W, 3]` and the coordinates of its pixels."""

    pixels: Array
    x: Array
    y: Array
    rng: np.random.Generator

    @property
    def soft(self) -> float:
        """Width of an edge: one pixel."""
        return float(self.x[1] - self.x[0])

    def inside(self, distance: Array) -> Array:
        """Coverage of a shape from its signed distance (negative inside)."""
        covered: Array = np.clip(0.5 - distance / self.soft, 0.0, 1.0)
        return covered

    def paint(self, colour: Array | Colour, mask: Array) -> None:
        """Lay a colour over the pixels where the mask covers them."""
        shade = np.asarray(colour, np.float32)
        self.pixels += mask[..., None] * (shade - self.pixels)

    def polygon(self, corners: tuple[tuple[float, float], ...]) -> Array:
        """Coverage of a convex polygon, corners clockwise on the screen."""
        x, y = self.x[None, :], self.y[:, None]
        distance = np.full((len(self.y), len(self.x)), -np.inf, np.float32)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            length = float(np.hypot(x1 - x0, y1 - y0))
            side = ((x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)) / length
            distance = np.maximum(distance, side)
        return self.inside(distance)

    def disc(self, cx: float, cy: float) -> Array:
        """Distance from a point."""
        distance: Array = np.hypot(self.x[None, :] - cx, self.y[:, None] - cy).astype(np.float32)
        return distance


def _lit(colour: Array | Colour, scene: Scene, dim: float = 1.0) -> Array:
    return np.asarray(colour, np.float32) * np.asarray(AMBIENT[scene.time], np.float32) * dim


def _gradient(y: Array, colours: tuple[Colour, ...], until: float) -> Array:
    """Vertical gradient through the colours, reached at y = `until`. Shape [H, 1, 3]."""
    stops = np.linspace(0.0, until, len(colours))
    columns = [np.interp(y, stops, [colour[i] for colour in colours]) for i in range(3)]
    return np.stack(columns, -1).astype(np.float32)[:, None, :]


def _sky(canvas: _Canvas, scene: Scene) -> None:
    canvas.pixels[:] = _gradient(canvas.y, SKIES[scene.time], 0.6)
    places, brightness = canvas.rng.random((36, 2)), canvas.rng.random(36)
    if scene.time != "night":
        return
    radius = max(0.006, 0.55 * canvas.soft)
    for (cx, cy), power in zip(places, brightness, strict=True):
        glow = np.exp(-0.5 * (canvas.disc(cx, 0.5 * cy) / radius) ** 2)
        canvas.paint((1.0, 1.0, 0.92), glow * (0.35 + 0.65 * power))


def _light(canvas: _Canvas, scene: Scene, shift: float) -> tuple[float, Array]:
    """Draw sun or moon; return its x and the glow that thins the clouds before it."""
    offset, height, bite = canvas.rng.uniform(-0.05, 0.05), canvas.rng.uniform(0, 1), 0.045
    cx = (0.22 if scene.light_side == "left" else 0.78) + offset + shift
    cy = 0.13 + 0.06 * height + (0.08 if scene.time in ("dawn", "sunset") else 0.0)
    distance = canvas.disc(cx, cy)
    veil = np.exp(-((distance / 0.11) ** 4))
    if scene.time == "night":
        canvas.paint((0.30, 0.34, 0.52), 0.5 * np.exp(-((distance / 0.13) ** 2)))
        dark = canvas.disc(cx + bite, cy - 0.02)
        crescent = canvas.inside(distance - 0.085) * (1 - canvas.inside(dark - 0.07))
        canvas.paint(LIGHTS["night"], crescent)
        return cx, veil
    canvas.paint(LIGHTS[scene.time], 0.65 * np.exp(-((distance / 0.17) ** 2)))
    core = tuple(min(1.0, c + 0.12) for c in LIGHTS[scene.time])
    canvas.paint((core[0], core[1], core[2]), canvas.inside(distance - 0.085))
    return cx, veil


def _clouds(canvas: _Canvas, scene: Scene, shift: float, veil: Array) -> None:
    field, threshold = Field.draw(canvas.rng), canvas.rng.uniform(-0.05, 0.2)
    if scene.clouds == "clear":
        return
    still = field.sample(canvas.y * 1.6, canvas.x * 0.75, first=2, roughness=0.62)
    sky = (canvas.y > 0.05) & (canvas.y < 0.4)
    # A cloudy sky is visibly cloudy: two fifths of its band at least carry some cloud.
    threshold = min(threshold, float(np.quantile(still[sky], 0.6)))
    thick = field.sample(canvas.y * 1.6, (canvas.x - shift) * 0.75, first=2, roughness=0.62)
    band = np.exp(-(((canvas.y - 0.22) / 0.20) ** 2))[:, None]
    density = np.clip((thick - threshold + 0.5 * (band - 0.6)) * 1.6, 0.0, 1.0) * band
    relief = np.roll(thick, 1, axis=0) - thick
    colour = (
        np.asarray(CLOUDS[scene.time], np.float32)
        * (1 - 0.35 * np.clip(relief, -0.3, 0.6))[..., None]
    )
    canvas.paint(np.clip(colour, 0, 1), (0.95 - 0.5 * veil) * density)


def _shade(field: Field, canvas: _Canvas, scene: Scene, strength: float) -> Array:
    """Relief of a fractal surface, lit from the light's side. Shape [H, W, 1]."""
    height = field.sample(canvas.y, canvas.x, first=8, roughness=0.75)
    slope = np.diff(height, axis=1, append=height[:, :1])
    sign = 1.0 if scene.light_side == "left" else -1.0
    relief = 1.0 + strength * (0.35 * height - sign * slope)
    return np.clip(relief, 0.35, 1.5)[..., None]


def _below(canvas: _Canvas, ridge: Array) -> Array:
    return canvas.inside((ridge[None, :] - canvas.y[:, None]).astype(np.float32))


def _mountains(canvas: _Canvas, scene: Scene) -> None:
    horizon = np.asarray(SKIES[scene.time][2], np.float32)
    for base, tall, haze in ((0.50, 0.115, 0.40), (0.60, 0.080, 0.10)):
        line, field = Line.draw(canvas.rng), Field.draw(canvas.rng)
        peaks = np.abs(line.sample(canvas.x, 64, 0.48))
        ridge = base - tall * 2.4 * np.tanh(peaks * 0.6)
        relief = _shade(field, canvas, scene, 0.36)
        depth = canvas.y[:, None] - ridge[None, :]
        rock = _lit(ROCKS[scene.season], scene) * relief
        if scene.season == "snow":
            rough = 0.05 * field.sample(canvas.y, canvas.x, first=8)
            cap = np.clip((0.13 - depth + rough) / 0.03, 0, 1)[..., None]
            rock = rock + cap * (_lit((0.97, 0.98, 1.0), scene) * relief**0.5 - rock)
        else:
            foot = np.clip((depth - 0.08) / 0.12, 0, 1)[..., None] * 0.7
            rock = rock + foot * (_lit(GROUNDS[scene.season], scene, 0.8) * relief - rock)
        canvas.paint(rock + haze * (horizon - rock), _below(canvas, ridge))


def _hills(canvas: _Canvas, scene: Scene) -> None:
    horizon = np.asarray(SKIES[scene.time][2], np.float32)
    for base, tall, haze, dim in ((0.44, 0.050, 0.35, 0.95), (0.56, 0.045, 0.08, 0.78)):
        line, field = Line.draw(canvas.rng), Field.draw(canvas.rng)
        ridge = base - tall * np.clip(line.sample(canvas.x, 4, 0.5), -1.6, 1.6)
        relief = _shade(field, canvas, scene, 0.22)
        grass = _lit(GROUNDS[scene.season], scene, dim) * relief
        canvas.paint(grass + haze * (horizon - grass), _below(canvas, ridge))


def _dunes(canvas: _Canvas, scene: Scene) -> None:
    for base, tall, dim in ((0.48, 0.045, 0.97), (0.60, 0.05, 0.90), (0.76, 0.05, 1.0)):
        line, field = Line.draw(canvas.rng), Field.draw(canvas.rng)
        ridge = base - tall * np.clip(line.sample(canvas.x, 4, 0.3), -1.6, 1.6)
        slope = np.diff(ridge, append=ridge[-1:]) / canvas.soft
        sign = 1.0 if scene.light_side == "left" else -1.0
        face = np.clip(1.0 - 0.45 * sign * slope, 0.66, 1.15)[None, :, None]
        warp = field.sample(canvas.y, canvas.x, first=4, roughness=0.6)
        depth = canvas.y[:, None] - ridge[None, :]
        ripple = 1.0 + 0.07 * np.sin(95.0 * depth + 1.6 * warp) + 0.04 * warp
        canvas.paint(_lit(SAND, scene, dim) * face * ripple[..., None], _below(canvas, ridge))


def _sea(canvas: _Canvas, scene: Scene, light_x: float) -> None:
    field, top = Field.draw(canvas.rng), 0.50
    depth = np.clip((canvas.y - top) / (1 - top), 0, 1)[:, None]
    waves = field.sample(canvas.y, canvas.x * 0.5, first=16, roughness=0.9)
    waves = waves * (0.35 + 0.65 * depth)
    glass = _gradient(1 - canvas.y, SKIES[scene.time], 0.6)
    water = _lit(TIDE, scene) * (1.05 - 0.35 * depth[..., None])
    water = water + 0.35 * (1 - 0.5 * depth[..., None]) * (glass - water)
    water = water * (1 + 0.22 * waves[..., None])
    spread = 0.05 + 0.10 * depth
    path = np.exp(-(((canvas.x[None, :] - light_x) / spread) ** 2))
    glitter = path * np.clip(waves * 0.9 + 0.25, 0, 1) * (0.9 if scene.time != "noon" else 0.5)
    water = water + glitter[..., None] * (np.asarray(LIGHTS[scene.time], np.float32) - water)
    mask = np.repeat(canvas.inside((top - canvas.y)[:, None]), len(canvas.x), axis=1)
    canvas.paint(np.clip(water, 0, 1), mask)


def _ground(canvas: _Canvas, scene: Scene) -> None:
    line, field = Line.draw(canvas.rng), Field.draw(canvas.rng)
    ridge = 0.68 - 0.012 * line.sample(canvas.x, 8, 0.4)
    relief = _shade(field, canvas, scene, 0.12 if scene.season == "snow" else 0.24)
    canvas.paint(_lit(GROUNDS[scene.season], scene) * relief, _below(canvas, ridge))


def _tree(canvas: _Canvas, scene: Scene, cx: float, foot: float, scale: float) -> None:
    trunk = 0.018 * scale
    canvas.paint(
        _lit((0.34, 0.22, 0.12), scene),
        canvas.polygon(
            (
                (cx - trunk, foot - 0.09),
                (cx + trunk, foot - 0.09),
                (cx + trunk, foot),
                (cx - trunk, foot),
            )
        ),
    )
    needles = {
        "snow": (0.10, 0.30, 0.24),
        "green": (0.06, 0.30, 0.14),
        "autumn": (0.16, 0.30, 0.10),
    }
    grain = Field.draw(canvas.rng).sample(canvas.y, canvas.x, first=16, roughness=0.8)
    leaf = _lit(needles[scene.season], scene) * (1 + 0.30 * grain)[..., None]
    for tier in range(3):
        half, low = (0.072 - 0.015 * tier) * scale, foot - (0.05 + 0.085 * tier) * scale
        tip = low - 0.125 * scale
        corners = ((cx, tip), (cx + half, low), (cx - half, low))
        canvas.paint(np.clip(leaf, 0, 1), canvas.polygon(corners))
        if scene.season == "snow":
            snow = (
                (cx, tip),
                (cx + half * 0.5, tip + 0.062 * scale),
                (cx - half * 0.5, tip + 0.062 * scale),
            )
            canvas.paint(_lit((0.95, 0.97, 1.0), scene), 0.9 * canvas.polygon(snow))


def _trees(canvas: _Canvas, scene: Scene) -> None:
    jitter = canvas.rng.uniform(-1, 1, size=(3, 3))
    count = int(scene.trees)
    middle = 0.25 if scene.trees_side == "left" else 0.75
    for i in range(count):
        cx = middle + 0.16 * (i - (count - 1) / 2) + 0.01 * float(jitter[i, 0])
        foot = 0.84 + 0.02 * float(jitter[i, 1])
        _tree(canvas, scene, cx, foot, 1.0 + 0.08 * float(jitter[i, 2]))


def _house(canvas: _Canvas, scene: Scene) -> None:
    dx, dy, grow = canvas.rng.uniform(-1, 1, size=3)
    grain = Field.draw(canvas.rng).sample(canvas.y, canvas.x, first=16, roughness=0.8)[..., None]
    if scene.house == "none":
        return
    cx = (0.25 if scene.house_side == "left" else 0.75) + 0.04 * dx
    foot, half, tall = 0.86 + 0.02 * dy, 0.145 * (1 + 0.08 * grow), 0.17
    wall, roof = foot - tall, foot - tall - 0.13
    box = ((cx - half, wall), (cx + half, wall), (cx + half, foot), (cx - half, foot))
    paint = _lit(PAINTS[scene.house], scene, 1.08 if scene.time == "night" else 1.0)
    canvas.paint(np.clip(paint * (1 + 0.05 * grain), 0, 1), canvas.polygon(box))
    eave = half * 1.22
    gable = ((cx, roof), (cx + eave, wall + 0.01), (cx - eave, wall + 0.01))
    tiles = _lit((0.30, 0.22, 0.22), scene) * (1 + 0.16 * grain)
    canvas.paint(np.clip(tiles, 0, 1), canvas.polygon(gable))
    glass: Array | Colour = (
        (1.0, 0.86, 0.45) if scene.time == "night" else _lit((0.25, 0.35, 0.45), scene)
    )
    for wx, colour, top, low in (
        (cx - 0.55 * half, glass, 0.05, 0.11),
        (cx + 0.45 * half, _lit((0.26, 0.16, 0.10), scene), 0.06, tall),
    ):
        side = 0.2 * half
        hole = (
            (wx - side, wall + top),
            (wx + side, wall + top),
            (wx + side, wall + low),
            (wx - side, wall + low),
        )
        canvas.paint(colour, canvas.polygon(hole))


def _boat(canvas: _Canvas, scene: Scene, shift: float) -> None:
    dx, dy, grow = canvas.rng.uniform(-1, 1, size=3)
    if scene.boat == "none":
        return
    cx = (0.26 if scene.boat_side == "left" else 0.74) + 0.04 * dx + shift
    deck, half = 0.74 + 0.02 * dy, 0.16 * (1 + 0.06 * grow)
    keel = deck + 0.085
    hull = ((cx - half, deck), (cx + half, deck), (cx + 0.7 * half, keel), (cx - 0.7 * half, keel))
    canvas.paint(
        _lit((0.02, 0.05, 0.08), scene), 0.35 * canvas.inside(_ellipse(canvas, cx, keel, half))
    )
    canvas.paint(_lit(PAINTS[scene.boat], scene, 1.1), canvas.polygon(hull))
    top = deck - 0.30
    mast = ((cx - 0.008, top), (cx + 0.008, top), (cx + 0.008, deck), (cx - 0.008, deck))
    main = ((cx + 0.015, top), (cx + 0.85 * half, deck - 0.03), (cx + 0.015, deck - 0.03))
    jib = ((cx - 0.015, top + 0.05), (cx - 0.015, deck - 0.03), (cx - 0.7 * half, deck - 0.03))
    for shape, colour in (
        (mast, (0.3, 0.2, 0.1)),
        (main, (0.96, 0.93, 0.84)),
        (jib, (0.86, 0.82, 0.72)),
    ):
        canvas.paint(_lit(colour, scene), canvas.polygon(shape))


def _ellipse(canvas: _Canvas, cx: float, cy: float, half: float) -> Array:
    flat = np.hypot(canvas.x[None, :] - cx, 4 * (canvas.y[:, None] - cy))
    distance: Array = (flat - half).astype(np.float32)
    return distance


def _birds(canvas: _Canvas, scene: Scene) -> None:
    places = canvas.rng.uniform(-1, 1, size=(3, 3))
    if scene.birds == "none":
        return
    ink = (0.10, 0.09, 0.12) if scene.time != "night" else (0.72, 0.74, 0.80)
    for i, (dx, dy, grow) in enumerate(places):
        cx, cy = 0.5 + 0.15 * (i - 1) + 0.03 * dx, 0.30 + 0.05 * dy - 0.06 * (i == 1)
        span = 0.058 * (1 + 0.12 * grow)
        out = np.abs(canvas.x[None, :] - cx)
        wing = cy - 0.03 * np.sin(np.clip(out / span, 0, 1) * 2.2)
        thick = 0.014 * (1 - 0.5 * out / span)
        stroke = np.abs(canvas.y[:, None] - wing) - thick
        shape = np.maximum(stroke, out - span).astype(np.float32)
        canvas.paint(ink, canvas.inside(shape))


def _frame(scene: Scene, size: int, time: float) -> Array:
    """One picture at `time` in [0, 1] of the clip; every draw is seeded by its layer."""
    centres = ((np.arange(size) + 0.5) / size).astype(np.float32)
    canvas = _Canvas(np.zeros((size, size, 3), np.float32), centres, centres, _layer(scene, 0))
    sign = 1.0 if scene.motion.direction == "right" else -1.0
    way = SPEED[scene.motion.speed] * sign * (time - 0.5)
    moved = {mover: way if scene.motion.mover == mover else 0.0 for mover in MOVERS}
    _sky(canvas, scene)
    canvas.rng = _layer(scene, 1)
    light_x, veil = _light(canvas, scene, moved["light"])
    canvas.rng = _layer(scene, 2)
    _clouds(canvas, scene, moved["clouds"], veil)
    canvas.rng = _layer(scene, 3)
    if scene.land == "sea":
        _sea(canvas, scene, light_x)
    else:
        {"mountains": _mountains, "hills": _hills, "dunes": _dunes}[scene.land](canvas, scene)
    if scene.season != "none":
        _ground(canvas, scene)
    for layer, things in enumerate((_house, _trees, _birds), start=4):
        canvas.rng = _layer(scene, layer)
        things(canvas, scene)
    canvas.rng = _layer(scene, 7)
    _boat(canvas, scene, moved["boat"])
    return canvas.pixels


def _layer(scene: Scene, layer: int) -> np.random.Generator:
    return np.random.default_rng([scene.seed, 100 + layer])


def picture(scene: Scene, size: int = 128, time: float = 0.5) -> np.ndarray:
    """Render the scene as `[size, size, 3]` uint8; `time` in [0, 1] picks a clip's moment.

    A picture is the middle of its clip, so that what moves stays in sight.
    """
    pixels = np.clip(_frame(scene, size, time), 0.0, 1.0)
    return (pixels * 255 + 0.5).astype(np.uint8)


def clip(scene: Scene, size: int = 64, frames: int = 17) -> np.ndarray:
    """Render the scene as a clip `[frames, size, size, 3]` uint8."""
    times = np.linspace(0.0, 1.0, frames)
    return np.stack([picture(scene, size, float(time)) for time in times])
