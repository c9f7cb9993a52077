"""Multi-query associative recall: key-value pairs first, then each key once more; the model must say its value. After zoology's generator.

Gaps before a repeated key follow p(i) proportional to i^(a-1) with a = 0.01, so most queries come soon and some very late.
"""

import torch
from torch import Tensor

from ..errors import require
from .batch import IGNORE, Batch, FixedData

POWER = 0.01


def mqar(length: int, *, pairs: int = 8, vocabulary: int = 64, train: int = 20_000, test: int = 1000, seed: int = 0) -> FixedData:
    """Sequences of `length` tokens: `x` (B, length), `y` (B, length) the value at each query's position and `IGNORE` elsewhere.

    Args:
        length: even, at least 4 * pairs.
        pairs: keys to remember.
        vocabulary: tokens; 0 is filler, the lower half are keys, the upper half values.
        train, test: numbers of sequences; none is in both.
        seed: of the sequences.
    """
    require(length % 2 == 0, "mqar: length={} must be even", length)
    require(pairs >= 1, "mqar: pairs={} must be at least 1", pairs)
    require(
        4 * pairs <= length,
        "mqar: pairs={} needs a length of at least {}, it is {}; use fewer pairs or a longer length",
        pairs,
        4 * pairs,
        length,
    )
    require(pairs < vocabulary // 2, "mqar: pairs={} needs more keys than vocabulary={} has ({})", pairs, vocabulary, vocabulary // 2 - 1)
    generator = torch.Generator().manual_seed(seed)
    x, y = _sequences(train + test, length, pairs, vocabulary, generator)
    _, first = torch.unique(x, dim=0, return_inverse=True)
    in_train = torch.zeros(int(first.max()) + 1, dtype=torch.bool)
    in_train[first[:train]] = True
    fresh = ~in_train[first[train:]]
    require(bool(fresh.any()), "mqar: pairs={} and vocabulary={} give too few different sequences", pairs, vocabulary)
    return FixedData(Batch(x[:train], y[:train]), Batch(x[train:][fresh], y[train:][fresh]))


def _sequences(count: int, length: int, pairs: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    half = vocabulary // 2
    keys = 1 + torch.rand(count, half - 1, generator=generator).argsort(1)[:, :pairs]
    values = half + torch.rand(count, vocabulary - half, generator=generator).argsort(1)[:, :pairs]
    x = torch.zeros(count, length, dtype=torch.long)
    y = torch.full((count, length), IGNORE)
    x[:, 0 : 2 * pairs : 2] = keys
    x[:, 1 : 2 * pairs : 2] = values
    slots = (length - 2 * pairs) // 2
    weights = torch.arange(1, slots + 1, dtype=torch.float64) ** (POWER - 1)
    gaps = torch.multinomial(weights.expand(count, slots), pairs, generator=generator)
    places = 2 * pairs + 2 * gaps
    x.scatter_(1, places, keys)
    y.scatter_(1, places, values)
    return x, y
