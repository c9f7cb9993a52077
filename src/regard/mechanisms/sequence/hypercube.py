r"""Hypercube attention: blocks of tokens attend to themselves and to the blocks that are their neighbours on a hypercube.

    out = softmax(q k^T / sqrt(d)) v over the tokens of adjacent blocks;  blocks i, j are adjacent iff g(i) XOR g(j) has at most one bit set
    g(i) = i XOR (i >> 1), the Gray code: the next block is always a neighbour, and ceil(log2 n) layers join any two of n blocks

Wang, Lee, Guo, Yin, Zhou, Huang, Qiu, "What Dense Graph Do You Need for Self-Attention?", ICML 2022. arXiv:2205.14014.
B batch, N tokens, n = N / block_size blocks, D dim, H heads, d head width. Where n is no power of two the cube is cut: neighbours beyond the end are
dropped. Masked keys get -inf, not the code's -10000. Not in the paper: any N, weights dropout, a query without any key gets zeros before the output.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...card import Card, Paper
from ...mechanism import Mechanism
from ...official import KeyMap, rename
from ...ops.softmax_attention.hypercube import HypercubePattern, hypercube_layout, nip
from ...parts.pattern_attention import PatternAttention


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


class HypercubeAttention(PatternAttention, Mechanism):
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
        options = {"qkv_bias": qkv_bias, "out_bias": out_bias}
        super().__init__(dim, num_heads, head_dim, HypercubePattern(block_size), **options, dropout=dropout, device=device, dtype=dtype)
        self.block_size = block_size
