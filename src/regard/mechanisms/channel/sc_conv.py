r"""Self-calibrated convolution: a convolution of the shrunken map says where to trust the convolution of the full one.

    g = sigmoid(x + up(BN(conv2(avgpool_r(x))))),   y = g BN(conv3(x)),   out = BN(conv4(y))

Liu, Hou, Cheng, Wang, Feng, "Improving Convolutional Networks with Self-Calibrated Convolutions", CVPR 2020.
The paper says that up is bilinear; we follow the authors' code, where it is nearest (`up_mode`). Rows and columns beyond the last whole window
of r are not pooled. Input and output have the same width, because x stands inside the sigmoid. No activation at the end.
`two_path` is the paper's whole layer: a plain convolution of the first half of the channels, this of the second.
B batch, C channels, H', W' the sides after the stride.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule, rename
from ...parts.conv_norm import ConvNorm
from ...parts.gates import INITS
from ...parts.norm import Norm
from ...validate import check_divisible, check_map, check_option


def _names(prefix: str, *layers: tuple[str, int]) -> tuple[Rule, ...]:
    """The authors' layers are sequences whose convolution stands at a place of its own and the norm after it."""
    pairs = [(name, at + i, part) for name, at in layers for i, part in enumerate(("conv", "norm"))]
    return tuple(rename(f"{prefix}{name}.{at}.*", f"{name}.{part}.*") for name, at, part in pairs)


_CALIBRATED = (("k2", 1), ("k3", 0), ("k4", 0))


class SelfCalibratedConvolution(Mechanism):
    """Args:
    channels: of the input and the output.
    pooling_r: side of the pooling windows; 1 pools nothing. Maps must be at least this large.
    stride: of the last convolution.
    padding, dilation, groups: of all convolutions; padding must equal dilation, which None gives.
    two_path: calibrate the second half of the channels and convolve the first plainly.
    up_mode: "nearest" (code) or "bilinear" (paper).
    norm: "batch", None, or a callable features -> module.
    init: "identity" starts without calibration, by a gain of zero on the gate less one.
    """

    card: ClassVar = Card(
        id="sc_conv",
        layout="map",
        paper=Paper(
            title="Improving Convolutional Networks with Self-Calibrated Convolutions",
            authors="Jiang-Jiang Liu, Qibin Hou, Ming-Ming Cheng, Changhu Wang, Jiashi Feng",
            venue="CVPR",
            year=2020,
        ),
        source="backseason/SCNet@c0b5bd6 (MIT)",
        summary="Gates a convolution by the input plus a convolution of the shrunken map.",
        when="Instead of a 3x3 convolution, for a larger field of view with two_path at no more parameters.",
        flops="18*B*width//groups*width*((H//pooling_r)*(W//pooling_r) + H*W + (1 + two_path)*ceil(H/stride)*ceil(W/stride))",
        grows={"N": 1.0},
        can=frozenset({"weights", "linear", "batch_statistics"}),
        uncertain="The paper's bilinear upsampling was not run by the authors' code.",
        example={"channels": 16, "pooling_r": 1},
        variants=(
            {"channels": 8},
            {"channels": 16, "pooling_r": 2, "groups": 4, "stride": 2, "up_mode": "bilinear"},
            {"channels": 16, "pooling_r": 3, "dilation": 2, "two_path": True, "norm": None, "init": "identity"},
        ),
        place="B",
    )
    official: ClassVar = (
        KeyMap("backseason/SCNet SCConv", _names("", *_CALIBRATED), optional=("gain",)),
        KeyMap("backseason/SCNet SCBottleneck", (*_names("", ("k1", 0)), *_names("scconv.", *_CALIBRATED)), optional=("gain",)),
    )

    def __init__(
        self,
        channels: int,
        *,
        pooling_r: int = 4,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        two_path: bool = False,
        up_mode: Literal["nearest", "bilinear"] = "nearest",
        norm: Norm = "batch",
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        require(channels > 0, "channels={} must be at least 1", channels)
        require(min(pooling_r, stride, dilation) > 0, "pooling_r={}, stride={}, dilation={}: at least 1 each", pooling_r, stride, dilation)
        hint = "padding={} changes the size of the map, and the gate no longer fits it; with dilation={} leave it None"
        require(padding in (None, dilation), hint, padding, dilation)
        check_option(up_mode, ("nearest", "bilinear"), "up_mode")
        check_option(init, INITS, "init")
        if two_path:
            check_divisible(channels, 2, "channels", "the number of paths")
        self.width = channels // 2 if two_path else channels
        check_divisible(self.width, groups, "half the channels" if two_path else "channels", "groups")
        self.channels, self.pooling_r, self.stride, self.padding, self.dilation = channels, pooling_r, stride, padding, dilation
        self.groups, self.two_path, self.up_mode, self.norm, self.init = groups, two_path, up_mode, norm, init
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def layer(stride: int = 1) -> ConvNorm:
            return ConvNorm(self.width, self.width, 3, stride=stride, dilation=dilation, groups=groups, act=False, norm=norm, **dd)

        self.k1 = layer(stride) if two_path else None
        self.k2, self.k3, self.k4 = layer(), layer(), layer(stride)
        self.gain = nn.Parameter(torch.zeros(1, **dd)) if init == "identity" else None

    def key_maps(self) -> tuple[KeyMap, ...]:
        return self.official[self.two_path :][:1]

    def forward(self, x: Float[Tensor, "b channels h w"], return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """(B, C, H, W) -> (B, C, H', W'), or that and the gate (B, C, H, W), of the second half of the channels with two_path."""
        check_map(x, self.channels)
        hint = "a map of size {} is smaller than pooling_r={}; use larger maps or a smaller pooling_r"
        require(min(x.shape[2:]) >= self.pooling_r, hint, tuple(x.shape[2:]), self.pooling_r)
        b, (h, w), r = x.shape[0], x.shape[2:], self.pooling_r
        for layer, size in ((self.k2, (h // r, w // r)), (self.k3, (h, w)), (self.k4, (h, w))):
            layer.check(b, x.shape[1], *size)
        plain, x = x.tensor_split(2, 1) if self.k1 is not None else (None, x)
        gate = self._gate(x)
        out = self.k4(self.k3(x) * (gate if self.gain is None else 1 + self.gain * (gate - 1)))
        if self.k1 is not None:
            out = torch.cat((self.k1(plain), out), 1)
        return (out, gate) if return_weights else out

    def _gate(self, x: Tensor) -> Tensor:
        small = self.k2(F.avg_pool2d(x, self.pooling_r))
        return (x + F.interpolate(small, size=x.shape[2:], mode=self.up_mode)).sigmoid_()
