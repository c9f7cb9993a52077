"""Random features drawn around the keys of each query, and attention through them.

out_n = softmax_m(s w_n . k_m - s |k_m|^2 / 2) v_m,   s = d^-1/2
"""

import torch
from torch import Tensor

from .._precision import at_least_float32, full_precision
from ..softmax_attention import attend, attend_key_bias, attention_weights
from .draws import draw_keys


def draw_features(
    q: Tensor,
    k: Tensor,
    count: int,
    std: float | None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    index: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """w = q + key + std noise of every draw, (B, H, N, d) each, in float32 at least.

    Args:
        q, k, mask, causal: as in `attend`.
        count: draws, each of a key with its softmax probability; -1: the expected key; 0: the mean key.
        std: of the noise; None for none.
        index: the keys to take instead of drawing them, (B, H, N) or (B, H, N, count).
        noise: (B, H, N, d) or (B, H, N, draws, d), drawn if None.
    """
    b, h, n, d = q.shape
    with full_precision(q):
        q, k = (t.to(at_least_float32(q, k)) for t in (q, k))
        if count > 0:
            index = draw_keys(q, k, count, mask=mask, causal=causal, generator=generator) if index is None else index
            found = [k.gather(2, one.unsqueeze(-1).expand(-1, -1, -1, d)) for one in index.reshape(b, h, n, count).unbind(3)]
        elif count == -1:
            found = [attend(q, k, k, mask=mask, causal=causal)]
        else:  # queries of zero see all keys alike; one of them is enough where all may see the same keys
            alike = not causal and (mask is None or mask.shape[2] == 1)
            found = [attend(torch.zeros_like(q[:, :, :1] if alike else q), k, k, mask=mask, causal=causal)]
        if std is None:
            return [q + key for key in found]
        if noise is None:
            noise = torch.randn(b, h, n, len(found), d, generator=generator, dtype=q.dtype, device=q.device)
        return [q + key + std * e for key, e in zip(found, noise.reshape(b, h, n, len(found), d).unbind(3), strict=True)]


def feature_attention(features: list[Tensor], k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """The mean over the draws, (B, H, N, dv)."""
    found = [attend_key_bias(w, k, v, _bias(k), mask=mask, causal=causal) for w in features]
    return found[0] if len(found) == 1 else torch.stack(found).mean(0)


def feature_weights(features: list[Tensor], k: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """What multiplies the values, (B, H, N, M), the mean over the draws."""
    with full_precision(k):
        k = k.to(at_least_float32(k))
        return torch.stack([attention_weights(w, k, bias=_bias(k).unsqueeze(2), mask=mask, causal=causal) for w in features]).mean(0)


def _bias(k: Tensor) -> Tensor:
    return -0.5 * k.shape[-1] ** -0.5 * k.to(at_least_float32(k)).square().sum(-1)
