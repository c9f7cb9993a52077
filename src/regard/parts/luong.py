"""What Luong's global and local attention share: the four scores, the weights, and the attentional vector tanh(W_out [c ; h])."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import require
from ..ops._linear import linear
from ..ops._precision import at_least_float32, full_precision
from ..ops.additive_scores import additive_scores
from ..ops.softmax_attention import combine_masks
from ..ops.softmax_attention.sparsemax import sparsemax
from ..validate import check_bool, check_broadcastable, check_floating, check_option
from .heads import checked_source
from .linear import Linear

Score = Literal["dot", "general", "concat", "location"]
# Floats of temporaries at a time: 16 MB. Up to 64 MB of them are kept for the backward pass; more are computed again.
FLOATS, KEPT = 2**22, 2**24


def luong_layers(dim: int, context_dim: int, score: Score, max_len: int | None, score_bias: bool, out_bias: bool, **dd: Any) -> dict[str, nn.Linear]:
    """The layers of a score and of the attentional vector, by the names that OpenNMT gives them."""
    check_option(score, ("dot", "general", "concat", "location"), "score")
    require(score != "dot" or dim == context_dim, "score='dot' needs context_dim={} to equal dim={}; use score='general'", context_dim, dim)
    require(score != "location" or (max_len or 0) > 0, "score='location' needs max_len, the longest context it can weigh, got max_len={}", max_len)
    shapes = {
        "dot": {},
        "general": {"linear_in": (dim, context_dim, False)},
        "concat": {"linear_query": (dim, dim, score_bias), "linear_context": (context_dim, dim, False), "v": (dim, 1, False)},
        "location": {"linear_location": (dim, max_len, False)},
    }[score]
    return {name: Linear(*shape, **dd) for name, shape in (shapes | {"linear_out": (context_dim + dim, dim, out_bias)}).items()}


def checked_step(
    x: Tensor, context: Tensor | None, dim: int, context_dim: int, key_mask: Tensor | None, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`x` as (B, N, dim), from (B, dim) too; what it attends to, (B, M, context_dim); and the allowed pairs, broadcastable to (B, N, M)."""
    check_floating(x)
    require(x.ndim != 2 or context is not None, "x must be (batch, positions, {}); one step (batch, {}) needs a context, got {}", dim, dim, x.shape)
    x = x[:, None] if x.ndim == 2 else x
    source = checked_source(x, context, dim, context_dim, key_mask)
    require(source.shape[1] > 0, "there is nothing to attend to: the context has {} positions", source.shape[1])
    if attn_mask is not None:
        check_bool(attn_mask, "attn_mask")
        attn_mask = attn_mask[:, 0] if attn_mask.ndim == 4 and attn_mask.shape[1] == 1 else attn_mask
        check_broadcastable(attn_mask, (x.shape[0], x.shape[1], source.shape[1]), "attn_mask")
        attn_mask = attn_mask[(None,) * (3 - attn_mask.ndim)]
    return x, source, combine_masks(None if key_mask is None else key_mask[:, None], attn_mask)


def queries_and_keys(layers: Any, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """What the score multiplies ("concat": adds): (B, N, d) and (B, M, d). "general" projects the shorter of the two sides."""
    match layers.score:
        case "general" if source.shape[1] < x.shape[1]:
            return x, linear(source, layers.linear_in.weight.mT)
        case "general":
            return layers.linear_in(x), source
        case "concat":
            return layers.linear_query(x), layers.linear_context(source)
        case "location":
            return x, layers.linear_location.weight[: source.shape[1]].expand(x.shape[0], -1, -1)
    return x, source


def scores(layers: Any, q: Tensor, k: Tensor) -> Tensor:
    """(B, N, M), unscaled, in float32 at least: products of a thousand channels do not fit into half precision."""
    if layers.score == "concat":
        return additive_scores(q, k, layers.v.weight[0])
    with full_precision(q):
        dtype = at_least_float32(q, k)
        return q.to(dtype) @ k.to(dtype).mT


def normalized(scores: Tensor, mask: Tensor | None, kind: str = "softmax") -> Tensor:
    """Softmax or sparsemax over the allowed keys; a row without any is zero, and passes finite gradients."""
    if kind == "sparsemax":
        return sparsemax(scores, mask)
    if mask is None:
        return scores.softmax(-1)
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~mask, 0.0)


def attentional(layers: Any, c: Tensor, h: Tensor) -> Tensor:
    """activation(W_out [c ; h]), context first."""
    out = layers.linear_out(torch.cat((c, h), -1))
    return out.tanh() if layers.activation == "tanh" else out


def in_rows(core: Callable[..., Tensor], floats: int, *tensors: Tensor | None) -> Tensor:
    """core(*tensors), (B, N, ...) -> (B, N, ...), some queries at a time, and if large again in the backward pass; axis 1 of a tensor is N, or 1.

    Args:
        floats: about how many floats of temporaries `core` makes for one query of all samples.
    """
    first = tensors[0]
    assert first is not None
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return core(*tensors)
    n, size = first.shape[1], max(1, FLOATS // max(floats, 1))
    if n <= size:
        return core(*tensors)
    parts = ([t if t is None or t.shape[1] != n else t[:, at : at + size] for t in tensors] for at in range(0, n, size))
    again = torch.is_grad_enabled() and n * floats > KEPT
    return torch.cat([checkpoint(core, *part, use_reentrant=False) if again else core(*part) for part in parts], 1)
