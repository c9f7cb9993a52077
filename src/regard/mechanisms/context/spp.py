r"""Spatial pyramid pooling: a vector of fixed length from a map of any size, by pooling in grids of n x n bins.

    out = concat over levels n, channels c, bins (i, j) of max {x[c, y, z] : y in bin i of n, z in bin j of n}

He, Zhang, Ren, Sun, "Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition", ECCV 2014. arXiv:1406.4729.
Bin i of n over a length L is [floor(i L / n), ceil((i + 1) L / n)). The authors' code starts the maximum at 0, after a ReLU: we do not clamp.
B batch, C channels, S bins of all levels, K boxes.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ...card import Card, Paper
from ...errors import require, require_type
from ...mechanism import Mechanism
from ...ops.region_pool import pool_boxes, pool_regions, pool_windows
from ...validate import check_floating, check_map, check_option, whole_numbers

_ADAPTIVE_MEAN = "pool == 'mean' and binning == 'adaptive'"


class SpatialPyramidPooling(Mechanism):
    """Args:
    channels: of the input; None takes any, and gives no `out_features`.
    levels: bins a side of every level, in the order of the output.
    pool: "max" or "mean".
    binning: "adaptive" bins fit any size; "window" slides windows of ceil(L / n) by floor(L / n), for the sizes where these are n (the paper's
        training at one size).
    """

    card: ClassVar = Card(
        id="spp",
        layout="map",
        paper=Paper(
            title="Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition",
            authors="Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun",
            venue="ECCV",
            year=2014,
            arxiv="1406.4729",
        ),
        source="ShaoqingRen/SPP_net@ca96759 (MATLAB and C++)",
        summary="Pools a map of any size, or any box of it, to a vector of fixed length.",
        when="Before the first fully connected layer of a classifier of images, or boxes, of any size.",
        flops=f"2*B*channels*W*(H*sides + bins) if {_ADAPTIVE_MEAN} else 0",
        grows={"N": 1.0},
        can=frozenset({"linear"}),
        checked_against="equations",
        uncertain="The authors' MATLAB code was read for the rule of the bins, not run.",
        place="E",
        example={"channels": 8, "pool": "mean"},
        variants=(
            {"channels": 8},
            {"channels": 5, "levels": (1, 4, 2, 8)},
            {"channels": 8, "levels": (3, 1), "binning": "window"},
            {"channels": 8, "levels": (3, 1), "binning": "window", "pool": "mean"},
        ),
        returns=("out",),
    )

    def __init__(
        self,
        channels: int | None = None,
        *,
        levels: Sequence[int] = (6, 3, 2, 1),
        pool: Literal["max", "mean"] = "max",
        binning: Literal["adaptive", "window"] = "adaptive",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        levels = whole_numbers(levels, "levels")
        require(channels is None or channels > 0, "channels={} must be at least 1, or None", channels)
        check_option(pool, ("max", "mean"), "pool")
        check_option(binning, ("adaptive", "window"), "binning")
        self.channels, self.levels, self.binning = channels, levels, binning
        self.pool: Literal["max", "mean"] = pool
        self.sides, self.bins = sum(levels), sum(n * n for n in levels)

    @property
    def out_features(self) -> int:
        """The length of the output."""
        require(self.channels is not None, "out_features needs channels, which is None")
        return (self.channels or 0) * self.bins

    def forward(self, x: Float[Tensor, "b channels h w"], boxes: Sequence[Tensor] | Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C * S).

        boxes: pool these instead, -> (K, C * S): for every image a tensor of rows (y0, x0, y1, x1), or one of rows (image, y0, x0, y1, x1), in
        cells of the map, ends exclusive.
        """
        check_floating(x)
        check_map(x, x.shape[1] if self.channels is None and x.ndim > 1 else self.channels or 0)
        if boxes is not None:
            regions = pool_boxes(x, self._checked(boxes, x), self.levels, self.pool)
        else:
            regions = (pool_regions if self.binning == "adaptive" else pool_windows)(x, self.levels, self.pool)
        return torch.cat([level.flatten(1) for level in regions.split([n * n for n in self.levels], 2)], 1)

    def _checked(self, boxes: Sequence[Tensor] | Tensor, x: Tensor) -> list[list[int]]:
        """Rows (image, y0, x0, y1, x1)."""
        require(self.binning == "adaptive", "boxes need binning='adaptive', this module has binning={!r}", self.binning)
        if isinstance(boxes, Tensor):
            hint = "boxes must be (K, 5), got {}; or a list of one (K, 4) for each image"
            require(boxes.ndim == 2 and boxes.shape[1] == 5, hint, tuple(boxes.shape))
            given, rows = [boxes], boxes.tolist()
        else:
            require(len(boxes) == x.shape[0], "boxes lists {} images, x has {}", len(boxes), x.shape[0])
            given = [torch.as_tensor(image) for image in boxes]
            shapes = [tuple(image.shape) for image in given]
            require(all(image.numel() == 0 or (image.ndim == 2 and image.shape[1] == 4) for image in given), "boxes must be (K, 4), got {}", shapes)
            rows = [[i, *row] for i, image in enumerate(given) if image.numel() for row in image.tolist()]
        kinds = [image.dtype for image in given if image.numel()]
        whole = all(not (kind.is_floating_point or kind.is_complex or kind == torch.bool) for kind in kinds)
        require_type(whole, "boxes must be integers (cells of the map), got {}", kinds)
        b, _, h, w = x.shape
        for row in rows:
            i, y0, x0, y1, x1 = row
            inside = 0 <= i < b and 0 <= y0 < y1 <= h and 0 <= x0 < x1 <= w
            require(inside, "box (image, y0, x0, y1, x1)={} is empty or leaves the {} maps of {} x {}", row, b, h, w)
        return rows
