"""From the alignment to the pairs: the mean outer product of two columns (algorithm 10)."""

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...ops.outer_product_mean import counts, outer_product
from .checks import check_msa, check_widths
from .layers import linear

EPS = 1e-3


class OuterProductMean(nn.Module):
    """out_ij = (W vec(sum_s a_si b_sj^T) + bias) / (number of sequences with i and j + 1e-3): the bias is divided too, as DeepMind's code does."""

    def __init__(self, msa_dim: int, pair_dim: int, hidden_dim: int = 32, **dd: Any) -> None:
        super().__init__()
        check_widths(msa_dim=msa_dim, pair_dim=pair_dim, hidden_dim=hidden_dim)
        self.msa_dim = msa_dim
        self.layer_norm = nn.LayerNorm(msa_dim, **dd)
        self.linear_1, self.linear_2 = linear(msa_dim, hidden_dim, **dd), linear(msa_dim, hidden_dim, **dd)
        self.linear_out = linear(hidden_dim**2, pair_dim, "final", **dd)

    def forward(self, msa: Float[Tensor, "b s n m"], msa_mask: Bool[Tensor, "b s n"] | None = None) -> Float[Tensor, "b n n z"]:
        check_msa(msa, self.msa_dim, msa_mask)
        m = self.layer_norm(msa)
        a, b = self.linear_1(m), self.linear_2(m)
        norm = msa.new_full((1, 1, 1), msa.shape[1] + EPS)
        if msa_mask is not None:
            a, b = a * msa_mask.unsqueeze(-1), b * msa_mask.unsqueeze(-1)
            norm = counts(msa_mask, norm.dtype) + EPS
        return outer_product(a, b, self.linear_out.weight, self.linear_out.bias, 1 / norm).to(msa.dtype)
