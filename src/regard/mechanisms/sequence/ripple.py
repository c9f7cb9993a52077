r"""Ripple attention: linear attention on a map whose weights fall, ring by ring around each query, by a profile that the query itself sets.

    out_p = sum_t a(p, D) phi(q_p) . phi(k_t) v_t / (sum_t a(p, D) phi(q_p) . phi(k_t) + eps),   D = max(|y_p - y_t|, |x_p - x_t|)
    a(p, r) = s_r prod_{u < r} (1 - s_u),   s = sigmoid(spatial_proj(x_p)),   and for every r >= R the stick that remains, prod_{u < R} (1 - s_u)
    threshold: after the first r at which the a up to r sum to it, every ring has what then remains of the stick
    "elu": phi(y) = elu(y) + 1    "relu": relu(y)    "favor": exp(W y' - |y'|^2 / 2) / sqrt(m), y' = y d^-1/4

Zheng, Pan, Kong, "Ripple Attention for Visual Perception with Sub-quadratic Complexity", ICML 2022, arXiv:2110.02453. No code of the authors is known
and the equations are a reconstruction: one linear layer predicts the sticks, and the remaining stick is not divided among the rings left. The start,
equal weights for all R + 1 groups, is our choice. B batch, N = H W positions, D dim, H heads, d head width, m features, R rings.
"""

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...ops.linear_attention import full_precision, ring_product, ring_weights
from ...parts.feature_maps import kernel_features, random_projection
from ...parts.heads import head_width, init_projections_, merge_heads, split_heads
from ...parts.linear import Linear
from ...validate import check_map, check_mask, check_option, check_tokens

# Multiply-adds for a position (ops/linear_attention/rings.py): all positions, or those that a tile of 64 meets, or R box sums of every column.
_HEIGHT = "(H if layout == 'map' else rows if rows else N/columns)"
_WIDTH = "(W if layout == 'map' else N/rows if rows else columns)"
_SIDE = f"(64//min(8, {_HEIGHT}))"
_SEEN = f"(({_HEIGHT} if {_HEIGHT} <= 8 else 6 + 2*max_radius)*({_WIDTH} if {_WIDTH} <= {_SIDE} else {_SIDE} + 2*max_radius - 2))"
_DENSE = f"(method == 'dense' or method == 'auto' and 2*N <= 3*{_SEEN})"
_TABLES = f"(method == 'sat' or method == 'auto' and 4.2*max_radius*m*(head_dim + 1) < (N if {_DENSE} else {_SEEN})*(2 + 0.04*(m + head_dim + 1)))"


class RippleAttention(Mechanism):
    """Args:
    dim: width of the input and the output.
    num_heads, head_dim: number of heads and width of each; head_dim=None means dim // num_heads.
    grid_size: (height, width) of the tokens, row by row; one of them may be -1, whatever the tokens fill. A call may give another.
    layout: "sequence" for tokens (B, H W, dim), "map" for maps (B, dim, H, W), with the same weights.
    max_radius: rings R with a weight of their own, the query itself being the first.
    threshold: in (0, 1]: rings after the one at which the weights sum to it share what remains; None for no such limit.
    feature_map: "elu", "relu" or "favor"; num_features: rows of its random projection, int(d ln d) if None.
    qkv_bias, out_bias: biases of the projections.
    eps: added to the denominator.
    dropout: probability of dropping an output channel in training.
    method: "dense", "window", "sat" (tables of sums) or "auto".
    """

    card: ClassVar = Card(
        id="ripple",
        layout="sequence",
        also=("map",),
        paper=Paper(
            title="Ripple Attention for Visual Perception with Sub-quadratic Complexity",
            authors="Lin Zheng, Huijie Pan, Lingpeng Kong",
            venue="ICML",
            year=2022,
            arxiv="2110.02453",
        ),
        source="the paper's abstract and figures; no code is public",
        summary="Linear attention whose weights fall with distance, ring by ring, as each query decides.",
        when="Images where near pixels matter most but the whole map must be seen, at a cost linear in the pixels.",
        flops="2*B*N*dim*num_heads*(4*head_dim + max_radius) + 2*B*num_heads*N*(2*head_dim*m if feature_map == 'favor' else 0) + 2*B*num_heads*N*("
        f"max_radius*m*(head_dim + 1) + 2*m*(head_dim + 1) if {_TABLES} else N*(m + head_dim + 1) if {_DENSE} else"
        f" {_SEEN}*(m + head_dim + 1) + 2*m*(head_dim + 1))",
        grows={"N": 1.0},
        can=frozenset({"key_mask", "weights", "rows", "linear"}),
        unless={"key_mask": "layout == 'map'", "linear": "method == 'dense'"},
        checked_against="reconstruction",
        uncertain="The full text and code were not available: how the sticks are predicted and shared follows our reading of abstract and figures.",
        example={"dim": 32, "num_heads": 4, "grid_size": (1, -1)},
        variants=(
            {"dim": 24, "num_heads": 2, "layout": "map", "max_radius": 3},
            {"dim": 24, "num_heads": 3, "layout": "map", "max_radius": 2, "threshold": 0.6, "feature_map": "favor", "num_features": 10},
            {"dim": 16, "num_heads": 4, "grid_size": (-1, 1), "max_radius": 5, "method": "sat"},
            {"dim": 24, "num_heads": 2, "grid_size": (-1, 1), "feature_map": "relu", "method": "dense"},
        ),
        place="C",
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        grid_size: tuple[int, int] | None = None,
        *,
        layout: Literal["sequence", "map"] = "sequence",
        max_radius: int = 4,
        threshold: float | None = None,
        feature_map: Literal["elu", "relu", "favor"] = "elu",
        num_features: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        eps: float = 1e-6,
        dropout: float = 0.0,
        method: Literal["auto", "dense", "window", "sat"] = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(layout, ("sequence", "map"), "layout")
        check_option(feature_map, ("elu", "relu", "favor"), "feature_map")
        check_option(method, ("auto", "dense", "window", "sat"), "method")
        require(max_radius > 0, "max_radius={} must be at least 1", max_radius)
        require(threshold is None or 0.0 < threshold <= 1.0, "threshold={} must be in (0, 1], or None", threshold)
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        self.dim, self.num_heads, self.head_dim, self.layout = dim, num_heads, head_width(dim, num_heads, head_dim), layout
        self.grid_size, self.max_radius, self.threshold = _checked_grid(grid_size), max_radius, threshold
        self.feature_map, self.qkv_bias, self.out_bias, self.eps, self.dropout, self.method = feature_map, qkv_bias, out_bias, eps, dropout, method
        d = self.head_dim
        self.num_features = (max(1, int(d * math.log(d))) if num_features is None else num_features) if feature_map == "favor" else None
        require(feature_map == "favor" or num_features is None, "num_features={} needs feature_map='favor', got {!r}", num_features, feature_map)
        require(self.num_features is None or self.num_features > 0, "num_features={} must be at least 1", num_features)
        # As the cost formula calls them; rows, or else columns, of a free grid.
        self.m, (self.rows, self.columns) = self.num_features or d, (max(side, 0) for side in self.grid_size or (0, 1))
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, num_heads * d, qkv_bias, **dd) for _ in range(3))
        self.out_proj = Linear(num_heads * d, dim, out_bias, **dd)
        self.spatial_proj = Linear(dim, num_heads * max_radius, **dd)
        init_projections_(self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        with torch.no_grad():
            equal = -torch.arange(max_radius, 0, -1, device=device, dtype=torch.float32).log()  # logit(1 / (R + 1 - r))
            self.spatial_proj.bias.copy_(equal.repeat(num_heads))
        drawn = random_projection(self.num_features, d, num_heads=num_heads, **dd) if self.num_features else None
        self.feature_projection: Tensor | None
        self.register_buffer("feature_projection", drawn)

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        *,
        grid_size: tuple[int, int] | None = None,
        key_mask: Bool[Tensor, "b n"] | None = None,
        feature_projection: Tensor | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n dim"] | tuple[Tensor, Tensor]:
        """Tokens (B, H W, dim), or a map (B, dim, H, W) with its key_mask (B, H, W); the result has its shape, beside weights (B, heads, N, N).

        `feature_projection`, (m, d) or (heads, m, d), replaces the module's own in this call.
        """
        tokens, mask, height, width = self._tokens(x, grid_size, key_mask)
        q, k = self._features(tokens, tokens, feature_projection)
        v = split_heads(self.v_proj(tokens), self.num_heads)
        with full_precision(v):
            values = F.pad(v.to(q.dtype), (0, 1), value=1.0)
            if mask is not None:
                gone = ~mask[:, None, :, None]
                k, values = k.masked_fill(gone, 0.0), values.masked_fill(gone, 0.0)
            sums = ring_product(q, k, values, self._profile(tokens), height, width, method=self.method)
            out = (sums[..., :-1] / (sums[..., -1:] + self.eps)).to(v.dtype)
        out = F.dropout(self.out_proj(merge_heads(out)), self.dropout, self.training)
        out = out.mT.unflatten(2, (height, width)) if self.layout == "map" else out
        given = {"grid_size": grid_size, "key_mask": key_mask, "feature_projection": feature_projection}
        return (out, self.weights(x, **given)) if return_weights else out

    def weights(
        self,
        x: Tensor,
        *,
        queries: Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        feature_projection: Tensor | None = None,
    ) -> Float[Tensor, "b h r n"]:
        """What multiplies the values for R chosen positions alone, row by row on a map; for all if None. A row sums to 1 but for eps."""
        tokens, mask, height, width = self._tokens(x, grid_size, key_mask)
        at = torch.arange(tokens.shape[1], device=x.device) if queries is None else queries
        asking = tokens if queries is None else tokens[:, queries]
        q, k = self._features(asking, tokens, feature_projection)
        with full_precision(q):
            a = (q @ k.mT) * ring_weights(self._profile(asking), at, height, width)
            a = a if mask is None else a.masked_fill(~mask[:, None, None], 0.0)
            return (a / (a.sum(-1, keepdim=True) + self.eps)).to(x.dtype)

    def _tokens(self, x: Tensor, grid_size: tuple[int, int] | None, key_mask: Tensor | None) -> tuple[Tensor, Tensor | None, int, int]:
        """Tokens (B, N, dim), their mask (B, N), height and width."""
        if self.layout == "map":
            check_map(x, self.dim)
            height, width = x.shape[2:]
            fits = grid_size is None or tuple(grid_size) == (height, width)
            require(fits, "grid_size={} is for tokens: with layout='map' it is that of x, {}", grid_size, (height, width))
            check_mask(key_mask, x.shape[0], height, width)
            return x.flatten(2).mT, None if key_mask is None else key_mask.flatten(1), height, width
        check_tokens(x, self.dim)
        n, grid = x.shape[1], _checked_grid(grid_size) or self.grid_size
        require(grid is not None, "tokens need grid_size=(height, width), in the constructor or the call; x has {} of them", n)
        height, width = grid or (0, 0)
        height, width = (n // width if height == -1 else height), (n // height if width == -1 else width)
        require(height * width == n, "x has {} positions but grid_size={} has {}", n, grid, height * width)
        check_mask(key_mask, x.shape[0], n)
        return x, key_mask, height, width

    def _features(self, x: Tensor, source: Tensor, projection: Tensor | None) -> tuple[Tensor, Tensor]:
        """phi of the queries and keys, in at least float32."""
        w = self.feature_projection if projection is None else projection
        q, k = (split_heads(t, self.num_heads) for t in (self.q_proj(x), self.k_proj(source)))
        return kernel_features(q, self.feature_map, w), kernel_features(k, self.feature_map, w)

    def _profile(self, x: Tensor) -> Float[Tensor, "b h n rings_and_rest"]:
        """The weights of the rings 0 .. R - 1 of each position, and of all beyond, in at least float32."""
        z = split_heads(self.spatial_proj(x), self.num_heads)
        with full_precision(z):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            left = F.logsigmoid(-z).cumsum(-1).exp()  # of the stick after each ring
            a = torch.cat((z.sigmoid() * F.pad(left, (1, 0), value=1.0)[..., :-1], left[..., -1:]), -1)
            if self.threshold is None:
                return a
            reached = a[..., :-1].cumsum(-1) >= self.threshold
            first = (~reached).sum(-1, keepdim=True).clamp_max(self.max_radius - 1)
            return torch.where(F.pad(reached, (1, 0)), left.gather(-1, first), a)


def _checked_grid(grid: tuple[int, int] | None) -> tuple[int, int] | None:
    if grid is None:
        return None
    ok = len(grid) == 2 and all(side > 0 or side == -1 for side in grid) and max(grid) > 0
    require(ok, "grid_size={} must be (height, width), one of which may be -1", grid)
    return (grid[0], grid[1])
