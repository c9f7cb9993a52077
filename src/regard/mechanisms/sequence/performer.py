r"""Performer: random features phi with phi(q) . phi(k) near exp(q . k / sqrt(d)), so that the product is taken right to left.

    out = phi(q) (phi(k)^T v) / (phi(q) . sum_m phi(k_m)),   y' = y d^-1/4
    "favor+": phi(y) = (exp(W y' - |y'|^2 / 2 - c) + eps) / sqrt(m)      "relu": phi(y) = relu(W y') + eps
    "trig":   phi(y) = exp(|y'|^2 / 2 - c) [sin W y', cos W y'] / sqrt(m)   "softmax": q softmaxed over channels, k over positions

Choromanski et al., "Rethinking Attention with Performers", ICLR 2021, arXiv:2009.14794; trig: Peng et al., "Random Feature Attention", ICLR 2021,
arXiv:2103.02143. As in the authors' code c is the largest W y' of a query, and of all keys, and passes no gradient; causal sums get 1e-6 for each
feature. With eps > 0 the c of all keys, later ones too, is felt by about eps: a prefix and `step` then differ from the whole by that much.
Not in the paper: key masks that leave every maximum and sum. B batch, N queries, M keys, D dim, H heads, d head width, m features.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, fused, rename
from ...ops.linear_attention import blockwise, chunk_size, effective_weights, favor_attention, favor_runs_in_pieces, linear_attention
from ...ops.linear_attention.streaming import PerformerState, performer_start, performer_step
from ...ops.softmax_attention import causal_mask, combine_masks
from ...parts.feature_maps import FeatureMap, counts_as_forward, largest, projection_per_head, random_projection, running
from ...parts.heads import check_position, check_streaming, checked_source, head_width, merge_heads, split_heads
from ...parts.linear import Linear
from ...parts.positions import rotate
from ...validate import check_option

HKUNLP = (*(fused(f"qkv.{kind}", [f"{n}_proj.{kind}" for n in "qkv"]) for kind in ("weight", "bias")), rename("proj.*", "out_proj.*"))
KINDS = ("favor+", "relu", "trig", "softmax")


class PerformerAttention(Mechanism):
    """Args:
    dim: width of the input and the output.
    num_heads, head_dim: number of heads and width of each; head_dim=None means dim // num_heads.
    feature_map: "favor+", "relu", "trig" or "softmax".
    num_features: rows m of the projection; int(d ln d) if None; 0 for no projection ("relu" only).
    eps: added to each feature; None means 1e-4 for "favor+", 1e-3 for "relu", 0 for the others. eps_inside_ratio: "favor+" divides it by sqrt(m).
    denom_min: smallest denominator; None means 1e-2 for "trig", whose denominator may be negative, and no bound for the others.
    orthogonal, ortho_scaling: rows in orthonormal blocks, with the lengths of Gaussian vectors (0) or sqrt(d) (1); else independent Gaussian rows.
    per_head_features: a projection for each head instead of one for all.
    learnable_features: the projection is a parameter, never redrawn.
    redraw_interval: a new projection after so many training forwards; None for never. Counted in eager mode only: call `redraw()` yourself around a
        compiled module. The count starts anew in a loaded module.
    kernel_fn: replaces relu in feature_map="relu".
    normalize_qk: queries and keys to length one, times a learned scale for each channel.
    rope, rope_interleaved: rotary positions before the features.
    context_dim: width of `context`; dim if None.
    qkv_bias, out_bias: biases of the projections.
    dropout: probability of dropping an output channel in training.
    causal: query i sees keys j <= i.
    """

    card: ClassVar = Card(
        id="performer",
        layout="sequence",
        paper=Paper(
            title="Rethinking Attention with Performers",
            authors="Krzysztof Choromanski, Valerii Likhosherstov, David Dohan, Xingyou Song, Andreea Gane, Tamas Sarlos, Peter Hawkins, "
            "Jared Davis, Afroz Mohiuddin, Lukasz Kaiser, David Belanger, Lucy Colwell, Adrian Weller",
            venue="ICLR",
            year=2021,
            arxiv="2009.14794",
        ),
        source="google-research/performer (Apache-2.0), through lucidrains/performer-pytorch (MIT) and HKUNLP/efficient-attention (Apache-2.0)",
        summary="Random features approximate the softmax kernel, so that all pairs are never formed.",
        when="Long sequences, causal too, where softmax weights are wanted but their cost is not.",
        flops="2*B*(2*N*dim + 2*M*context_dim)*num_heads*head_dim + 2*B*num_heads*(N + M)*head_dim*num_features"
        " + (2*B*num_heads*ceil(N/min(chunk, N))*min(chunk, N)**2*(feature_width + head_dim + 1)"
        " + 4*B*num_heads*(ceil(N/min(chunk, N)) - 1)*min(chunk, N)*feature_width*(head_dim + 1)"
        " if causal else 2*B*num_heads*(N + M)*feature_width*(head_dim + 1))",
        grows={"N": 1.0},
        can=frozenset({"causal", "cross", "key_mask", "weights", "rows", "linear", "step", "qkv_core", "permutation_equivariant"}),
        unless={"cross": "causal", "step": "not causal", "permutation_equivariant": "rope"},
        checked_against="public",
        uncertain="The authors' JAX code is followed through its PyTorch transcription; the learned gate of RFA is left out.",
        # eps=0: c passes no gradient, so with eps > 0 the authors' gradient is not the derivative of their output.
        example={"dim": 32, "num_heads": 4, "num_features": 24, "eps": 0.0},
        variants=(
            {"dim": 24, "num_heads": 3, "num_features": 20, "feature_map": "relu", "causal": True, "rope": True},
            {"dim": 24, "num_heads": 2, "num_features": 16, "eps": 0.0, "per_head_features": True, "learnable_features": True, "normalize_qk": True},
            {"dim": 24, "num_heads": 2, "feature_map": "softmax"},
        ),
        # "favor+" measures the 1e-6 of causal key sums against the largest of all keys; maps without it are exact (their tests).
        bounds=dict.fromkeys(("prefix_property", "steps_equal_the_whole"), (0.2, "feature_map in ('favor+', 'trig')")),
    )
    official: ClassVar = (
        KeyMap(
            "lucidrains/performer-pytorch",
            (*(rename(f"to_{n}.*", f"{n}_proj.*") for n in ("q", "k", "v", "out")), rename("fast_attention.projection_matrix", "projection")),
            ignore=(r"fast_attention\.calls_since_last_redraw",),
        ),
        *(KeyMap(f"HKUNLP/efficient-attention ({name})", (*HKUNLP, rename(name, "projection"))) for name in ("random_proj", "eval_proj")),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        *,
        feature_map: Literal["favor+", "relu", "trig", "softmax"] = "favor+",
        num_features: int | None = None,
        eps: float | None = None,
        eps_inside_ratio: bool = True,
        denom_min: float | None = None,
        orthogonal: bool = True,
        ortho_scaling: Literal[0, 1] = 0,
        per_head_features: bool = False,
        learnable_features: bool = False,
        redraw_interval: int | None = 1000,
        kernel_fn: Callable[[Tensor], Tensor] | None = None,
        normalize_qk: bool = False,
        rope: bool = False,
        rope_interleaved: bool = False,
        context_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(feature_map, KINDS, "feature_map")
        require(kernel_fn is None or feature_map == "relu", "kernel_fn needs feature_map='relu', got feature_map={!r}", feature_map)
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        require(redraw_interval is None or redraw_interval > 0, "redraw_interval={} must be at least 1, or None for never", redraw_interval)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_width(dim, num_heads, head_dim)
        self.context_dim = dim if context_dim is None else context_dim
        d = self.head_dim
        m = 0 if feature_map == "softmax" else max(1, int(d * math.log(d))) if num_features is None else num_features
        require(m > 0 or (m == 0 and feature_map in ("relu", "softmax")), "num_features={} must be positive with feature_map={!r}", m, feature_map)
        require(not rope or d % 2 == 0, "rope needs an even head_dim, got head_dim={}", d)
        self.feature_map, self.num_features, self.kernel_fn = feature_map, m, kernel_fn
        self.eps = {"favor+": 1e-4, "relu": 1e-3}.get(feature_map, 0.0) if eps is None else eps
        self.denom_min = 1e-2 if denom_min is None and feature_map == "trig" else denom_min
        self.eps_inside_ratio, self.orthogonal, self.ortho_scaling = eps_inside_ratio, orthogonal, ortho_scaling
        self.per_head_features, self.learnable_features, self.redraw_interval = per_head_features, learnable_features, redraw_interval
        self.normalize_qk, self.rope, self.rope_interleaved = normalize_qk, rope, rope_interleaved
        self.qkv_bias, self.out_bias, self.dropout, self.causal = qkv_bias, out_bias, dropout, causal
        self.feature_width = 2 * m if feature_map == "trig" else m or d
        self.chunk = chunk_size(self.feature_width, d + 1)
        self._map = FeatureMap(feature_map, self.eps, eps_inside_ratio, kernel_fn or F.relu)
        self._calls = 0
        dd = {"device": device, "dtype": dtype}
        self.q_proj = Linear(dim, num_heads * d, qkv_bias, **dd)
        self.k_proj = Linear(self.context_dim, num_heads * d, qkv_bias, **dd)
        self.v_proj = Linear(self.context_dim, num_heads * d, qkv_bias, **dd)
        self.out_proj = Linear(num_heads * d, dim, out_bias, **dd)
        self.q_scale = nn.Parameter(torch.ones(num_heads, 1, d, **dd)) if normalize_qk else None
        self.k_scale = nn.Parameter(torch.ones(num_heads, 1, d, **dd)) if normalize_qk else None
        self.projection: Tensor | None
        drawn = self._draw(None, **dd) if m else None
        if learnable_features and drawn is not None:
            self.projection = nn.Parameter(drawn)
        else:
            self.register_buffer("projection", drawn)

    def key_maps(self) -> tuple[KeyMap, ...]:
        if self.projection is not None:
            return self.official
        return tuple(replace(m, ignore=(*m.ignore, r"fast_attention\.projection_matrix|random_proj|eval_proj")) for m in self.official)

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        context: Float[Tensor, "b m context_dim"] | None = None,
        *,
        key_mask: Bool[Tensor, "b m"] | None = None,
        attn_mask: Tensor | None = None,
        projection: Tensor | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n dim"] | tuple[Tensor, Tensor]:
        """Attend from `x` to `context` (to `x` itself if None). Returns (B, N, dim), or that and the implied weights (B, H, N, M), for inspection.

        `projection`, (m, d) or (H, m, d), replaces the module's own in this call.
        """
        source = self._source(x, context, key_mask, attn_mask)
        if projection is None:
            self._redraw_if_due()
        q, k, v = self._split(x, source, None)
        out = self.attend(q, k, v, key_mask=key_mask, projection=projection)
        out = F.dropout(self.out_proj(merge_heads(out)), self.dropout, self.training)
        return (out, self.weights(x, context, key_mask=key_mask, projection=projection)) if return_weights else out

    def weights(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        projection: Tensor | None = None,
    ) -> Float[Tensor, "b h r m"]:
        """The implied weights of R chosen positions of `x` alone; of all if None."""
        source = self._source(x, context, key_mask, attn_mask)
        q, k, _ = self._split(x, source, None)
        fq, fk = self._features(q, k, self._projection(q, projection), None if key_mask is None else key_mask[:, None, :, None], self.causal)
        mask = None if key_mask is None else key_mask[:, None, None]
        if self.causal:
            mask = combine_masks(mask, causal_mask(x.shape[1], source.shape[1], x.device, queries))
        fq = fq if queries is None else fq[:, :, queries]
        return effective_weights(fq, fk, mask=mask, normalize=True, key_eps=1e-6 if self.causal else 0.0, denom_min=self.denom_min).to(q.dtype)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, causal: bool | None = None, projection: Tensor | None = None
    ) -> Tensor:
        """The core alone, on (B, H, N, d)."""
        w = self._projection(q, projection)
        causal = self.causal if causal is None else causal
        if w is not None and self.feature_map == "favor+" and not causal and favor_runs_in_pieces(q, w):
            return favor_attention(q, k, v, w, mask=key_mask, floor=self._map.floor(w), denom_min=self.denom_min)

        def core(q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, mask: Tensor | None) -> Tensor:
            options = {"causal": causal, "normalize": True, "key_eps": 1e-6 if causal else 0.0, "denom_min": self.denom_min}
            fq, fk = self._features(q, k, w, mask, causal)
            return linear_attention(fq, fk, v, mask=None if mask is None else mask.squeeze(-1), **options)

        mask = None if key_mask is None else key_mask[:, None, :, None]
        if isinstance(self.kernel_fn, nn.Module):  # it may own parameters, which need gradients of their own
            return core(q, k, v, w, mask)
        return blockwise(core, q, k, v, w, mask, floats=(q.shape[2] + k.shape[2]) * self.feature_width)

    def _source(self, x: Tensor, context: Tensor | None, key_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor:
        """What `x` attends to."""
        require(attn_mask is None, "performer never forms the pairs that attn_mask={} would hide; use key_mask or causal=True", "...")
        source = checked_source(x, context, self.dim, self.context_dim, key_mask)
        n, m = x.shape[1], source.shape[1]
        fits = not self.causal or context is None or n == m
        require(fits, "performer with causal=True needs as many keys as queries, got {} queries and a context of {}", n, m)
        return source

    def _projection(self, q: Tensor, given: Tensor | None) -> Tensor | None:
        w = self.projection if given is None else given
        return None if w is None else projection_per_head(w, q.shape[1], q.shape[3])

    def _features(self, q: Tensor, k: Tensor, w: Tensor | None, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
        return self._map.queries(q, w, largest(None))[0], self._map.keys(k, w, mask, causal)

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """A new projection, in place."""
        require(self.projection is not None, "feature_map={!r} with num_features={} has no projection to redraw", self.feature_map, self.num_features)
        assert self.projection is not None
        with torch.no_grad():
            self.projection.copy_(self._draw(generator, device=self.projection.device, dtype=self.projection.dtype))
        self._calls = 0

    def init_state(self, batch: int) -> PerformerState:
        """The state before the first position of `batch` sequences; step by step needs causal=True."""
        check_streaming(self.causal, "performer")
        return performer_start(batch, self.num_heads, self.feature_width, self.head_dim, self.q_proj.weight)

    def step(self, x: Float[Tensor, "b dim"], state: PerformerState) -> tuple[Float[Tensor, "b dim"], PerformerState]:
        """One more position: its output, that of the whole sequence so far at its end, and the new state."""
        check_position(x, self.dim)
        q, k, v = self._split(x[:, None], x[:, None], state.position[:, None])
        w = None if self.projection is None else projection_per_head(self.projection, self.num_heads, self.head_dim)
        fq, fk = self._map.queries(q, w, running(state.query_shift)), self._map(k, w, running(state.key_shift))
        out, state = performer_step(fq, fk, v, self._map.floor(w), state, 1e-6, self.denom_min)
        return self.out_proj(merge_heads(out))[:, 0], state

    def _split(self, x: Tensor, source: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q_proj(x), self.k_proj(source), self.v_proj(source)))
        if self.q_scale is not None and self.k_scale is not None:
            q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        if self.rope:
            q, k = (rotate(t, positions, "positions", self.head_dim, 10000.0, self.rope_interleaved) for t in (q, k))
        return q, k, v

    def _draw(self, generator: torch.Generator | None, device, dtype) -> Tensor:
        heads = self.num_heads if self.per_head_features else None
        options = {"orthogonal": self.orthogonal, "scaling": self.ortho_scaling, "generator": generator, "device": device, "dtype": dtype}
        return random_projection(self.num_features, self.head_dim, num_heads=heads, **options)

    def _redraw_if_due(self) -> None:
        """Count a training forward in eager mode; a recomputation inside a backward pass (checkpointing) keeps its projection."""
        counts = self.training and self.redraw_interval is not None and self.projection is not None and not self.learnable_features
        if counts and counts_as_forward():
            if self._calls == self.redraw_interval:
                self.redraw()
            self._calls += 1
