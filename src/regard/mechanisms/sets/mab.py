r"""Multihead attention block: one set asks another; the residual is the projected query.

    q = x Wq + bq,  k = y Wk + bk,  v = y Wv + bv,   A = softmax_M(q k^T / sqrt(D)) per head,
    O = ln0(q + A v),   out = ln1(O + relu(O Wo + bo))

Lee, Lee, Kim, Kosiorek, Choi, Teh, "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks", ICML 2019.
arXiv:1810.00825. The authors' code scales by the full width D, not by the head width as the paper says: we follow the code,
`scale="head"` is the paper's. B batch, N queries, M keys, D out_dim, H heads. Not in the paper: masks, dropout of weights.
"""

from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from ...card import Card
from ...mechanism import Mechanism
from ...parts.masks import zero_rows
from ...parts.set_blocks import MAB, SET_TRANSFORMER
from ...validate import check_context, check_mask, check_tokens


class MultiheadAttentionBlock(MAB, Mechanism):
    """Args:
    dim: width of the asking set `x`.
    num_heads: the output width is split between them.
    context_dim: width of `context`; dim if None.
    out_dim: width of the output; dim if None.
    norm: layer norms after the two additions.
    scale: scores are divided by the square root of out_dim ("dim", the authors' code) or of the head width ("head", the paper).
    dropout: probability of dropping a weight in training.
    """

    card: ClassVar = Card(
        id="mab",
        layout="set",
        paper=SET_TRANSFORMER,
        source="juho-lee/set_transformer@73432c6 (MIT), modules.py",
        summary="A set attends to another set, with a residual from the projected query and one row-wise layer.",
        when="A building block: one set of vectors must read another whose order means nothing.",
        flops="2*B*N*dim*out_dim + 4*B*M*context_dim*out_dim + 4*B*N*M*out_dim + 2*B*N*out_dim**2",
        grows={"N": 2.0},
        can=frozenset({"cross", "key_mask", "weights", "rows", "row_stochastic", "permutation_equivariant"}),
        example={"dim": 16, "num_heads": 4},
        variants=(
            {"dim": 16, "num_heads": 4, "out_dim": 32},
            {"dim": 16, "num_heads": 2, "norm": True, "scale": "head"},
        ),
    )

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        context: Float[Tensor, "b m context_dim"] | None = None,
        *,
        key_mask: Bool[Tensor, "b m"] | None = None,
        query_mask: Bool[Tensor, "b n"] | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n out_dim"] | tuple[Tensor, Tensor]:
        """Attend from `x` to `context` (to `x` itself if None). Rows with a False `query_mask` come out 0; weights are (B, H, N, M)."""
        x, source = self._checked(x, context, key_mask, query_mask)
        return super().forward(x, source, key_mask=key_mask, query_mask=query_mask, return_weights=return_weights)

    def weights(
        self,
        x: Float[Tensor, "b n dim"],
        context: Float[Tensor, "b m context_dim"] | None = None,
        *,
        queries: Tensor | None = None,
        key_mask: Bool[Tensor, "b m"] | None = None,
        query_mask: Bool[Tensor, "b n"] | None = None,
    ) -> Tensor:
        """The weights of R chosen elements of `x` alone, (B, H, R, M); of all if None."""
        x, source = self._checked(x, context, key_mask, query_mask)
        return super().weights(x, source, queries=queries, key_mask=key_mask, query_mask=query_mask)

    def _checked(self, x: Tensor, context: Tensor | None, key_mask: Tensor | None, query_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both sets, with what is masked set to zero."""
        check_tokens(x, self.dim)
        source = x if context is None else context
        check_context(x, source, self.context_dim)
        check_mask(key_mask, *source.shape[:2])
        check_mask(query_mask, *x.shape[:2], name="query_mask")
        return zero_rows(x, query_mask), zero_rows(source, key_mask)
