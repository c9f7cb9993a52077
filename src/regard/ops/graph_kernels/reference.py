"""The definition of attention modulated by a kernel, with the weights written out."""

import torch
from torch import Tensor

TINY = 1e-9  # of the authors' code: a row without any weight gives zeros
EPS = 1e-8


def softmax_weights(q: Tensor, k: Tensor, kernel: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """exp(s - max) K over its row's sum, s = scale q k^T; the maximum is over the entries that K lets through."""
    scores = (q * scale) @ k.mT
    seen = (kernel != 0) if allowed is None else (kernel != 0) & allowed
    detached = scores.detach()
    top = detached.masked_fill(~seen, float("-inf")).amax(-1, keepdim=True)
    top = torch.where(top.isinf(), detached.amax(-1, keepdim=True), top)
    # Only entries with K = 0 can lie above the maximum: their weight is zero, and their derivative by K must not overflow.
    w = (scores - top).clamp_max(60.0).exp() * kernel
    w = w if allowed is None else w.masked_fill(~allowed, 0.0)
    return w / (w.sum(-1, keepdim=True) + TINY)


def features(x: Tensor, feature_map: str, scale: float) -> Tensor:
    if feature_map == "elu":
        return torch.relu(x) + x.clamp_max(0.0).exp()  # elu(x) + 1; torch's elu gives a traced graph the wrong strides
    return torch.relu(x * scale) + EPS


def linear_weights(q: Tensor, k: Tensor, kernel: Tensor, allowed: Tensor | None) -> Tensor:
    """(phi(q) phi(k)^T |K| + eps) over its row's sum, for q and k that are features already."""
    w = (q @ k.mT) * kernel.abs() + EPS
    w = w if allowed is None else w.masked_fill(~allowed, 0.0)
    total = w.sum(-1, keepdim=True)
    return w / total.where(total > 0, torch.ones_like(total))
