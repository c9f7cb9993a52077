r"""Multi-head attention: every query takes a softmax-weighted mean of all values it may see.

    S = scale q k^T + bias,   W = softmax_M(S) over the allowed keys,   out = (W v) Wo^T + bo,   scale = d^-1/2

Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin, "Attention Is All You Need", NeurIPS 2017. arXiv:1706.03762.
B batch, N queries, M keys, D dim, E context_dim, H heads, G key-value heads, d head width. Not in the paper: grouped heads (arXiv:2305.13245),
normed queries and keys, rotary and relative positions; a query with no allowed key gets zeros before the output projection.
"""

from typing import Any, ClassVar, Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, fused
from ...ops.softmax_attention import attend, attention_weights, causal_mask, combine_masks, rows_of
from ...parts.heads import checked_source, head_width, init_projections_, merge_heads, split_heads
from ...parts.linear import Linear
from ...parts.positions import RelativeBias, position_bias, rotate
from ...validate import check_bool, check_broadcastable, check_divisible, check_floating

IN_PROJ_BIAS = fused("in_proj_bias", [f"{n}_proj.bias" for n in "qkv"])


class MultiHeadAttention(Mechanism):
    """Args:
    dim: width of the input and the output.
    num_heads, head_dim: number of heads and width of each; head_dim=None means dim // num_heads.
    context_dim: width of `context`; dim if None.
    num_kv_heads: heads of keys and values, each shared by num_heads // num_kv_heads query heads; num_heads if None.
    qkv_bias, out_bias: biases of the projections.
    dropout: probability of dropping a weight in training.
    causal: key j is seen by query i if j <= i + M - N, so one new query sees a whole cache of keys.
    scale: factor of the scores; head_dim ** -0.5 if None.
    qk_norm: RMSNorm on every query and key head vector.
    rope, rope_dim, rope_base, rope_interleaved: rotary positions on the first rope_dim channels of each head.
    alibi: bias of minus slope times distance.
    rel_pos_bias: None, "t5" (num_buckets, max_distance) or "toeplitz" (max_len).
    """

    card: ClassVar = Card(
        id="multi_head",
        layout="sequence",
        paper=Paper(
            title="Attention Is All You Need",
            authors="Ashish Vaswani, Noam Shazeer, Niki Parmar, Jakob Uszkoreit, Llion Jones, Aidan N. Gomez, Lukasz Kaiser, Illia Polosukhin",
            venue="NeurIPS",
            year=2017,
            arxiv="1706.03762",
        ),
        source="PyTorch nn.MultiheadAttention 2.13 (BSD-3)",
        summary="Exact softmax attention over all pairs, in several heads.",
        when="The baseline: up to a few thousand positions, or whenever exact per-pair weights matter.",
        flops="2*B*N*dim*num_heads*head_dim*2 + 2*B*M*context_dim*num_kv_heads*head_dim*2 + 4*B*num_heads*N*M*head_dim",
        grows={"N": 2.0},
        can=frozenset({"causal", "cross", "key_mask", "attn_mask", "weights", "rows", "row_stochastic", "qkv_core", "permutation_equivariant"}),
        checked_against="public",
        uncertain="Grouped heads, rotary and relative positions were checked against the equations alone.",
        example={"dim": 32, "num_heads": 4},
        unless={"permutation_equivariant": "rope or alibi or rel_pos_bias"},
        variants=({"dim": 24, "num_heads": 4, "num_kv_heads": 2, "rope": True, "causal": True}, {"dim": 24, "num_heads": 3, "rel_pos_bias": "t5"}),
    )
    official: ClassVar = (
        KeyMap("torch.nn.MultiheadAttention", (fused("in_proj_weight", [f"{n}_proj.weight" for n in "qkv"]), IN_PROJ_BIAS)),
        KeyMap("torch.nn.MultiheadAttention with kdim", (*(fused(f"{n}_proj_weight", [f"{n}_proj.weight"]) for n in "qkv"), IN_PROJ_BIAS)),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        *,
        context_dim: int | None = None,
        num_kv_heads: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        scale: float | None = None,
        qk_norm: bool = False,
        rope: bool = False,
        rope_dim: int | None = None,
        rope_base: float = 10000.0,
        rope_interleaved: bool = False,
        alibi: bool = False,
        rel_pos_bias: Literal["t5", "toeplitz"] | None = None,
        max_len: int | None = None,
        num_buckets: int = 32,
        max_distance: int = 128,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_width(dim, num_heads, head_dim)
        self.context_dim = dim if context_dim is None else context_dim
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_divisible(num_heads, self.num_kv_heads, "num_heads", "num_kv_heads")
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        self.dropout, self.causal, self.qkv_bias, self.out_bias, self.qk_norm = dropout, causal, qkv_bias, out_bias, qk_norm
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.rope, self.rope_dim = rope, self.head_dim if rope_dim is None else rope_dim
        self.rope_base, self.rope_interleaved, self.alibi = rope_base, rope_interleaved, alibi
        fits = 0 < self.rope_dim <= self.head_dim and self.rope_dim % 2 == 0
        require(not rope or fits, "rope_dim={} must be even and at most head_dim={}", self.rope_dim, self.head_dim)
        self.max_len, self.num_buckets, self.max_distance = max_len, num_buckets, max_distance
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        width, kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(dim, width, qkv_bias, **dd)
        self.k_proj = Linear(self.context_dim, kv_width, qkv_bias, **dd)
        self.v_proj = Linear(self.context_dim, kv_width, qkv_bias, **dd)
        self.out_proj = Linear(width, dim, out_bias, **dd)
        init_projections_(self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        self.q_norm = nn.RMSNorm(self.head_dim, 1e-6, **dd) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, 1e-6, **dd) if qk_norm else nn.Identity()
        relative = (num_heads, not causal, max_len, num_buckets, max_distance)
        self.rel_pos_bias = RelativeBias(rel_pos_bias, *relative, **dd) if rel_pos_bias else None

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        context: Float[Tensor, "b m context_dim"] | None = None,
        *,
        key_mask: Bool[Tensor, "b m"] | None = None,
        attn_mask: Bool[Tensor, "#b #h n m"] | None = None,
        attn_bias: Float[Tensor, "#b #h n m"] | None = None,
        positions: Tensor | None = None,
        context_positions: Tensor | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n dim"] | tuple[Tensor, Tensor]:
        """Attend from `x` to `context` (to `x` itself if None). Returns (B, N, dim), or that and the weights (B, H, N, M)."""
        given = {"key_mask": key_mask, "attn_mask": attn_mask, "attn_bias": attn_bias, "positions": positions, "context_positions": context_positions}
        q, k, source, options = self._scores(x, context, None, **given)
        out = attend(q, k, split_heads(self.v_proj(source), self.num_kv_heads), dropout=self.dropout if self.training else 0.0, **options)
        out = self.out_proj(merge_heads(out))
        return (out, attention_weights(q, k, **options)) if return_weights else out

    def weights(self, x: Tensor, context: Tensor | None = None, *, queries: Tensor | None = None, **given: Tensor | None) -> Tensor:
        """The weights of R chosen positions of `x` alone, (B, H, R, M), of all if None; `given` are the masks and positions that forward takes."""
        q, k, _, options = self._scores(x, context, queries, **given)
        return attention_weights(q, k, **options)

    def _scores(
        self,
        x: Tensor,
        context: Tensor | None,
        queries: Tensor | None,
        *,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        positions: Tensor | None = None,
        context_positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Queries, keys, what they are made of, and how they are scored; for chosen rows of `x` if `queries` is given."""
        source = checked_source(x, context, self.dim, self.context_dim, key_mask)
        (b, n, _), m = x.shape, source.shape[1]
        if attn_mask is not None:
            check_bool(attn_mask, "attn_mask")
            check_broadcastable(attn_mask, (b, self.num_heads, n, m), "attn_mask")
        if attn_bias is not None:
            check_floating(attn_bias, "attn_bias")
            check_broadcastable(attn_bias, (b, self.num_heads, n, m), "attn_bias")
        q = self.q_norm(split_heads(self.q_proj(x if queries is None else x[:, queries]), self.num_heads))
        k = self.k_norm(split_heads(self.k_proj(source), self.num_kv_heads))
        if self.rope:
            kind = (self.rope_dim, self.rope_base, self.rope_interleaved)
            own = queries if positions is None else positions if queries is None else positions[..., queries]
            q = rotate(q, own, "positions", *kind)
            k = rotate(k, positions if context is None else context_positions, "context_positions", *kind)
        mask = combine_masks(key_mask[:, None, None] if key_mask is not None else None, rows_of(attn_mask, queries))
        causal = self.causal and queries is None
        if self.causal and queries is not None:
            mask = combine_masks(mask, causal_mask(n, m, x.device, queries))
        heads, like = self.num_heads if self.alibi else 0, self.q_proj.weight
        bias = position_bias(n, m, rows_of(attn_bias, queries), heads, self.rel_pos_bias, like, queries)
        return q, k, source, {"scale": self.scale, "mask": mask, "bias": bias, "causal": causal}

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """The core alone, on (B, H, N, d)."""
        return attend(q, k, v, mask=key_mask[:, None, None] if key_mask is not None else None, causal=causal)
