r"""Generalized attention: any of four terms, content and relative position, in the scores of one block.

    p = (i, j) a query, r = (a, b) a key:   E1 q_p . k_r    E2 q_p . R_pr    E3 u . k_r    E4 v . R_pr    R_pr = X_jb + Y_ia
    out = x + gamma up(W (softmax_r(sum of the active terms) value_r) + c)
    X_jb = W_x emb(s j - t b) / sqrt(2),   emb(z) = [sin(z / 1000^(4f/P)) ; cos(...)], f < P/4;   Y likewise of rows

Zhu, Cheng, Zhang, Lin, Dai, "An Empirical Study of Spatial Attention Mechanisms in Deep Networks", ICCV 2019. arXiv:1904.05873.
Scores are not scaled. Not as the authors' code: the row part of E2 without E4 takes the query of its own pixel (theirs transposes the map),
and "0010" within a spatial range has a window for each query (theirs has that of pixel 0 for all). As it, a window reaches one further down and
right than up and left. E1 + E3 = (q + u) . k, E2 + E4 = (q + v) . R; R is never formed, its rows and columns are scored apart.
"0010" has the same weights for every query; those of "0001" are a product of row weights and column weights.
B batch, C channels, s q_stride, t kv_stride, h x w queries, N = h w, h' x w' keys, K = h' w', M num_heads, d = C // M, P position_embedding_dim.
"""

from dataclasses import replace
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
from ...ops.linear_attention import blockwise
from ...ops.separable_scores import Axis, from_blocks, separable_attention, separable_weights, span, to_blocks
from ...ops.softmax_attention import attend
from ...parts.gates import INITS
from ...parts.linear import Linear
from ...parts.spatial import flatten_space, project_columns, project_rows
from ...validate import check_map, check_option

_h, _w, _a, _b = "ceil(H/q_stride)", "ceil(W/q_stride)", "ceil(H/kv_stride)", "ceil(W/kv_stride)"
_P, _Q = (f"(ceil({n}/block)*block if block and span < {m} else {n})" for n, m in ((_h, _a), (_w, _b)))
_S, _T = (f"(span if block and span < {m} else {m})" for m in (_a, _b))
_inner = "num_heads*head_dim"


class GeneralizedAttention(Mechanism):
    """Args:
    channels: of the input and the output.
    num_heads: each of channels // num_heads channels; need not divide channels.
    attention_type: a digit for each of E1 to E4, "1" where the term is active.
    spatial_range: a query sees the keys at most about this far in each axis; everywhere if negative.
    position_embedding_dim: P, channels if -1.
    position_magnitude: factor of the distances.
    kv_stride, q_stride: only every such pixel is a key, a query. Between queries the result is interpolated.
    init: "identity" or "default": either starts as the identity, with a gain of zero.
    """

    card: ClassVar = Card(
        id="generalized",
        layout="map",
        paper=Paper(
            title="An Empirical Study of Spatial Attention Mechanisms in Deep Networks",
            authors="Xizhou Zhu, Dazhi Cheng, Zheng Zhang, Stephen Lin, Jifeng Dai",
            venue="ICCV",
            year=2019,
            arxiv="1904.05873",
        ),
        source="open-mmlab/mmcv@a8073c7 (Apache-2.0)",
        summary="Four terms of attention, content and relative position of query and key, to be switched on and off.",
        when="To find which terms a task needs; '0010' is a cheap global context, and the study's best trade-off beside deformable convolutions.",
        flops=f"2*B*{_a}*{_b}*channels*(num_heads*key_width + ({_inner} if not shared else num_heads)) + (2*{_inner}*channels if folds else 0) + ("
        f"4*B*channels*{_inner} if shared else 2*B*{_h}*{_w}*{_inner}*channels*(2 if asks else 1))"
        f" + ((({_Q}*{_T} + {_P}*{_S})*position_dim*num_heads*(head_dim if places == 2 else 1)"
        f" + (2*B*{_inner}*{_P}*{_Q}*({_S} + {_T}) if places == 2 else 2*{_inner}*position_dim)) if places else 0)"
        f" + (0 if shared else 2*B*{_inner}*{_w}*{_a}*({_b} + {_h}) if separable else 2*B*num_heads*{_P}*{_Q}*{_S}*{_T}*(key_width + head_dim))",
        grows={"N": 2.0},
        can=frozenset({"weights", "rows", "row_stochastic", "identity_start", "permutation_equivariant"}),
        unless={
            "rows": "shared or q_stride > 1",
            "permutation_equivariant": "places > 0 or spatial_range >= 0 or kv_stride > 1 or q_stride > 1",
        },
        checked_against="public",
        uncertain="Replayed against mmcv, without a spatial range and with q_stride=1.",
        example={"channels": 16, "num_heads": 4},
        variants=(
            {"channels": 16, "num_heads": 3, "attention_type": "0010", "kv_stride": 1},
            {"channels": 16, "num_heads": 2, "attention_type": "0001", "position_embedding_dim": 8, "q_stride": 2},
            {"channels": 16, "num_heads": 2, "attention_type": "0110", "spatial_range": 2},
            {"channels": 16, "num_heads": 4, "attention_type": "1010", "kv_stride": 1},
        ),
        place="C",
    )
    official: ClassVar = (
        KeyMap(
            "mmcv",
            tuple(pointwise(f"{name}.*", f"{name}.*") for name in ("query_conv", "key_conv", "value_conv", "proj_conv")),
            ignore=("local_constraint_map",),
        ),
    )

    def __init__(
        self,
        channels: int,
        num_heads: int = 9,
        attention_type: str = "1111",
        spatial_range: int = -1,
        position_embedding_dim: int = -1,
        position_magnitude: float = 1,
        kv_stride: int = 2,
        q_stride: int = 1,
        *,
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        known = isinstance(attention_type, str) and len(attention_type) == 4 and set(attention_type) <= {"0", "1"} and "1" in attention_type
        require(known, "attention_type={!r} must be four digits 0 or 1, one for each term, not all 0", attention_type)
        require(0 < num_heads <= channels, "num_heads={} must be from 1 to channels={}", num_heads, channels)
        require(kv_stride > 0 and q_stride > 0, "kv_stride={} and q_stride={} must be at least 1", kv_stride, q_stride)
        check_option(init, INITS, "init")
        self.channels, self.num_heads, self.attention_type, self.spatial_range = channels, num_heads, attention_type, spatial_range
        self.position_embedding_dim, self.position_magnitude = position_embedding_dim, position_magnitude
        self.kv_stride, self.q_stride, self.init, self.head_dim = kv_stride, q_stride, init, channels // num_heads
        self.position_dim = channels if position_embedding_dim == -1 else position_embedding_dim
        e1, e2, e3, e4 = (digit == "1" for digit in attention_type)
        self.asks, self.folds = e1 or e2, e3 and not e1  # E3 without E1 needs one number of a key
        self.key_width = self.head_dim if e1 else int(e3)
        self.places = 2 if e2 else int(e4)  # relative position: 2 as the query asks, 1 by the fixed vector alone
        self.shared, self.separable = attention_type == "0010" and spatial_range < 0, attention_type == "0001"
        windows = spatial_range >= 0 and not self.separable
        self.block = -(-max(8, spatial_range) // kv_stride) * kv_stride if windows else 0
        self.span = span(self.block, kv_stride, spatial_range) if windows else 0
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = num_heads * self.head_dim
        self.query_conv = Linear(channels, inner, bias=False, **dd) if self.asks else None
        self.key_conv = Linear(channels, inner, bias=False, **dd) if e1 or e3 else None
        self.value_conv, self.proj_conv = Linear(channels, inner, bias=False, **dd), Linear(inner, channels, **dd)
        if self.places:
            require(self.position_dim > 0, "position_embedding_dim={} must be positive, or -1 for channels", position_embedding_dim)
            hint = "position_embedding_dim={} (channels if -1) must be a multiple of 4, for sines and cosines of two axes"
            require(self.position_dim % 4 == 0, hint, self.position_dim)
        self.appr_geom_fc_x, self.appr_geom_fc_y = (
            Linear(self.position_dim // 2, inner, bias=False, **dd) if self.places else None for _ in range(2)
        )
        self.appr_bias, self.geom_bias = (nn.Parameter(torch.empty(inner, **dd)) if used else None for used in (e3, e4))
        self.gamma = nn.Parameter(torch.zeros(1, **dd))
        for module in self.children():
            nn.init.kaiming_uniform_(module.weight, a=1)  # type: ignore[union-attr]
        nn.init.zeros_(self.proj_conv.bias)
        for bias in (self.appr_bias, self.geom_bias):
            if bias is not None:
                nn.init.uniform_(bias, -((2 * self.head_dim) ** -0.5), (2 * self.head_dim) ** -0.5)

    def forward(self, x: Float[Tensor, "b channels h w"], *, return_weights: bool = False) -> Float[Tensor, "b channels h w"] | tuple[Tensor, Tensor]:
        """Returns the map, or that and the weights (B, M, N, K), (B, M, 1, K) where all queries have the same."""
        check_map(x, self.channels)
        update = self._same(x) if self.shared else self._separable(x) if self.separable else self._general(x)
        if self.q_stride > 1 and not self.shared:
            update = F.interpolate(update, size=x.shape[2:], mode="bilinear", align_corners=False)
        out = torch.addcmul(x, update, self.gamma[:, None, None])
        return (out, self.weights(x)) if return_weights else out

    def weights(self, x: Float[Tensor, "b channels h w"], *, queries: Tensor | None = None) -> Tensor:
        """The weights of R chosen positions alone, (B, M, R, K); of all if None."""
        check_map(x, self.channels)
        asked, key, _ = self._embed(x)
        if self.shared:
            return key.flatten(1, 2).permute(0, 2, 3, 1).softmax(-1, at_least_float32(x)).to(x.dtype)
        rows, columns = self._axes(x)
        i, j = rows.queries(x.device), columns.queries(x.device)
        if queries is None:
            asked, i, j = asked.flatten(1, 2), i.repeat_interleave(columns.n), j.repeat(rows.n)
        else:
            asked, i, j = asked.flatten(1, 2)[:, queries], queries // columns.n, queries % columns.n
        content, asking = self._two(asked[:, None])
        row = self._table(self.appr_geom_fc_y, rows, i, rows.keys(x.device).expand(i.shape[0], -1), asking)
        column = self._table(self.appr_geom_fc_x, columns, j, columns.keys(x.device).expand(j.shape[0], -1), asking)
        heads = (t.flatten(1, 2).transpose(1, 2) for t in (content, key, row, column))
        return separable_weights(*heads)

    def _general(self, x: Tensor) -> Tensor:
        rows, columns = self._axes(x, self.block)
        asked, key, value = self._embed(x)
        if self.places == 2 and not self.block:
            return self._project(self._everywhere(asked, key, value, rows, columns))
        queries, keys = (rows.length, columns.length), (rows.span, columns.span)
        content, asking = self._two(columns.cut_queries(rows.cut_queries(asked, 1), 2))
        q = to_blocks(content, rows, columns, queries)
        k, v = (to_blocks(columns.cut_keys(rows.cut_keys(t, 1), 2), rows, columns, keys) for t in (key, value))
        if self.places or self.block:
            tables = self._tables(rows, columns, asking)
            y = separable_attention(q, k, v, *(to_blocks(t, rows, columns, queries) for t in tables))
        else:
            y = attend(q, k, v, scale=1.0)
        return self._project(from_blocks(y, rows, columns))

    def _everywhere(self, asked: Tensor, key: Tensor, value: Tensor, rows: Axis, columns: Axis) -> Tensor:
        """(B, h, w, M, d). Scores of all rows and columns of keys for all heads would be larger than all else, so heads come in turn."""

        def core(q: Tensor, k: Tensor, v: Tensor, asking: Tensor, of_rows: Tensor, of_columns: Tensor) -> Tensor:
            with full_precision(asking):
                at = asking.unflatten(2, (rows.n, columns.n))
                row, column = torch.einsum("bmijd,misd->bmijs", at, of_rows[0]), torch.einsum("bmijd,mjsd->bmijs", at, of_columns[0])
                return separable_attention(q, k, v, row.flatten(2, 3), column.flatten(2, 3))

        content, asking = self._two(asked)
        q, k, v, asking = (t.flatten(1, 2).transpose(1, 2) for t in (content, key, value, asking.to(at_least_float32(asked))))
        with full_precision(asked):
            relative = (
                self._relative(fc, axis, axis.queries(q.device), axis.keys(q.device), asking).permute(2, 0, 1, 3)[None]
                for fc, axis in ((self.appr_geom_fc_y, rows), (self.appr_geom_fc_x, columns))
            )
            y = blockwise(core, q, k, v, asking, *relative, floats=2 * q.shape[2] * (rows.m + columns.m))
        return y.transpose(1, 2).unflatten(1, (rows.n, columns.n))

    def _same(self, x: Tensor) -> Tensor:
        """Every query has the same weights: one vector, found before any projection of the keys."""
        keys, given = x[:, :, :: self.kv_stride, :: self.kv_stride].flatten(2), x.dtype
        scores = project_columns(keys, self._key_weight())
        with full_precision(x):
            wide = at_least_float32(scores)
            gathered = torch.bmm(scores.to(wide).softmax(-1), keys.to(wide).mT).to(given)
        y = torch.einsum("bmc,mdc->bmd", gathered, self.value_conv.weight.unflatten(0, (self.num_heads, -1)))
        return self.proj_conv(y.flatten(1))[:, :, None, None]

    def _separable(self, x: Tensor) -> Tensor:
        """Weights by position alone are row weights times column weights."""
        rows, columns = self._axes(x)
        _, _, value = self._embed(x)
        by_row, by_column = (
            self._table(fc, axis, axis.queries(x.device), axis.keys(x.device).expand(axis.n, -1), x.new_empty(1, 1, 1, 0, 0))[0, 0]
            .softmax(-1)
            .to(value.dtype)
            for fc, axis in ((self.appr_geom_fc_y, rows), (self.appr_geom_fc_x, columns))
        )
        y = torch.einsum("jmb,xabmd->xajmd", by_column, value)
        return self._project(torch.einsum("ima,xajmd->xijmd", by_row, y))

    def _axes(self, x: Tensor, block: int = 0) -> tuple[Axis, Axis]:
        s, t, reach = self.q_stride, self.kv_stride, self.spatial_range
        whole = (Axis(-(-n // s), -(-n // t), t, reach) for n in x.shape[2:])
        rows, columns = (replace(axis, block=block) if self.span < axis.m else axis for axis in whole)  # no window reads more than there is
        return rows, columns

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What queries ask (B, h, w, M, d), or nothing (d = 0); keys (B, h', w', M, key_width); values (B, h', w', M, d)."""
        q, k = (x[:, :, ::stride, ::stride] for stride in (self.q_stride, self.kv_stride))
        asked = x.new_empty(x.shape[0], *q.shape[2:], self.num_heads, 0)
        if self.query_conv is not None:
            asked = project_rows(flatten_space(q), self.query_conv.weight).unflatten(1, q.shape[2:]).unflatten(-1, (self.num_heads, -1))
        weight = torch.cat((self._key_weight(), self.value_conv.weight))
        both = project_rows(flatten_space(k), weight).unflatten(1, k.shape[2:])
        key, value = both.tensor_split((self.key_width * self.num_heads,), -1)
        return asked, key.unflatten(-1, (self.num_heads, self.key_width)), value.unflatten(-1, (self.num_heads, -1))

    def _key_weight(self) -> Tensor:
        """Of the key content, (M key_width, C); E3 without E1 is one number of a key, u_m . W_k x."""
        if self.key_conv is None:
            return self.value_conv.weight[:0]
        if not self.folds or self.appr_bias is None:
            return self.key_conv.weight
        return torch.einsum("md,mdc->mc", self.appr_bias.unflatten(0, (self.num_heads, -1)), self.key_conv.weight.unflatten(0, (self.num_heads, -1)))

    def _two(self, asked: Tensor) -> tuple[Tensor, Tensor]:
        """The queries that meet the keys' content, (..., M, key_width), and those that meet positions, (..., M, d)."""
        content = asked.new_ones(1).expand(*asked.shape[:-1], 1) if self.folds else asked[..., : self.key_width]
        if self.appr_bias is not None and not self.folds:
            content = content + self.appr_bias.unflatten(0, (self.num_heads, -1))
        if self.places == 2 and self.geom_bias is not None:
            return content, asked + self.geom_bias.unflatten(0, (self.num_heads, -1))
        return content, asked

    def _tables(self, rows: Axis, columns: Axis, asking: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the rows and columns of keys, (B, rows, columns, M, span) each."""
        keys = (axis.keys(asking.device).repeat_interleave(axis.length, 0) for axis in (rows, columns))
        row = self._table(self.appr_geom_fc_y, rows, rows.queries(asking.device), next(keys), asking.transpose(1, 2)).transpose(1, 2)
        return row, self._table(self.appr_geom_fc_x, columns, columns.queries(asking.device), next(keys), asking)

    def _table(self, fc: nn.Linear | None, axis: Axis, queries: Tensor, keys: Tensor, asking: Tensor) -> Tensor:
        """Scores of key positions (n, S) for query positions (n): (B, L, n, M, S) of asking (B, L, n, M, d); finite where a key is not allowed."""
        dtype = at_least_float32(asking)
        table = asking.new_zeros(1, 1, dtype=dtype)
        with full_precision(asking):
            if fc is not None and self.places == 1 and self.geom_bias is not None:
                fixed = torch.einsum("md,mdp->mp", *(t.to(dtype).unflatten(0, (self.num_heads, -1)) for t in (self.geom_bias, fc.weight)))
                table = (self._embedded(axis, queries, keys, dtype) @ fixed.mT).transpose(1, 2)
            elif fc is not None:
                table = torch.einsum("blnmd,nsmd->blnms", asking.to(dtype), self._relative(fc, axis, queries, keys, asking))
            allowed = axis.allows(queries[:, None], keys)[:, None]
            table = table.masked_fill(~allowed, torch.finfo(dtype).min / 4)
        return table.expand(*asking.shape[:2], -1, self.num_heads, -1)

    def _relative(self, fc: Any, axis: Axis, queries: Tensor, keys: Tensor, like: Tensor) -> Tensor:
        """What queries meet of one axis of R, (n, S, M, d)."""
        dtype = at_least_float32(like)
        return (self._embedded(axis, queries, keys, dtype) @ fc.weight.to(dtype).mT).unflatten(-1, (self.num_heads, -1))

    def _embedded(self, axis: Axis, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """emb / sqrt(2) of the distances, (n, S, P / 2)."""
        f = torch.arange(self.position_dim // 4, device=queries.device, dtype=dtype)
        far = (queries[:, None] * self.q_stride - keys * self.kv_stride).to(dtype) * self.position_magnitude
        angle = far[..., None] / 1000 ** (4 * f / self.position_dim)
        return torch.cat((angle.sin(), angle.cos()), -1) * 0.5**0.5

    def _project(self, y: Tensor) -> Tensor:
        """(B, h, w, M, d) to the map (B, C, h, w)."""
        columns = y.flatten(1, 2).permute(0, 2, 3, 1).flatten(1, 2)
        return project_columns(columns, self.proj_conv.weight, self.proj_conv.bias).unflatten(2, y.shape[1:3])
