r"""Probabilistic attention: keys and values are the means of a mixture of Gaussians, weights the posterior of its components; EM adapts the means.

    log w_ij = log p_ij - alpha_j/2 |q_i - k_j|^2 - beta_j/2 |v0_i - v_j|^2,   W = softmax_M(log w) over the allowed keys,   out = W v
    magnitude priors: log p_ij = alpha_j/2 |k_j|^2 + beta_j/2 |v_j|^2, so that alpha = d^-1/2 and beta = 0 give softmax(q k^T / sqrt(d)) v
    keys:   k_j <- (theta k_j + alpha_j sum_i W_ij q_i) / (theta + alpha_j sum_i W_ij),            then W again
    values: v_j <- (phi v_j + beta_j sum_i W_ij f_i v*_i) / (phi + beta_j sum_i W_ij f_i),         then W again, f_i = 1 where v*_i is known

Gabbur, Bilkhu, Movellan, "Probabilistic Attention for Interactive Segmentation", NeurIPS 2021. arXiv:2106.15338. As in the authors' code theta
multiplies the current key (anchor="initial" is the strict maximum of the posterior) and known tokens are not overwritten (clamp_fixed). Not in
theirs: masks of the keys, tokens and maps with projections, v_pos on channels of its own (they mix it with the positions). Padding is neither a key
nor a query of the M steps. B batch, N queries, M keys, H heads, d head width, dv value width.
"""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...ops.mixture_attention import (
    Mixture,
    adapt_keys,
    check_heads,
    check_mixture,
    check_precision,
    mixture_attend,
    mixture_weights,
    propagate_values,
)
from ...ops.softmax_attention import combine_masks
from ...parts.heads import checked_source, head_width, init_projections_, merge_heads, split_heads
from ...parts.linear import Linear
from ...parts.spatial import flatten_space, project_rows, project_to_map
from ...validate import check_bool, check_broadcastable, check_floating, check_map, check_mask, check_option, check_tokens

Precision = float | Tensor | None


class ProbabilisticAttention(Mechanism):
    """`ProbabilisticAttention()` works on queries, keys and values; with `dim` it is a layer on tokens, with `channels` one on maps.

    Args:
        layout: "core", "sequence" or "map"; None takes it from the width that is given.
        dim, channels: width of the tokens, or of the map.
        num_heads, head_dim: number of heads and width of each; head_dim=None shares the width among them.
        qkv_bias, out_bias: biases of the projections; "core" has none.
        uniform_query_precision, uniform_value_precision: one alpha, beta for all keys; False takes a number for each key, (B, H, M), in the call.
        magnitude_priors: prior by the lengths of key and value where no prior is given.
        key_adaptation_iters: EM steps on the keys.
        value_propagation_iters: EM steps on the values where `v_fixed` is given.
        alpha, beta: precisions of queries and values; alpha=None is head_dim ** -0.5.
        key_prior_precision, value_prior_precision: theta and phi; None for flat priors.
        anchor: "current" or "initial" key that theta holds on to.
        clamp_fixed: give known tokens their known values.
    """

    card: ClassVar = Card(
        id="probabilistic",
        layout="sequence",
        also=("map",),
        paper=Paper(
            title="Probabilistic Attention for Interactive Segmentation",
            authors="Prasad Gabbur, Manjot Bilkhu, Javier Movellan",
            venue="NeurIPS",
            year=2021,
            arxiv="2106.15338",
        ),
        source="apple/ml-probabilistic-attention@2945e06 (Apple sample code licence)",
        summary="Attention as inference in a mixture of Gaussians, whose keys and values adapt to the queries and to corrections by EM.",
        when="Some tokens' values become known at inference, by a user's clicks say, and should spread to the tokens like them.",
        flops="4*B*(N + M)*width*num_heads*head_dim + 4*B*num_heads*N*M*score_dim"
        " + 2*B*num_heads*N*M*key_adaptation_iters*(score_dim + head_dim + 1)",
        grows={"N": 2.0},
        can=frozenset({"cross", "key_mask", "attn_mask", "weights", "rows", "row_stochastic", "permutation_equivariant"}),
        unless={
            "cross": "layout != 'sequence'",
            "key_mask": "layout != 'sequence'",
            "attn_mask": "layout != 'sequence' or key_adaptation_iters > 0",  # keys adapt to all queries: a hidden pair moves the others too
            "rows": "key_adaptation_iters > 0",
        },
        checked_against="authors",
        uncertain="Their code does not run with a precision for each key in key adaptation, nor with masks and value positions as they are meant.",
        example={"dim": 32, "num_heads": 4},
        variants=(
            {"dim": 24, "num_heads": 3, "magnitude_priors": False, "alpha": 0.3, "key_adaptation_iters": 2, "key_prior_precision": 1.0},
            {"dim": 24, "num_heads": 2, "head_dim": 8, "beta": 0.2, "key_adaptation_iters": 1, "anchor": "initial"},
            {"channels": 16, "num_heads": 2, "layout": "map", "magnitude_priors": False, "key_adaptation_iters": 1},
        ),
        place="C",
    )
    alpha: Precision
    beta: float | Tensor
    key_prior_precision: Precision
    value_prior_precision: Precision

    def __init__(
        self,
        layout: Literal["core", "sequence", "map"] | None = None,
        dim: int | None = None,
        num_heads: int = 8,
        head_dim: int | None = None,
        *,
        channels: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        uniform_query_precision: bool = True,
        uniform_value_precision: bool = True,
        magnitude_priors: bool = True,
        key_adaptation_iters: int = 0,
        value_propagation_iters: int = 0,
        alpha: Precision = None,
        beta: float | Tensor = 0.0,
        key_prior_precision: Precision = None,
        value_prior_precision: Precision = None,
        anchor: Literal["current", "initial"] = "current",
        clamp_fixed: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(layout, (None, "core", "sequence", "map"), "layout")
        self.layout = layout or ("map" if channels is not None else "core" if dim is None else "sequence")
        width, other = (channels, dim) if self.layout == "map" else (dim, channels)
        fits = other is None and (width is None) == (self.layout == "core")
        require(fits, "layout={!r} got dim={} and channels={}; dim is of tokens, channels of maps, core has neither", self.layout, dim, channels)
        for name, steps in (("key_adaptation_iters", key_adaptation_iters), ("value_propagation_iters", value_propagation_iters)):
            require(steps >= 0, "{}={} must not be negative", name, steps)
        check_option(anchor, ("current", "initial"), "anchor")
        given = {"alpha": alpha, "beta": beta, "key_prior_precision": key_prior_precision, "value_prior_precision": value_prior_precision}
        for name, value in given.items():
            check_precision(value, name)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)
        self.dim, self.channels, self.width, self.num_heads, self.qkv_bias, self.out_bias = dim, channels, width, num_heads, qkv_bias, out_bias
        self.uniform_query_precision, self.uniform_value_precision = uniform_query_precision, uniform_value_precision
        self.magnitude_priors, self.clamp_fixed = magnitude_priors, clamp_fixed
        self.anchor: Literal["current", "initial"] = anchor
        self.key_adaptation_iters, self.value_propagation_iters = key_adaptation_iters, value_propagation_iters
        self.head_dim = head_dim if width is None else head_width(width, num_heads, head_dim)
        if width is not None and self.head_dim is not None:
            self.score_dim = self.head_dim + int(not magnitude_priors or isinstance(beta, Tensor) or beta != 0)
            inner, dd = num_heads * self.head_dim, {"device": device, "dtype": dtype}
            self.q_proj, self.k_proj, self.v_proj = (Linear(width, inner, qkv_bias, **dd) for _ in range(3))
            self.out_proj = Linear(inner, width, out_bias, **dd)
            init_projections_(self.q_proj, self.k_proj, self.v_proj, self.out_proj)

    def forward(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        context: Float[Tensor, "b ..."] | None = None,
        v: Float[Tensor, "b h m dv"] | None = None,
        *,
        q: Float[Tensor, "b h n d"] | None = None,
        k: Float[Tensor, "b h m d"] | None = None,
        key_mask: Bool[Tensor, "b m"] | None = None,
        attn_mask: Bool[Tensor, "..."] | None = None,
        alpha: Precision = None,
        beta: Precision = None,
        prior: Float[Tensor, "#b #h #n m"] | None = None,
        v_init: Tensor | None = None,
        v_fixed: Tensor | None = None,
        fixed_mask: Tensor | None = None,
        q_pos: Float[Tensor, "n m d"] | None = None,
        k_pos: Float[Tensor, "n m d"] | None = None,
        v_pos: Float[Tensor, "n m dv"] | None = None,
        key_prior_precision: Precision = None,
        value_prior_precision: Precision = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Core: (q, k, v), by place or by name. Sequence: x (B, N, dim) to `context` or to itself. Map: x (B, channels, *space).

        `v_init` and `v_fixed`, with `fixed_mask` True where it holds, are of the queries' tokens, in the space of the values: (B, H, N, dv) in the
        core, (B, N, H dv) for tokens, (B, H dv, *space) for maps, their masks (B, N) or (B, *space). Precisions given here replace the module's.
        """
        given = {"q": q, "k": k, "key_mask": key_mask, "attn_mask": attn_mask, "alpha": alpha, "beta": beta, "v_init": v_init, "v_fixed": v_fixed}
        given |= {"fixed_mask": fixed_mask, "prior": prior, "q_pos": q_pos, "k_pos": k_pos, "v_pos": v_pos}
        given |= {"key_prior_precision": key_prior_precision, "value_prior_precision": value_prior_precision}
        queries, keys, values, mixture, known = self._inferred(x, context, v, **given)
        out = mixture_attend(queries, keys, values, mixture)
        if self.clamp_fixed and known is not None and fixed_mask is not None:
            require(v_pos is None, "clamp_fixed=True knows nothing for the channels of v_pos={}", "...")
            out = torch.where(fixed_mask.flatten(1)[:, None, :, None], known.to(out.dtype), out)
        if self.layout == "sequence":
            out = self.out_proj(merge_heads(out))
        elif self.layout == "map":
            assert x is not None
            out = project_to_map(merge_heads(out), self.out_proj.weight, self.out_proj.bias, x.shape[2:])
        return (out, mixture_weights(queries, keys, values, mixture)) if return_weights else out

    def weights(
        self, x: Tensor | None = None, context: Tensor | None = None, v: Tensor | None = None, *, queries: Tensor | None = None, **given: Any
    ) -> Tensor:
        """The weights of R chosen queries, (B, H, R, M), of all if None; `given` is what else forward takes."""
        q, k, v, mixture, _ = self._inferred(x, context, v, **given)
        return mixture_weights(q if queries is None else q[:, :, queries], k, v, mixture.rows(queries))

    def _inferred(
        self,
        x: Tensor | None,
        context: Tensor | None,
        v: Tensor | None,
        *,
        q: Tensor | None = None,
        k: Tensor | None = None,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        alpha: Precision = None,
        beta: Precision = None,
        v_init: Tensor | None = None,
        v_fixed: Tensor | None = None,
        fixed_mask: Tensor | None = None,
        key_prior_precision: Precision = None,
        value_prior_precision: Precision = None,
        **pairs: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Mixture, Tensor | None]:
        """Queries, and keys and values after EM, by heads; the mixture they are in; the known values by heads."""
        q, k, v = self._given(x, context, q, k, v, key_mask)
        (b, h, n, d), m = q.shape, k.shape[2]
        if attn_mask is not None:
            check_bool(attn_mask, "attn_mask")
            check_broadcastable(attn_mask, (b, h, n, m), "attn_mask")
            attn_mask = attn_mask.reshape(*[1] * (4 - attn_mask.ndim), *attn_mask.shape)
        mask = combine_masks(None if key_mask is None else key_mask[:, None, None], attn_mask)
        alpha, beta = self.alpha if alpha is None else alpha, self.beta if beta is None else beta
        theta = self.key_prior_precision if key_prior_precision is None else key_prior_precision
        phi = self.value_prior_precision if value_prior_precision is None else value_prior_precision
        precisions = (d**-0.5 if alpha is None else alpha, beta)
        mixture = Mixture(*precisions, self.magnitude_priors, mask=mask, v_init=self._by_heads(v_init, "v_init"), **pairs)
        check_mixture(q, k, v, mixture, uniform=(self.uniform_query_precision, self.uniform_value_precision))
        require((v_fixed is None) == (fixed_mask is None), "v_fixed and fixed_mask, True where it holds, belong together; one of them is missing")
        known, query_mask = self._by_heads(v_fixed, "v_fixed"), key_mask if context is None else None
        if known is not None:
            fits = known.shape == (b, h, n, v.shape[3])
            require(fits, "v_fixed must hold {} values for each of {} queries and {} heads, got {}", v.shape[3], n, h, tuple(known.shape))
            check_mask(fixed_mask, b, *(x.shape[2:] if self.layout == "map" and x is not None else (n,)), name="fixed_mask")
        k = adapt_keys(q, k, v, mixture, self.key_adaptation_iters, precision=theta, anchor=self.anchor, query_mask=query_mask)
        if known is not None and fixed_mask is not None:
            fixed = fixed_mask.flatten(1) if query_mask is None else fixed_mask & query_mask
            v = propagate_values(q, k, v, mixture, self.value_propagation_iters, known=known, known_mask=fixed, precision=phi)
        return q, k, v, mixture, known

    def _given(
        self, x: Tensor | None, context: Tensor | None, q: Tensor | None, k: Tensor | None, v: Tensor | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by heads."""
        if self.layout == "core":
            require(key_mask is None, "layout='core' takes no key_mask; use attn_mask=key_mask[:, None, None]")
            return check_heads(x if q is None else q, context if k is None else k, v)
        require(q is None and k is None and v is None, "layout={!r} makes q, k and v from x; use layout='core' for your own", self.layout)
        check_floating(x)
        assert x is not None and self.width is not None
        if self.layout == "map":
            check_map(x, self.width, None)
            require(context is None and key_mask is None, "layout='map' takes no context and no key_mask; use layout='sequence'")
            rows = flatten_space(x)
            made = [project_rows(rows, f.weight, f.bias) for f in (self.q_proj, self.k_proj, self.v_proj)]
        else:
            source = checked_source(x, context, self.width, self.width, key_mask)
            made = [self.q_proj(x), self.k_proj(source), self.v_proj(source)]
        queries, keys, values = (split_heads(t, self.num_heads) for t in made)
        return queries, keys, values

    def _by_heads(self, t: Tensor | None, name: str) -> Tensor | None:
        """Values that a caller gives for the queries' tokens: (B, H, N, dv)."""
        if t is None or self.layout == "core":
            return t
        inner = self.out_proj.in_features
        if self.layout == "map":
            check_map(t, inner, None, name)
            return split_heads(flatten_space(t), self.num_heads)
        check_tokens(t, inner, name, "num_heads * head_dim")
        return split_heads(t, self.num_heads)
