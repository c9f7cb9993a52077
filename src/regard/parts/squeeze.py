"""Squeeze and excite: a map pooled into one vector per sample, and the small network that vector goes through."""

import torch
from torch import Tensor, nn

from ..errors import require
from ..ops.squeeze import position_max, position_mean
from ..validate import check_option
from .gates import activation
from .linear import Linear
from .norm import Norm, check_batch_statistics, make_norm

POOLS = ("avg", "max", "avg_max", "lp", "lse")


def pool_global(x: Tensor, kind: str) -> Tensor:
    """(B, C, *space) -> (B, C). Sums over positions are taken in at least float32.

    "avg"; "max"; "avg_max", half of each; "lp", the root of the sum of squares (its gradient at 0 is 0); "lse", the log of the sum of
    exponentials.
    """
    check_option(kind, POOLS, "pool")
    if kind == "avg":
        return position_mean(x)
    if kind == "max":
        return position_max(x)
    if kind == "avg_max":
        return 0.5 * position_mean(x) + 0.5 * position_max(x)
    wide = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
    pooled = torch.linalg.vector_norm(wide, dim=2) if kind == "lp" else wide.logsumexp(2)
    return pooled.to(x.dtype)


def hidden_width(channels: int, reduction: float, hidden_channels: int | None, least: int = 1) -> int:
    """`hidden_channels`, or channels / reduction rounded down."""
    require(channels > 0, "channels={} must be at least 1", channels)
    if hidden_channels is None:
        require(reduction > 0, "reduction={} must be positive", reduction)
        hidden = int(channels / reduction)
        hint = "channels={} with reduction={} leaves a hidden width of {}, at least {} is needed; lower reduction or set hidden_channels"
        require(hidden >= least, hint, channels, reduction, hidden, least)
        return hidden
    require(hidden_channels >= least, "hidden_channels={} must be at least {}", hidden_channels, least)
    return hidden_channels


def unsqueeze_like(vector: Tensor, x: Tensor) -> Tensor:
    """(B, C) -> (B, C, 1, ...) with as many axes as `x`."""
    return vector.reshape(*vector.shape, *[1] * (x.ndim - 2))


class BottleneckMLP(nn.Module):
    """fc2(act(norm(fc1(v)))) on vectors (B, channels): what official code writes as 1x1 convolutions on a 1x1 map.

    Args:
        channels, hidden, out_channels: widths; out_channels=None means channels.
        bias: biases of both layers.
        norm: "batch", None, or a callable features -> module, of the hidden vector.
        act: the hidden activation.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        out_channels: int | None = None,
        *,
        bias: bool = True,
        norm: Norm = None,
        act: str = "relu",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.act = act
        self._activate = activation(act)
        self.fc1 = Linear(channels, hidden, bias, device=device, dtype=dtype)
        self.norm = make_norm(norm, hidden, 0, device=device, dtype=dtype)
        self.fc2 = Linear(hidden, channels if out_channels is None else out_channels, bias, device=device, dtype=dtype)

    def forward(self, vector: Tensor) -> Tensor:
        hidden = self.fc1(vector)
        check_batch_statistics(self.norm, vector.shape[0], "a batch of one pooled vector")
        return self.fc2(self._activate(self.norm(hidden)))
