"""One Evoformer block (algorithm 6): the alignment, biased by the pairs; the pairs, from the alignment; the pairs by their triangles."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...errors import require
from .checks import check_msa, check_pair
from .msa import MSAColumnAttention, MSARowAttention
from .outer import OuterProductMean
from .transition import MSATransition, PairTransition
from .triangle import TriangleAttention, TriangleMultiplication

# Every element of a row of pairs, or of a column, is dropped together; of the alignment, every sequence.
ROWS, COLUMNS = 1, 2


class Block(nn.Module):
    """Adds every part's update to what it updates. Dropout is shared along the rows (along the columns after the ending node)."""

    def __init__(
        self,
        msa_dim: int,
        pair_dim: int,
        msa_head_dim: int = 32,
        opm_hidden_dim: int = 32,
        triangle_hidden_dim: int = 128,
        pair_head_dim: int = 32,
        msa_heads: int = 8,
        pair_heads: int = 4,
        factor: int = 4,
        msa_dropout: float = 0.15,
        pair_dropout: float = 0.25,
        column_attention: bool = True,
        opm_first: bool = False,
        mask_transition: bool = True,
        **dd: Any,
    ) -> None:
        super().__init__()
        for name, value in (("msa_dropout", msa_dropout), ("pair_dropout", pair_dropout)):
            require(0 <= value < 1, "{}={} must be in [0, 1)", name, value)
        self.msa_dim, self.pair_dim, self.msa_dropout, self.pair_dropout = msa_dim, pair_dim, msa_dropout, pair_dropout
        self.opm_first, self.mask_transition = opm_first, mask_transition
        self.msa_att_row = MSARowAttention(msa_dim, pair_dim, msa_head_dim, msa_heads, **dd)
        self.msa_att_col = MSAColumnAttention(msa_dim, msa_head_dim, msa_heads, **dd) if column_attention else None
        self.msa_transition = MSATransition(msa_dim, factor, **dd)
        self.outer_product_mean = OuterProductMean(msa_dim, pair_dim, opm_hidden_dim, **dd)
        self.pair_stack = nn.ModuleDict(
            {
                "tri_mul_out": TriangleMultiplication(pair_dim, triangle_hidden_dim, "outgoing", **dd),
                "tri_mul_in": TriangleMultiplication(pair_dim, triangle_hidden_dim, "incoming", **dd),
                "tri_att_start": TriangleAttention(pair_dim, pair_head_dim, pair_heads, "starting", **dd),
                "tri_att_end": TriangleAttention(pair_dim, pair_head_dim, pair_heads, "ending", **dd),
                "pair_transition": PairTransition(pair_dim, factor, **dd),
            }
        )

    def forward(
        self,
        msa: Float[Tensor, "b s n m"],
        pair: Float[Tensor, "b n n z"],
        msa_mask: Bool[Tensor, "b s n"] | None = None,
        pair_mask: Bool[Tensor, "b n n"] | None = None,
    ) -> tuple[Float[Tensor, "b s n m"], Float[Tensor, "b n n z"]]:
        check_msa(msa, self.msa_dim, msa_mask)
        check_pair(pair, self.pair_dim, pair_mask, like=("msa", msa, 2))
        if self.opm_first:
            pair = pair + self.outer_product_mean(msa, msa_mask)
        msa = msa + self._drop(self.msa_att_row(msa, pair, msa_mask), self.msa_dropout, ROWS)
        if self.msa_att_col is not None:
            msa = msa + self.msa_att_col(msa, msa_mask)
        msa = msa + self.msa_transition(msa, msa_mask if self.mask_transition else None)
        if not self.opm_first:
            pair = pair + self.outer_product_mean(msa, msa_mask)
        for name in ("tri_mul_out", "tri_mul_in", "tri_att_start", "tri_att_end"):
            shared = COLUMNS if name == "tri_att_end" else ROWS
            pair = pair + self._drop(self.pair_stack[name](pair, pair_mask), self.pair_dropout, shared)
        return msa, pair + self.pair_stack["pair_transition"](pair, pair_mask if self.mask_transition else None)

    def _drop(self, update: Tensor, rate: float, axis: int) -> Tensor:
        if not self.training or rate == 0:
            return update
        return update * F.dropout(torch.ones_like(update.narrow(axis, 0, 1)), rate)
