"""Public forms of sequence mechanisms, re-expressed for timing: the same operations in the same order, on the same weights.

Each takes one of our modules and copies its weights, so outputs must be equal.
"""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from regard.official import to_official


class TorchMultihead(nn.Module):
    """nn.MultiheadAttention in eval with need_weights=False, which takes torch's own fast path."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(ours.dim, ours.num_heads, dropout=ours.dropout, bias=ours.qkv_bias, batch_first=True)
        self.attention.load_state_dict(to_official(ours, "torch.nn.MultiheadAttention"))

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class MaskedSDPA(nn.Module):
    """What users write for a sparse pattern: scaled_dot_product_attention under a boolean N x N mask, kept between calls."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.pattern, self.mask = ours.num_heads, ours.allowed, None
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
            for linear in (ours.q_proj, ours.k_proj, ours.v_proj, ours.out_proj)
        )
        self.load_state_dict(ours.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape[-1] != x.shape[1]:
            self.mask = self.pattern.mask(x.shape[1], self.num_heads, x.device)[None]  # four axes: with three the kernel stores all weights
        q, k, v = (p(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2).flatten(2))


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "multi_head": {"torch": TorchMultihead},
    "sparse": {"masked SDPA": MaskedSDPA},
}
