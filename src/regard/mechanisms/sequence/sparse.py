r"""Sparse Transformer attention: each query sees a near set and a far set of keys, chosen so that two hops join any pair.

    strided   A0 = {i - j < l}                   A1 = {(i - j) mod l = 0}
    fixed     A0 = {floor(i / l) = floor(j / l)}   A1 = {j mod l among the last c columns}, one stripe of c columns for each head
    out = softmax(q k^T / sqrt(d)) v over A0 and A1 together, or over one of them in turn by head or layer; j <= i where causal

Child, Gray, Radford, Sutskever, "Generating Long Sequences with Sparse Transformers", 2019. arXiv:1904.10509.
B batch, N positions, D dim, H heads, d head width, l stride, c summary. The paper's near set has l + 1 keys, the code's l: ours too. A query whose
set is empty (fixed A1 before the first summary) gets zeros; the code's dense form spreads it over all keys, future ones included. Not in the paper:
A0 of strided without order is |i - j| < l; any N.
"""

from typing import ClassVar, Literal

from ...card import Card, Paper
from ...mechanism import Mechanism
from ...ops.softmax_attention.patterns import SparsePattern, sparse_pattern
from ...parts.heads import init_projections_
from ...parts.pattern_attention import PatternAttention
from ...validate import check_divisible

# Keys that a query meets, as the block form multiplies them: windows of 32 queries over the band; whole blocks; the summaries of earlier blocks, for
# 16 groups of blocks.
_L = "(stride if stride else ceil(sqrt(N)))"
_T = f"ceil(N/{_L})"
_NEAR = f"({_T}*{_L}**2/N if pattern == 'fixed' else 32 + (1 if causal else 2)*32*ceil(({_L} - 1)/32))"
_EARLIER = f"(({_T} - 1)*({_T} - 1 + ceil(({_T} - 1)/16))/2 + {_T}*(head_mode != 'merged'))"
_FAR = f"({_L}/N*({_T}**2 if pattern == 'strided' else summary*({_EARLIER} if causal else {_T}**2)))"


class SparseAttention(PatternAttention, Mechanism):
    """Args:
    dim: width of the input and the output.
    num_heads, head_dim: number of heads and width of each; head_dim=None means dim // num_heads.
    pattern: "strided" for data with a period (rows of an image), "fixed" for text, "local" for the near set alone, "all" for every pair.
    stride: l; None means ceil(sqrt(N)) at each call, so the pattern, and with it the output, then depends on the length and on padding.
    summary: c, columns of each block that later blocks see ("fixed").
    num_stripes: heads look at so many different stripes of summary columns in turn ("fixed").
    head_mode: "merged": every head uses both sets; "split": even heads the near one, odd heads the far one; "interleaved": all that of the layer.
    layer_index: even layers use the near set, odd ones the far set ("interleaved").
    causal: key j is seen by query i only if j <= i.
    qkv_bias, out_bias: biases of the projections.
    dropout: probability of dropping a weight in training; above 0 training builds the N x N mask, as `attn_mask` does.
    """

    card: ClassVar = Card(
        id="sparse",
        layout="sequence",
        paper=Paper(
            title="Generating Long Sequences with Sparse Transformers",
            authors="Rewon Child, Scott Gray, Alec Radford, Ilya Sutskever",
            venue="arXiv preprint",
            year=2019,
            arxiv="1904.10509",
        ),
        source="openai/sparse_attention (no licence file)",
        summary="Softmax over a near block and over every l-th key, or the last columns of every block.",
        when="Autoregressive models of long sequences, images row by row (strided) or text (fixed); set the stride if lengths vary.",
        flops=f"8*B*N*dim*num_heads*head_dim + 4*B*N*head_dim*(num_heads*N if pattern == 'all' or N < (256 if causal else 512) or N < 2*{_L}"
        f" else near_heads*{_NEAR} + far_heads*{_FAR})",
        grows={"N": 1.5},
        can=frozenset({"causal", "key_mask", "attn_mask", "weights", "rows", "row_stochastic", "qkv_core"}),
        # A free stride depends on the length: a padded sequence, or a prefix, has another pattern. The far set of "fixed" alone has empty rows.
        unless={"key_mask": "stride is None", "row_stochastic": "pattern == 'fixed' and head_mode != 'merged'"},
        bounds={"prefix_property": (float("inf"), "stride is None")},
        checked_against="equations",
        uncertain="The patterns equal the authors' block layouts; their TensorFlow 1 kernels were not run.",
        example={"dim": 16, "num_heads": 4},
        variants=(
            {"dim": 16, "num_heads": 4, "stride": 4},
            {"dim": 16, "num_heads": 4, "pattern": "fixed", "stride": 5, "num_stripes": 2},
            {"dim": 16, "num_heads": 4, "pattern": "fixed", "stride": 3, "summary": 2, "head_mode": "split", "causal": False},
            {"dim": 18, "num_heads": 3, "head_mode": "split", "causal": False, "qkv_bias": False},
        ),
    )
    functions: ClassVar = {"sparse_pattern": sparse_pattern}

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        pattern: Literal["strided", "fixed", "local", "all"] = "strided",
        stride: int | None = None,
        summary: int = 1,
        num_stripes: int = 1,
        head_mode: Literal["merged", "split", "interleaved"] = "merged",
        layer_index: int = 0,
        causal: bool = True,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        check_divisible(num_heads, num_stripes, "num_heads", "num_stripes")
        allowed = SparsePattern(pattern, stride, summary, num_stripes, head_mode, layer_index, causal)
        biases = {"qkv_bias": qkv_bias, "out_bias": out_bias}
        super().__init__(dim, num_heads, head_dim, allowed, **biases, dropout=dropout, device=device, dtype=dtype)
        self.pattern, self.stride, self.summary, self.num_stripes = pattern, stride, summary, num_stripes
        self.head_mode, self.layer_index, self.causal = head_mode, layer_index, causal
        heads = [(len(range(num_heads)[group]), factors) for group, factors in allowed.groups()]
        self.near_heads, self.far_heads = (sum(count for count, factors in heads if name in factors) for name in ("A0", "A1"))
        init_projections_(self.q_proj, self.k_proj, self.v_proj, self.out_proj)
