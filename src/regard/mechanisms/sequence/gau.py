r"""Gated attention unit: attention and feed-forward in one layer, a single head whose weights are a squared ReLU instead of a softmax.

    u, v, z = SiLU(norm(x) Wp + bp),   q = gamma_0 z + beta_0,   k = gamma_1 z + beta_1
    A = act(q k^T / n + R),   out = (u * (A v)) Wo + bo  (+ x)
    act: relu2 max(t, 0)^2;  laplace: the normal distribution function, mean sqrt(1/2), variance 1 / (4 pi) (of Mega, arXiv:2209.10655);
    softmax: softmax(q k^T / sqrt(s) + R), for comparison;   R_ij = rope(a, i) . rope(b, j), table[j - i], or by T5's buckets of j - i

Hua, Dai, Liu, Le, "Transformer Quality in Linear Time", ICML 2022, arXiv:2202.10447; order and names of parameters as in fairseq-apollo.
n is the number of keys that key_mask leaves, of the whole sequence also where causal: a prefix then has other weights than in the whole.
B batch, N positions, D dim, e hidden_dim, s qk_dim. R is kept as one vector over j - i. Not in the paper: laplace, softmax, masks.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap
from ...ops.gated_attention import gated_attention, gated_weights
from ...parts.gated import Activation, NormKind, check_gated, init_gated_, input_norm, relative_scores, split_projection
from ...parts.linear import Linear
from ...validate import check_bool, check_broadcastable, check_mask, check_option, check_tokens


class GatedAttentionUnit(Mechanism):
    """Args:
    dim: width of the input and the output.
    num_heads: 1; the unit has one head.
    qk_dim, hidden_dim: s and e; hidden_dim=None means 2 dim.
    rel_pos: "rope", "toeplitz" (a table, up to max_len positions), "t5" or None.
    max_len: the longest sequence that "toeplitz" takes.
    norm: of the input: "layernorm", "scalenorm" or None.
    residual: add the input.
    activation: "relu2", "laplace" or "softmax".
    causal: query i sees keys j <= i.
    dropout: probability of dropping a weight in training. hidden_dropout: of dropping an entry of v.
    """

    card: ClassVar = Card(
        id="gau",
        layout="sequence",
        paper=Paper(
            title="Transformer Quality in Linear Time",
            authors="Weizhe Hua, Zihang Dai, Hanxiao Liu, Quoc V. Le",
            venue="ICML",
            year=2022,
            arxiv="2202.10447",
        ),
        source="XuezheMax/fairseq-apollo (MIT)",
        summary="Attention and feed-forward in one gated layer, with one head and a squared ReLU in place of the softmax.",
        when="In place of an attention and a feed-forward layer, up to a few thousand positions of nearly constant number.",
        flops="2*B*N*(dim*(3*hidden_dim + qk_dim) + (qk_dim + hidden_dim)*((N + min(N, 128))/2 if causal else N))",
        grows={"N": 2.0},
        can=frozenset({"causal", "key_mask", "attn_mask", "weights", "rows", "row_stochastic", "permutation_equivariant"}),
        unless={"row_stochastic": "activation != 'softmax'", "permutation_equivariant": "rel_pos is not None"},
        # Scores are divided by the length of the whole sequence.
        bounds={"prefix_property": (float("inf"), "activation != 'softmax'")},
        checked_against="public",
        uncertain="The authors published pseudo-code alone; rope, norm and residual were checked against the equations.",
        # Widths at which the check's inputs leave no query without a pair of positive score.
        example={"dim": 20, "qk_dim": 16},
        variants=(
            {"dim": 24, "qk_dim": 10, "hidden_dim": 36, "rel_pos": "toeplitz", "max_len": 2**14, "norm": "scalenorm", "causal": True},
            {"dim": 24, "qk_dim": 16, "rel_pos": "t5", "activation": "laplace", "residual": False},
            {"dim": 16, "qk_dim": 8, "rel_pos": None, "activation": "softmax", "norm": None},
        ),
    )
    official: ClassVar = (KeyMap("XuezheMax/fairseq-apollo", optional=(r"norm\..*",)),)

    def __init__(
        self,
        dim: int,
        *,
        num_heads: Literal[1] = 1,
        qk_dim: int = 128,
        hidden_dim: int | None = None,
        rel_pos: Literal["rope", "toeplitz", "t5"] | None = "rope",
        max_len: int | None = None,
        norm: NormKind = "layernorm",
        residual: bool = True,
        activation: Activation = "relu2",
        causal: bool = False,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        require(num_heads == 1, "num_heads={}: gau has one head", num_heads)
        check_option(rel_pos, ("rope", "toeplitz", "t5", None), "rel_pos")
        self.dim, self.num_heads, self.qk_dim, self.hidden_dim = dim, num_heads, qk_dim, 2 * dim if hidden_dim is None else hidden_dim
        check_gated(dim, qk_dim, self.hidden_dim, activation, dropout=dropout, hidden_dropout=hidden_dropout)
        self.rel_pos, self.max_len, self.residual, self.activation, self.causal = rel_pos, max_len, residual, activation, causal
        self.dropout, self.hidden_dropout = dropout, hidden_dropout
        self.widths = [self.hidden_dim, self.hidden_dim, qk_dim]
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = input_norm(norm, dim, **dd)
        self.proj = Linear(dim, sum(self.widths), **dd)
        self.gamma, self.beta = (nn.Parameter(torch.empty(2, qk_dim, **dd)) for _ in range(2))
        self.rel_pos_bias = relative_scores(rel_pos, qk_dim, causal, max_len, **dd)
        self.out_proj = Linear(self.hidden_dim, dim, **dd)
        init_gated_(self.proj, self.out_proj, self.gamma, self.beta)

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        context: None = None,
        *,
        key_mask: Bool[Tensor, "b n"] | None = None,
        attn_mask: Bool[Tensor, "#b #h n n"] | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n dim"] | tuple[Tensor, Tensor]:
        """Returns (B, N, D), or that and the weights A, (B, 1, N, N), which are not normalised."""
        pairs = self._checked(x, context, key_mask, attn_mask)
        h, (gate, value, base) = self.norm(x), split_projection(self.proj, self.widths)
        q, k, options = self._scores(base(h), None, key_mask)
        v = F.dropout(value(h), self.hidden_dropout, self.training)
        out = gated_attention(q, k, v, attn_mask=pairs, dropout=self.dropout if self.training else 0.0, **options)
        out = self.out_proj(gate(h).mul_(out))
        out = out + x if self.residual else out
        return (out, self.weights(x, key_mask=key_mask, attn_mask=attn_mask)) if return_weights else out

    def weights(
        self, x: Tensor, context: None = None, *, queries: Tensor | None = None, key_mask: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """A for R chosen positions alone, (B, 1, R, N), for all if None."""
        pairs = self._checked(x, context, key_mask, attn_mask)
        base = split_projection(self.proj, self.widths)[2]
        q, k, options = self._scores(base(self.norm(x)), queries, key_mask)
        if pairs is not None and queries is not None and pairs.shape[1] > 1:
            pairs = pairs[:, queries]
        return gated_weights(q, k, queries=queries, attn_mask=pairs, **options)[:, None]

    def _checked(self, x: Tensor, context: Tensor | None, key_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
        """attn_mask as (B or 1, N or 1, N or 1)."""
        require(context is None, "gau attends within x: it takes no context")
        check_tokens(x, self.dim)
        b, n, _ = x.shape
        check_mask(key_mask, b, n)
        if attn_mask is None:
            return None
        check_bool(attn_mask, "attn_mask")
        check_broadcastable(attn_mask, (b, 1, n, n), "attn_mask")
        return attn_mask.reshape(*[1] * (4 - attn_mask.ndim), *attn_mask.shape)[:, 0]

    def _scores(self, z: Tensor, queries: Tensor | None, key_mask: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Queries, with their scale, and keys."""
        n = z.shape[1]
        q, k = (z if queries is None else z[:, queries]) * self.gamma[0] + self.beta[0], z * self.gamma[1] + self.beta[1]
        if self.activation == "softmax":
            q = q * self.qk_dim**-0.5
        else:
            q = q / (n if key_mask is None else key_mask.sum(1).clamp_min(1)[:, None, None])
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias(n)
        return q, k, {"bias": bias, "key_mask": key_mask, "act": self.activation, "causal": self.causal}
