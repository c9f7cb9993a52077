r"""Spatial pyramid graph reasoning: a graph convolution on the positions themselves, its graph of low rank and made from the map, at several scales.

    F = relu(Wp X + bp),  l = sigmoid(Wl mean_n(X) + bl),  A = F' diag(l) F,  d = A 1,  L = I - D^-1/2 A D^-1/2,  Y = relu(T X L)
    out_s = Y_s + nearest upsampling of out_{s+1};  X_{s+1} = 2 x 2 max pooling of X_s

Li, Yang, Zhao, Shen, Lin, Liu, "Spatial Pyramid Based Graph Reasoning for Semantic Segmentation", CVPR 2020. arXiv:2003.10211.
Not from the paper: the single layer and the sigmoid of l, the 2 x 2 pooling, nearest upsampling. B batch, C channels, N positions of a level,
M hidden_channels, F (M, N). With P = F D^-1/2: T X L = T X - T (X P' diag(l)) P, never N x N.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, pointwise
from ...ops._precision import at_least_float32, full_precision
from ...ops.squeeze import position_mean
from ...parts.gates import INITS
from ...parts.linear import Linear
from ...parts.spatial import project_columns, project_distribute, project_gather
from ...validate import check_map, check_option

_SIZES = [f"(H//{2**level})*(W//{2**level})" for level in range(12)]
_PYRAMID = " + ".join(
    f"(({n})*(channels**2 + 2*channels*hidden_channels + hidden_channels)"
    f" + channels*min(hidden_channels*(channels + {n}), {n}*(channels + hidden_channels)) if num_levels > {level} else 0)"
    for level, n in enumerate(_SIZES)
)


class SpatialPyramidGraph(Mechanism):
    """Args:
    channels: of the input and the output.
    hidden_channels: rank of the graph.
    num_levels: scales, each half the size of the one before.
    residual: add the input.
    init: "identity" needs `residual` and starts as the identity: the pyramid is multiplied by a learned `gain` that starts at zero.
    """

    card: ClassVar = Card(
        id="spygr",
        layout="map",
        paper=Paper(
            title="Spatial Pyramid Based Graph Reasoning for Semantic Segmentation",
            authors="Xia Li, Yibo Yang, Qijie Zhao, Tiancheng Shen, Zhouchen Lin, Hong Liu",
            venue="CVPR",
            year=2020,
            arxiv="2003.10211",
        ),
        source="the equations of the paper; no code of the authors is public",
        summary="Graph convolution on all positions at several scales, with a graph of low rank made from the map.",
        when="A segmentation head that needs the whole picture and must keep the layout.",
        flops=f"2*B*({_PYRAMID} + num_levels*channels*hidden_channels)",
        grows={"N": 1.0},
        can=frozenset({"weights", "linear", "permutation_equivariant", "identity_start"}),
        unless={"permutation_equivariant": "num_levels > 1", "identity_start": "not residual"},
        checked_against="equations",
        uncertain="How the diagonal is made, the pooling and the upsampling were fixed by us.",
        example={"channels": 16, "hidden_channels": 8, "num_levels": 1},
        variants=(
            {"channels": 8, "hidden_channels": 4, "num_levels": 1, "residual": True},
            {"channels": 10, "hidden_channels": 5, "num_levels": 3},
        ),
        place="E",
    )
    official: ClassVar = (KeyMap("1x1 convolutions", (pointwise("levels.*.weight", "levels.*.weight"),)),)

    def __init__(
        self,
        channels: int,
        *,
        hidden_channels: int = 64,
        num_levels: int = 3,
        residual: bool = False,
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(init, INITS, "init")
        require(channels > 0 and hidden_channels > 0, "channels={} and hidden_channels={} must be at least 1", channels, hidden_channels)
        require(0 < num_levels <= len(_SIZES), "num_levels={} must be from 1 to {}", num_levels, len(_SIZES))
        require(residual or init == "default", "init='identity' needs residual=True")
        self.channels, self.hidden_channels, self.num_levels, self.residual, self.init = channels, hidden_channels, num_levels, residual, init
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.levels = nn.ModuleList(
            nn.ModuleDict(
                {
                    "phi": Linear(channels, hidden_channels, **dd),
                    "attn": Linear(channels, hidden_channels, **dd),
                    "graph": Linear(channels, channels, bias=False, **dd),
                }
            )
            for _ in range(num_levels)
        )
        self.gain = nn.Parameter(torch.zeros(1, **dd)) if init == "identity" else None
        self.returns = ("out", *(f"weights_{name}_{s}" for s in range(num_levels) for name in ("phi", "lam")))

    def forward(
        self, x: Float[Tensor, "b channels h w"], return_weights: bool = False
    ) -> Float[Tensor, "b channels h w"] | tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]]:
        """Returns the map, or that and the factors of A at each level: F' (B, N, M) and l (B, M)."""
        check_map(x, self.channels, 2)
        least = 2 ** (self.num_levels - 1)
        hint = "num_levels={} needs a size of {} x {} at least, got {}; use larger maps or fewer levels"
        require(min(x.shape[2:]) >= least, hint, self.num_levels, least, least, tuple(x.shape[2:]))
        found, factors, level_map = [], [], x
        for s, level in enumerate(self.levels):
            level_map = F.max_pool2d(level_map, 2) if s else level_map
            y, *factor = _reason(level_map, level)
            found.append(y)
            factors.append(tuple(factor))
        out = found[-1]
        for y in reversed(found[:-1]):
            out = y + F.interpolate(out, size=y.shape[2:], mode="nearest")
        out = out if self.gain is None else self.gain * out
        out = x + out if self.residual else out
        return (out, tuple(factors)) if return_weights else out


def _reason(x: Tensor, level: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """One level: relu(T X L) as a map, F' and l."""
    phi, attn, graph = level["phi"], level["attn"], level["graph"]  # type: ignore[index]
    columns, wide = x.flatten(2), at_least_float32(x)
    features = project_columns(columns, phi.weight, phi.bias).relu()
    logits = attn(position_mean(x))
    with full_precision(x):  # L does not change with a factor on l: the largest is set to one, since all of them may be too small for a float
        f, log_lam = features.to(wide), F.logsigmoid(logits.to(wide))
        relative = (log_lam - log_lam.detach().amax(1, keepdim=True)).exp()
        degree = torch.bmm((relative * f.sum(2))[:, None], f)
        linked = degree > torch.finfo(wide).tiny ** 0.5  # below that the gradient overflows
        normal = (f * torch.where(linked, torch.where(linked, degree, 1.0).rsqrt(), 0.0)).to(features.dtype)
    mixture = project_gather(columns.to(normal.dtype), normal) * relative.to(normal.dtype)[:, None]
    y = project_distribute(mixture, normal, -graph.weight, onto=project_columns(columns, graph.weight))
    return y.relu().unflatten(2, x.shape[2:]), features.mT, logits.sigmoid()
