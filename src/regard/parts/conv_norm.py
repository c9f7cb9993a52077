"""A convolution, its norm and a ReLU: what heads and branches are made of."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .norm import Norm, check_batch_statistics, make_norm


class ConvNorm(nn.Module):
    """relu(norm(conv(x))) on maps (B, C, H, W).

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups: of the convolution.
        padding: what keeps the size at stride 1 if None.
        bias: of the convolution; None gives it one exactly where there is no norm.
        act: end with a ReLU.
        norm, momentum: see `make_norm`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool | None = None,
        act: bool = True,
        norm: Norm = "batch",
        momentum: float = 0.1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        padding = dilation * (kernel_size - 1) // 2 if padding is None else padding
        bias = norm is None if bias is None else bias
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **dd)
        self.norm = make_norm(norm, out_channels, 2, momentum=momentum, **dd)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.conv(x))

    def check(self, batch: int, channels: int, *size: int) -> None:
        """Answer in advance, before anything is updated, for a map of this shape that is too small for batch statistics."""
        conv = self.conv
        for n, k, stride, padding, dilation in zip(size, conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True):
            batch *= (n + 2 * int(padding) - dilation * (k - 1) - 1) // stride + 1
        check_batch_statistics(self.norm, batch, "a batch of one map with one position")

    def finish(self, x: Tensor) -> Tensor:
        """What follows the convolution, given its output, which may be overwritten."""
        check_batch_statistics(self.norm, x.numel() // x.shape[1], "a batch of one map with one position")
        x = self.norm(x)
        # Neither a convolution nor a BatchNorm needs its own output for its gradient; of other norms we do not know.
        return F.relu(x, inplace=isinstance(self.norm, _BatchNorm | nn.Identity)) if self.act else x
