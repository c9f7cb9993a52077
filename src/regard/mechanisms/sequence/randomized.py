r"""Randomized attention: each query draws one random feature from a mixture around its keys, and the mean over draws is softmax attention.

    pi = softmax_M(s q k^T),   mu_n = q_n + (k_m with m drawn from pi_n | sum_m pi_nm k_m | mean_m k_m)   for num_samples > 0 | -1 | 0
    w_n = mu_n + noise_std eps_n in training, mu_n in eval,   out_n = softmax_m(s w_n . k_m - s |k_m|^2 / 2) v_m,   s = d^-1/2

Zheng, Wang, Kong, "Linear Complexity Randomized Self-attention Mechanism", ICML 2022, arXiv:2204.04667. As in the authors' code eps has variance 1
by default; with s inside the feature the mean is softmax attention for noise_std = d^(1/4) alone ("unbiased"). With num_samples > 0 eval is random
too: the drawn key. Not in theirs: masks, context, causal order, the mean of several draws (they make one, whatever number is asked for). The draw
passes no gradient, the key drawn does. B batch, N queries, M keys, D dim, H heads, d head width, S draws.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...card import Card, Paper
from ...errors import require, require_type
from ...mechanism import Mechanism
from ...official import KeyMap, fused, rename
from ...ops.importance_sampling import draw_features, feature_attention, feature_weights
from ...ops.softmax_attention import causal_mask, combine_masks, rows_of
from ...parts.heads import checked_source, head_width, init_truncated_, merge_heads, split_heads
from ...parts.linear import Linear
from ...validate import check_bool, check_broadcastable, check_floating


class RandomizedAttention(Mechanism):
    """Args:
    dim: width of the input, of `context` and of the output.
    num_heads, head_dim: number of heads and width of each; head_dim=None means dim // num_heads.
    num_samples: draws to average; -1: the expected key in place of a drawn one; 0: the mean key.
    noise_std: standard deviation of the noise in training, or "unbiased" for head_dim ** 0.25.
    qkv_bias, out_bias: biases of the projections.
    dropout: probability of dropping an output channel in training.
    causal: key j is seen by query i if j <= i + M - N.
    """

    card: ClassVar = Card(
        id="randomized",
        layout="sequence",
        paper=Paper(
            title="Linear Complexity Randomized Self-attention Mechanism",
            authors="Lin Zheng, Chong Wang, Lingpeng Kong",
            venue="ICML",
            year=2022,
            arxiv="2204.04667",
        ),
        source="HKUNLP/efficient-attention randomized_attention.py (Apache-2.0)",
        summary="Softmax attention estimated from one random feature for each query, drawn around its own keys.",
        when="A regulariser, and the exact counterpart of lara; dearer than softmax attention itself.",
        flops="4*B*(N + M)*dim*num_heads*head_dim + 4*B*num_heads*N*M*(head_dim + 1)*max(num_samples, 1)"
        " + B*num_heads*M*head_dim*(2*N if num_samples > 0 else 4*N if num_samples == -1 or causal else 4)",
        grows={"N": 2.0},
        can=frozenset({"causal", "cross", "key_mask", "attn_mask", "weights", "rows", "row_stochastic", "qkv_core", "permutation_equivariant"}),
        uncertain="Masks, causal order, context and several draws are not in the authors' code.",
        example={"dim": 32, "num_heads": 4, "num_samples": -1},
        variants=({"dim": 24, "num_heads": 3, "num_samples": 0}, {"dim": 24, "num_heads": 2, "num_samples": -1, "causal": True}),
    )
    official: ClassVar = (
        KeyMap(
            "HKUNLP/efficient-attention",
            (*(fused(f"qkv.{kind}", [f"{n}_proj.{kind}" for n in "qkv"]) for kind in ("weight", "bias")), rename("proj.*", "out_proj.*")),
        ),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        *,
        num_samples: int = 1,
        noise_std: float | Literal["unbiased"] = 1.0,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_width(dim, num_heads, head_dim)
        require(num_samples >= -1, "num_samples={} must be a number of draws, 0 (mean key) or -1 (expected key)", num_samples)
        known = noise_std == "unbiased" if isinstance(noise_std, str) else noise_std >= 0
        require(known, "noise_std={!r} must be a number from 0 up, or 'unbiased'", noise_std)
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        self.num_samples, self.noise_std, self.dropout, self.causal = num_samples, noise_std, dropout, causal
        self.qkv_bias, self.out_bias = qkv_bias, out_bias
        width = num_heads * self.head_dim
        self.q_proj = Linear(dim, width, qkv_bias, device=device, dtype=dtype)
        self.k_proj = Linear(dim, width, qkv_bias, device=device, dtype=dtype)
        self.v_proj = Linear(dim, width, qkv_bias, device=device, dtype=dtype)
        self.out_proj = Linear(width, dim, out_bias, device=device, dtype=dtype)
        init_truncated_(self.q_proj, self.k_proj, self.v_proj, self.out_proj)

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        context: Float[Tensor, "b m dim"] | None = None,
        *,
        key_mask: Bool[Tensor, "b m"] | None = None,
        attn_mask: Bool[Tensor, "#b #h n m"] | None = None,
        sample_index: Int[Tensor, "b h n *s"] | None = None,
        noise: Float[Tensor, "b h n *s d"] | None = None,
        generator: torch.Generator | None = None,
        validate: bool = False,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n dim"] | tuple[Tensor, Tensor]:
        """Attend from `x` to `context` (to `x` itself if None). Returns (B, N, dim), or that and the weights (B, H, N, M), the mean over the draws.

        `sample_index` (B, H, N) or (B, H, N, S) and `noise` (B, H, N, d) or (B, H, N, S, d) are used as they are; what is not given is drawn.
        `validate`: check that every index is an allowed key; it waits for the device.
        """
        source = checked_source(x, context, self.dim, self.dim, key_mask)
        shape = (x.shape[0], self.num_heads, x.shape[1], source.shape[1])
        mask = self._checked(shape, key_mask, attn_mask, sample_index, noise)
        if validate and sample_index is not None:
            _check_index(sample_index, shape, combine_masks(mask, causal_mask(*shape[2:], x.device) if self.causal else None))
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q_proj(x), self.k_proj(source), self.v_proj(source)))
        features = self._features(q, k, mask, self.causal, sample_index, noise, generator)
        out = self.out_proj(merge_heads(feature_attention(features, k, v, mask=mask, causal=self.causal)))
        out = F.dropout(out, self.dropout, self.training)
        return (out, feature_weights(features, k, mask=mask, causal=self.causal).to(x.dtype)) if return_weights else out

    def weights(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        sample_index: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b h r m"]:
        """The weights of R chosen positions of `x` alone, of all if None. `sample_index` and `noise`, if given, are those of all positions."""
        source = checked_source(x, context, self.dim, self.dim, key_mask)
        n, m, rows = x.shape[1], source.shape[1], slice(None) if queries is None else queries
        mask = rows_of(self._checked((x.shape[0], self.num_heads, n, m), key_mask, attn_mask, sample_index, noise), queries)
        mask = combine_masks(mask, causal_mask(n, m, x.device, queries)[None, None] if self.causal else None)
        q, k = split_heads(self.q_proj(x[:, rows]), self.num_heads), split_heads(self.k_proj(source), self.num_heads)
        index, noise = (None if t is None else t[:, :, rows] for t in (sample_index, noise))
        return feature_weights(self._features(q, k, mask, False, index, noise, generator), k, mask=mask).to(x.dtype)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, causal: bool | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The core alone, on (B, H, N, d)."""
        mask, causal = None if key_mask is None else key_mask[:, None, None], self.causal if causal is None else causal
        return feature_attention(self._features(q, k, mask, causal, None, None, generator), k, v, mask=mask, causal=causal)

    def _features(
        self,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        causal: bool,
        index: Tensor | None,
        noise: Tensor | None,
        generator: torch.Generator | None,
    ) -> list[Tensor]:
        std = self.head_dim**0.25 if self.noise_std == "unbiased" else float(self.noise_std)
        given = {"index": index, "noise": noise, "generator": generator}
        return draw_features(q, k, self.num_samples, std if self.training or noise is not None else None, mask=mask, causal=causal, **given)

    def _checked(
        self,
        shape: tuple[int, ...],
        key_mask: Tensor | None,
        attn_mask: Tensor | None,
        sample_index: Tensor | None,
        noise: Tensor | None,
    ) -> Tensor | None:
        """Both masks as one with four axes, (B, H, N, M) or 1 each."""
        *rows, _ = shape
        draws, one = max(self.num_samples, 1), self.num_samples <= 1
        require(sample_index is None or self.num_samples > 0, "sample_index{} is of no use with num_samples={}", "", self.num_samples)
        if sample_index is not None:
            require_type(sample_index.dtype == torch.long, "sample_index must be of int64, got {}", sample_index.dtype)
        if noise is not None:
            check_floating(noise, "noise")
        for t, name, last in ((sample_index, "sample_index", ()), (noise, "noise", (self.head_dim,))):
            got = None if t is None else tuple(t.shape)
            fits = got in (None, (*rows, draws, *last)) or (one and got == (*rows, *last))
            require(fits, "{} must have shape {}, got {}", name, (*rows, *last) if one else (*rows, draws, *last), got)
        if attn_mask is not None:
            check_bool(attn_mask, "attn_mask")
            check_broadcastable(attn_mask, shape, "attn_mask")
            attn_mask = attn_mask.reshape(*[1] * (4 - attn_mask.ndim), *attn_mask.shape)
        return combine_masks(None if key_mask is None else key_mask[:, None, None], attn_mask)


def _check_index(index: Tensor, shape: tuple[int, ...], allowed: Tensor | None) -> None:
    inside = bool(((index >= 0) & (index < shape[3])).all())
    require(inside, "sample_index must lie in 0..{}, got {} to {}", shape[3] - 1, index.min(), index.max())
    seen = allowed is None or bool(allowed.expand(shape).gather(3, index.reshape(*shape[:3], -1)).all())
    require(seen, "sample_index{} names keys that a mask hides", "")
