"""Softmax attention within a sequence over the pairs of a pattern: what mechanisms that differ in the pattern alone share."""

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import require
from ..ops.softmax_attention.patterns import Pattern, sparse_attend, sparse_weights
from ..validate import check_bool, check_broadcastable, check_mask, check_tokens
from .heads import head_width, merge_heads, split_heads
from .linear import Linear


class PatternAttention(nn.Module):
    """Projections, and attention over the pairs that `allowed` and the masks allow.

    Args:
        dim, num_heads, head_dim, qkv_bias, out_bias: of the projections; head_dim=None means dim // num_heads.
        allowed: the pattern.
        dropout: probability of dropping a weight in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None,
        allowed: Pattern,
        *,
        qkv_bias: bool,
        out_bias: bool,
        dropout: float,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_width(dim, num_heads, head_dim)
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        self.allowed, self.qkv_bias, self.out_bias, self.dropout = allowed, qkv_bias, out_bias, dropout
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        width = num_heads * self.head_dim
        self.q_proj = Linear(dim, width, qkv_bias, **dd)
        self.k_proj = Linear(dim, width, qkv_bias, **dd)
        self.v_proj = Linear(dim, width, qkv_bias, **dd)
        self.out_proj = Linear(width, dim, out_bias, **dd)

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        context: None = None,
        *,
        key_mask: Bool[Tensor, "b n"] | None = None,
        attn_mask: Bool[Tensor, "#b #h n n"] | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n dim"] | tuple[Tensor, Tensor]:
        """Attend within `x`, over the pairs that the pattern and the masks allow.

        Returns (B, N, dim), or that and the weights, dense, (B, H, N, N).
        """
        self._check(x, context, key_mask, attn_mask)
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        dropout = self.dropout if self.training else 0.0
        out = sparse_attend(q, k, v, self.allowed, dropout=dropout, key_mask=key_mask, attn_mask=attn_mask)
        out = self.out_proj(merge_heads(out))
        return (out, self.weights(x, key_mask=key_mask, attn_mask=attn_mask)) if return_weights else out

    def weights(
        self,
        x: Tensor,
        context: None = None,
        *,
        queries: Tensor | None = None,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Float[Tensor, "b h r n"]:
        """The weights of R chosen positions alone, dense; of all if None."""
        self._check(x, context, key_mask, attn_mask)
        q = split_heads(self.q_proj(x if queries is None else x[:, queries]), self.num_heads)
        k = split_heads(self.k_proj(x), self.num_heads)
        return sparse_weights(q, k, self.allowed, queries=queries, key_mask=key_mask, attn_mask=attn_mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """The core alone, on (B, H, N, d), causal as the pattern is."""
        return sparse_attend(q, k, v, self.allowed, key_mask=key_mask)

    def _check(self, x: Tensor, context: None, key_mask: Tensor | None, attn_mask: Tensor | None) -> None:
        require(context is None, "{} attends within x: it takes no context", type(self).__name__)
        check_tokens(x, self.dim)
        b, n, _ = x.shape
        check_mask(key_mask, b, n)
        if attn_mask is not None:
            check_bool(attn_mask, "attn_mask")
            check_broadcastable(attn_mask, (b, self.num_heads, n, n), "attn_mask")
