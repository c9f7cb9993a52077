r"""Pooling by multihead attention: k learned seeds turn a set of any size into k vectors.

    PMA(x) = MAB(S, x)                                                                              (see `mab`)

Lee, Lee, Kim, Kosiorek, Choi, Teh, "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks", ICML 2019.
arXiv:1810.00825. The paper applies a row-wise layer to x first, the authors' code does not: we follow the code, `rff=True` is the paper's.
B batch, N elements, k seeds, D dim, H heads. Not in the paper: masks.
"""

from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from ...card import Card
from ...mechanism import Mechanism
from ...parts.masks import zero_rows
from ...parts.set_blocks import PMA, SET_TRANSFORMER
from ...validate import check_mask, check_tokens


class PoolingByMultiheadAttention(PMA, Mechanism):
    """Args:
    dim: width of the elements and of the output.
    num_heads: the width is split between them.
    num_seeds: number of vectors the set is pooled to.
    norm: layer norms after the two additions.
    rff: apply a linear layer and a ReLU to the elements first.
    scale: scores are divided by the square root of dim ("dim", the authors' code) or of the head width ("head", the paper).
    dropout: probability of dropping a weight in training.
    """

    card: ClassVar = Card(
        id="pma",
        layout="set",
        paper=SET_TRANSFORMER,
        source="juho-lee/set_transformer@73432c6 (MIT), modules.py",
        summary="A few learned queries pool a set; permuting the set leaves the output unchanged.",
        when="Instead of mean or max pooling of a set, bag or sequence, and to see which elements count.",
        # The seeds are projected once, not once a sample.
        flops="2*num_seeds*dim**2 + B*N*(4*dim**2 + 4*num_seeds*dim) + 2*B*num_seeds*dim**2 + (2*B*N*dim**2 if rff else 0)",
        grows={"N": 1.0},
        can=frozenset({"mask", "linear", "weights", "row_stochastic", "permutation_invariant"}),
        example={"dim": 16, "num_heads": 4, "num_seeds": 3},
        variants=({"dim": 16, "num_heads": 2, "norm": True, "rff": True, "scale": "head"}, {"dim": 15, "num_heads": 3}),
    )

    def forward(
        self, x: Float[Tensor, "b n dim"], *, mask: Bool[Tensor, "b n"] | None = None, return_weights: bool = False
    ) -> Float[Tensor, "b k dim"] | tuple[Tensor, Tensor]:
        """Elements with a False `mask` are not seen; a set without any gives the seeds' residual path. Weights are (B, H, k, N)."""
        check_tokens(x, self.dim)
        check_mask(mask, *x.shape[:2], name="mask")
        return super().forward(zero_rows(x, mask), mask=mask, return_weights=return_weights)
