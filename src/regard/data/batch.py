"""What every source of data gives: batches for training drawn by a generator, and one fixed held-out batch."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

IGNORE = -100  # a target that counts neither in the loss nor in the metric


@dataclass(frozen=True)
class Batch:
    """Examples.

    Args:
        x: (B, length) token ids or (B, channels, height, width) values.
        y: (B,), (B, length) or (B, height, width) classes, `IGNORE` where there is nothing to predict.
        key_mask: (B, length), True = a real position; None when all are.
    """

    x: Tensor
    y: Tensor
    key_mask: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def pick(self, which: Tensor | slice) -> "Batch":
        """The examples at these places."""
        return Batch(self.x[which], self.y[which], None if self.key_mask is None else self.key_mask[which])

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.x.to(device), self.y.to(device), None if self.key_mask is None else self.key_mask.to(device))


class Data(Protocol):
    """Training batches and the held-out examples of one task."""

    @property
    def test(self) -> Batch: ...

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """`size` training examples; the same generator state gives the same ones."""
        ...


@dataclass(frozen=True)
class FixedData:
    """A finite training set, drawn from with replacement, and a test set."""

    train: Batch
    test: Batch

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        return self.train.pick(torch.randint(len(self.train), (size,), generator=generator))
