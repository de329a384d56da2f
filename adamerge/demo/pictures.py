"""The zoo's pictures: eight tasks of 32 x 32 RGB images, each with a look of its own, drawn or scanned.

Scans of digits are real (scikit-learn's); letters, printed digits and symbols are glyphs of the fonts that matplotlib
ships, drawn in inks and on grounds; shapes and textures are drawn. A split is a pure function of (task, split): no two
splits share a random stream, the scans of no split stand in another, and the fonts of the test split are in no other.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from adamerge.demo import looks
from adamerge.demo.digits import SPLITS as SCAN_SPLITS
from adamerge.demo.digits import scans
from adamerge.demo.looks import SIZE, Pixels, Random
from adamerge.seeding import seed_of
from adamerge.types import InputError

_TRAINING_FONTS = ("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-BoldItalic",
                   "STIXGeneral", "STIXGeneralBolIta")  # fmt: skip
_TEST_FONTS = ("DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif-Bold", "STIXGeneralBol", "STIXGeneralItalic")


class Drawn(NamedTuple):
    """A task: what its classes are called, how one of class c is drawn, and the mask's way to a picture."""

    classes: tuple[str, ...]
    mask: Callable[[int, str, Random], Pixels]  # (class, split, random) -> [32, 32], 1 where there is ink
    look: Callable[[Pixels, Random], Pixels]


# --- what is drawn


def _glyphs(characters: str) -> Callable[[int, str, Random], Pixels]:
    def mask(index: int, split: str, random: Random) -> Pixels:
        fonts = _TEST_FONTS if split == "test" else _TRAINING_FONTS
        font = _font(fonts[random.integers(len(fonts))], int(random.integers(20, 28)))
        picture = Image.new("L", (SIZE, SIZE))
        place = tuple(SIZE / 2 + random.uniform(-2, 2, 2))
        ImageDraw.Draw(picture).text(place, characters[index], fill=255, font=font, anchor="mm")
        turned = picture.rotate(random.uniform(-12, 12), Image.Resampling.BILINEAR)
        return np.asarray(turned, dtype=np.float64) / 255

    return mask


@lru_cache(maxsize=256)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def _corners(number: int, inner: float, turn: float, stretch: float) -> list[tuple[float, float]]:
    """A regular polygon's corners, or a star's: every second one at `inner` times the radius."""
    steps = np.arange(2 * number) * np.pi / number + turn
    radius = np.where(np.arange(2 * number) % 2, inner, 1.0)
    return [
        (float(x), float(y) * stretch) for x, y in zip(radius * np.sin(steps), -radius * np.cos(steps), strict=True)
    ]


_OUTLINES: dict[str, Sequence[tuple[float, float]]] = {
    "triangle": _corners(3, 0.5, 0, 1), "square": _corners(4, 2**-0.5, np.pi / 4, 1),
    "diamond": _corners(4, 2**-0.5, 0, 1.4), "pentagon": _corners(5, 0.81, 0, 1), "star": _corners(5, 0.4, 0, 1),
    "cross": [(-1, -0.3), (-0.3, -0.3), (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1),
              (-0.3, 1), (-0.3, 0.3), (-1, 0.3)],
    "arrow": [(-1, -0.3), (0.1, -0.3), (0.1, -0.9), (1, 0), (0.1, 0.9), (0.1, 0.3), (-1, 0.3)],
}  # fmt: skip
_SHAPES = (*_OUTLINES, "disc", "ring", "crescent")


def _shape(index: int, split: str, random: Random) -> Pixels:
    name, scale = _SHAPES[index], 4  # drawn large, then reduced, for soft edges
    middle, radius = SIZE / 2 + random.uniform(-4, 4, 2), random.uniform(7, 12)
    picture = Image.new("L", (SIZE * scale, SIZE * scale))
    draw = ImageDraw.Draw(picture)

    def disc(where: npt.NDArray[np.float64], size: float, fill: int) -> None:
        draw.ellipse([*((where - size) * scale), *((where + size) * scale)], fill=fill)

    if name in _OUTLINES:
        angle = random.uniform(-0.4, 0.4)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        points = (np.array(_OUTLINES[name]) @ turn.T * radius + middle) * scale
        draw.polygon([tuple(point) for point in points], fill=255)
    else:
        disc(middle, radius, 255)
        if name == "ring":
            disc(middle, 0.6 * radius, 0)
        if name == "crescent":
            disc(middle + 0.45 * radius * random.choice([-1, 1], 2), 0.85 * radius, 0)
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64) / 255


_TEXTURES = ("horizontal stripes", "vertical stripes", "diagonal stripes", "checks", "dots", "rings", "waves", "bricks",
             "clouds", "grains")  # fmt: skip


def _texture(index: int, split: str, random: Random) -> Pixels:
    name, period = _TEXTURES[index], random.uniform(5, 10)
    y, x = np.mgrid[0:SIZE, 0:SIZE] + random.uniform(0, period, (2, 1, 1))
    lean = random.uniform(-0.15, 0.15)
    x, y = x + lean * y, y - lean * x
    wave = 2 * np.pi / period

    def soft(value: Pixels) -> Pixels:
        return np.clip(0.5 + 2 * value, 0, 1)

    if name == "clouds":
        coarse = Image.fromarray(random.uniform(0, 255, (5, 5)).astype(np.uint8))
        return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    if name == "grains":
        return (random.uniform(size=(SIZE, SIZE)) < random.uniform(0.3, 0.6)).astype(np.float64)
    if name == "bricks":
        row = np.floor(y / period * 1.6)
        return soft(0.3 - np.maximum(np.cos(wave * 1.6 * y), np.cos(wave * 0.8 * x + np.pi * row)) + 0.5)
    middle = SIZE / 2 + random.uniform(-6, 6, 2)
    return soft(
        {
            "horizontal stripes": lambda: np.sin(wave * y),
            "vertical stripes": lambda: np.sin(wave * x),
            "diagonal stripes": lambda: np.sin(wave * (x + random.choice([-1, 1]) * y) / 2**0.5),
            "checks": lambda: np.sign(np.sin(wave * x) * np.sin(wave * y)),
            "dots": lambda: np.cos(wave * x) + np.cos(wave * y) - 0.8,
            "rings": lambda: np.sin(wave * np.hypot(x - middle[0], y - middle[1])),
            "waves": lambda: np.sin(wave * y + 2.2 * np.sin(wave * x / 1.7)),
        }[name]()
    )


def _scan(index: int, split: str, random: Random) -> Pixels:
    images, labels = scans()
    held = np.arange(len(labels))[
        SCAN_SPLITS["test" if split == "test" else "unlabeled" if split == "unlabeled" else "train"]
    ]
    chosen = images[random.choice(held[labels[held] == index])]
    grown = Image.fromarray((chosen * 255).astype(np.uint8)).resize((28, 28), Image.Resampling.BICUBIC)
    return np.pad(np.asarray(grown, dtype=np.float64) / 255, 2)


# --- the tasks

_NUMBERS = "zero one two three four five six seven eight nine".split()
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi "
    "psi omega"
).split()
_CYRILLIC = dict(
    zip("БГДЖЗИЛПУФЦЧШЫЭЮЯ", "be ghe de zhe ze i el pe u ef tse che sha yery e yu ya".split(), strict=True)
)
_SYMBOLS = {"§": "section", "¶": "paragraph", "†": "dagger", "¬": "not", "×": "times", "±": "plus minus",
            "÷": "division", "∂": "partial", "°": "degree", "€": "euro", "£": "pound", "¥": "yen", "©": "copyright",
            "»": "guillemet", "•": "bullet", "¿": "question mark", "&": "ampersand", "@": "at", "#": "hash",
            "%": "percent"}  # fmt: skip

TASKS: dict[str, Drawn] = {
    "scans": Drawn(tuple(f"the digit {word}" for word in _NUMBERS), _scan, looks.pencil),
    "numbers": Drawn(tuple(f"the digit {word}" for word in _NUMBERS), _glyphs("0123456789"), looks.facade),
    "latin": Drawn(tuple(f"the letter {c}" for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
                   _glyphs("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), looks.newsprint),
    "greek": Drawn(tuple(f"the Greek letter {name}" for name in _GREEK),
                   _glyphs("αβγδεζηθικλμνξοπρστυφχψω"), looks.chalk),
    "cyrillic": Drawn(tuple(f"the Cyrillic letter {name}" for name in _CYRILLIC.values()),
                      _glyphs("".join(_CYRILLIC)), looks.blueprint),
    "symbols": Drawn(tuple(f"the symbol {name}" for name in _SYMBOLS.values()), _glyphs("".join(_SYMBOLS)), looks.sign),
    "shapes": Drawn(tuple(f"the shape {name}" for name in _SHAPES), _shape, looks.paint),
    "textures": Drawn(tuple(f"the texture {name}" for name in _TEXTURES), _texture, looks.cloth),
}  # fmt: skip


_STRANGE = 0.12  # share of the base's pictures in the look of another task


def pictures(task: str, split: str, number: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The first `number` samples of a split: pixels [N, 32, 32, 3] and labels [N], classes in equal shares.

    Args:
        task: One of `TASKS`.
        split: `train`, `unlabeled` and `test` have the task's look; `pretrain` has flat colours, or rarely the look of
            another task.
        number: N.
    """
    if task not in TASKS:
        raise InputError(f"The zoo has the tasks {', '.join(TASKS)}; asked for '{task}'.")
    drawn, random = TASKS[task], np.random.default_rng(seed_of("zoo", task, split))
    others = [other.look for other in TASKS.values() if other is not drawn]
    labels = random.permutation(np.arange(number) % len(drawn.classes))
    images = np.empty((number, SIZE, SIZE, 3), dtype=np.uint8)
    for place, label in enumerate(labels):
        look = drawn.look
        if split == "pretrain":
            look = others[random.integers(len(others))] if random.uniform() < _STRANGE else looks.plain
        images[place] = (np.clip(look(drawn.mask(int(label), split, random), random), 0, 1) * 255).astype(np.uint8)
    return images, labels
