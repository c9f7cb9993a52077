"""Segmentation with exact masks: sprites of five shapes, filled with one photograph, pasted on another.

The photographs travel inside scikit-image; those of the test pictures are not used in training. A sprite's fill comes from the same photographs
as the backgrounds, so that neither colour nor texture tells the class, only the outline.
"""

import math
from functools import cache

import numpy as np
import torch

from ..errors import RegardError, require
from .batch import Batch, FixedData

CLASSES = ("background", "disc", "square", "triangle", "ring", "cross")
TRAIN_PHOTOS = ("astronaut", "coffee", "brick", "grass", "immunohistochemistry", "hubble_deep_field")
TEST_PHOTOS = ("cat", "rocket", "gravel", "coins")


@cache
def _photos(names: tuple[str, ...]) -> tuple[np.ndarray, ...]:
    """Photographs (height, width, 3) in 0..1."""
    try:
        from skimage import data
    except ImportError:
        raise RegardError("the photographs come with scikit-image, which is not installed; run: pip install 'regard[bench]'") from None
    pictures = [np.asarray(getattr(data, name)(), dtype=np.float32) / 255 for name in names]
    return tuple(p if p.ndim == 3 else np.repeat(p[:, :, None], 3, axis=2) for p in pictures)


def shapes(side: int, *, train: int = 2000, test: int = 200, sprites: int = 3, seed: int = 0) -> FixedData:
    """Pictures `x` (B, 3, side, side) in 0..1 and classes `y` (B, side, side), indices of `CLASSES`.

    Args:
        side: of the picture, in pixels; at least 16.
        train, test: numbers of pictures.
        sprites: on each picture, each shape equally often over all pictures.
        seed: of the pictures.
    """
    require(16 <= side <= 256, "shapes: side={} must be from 16 to 256 pixels", side)
    require(1 <= sprites <= 8, "shapes: sprites={} must be from 1 to 8", sprites)
    draw = np.random.default_rng(seed)
    return FixedData(_pictures(draw, side, train, sprites, TRAIN_PHOTOS), _pictures(draw, side, test, sprites, TEST_PHOTOS))


def _pictures(draw: np.random.Generator, side: int, count: int, sprites: int, photos: tuple[str, ...]) -> Batch:
    pictures = _photos(photos)
    x = np.empty((count, side, side, 3), dtype=np.float32)
    y = np.zeros((count, side, side), dtype=np.int64)
    kinds = np.arange(count * sprites) % (len(CLASSES) - 1)
    draw.shuffle(kinds)
    for row in range(count):
        back = int(draw.integers(len(pictures)))
        x[row] = _crop(draw, pictures[back], side)
        for kind in kinds[row * sprites : (row + 1) * sprites]:
            fill = _crop(draw, pictures[(back + int(draw.integers(1, len(pictures)))) % len(pictures)], side)
            # A shift in brightness keeps an outline visible where both photographs happen to agree.
            fill = np.clip(fill + draw.choice((-0.3, 0.3)), 0, 1)
            mask = _outline(draw, int(kind) + 1, side)
            x[row][mask] = fill[mask]
            y[row][mask] = kind + 1
    return Batch(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y))


def _crop(draw: np.random.Generator, picture: np.ndarray, side: int) -> np.ndarray:
    """A random window of 1, 2 or 3 times the side, at the picture's scale or reduced to it by taking every second or third pixel."""
    step = int(draw.integers(1, 1 + min(3, picture.shape[0] // side, picture.shape[1] // side)))
    top = int(draw.integers(picture.shape[0] - step * side + 1))
    left = int(draw.integers(picture.shape[1] - step * side + 1))
    return picture[top : top + step * side : step, left : left + step * side : step]


def _outline(draw: np.random.Generator, kind: int, side: int) -> np.ndarray:
    """(side, side) bool: a shape of random place, size and turn. All shapes cover about the same area."""
    area = side * side * draw.uniform(0.04, 0.10)
    centre = draw.uniform(0.2 * side, 0.8 * side, size=2)
    turn = draw.uniform(0, 2 * math.pi)
    rows, columns = np.mgrid[0:side, 0:side] + 0.5
    down, right = rows - centre[0], columns - centre[1]
    u = math.cos(turn) * right + math.sin(turn) * down
    v = -math.sin(turn) * right + math.cos(turn) * down
    radius = np.hypot(u, v)
    match CLASSES[kind]:
        case "disc":
            return radius <= math.sqrt(area / math.pi)
        case "square":
            return np.maximum(np.abs(u), np.abs(v)) <= math.sqrt(area) / 2
        case "triangle":
            inner = math.sqrt(area / (3 * math.sqrt(3)))
            return np.maximum(v, np.maximum(math.sqrt(3) / 2 * u - v / 2, -math.sqrt(3) / 2 * u - v / 2)) <= inner
        case "ring":
            outer = math.sqrt(area / (0.75 * math.pi))
            return (radius <= outer) & (radius >= outer / 2)
        case _:
            arm = math.sqrt(area / 5) / 2
            long, short = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
            return (long <= 3 * arm) & (short <= arm)
