"""The little statistics a comparison needs: a mean with its Student interval, a growth exponent, a crossover."""

import math
from collections.abc import Mapping, Sequence
from functools import cache

from .summary import Estimate


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and half-width of the 95 % interval of the mean, by Student's t; no interval from a single value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, tuple(values))
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, t_quantile(count - 1) * math.sqrt(variance / count), tuple(values))


@cache
def t_quantile(freedom: int, level: float = 0.95) -> float:
    """The t beyond which, on both sides together, Student's distribution with `freedom` degrees has 1 - level."""
    low, high = 0.0, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, freedom) < level else (low, middle)
    return high


def _t_inside(t: float, freedom: int) -> float:
    """P(-t < T < t), the finite sums for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term, total = (cosine, cosine if freedom > 1 else 0.0) if odd else (1.0, 1.0)
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def growth(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """The exponent b of value = a * length^b, least squares on log axes; None with fewer than two usable points."""
    points = [(math.log(n), math.log(v)) for n, v in zip(lengths, values, strict=True) if math.isfinite(v) and v > 0]
    if len({x for x, _ in points}) < 2:
        return None
    centre = math.fsum(x for x, _ in points) / len(points)
    return math.fsum((x - centre) * y for x, y in points) / math.fsum((x - centre) ** 2 for x, _ in points)


def crossover(mine: Mapping[int, float], reference: Mapping[int, float]) -> int | None:
    """The shortest length from which on `mine` stays below `reference` at every measured length; None if there is none."""
    found = None
    for length in sorted(set(mine) & set(reference), reverse=True):
        if not mine[length] < reference[length]:
            break
        found = length
    return found
