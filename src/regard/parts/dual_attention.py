"""The two blocks of DANet (arXiv 1809.02983), as plain modules. They trust their inputs: the mechanisms check them.

B batch, C channels, N positions, d hidden_channels, R chosen positions.
"""

import math
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..card import Paper
from ..errors import require, require_type
from ..ops._precision import at_least_float32, full_precision
from ..ops.pairwise_affinity import affinity_weights, pairwise_attention
from ..validate import check_option
from .gates import INITS
from .linear import Linear
from .spatial import flatten_space, project_rows, unflatten_space
from .squeeze import hidden_width

DANET = Paper(
    title="Dual Attention Network for Scene Segmentation",
    authors="Jun Fu, Jing Liu, Haijie Tian, Yong Li, Yongjun Bao, Zhiwei Fang, Hanqing Lu",
    venue="CVPR",
    year=2019,
    arxiv="1809.02983",
)


class PositionBlock(nn.Module):
    """x + gamma softmax_j(s q_i . k_j) v_j summed over positions j; q, k of width d and v of width C are linear in x."""

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 8,
        hidden_channels: int | None = None,
        scale: float | None = 1.0,
        gamma_init: float = 0.0,
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(init, INITS, "init")
        require_type(scale is None or isinstance(scale, Real), "scale={!r} must be a number, or None for one over the root of the query width", scale)
        require(scale is None or math.isfinite(scale), "scale={} must be finite", scale)
        self.channels, self.reduction, self.scale, self.gamma_init, self.init = channels, reduction, scale, gamma_init, init
        self.hidden_channels = hidden_width(channels, reduction, hidden_channels)
        self._scale = self.hidden_channels**-0.5 if scale is None else scale
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query_conv, self.key_conv = (Linear(channels, self.hidden_channels, **dd) for _ in range(2))
        self.value_conv = Linear(channels, channels, **dd)
        self.gamma = nn.Parameter(torch.full((1,), 0.0 if init == "identity" else gamma_init, **dd))

    def forward(self, x: Tensor, return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, C, H, W). Weights are (B, N, N), positions in row-major order."""
        parts = self.query_conv, self.key_conv, self.value_conv
        weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
        q, k, v = project_rows(flatten_space(x), weight, bias).split((self.hidden_channels, self.hidden_channels, self.channels), 2)
        out = torch.addcmul(x, self.gamma, unflatten_space(pairwise_attention(q, k, v, scale=self._scale), x.shape[2:]))
        return (out, self.weights(x)) if return_weights else out

    def weights(self, x: Tensor, *, queries: Tensor | None = None) -> Tensor:
        """The weights of R chosen positions alone, (B, R, N); of all if None."""
        rows = flatten_space(x)
        q = project_rows(rows if queries is None else rows[:, queries], self.query_conv.weight, self.query_conv.bias)
        return affinity_weights(q, project_rows(rows, self.key_conv.weight, self.key_conv.bias), "softmax", scale=self._scale)


class ChannelBlock(nn.Module):
    """(I + gamma A) X for X (C, N), A = softmax(-X X^T) over rows, or softmax(X X^T) without `invert`."""

    def __init__(
        self,
        channels: int,
        *,
        invert: bool = True,
        gamma_init: float = 0.0,
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(init, INITS, "init")
        require(channels > 0, "channels={} must be at least 1", channels)
        self.channels, self.invert, self.gamma_init, self.init = channels, invert, gamma_init, init
        self.gamma = nn.Parameter(torch.full((1,), 0.0 if init == "identity" else gamma_init, device=device, dtype=dtype))

    def forward(self, x: Tensor, return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, C, *space). Weights are (B, C, C), computed in float32 at least: the Gram matrix leaves the range of half precision."""
        rows = x.flatten(2)
        with full_precision(x):
            wide = rows.to(at_least_float32(rows))
            gram = torch.bmm(wide, wide.mT)
            weights = (-gram if self.invert else gram).softmax(-1)
            mix = torch.eye(self.channels, device=x.device, dtype=wide.dtype) + self.gamma * weights
            out = torch.bmm(mix.to(x.dtype), rows).unflatten(2, x.shape[2:])
        return (out, weights.to(x.dtype)) if return_weights else out
