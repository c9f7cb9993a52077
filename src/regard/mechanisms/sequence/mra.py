r"""MRA attention: block means find the blocks of the score matrix that matter; those are computed exactly, the others as one value each.

    l_ij = s Q_i . K_j between means of blocks of b tokens;  the K blocks with the largest l_ij - max_j l_ij, over the whole matrix, are refined
    out_r = (sum over refined j, c in j of e^(s q_r . k_c) v_c + sum over other j of t_j e^(l_ij) V_j) / (the same with v = 1),  r in block i

Zeng, Pal, Kline, Fung, Singh, "Multi Resolution Analysis (MRA) for Approximate Self-Attention", ICML 2022. arXiv:2207.10284.
B batch, N tokens, n = N / b blocks, D dim, H heads, d head width, s = d^-1/2, t_j real tokens of block j, V_j mean of v there. mode="full" is MRA-2,
"sparse" (refined terms alone) MRA-2-s. The stabilised denominator has the code's + 1e-6; masked keys get -inf, not its -1e4. The code rebuilds the
refined set by a threshold and loses blocks on ties: here it is the chosen K. Not in the code: any N (padding counts as masked), out_proj, dropout.
K and max_j l_ij count masked blocks, as in the code: in a padded batch a sequence may get other blocks than alone, unless all blocks are refined.
"""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, rename
from ...ops.multiresolution import Resolution, multiresolution, multiresolution_weights, refined_blocks
from ...parts.heads import head_width, merge_heads, split_heads
from ...parts.linear import Linear
from ...validate import check_mask, check_option, check_tokens

_BLOCKS = "ceil(N/block_size)"
QKV = ("query", "key", "value")


class MRAttention(Mechanism):
    """Args:
    dim: width of the input and the output.
    num_heads, head_dim: number of heads and width of each; head_dim=None means dim // num_heads.
    block_size: b, tokens of a block.
    num_blocks: K, blocks refined in each head, at least as many as there are rows of blocks; None means blocks_per_row for each of these.
    blocks_per_row: see num_blocks; the choice is over the whole matrix all the same, and a row may get more or fewer.
    mode: "full", or "sparse" without the blocks that are not refined.
    first_blocks, diagonal_blocks: prefer so many first rows and columns of blocks, and a band so many blocks wide.
    grid_size: (height, width) of an image whose pixels the tokens are, row by row; blocks are then patches of it.
    patch: (height, width) of a patch, block_size pixels; None takes the squarest, the wider side along rows: (4, 8) for 32.
    allow_empty_rows: allow num_blocks below the number of rows; rows without a refined block are chosen by rounding, and zero in "sparse".
    out_proj: an output projection; without it, as the authors leave it to the layer around, the output is num_heads * head_dim wide.
    qkv_bias, out_bias: biases of the projections.
    dropout: probability of dropping a weight in training, of a pair in refined blocks and of a block in the others.
    """

    card: ClassVar = Card(
        id="mra",
        layout="sequence",
        paper=Paper(
            title="Multi Resolution Analysis (MRA) for Approximate Self-Attention",
            authors="Zhanpeng Zeng, Sourav Pal, Jeffery Kline, Glenn Moo Fung, Vikas Singh",
            venue="ICML",
            year=2022,
            arxiv="2207.10284",
        ),
        source="mlpen/mra-attention (no licence file)",
        summary="Block averages find the blocks of pairs that matter; these are exact, the rest is one value a block.",
        when="In place of softmax attention in a trained encoder, for inputs whose neighbouring tokens are alike.",
        flops="2*B*N*dim*num_heads*head_dim*(4 if out_proj else 3) + B*num_heads*head_dim*((4 if mode == 'full' else 2)*"
        f"{_BLOCKS}**2 + 4*block_size**2*min(num_blocks if num_blocks else {_BLOCKS}*blocks_per_row, {_BLOCKS}**2))",
        grows={"N": 2.0},  # (N / b)^2
        can=frozenset({"key_mask", "weights", "row_stochastic", "qkv_core"}),
        # Preferred blocks beyond K leave rows without any, as too few blocks do.
        unless={"row_stochastic": "mode == 'sparse' and (allow_empty_rows or first_blocks > 0 or diagonal_blocks > 0)"},
        checked_against="authors",
        uncertain="Run with the CUDA kernel of row maxima replaced; the maxima there, of integers, are only nearly what is used here.",
        example={"dim": 16, "num_heads": 4, "block_size": 4},
        variants=(
            {"dim": 16, "num_heads": 2, "head_dim": 6, "block_size": 2, "num_blocks": 400, "mode": "sparse", "diagonal_blocks": 3},
            {"dim": 18, "num_heads": 3, "block_size": 3, "blocks_per_row": 4, "first_blocks": 1, "out_proj": False, "qkv_bias": False},
        ),
        returns=("out", "weights", "blocks"),
    )
    official: ClassVar = (
        KeyMap("mlpen/mra-attention", tuple(rename(f"{theirs}.*", f"{theirs[0]}_proj.*") for theirs in QKV)),
        KeyMap(
            "transformers MraAttention",
            (*(rename(f"self.{theirs}.*", f"{theirs[0]}_proj.*") for theirs in QKV), rename("output.dense.*", "out_proj.*")),
            ignore=(r"output\.LayerNorm\..*",),
        ),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        *,
        block_size: int = 32,
        num_blocks: int | None = None,
        blocks_per_row: int = 4,
        mode: Literal["full", "sparse"] = "full",
        first_blocks: int = 0,
        diagonal_blocks: int = 0,
        grid_size: tuple[int, int] | None = None,
        patch: tuple[int, int] | None = None,
        allow_empty_rows: bool = False,
        out_proj: bool = True,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_width(dim, num_heads, head_dim)
        check_option(mode, ("full", "sparse"), "mode")
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        self.resolution = Resolution(block_size, num_blocks, blocks_per_row, mode == "full", first_blocks, diagonal_blocks)
        self.block_size, self.num_blocks, self.blocks_per_row, self.mode = block_size, num_blocks, blocks_per_row, mode
        self.first_blocks, self.diagonal_blocks, self.allow_empty_rows = first_blocks, diagonal_blocks, allow_empty_rows
        self.grid_size, self.patch = grid_size, _patch(block_size, grid_size, patch)
        self.qkv_bias, self.out_bias, self.dropout = qkv_bias, out_bias, dropout
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        width = num_heads * self.head_dim
        self.q_proj = Linear(dim, width, qkv_bias, **dd)
        self.k_proj = Linear(dim, width, qkv_bias, **dd)
        self.v_proj = Linear(dim, width, qkv_bias, **dd)
        self.out_proj = Linear(width, dim, out_bias, **dd) if out_proj else None
        for linear in filter(None, (self.q_proj, self.k_proj, self.v_proj, self.out_proj)):
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        context: None = None,
        *,
        key_mask: Bool[Tensor, "b n"] | None = None,
        attn_mask: None = None,
        return_weights: bool = False,
        return_blocks: bool = False,
    ) -> Float[Tensor, "b n dim"] | tuple[Tensor, ...]:
        """Attend within `x`. `key_mask` marks real tokens, as keys and as queries: the attention of others is zero.

        Returns (B, N, dim), then on request what multiplies each value, (B, H, N, N), and the refined blocks, boolean (B, H, n, n).
        """
        q, k, source, masks = self._scores(x, context, key_mask, attn_mask)
        v = split_heads(self.v_proj(source), self.num_heads)
        out = merge_heads(multiresolution(q, k, v, self.resolution, dropout=self.dropout if self.training else 0.0, **masks))
        out = self._patches(out, back=True)
        out = out if self.out_proj is None else self.out_proj(out)
        if not (return_weights or return_blocks):
            return out
        weights = (self.weights(x, key_mask=key_mask),) if return_weights else ()
        return out, *weights, *((refined_blocks(q, k, self.resolution, **masks),) if return_blocks else ())

    def weights(
        self, x: Tensor, context: None = None, *, queries: Tensor | None = None, key_mask: Tensor | None = None, attn_mask: None = None
    ) -> Float[Tensor, "b h r n"]:
        """What multiplies each value in the rows of R chosen positions, of all if None."""
        q, k, _, masks = self._scores(x, context, key_mask, attn_mask)
        place = self._patches(torch.arange(x.shape[1], device=x.device)[None])[0].argsort()
        return multiresolution_weights(q, k, self.resolution, queries=place if queries is None else place[queries], **masks)[..., place]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """The core alone, on (B, H, N, d), in the order given: without the patches of a grid."""
        return multiresolution(q, k, v, self.resolution, key_mask=key_mask, scale=q.shape[-1] ** -0.5)

    def _scores(self, x: Tensor, context: None, key_mask: Tensor | None, attn_mask: None) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Queries and keys, what they are made of, patch by patch if there is a grid, and how they are scored."""
        require(context is None, "mra attends within x: it takes no context")
        require(attn_mask is None, "mra chooses its pairs by blocks: it takes no attn_mask; hide tokens with key_mask")
        check_tokens(x, self.dim)
        (b, length, _), grid = x.shape, self.grid_size
        check_mask(key_mask, b, length)
        require(grid is None or length == grid[0] * grid[1], "x has {} positions, but grid_size={}", length, grid)
        rows = self.resolution.rows(length)
        enough = self.num_blocks is None or self.allow_empty_rows or self.num_blocks >= rows
        require(enough, "num_blocks={} is below the {} rows of blocks; raise it, or set blocks_per_row instead", self.num_blocks, rows)
        x, key_mask = self._patches(x), None if key_mask is None else self._patches(key_mask)
        q, k = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj))
        return q, k, x, {"key_mask": key_mask, "scale": self.head_dim**-0.5}

    def _patches(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Positions from row by row to patch by patch, or back."""
        if self.grid_size is None or self.patch is None:
            return x
        (height, width), (h, w) = self.grid_size, self.patch
        shape = (height // h, width // w, h, w) if back else (height // h, h, width // w, w)
        return x.unflatten(1, shape).transpose(2, 3).flatten(1, 4)


def _patch(block_size: int, grid: tuple[int, int] | None, patch: tuple[int, int] | None) -> tuple[int, int] | None:
    """The patch of a block, checked; None without a grid."""
    if grid is None:
        require(patch is None, "patch={} needs grid_size", patch)
        return None
    if patch is None:
        height = max(h for h in range(1, int(block_size**0.5) + 1) if block_size % h == 0)
        patch = (height, block_size // height)
    require(min(patch) > 0 and patch[0] * patch[1] == block_size, "patch={} must have block_size={} pixels", patch, block_size)
    whole = min(grid) > 0 and grid[0] % patch[0] == 0 and grid[1] % patch[1] == 0
    require(whole, "grid_size={} is not divisible by patch={}; give a patch that divides it", grid, patch)
    return patch
