r"""Induced set attention block: elements talk through m learned points, in time linear in the size of the set.

    ISAB(x) = MAB1(x, P),   P = MAB0(I, x)                                                          (see `mab`)

Lee, Lee, Kim, Kosiorek, Choi, Teh, "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks", ICML 2019.
arXiv:1810.00825. Follows the authors' code: scores divided by sqrt(out_dim). B batch, N elements, m inducing points, D out_dim, H heads.
Not in the paper: masks. The points themselves are never masked.
"""

from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from ...card import Card
from ...mechanism import Mechanism
from ...parts.masks import zero_rows
from ...parts.set_blocks import ISAB, SET_TRANSFORMER
from ...validate import check_mask, check_tokens


class InducedSetAttentionBlock(ISAB, Mechanism):
    """Args:
    dim: width of the elements.
    num_heads: the output width is split between them.
    out_dim: width of the output and of the inducing points; dim if None.
    num_inducing: number of inducing points.
    norm: layer norms after the additions; training on large sets is unstable without them.
    scale: scores are divided by the square root of out_dim ("dim", the authors' code) or of the head width ("head", the paper).
    dropout: probability of dropping a weight in training.
    """

    card: ClassVar = Card(
        id="isab",
        layout="set",
        paper=SET_TRANSFORMER,
        source="juho-lee/set_transformer@73432c6 (MIT), modules.py",
        summary="Elements of a set interact through a few learned points, so cost grows linearly with the set.",
        when="Large sets, point clouds: more elements than all pairs can afford.",
        # The inducing points are projected once, not once a sample.
        flops="2*num_inducing*out_dim**2 + B*N*(6*dim*out_dim + 2*out_dim**2 + 8*num_inducing*out_dim) + 6*B*num_inducing*out_dim**2",
        grows={"N": 1.0},
        can=frozenset({"mask", "linear", "weights", "row_stochastic", "permutation_equivariant"}),
        example={"dim": 16, "num_heads": 4, "num_inducing": 6},
        variants=(
            {"dim": 10, "num_heads": 4, "out_dim": 24, "num_inducing": 3},
            {"dim": 16, "num_heads": 2, "num_inducing": 4, "norm": True, "scale": "head"},
        ),
        returns=("out", "weights_gather", "weights_spread"),
    )

    def forward(
        self, x: Float[Tensor, "b n dim"], *, mask: Bool[Tensor, "b n"] | None = None, return_weights: bool = False
    ) -> Float[Tensor, "b n out_dim"] | tuple[Tensor, tuple[Tensor, Tensor]]:
        """Rows with a False `mask` come out 0. Weights: points on elements (B, H, m, N), elements on points (B, H, N, m)."""
        check_tokens(x, self.dim)
        check_mask(mask, *x.shape[:2], name="mask")
        return super().forward(zero_rows(x, mask), mask=mask, return_weights=return_weights)
