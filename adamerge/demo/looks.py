"""How the zoo's pictures look: from where there is ink, [32, 32] in [0, 1], to pixels [32, 32, 3]."""

import numpy as np
import numpy.typing as npt

SIZE = 32  # pixels along each side
Pixels = npt.NDArray[np.float64]  # in [0, 1]; a mask is [32, 32], a picture [32, 32, 3]
Random = np.random.Generator


def _color(random: Random, low: float = 0.0, high: float = 1.0) -> Pixels:
    return random.uniform(low, high, 3)


def _contrast(random: Random) -> tuple[Pixels, Pixels]:
    """Two colours that differ by at least 0.45 in some channel."""
    first, second = random.uniform(size=(2, 3))
    return first, np.where(abs(first - second).max() > 0.45, second, (first + 0.5) % 1)


def _blend(mask: Pixels, ink: Pixels, ground: Pixels) -> Pixels:
    return mask[..., None] * ink + (1 - mask[..., None]) * ground


def _noise(random: Random, amount: float) -> Pixels:
    return amount * random.standard_normal((SIZE, SIZE, 1))


def plain(mask: Pixels, random: Random) -> Pixels:
    """Two flat colours."""
    return _blend(mask, *_contrast(random))


def pencil(mask: Pixels, random: Random) -> Pixels:
    """Dark on white paper."""
    return _blend(mask, np.full(3, random.uniform(0.1, 0.4)), np.full(3, random.uniform(0.85, 1))) + _noise(
        random, 0.03
    )


def facade(mask: Pixels, random: Random) -> Pixels:
    """Any two colours over a slanting light."""
    ink, ground = _contrast(random)
    slope = random.uniform(-0.25, 0.25, 2)
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    return _blend(mask, ink, ground) + (slope[0] * x + slope[1] * y)[..., None] + _noise(random, 0.05)


def newsprint(mask: Pixels, random: Random) -> Pixels:
    """Worn dark ink on yellowed paper."""
    ground = np.array([0.9, 0.84, 0.7]) * random.uniform(0.75, 1)
    worn = mask * (random.uniform(size=mask.shape) > 0.25)
    return _blend(worn, _color(random, 0, 0.25), ground) + _noise(random, 0.1)


def chalk(mask: Pixels, random: Random) -> Pixels:
    """Light and dusty on a green board."""
    board = np.array([0.1, 0.3, 0.2]) * random.uniform(0.7, 1.3)
    dusty = mask * random.uniform(0.5, 1, mask.shape) + 0.15 * random.uniform(size=mask.shape)
    return _blend(dusty, _color(random, 0.8, 1), board) + _noise(random, 0.04)


def blueprint(mask: Pixels, random: Random) -> Pixels:
    """White outlines and a grid on blue."""
    first, step = random.integers(0, 6), random.integers(5, 8)
    grid = np.zeros((SIZE, SIZE))
    grid[first::step], grid[:, first::step] = 0.5, 0.5
    edge = np.clip(abs(np.gradient(mask)[0]) + abs(np.gradient(mask)[1]), 0, 0.5) * 2  # outlines only
    return _blend(
        np.maximum(edge, grid), np.array([0.8, 0.9, 1]), np.array([0.1, 0.25, 0.6]) * random.uniform(0.7, 1.3)
    )


def sign(mask: Pixels, random: Random) -> Pixels:
    """Dark on a yellow plate in a landscape."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] - (SIZE - 1) / 2
    plate = abs(x) + abs(y) < random.uniform(18, 21)
    landscape = np.linspace(1, 0, SIZE)[:, None, None] * [0.4, 0.6, 0.9] + np.linspace(0, 1, SIZE)[
        :, None, None
    ] * _color(random, 0, 0.5)
    yellow = np.array([0.95, 0.75, 0.1]) * random.uniform(0.7, 1)
    return _blend(mask * plate, _color(random, 0, 0.2), np.where(plate[..., None], yellow, landscape))


def paint(mask: Pixels, random: Random) -> Pixels:
    """A flat colour on patches of another."""
    ink, ground = _contrast(random)
    patches = ground + 0.12 * random.standard_normal((SIZE // 4, SIZE // 4, 3))
    return _blend(mask, ink, patches.repeat(4, 0).repeat(4, 1))


def cloth(mask: Pixels, random: Random) -> Pixels:
    """Two colours, woven."""
    return _blend(mask, *_contrast(random)) * random.uniform(0.8, 1.2, (SIZE, SIZE, 1))
