"""The transitions, a wide layer for every element of the alignment or of the pairs (algorithms 9 and 15)."""

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...ops.feed_forward import feed_forward
from .checks import check_msa, check_pair, check_widths
from .layers import linear


class _Transition(nn.Module):
    def __init__(self, dim: int, factor: int, **dd: Any) -> None:
        super().__init__()
        check_widths(factor=factor)
        self.layer_norm = nn.LayerNorm(dim, **dd)
        self.linear_1, self.linear_2 = linear(dim, factor * dim, "relu", **dd), linear(factor * dim, dim, "final", **dd)

    def _update(self, x: Tensor, mask: Tensor | None) -> Tensor:
        first, second = self.linear_1, self.linear_2
        out = feed_forward(self.layer_norm(x), first.weight, first.bias, second.weight, second.bias)
        return out if mask is None else out * mask.unsqueeze(-1)


class MSATransition(_Transition):
    """W2 ReLU(W1 LN(x) + b1) + b2; a mask zeroes the update, which DeepMind's code does not."""

    def __init__(self, msa_dim: int, factor: int = 4, **dd: Any) -> None:
        check_widths(msa_dim=msa_dim)
        super().__init__(msa_dim, factor, **dd)
        self.msa_dim = msa_dim

    def forward(self, msa: Float[Tensor, "b s n m"], msa_mask: Bool[Tensor, "b s n"] | None = None) -> Float[Tensor, "b s n m"]:
        check_msa(msa, self.msa_dim, msa_mask)
        return self._update(msa, msa_mask)


class PairTransition(_Transition):
    """As `MSATransition`, of the pairs."""

    def __init__(self, pair_dim: int, factor: int = 4, **dd: Any) -> None:
        check_widths(pair_dim=pair_dim)
        super().__init__(pair_dim, factor, **dd)
        self.pair_dim = pair_dim

    def forward(self, pair: Float[Tensor, "b n n z"], pair_mask: Bool[Tensor, "b n n"] | None = None) -> Float[Tensor, "b n n z"]:
        check_pair(pair, self.pair_dim, pair_mask)
        return self._update(pair, pair_mask)
