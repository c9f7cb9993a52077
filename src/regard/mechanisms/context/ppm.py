r"""Pyramid pooling module: means of the map in grids of several sizes, spread back over it and set beside it.

    p_b = relu(BN(W_b mean_{b x b}(x))),   out = concat(x, up(p_1), ..., up(p_L))
    bottleneck: out = relu(BN(conv3x3(concat(x, up(p_1), ..., up(p_L)))))

Zhao, Shi, Qi, Wang, Jia, "Pyramid Scene Parsing Network", CVPR 2017. arXiv:1612.01105. The bottleneck is mmsegmentation's, which also has
align_corners=False. A 3x3 convolution of a spread map is linear in its few regions: no spread map is formed for it.
B batch, C channels, L bins, h hidden_channels.
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
from ...official import KeyMap, rename
from ...ops.region_pool import pool_regions, spread_convolved, spread_regions
from ...parts.conv_norm import ConvNorm
from ...parts.gates import INITS
from ...parts.norm import Norm, check_batch_statistics
from ...validate import check_map, check_option, whole_numbers


class PyramidPooling(Mechanism):
    """Args:
    channels: of the input.
    hidden_channels: of every level; channels // len(bins) if None.
    bins: bins a side of every level.
    align_corners: of the bilinear spreading: True (authors) or False (mmsegmentation). Weights are for one of the two.
    bottleneck: end with a 3x3 convolution to `out_channels`, hidden_channels if None.
    norm: "batch", None, or a callable features -> module.
    init: "identity" starts without the levels, by a gain of zero on them.
    """

    card: ClassVar = Card(
        id="ppm",
        layout="map",
        paper=Paper(
            title="Pyramid Scene Parsing Network",
            authors="Hengshuang Zhao, Jianping Shi, Xiaojuan Qi, Xiaogang Wang, Jiaya Jia",
            venue="CVPR",
            year=2017,
            arxiv="1612.01105",
        ),
        source="hszhao/semseg@4f274c3 (MIT), mmsegmentation@0d003bc (Apache-2.0)",
        summary="Sets the means of regions of several sizes beside every position of a map.",
        when="A segmentation head on a dilated backbone, at linear cost.",
        flops="2*B*channels*W*(H*sides + regions) + 2*B*regions*channels*hidden_channels"
        " + (18*B*N*channels*out_channels + 18*B*out_channels*(regions*(hidden_channels + W) + sides*N/3) if bottleneck"
        " else 2*B*hidden_channels*(W*regions + N*sides))",
        grows={"N": 1.0},
        can=frozenset({"linear", "batch_statistics"}),
        example={"channels": 16},
        variants=(
            {"channels": 8, "hidden_channels": 3, "bins": (1, 4), "align_corners": False, "norm": None},
            {"channels": 8, "hidden_channels": 6, "bins": (1, 2, 3), "align_corners": False, "bottleneck": True},
            {"channels": 8, "bottleneck": True, "out_channels": 5, "norm": None, "init": "identity"},
        ),
        returns=("out",),
        place="E",
    )

    def __init__(
        self,
        channels: int,
        *,
        hidden_channels: int | None = None,
        bins: Sequence[int] = (1, 2, 3, 6),
        align_corners: bool = True,
        bottleneck: bool = False,
        out_channels: int | None = None,
        norm: Norm = "batch",
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        bins = whole_numbers(bins, "bins")
        require(channels > 0, "channels={} must be at least 1", channels)
        hidden = channels // len(bins) if hidden_channels is None else hidden_channels
        hint = "the hidden width is {}, at least 1 is needed; see channels={}, bins={}, hidden_channels={}"
        require(hidden > 0, hint, hidden, channels, bins, hidden_channels)
        hint = "out_channels={} needs bottleneck=True; without it the width is channels + len(bins) * hidden"
        require(bottleneck or out_channels is None, hint, out_channels)
        require(out_channels is None or out_channels > 0, "out_channels={} must be at least 1", out_channels)
        check_option(init, INITS, "init")
        joined = channels + len(bins) * hidden
        self.channels, self.hidden_channels, self.bins, self.align_corners, self.norm, self.init = channels, hidden, bins, align_corners, norm, init
        self.out_channels = (hidden if out_channels is None else out_channels) if bottleneck else joined
        self.sides, self.regions = sum(bins), sum(n * n for n in bins)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.levels = nn.ModuleList(ConvNorm(channels, hidden, norm=norm, **dd) for _ in bins)
        self.bottleneck = ConvNorm(joined, self.out_channels, 3, norm=norm, **dd) if bottleneck else None
        self.gain = nn.Parameter(torch.zeros(1, **dd)) if init == "identity" else None

    def key_maps(self) -> tuple[KeyMap, ...]:
        places = range(len(self.bins))
        semseg = [rename(f"features.{i}.{at}.*", f"levels.{i}.{part}.*") for i in places for at, part in ((1, "conv"), (2, "norm"))]
        mmseg = [rename(f"psp_modules.{i}.1.{at}.*", f"levels.{i}.{part}.*") for i in places for at, part in (("conv", "conv"), ("bn", "norm"))]
        mmseg.append(rename("bottleneck.bn.*", "bottleneck.norm.*"))
        maps = KeyMap("hszhao/semseg", tuple(semseg), optional=("gain",)), KeyMap("mmsegmentation", tuple(mmseg), optional=("gain",))
        return maps if self.bottleneck is None else maps[1:]

    def forward(self, x: Float[Tensor, "b channels h w"]) -> Float[Tensor, "b out h w"]:
        check_map(x, self.channels)
        level: Any
        for n, level in zip(self.bins, self.levels, strict=True):
            check_batch_statistics(level.norm, x.shape[0] * n * n, f"a batch of one region (of bins={self.bins})")
        if self.bottleneck is not None:
            self.bottleneck.check(*x.shape)
        size = (x.shape[2], x.shape[3])
        pooled = pool_regions(x, self.bins).split([n * n for n in self.bins], 2)
        regions = [level(one.unflatten(2, (n, n))) for n, one, level in zip(self.bins, pooled, self.levels, strict=True)]
        if self.gain is not None:
            regions = [self.gain * one for one in regions]
        if self.bottleneck is None:
            return torch.cat([x, *(spread_regions(one, size, align_corners=self.align_corners) for one in regions)], 1)
        conv = self.bottleneck.conv
        own, context = conv.weight.tensor_split((self.channels,), 1)
        out = spread_convolved(F.conv2d(x, own, conv.bias, padding=1), regions, context, align_corners=self.align_corners)
        return self.bottleneck.finish(out)
