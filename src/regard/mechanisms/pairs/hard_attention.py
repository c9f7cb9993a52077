r"""Hard attention of Show, Attend and Tell: a decoder state draws one location of a picture and is given its annotation alone.

    e_i = u . f(P(a)_i + W_d h) + c,   alpha = softmax_i(temperature e),   s ~ alpha,   output beta(h) * a_s

Xu, Ba, Kiros, Cho, Courville, Salakhutdinov, Zemel, Bengio, "Show, Attend and Tell: Neural Image Caption Generation with Visual Attention",
ICML 2015. arXiv:1502.03044. No gradient passes the draw: alpha learns from `regard.hard_attention_loss` alone. We follow the authors' code, in
which one toss for a whole batch decides in training between the draw and the mean; in eval we take the likeliest location where their code takes
the mean (mode="expected") and the paper draws. B batch, T steps, L locations, D context_dim.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...ops.attention_losses import hard_attention_loss
from ...ops.location_draw import check_draw, draw_location, locations_at
from ...parts.annotations import (
    ANNOTATION_MAPS,
    Activation,
    AnnotationScores,
    Gate,
    annotations_for,
    checked_annotations,
    example_pair,
    gate_layer,
    gated,
)
from ...parts.luong import normalized
from ...validate import check_option

Mode = Literal["sample", "argmax", "expected", "semi"]


class HardAttention(Mechanism):
    """Args:
    context_dim: width of the annotations and of the output.
    query_dim: width of the decoder states.
    attn_dim: width in which they are added; context_dim if None.
    activation: f, "tanh" (the authors' form, their starting values, no bias of W_d) or "relu" (the port's).
    gate: beta, "scalar" (a number for each step), "vector" (one for each channel) or None.
    attn_layers: layers of P.
    temperature: multiplies the scores.
    semi_sampling: probability that a training pass draws locations; else it takes their mean.
    """

    card: ClassVar = Card(
        id="hard_attention",
        layout="pair",
        paper=Paper(
            title="Show, Attend and Tell: Neural Image Caption Generation with Visual Attention",
            authors="Kelvin Xu, Jimmy Ba, Ryan Kiros, Kyunghyun Cho, Aaron Courville, Ruslan Salakhutdinov, Richard Zemel, Yoshua Bengio",
            venue="ICML",
            year=2015,
            arxiv="1502.03044",
        ),
        source="kelvinxu/arctic-captions@f4565bfe (BSD-3-Clause), attn_type='stochastic'",
        summary="Draws one location of a picture for each decoder state; learns where to look by REINFORCE.",
        when="A decoder should look at one place at a time, and say which.",
        flops="2*B*M*attn_dim*(context_dim + (attn_layers - 1)*attn_dim) + 2*B*N*query_dim*attn_dim + 2*B*N*M*attn_dim"
        " + 2*B*N*query_dim*(context_dim if gate == 'vector' else 1 if gate == 'scalar' else 0)",
        grows={"N": 2.0},
        can=frozenset({"key_mask"}),
        uncertain="The authors' Theano code no longer runs: its equations were evaluated literally.",
        example={"context_dim": 16, "query_dim": 10},
        variants=(
            {"context_dim": 16, "query_dim": 16, "attn_dim": 8, "activation": "relu", "gate": "vector", "temperature": 2.0},
            {"context_dim": 6, "query_dim": 10, "attn_layers": 3},
        ),
        returns=("context", "weights", "indices"),
        # Rounding to half precision moves the likeliest of two near locations.
        bounds={"bfloat16_is_close": (2.0, "True"), "autocast_trains": (2.0, "True")},
    )
    official: ClassVar = ANNOTATION_MAPS
    tested_as: ClassVar = "sequence"
    functions: ClassVar = {
        "argmax_context": lambda module, query, context, **inputs: module(query, context, mode="argmax")[0],
        "reinforce_gradient": lambda weights, indices, cost, baseline, time_mask=None, reward_scale=0.1, entropy_weight=0.002: dict(
            zip(
                ("loss", "new_baseline"),
                hard_attention_loss(weights, indices, cost, baseline, time_mask=time_mask, reward_scale=reward_scale, entropy_weight=entropy_weight),
                strict=True,
            )
        ),
    }

    def __init__(
        self,
        context_dim: int,
        query_dim: int,
        attn_dim: int | None = None,
        activation: Activation = "tanh",
        gate: Gate | None = "scalar",
        attn_layers: int = 1,
        temperature: float = 1.0,
        semi_sampling: float = 0.5,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        require(temperature > 0, "temperature={} must be above 0: it multiplies the scores", temperature)
        require(0.0 <= semi_sampling <= 1.0, "semi_sampling={} must be a probability", semi_sampling)
        self.context_dim, self.query_dim, self.attn_dim = context_dim, query_dim, context_dim if attn_dim is None else attn_dim
        self.activation, self.gate, self.attn_layers = activation, gate, attn_layers
        self.temperature, self.semi_sampling = temperature, semi_sampling
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention = AnnotationScores(context_dim, query_dim, self.attn_dim, activation, attn_layers, **dd)
        self.f_beta = gate_layer(context_dim, query_dim, gate, activation, **dd)

    def forward(
        self,
        query: Float[Tensor, "b *t query_dim"],
        context: Float[Tensor, "b l context_dim"],
        *,
        key_mask: Bool[Tensor, "b l"] | None = None,
        mode: Mode | None = None,
        indices: Tensor | None = None,
        use_sample: bool | None = None,
        generator: torch.Generator | None = None,
        cache: Float[Tensor, "b l attn_dim"] | None = None,
    ) -> tuple[Float[Tensor, "b *t context_dim"], Float[Tensor, "b *t l"], Tensor | None]:
        """Returns z, the weights alpha, and the locations (-1 where all are masked; None where z is the mean).

        Args:
            mode: "sample"; "argmax", the likeliest location; "expected", the mean by alpha; "semi", one toss for the whole call between "sample"
                and "expected". None is "sample" if `indices` are given, else "semi" in training and "argmax" in eval.
            indices: the locations to take where locations are sampled, in place of a draw.
            use_sample: the outcome of the toss of "semi".
            generator: makes the draws.
            cache: `project(context)`, made once for all steps.
        """
        states, annotations, projected, mask = annotations_for(self, query, context, key_mask, cache)
        mode = self._mode(mode, indices, use_sample, generator)
        if indices is not None:
            indices = check_draw(indices, query, key_mask, annotations.shape[1])
        if mode == "semi":
            mode = "sample" if self._toss(use_sample, generator) else "expected"
        scores = self.temperature * self.attention(states, projected)
        weights = normalized(scores, mask).to(query.dtype)
        if mode == "expected":
            z, indices = weights.to(annotations.dtype) @ annotations, None
        else:
            if mode == "argmax" or indices is None:
                indices = draw_location(scores.detach(), mask, generator if mode == "sample" else None, noisy=mode == "sample")
            z = locations_at(annotations, indices)
        z = gated(z, states, self.f_beta)
        if query.ndim == 3:
            return z, weights, indices
        return z[:, 0], weights[:, 0], None if indices is None else indices[:, 0]

    def log_weights(self, query: Tensor, context: Tensor, *, key_mask: Tensor | None = None, cache: Tensor | None = None) -> Float[Tensor, "b *t l"]:
        """log alpha, in float32 at least, -inf where masked: for `regard.hard_attention_loss`, exact where alpha itself rounds to zero."""
        states, _, projected, mask = annotations_for(self, query, context, key_mask, cache)
        scores = self.temperature * self.attention(states, projected)
        if mask is None:
            logs = scores.log_softmax(-1)
        else:
            logs = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).log_softmax(-1).masked_fill(~mask, float("-inf"))
        return logs if query.ndim == 3 else logs[:, 0]

    def project(self, context: Float[Tensor, "b l context_dim"]) -> Float[Tensor, "b l attn_dim"]:
        """P(a), which does not depend on the decoder: computed once a picture, and given to every step as `cache`."""
        return self.attention.project(checked_annotations(context, self.context_dim))

    def _mode(self, mode: Mode | None, indices: Tensor | None, use_sample: bool | None, generator: torch.Generator | None) -> Mode:
        """The mode asked for, or the usual one."""
        check_option(mode, ("sample", "argmax", "expected", "semi", None), "mode")
        require(indices is None or generator is None, "give either indices or a generator: indices={} take the place of its draws", "(...)")
        if mode is None:
            mode = "semi" if use_sample is not None else "sample" if indices is not None else "semi" if self.training else "argmax"
        require(use_sample is None or mode == "semi", "use_sample={} is the toss of mode='semi'; mode={!r} has none", use_sample, mode)
        return mode

    def _toss(self, use_sample: bool | None, generator: torch.Generator | None) -> bool:
        if use_sample is not None:
            return use_sample
        device = None if generator is None else generator.device
        return bool(torch.rand((), generator=generator, device=device) < self.semi_sampling)

    @staticmethod
    def example_inputs(options: Mapping[str, Any], *, batch: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Wide states, so that they look at many locations: eval takes the likeliest."""
        inputs = example_pair(options, batch, size, generator)
        return {**inputs, "query": 4 * inputs["query"]}
