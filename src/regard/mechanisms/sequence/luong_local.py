r"""Luong local attention: each decoder state looks at a window of the source around the position that it is aligned to.

    monotonic:  p_t = min(t, L - 1)          predictive: p_t = L sigmoid(vp . tanh(Wp h_t)), real-valued
    a_t(s) = softmax of the scores over the integers s in [p_t - D, p_t + D] and [0, L),   predictive: times exp(-(s - p_t)^2 / 2 sigma^2)
    c_t = sum_s a_t(s) m_s,   out_t = tanh(Wo [c_t ; h_t])

Luong, Pham, Manning, "Effective Approaches to Attention-based Neural Machine Translation", EMNLP 2015. arXiv:1508.04025.
Scores as in luong_global. The paper leaves open, and is decided here: positions count from 0; the window is that of the real p_t; the weights are not
normalised again after the Gaussian, through which alone the gradient reaches Wp and vp. Not in the paper: p_t stays on the source when the target is
longer. B batch, N decoder states, M encoder states, L real ones of a sample, D window.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap
from ...ops import _dispatch
from ...ops._precision import at_least_float32, full_precision
from ...ops.aligned_window import gather_runs, run_dots, run_sums
from ...ops.softmax_attention import rows_of
from ...parts.linear import Linear
from ...parts.luong import Score, attentional, checked_step, in_rows, luong_layers, normalized, queries_and_keys, scores
from ...validate import check_option

_dispatch.register("luong_local", "dense", "gathered")
_SHORT = "2*(2*window + 1) < M"


class LuongLocalAttention(Mechanism):
    """Args:
    dim: width of the decoder states and of the output.
    context_dim: width of the encoder states; dim if None.
    window: D, how far a state looks to either side of its position.
    mode: "predictive": the state says where to look; "monotonic": state t looks at position t.
    score: "dot" (equal widths), "general" or "concat".
    sigma: width of the Gaussian of "predictive"; window / 2 if None.
    score_bias: bias of the query projection of "concat".
    out_bias: bias of the output projection.
    activation: "tanh", or None for none.
    dropout: probability of dropping a weight in training.
    """

    card: ClassVar = Card(
        id="luong_local",
        layout="sequence",
        paper=Paper(
            title="Effective Approaches to Attention-based Neural Machine Translation",
            authors="Minh-Thang Luong, Hieu Pham, Christopher D. Manning",
            venue="EMNLP",
            year=2015,
            arxiv="1508.04025",
        ),
        source="no trusted public code; the paper's equations",
        summary="Softmax over a window of the source around a predicted or running position.",
        when="Recurrent decoders on long sources: the cost of a step does not grow with the source.",
        flops="2*B*N*(context_dim + dim)*dim + (2*B*N*dim*(dim + 1) if mode == 'predictive' else 0)"
        " + (2*B*min(N, M)*dim*context_dim if score == 'general' else 0)"
        f" + (2*B*N*dim**2 + 2*B*(min(N*(2*window + 1), M) if {_SHORT} else M)*context_dim*dim if score == 'concat' else 0)"
        f" + 2*B*N*((2*window + 1) if {_SHORT} else M)*((context_dim if score == 'general' and N <= M else dim) + context_dim)",
        grows={"N": 1.0},
        can=frozenset({"cross", "key_mask", "attn_mask", "weights", "rows"}),
        # A predicted position needs to know where the source ends: key_mask may then hide the end alone.
        unless={"key_mask": "mode == 'predictive'"},
        returns=("out", "weights", "positions"),
        checked_against="equations",
        uncertain="The paper does not say whether positions count from 0 or 1, nor whether the window is that of the rounded position.",
        example={"dim": 16, "window": 6},
        variants=(
            {"dim": 16, "window": 2, "mode": "monotonic", "score": "dot"},
            {"dim": 16, "window": 6, "score": "concat", "score_bias": True, "out_bias": True, "sigma": 1.5},
        ),
    )
    official: ClassVar = (KeyMap("OpenNMT/OpenNMT-py"),)

    linear_query: nn.Linear
    linear_context: nn.Linear
    v: nn.Linear
    linear_p: nn.Linear
    v_p: nn.Linear

    def __init__(
        self,
        dim: int,
        context_dim: int | None = None,
        *,
        window: int = 10,
        mode: Literal["predictive", "monotonic"] = "predictive",
        score: Literal["dot", "general", "concat"] = "general",
        sigma: float | None = None,
        score_bias: bool = False,
        out_bias: bool = False,
        activation: Literal["tanh"] | None = "tanh",
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        require(isinstance(window, int) and window >= 1, "window={} must be a whole number of at least 1", window)
        check_option(mode, ("predictive", "monotonic"), "mode")
        check_option(score, ("dot", "general", "concat"), "score")
        check_option(activation, ("tanh", None), "activation")
        require(sigma is None or sigma > 0, "sigma={} must be positive, or None for window / 2", sigma)
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        self.dim, self.context_dim, self.window, self.mode = dim, dim if context_dim is None else context_dim, window, mode
        self.score: Score = score
        self.sigma = window / 2 if sigma is None else sigma
        self.score_bias, self.out_bias, self.activation, self.dropout = score_bias, out_bias, activation, dropout
        layers = luong_layers(dim, self.context_dim, score, None, score_bias, out_bias, device=device, dtype=dtype)
        if mode == "predictive":
            layers["linear_p"] = Linear(dim, dim, False, device=device, dtype=dtype)
            layers["v_p"] = Linear(dim, 1, False, device=device, dtype=dtype)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(
        self,
        x: Float[Tensor, "b *n dim"],
        context: Float[Tensor, "b m context_dim"] | None = None,
        *,
        key_mask: Bool[Tensor, "b m"] | None = None,
        attn_mask: Bool[Tensor, "#b #n m"] | None = None,
        position: int = 0,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Attend from `x` to `context` (to `x` itself if None). Returns (B, N, dim), or that, the weights (B, N, M) and the positions p (B, N).

        The weights are zero outside the windows. One step, x (B, dim), gives (B, dim), (B, M) and (B,). `key_mask` must be True first and False
        after, unless mode="monotonic"; `position` is the index of the first state of `x`, for "monotonic" step by step.
        """
        h, source, mask = checked_step(x, context, self.dim, self.context_dim, key_mask, attn_mask)
        lengths = self._lengths(source, key_mask)
        p = self._positions(h, lengths, torch.arange(h.shape[1], device=h.device) + position)
        impl = _dispatch.choose("luong_local", *self._automatic(source.shape[1]))
        c = (self._gathered if impl == "gathered" else self._dense)(h, source, p, lengths, mask)
        out = attentional(self, c.to(h.dtype), h).reshape(*x.shape[:-1], self.dim)
        if not return_weights:
            return out
        return out, self.weights(x, context, key_mask=key_mask, attn_mask=attn_mask, position=position), p.reshape(x.shape[:-1])

    def weights(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        position: int = 0,
    ) -> Float[Tensor, "b *r m"]:
        """The weights of R chosen positions of `x` alone; of all if None."""
        h, source, mask = checked_step(x, context, self.dim, self.context_dim, key_mask, attn_mask)
        at = torch.arange(h.shape[1], device=h.device) if queries is None else queries
        h, mask, lengths = h if queries is None else h[:, queries], rows_of(mask, queries), self._lengths(source, key_mask)
        keys = torch.arange(source.shape[1], device=h.device)
        weights = self._align(scores(self, *queries_and_keys(self, h, source)), keys, self._positions(h, lengths, at + position), lengths, mask)
        return weights.to(x.dtype) if x.ndim == 3 else weights[:, 0].to(x.dtype)

    def _lengths(self, source: Tensor, key_mask: Tensor | None) -> Tensor:
        """L, how many positions of each sample are real, (B, 1)."""
        if key_mask is None:
            return torch.full((source.shape[0], 1), source.shape[1], device=source.device)
        if self.mode == "predictive" and not (key_mask.is_meta or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
            first = bool((key_mask[:, 1:] <= key_mask[:, :-1]).all())
            require(first, "key_mask={} must be True first and False after: mode={!r} predicts positions in what is real", "...", self.mode)
        return (key_mask * torch.arange(1, source.shape[1] + 1, device=source.device)).amax(1, keepdim=True)

    def _positions(self, h: Tensor, lengths: Tensor, at: Tensor) -> Tensor:
        """p, (B, N), in float32 at least: half precision does not hold whole numbers above 2048, or 256."""
        if self.mode == "monotonic":
            return torch.minimum(at, lengths - 1).to(at_least_float32(h))
        with full_precision(h):
            h, w, v = (t.to(at_least_float32(h)) for t in (h, self.linear_p.weight, self.v_p.weight))
            return lengths * F.linear(F.linear(h, w).tanh(), v).squeeze(-1).sigmoid()

    def _automatic(self, keys: int) -> tuple[str, str]:
        if isinstance(keys, torch.SymInt):
            return "gathered", "a graph with a free length must not depend on it"
        if 2 * (2 * self.window + 1) < keys:
            return "gathered", "reads the 2D + 1 positions of a window alone, however long the source"
        return "dense", "a window is half of the source or more"

    def _align(self, s: Tensor, at: Tensor, p: Tensor, lengths: Tensor, mask: Tensor | None) -> Tensor:
        """Scores of the positions `at`, (B, N, K) or (K,), to weights."""
        p, lengths = p.unsqueeze(-1), lengths.unsqueeze(-1)
        first, last = (p.detach() - self.window).ceil(), (p.detach() + self.window).floor()
        seen = (at >= first) & (at <= last) & (at >= 0) & (at < lengths)
        weights = normalized(s, seen if mask is None else seen & mask)
        return weights * (-((at - p) ** 2) / (2 * self.sigma**2)).exp() if self.mode == "predictive" else weights

    def _dense(self, h: Tensor, source: Tensor, p: Tensor, lengths: Tensor, mask: Tensor | None) -> Tensor:
        q, k = queries_and_keys(self, h, source)
        at = torch.arange(source.shape[1], device=source.device)

        def core(q: Tensor, p: Tensor, mask: Tensor | None) -> Tensor:
            weights = self._align(scores(self, q, k), at, p, lengths, mask).to(source.dtype)
            return F.dropout(weights, self.dropout, self.training) @ source

        return in_rows(core, 4 * source.shape[0] * source.shape[1], q, p, mask)

    def _gathered(self, h: Tensor, source: Tensor, p: Tensor, lengths: Tensor, mask: Tensor | None) -> Tensor:
        count, start = 2 * self.window + 1, (p.detach() - self.window).ceil().long()
        at = start.unsqueeze(-1) + torch.arange(count, device=start.device)
        if self.score == "concat":
            s = self._added(self.linear_query(h), source, start, count)
        else:
            s = run_dots(*queries_and_keys(self, h, source), start, count)
        if mask is not None:
            mask = mask.expand(*p.shape, -1).gather(-1, at.clamp(0, source.shape[1] - 1))
        weights = self._align(s, at, p, lengths, mask)
        return run_sums(F.dropout(weights, self.dropout, self.training), source, start)

    def _added(self, q: Tensor, source: Tensor, start: Tensor, count: int) -> Tensor:
        """Scores of "concat"; where the windows are fewer positions than the source, only they are projected."""
        few = q.shape[1] * count < source.shape[1]
        keys = source if few else self.linear_context(source)

        def core(q: Tensor, start: Tensor) -> Tensor:
            rows = gather_runs(keys, start, count)
            rows = self.linear_context(rows) if few else rows
            with full_precision(q):
                q, rows, v = (t.to(at_least_float32(t)) for t in (q, rows, self.v.weight.mT))
                return ((q.unsqueeze(2) + rows).tanh() @ v).squeeze(-1)

        return in_rows(core, 2 * q.shape[0] * count * q.shape[2], q, start)
