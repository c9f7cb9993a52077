r"""Selective kernel: convolutions of several sizes side by side, and for every sample and channel a choice between them.

    F_r = relu(BN(conv_r(x))),   s = sum_r mean_n F_r,   z = relu(BN(W_a s)),   a = softmax_r(W_b z),   out = sum_r a_r F_r

Li, Wang, Hu, Yang, "Selective Kernel Networks", CVPR 2019. arXiv:1903.06586.
The defaults are the authors' networks: the 5x5 kernel is a 3x3 one with dilation 2. pppLang/SKNet has true 5x5 kernels, biases, and neither norm nor
ReLU between W_a and W_b. With one kernel size this is a plain convolution.
B batch, C channels, R branches, H', W' the sides after the stride, N positions, d hidden_channels.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule, pointwise, rename
from ...ops.squeeze import position_mean
from ...parts.branches import branch_select, branch_weights, hidden_at_least
from ...parts.conv_norm import ConvNorm
from ...parts.gates import INITS
from ...parts.linear import Linear
from ...parts.norm import Norm, check_batch_statistics, make_norm
from ...validate import check_divisible, check_map, check_option, whole_numbers


class SelectiveKernel(Mechanism):
    """Args:
    channels, out_channels: of the input and the output; out_channels=None means channels.
    kernel_sizes: odd sides of the branches' kernels, from 3 up.
    dilated: kernels are 3x3 with the dilation that gives their side.
    groups: of the convolutions.
    reduction, min_hidden, hidden_channels: the hidden width is out_channels // reduction, at least min_hidden, or hidden_channels.
    stride, dilation: of every branch; dilation multiplies that of `dilated`.
    conv_bias, attn_bias: biases of the convolutions and of W_a, W_b; a layer before a norm that is None has one anyway.
    attn_norm: norm and ReLU between W_a and W_b.
    split_input: each branch sees its own share of the channels (timm).
    norm: "batch", None, or a callable features -> module.
    init: "identity" starts as the first branch alone, by a gain of zero.
    """

    card: ClassVar = Card(
        id="sk",
        layout="map",
        paper=Paper(
            title="Selective Kernel Networks",
            authors="Xiang Li, Wenhai Wang, Xiaolin Hu, Jian Yang",
            venue="CVPR",
            year=2019,
            arxiv="1903.06586",
        ),
        source="implus/SKNet@17dd708 (Caffe, no license file), run as timm@aa4b585 (Apache-2.0); pppLang/SKNet@ef76d8d (no license file)",
        summary="Convolves with several kernel sizes and chooses between them for every sample and channel.",
        when="Instead of a 3x3 convolution where the size of objects varies.",
        flops="2*B*ceil(H/stride)*ceil(W/stride)*branch_channels//groups*out_channels*taps + 2*B*hidden_channels*out_channels*(1 + num_branches)",
        grows={"N": 1.0},
        can=frozenset({"weights", "linear", "batch_statistics"}),
        checked_against="public",
        uncertain="The authors' Caffe networks were not run.",
        example={"channels": 16, "groups": 4, "min_hidden": 8},
        variants=(
            {"channels": 16, "dilated": False, "groups": 2, "hidden_channels": 8, "conv_bias": True, "attn_bias": True, "attn_norm": False},
            {"channels": 24, "out_channels": 8, "groups": 4, "kernel_sizes": (3, 5, 7), "split_input": True, "stride": 2, "hidden_channels": 4},
            {"channels": 8, "groups": 1, "dilation": 2, "norm": None, "init": "identity"},
        ),
        place="B",
    )

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        kernel_sizes: Sequence[int] = (3, 5),
        dilated: bool = True,
        groups: int = 32,
        reduction: int = 16,
        min_hidden: int = 32,
        hidden_channels: int | None = None,
        stride: int = 1,
        dilation: int = 1,
        conv_bias: bool = False,
        attn_bias: bool = False,
        attn_norm: bool = True,
        split_input: bool = False,
        norm: Norm = "batch",
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        kernel_sizes, out_channels = whole_numbers(kernel_sizes, "kernel_sizes"), channels if out_channels is None else out_channels
        require(all(k >= 3 and k % 2 == 1 for k in kernel_sizes), "kernel_sizes={} must be odd and at least 3", kernel_sizes)
        require(min(channels, out_channels) > 0, "channels={} and out_channels={} must be at least 1", channels, out_channels)
        require(min(stride, dilation) > 0, "stride={} and dilation={} must be at least 1", stride, dilation)
        check_option(init, INITS, "init")
        self.num_branches = len(kernel_sizes)
        if split_input:
            check_divisible(channels, self.num_branches, "channels", "len(kernel_sizes)")
        self.branch_channels = channels // self.num_branches if split_input else channels
        check_divisible(self.branch_channels, groups, "channels of a branch" if split_input else "channels", "groups")
        check_divisible(out_channels, groups, "out_channels", "groups")
        self.channels, self.out_channels, self.kernel_sizes, self.dilated, self.groups = channels, out_channels, kernel_sizes, dilated, groups
        self.reduction, self.min_hidden, self.stride, self.dilation = reduction, min_hidden, stride, dilation
        self.conv_bias, self.attn_bias, self.attn_norm = conv_bias, attn_bias, attn_norm
        self.split_input, self.norm, self.init = split_input, norm, init
        self.hidden_channels = hidden_at_least(out_channels, reduction, min_hidden, hidden_channels)
        shapes = [(3, (k - 1) // 2) if dilated else (k, 1) for k in kernel_sizes]
        self.taps = sum(k * k for k, _ in shapes)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        shared = {"stride": stride, "groups": groups, "bias": conv_bias or None, "norm": norm, **dd}
        self.branches = nn.ModuleList(ConvNorm(self.branch_channels, out_channels, k, dilation=dilation * spread, **shared) for k, spread in shapes)
        self.fc1 = Linear(out_channels, self.hidden_channels, attn_bias or (attn_norm and norm is None), **dd)
        self.hidden_norm = make_norm(norm if attn_norm else None, self.hidden_channels, 0, **dd)
        self.fc2 = Linear(self.hidden_channels, self.num_branches * out_channels, attn_bias, **dd)
        self.gain = nn.Parameter(torch.zeros(1, **dd)) if init == "identity" else None

    def key_maps(self) -> tuple[KeyMap, ...]:
        places = range(self.num_branches)

        def branches(conv: str, norm: str) -> list[Rule]:
            return [rename(f"{theirs.format(r)}.*", f"branches.{r}.{ours}.*") for r in places for theirs, ours in ((conv, "conv"), (norm, "norm"))]

        def attention(fc1: str, norm: str, fc2: str) -> list[Rule]:
            return [rename(f"{norm}.*", "hidden_norm.*"), pointwise(f"{fc1}.*", "fc1.*"), pointwise(f"{fc2}.*", "fc2.*")]

        if self.attn_norm:
            timm = (*branches("paths.{}.conv", "paths.{}.bn"), *attention("attn.fc_reduce", "attn.bn", "attn.fc_select"))
            caffe = attention("B_fc1", "B_fc1/bn", "B_fc2")
            return KeyMap("timm", timm, optional=("gain",)), KeyMap("implus/SKNet (Caffe), attention", tuple(caffe), optional=("gain",))
        heads = Rule(
            tuple(f"fcs.{r}.*" for r in places),
            ("fc2.*",),
            self._join_heads,
            lambda tensors, module: list(tensors[0].tensor_split(self.num_branches)),
        )
        pppLang = (*branches("convs.{}.0", "convs.{}.1"), rename("fc.*", "fc1.*"), heads)
        return (KeyMap("pppLang/SKNet", pppLang, optional=("gain",)),)

    def _join_heads(self, heads: list[Tensor], module: nn.Module) -> list[Tensor]:
        rows = [len(head) for head in heads]
        require(set(rows) == {self.out_channels}, "each of them has {} rows, got {}", self.out_channels, rows)
        return [torch.cat(heads)]

    def forward(self, x: Float[Tensor, "b channels h w"], return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """(B, C, H, W) -> (B, out_channels, H', W'), or that and the weights (B, R, out_channels)."""
        check_map(x, self.channels)
        check_batch_statistics(self.hidden_norm, x.shape[0], "a batch of one pooled vector")
        shares = x.tensor_split(self.num_branches, 1) if self.split_input else [x] * self.num_branches
        maps = [branch(share) for branch, share in zip(self.branches, shares, strict=True)]
        hidden = self.fc1(sum(position_mean(one) for one in maps))
        if self.attn_norm:
            hidden = F.relu(self.hidden_norm(hidden))
        logits = self.fc2(hidden).unflatten(1, (self.num_branches, self.out_channels))
        weights = branch_weights(logits, self.gain)
        out = branch_select(maps, weights)
        return (out, weights) if return_weights else out
