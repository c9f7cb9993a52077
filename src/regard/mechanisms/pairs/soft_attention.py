r"""Soft attention of Show, Attend and Tell: a decoder state weighs the annotations of a picture and is given their mean.

    e_i = u . f(P(a)_i + W_d h) + c,   alpha = softmax_i(e),   z = sum_i alpha_i a_i,   output beta(h) * z

Xu, Ba, Kiros, Cho, Courville, Salakhutdinov, Zemel, Bengio, "Show, Attend and Tell: Neural Image Caption Generation with Visual Attention",
ICML 2015. arXiv:1502.03044. We follow the authors' code; its further layers of P are not in the paper. Not in the paper either, but in the port
most in use: f = ReLU, a bias of W_d, and a gate beta for each channel. B batch, T steps, L locations, D context_dim.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...card import Card, Paper
from ...mechanism import Mechanism
from ...ops.attention_losses import doubly_stochastic_loss
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


class SoftAttention(Mechanism):
    """Args:
    context_dim: width of the annotations and of the output.
    query_dim: width of the decoder states.
    attn_dim: width in which they are added; context_dim if None.
    activation: f, "tanh" (the authors' form, their starting values, no bias of W_d) or "relu" (the port's).
    gate: beta, "scalar" (a number for each step), "vector" (one for each channel) or None.
    attn_layers: layers of P.
    """

    card: ClassVar = Card(
        id="soft_attention",
        layout="pair",
        paper=Paper(
            title="Show, Attend and Tell: Neural Image Caption Generation with Visual Attention",
            authors="Kelvin Xu, Jimmy Ba, Ryan Kiros, Kyunghyun Cho, Aaron Courville, Ruslan Salakhutdinov, Richard Zemel, Yoshua Bengio",
            venue="ICML",
            year=2015,
            arxiv="1502.03044",
        ),
        source="kelvinxu/arctic-captions@f4565bfe (BSD-3-Clause), sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning@cc9c7e2f (MIT)",
        summary="Additive attention of one decoder state at a time over the locations of a picture, with a gate on what it sees.",
        when="Recurrent decoders that describe a picture, and want to show where they looked.",
        flops="2*B*M*attn_dim*(context_dim + (attn_layers - 1)*attn_dim) + 2*B*N*query_dim*attn_dim + 2*B*N*M*(attn_dim + context_dim)"
        " + 2*B*N*query_dim*(context_dim if gate == 'vector' else 1 if gate == 'scalar' else 0)",
        grows={"N": 2.0},
        can=frozenset({"key_mask"}),
        uncertain="The authors' Theano code no longer runs: its equations were evaluated literally.",
        example={"context_dim": 16, "query_dim": 10},
        variants=(
            {"context_dim": 16, "query_dim": 10, "attn_dim": 8, "activation": "relu", "gate": "vector"},
            {"context_dim": 6, "query_dim": 10, "gate": None, "attn_layers": 3},
        ),
        returns=("context", "weights"),
    )
    official: ClassVar = ANNOTATION_MAPS
    tested_as: ClassVar = "sequence"
    functions: ClassVar = {
        "doubly_stochastic": lambda weights, time_mask, weight=1.0: {
            "official": doubly_stochastic_loss(weights, weight, reduction="official"),
            "paper": doubly_stochastic_loss(weights, weight, reduction="paper"),
            "mean": doubly_stochastic_loss(weights, weight, time_mask, "mean"),
        }
    }

    def __init__(
        self,
        context_dim: int,
        query_dim: int,
        attn_dim: int | None = None,
        activation: Activation = "tanh",
        gate: Gate | None = "scalar",
        attn_layers: int = 1,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.context_dim, self.query_dim, self.attn_dim = context_dim, query_dim, context_dim if attn_dim is None else attn_dim
        self.activation, self.gate, self.attn_layers = activation, gate, attn_layers
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention = AnnotationScores(context_dim, query_dim, self.attn_dim, activation, attn_layers, **dd)
        self.f_beta = gate_layer(context_dim, query_dim, gate, activation, **dd)

    def forward(
        self,
        query: Float[Tensor, "b *t query_dim"],
        context: Float[Tensor, "b l context_dim"],
        *,
        key_mask: Bool[Tensor, "b l"] | None = None,
        cache: Float[Tensor, "b l attn_dim"] | None = None,
    ) -> tuple[Float[Tensor, "b *t context_dim"], Float[Tensor, "b *t l"]]:
        """Returns z and the weights, of one step or of T at once; `cache` is `project(context)`, made once for all steps."""
        states, annotations, projected, mask = annotations_for(self, query, context, key_mask, cache)
        weights = normalized(self.attention(states, projected), mask).to(query.dtype)
        z = gated(weights.to(annotations.dtype) @ annotations, states, self.f_beta)
        return (z, weights) if query.ndim == 3 else (z[:, 0], weights[:, 0])

    def project(self, context: Float[Tensor, "b l context_dim"]) -> Float[Tensor, "b l attn_dim"]:
        """P(a), which does not depend on the decoder: computed once a picture, and given to every step as `cache`."""
        return self.attention.project(checked_annotations(context, self.context_dim))

    @staticmethod
    def example_inputs(options: Mapping[str, Any], *, batch: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        return example_pair(options, batch, size, generator)
