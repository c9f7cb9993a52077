r"""Criss-cross attention: every pixel attends along its own row and column; repeated with the same weights, to the whole map.

    e_u = q_u . k over the cross of u (H + W - 1 pixels, u once),   y_u = softmax(e_u) v,   x <- gamma y + x,   R times

Huang, Wang, Wei, Huang, Shi, Liu, Huang, "CCNet: Criss-Cross Attention for Semantic Segmentation", ICCV 2019. arXiv:1811.11721.
No scaling. For volumes we follow the paper: the authors' 3-D code scrambles the width axis and counts the pixel twice.
B batch, C channels, H x W the map, R recurrence. Weights sum to one, so v = Wv x + bv is applied to what was gathered, not before.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule, pointwise
from ...ops._linear import linear
from ...ops.criss_cross import criss_cross, criss_cross_weights
from ...parts.gates import INITS
from ...parts.linear import Linear
from ...parts.squeeze import hidden_width
from ...validate import check_map, check_option

_CONVOLUTIONS = tuple(pointwise(f"{name}.*", f"{name}.*") for name in ("query_conv", "key_conv", "value_conv"))


class CrissCrossAttention(Mechanism):
    """Args:
    channels: of the input and the output.
    reduction: queries and keys have channels // reduction channels.
    recurrence: passes with the same weights; two reach every pixel from every pixel.
    dims: 2, or 3 for volumes.
    init: "identity" or "default": either starts as the identity, with a gain of zero.
    """

    card: ClassVar = Card(
        id="criss_cross",
        layout="map",
        paper=Paper(
            title="CCNet: Criss-Cross Attention for Semantic Segmentation",
            authors="Zilong Huang, Xinggang Wang, Yunchao Wei, Lichao Huang, Humphrey Shi, Wenyu Liu, Thomas S. Huang",
            venue="ICCV",
            year=2019,
            arxiv="1811.11721",
        ),
        source="speedinghzl/CCNet@e54a977 (MIT, branch pure-python), open-mmlab/mmcv (Apache-2.0)",
        summary="Each pixel attends along its row and column; two passes connect every pair of pixels.",
        when="Dense prediction on large maps that needs context of the whole picture; below about 24 x 24 plain attention is as quick.",
        flops="recurrence*2*B*N*(channels*(2*hidden_channels + channels) + (H + W + (N//(H*W) if dims == 3 else 0))*(hidden_channels + channels))",
        grows={"N": 1.5},
        can=frozenset({"weights", "row_stochastic", "identity_start"}),
        checked_against="authors",
        uncertain="The 3-D form follows the paper: the authors' 3-D file scrambles the width branch and counts a position twice.",
        example={"channels": 16},
        variants=({"channels": 12, "reduction": 4, "recurrence": 1},),
        place="E",
    )
    official: ClassVar = (
        KeyMap("CCNet", _CONVOLUTIONS),
        KeyMap("mmcv", (*_CONVOLUTIONS, Rule(("gamma.scale",), ("gamma",), lambda t, _: [t[0].reshape(1)], lambda t, _: [t[0].reshape(())]))),
    )

    def __init__(
        self,
        channels: int,
        reduction: int = 8,
        recurrence: int = 2,
        dims: Literal[2, 3] = 2,
        *,
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(dims, (2, 3), "dims")
        check_option(init, INITS, "init")
        require(recurrence > 0, "recurrence={} must be at least 1", recurrence)
        self.channels, self.reduction, self.recurrence, self.dims, self.init = channels, reduction, recurrence, dims, init
        self.hidden_channels = hidden_width(channels, reduction, None)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query_conv, self.key_conv = (Linear(channels, self.hidden_channels, **dd) for _ in range(2))
        self.value_conv = Linear(channels, channels, **dd)
        self.gamma = nn.Parameter(torch.zeros(1, **dd))

    def forward(
        self, x: Float[Tensor, "b channels *space"], *, recurrence: int | None = None, return_weights: bool = False
    ) -> Float[Tensor, "b channels *space"] | tuple[Tensor, list[Tensor]]:
        """Returns the map, or that and for each pass the weights (B, H, W, H + W): along the column, zero at the pixel itself, then the row.

        `recurrence` overrides the number of passes.
        """
        check_map(x, self.channels, self.dims)
        passes = self.recurrence if recurrence is None else recurrence
        require(passes > 0, "recurrence={} must be at least 1", passes)
        # Rows of the same height lie together, (H, B, W, C): lines in both directions are then views.
        rows = x.movedim(1, -1).transpose(0, 1).contiguous()
        shape, lines = rows.shape, (math.prod(rows.shape[:-2]), *rows.shape[-2:])
        scores = torch.cat([self.query_conv.weight, self.key_conv.weight]), torch.cat([self.query_conv.bias, self.key_conv.bias])
        values = self.gamma * self.value_conv.weight, self.gamma * self.value_conv.bias
        rows, weights = rows.view(lines), []
        for _ in range(passes):
            q, k = linear(rows, *scores).unflatten(0, shape[:-2]).transpose(0, 1).tensor_split(2, -1)
            if return_weights:
                weights.append(criss_cross_weights(q, k))
            gathered = criss_cross(q, k, rows.view(shape).transpose(0, 1)).transpose(0, 1)
            rows = rows + linear(gathered.reshape(lines), *values)
        out = rows.view(shape).transpose(0, 1).movedim(-1, 1).contiguous()
        return (out, weights) if return_weights else out
