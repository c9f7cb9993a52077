r"""Hypercube attention: blocks of tokens attend to themselves and to the blocks that are their neighbours on a hypercube.

    out = softmax(q k^T / sqrt(d)) v over the tokens of adjacent blocks;  blocks i, j are adjacent iff g(i) XOR g(j) has at most one bit set
    g(i) = i XOR (i >> 1), the Gray code: the next block is always a neighbour, and ceil(log2 n) layers join any two of n blocks

Wang, Lee, Guo, Yin, Zhou, Huang, Qiu, "What Dense Graph Do You Need for Self-Attention?", ICML 2022. arXiv:2205.14014.
B batch, N tokens, n = N / block_size blocks, D dim, H heads, d head width. Where n is no power of two the cube is cut: neighbours beyond the end are
dropped. Masked keys get -inf, not the code's -10000. Not in the paper: any N, weights dropout, a query without any key gets zeros before the output.
"""

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, rename
from ...ops.softmax_attention.hypercube import HypercubePattern, hypercube_layout, nip
from ...ops.softmax_attention.patterns import sparse_attend, sparse_weights
from ...parts.heads import head_width, merge_heads, split_heads
from ...validate import check_bool, check_broadcastable, check_mask, check_tokens


def _nip(max_layers: int = 64, **graphs: Tensor) -> dict[str, Tensor]:
    """Golden files: "<name>.adjacency" in; "<name>.score" and "<name>.layers" out, "<name>.<cost>.score" and ".layers" for each cost."""
    out: dict[str, Tensor] = {}
    costs: tuple[tuple[str, Literal["max", "mean"]], ...] = (("", "max"), (".max", "max"), (".mean", "mean"))
    for key, adjacency in graphs.items():
        name = key.removesuffix(".adjacency")
        for suffix, cost in costs:
            score, layers = nip(adjacency, max_layers, cost)
            out |= {f"{name}{suffix}.score": torch.tensor([score]), f"{name}{suffix}.layers": torch.tensor([layers])}
    return out


class HypercubeAttention(Mechanism):
    """Args:
    dim: width of the input and the output.
    num_heads, head_dim: number of heads and width of each; head_dim=None means dim // num_heads.
    block_size: tokens of a block; 1 is the cube of single tokens.
    qkv_bias, out_bias: biases of the projections.
    dropout: probability of dropping a weight in training; above 0 training builds the N x N mask, as `attn_mask` does.
    """

    card: ClassVar = Card(
        id="hypercube",
        layout="sequence",
        paper=Paper(
            title="What Dense Graph Do You Need for Self-Attention?",
            authors="Yuxin Wang, Chu-Tak Lee, Qipeng Guo, Zhangyue Yin, Yunhua Zhou, Xuanjing Huang, Xipeng Qiu",
            venue="ICML",
            year=2022,
            arxiv="2205.14014",
        ),
        source="yxzwang/Normalized-Information-Payload (no licence file)",
        summary="Blocks attend to their neighbours on a hypercube: log2 n of n blocks, and any two are log2 n layers apart.",
        when="Long encoders at nearly linear cost, where every token must reach every other within a few layers.",
        flops="8*B*N*dim*num_heads*head_dim + 4*B*num_heads*head_dim*(N*N if N < 512 or N <= 4*block_size"
        " else ceil(N/block_size)*block_size**2*(1 + ceil(log2(ceil(N/block_size)))))",
        grows={"N": 1.1},  # N log N
        can=frozenset({"key_mask", "attn_mask", "weights", "rows", "row_stochastic", "qkv_core"}),
        checked_against="authors",
        uncertain="The authors' float16 block-sparse kernel was replaced by a dense mask; `regard.nip` is a rebuilding, not their score.",
        example={"dim": 16, "num_heads": 4},
        variants=(
            {"dim": 16, "num_heads": 2, "head_dim": 6, "block_size": 4, "qkv_bias": False},
            {"dim": 18, "num_heads": 3, "block_size": 2, "out_bias": False},
        ),
    )
    official: ClassVar = (
        KeyMap(
            "yxzwang/Normalized-Information-Payload",
            (rename("attn.query.*", "q_proj.*"), rename("attn.key.*", "k_proj.*"), rename("attn.value.*", "v_proj.*"), rename("ff.*", "out_proj.*")),
            ignore=(r"(.*\.)?master_layout",),
        ),
    )
    functions: ClassVar = {
        "nip": _nip,
        "block_layout": lambda module, x, **_: hypercube_layout(-(-x.shape[1] // module.block_size)).to(x.dtype),
    }

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        *,
        block_size: int = 16,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_width(dim, num_heads, head_dim)
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        self.block_size, self.qkv_bias, self.out_bias, self.dropout = block_size, qkv_bias, out_bias, dropout
        self.allowed = HypercubePattern(block_size)
        dd = {"device": device, "dtype": dtype}
        width = num_heads * self.head_dim
        self.q_proj = nn.Linear(dim, width, qkv_bias, **dd)
        self.k_proj = nn.Linear(dim, width, qkv_bias, **dd)
        self.v_proj = nn.Linear(dim, width, qkv_bias, **dd)
        self.out_proj = nn.Linear(width, dim, out_bias, **dd)

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        context: None = None,
        *,
        key_mask: Bool[Tensor, "b n"] | None = None,
        attn_mask: Bool[Tensor, "#b #h n n"] | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n dim"] | tuple[Tensor, Tensor]:
        """Attend within `x`, over the pairs that the cube and the masks allow.

        Returns (B, N, dim), or that and the weights, dense, (B, H, N, N).
        """
        require(context is None, "hypercube attends within x: it takes no context")
        self._check(x, key_mask, attn_mask)
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        dropout = self.dropout if self.training else 0.0
        out = sparse_attend(q, k, v, self.allowed, dropout=dropout, key_mask=key_mask, attn_mask=attn_mask)
        out = self.out_proj(merge_heads(out))
        return (out, self.weights(x, key_mask=key_mask, attn_mask=attn_mask)) if return_weights else out

    def weights(
        self,
        x: Tensor,
        context: None = None,
        *,
        queries: Tensor | None = None,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Float[Tensor, "b h r n"]:
        """The weights of R chosen positions alone, dense; of all if None."""
        require(context is None, "hypercube attends within x: it takes no context")
        self._check(x, key_mask, attn_mask)
        q = split_heads(self.q_proj(x if queries is None else x[:, queries]), self.num_heads)
        k = split_heads(self.k_proj(x), self.num_heads)
        return sparse_weights(q, k, self.allowed, queries=queries, key_mask=key_mask, attn_mask=attn_mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """The core alone, on (B, H, N, d)."""
        return sparse_attend(q, k, v, self.allowed, key_mask=key_mask)

    def _check(self, x: Tensor, key_mask: Tensor | None, attn_mask: Tensor | None) -> None:
        check_tokens(x, self.dim)
        b, n, _ = x.shape
        check_mask(key_mask, b, n)
        if attn_mask is not None:
            check_bool(attn_mask, "attn_mask")
            check_broadcastable(attn_mask, (b, self.num_heads, n, n), "attn_mask")
