r"""Set attention block: every element of a set attends to all of them.

    SAB(x) = MAB(x, x)                                                                              (see `mab`)

Lee, Lee, Kim, Kosiorek, Choi, Teh, "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks", ICML 2019.
arXiv:1810.00825. Follows the authors' code: scores divided by sqrt(out_dim). B batch, N elements, D out_dim, H heads.
Not in the paper: masks.
"""

from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from ...card import Card
from ...mechanism import Mechanism
from ...parts.masks import zero_rows
from ...parts.set_blocks import SAB, SET_TRANSFORMER
from ...validate import check_mask, check_tokens


class SetAttentionBlock(SAB, Mechanism):
    """Args:
    dim: width of the elements.
    num_heads: the output width is split between them.
    out_dim: width of the output; dim if None.
    norm: layer norms after the two additions.
    scale: scores are divided by the square root of out_dim ("dim", the authors' code) or of the head width ("head", the paper).
    dropout: probability of dropping a weight in training.
    """

    card: ClassVar = Card(
        id="sab",
        layout="set",
        paper=SET_TRANSFORMER,
        source="juho-lee/set_transformer@73432c6 (MIT), modules.py",
        summary="All pairs of elements of a set interact; permuting the set permutes the output.",
        when="Sets of up to a few thousand elements whose interactions matter.",
        flops="B*N*(6*dim*out_dim + 2*out_dim**2) + 4*B*N**2*out_dim",
        grows={"N": 2.0},
        can=frozenset({"mask", "weights", "rows", "row_stochastic", "permutation_equivariant"}),
        example={"dim": 16, "num_heads": 4},
        variants=({"dim": 10, "num_heads": 4, "out_dim": 24}, {"dim": 16, "num_heads": 2, "norm": True, "scale": "head"}),
    )

    def forward(
        self, x: Float[Tensor, "b n dim"], *, mask: Bool[Tensor, "b n"] | None = None, return_weights: bool = False
    ) -> Float[Tensor, "b n out_dim"] | tuple[Tensor, Tensor]:
        """Elements with a False `mask` are neither seen nor changed into anything: their rows come out 0. Weights are (B, H, N, N)."""
        check_tokens(x, self.dim)
        check_mask(mask, *x.shape[:2], name="mask")
        return super().forward(zero_rows(x, mask), mask=mask, return_weights=return_weights)

    def weights(self, x: Float[Tensor, "b n dim"], *, queries: Tensor | None = None, mask: Bool[Tensor, "b n"] | None = None) -> Tensor:
        """The weights of R chosen elements alone, (B, H, R, N); of all if None."""
        check_tokens(x, self.dim)
        check_mask(mask, *x.shape[:2], name="mask")
        return self.mab.weights(zero_rows(x, mask), queries=queries, key_mask=mask, query_mask=mask)
