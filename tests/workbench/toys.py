"""Small modules of a user's own, good and bad, given to the workbench as `toys:Class`."""

import os
import signal
import time

from torch import Tensor, nn


class Gate(nn.Module):
    """A squeeze-and-excitation gate."""

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((-2, -1))).sigmoid()[..., None, None]


class Fails(Gate):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("this one fails")
        return super().forward(x)


class Killed(Gate):
    """Ends its process as the kernel does when memory runs out."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class Sleeps(Gate):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            time.sleep(30)
        return super().forward(x)


class Slow(Gate):
    """A training long enough to be interrupted."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            time.sleep(0.05)
        return super().forward(x)


class Halves(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x[..., ::2]


class Looks(nn.Module):
    """Mixes all positions: not causal."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.mean(1, keepdim=True)).expand_as(x)
