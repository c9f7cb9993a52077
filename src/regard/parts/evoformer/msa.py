"""Attention over an alignment: along each sequence (algorithm 7), along each column (8), and along columns from one query a column (19)."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...ops.shared_bias_attention import row_attention, row_weights
from .checks import check_msa, check_pair, check_widths
from .layers import GatedAttention, linear


class MSARowAttention(nn.Module):
    """Each sequence attends over its residues; the pairs of residues add a bias to the scores, the same for all sequences."""

    def __init__(self, msa_dim: int, pair_dim: int, head_dim: int = 32, num_heads: int = 8, **dd: Any) -> None:
        super().__init__()
        check_widths(msa_dim=msa_dim, pair_dim=pair_dim, head_dim=head_dim, num_heads=num_heads)
        self.msa_dim, self.pair_dim, self.num_heads = msa_dim, pair_dim, num_heads
        self.layer_norm_m, self.layer_norm_z = nn.LayerNorm(msa_dim, **dd), nn.LayerNorm(pair_dim, **dd)
        self.linear_z = linear(pair_dim, num_heads, "normal", False, **dd)
        self.mha = GatedAttention(msa_dim, head_dim, num_heads, **dd)

    def forward(
        self, msa: Float[Tensor, "b s n m"], pair: Float[Tensor, "b n n z"], msa_mask: Bool[Tensor, "b s n"] | None = None
    ) -> Float[Tensor, "b s n m"]:
        m, bias = self._scored(msa, pair, msa_mask)
        return row_attention(m, *self.mha.operands, self.num_heads, bias=bias, mask=msa_mask)

    def weights(self, msa: Tensor, pair: Tensor, msa_mask: Tensor | None = None, *, queries: Tensor | None = None) -> Tensor:
        """(B, S, H, N, N); for chosen residues, (B, S, H, chosen, N)."""
        m, bias = self._scored(msa, pair, msa_mask)
        q, k, *_ = self.mha.operands
        return row_weights(m, q, k, self.num_heads, bias=bias, mask=msa_mask, queries=queries)

    def _scored(self, msa: Tensor, pair: Tensor, msa_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        check_msa(msa, self.msa_dim, msa_mask)
        check_pair(pair, self.pair_dim, like=("msa", msa, 2))
        return self.layer_norm_m(msa), self.linear_z(self.layer_norm_z(pair)).movedim(3, 1)


class MSAColumnAttention(nn.Module):
    """Each residue's column attends over the sequences."""

    def __init__(self, msa_dim: int, head_dim: int = 32, num_heads: int = 8, **dd: Any) -> None:
        super().__init__()
        check_widths(msa_dim=msa_dim, head_dim=head_dim, num_heads=num_heads)
        self.msa_dim, self.num_heads = msa_dim, num_heads
        self._msa_att: Any = nn.Module()
        self._msa_att.layer_norm_m = nn.LayerNorm(msa_dim, **dd)
        self._msa_att.mha = GatedAttention(msa_dim, head_dim, num_heads, **dd)

    def forward(self, msa: Float[Tensor, "b s n m"], msa_mask: Bool[Tensor, "b s n"] | None = None) -> Float[Tensor, "b s n m"]:
        m, mask = self._turned(msa, msa_mask)
        mha: GatedAttention = self._msa_att.mha
        return row_attention(m, *mha.operands, self.num_heads, mask=mask).transpose(1, 2)

    def weights(self, msa: Tensor, msa_mask: Tensor | None = None, *, queries: Tensor | None = None) -> Tensor:
        """(B, N, H, S, S); for chosen sequences, (B, N, H, chosen, S)."""
        m, mask = self._turned(msa, msa_mask)
        q, k, *_ = self._msa_att.mha.operands
        return row_weights(m, q, k, self.num_heads, mask=mask, queries=queries)

    def _turned(self, msa: Tensor, msa_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        check_msa(msa, self.msa_dim, msa_mask)
        return self._msa_att.layer_norm_m(msa).transpose(1, 2), None if msa_mask is None else msa_mask.transpose(1, 2)


class MSAColumnGlobalAttention(nn.Module):
    """As by column, for many sequences: the mean of a column asks, once for each head, and all heads share keys and values. Linear in S."""

    def __init__(self, msa_dim: int, head_dim: int = 8, num_heads: int = 8, **dd: Any) -> None:
        super().__init__()
        check_widths(msa_dim=msa_dim, head_dim=head_dim, num_heads=num_heads)
        self.msa_dim, self.head_dim, self.num_heads = msa_dim, head_dim, num_heads
        self.layer_norm_m = nn.LayerNorm(msa_dim, **dd)
        self.global_attention = GatedAttention(msa_dim, head_dim, num_heads, shared_keys=True, **dd)

    def forward(self, msa: Float[Tensor, "b s n m"], msa_mask: Bool[Tensor, "b s n"] | None = None) -> Float[Tensor, "b s n m"]:
        check_msa(msa, self.msa_dim, msa_mask)
        m, own = self.layer_norm_m(msa), self.global_attention
        v = own.linear_v(m).transpose(1, 2)
        o = (self._weights(m, msa_mask).to(v.dtype) @ v).flatten(2)
        return own.linear_o(own.linear_g(m).sigmoid() * o.unsqueeze(1))

    def weights(self, msa: Tensor, msa_mask: Tensor | None = None) -> Tensor:
        """(B, N, H, S)."""
        check_msa(msa, self.msa_dim, msa_mask)
        return self._weights(self.layer_norm_m(msa), msa_mask)

    def _weights(self, m: Tensor, mask: Tensor | None) -> Tensor:
        real = torch.ones_like(m[..., :1]) if mask is None else mask.unsqueeze(-1).to(m.dtype)
        mean = (m * real).sum(1) / (real.sum(1) + 1e-10)
        q = self.global_attention.linear_q(mean).unflatten(2, (self.num_heads, self.head_dim)) * self.head_dim**-0.5
        scores = q @ self.global_attention.linear_k(m).permute(0, 2, 3, 1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if mask is None:
            return scores.softmax(-1)
        hidden = ~mask.transpose(1, 2).unsqueeze(2)
        return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0.0)
