r"""Convolutional block attention: a gate per channel, then a gate per position, each from average and maximum.

    g = sigmoid(sum_p MLP(pool_p x)),   u = g x,   s = sigmoid(BN(conv([max_c u; mean_c u]))),   out = s u

Woo, Park, Lee, Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018. arXiv:1807.06521.
The norm after the convolution is in the authors' code (momentum 0.01), not in the paper's equation. Equal maxima share the gradient evenly.
B batch, C channels, H, W sides, N = H W positions, h hidden_channels, k kernel_size.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule, pointwise, rename
from ...ops.plane_conv import plane_conv
from ...ops.squeeze import channel_max, channel_mean
from ...parts.gates import gate_function
from ...parts.norm import Norm, check_batch_statistics, make_norm, zero_init_
from ...parts.squeeze import BottleneckMLP, hidden_width, pool_global, unsqueeze_like
from ...validate import check_map, check_option


def _swap(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
    return [tensors[0].flip(1)]


class ConvolutionalBlockAttention(Mechanism):
    """Args:
    channels: of the map.
    reduction, hidden_channels: the MLP's hidden width is channels // reduction, or hidden_channels.
    pools: how channels are summed up; any of "avg", "max", "lp" (root of the sum of squares), "lse" (log of the sum of exponentials).
    kernel_size: odd side of the convolution of the spatial gate.
    spatial: False leaves the spatial gate out.
    bias: biases of the MLP.
    spatial_norm: "batch", None (the convolution then has a bias), or a callable features -> module.
    zero_init: start the spatial gate at one half everywhere, as the authors' networks do.
    init: "identity" starts as the identity: both last layers at zero, both gates doubled so that they are exactly one there.
    """

    card: ClassVar = Card(
        id="cbam",
        layout="map",
        paper=Paper(
            title="CBAM: Convolutional Block Attention Module",
            authors="Sanghyun Woo, Jongchan Park, Joon-Young Lee, In So Kweon",
            venue="ECCV",
            year=2018,
            arxiv="1807.06521",
        ),
        source="Jongchan/attention-module@459efad (MIT)",
        summary="Scales every channel, then every position, by gates computed from averages and maxima.",
        when="Detection and small data, where the place matters as well as the kind of feature.",
        flops="4*num_pools*B*channels*hidden_channels + (4*B*(H + kernel_size - 1)*W*kernel_size**2 if spatial else 0)",
        grows={"N": 1.0},
        can=frozenset({"weights", "linear", "gate", "identity_start"}),
        example={"channels": 16, "reduction": 4},
        variants=(
            {"channels": 12, "hidden_channels": 5, "pools": ("avg", "max", "lp", "lse"), "kernel_size": 3, "bias": False},
            {"channels": 8, "reduction": 2, "pools": ("max",), "spatial_norm": None},
        ),
        returns=("out", "weights_channel", "weights_spatial"),
        place="A",
    )
    official: ClassVar = (
        KeyMap(
            "Jongchan/attention-module",
            (
                rename("ChannelGate.mlp.1.*", "mlp.fc1.*"),
                rename("ChannelGate.mlp.3.*", "mlp.fc2.*"),
                rename("SpatialGate.spatial.conv.*", "conv.*"),
                rename("SpatialGate.spatial.bn.*", "norm.*"),
            ),
        ),
        # timm stacks (mean, max) where the authors stack (max, mean).
        KeyMap(
            "timm",
            (
                pointwise("channel.fc1.*", "mlp.fc1.*"),
                pointwise("channel.fc2.*", "mlp.fc2.*"),
                Rule(("spatial.conv.conv.weight",), ("conv.weight",), _swap, _swap),
                rename("spatial.conv.conv.bias", "conv.bias"),
                rename("spatial.conv.bn.*", "norm.*"),
            ),
        ),
    )

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        hidden_channels: int | None = None,
        pools: Sequence[str] = ("avg", "max"),
        kernel_size: int = 7,
        spatial: bool = True,
        bias: bool = True,
        spatial_norm: Norm = "batch",
        zero_init: bool = False,
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        pools = (pools,) if isinstance(pools, str) else tuple(pools)
        require(len(pools) > 0, "pools={} must name at least one of avg, max, lp, lse", pools)
        for pool in pools:
            check_option(pool, ("avg", "max", "lp", "lse"), "pools")
        require(kernel_size > 0 and kernel_size % 2 == 1, "kernel_size={} must be odd and positive", kernel_size)
        self.channels, self.reduction, self.pools, self.num_pools, self.kernel_size = channels, reduction, pools, len(pools), kernel_size
        self.spatial, self.bias, self.spatial_norm, self.zero_init, self.init = spatial, bias, spatial_norm, zero_init, init
        self._gate = gate_function("sigmoid", init=init)
        self.hidden_channels = hidden_width(channels, reduction, hidden_channels)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mlp = BottleneckMLP(channels, self.hidden_channels, bias=bias, **dd)
        if init == "identity":
            zero_init_(self.mlp.fc2)
        if spatial:
            self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=spatial_norm is None, **dd)
            self.norm = make_norm(spatial_norm, 1, 2, momentum=0.01, **dd)
            if zero_init or init == "identity":
                zero_init_(self.conv if spatial_norm is None else self.norm)

    def forward(self, x: Float[Tensor, "b channels h w"], return_weights: bool = False) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor | None]]:
        """(B, C, H, W) -> the same, or that and the gates (B, C, 1, 1) and (B, 1, H, W), None without a spatial gate."""
        channel, gated, spatial = self._gates(x)
        if spatial is None:
            out = gated
        elif gated.requires_grad or spatial.requires_grad:
            out = gated * spatial
        else:  # nothing else holds this map
            out = gated.mul_(spatial)
        return (out, (channel, spatial)) if return_weights else out

    def gate(self, x: Float[Tensor, "b channels h w"]) -> Tensor:
        """The product of both gates, (B, C, H, W), or the channel gate alone, (B, C, 1, 1), without a spatial one."""
        channel, _, spatial = self._gates(x)
        return channel if spatial is None else channel * spatial

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        check_map(x, self.channels)
        if self.spatial:
            check_batch_statistics(self.norm, x.shape[0] * x.shape[2] * x.shape[3], "one position of one sample", "spatial_norm")
        pooled = torch.stack([pool_global(x, pool) for pool in self.pools])
        channel = unsqueeze_like(self._gate(self.mlp(pooled).sum(0)), x)
        gated = x * channel
        if not self.spatial:
            return channel, gated, None
        planes = torch.cat((channel_max(gated), channel_mean(gated)), 1)
        return channel, gated, self._gate(self.norm(plane_conv(planes, self.conv.weight, self.conv.bias)))
