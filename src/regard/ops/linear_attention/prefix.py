"""Softmax over the positions up to each query, channel by channel: exact, and stable for any range of the keys.

    out_t = sum_c q_tc sum_{s <= t} exp(k_sc - L_tc) v_s,   L_tc = log sum_{s <= t} exp(k_sc)

Every factor is the exp of something <= 0: pairs inside eight positions are taken directly; then the right half of ever larger segments looks at
the left half, relative to that half's largest key; then come the sums of whole chunks, rescaled as they are carried.
"""

import torch
from torch import Tensor

from .chunks import split

CHUNK, SMALLEST = 64, 8
LOWEST = -1e30  # a key that is not there: finite, so that no difference is NaN


def prefix_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, N, c), (B, H, N, c), (B, H, N, e) -> (B, H, N, e)."""
    n, size = q.shape[2], CHUNK
    while not torch.compiler.is_compiling() and size // 2 >= max(n, SMALLEST):
        size //= 2
    total = split(k.logcumsumexp(2), n, size, -LOWEST)
    q, k, v = split(q, n, size), split(k, n, size, LOWEST), split(v, n, size)
    out = _near(*(t.unflatten(3, (-1, SMALLEST)) for t in (q, k, v, total))).flatten(3, 4)
    half = SMALLEST
    while half < size:
        (q2, k1, v1, t2) = (t.unflatten(3, (-1, 2, half))[:, :, :, :, i] for t, i in ((q, 1), (k, 0), (v, 0), (total, 1)))
        peak = k1.detach().amax(-2, keepdim=True)
        out.unflatten(3, (-1, 2, half))[:, :, :, :, 1] += ((q2 * (peak - t2).exp()) @ (k1 - peak).exp().mT) @ v1
        half *= 2
    peak, before = _carry(k, v)
    out += (q * (peak.unsqueeze(3) - total).exp()) @ before
    return out.flatten(2, 3)[:, :, :n]


def _near(q: Tensor, k: Tensor, v: Tensor, total: Tensor) -> Tensor:
    """Pairs inside one small segment, (..., s, w) each."""
    s = q.shape[-2]
    later = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1).unsqueeze(-1)
    share = (k.unsqueeze(-3) - total.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()
    return (q.unsqueeze(-2) * share).sum(-1) @ v


def _carry(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """For each chunk the largest key before it (B, H, G, c), and the sum before it of exp(k - largest)^T v (B, H, G, c, e)."""
    chunks = k.shape[2]
    peak = k.detach().amax(3)
    sums = (k - peak.unsqueeze(3)).exp().mT @ v

    def earlier(by: int) -> tuple[Tensor, Tensor]:
        source = torch.arange(chunks, device=k.device) - by
        there, source = (source >= 0)[:, None], source.clamp_min(0)
        return peak[:, :, source].masked_fill(~there, LOWEST), sums[:, :, source].masked_fill(~there.unsqueeze(-1), 0.0)

    # Each round doubles how many chunks a sum covers. Compiled, the number of chunks may be free: rounds for a million of them.
    for i in range(20 if torch.compiler.is_compiling() else (chunks - 1).bit_length()):
        other_peak, other = earlier(2**i)
        largest = torch.maximum(peak, other_peak)
        sums = sums * (peak - largest).exp().unsqueeze(-1) + other * (other_peak - largest).exp().unsqueeze(-1)
        peak = largest
    return earlier(1)
