"""Cutting (samples, positions, width) into chunks that are worked through together; shared by the block forms."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .. import _dispatch


@dataclass(frozen=True)
class Group:
    """Chunks of `length` positions: those positions of those samples."""

    samples: slice
    tokens: slice
    length: int

    def take(self, x: Tensor) -> Tensor:
        """(B, N, w) -> (chunks, length, w)."""
        return x[self.samples, self.tokens].reshape(-1, self.length, x.shape[-1])

    def put(self, x: Tensor, part: Tensor) -> None:
        mine = x[self.samples, self.tokens]
        mine.copy_(part.reshape(mine.shape))

    def add(self, x: Tensor, part: Tensor) -> None:
        mine = x[self.samples, self.tokens]
        mine.add_(part.reshape(mine.shape))

    def per_sample(self, x: Tensor) -> Tensor:
        """(chunks, ...) -> (samples, chunks of each, ...)."""
        return x.unflatten(0, (-1, (self.tokens.stop - self.tokens.start) // self.length))


CPU_LIMIT = 1 << 20  # numbers in a temporary: 4 MB of float32 stay in the cache


def limit_of(x: Tensor) -> int:
    return CPU_LIMIT if _dispatch.on_cpu(x) else 1 << 26


def groups(b: int, n: int, length: int, cost: int, limit: int) -> Iterator[Group]:
    """All of (b, n), the positions of each sample in order, the last chunk shorter if need be; `cost` numbers go with a chunk."""
    whole, together = n - n % length, max(1, limit // cost)
    for start, stop, size in ((0, whole, length), (whole, n, n - whole)):
        count = (stop - start) // max(size, 1)
        samples = max(1, together // max(count, 1))
        for i in range(0, b if count else 0, samples):
            for first in range(start, stop, min(together, count) * size):
                yield Group(slice(i, min(i + samples, b)), slice(first, min(first + together * size, stop)), size)
