"""The four blocks of the Set Transformer (arXiv 1810.00825), as plain modules. They trust their inputs: the mechanisms check them.

B batch, N queries or elements, M keys, D out_dim, H heads, m inducing points, k seeds. Masks are True for real elements.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..card import Paper
from ..errors import require
from ..ops.softmax_attention import attend, attention_weights
from ..validate import check_divisible, check_option
from .heads import merge_heads, split_heads
from .linear import Linear
from .masks import zero_rows

SET_TRANSFORMER = Paper(
    title="Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks",
    authors="Juho Lee, Yoonho Lee, Jungtaek Kim, Adam R. Kosiorek, Seungjin Choi, Yee Whye Teh",
    venue="ICML",
    year=2019,
    arxiv="1810.00825",
)


class MAB(nn.Module):
    """O = ln0(q + softmax(s q k^T) v);  out = ln1(O + relu(fc_o(O))),  s = out_dim^-1/2 ("dim") or head width^-1/2 ("head")."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        context_dim: int | None = None,
        out_dim: int | None = None,
        *,
        norm: bool = False,
        scale: Literal["dim", "head"] = "dim",
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.context_dim = dim if context_dim is None else context_dim
        self.out_dim = dim if out_dim is None else out_dim
        check_divisible(self.out_dim, num_heads, "out_dim", "num_heads")
        check_option(scale, ("dim", "head"), "scale")
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        self.norm, self.scale, self.dropout = norm, scale, dropout
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc_q = Linear(dim, self.out_dim, **dd)
        self.fc_k = Linear(self.context_dim, self.out_dim, **dd)
        self.fc_v = Linear(self.context_dim, self.out_dim, **dd)
        self.ln0 = nn.LayerNorm(self.out_dim, **dd) if norm else nn.Identity()
        self.ln1 = nn.LayerNorm(self.out_dim, **dd) if norm else nn.Identity()
        self.fc_o = Linear(self.out_dim, self.out_dim, **dd)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, N, dim), or (1, N, dim) shared by the batch; context (B, M, context_dim). Weights are (B, H, N, M)."""
        context = x if context is None else context
        q = self.fc_q(x)
        heads = split_heads(q, self.num_heads).expand(context.shape[0], -1, -1, -1)
        v = split_heads(self.fc_v(context), self.num_heads)
        k, options = self._scored(context, key_mask)
        out = attend(heads, k, v, dropout=self.dropout if self.training else 0.0, **options)
        out = self.ln0(q + merge_heads(out))
        out = zero_rows(self.ln1(out + torch.relu(self.fc_o(out))), query_mask)
        return (out, self.weights(x, context, key_mask=key_mask, query_mask=query_mask)) if return_weights else out

    def weights(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """The weights of R chosen queries alone, (B, H, R, M); of all if None. Queries that are no elements weigh nothing."""
        context = x if context is None else context
        k, options = self._scored(context, key_mask)
        q = split_heads(self.fc_q(x if queries is None else x[:, queries]), self.num_heads).expand(context.shape[0], -1, -1, -1)
        weights = attention_weights(q, k, **options)
        if query_mask is None:
            return weights
        real = query_mask if queries is None else query_mask[:, queries]
        return weights.masked_fill(~real[:, None, :, None], 0.0)

    def _scored(self, context: Tensor, key_mask: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        width = self.out_dim if self.scale == "dim" else self.out_dim // self.num_heads
        mask = None if key_mask is None else key_mask[:, None, None]
        return split_heads(self.fc_k(context), self.num_heads), {"scale": width**-0.5, "mask": mask}


class SAB(nn.Module):
    """A set attends to itself: MAB(x, x)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        out_dim: int | None = None,
        *,
        norm: bool = False,
        scale: Literal["dim", "head"] = "dim",
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.mab = MAB(dim, num_heads, dim, out_dim, norm=norm, scale=scale, dropout=dropout, device=device, dtype=dtype)
        self.dim, self.num_heads, self.out_dim = dim, num_heads, self.mab.out_dim
        self.norm, self.scale, self.dropout = norm, scale, dropout

    def forward(self, x: Tensor, *, mask: Tensor | None = None, return_weights: bool = False):
        return self.mab(x, key_mask=mask, query_mask=mask, return_weights=return_weights)


class ISAB(nn.Module):
    """A set attends to what m learned points `I` have gathered from it: MAB1(x, MAB0(I, x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        out_dim: int | None = None,
        num_inducing: int = 32,
        *,
        norm: bool = False,
        scale: Literal["dim", "head"] = "dim",
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        require(num_inducing > 0, "num_inducing={} must be at least 1", num_inducing)
        self.dim, self.num_heads, self.out_dim, self.num_inducing = dim, num_heads, dim if out_dim is None else out_dim, num_inducing
        self.norm, self.scale, self.dropout = norm, scale, dropout
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.I = nn.Parameter(torch.empty(1, num_inducing, self.out_dim, **dd))
        nn.init.xavier_uniform_(self.I)
        self.mab0 = MAB(self.out_dim, num_heads, dim, self.out_dim, norm=norm, scale=scale, dropout=dropout, **dd)
        self.mab1 = MAB(dim, num_heads, self.out_dim, self.out_dim, norm=norm, scale=scale, dropout=dropout, **dd)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, return_weights: bool = False):
        """With `return_weights` also (points to elements (B, H, m, N), elements to points (B, H, N, m))."""
        if not return_weights:
            return self.mab1(x, self.mab0(self.I, x, key_mask=mask), query_mask=mask)
        points, gathered = self.mab0(self.I, x, key_mask=mask, return_weights=True)
        out, spread = self.mab1(x, points, query_mask=mask, return_weights=True)
        return out, (gathered, spread)


class PMA(nn.Module):
    """k learned seeds `S` pool a set: MAB(S, x), or MAB(S, relu(rff(x)))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_seeds: int = 1,
        *,
        norm: bool = False,
        rff: bool = False,
        scale: Literal["dim", "head"] = "dim",
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        require(num_seeds > 0, "num_seeds={} must be at least 1", num_seeds)
        self.dim, self.num_heads, self.num_seeds = dim, num_heads, num_seeds
        self.norm, self.scale, self.dropout = norm, scale, dropout
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.S = nn.Parameter(torch.empty(1, num_seeds, dim, **dd))
        nn.init.xavier_uniform_(self.S)
        self.mab = MAB(dim, num_heads, dim, dim, norm=norm, scale=scale, dropout=dropout, **dd)
        self.rff = Linear(dim, dim, **dd) if rff else None

    def forward(self, x: Tensor, *, mask: Tensor | None = None, return_weights: bool = False):
        """(B, k, dim); with `return_weights` also (B, H, k, N)."""
        x = x if self.rff is None else torch.relu(self.rff(x))
        return self.mab(self.S, x, key_mask=mask, return_weights=return_weights)
