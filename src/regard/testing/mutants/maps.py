"""Faults in map modules."""

import torch
from torch import Tensor, nn

from ._base import Gate


class NormalisesAPooledVector(Gate):
    fails = "batch_of_one_in_training"

    def __init__(self, channels: int, reduction: int = 2) -> None:
        super().__init__(channels, reduction)
        self.norm = nn.BatchNorm1d(channels)

    def squeeze(self, x: Tensor) -> Tensor:
        return self.norm(super().squeeze(x))


class StartsWithAGain(Gate):
    fails = "starts_as_identity"

    def __init__(self, channels: int, reduction: int = 2) -> None:
        super().__init__(channels, reduction)
        nn.init.constant_(self.gain, 0.1)


class GateIsAnotherGate(Gate):
    fails = "gate_alone_equals_the_module"

    def gate(self, x: Tensor) -> Tensor:
        return super().gate(x).sigmoid()


class ReadsMemoryOrder(Gate):
    fails = "channels_last_is_the_same"

    def squeeze(self, x: Tensor) -> Tensor:
        if x.is_contiguous():
            return super().squeeze(x)
        return torch.as_strided(x, x.shape, (x[0].numel(), x[0, 0].numel(), x.shape[3], 1)).mean((2, 3))
