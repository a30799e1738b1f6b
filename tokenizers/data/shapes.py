"""Drawn pictures with captions and classes: data for text towers, probes and generators, without a download.

One or two shapes in front of a background. Item ``i`` of a split is a pure function of (seed, split, i), and a picture
is drawn at whatever size it is asked for. The class is colour and shape of the main object, the larger one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from .records import Record

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (248, 220, 60),
    "green": (50, 160, 70),
    "cyan": (70, 200, 220),
    "blue": (40, 80, 200),
    "purple": (130, 60, 180),
    "pink": (245, 130, 180),
}
GREYS = {"white": (238, 238, 238), "grey": (128, 128, 128), "black": (24, 24, 24)}  # of backgrounds only

# Radius of the circle around a shape, relative to the picture's short side.
SIZES = {"small": (0.11, 0.14), "medium": (0.18, 0.22), "large": (0.27, 0.31)}

# Where the middle of a shape may be, between the borders it would touch (0 and 1): (x, y).
PLACES = {
    "in the upper left": (0, 0),
    "at the top": (1, 0),
    "in the upper right": (2, 0),
    "on the left": (0, 1),
    "in the middle": (1, 1),
    "on the right": (2, 1),
    "in the lower left": (0, 2),
    "at the bottom": (1, 2),
    "in the lower right": (2, 2),
}
_CELLS = ((0.0, 0.1), (0.45, 0.55), (0.9, 1.0))
_MARGIN = 0.02

PHRASES = (
    "{things} on {ground}",
    "{things}, {ground}",
    "a picture of {things} on {ground}",
    "a drawing of {things}; the background is {plain_ground}",
    "on {ground}, {things}",
)


# What is inside a shape: signed distances, negative inside, for the unit circle around it ---------------------------


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.76) - 0.24


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(_circle(x, y), 0.8 - np.hypot(x - 0.5, y))


def _polygon(corners: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Distance to the nearest edge; inside where a ray to the right crosses the edges an odd number of times."""

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
        for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            dx, dy = bx - ax, by - ay
            along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
            nearest = np.minimum(nearest, (x - ax - along * dx) ** 2 + (y - ay - along * dy) ** 2)
            if dy:
                inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * dx / dy)
        return np.where(inside, -1, 1) * np.sqrt(nearest)

    return distance


def _on_circles(*radii: float, corners: int) -> np.ndarray:
    """``corners`` corners, the first one on top, at the given distances in turn from the middle."""
    turns = np.arange(corners) * 2 * math.pi / corners
    radius = np.resize(radii, corners)
    return np.stack([radius * np.sin(turns), -radius * np.cos(turns)], axis=1)


def _cross_corners(arm: float = 0.3) -> np.ndarray:
    long = math.sqrt(1 - arm**2)
    quarter = [(arm, -long), (arm, -arm), (long, -arm)]
    turned = []
    for _ in range(4):
        turned += quarter
        quarter = [(-y, x) for x, y in quarter]
    return np.array(turned)


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _polygon(np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * math.sqrt(0.5)),
    "triangle": _polygon(_on_circles(1.0, corners=3)),
    "star": _polygon(_on_circles(1.0, 0.42, corners=10)),
    "cross": _polygon(_cross_corners()),
    "ring": _ring,
    "diamond": _polygon(_on_circles(1.0, 0.55, corners=4)),
    "crescent": _crescent,
}

CLASSES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)


# A picture as data ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Thing:
    """One shape. ``place`` is where its middle is between the borders it would touch, (x, y) in [0, 1]."""

    shape: str
    colour: str
    rgb: tuple[float, float, float]
    size: str
    radius: float
    where: str
    place: tuple[float, float]
    angle: float

    def words(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {self.where}"


@dataclasses.dataclass(frozen=True)
class Ground:
    """The background: ``pattern`` from ``rgb`` to ``other``, ``period`` in short sides; ``seed`` of the noise."""

    pattern: str
    colour: str
    rgb: tuple[float, float, float]
    other: tuple[float, float, float]
    angle: float
    period: float
    seed: int

    def words(self) -> str:
        return f"{ADJECTIVES[self.pattern]} {self.colour}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """One picture: what is in it, and what is said about it."""

    ground: Ground
    things: tuple[Thing, ...]
    caption: str

    @property
    def label(self) -> int:
        """Position in `CLASSES` of the main object."""
        return CLASSES.index(f"{self.things[0].colour} {self.things[0].shape}")

    def render(self, height: int, width: int) -> np.ndarray:
        """uint8 RGB ``(height, width, 3)``. Edges are one pixel soft: coverage is read off the distance to them."""
        short = min(height, width)
        y, x = (np.mgrid[:height, :width] + 0.5) / short
        canvas = _paint_ground(self.ground, x, y, 1 / short)
        for thing in self.things:
            _paint_thing(canvas, thing, x, y, 1 / short)
        return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _paint_thing(canvas: np.ndarray, thing: Thing, x: np.ndarray, y: np.ndarray, pixel: float) -> None:
    cx, cy = _middle(thing, x.shape[1] * pixel, x.shape[0] * pixel)
    reach = thing.radius + pixel
    rows = slice(max(0, math.floor((cy - reach) / pixel)), math.ceil((cy + reach) / pixel))
    columns = slice(max(0, math.floor((cx - reach) / pixel)), math.ceil((cx + reach) / pixel))
    u, v = (x[rows, columns] - cx) / thing.radius, (y[rows, columns] - cy) / thing.radius
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    distance = SHAPES[thing.shape](cos * u + sin * v, cos * v - sin * u) * thing.radius
    cover = np.clip(0.5 - distance / pixel, 0, 1)[..., None]
    canvas[rows, columns] += cover * (np.array(thing.rgb) - canvas[rows, columns])


def _middle(thing: Thing, width: float, height: float) -> tuple[float, float]:
    border = thing.radius + _MARGIN
    return tuple(border + p * (side - 2 * border) for p, side in zip(thing.place, (width, height), strict=True))


# Share of the second colour at (x, y); ``pixel`` is the width of the soft edges.
def _plain(ground: Ground, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    return np.zeros(x.shape)


def _gradient(ground: Ground, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    along = math.cos(ground.angle) * x + math.sin(ground.angle) * y
    return (along - along.min()) / max(np.ptp(along), 1e-6)


def _wave(along: np.ndarray, period: float, pixel: float) -> np.ndarray:
    """Stripes: 0 and 1 in turn, half a period each, from the distance to the nearest edge."""
    phase = along / period % 1.0
    edge = np.where(phase < 0.5, np.minimum(phase, 0.5 - phase), -np.minimum(phase - 0.5, 1 - phase))
    return np.clip(0.5 - edge * period / pixel, 0, 1)


def _stripes(ground: Ground, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    return _wave(math.cos(ground.angle) * x + math.sin(ground.angle) * y, ground.period, pixel)


def _checks(ground: Ground, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    a, b = _wave(x, ground.period, pixel), _wave(y, ground.period, pixel)
    return a + b - 2 * a * b


def _noise(ground: Ground, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    """Random values on a lattice of ``period / 2``, linear in between: the same picture at every size."""
    u, v = x / (ground.period / 2), y / (ground.period / 2)
    rng = np.random.default_rng(ground.seed)
    # Rows and columns are drawn far enough for any shape of frame, the lattice of a square first.
    lattice = rng.random((64, 64))
    i, j = np.floor(v).astype(int), np.floor(u).astype(int)
    v, u = v - i, u - j
    i, j = i % 64, j % 64
    below, right = (i + 1) % 64, (j + 1) % 64
    top = lattice[i, j] * (1 - u) + lattice[i, right] * u
    return top * (1 - v) + (lattice[below, j] * (1 - u) + lattice[below, right] * u) * v


PATTERNS = {"plain": _plain, "gradient": _gradient, "stripes": _stripes, "checks": _checks, "noise": _noise}
ADJECTIVES = {
    "plain": "plain",
    "gradient": "shaded",
    "stripes": "striped",
    "checks": "checkered",
    "noise": "cloudy",
}


def _paint_ground(ground: Ground, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    share = PATTERNS[ground.pattern](ground, x, y, pixel)[..., None]
    return np.array(ground.rgb) * (1 - share) + np.array(ground.other) * share


# Drawing by lot ------------------------------------------------------------------------------------------------------


def draw_scene(number: int, *, seed: int = 0, held_out: bool = False) -> Scene:
    """Item ``number`` of a split. Classes take turns, so that any 64 items in a row show every class once."""
    rng = np.random.default_rng([seed, int(held_out), number])
    colour, shape = CLASSES[number % len(CLASSES)].split()
    if rng.random() < 0.5:
        main = _draw_thing(rng, shape, colour, str(rng.choice(list(SIZES))), list(PLACES))
        things = (main,)
    else:
        main = _draw_thing(rng, shape, colour, str(rng.choice(["medium", "large"])), list(PLACES))
        others = [_pick(rng, [name for name in names if name != own]) for names, own in _pairs(shape, colour)]
        places = list(PLACES)
        rng.shuffle(places)
        second = _draw_thing(rng, *others, "small", places, main)
        things = (main, second)
    ground = _draw_ground(rng, [thing.colour for thing in things])
    first, *rest = [thing.words() for thing in things]
    said = first if not rest else _pick(rng, [f"{first} and {rest[0]}", f"{first}, with {rest[0]}"])
    words = ground.words()
    phrase = PHRASES[int(rng.integers(len(PHRASES)))]
    article = "an" if words[0] in "aeiou" else "a"
    caption = phrase.format(things=said, ground=f"{article} {words} background", plain_ground=words)
    return Scene(ground, things, caption)


def _pairs(shape: str, colour: str) -> tuple[tuple[list[str], str], tuple[list[str], str]]:
    return (list(SHAPES), shape), (list(COLOURS), colour)


def _pick(rng: np.random.Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _draw_thing(
    rng: np.random.Generator, shape: str, colour: str, size: str, places: list[str], beside: Thing | None = None
) -> Thing:
    """A thing at a random one of ``places``, or at the first of them that leaves ``beside`` free (a corner does)."""
    radius = rng.uniform(*SIZES[size])
    angle = rng.uniform(-0.2, 0.2)
    rgb = _jitter(rng, COLOURS[colour])
    tries = [_pick(rng, places)] if beside is None else places
    for where in tries:
        place = tuple(float(rng.uniform(*_CELLS[cell])) for cell in PLACES[where])
        thing = Thing(shape, colour, rgb, size, radius, where, place, angle)
        # In a square: longer frames only move them apart.
        if beside is None or math.dist(_middle(thing, 1, 1), _middle(beside, 1, 1)) > radius + beside.radius:
            break
    return thing


def _draw_ground(rng: np.random.Generator, taken: list[str]) -> Ground:
    names = {**COLOURS, **GREYS}
    colour = _pick(rng, [name for name in names if name not in taken])
    # Duller than the things: half way to a grey.
    rgb = np.array(_jitter(rng, names[colour])) * 0.7 + 0.3 * 128
    pattern = _pick(rng, list(PATTERNS))
    other = rgb * (0.55 if rgb.mean() > 110 else 1.0) + (0 if rgb.mean() > 110 else 70)
    angle = rng.uniform(0, math.pi)
    period = rng.uniform(0.12, 0.3)
    seed = int(rng.integers(2**31))
    return Ground(pattern, colour, tuple(rgb.tolist()), tuple(other.tolist()), angle, period, seed)


def _jitter(rng: np.random.Generator, rgb: tuple[int, int, int]) -> tuple[float, float, float]:
    return tuple(float(value + rng.uniform(-12, 12)) for value in rgb)


class ShapesSource:
    """``items`` drawn pictures of the training split, or of the held-out one; each item is drawn when it is read."""

    kind = "image"
    has_captions = has_labels = any_size = True
    classes = CLASSES
    views = 1

    def __init__(self, items: int = 10_000, *, held_out: bool = False, seed: int = 0):
        if items < 1:
            raise ValueError(f"the number of drawn items must be at least 1, got {items}")
        self._items, self._held_out, self._seed = items, held_out, seed
        self.dropped: list[tuple[str, str]] = []
        self.description = f"{items} drawn pictures of shapes ({'held out' if held_out else 'train'})"

    def __len__(self) -> int:
        return self._items

    def name(self, index: int) -> str:
        return f"shapes/{'held_out' if self._held_out else 'train'}/{index:08d}"

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._items:
            raise IndexError(f"item {index} of {self._items}")
        scene = draw_scene(index, seed=self._seed, held_out=self._held_out)
        return Record("image", scene, self.name(index), scene.caption, scene.label)

    def manifest(self) -> Iterator[tuple[str, int]]:
        """The number at the end of the name changes with what is drawn."""
        yield f"{self.name(0)}/seed {self._seed}/1", self._items
