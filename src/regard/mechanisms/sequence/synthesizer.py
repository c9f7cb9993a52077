r"""Synthesizer: attention whose scores compare no tokens; they are predicted from the query alone, or learned constants.

    out = softmax_M(S) v Wo^T + bo     dense: S = relu(x W1 + b1) W2 + b2,   W2 (e, L)     random: S = R,   R (L, L)     vanilla: S = q k^T / sqrt(d)
    factorized_random: S = R1 R2^T     factorized_dense: S_j = a_(j div |c|) c_(j mod |c|), both predicted as by dense
    several modes: S = sum_i alpha_i S_i,   alpha = softmax(mix), or all 1

Tay, Bahri, Metzler, Juan, Zhao, Zheng, "Synthesizer: Rethinking Self-Attention in Transformer Models", ICML 2021. arXiv:2005.00743. We follow the
paper; that one of the two factors is repeated block by block and the other number by number is our reading of its "tiling". The authors' code has no
biases, shares W2 among the heads (share_w2), leaves out 1 / sqrt(d), and for two modes gates by a sigmoid, which equals our softmax; its factorised
branch cannot run. The rows of S are those of the first N positions, its columns those of the first M. B batch, N queries, M keys, D dim, E
context_dim, H heads of width d, e hidden_dim, L max_len.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule
from ...ops.softmax_attention import causal_mask, combine_masks, rows_of
from ...parts.heads import check_position, check_streaming, checked_source, head_width, init_projections_, merge_heads, split_heads
from ...parts.linear import Linear
from ...parts.synthetic import (
    DenseScores,
    FactorizedDenseScores,
    FactorizedRandomScores,
    RandomScores,
    Rows,
    Scores,
    divisors_near_root,
    synthetic_attend,
    synthetic_weights,
)
from ...validate import check_bool, check_broadcastable, check_option

Mode = Literal["dense", "random", "factorized_dense", "factorized_random", "vanilla"]


def _root(module: Any) -> float:
    return module.head_dim**0.5


# Theirs: matrices (in, out), R (L, heads, L), and 1 / sqrt(d) left to the starting values of q.
PROJECTIONS = tuple(
    Rule((theirs,), (f"{ours}_proj.weight",), lambda t, m: [t[0].mT], lambda t, m: [t[0].mT])
    for theirs, ours in zip("kvo", ("k", "v", "out"), strict=True)
)
MESH = (
    *PROJECTIONS,
    Rule(("q",), ("q_proj.weight",), lambda t, m: [t[0].mT * _root(m)], lambda t, m: [t[0].mT / _root(m)]),
    Rule(("R",), ("random.weight",), lambda t, m: [t[0].transpose(0, 1)], lambda t, m: [t[0].transpose(0, 1)]),
    Rule(("alpha",), ("mix",), lambda t, m: [torch.cat((torch.zeros_like(t[0]), t[0]))], lambda t, m: [t[0][1:] - t[0][:1]]),
)
MODES = ("dense", "random", "factorized_dense", "factorized_random", "vanilla")


class SynthesizerState(NamedTuple):
    """The values, and with mode "vanilla" the keys, of the positions so far: (B, H, t, d)."""

    values: Tensor
    keys: Tensor


class Synthesizer(Mechanism):
    """Args:
    dim: width of the input and the output.
    num_heads, head_dim: number of heads and width of each; head_dim=None means dim // num_heads.
    max_len: the most positions x or context may have; W2, R, R1 and R2 are of this length.
    mode: "dense", "random", "factorized_dense", "factorized_random" or "vanilla", or a list of some of them, whose scores are added.
    hidden_dim: width e of the predictions; head_dim if None.
    share_w2: one W2 for all heads.
    rank: of "factorized_random".
    factors: sizes of a and c, of product max_len; the divisors closest to its root if None.
    trainable_random: learn R; False keeps it as drawn.
    mix: "softmax" (learned alpha) or "sum" (all 1) for several modes; becomes the parameter (n,) where alpha is learned.
    context_dim: width of `context`; dim if None.
    qkv_bias, out_bias: biases of the projections.
    dropout: probability of dropping a weight in training.
    causal: key j is seen by query i if j <= i + M - N.
    """

    card: ClassVar = Card(
        id="synthesizer",
        layout="sequence",
        paper=Paper(
            title="Synthesizer: Rethinking Self-Attention in Transformer Models",
            authors="Yi Tay, Dara Bahri, Donald Metzler, Da-Cheng Juan, Zhe Zhao, Che Zheng",
            venue="ICML",
            year=2021,
            arxiv="2005.00743",
        ),
        source="equations of the paper; tensorflow/mesh synthetic_attention (Apache-2.0) read beside them",
        summary="Attention weights predicted from the query alone, or learned once for all inputs.",
        when="To ask whether queries and keys need to be compared at all, or to add positions' own weights to their comparison.",
        flops="2*B*num_heads*head_dim*(M*context_dim + N*dim)*(2 if 'vanilla' in modes else 1)"
        " + 2*B*N*num_heads*hidden_dim*(dim*(('dense' in modes) + ('factorized_dense' in modes))"
        " + (ceil(M/factor_b) + factor_b if 'factorized_dense' in modes else 0)) + (4*B*num_heads*N*M*max(score_dim, head_dim)"
        " if not stored and (not batch_free or B == 1) else 2*num_heads*N*M*(B*head_dim + score_dim*(1 if batch_free else B)))",
        grows={"N": 2.0},
        can=frozenset({"causal", "cross", "key_mask", "attn_mask", "weights", "rows", "row_stochastic", "step"}),
        unless={"step": "not causal", "cross": "batch_free"},  # constant weights take no gradient to x where the values are those of context
        checked_against="equations",
        uncertain="The layout of factorized_dense is our reading, and no code of the authors has it; theirs for the other modes was read, not run.",
        example={"dim": 16, "num_heads": 2, "max_len": 32768},
        variants=(
            {"dim": 24, "num_heads": 3, "max_len": 16384, "mode": "factorized_random", "causal": True},
            {"dim": 24, "num_heads": 2, "max_len": 16384, "mode": ("factorized_dense", "vanilla"), "share_w2": True, "hidden_dim": 6},
            {"dim": 32, "num_heads": 2, "max_len": 720, "mode": ("vanilla", "random"), "mix": "sum"},
            {"dim": 16, "num_heads": 2, "max_len": 720, "mode": "random"},
        ),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        *,
        max_len: int,
        mode: Mode | Sequence[Mode] = "dense",
        hidden_dim: int | None = None,
        share_w2: bool = False,
        rank: int = 8,
        factors: tuple[int, int] | None = None,
        trainable_random: bool = True,
        mix: Literal["softmax", "sum"] = "softmax",
        context_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_width(dim, num_heads, head_dim)
        self.mode = mode if isinstance(mode, str) else tuple(mode)
        self.modes = (mode,) if isinstance(mode, str) else tuple(mode)
        require(len(self.modes) > 0, "mode={} must name at least one of {}", mode, MODES)
        for one in self.modes:
            check_option(one, MODES, "mode")
        require(len(set(self.modes)) == len(self.modes), "mode={} names a mode twice", mode)
        check_option(mix, ("softmax", "sum"), "mix")
        self.hidden_dim = self.head_dim if hidden_dim is None else hidden_dim
        for name, value in (("max_len", max_len), ("rank", rank), ("hidden_dim", self.hidden_dim)):
            require(value > 0, "{}={} must be at least 1", name, value)
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        self.max_len, self.share_w2, self.rank, self.trainable_random = max_len, share_w2, rank, trainable_random
        self.factors = divisors_near_root(max_len, factors)
        self.context_dim = dim if context_dim is None else context_dim
        self.qkv_bias, self.out_bias, self.dropout, self.causal = qkv_bias, out_bias, dropout, causal
        self.factor_b, self.stored = self.factors[1], not {"random", "factorized_dense"}.isdisjoint(self.modes)
        self.batch_free = {"random", "factorized_random"}.issuperset(self.modes)
        channels = {"dense": self.hidden_dim + 1, "factorized_random": rank, "vanilla": self.head_dim}
        self.score_dim = sum(channels.get(one, 0) for one in self.modes)

        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        width, hidden = num_heads * self.head_dim, (dim, num_heads, self.hidden_dim)
        self.v_proj = Linear(self.context_dim, width, qkv_bias, **dd)
        self.out_proj = Linear(width, dim, out_bias, **dd)
        self.q_proj = Linear(dim, width, qkv_bias, **dd) if "vanilla" in self.modes else None
        self.k_proj = Linear(self.context_dim, width, qkv_bias, **dd) if "vanilla" in self.modes else None
        init_projections_(self.q_proj or self.v_proj, self.k_proj or self.v_proj, self.v_proj, self.out_proj)
        if "dense" in self.modes:
            self.dense = DenseScores(*hidden, max_len, share_w2, **dd)
        if "factorized_dense" in self.modes:
            self.factorized_dense = FactorizedDenseScores(*hidden, self.factors, share_w2, **dd)
        if "random" in self.modes:
            self.random = RandomScores(num_heads, max_len, trainable_random, **dd)
        if "factorized_random" in self.modes:
            self.factorized_random = FactorizedRandomScores(num_heads, max_len, rank, **dd)
        self.mix = nn.Parameter(torch.zeros(len(self.modes), **dd)) if mix == "softmax" and len(self.modes) > 1 else mix

    def key_maps(self) -> tuple[KeyMap, ...]:
        """Of the authors' random, random_plus and random_plus_alpha; their dense forms lack biases that ours have."""
        theirs = self.modes in (("random",), ("vanilla", "random"))
        return (KeyMap("tensorflow/mesh", MESH, optional=(r".*_proj\.bias",)),) if theirs else ()

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        context: Float[Tensor, "b m context_dim"] | None = None,
        *,
        key_mask: Bool[Tensor, "b m"] | None = None,
        attn_mask: Bool[Tensor, "#b #h n m"] | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n dim"] | tuple[Tensor, Tensor]:
        """Attend from `x` to `context` (to `x` itself if None). Returns (B, N, dim), or that and the weights (B, H, N, M)."""
        source, mask = self._checked(x, context, key_mask, attn_mask)
        v = split_heads(self.v_proj(source), self.num_heads)
        scores = self._scores(x, self._keys(source), slice(0, x.shape[1]), source.shape[1])
        out = synthetic_attend(scores, v, mask=mask, causal=self.causal, dropout=self.dropout if self.training else 0.0)
        out = self.out_proj(merge_heads(out))
        return (out, self.weights(x, context, key_mask=key_mask, attn_mask=attn_mask)) if return_weights else out

    def weights(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """The weights of R chosen positions alone, (B, H, R, M), of all if None."""
        source, mask = self._checked(x, context, key_mask, attn_mask)
        n, m, rows = x.shape[1], source.shape[1], slice(0, x.shape[1]) if queries is None else queries
        mask = combine_masks(rows_of(mask, queries), causal_mask(n, m, x.device, queries)[None, None] if self.causal else None)
        found = synthetic_weights(self._scores(x[:, rows], self._keys(source), rows, m), m, mask)
        return found.to(x.dtype).expand(x.shape[0], self.num_heads, -1, -1)

    def _checked(self, x: Tensor, context: Tensor | None, key_mask: Tensor | None, attn_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What `x` attends to, and the masks as one of four axes."""
        source = checked_source(x, context, self.dim, self.context_dim, key_mask)
        self._check_length(x.shape[1], "x")
        self._check_length(source.shape[1], "context")
        if attn_mask is not None:
            check_bool(attn_mask, "attn_mask")
            check_broadcastable(attn_mask, (x.shape[0], self.num_heads, x.shape[1], source.shape[1]), "attn_mask")
            attn_mask = attn_mask.reshape(*[1] * (4 - attn_mask.ndim), *attn_mask.shape)
        return source, combine_masks(None if key_mask is None else key_mask[:, None, None], attn_mask)

    def _check_length(self, length: int, name: str) -> None:
        require(
            length <= self.max_len, "{} has {} positions, more than max_len={}: make the synthesizer with a larger one", name, length, self.max_len
        )

    def _keys(self, source: Tensor) -> Tensor | None:
        return None if self.k_proj is None else split_heads(self.k_proj(source), self.num_heads)

    def _scores(self, x: Tensor, k: Tensor | None, rows: Rows, m: int) -> Scores:
        """Of the queries `x` at the positions `rows`, for the first m keys."""
        alphas = [None] * len(self.modes) if isinstance(self.mix, str) else self.mix.softmax(0).unbind()
        scores = Scores()
        for mode, alpha in zip(self.modes, alphas, strict=True):
            if self.q_proj is not None and mode == "vanilla":
                one = Scores(q=split_heads(self.q_proj(x), self.num_heads) * self.head_dim**-0.5, k=k)
            else:
                one = getattr(self, mode).scores(x, rows, m)
            scores = scores.plus(one, alpha)
        return scores

    def init_state(self, batch: int) -> SynthesizerState:
        """The state before the first of up to max_len positions of `batch` sequences; step by step needs causal=True."""
        check_streaming(self.causal, "synthesizer")
        empty = self.v_proj.weight.new_zeros(batch, self.num_heads, 0, self.head_dim)
        return SynthesizerState(empty, empty)

    def step(self, x: Float[Tensor, "b dim"], state: SynthesizerState) -> tuple[Float[Tensor, "b dim"], SynthesizerState]:
        """One more position: its output and the new state."""
        check_position(x, self.dim)
        x, t = x[:, None], state.values.shape[2]
        self._check_length(t + 1, "x")
        values, k = torch.cat((state.values, split_heads(self.v_proj(x), self.num_heads)), 2), self._keys(x)
        keys = state.keys if k is None else torch.cat((state.keys, k), 2)
        out = synthetic_attend(self._scores(x, keys, slice(t, t + 1), t + 1), values)
        return self.out_proj(merge_heads(out))[:, 0], SynthesizerState(values, keys)
