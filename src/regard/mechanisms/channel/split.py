r"""Split attention: one grouped convolution makes several equal branches, and every sample and channel chooses between them.

    u = relu(BN(conv(x))),   s = sum_r mean_n u_r,   h = relu(BN(W1 s + b1)),   a = softmax_r(W2 h + b2),   out = sum_r a_r u_r

Zhang, Wu, Zhang, Zhu, Lin, Zhang, Sun, He, Mueller, Manmatha, Li, Smola, "ResNeSt: Split-Attention Networks", CVPR Workshops 2022. arXiv:2004.08955.
W1 and W2 are grouped by K. As in the authors' code u is radix-major, channel r Co + k Co/K + c, and W2's output cardinality-major,
k R Co/K + r Co/K + c. With one branch the softmax is a sigmoid: an SE gate.
B batch, C channels, Co out_channels, R radix, K groups, H', W' the sides after the stride, N positions, h hidden_channels.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, pointwise, rename
from ...ops.branch_sum import branch_sum
from ...ops.squeeze import position_mean
from ...parts.branches import branch_weights, hidden_at_least, start_from_first
from ...parts.conv_norm import ConvNorm
from ...parts.gates import INITS
from ...parts.linear import Linear
from ...parts.norm import Norm, check_batch_statistics, make_norm
from ...validate import check_divisible, check_map, check_option


class SplitAttention(Mechanism):
    """Args:
    channels, out_channels: of the input and the output; out_channels=None means channels.
    kernel_size, stride, dilation: of the convolution.
    padding: of the convolution; None keeps the size at stride 1, for an odd kernel_size.
    groups: cardinal groups K, each choosing from its own channels; the convolution has groups * radix.
    radix: branches.
    reduction, min_hidden, hidden_channels: the hidden width is channels * radix // reduction, at least min_hidden, or hidden_channels.
    bias: of the convolution; the other two layers always have one.
    norm: "batch", None, or a callable features -> module.
    init: "identity" starts as the first branch alone (radix 1: without its gate), by a gain of zero.
    """

    card: ClassVar = Card(
        id="split",
        layout="map",
        paper=Paper(
            title="ResNeSt: Split-Attention Networks",
            authors="Hang Zhang, Chongruo Wu, Zhongyue Zhang, Yi Zhu, Haibin Lin, Zhi Zhang, Yue Sun, Tong He, Jonas Mueller, R. Manmatha, Mu Li, "
            "Alexander Smola",
            venue="CVPR Workshops",
            year=2022,
            arxiv="2004.08955",
        ),
        source="zhanghang1989/ResNeSt@1dfb3e8 (Apache-2.0)",
        summary="Splits a grouped convolution into branches and chooses between them for every sample and channel.",
        when="Instead of the 3x3 convolution of a bottleneck, at about its cost, from standard operators alone.",
        flops="2*B*((H + 2*pad - dilation*(kernel_size - 1) - 1)//stride + 1)*((W + 2*pad - dilation*(kernel_size - 1) - 1)//stride + 1)"
        "*channels//groups*out_channels*kernel_size**2 + 2*B*hidden_channels*out_channels//groups*(1 + radix)",
        grows={"N": 1.0},
        can=frozenset({"weights", "linear", "batch_statistics"}),
        example={"channels": 16, "min_hidden": 8},
        variants=(
            {"channels": 16, "out_channels": 24, "groups": 2, "stride": 2, "hidden_channels": 6, "bias": True},
            {"channels": 18, "radix": 3, "groups": 3, "kernel_size": 5, "hidden_channels": 6, "norm": None, "init": "identity"},
            {"channels": 8, "radix": 1, "dilation": 2, "padding": 1, "hidden_channels": 4},
        ),
        place="B",
    )
    official: ClassVar = (
        KeyMap(
            "zhanghang1989/ResNeSt, timm",
            (
                rename("conv.*", "branches.conv.*"),
                rename("bn0.*", "branches.norm.*"),
                pointwise("fc1.*", "fc1.*"),
                rename("bn1.*", "hidden_norm.*"),
                pointwise("fc2.*", "fc2.*"),
            ),
            optional=("gain",),
        ),
    )

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        radix: int = 2,
        reduction: int = 4,
        min_hidden: int = 32,
        hidden_channels: int | None = None,
        bias: bool = False,
        norm: Norm = "batch",
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        require(min(channels, out_channels) > 0, "channels={} and out_channels={} must be at least 1", channels, out_channels)
        require(min(kernel_size, stride, dilation) > 0, "kernel_size={}, stride={}, dilation={}: at least 1 each", kernel_size, stride, dilation)
        hint = "kernel_size={} is even and no padding keeps the size; give padding, or an odd kernel_size"
        require(padding is not None or kernel_size % 2 == 1, hint, kernel_size)
        require(padding is None or padding >= 0, "padding={} must not be negative", padding)
        require(radix > 0, "radix={} must be at least 1", radix)
        check_divisible(channels, groups * radix, "channels", "groups * radix")
        check_divisible(out_channels, groups, "out_channels", "groups")
        check_option(init, INITS, "init")
        self.channels, self.out_channels, self.kernel_size, self.stride, self.padding = channels, out_channels, kernel_size, stride, padding
        self.dilation, self.groups, self.radix, self.reduction, self.min_hidden = dilation, groups, radix, reduction, min_hidden
        self.bias, self.norm, self.init = bias, norm, init
        self.hidden_channels = hidden_at_least(channels * radix, reduction, min_hidden, hidden_channels)
        check_divisible(self.hidden_channels, groups, "hidden_channels", "groups")
        self.pad = dilation * (kernel_size - 1) // 2 if padding is None else padding
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.branches = ConvNorm(
            channels,
            radix * out_channels,
            kernel_size,
            stride=stride,
            padding=self.pad,
            dilation=dilation,
            groups=groups * radix,
            bias=bias,
            norm=norm,
            **dd,
        )
        self.fc1 = Linear(out_channels // groups, self.hidden_channels, **dd)
        self.hidden_norm = make_norm(norm, self.hidden_channels, 0, **dd)
        self.fc2 = Linear(self.hidden_channels // groups, radix * out_channels, **dd)
        self.gain = nn.Parameter(torch.zeros(1, **dd)) if init == "identity" else None

    def forward(self, x: Float[Tensor, "b channels h w"], return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """(B, C, H, W) -> (B, Co, H', W'), or that and the weights (B, R, Co)."""
        check_map(x, self.channels)
        span = self.dilation * (self.kernel_size - 1) + 1
        hint = "a map of size {} with padding={} is smaller than the kernel, which spans {}"
        require(min(x.shape[2:]) + 2 * self.pad >= span, hint, tuple(x.shape[2:]), self.pad, span)
        check_batch_statistics(self.hidden_norm, x.shape[0], "a batch of one pooled vector")
        u = self.branches(x)
        pooled = position_mean(u).unflatten(1, (self.radix, self.out_channels)).sum(1)
        weights = self._weights(F.relu(self.hidden_norm(grouped_linear(pooled, self.fc1, self.groups))))
        out = branch_sum(u, weights)
        return (out, weights) if return_weights else out

    def _weights(self, hidden: Tensor) -> Tensor:
        logits = grouped_linear(hidden, self.fc2, self.groups)
        by_radix = logits.unflatten(1, (self.groups, self.radix, -1)).transpose(1, 2).flatten(2)
        return start_from_first(by_radix.sigmoid(), self.gain) if self.radix == 1 else branch_weights(by_radix, self.gain)


def grouped_linear(v: Tensor, linear: nn.Linear, groups: int) -> Tensor:
    """A grouped 1x1 convolution of vectors (B, groups * in) as one batched product: `linear.weight` is (groups * out, in)."""
    if groups == 1:
        return linear(v)
    weight = linear.weight.unflatten(0, (groups, -1))
    return torch.baddbmm(linear.bias.view(groups, 1, -1), v.unflatten(1, (groups, -1)).transpose(0, 1), weight.mT).transpose(0, 1).flatten(1)
