r"""Efficient channel attention: the gate of a channel comes from the means of its k neighbours in channel order.

    s = mean_n x_n,   l_c = sum_t w_t s_(c + t - (k - 1) / 2),   out = sigmoid(l) x

Wang, Wu, Zhu, Li, Zuo, Hu, "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", CVPR 2020. arXiv:1910.03151.
The authors' code takes k as an argument and never computes it; kernel_size=None is their own reading of the paper's rule (issue 24):
truncate, then round up to odd, at least 3. Not in the paper: padding_mode="circular" (timm). shared=False is the authors' eca_ns.
The order of channels is arbitrary, so permuting the filters of the layer before changes eca, while se follows such a permutation.
B batch, C channels, N positions, k kernel_size.
"""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap
from ...ops.squeeze import position_mean
from ...parts.gates import gate_function, options_repr
from ...parts.norm import zero_init_
from ...parts.squeeze import unsqueeze_like
from ...validate import check_map, check_option


class EfficientChannelAttention(Mechanism):
    """Args:
    channels: of the map.
    kernel_size: odd number of neighbours; None computes it from channels, gamma and beta.
    gamma, beta: of the rule int(|log2(channels) + beta| / gamma), rounded up to an odd number, at least 3.
    padding_mode: beyond the first and last channel, "zeros", or "circular".
    shared: one kernel for all channels; False gives each its own.
    gate: "sigmoid" or "hard_sigmoid".
    init: "identity" starts as the identity: the last layer at zero, the gate doubled so that it is exactly one there.
    """

    card: ClassVar = Card(
        id="eca",
        layout="map",
        paper=Paper(
            title="ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
            authors="Qilong Wang, Banggu Wu, Pengfei Zhu, Peihua Li, Wangmeng Zuo, Qinghua Hu",
            venue="CVPR",
            year=2020,
            arxiv="1910.03151",
        ),
        source="BangguWu/ECANet@b332f6b (MIT)",
        summary="Scales every channel by a gate computed from the means of a few neighbouring channels.",
        when="In place of se when parameters matter: it has three to nine.",
        flops="2*B*channels*kernel_size",
        grows={"N": 0.0},
        can=frozenset({"weights", "linear", "any_dims", "permutation_equivariant", "gate", "identity_start"}),
        example={"channels": 16},
        variants=(
            {"channels": 12, "kernel_size": 5, "padding_mode": "circular", "gate": "hard_sigmoid"},
            {"channels": 9, "kernel_size": 3, "shared": False},
        ),
        place="A",
    )
    official: ClassVar = (KeyMap("BangguWu/ECANet"),)

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int | None = None,
        gamma: float = 2.0,
        beta: float = 1.0,
        padding_mode: Literal["zeros", "circular"] = "zeros",
        shared: bool = True,
        gate: Literal["sigmoid", "hard_sigmoid"] = "sigmoid",
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        require(channels > 0, "channels={} must be at least 1", channels)
        require(gamma > 0, "gamma={} must be positive", gamma)
        check_option(padding_mode, ("zeros", "circular"), "padding_mode")
        if kernel_size is None:
            size = int(abs(math.log2(channels) + beta) / gamma)
            kernel_size = max(3, size if size % 2 else size + 1)
        require(kernel_size > 0 and kernel_size % 2 == 1, "kernel_size={} must be odd and positive", kernel_size)
        wraps = padding_mode == "circular"
        require(not wraps or kernel_size // 2 <= channels, "kernel_size={} wraps around channels={} more than once", kernel_size, channels)
        self.channels, self.kernel_size, self.gamma, self.beta = channels, kernel_size, gamma, beta
        self.padding_mode, self.shared, self.init = padding_mode, shared, init
        self.gate_kind, self._gate = gate, gate_function(gate, init=init)
        groups = 1 if shared else channels
        self.conv = nn.Conv1d(groups, groups, kernel_size, groups=groups, bias=False, device=device, dtype=dtype)
        if init == "identity":
            zero_init_(self.conv)

    def forward(self, x: Float[Tensor, "b channels *space"], return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """(B, C, *space) -> the same shape, or that and the gate (B, C, 1, ...)."""
        gate = self.gate(x)
        out = x * gate
        return (out, gate) if return_weights else out

    def gate(self, x: Float[Tensor, "b channels *space"]) -> Tensor:
        """The gate alone, (B, C, 1, ...): a block can fuse it with its addition, `shortcut + x * module.gate(x)`."""
        check_map(x, self.channels, None)
        means, k = position_mean(x), self.kernel_size
        if self.padding_mode == "circular":
            means = torch.cat((means[:, self.channels - k // 2 :], means, means[:, : k // 2]), 1)
        else:
            means = F.pad(means, (k // 2, k // 2))
        # A product with a strided view: the convolution's backward over one channel is slow on a CPU.
        windows = means.unfold(1, k, 1)
        if self.shared:
            logits = torch.matmul(windows, self.conv.weight.reshape(k, 1)).squeeze(-1)
        else:
            logits = torch.bmm(windows.transpose(0, 1), self.conv.weight.mT).squeeze(-1).T
        return unsqueeze_like(self._gate(logits), x)

    def extra_repr(self) -> str:
        return options_repr(self, "channels", "kernel_size", "gamma", "beta", "padding_mode", "shared", "init")
