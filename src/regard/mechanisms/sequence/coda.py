r"""Compositional de-attention: a query adds, subtracts or ignores a value, by a weight between -1 and 1 that no softmax normalises.

    E = alpha q k^T,   N_ij = -beta |q_i - k_j|_1,   W = tanh(E) G(N) on the allowed pairs, 0 elsewhere,   out = (W v) Wo^T + bo
    G(N): "center" sigmoid(N - mean N over the allowed pairs),   "scale" 2 sigmoid(N),   "none" sigmoid(N)
    pair: E of F_E(a), F_E(b), N of F_N(a), F_N(b), each with one shared linear map;   A' = W b,   B' = W^T a

Tay, Luu, Zhang, Wang, Hui, "Compositional De-Attention Networks", NeurIPS 2019. No official code was found; the axis of the mean is our reading (the
whole matrix, or a row). With the mean over the matrix a padded query counts in it: hide its row by attn_mask. Not in the paper: masks, learned
alpha and beta. B batch, N queries, M keys, D dim, H heads of width d.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require, require_type
from ...mechanism import Mechanism
from ...ops.l1_affinity import l1_attention, l1_weights
from ...parts.heads import checked_source, head_width, init_projections_, merge_heads, split_heads
from ...parts.linear import Linear
from ...validate import check_bool, check_broadcastable, check_mask, check_option, check_tokens

NORMALIZATIONS = ("center", "scale", "none")
MEAN_OF_ALL = "layout == 'pair' or (normalization == 'center' and center_over == 'matrix')"
Factor = float | Literal["learned"] | None


class CompositionalDeAttention(Mechanism):
    """`CompositionalDeAttention(64)` attends within tokens or to a context, `CompositionalDeAttention(64, layout="pair")` aligns two of them softly.

    Args:
        dim: width of the input and the output.
        num_heads, head_dim: number of heads, 8 if None, and width of each, dim // num_heads if None; of a pair there are none.
        layout: "sequence" or "pair".
        normalization: "center", "scale" or "none": what the negative affinity goes through.
        center_over: the mean of "center" is over the "matrix" of a head or over each "row".
        alpha, beta: factors of the affinity and of the distance, or "learned", one for each head; None means head_dim ** -0.5, for a pair 1.
        qkv_bias, out_bias: biases of the projections of a sequence.
        dropout: probability of dropping a weight in training; sequences only.
        causal: key j is seen by query i if j <= i + M - N; sequences only.
        proj: a pair goes through its two linear maps; False compares the tokens themselves.
    """

    card: ClassVar = Card(
        id="coda",
        layout="sequence",
        also=("pair",),
        paper=Paper(
            title="Compositional De-Attention Networks",
            authors="Yi Tay, Anh Tuan Luu, Aston Zhang, Shuohang Wang, Siu Cheung Hui",
            venue="NeurIPS",
            year=2019,
        ),
        source="equations of the paper, as recalled",
        summary="Weights between -1 and 1 from similarity times closeness: values are added, subtracted or left out.",
        when="What is unlike should count against: matching, entailment, retrieval; its distances cost more time than the products that are counted.",
        flops="2*B*dim*width*(N + 2*M) + 2*B*N*width*dim + 4*B*N*M*width if layout == 'sequence'"
        " else (4*B*(N + M)*dim**2 if proj else 0) + 6*B*N*M*dim",
        grows={"N": 2.0},
        can=frozenset({"causal", "cross", "key_mask", "attn_mask", "weights", "rows", "permutation_equivariant"}),
        unless={
            **dict.fromkeys(("causal", "key_mask", "attn_mask"), MEAN_OF_ALL),  # masks are taken, but what they hide still moves the mean
            **dict.fromkeys(("cross", "rows", "permutation_equivariant"), "layout == 'pair'"),
        },
        checked_against="equations",
        uncertain="The equations are recalled, the axis of the mean is our reading, and no code of the authors was found.",
        example={"dim": 32, "num_heads": 4},
        variants=(
            {"dim": 24, "num_heads": 3, "normalization": "scale", "alpha": "learned", "beta": "learned"},
            {"dim": 24, "num_heads": 2, "head_dim": 8, "center_over": "row", "causal": True},
            {"dim": 16, "layout": "pair", "alpha": 0.3, "beta": 0.3},
        ),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        head_dim: int | None = None,
        normalization: Literal["center", "scale", "none"] = "center",
        center_over: Literal["matrix", "row"] = "matrix",
        alpha: Factor = None,
        beta: Factor = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        *,
        layout: Literal["sequence", "pair"] = "sequence",
        proj: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        require(dim > 0, "dim={} must be at least 1", dim)
        check_option(layout, ("sequence", "pair"), "layout")
        check_option(normalization, NORMALIZATIONS, "normalization")
        check_option(center_over, ("matrix", "row"), "center_over")
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        leaks = causal and normalization == "center" and center_over == "matrix"
        require(not leaks, "causal={} with center_over={!r}: the mean would tell of the future; center_over='row' does not", causal, center_over)
        self.dim, self.layout, self.normalization, self.center_over, self.proj = dim, layout, normalization, center_over, proj
        self.qkv_bias, self.out_bias, self.dropout, self.causal = qkv_bias, out_bias, dropout, causal
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if layout == "pair":
            given = {"num_heads": num_heads, "head_dim": head_dim, "dropout": dropout or None, "causal": causal or None}
            of_sequences = [name for name, value in given.items() if value is not None]
            require(not of_sequences, "layout='pair' has no {}; leave it out", of_sequences)
            self.num_heads, self.head_dim, self.returns = 1, dim, ("a", "b", "weights")
            self.affinity_proj, self.distance_proj = (Linear(dim, dim, **dd) if proj else nn.Identity() for _ in range(2))
        else:
            require(proj, "layout='sequence' always projects, got proj={}", proj)
            self.num_heads = 8 if num_heads is None else num_heads
            self.head_dim = head_width(dim, self.num_heads, head_dim)
            width = self.num_heads * self.head_dim
            self.q_proj, self.k_proj, self.v_proj = (Linear(dim, width, qkv_bias, **dd) for _ in range(3))
            self.out_proj = Linear(width, dim, out_bias, **dd)
            init_projections_(self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        self.width = self.num_heads * self.head_dim
        usual = 1.0 if layout == "pair" else self.head_dim**-0.5
        self.alpha, self.beta = self._factor(alpha, usual, "alpha", dd), self._factor(beta, usual, "beta", dd)

    def _factor(self, value: Factor, usual: float, name: str, dd: dict[str, Any]) -> float | nn.Parameter:
        if value == "learned":
            return nn.Parameter(torch.full((self.num_heads,), usual, **dd))
        if value is None:
            return usual
        require_type(isinstance(value, int | float) and not isinstance(value, bool), "{}={!r} must be a number, 'learned' or None", name, value)
        require(math.isfinite(value), "{}={} must be finite", name, value)
        return float(value)

    def forward(
        self,
        x: Float[Tensor, "b n dim"] | None = None,
        context: Float[Tensor, "b m dim"] | None = None,
        *,
        a: Float[Tensor, "b n dim"] | None = None,
        b: Float[Tensor, "b m dim"] | None = None,
        key_mask: Bool[Tensor, "b m"] | None = None,
        attn_mask: Bool[Tensor, "#b #h n m"] | None = None,
        a_mask: Bool[Tensor, "b n"] | None = None,
        b_mask: Bool[Tensor, "b m"] | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Any, ...]:
        """A sequence takes `x`, `context` (`x` itself if None), `key_mask` and `attn_mask`, and returns (B, N, D), or that and W (B, H, N, M).

        A pair takes `a` and `b` (by name, or as the first two arguments), `a_mask` and `b_mask`, and returns (A' (B, N, D), B' (B, M, D)), or those
        and W (B, N, M).
        """
        strange = {"key_mask": key_mask, "attn_mask": attn_mask} if self.layout == "pair" else {"a": a, "b": b, "a_mask": a_mask, "b_mask": b_mask}
        strange = [name for name, value in strange.items() if value is not None]
        require(not strange, "layout={!r} takes no {}", self.layout, strange)
        if self.layout == "pair":
            a, b = (x if a is None else a), (context if b is None else b)
            scores = self._pair_scores(a, b, a_mask, b_mask)
            assert a is not None and b is not None
            out_a, out_b = l1_attention(**scores, v=b[:, None], u=a[:, None])
            out = out_a[:, 0], out_b[:, 0]
            return (out, l1_weights(**scores)[:, 0]) if return_weights else out
        source, scores = self._scores(x, context, key_mask, attn_mask)
        v = split_heads(self.v_proj(source), self.num_heads)
        out = l1_attention(**scores, v=v, dropout=self.dropout if self.training else 0.0)[0]
        out = self.out_proj(merge_heads(out))
        return (out, l1_weights(**scores)) if return_weights else out

    def weights(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """The weights of R chosen positions of a sequence alone, (B, H, R, M), of all if None; the mean of "center" is over all pairs either way."""
        require(self.layout == "sequence", "layout={!r} gives its weights by return_weights=True alone", self.layout)
        return l1_weights(**self._scores(x, context, key_mask, attn_mask)[1], queries=queries)

    def _scores(self, x: Any, context: Tensor | None, key_mask: Tensor | None, attn_mask: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """What the keys are made of, and what makes the weights."""
        source = checked_source(x, context, self.dim, self.dim, key_mask)
        if attn_mask is not None:
            check_bool(attn_mask, "attn_mask")
            check_broadcastable(attn_mask, (x.shape[0], self.num_heads, x.shape[1], source.shape[1]), "attn_mask")
            attn_mask = attn_mask.reshape(*[1] * (4 - attn_mask.ndim), *attn_mask.shape)
        q, k = split_heads(self.q_proj(x), self.num_heads), split_heads(self.k_proj(source), self.num_heads)
        return source, self._options(q, k, (q, k)) | {"keys": key_mask, "pairs": attn_mask, "causal": self.causal}

    def _pair_scores(self, a: Any, b: Any, a_mask: Tensor | None, b_mask: Tensor | None) -> dict[str, Any]:
        """What makes the weights of a pair, as of one head."""
        check_tokens(a, self.dim, "a")
        check_tokens(b, self.dim, "b")
        require(a.shape[0] == b.shape[0], "a has batch {} but b has batch {}", a.shape[0], b.shape[0])
        check_mask(a_mask, *a.shape[:2], name="a_mask")
        check_mask(b_mask, *b.shape[:2], name="b_mask")
        near_a, near_b, far_a, far_b = (f(t)[:, None] for f in (self.affinity_proj, self.distance_proj) for t in (a, b))
        return self._options(near_a, near_b, (far_a, far_b)) | {"rows": a_mask, "keys": b_mask}

    def _options(self, q: Tensor, k: Tensor, far: tuple[Tensor, Tensor]) -> dict[str, Any]:
        q = q * (self.alpha[:, None, None] if isinstance(self.alpha, Tensor) else self.alpha)
        return {"q": q, "k": k, "far": far, "beta": self.beta, "normalization": self.normalization, "center_over": self.center_over}

    @staticmethod
    def example_inputs(options: Mapping[str, Any], *, batch: int, size: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Random tokens, and for a pair two lengths of them."""
        n = size if isinstance(size, int) else math.prod(size)
        lengths = {"a": n, "b": max(1, n - 2)} if options.get("layout") == "pair" else {"x": n}
        return {name: torch.randn(batch, length, options["dim"], generator=generator) for name, length in lengths.items()}
