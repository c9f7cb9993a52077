r"""Efficient attention: queries softmaxed over channels, keys over positions, so that K^T V is formed first and the pairs never.

    softmax: out = rho_q(Q) (rho_k(K)^T V), rho_q = softmax over the dk channels of a query, rho_k = softmax over the M positions of a channel
    scaling: out = Q (K^T V) / M            causal: the softmax of query t runs over the positions up to t

Shen, Zhang, Zhao, Yi, Li, "Efficient Attention: Attention with Linear Complexities", WACV 2021, arXiv:1812.01243. Heads as in the authors' code (not
in the paper): contiguous blocks of channels. Not in theirs: tokens, masks, cross attention, the causal form. The output projection is multiplied into
the (dk, dv) contexts first. B batch, N queries, M keys, C width, H heads, dk = key width / H, dv = value width / H.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, pointwise
from ...ops.linear_attention import (
    blockwise,
    effective_weights,
    full_precision,
    linear_attention,
    prefix_softmax_attention,
    prefix_softmax_weights,
)
from ...ops.linear_attention.streaming import EfficientState, efficient_start, efficient_step
from ...parts.gates import INITS
from ...parts.heads import check_position, check_streaming, checked_source, merge_heads, split_heads
from ...parts.linear import Linear
from ...parts.norm import zero_init_
from ...validate import check_divisible, check_map, check_option

LAYERS = ("keys", "queries", "values", "reprojection")


class EfficientAttention(Mechanism):
    """`EfficientAttention(channels=64)` works on maps, `EfficientAttention(dim=64)` on tokens.

    Args:
        layout: "map" or "sequence"; None takes it from whether `channels` or `dim` is given.
        channels, key_channels, value_channels: widths of a map, of its keys and of its values; channels if None.
        dim, key_dim, value_dim: the same for tokens.
        num_heads: 1 for maps and 8 for tokens if None.
        normalization: "softmax" or "scaling".
        residual: add the input; True for maps and False for tokens if None.
        causal: query t sees keys up to t; tokens and "softmax" only.
        dropout: probability of dropping an output channel in training.
    init: "identity" starts as the identity: the last layer at zero, beside the residual.
    """

    card: ClassVar = Card(
        id="efficient",
        layout="sequence",
        also=("map",),
        paper=Paper(
            title="Efficient Attention: Attention with Linear Complexities",
            authors="Zhuoran Shen, Mingyuan Zhang, Haiyu Zhao, Shuai Yi, Hongsheng Li",
            venue="WACV",
            year=2021,
            arxiv="1812.01243",
        ),
        source="cmsflash/efficient-attention (MIT)",
        summary="Two softmaxes, over channels and over positions, let the product be taken right to left.",
        when="Large maps and long sequences where no query needs to single out one position.",
        flops="2*B*width*(N*key_width + M*(key_width + value_width)) + (2*B*N*value_width*width"
        " + 2*B*num_heads*ceil(N/64)*64*(8*value_head + 28*(key_head + value_head) + 2*key_head*value_head) if causal"
        " else 2*B*key_width*(M*value_head + value_head*width + N*width))",
        grows={"N": 1.0},
        can=frozenset({"causal", "cross", "key_mask", "weights", "rows", "linear", "step", "qkv_core", "permutation_equivariant", "identity_start"}),
        unless={
            "causal": "layout == 'map' or normalization == 'scaling'",
            "cross": "layout == 'map' or causal",
            "key_mask": "layout == 'map'",
            "step": "not causal",
            "qkv_core": "layout == 'map'",
            "identity_start": "not residual",
        },
        checked_against="authors",
        uncertain="The code computes several heads, the paper one; masks, cross and causal forms are not in either.",
        example={"dim": 32, "num_heads": 4},
        variants=(
            {"channels": 16, "key_channels": 8, "value_channels": 24, "num_heads": 2, "layout": "map"},
            {"dim": 24, "key_dim": 16, "value_dim": 32, "num_heads": 2, "causal": True},
            {"dim": 24, "num_heads": 3, "normalization": "scaling", "residual": True},
        ),
        place="C",
    )
    official: ClassVar = (KeyMap("cmsflash/efficient-attention", tuple(pointwise(f"{n}.weight", f"{n}.weight", 2) for n in LAYERS)),)

    def __init__(
        self,
        layout: Literal["map", "sequence"] | None = None,
        channels: int | None = None,
        key_channels: int | None = None,
        value_channels: int | None = None,
        *,
        dim: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        num_heads: int | None = None,
        normalization: Literal["softmax", "scaling"] = "softmax",
        residual: bool | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        given = {"map": (channels, key_channels, value_channels), "sequence": (dim, key_dim, value_dim)}
        require(layout in (None, *given), "layout={!r} is not 'map' or 'sequence'; for a width say channels= (maps) or dim= (tokens)", layout)
        self.layout = layout or ("map" if channels is not None else "sequence")
        other = given["sequence" if self.layout == "map" else "map"]
        require(other == (None,) * 3, "layout={!r} got the widths {} of the other layout: channels are of maps, dim of tokens", self.layout, other)
        width, key_width, value_width = given[self.layout]
        require(width is not None, "efficient needs channels=... (maps) or dim=... (tokens), got channels={} and dim={}", channels, dim)
        assert width is not None
        self.width, self.key_width, self.value_width = width, key_width or width, value_width or width
        self.channels, self.key_channels, self.value_channels = channels, key_channels, value_channels
        self.dim, self.key_dim, self.value_dim = dim, key_dim, value_dim
        self.num_heads = (1 if self.layout == "map" else 8) if num_heads is None else num_heads
        check_divisible(self.key_width, self.num_heads, "key width", "num_heads")
        check_divisible(self.value_width, self.num_heads, "value width", "num_heads")
        check_option(normalization, ("softmax", "scaling"), "normalization")
        require(not causal or (self.layout == "sequence" and normalization == "softmax"), "causal=True needs tokens and normalization='softmax'")
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        self.key_head, self.value_head = self.key_width // self.num_heads, self.value_width // self.num_heads
        self.normalization, self.causal, self.dropout = normalization, causal, dropout
        self.residual = self.layout == "map" if residual is None else residual
        self.queries = Linear(width, self.key_width, device=device, dtype=dtype)
        self.keys = Linear(width, self.key_width, device=device, dtype=dtype)
        self.values = Linear(width, self.value_width, device=device, dtype=dtype)
        self.reprojection = Linear(self.value_width, width, device=device, dtype=dtype)
        check_option(init, INITS, "init")
        require(init == "default" or self.residual, "init='identity' needs residual=True, beside which the last layer starts at zero")
        self.init = init
        if init == "identity":
            zero_init_(self.reprojection)

    def forward(
        self,
        x: Float[Tensor, "b ..."],
        context: Float[Tensor, "b m dim"] | None = None,
        *,
        key_mask: Bool[Tensor, "b m"] | None = None,
        attn_mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b ..."] | tuple[Tensor, Tensor]:
        """Maps: x (B, C, *space), one to three axes. Tokens: x (B, N, C) attends to `context` (B, M, C), or to itself.

        Returns the shape of `x`; or that and the implied weights (B, H, N, M), for inspection.
        """
        require(attn_mask is None, "efficient never forms the pairs that attn_mask={} would hide; use key_mask or causal=True", "...")
        source = self._checked(x, context, key_mask)
        if self.layout == "map":
            rows = x.flatten(2)
            if x.stride(1) == 1 and self.width > 1:  # channels_last: pixels are tokens already
                out = self._tokens(rows.mT, rows, None).mT.unflatten(2, x.shape[2:])
            else:
                q = self._queries(_rows(self.queries, rows).unflatten(1, (self.num_heads, -1)), 2).flatten(1, 2)
                out = torch.baddbmm(self.reprojection.bias.unsqueeze(-1), self._folded(rows, None).mT, q.to(x.dtype)).view(x.shape)
        else:
            out = self._causal(x, key_mask) if self.causal else self._tokens(x, source.mT, key_mask)
        out = F.dropout(out, self.dropout, self.training)
        out = out + x if self.residual else out
        return (out, self.weights(x, context, key_mask=key_mask)) if return_weights else out

    def weights(
        self, x: Tensor, context: Tensor | None = None, *, queries: Tensor | None = None, key_mask: Tensor | None = None
    ) -> Float[Tensor, "b h r m"]:
        """What multiplies the values for R chosen positions alone (row-major on a map); for all if None."""
        source = self._checked(x, context, key_mask)
        x, source = (t.flatten(2).mT if self.layout == "map" else t for t in (x, source))
        q = split_heads(self.queries(x if queries is None else x[:, queries]), self.num_heads)
        k = split_heads(self.keys(source), self.num_heads)
        if self.causal:
            with full_precision(q):
                rows = prefix_softmax_weights(self._queries(q, 3), k, queries, mask=None if key_mask is None else key_mask[:, None])
        else:
            rows = effective_weights(self._queries(q, 3), self._keys(k, 2, None if key_mask is None else key_mask[:, None, :, None]))
        return rows.to(q.dtype)

    def _checked(self, x: Tensor, context: Tensor | None, key_mask: Tensor | None) -> Tensor:
        """What `x` attends to."""
        if self.layout == "map":
            check_map(x, self.width, None)
            require(context is None and key_mask is None, "layout='map' takes no context and no key_mask; use layout='sequence'")
            return x
        require(not self.causal or context is None, "efficient with causal=True reads x alone; context={} cannot be given", "...")
        return checked_source(x, context, self.width, self.width, key_mask)

    def _tokens(self, x: Tensor, rows: Tensor, key_mask: Tensor | None) -> Tensor:
        """Queries (B, N, C), keys and values from (B, C, M) -> (B, N, C)."""
        q = self._queries(self.queries(x).unflatten(2, (self.num_heads, -1)), 3).flatten(2)
        return torch.baddbmm(self.reprojection.bias, q.to(x.dtype), self._folded(rows, key_mask))

    def _folded(self, rows: Tensor, key_mask: Tensor | None) -> Tensor:
        """What each key channel passes on, through the output projection: (B, C, M) -> (B, key width, C).

        Keys and values are made as rows, (B, width, M): the softmax then runs along memory, and K^T V needs no copy.
        """
        k, v = (_rows(f, rows).unflatten(1, (self.num_heads, -1)) for f in (self.keys, self.values))
        mask = None if key_mask is None else key_mask[:, None, None]
        with full_precision(rows):
            v = v.to(torch.promote_types(v.dtype, torch.float32))
            context = self._keys(k, 3, mask) @ (v if mask is None else v.masked_fill(~mask, 0.0)).mT
            out = self.reprojection.weight.to(context.dtype).mT.unflatten(0, (self.num_heads, -1))
            return (context @ out).flatten(1, 2).to(rows.dtype)

    def _queries(self, q: Tensor, channels: int) -> Tensor:
        q = q.to(torch.promote_types(q.dtype, torch.float32))
        return q.softmax(channels) if self.normalization == "softmax" else q

    def _keys(self, k: Tensor, positions: int, mask: Tensor | None) -> Tensor:
        """Softmax over the positions that count, or the division by their number that "scaling" asks of queries and keys together."""
        k = k.to(torch.promote_types(k.dtype, torch.float32))
        if self.normalization == "softmax":
            return (k if mask is None else k.masked_fill(~mask, torch.finfo(k.dtype).min)).softmax(positions)
        return k / k.shape[positions] if mask is None else k.masked_fill(~mask, 0.0) / mask.sum(positions, keepdim=True).clamp_min(1)

    def _causal(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        q, k, v = (split_heads(f(x), self.num_heads) for f in (self.queries, self.keys, self.values))
        return self.reprojection(merge_heads(self.attend(q, k, v, key_mask=key_mask)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, causal: bool | None = None) -> Tensor:
        """The core alone, on (B, H, N, d)."""
        if not (self.causal if causal is None else causal):
            with full_precision(q):
                mask = None if key_mask is None else key_mask[:, None]
                k = self._keys(k, 2, None if mask is None else mask.unsqueeze(-1))
                return linear_attention(self._queries(q, 3), k, v, mask=mask)

        def core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            with full_precision(q):
                return prefix_softmax_attention(self._queries(q, 3), k, v, mask=mask)

        floats = 4 * q.shape[2] * (8 * q.shape[3] + v.shape[3])
        return blockwise(core, q, k, v, None if key_mask is None else key_mask[:, None], floats=floats)

    def init_state(self, batch: int) -> EfficientState:
        """The state before the first position of `batch` sequences; step by step needs causal=True."""
        check_streaming(self.causal, "efficient")
        return efficient_start(batch, self.num_heads, self.key_head, self.value_head, self.keys.weight)

    def step(self, x: Float[Tensor, "b dim"], state: EfficientState) -> tuple[Float[Tensor, "b dim"], EfficientState]:
        """One more position: its output and the new state."""
        check_position(x, self.width)
        q, k, v = (f(x).unflatten(1, (self.num_heads, -1)) for f in (self.queries, self.keys, self.values))
        out, state = efficient_step(q, k, v, state)
        out = self.reprojection(out.flatten(1).to(x.dtype))
        return (out + x if self.residual else out), state


def _rows(layer: nn.Linear, rows: Tensor) -> Tensor:
    """(B, in, M) -> (B, out, M) in memory order; as a linear layer it would come out transposed."""
    if rows.is_contiguous():
        return F.conv1d(rows, layer.weight.unsqueeze(-1), layer.bias)
    return torch.baddbmm(layer.bias.unsqueeze(-1), layer.weight.expand(rows.shape[0], -1, -1), rows)
