"""Products right to left: all keys into one (m, e) matrix; causal in chunks of `size` positions, exact and without an (N, m, e) tensor.

Inside a chunk the (size, size) weights below the diagonal, between chunks the sum of what came before. No loop over positions or chunks.
"""

from torch import Tensor

from .chunks import split


def product(q: Tensor, k: Tensor, v: Tensor, causal: bool, size: int) -> Tensor:
    """(B, H, N, m), (B, H, M, m), (B, H, M, e) -> (B, H, N, e)."""
    if not causal:
        return q @ (k.mT @ v)
    n = q.shape[2]
    q, k, v = (split(t, n, size) for t in (q, k, v))
    out = (q @ k.mT).tril() @ v
    before = (k[:, :, :-1].mT @ v[:, :, :-1]).cumsum(2)
    out[:, :, 1:] += q[:, :, 1:] @ before
    return out.flatten(2, 3)[:, :, :n]
