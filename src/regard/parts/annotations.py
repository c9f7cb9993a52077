"""What soft and hard attention over the annotations of a picture share: scores, gate, checks, and the names in other codes."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import require
from ..official import KeyMap, Rule
from ..ops.additive_scores import additive_scores
from ..validate import check_floating, check_mask, check_option, check_tokens
from .linear import Linear
from .masks import zero_rows

Activation = Literal["tanh", "relu"]
Gate = Literal["scalar", "vector"]


def _transpose(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
    return [tensors[0].mT.contiguous()]


def _to_vector(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
    """The bias of one number, which some files hold without an axis."""
    return [tensors[0].reshape(-1)]


def _matrix(theirs: str, ours: str) -> Rule:
    """Theirs is stored (in, out)."""
    return Rule((theirs,), (ours,), _transpose, _transpose)


# Both ignore the rest of the captioning network that the attention stands in.
ANNOTATION_MAPS = (
    KeyMap("sgrvinod", ignore=(r"embedding\..*", r"decode_step\..*", r"init_[hc]\..*", r"fc\..*")),
    KeyMap(
        "arctic-captions",
        (
            _matrix("decoder_Wc_att", "attention.encoder_att.weight"),
            Rule(("decoder_b_att",), ("attention.encoder_att.bias",)),
            _matrix("decoder_W_att_*", "attention.encoder_att_*.weight"),
            Rule(("decoder_b_att_*",), ("attention.encoder_att_*.bias",)),
            _matrix("decoder_Wd_att", "attention.decoder_att.weight"),
            _matrix("decoder_U_att", "attention.full_att.weight"),
            Rule(("decoder_c_tt",), ("attention.full_att.bias",), _to_vector),
            _matrix("decoder_W_sel", "f_beta.weight"),
            Rule(("decoder_b_sel",), ("f_beta.bias",), _to_vector),
        ),
        ignore=(r"Wemb", r"decoder_(W|Wc|U|b)", r"ff_.*", r"encoder.*"),
    ),
)


class AnnotationScores(nn.Module):
    """e_i = u . f(P(a)_i + W_d h) + c, named as in sgrvinod's port. P is affine; each further layer of `attn_layers` is followed by tanh.

    W_d has a bias with f = ReLU, as in the port, and none with f = tanh, as in the authors' code; so it is with the starting values.
    """

    def __init__(self, context_dim: int, query_dim: int, attn_dim: int, activation: Activation, attn_layers: int, **dd: Any) -> None:
        super().__init__()
        check_option(activation, ("tanh", "relu"), "activation")
        sizes = {"context_dim": context_dim, "query_dim": query_dim, "attn_dim": attn_dim, "attn_layers": attn_layers}
        for name, value in sizes.items():
            require(value > 0, "{}={} must be at least 1", name, value)
        self.activation = activation
        self.encoder_att = Linear(context_dim, attn_dim, **dd)
        for at in range(1, attn_layers):
            self.add_module(f"encoder_att_{at}", Linear(attn_dim, attn_dim, **dd))
        self.deeper = [f"encoder_att_{at}" for at in range(1, attn_layers)]
        self.decoder_att = Linear(query_dim, attn_dim, activation == "relu", **dd)
        self.full_att = Linear(attn_dim, 1, **dd)
        if activation == "tanh":
            for layer in self.children():
                init_authors_(layer)

    def project(self, context: Tensor) -> Tensor:
        """P(a), (B, L, A)."""
        projected = self.encoder_att(context)
        for name in self.deeper:
            projected = getattr(self, name)(projected).tanh()
        return projected

    def forward(self, query: Tensor, projected: Tensor) -> Tensor:
        """(B, T, L) in float32 at least."""
        return additive_scores(self.decoder_att(query), projected, self.full_att.weight[0], self.activation) + self.full_att.bias


def init_authors_(layer: nn.Module) -> None:
    """As the authors start: square matrices orthogonal, others normal with deviation 0.01, biases zero."""
    assert isinstance(layer, nn.Linear)
    if layer.in_features == layer.out_features:
        nn.init.orthogonal_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=0.01)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def gate_layer(context_dim: int, query_dim: int, gate: Gate | None, activation: Activation, **dd: Any) -> nn.Linear | None:
    """beta before its sigmoid: one number, or one for each channel of the context."""
    check_option(gate, ("scalar", "vector", None), "gate")
    if gate is None:
        return None
    layer = Linear(query_dim, 1 if gate == "scalar" else context_dim, **dd)
    if activation == "tanh":
        init_authors_(layer)
    return layer


def gated(z: Tensor, query: Tensor, layer: nn.Linear | None) -> Tensor:
    return z if layer is None else layer(query).sigmoid() * z


def annotations_for(
    module: Any, query: Tensor, context: Tensor, key_mask: Tensor | None, cache: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """For a mechanism with `attention`, after all checks: states (B, T, query_dim); annotations and P(a), masked ones zero; the mask (B, 1, L)."""
    check_floating(query, "query")
    shape, dim = tuple(query.shape), module.query_dim
    require(query.ndim in (2, 3), "query must be (batch, {}) or (batch, steps, {}), got {} axes: {}", dim, dim, query.ndim, shape)
    query = query[:, None] if query.ndim == 2 else query
    check_tokens(query, dim, "query", "query_dim")
    checked_annotations(context, module.context_dim)
    require(context.shape[0] == query.shape[0], "query {} has another batch than context {}", shape, tuple(context.shape))
    check_mask(key_mask, context.shape[0], context.shape[1])
    if cache is not None:
        check_floating(cache, "cache")
        shape = (*context.shape[:2], module.attn_dim)
        require(tuple(cache.shape) == shape, "cache must be project(context), of shape {}, got {}", shape, tuple(cache.shape))
    context = zero_rows(context, key_mask)
    projected = module.attention.project(context) if cache is None else zero_rows(cache, key_mask)
    return query, context, projected, None if key_mask is None else key_mask[:, None]


def checked_annotations(context: Tensor, context_dim: int) -> Tensor:
    check_tokens(context, context_dim, "context", "context_dim")
    require(context.shape[1] > 0, "there is nothing to attend to: context is {}", tuple(context.shape))
    return context


def example_pair(options: Mapping[str, Any], batch: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Inputs for the checks: as many states as locations."""
    return {name: torch.randn(batch, size, options[f"{name}_dim"], generator=generator) for name in ("query", "context")}
