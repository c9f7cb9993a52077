"""A_m(p, r) = G(r, p + t_m + o_m(p)), G(a, b) = max(0, 1 - |a1 - b1|) max(0, 1 - |a2 - b2|). Dai et al., arXiv:1703.06211."""

import torch
from torch import Tensor

from ...errors import require
from ...validate import check_floating


def deformable_attention_weights(offset: Tensor, size: tuple[int, int]) -> Tensor:
    """The weights with which each tap of a deformable k x k convolution (stride 1, centred) gathers the pixels of a map. For small maps.

    sum_m W_m A_m x is that convolution, W_m its kernel at tap m; samples outside the map are zero.

    Args:
        offset: (B, 2 k^2, H, W), k odd: for tap m, row-major, channel 2 m moves the sample down, 2 m + 1 to the right.
        size: (H, W).

    Returns:
        (B, k^2, H W, H W): tap, query, key, positions row-major.
    """
    check_floating(offset, "offset")
    taps = offset.shape[1] // 2 if offset.ndim == 4 else 0
    k = round(taps**0.5)
    fits = offset.ndim == 4 and offset.shape[1] == 2 * k * k and k % 2 == 1 and tuple(offset.shape[2:]) == tuple(size)
    require(fits, "offset must be (batch, 2 k^2, height, width), k odd, for size={}, got {}", tuple(size), tuple(offset.shape))
    moved, tap = offset.unflatten(1, (taps, 2)), torch.arange(taps, device=offset.device)
    gathered = []
    for axis, shift in enumerate((tap // k - k // 2, tap % k - k // 2)):
        place = torch.arange(size[axis], device=offset.device)
        start = place[:, None] if axis == 0 else place
        sample = (moved[:, :, axis] + shift[:, None, None] + start).flatten(2)
        gathered.append((1 - (sample[..., None] - place).abs()).clamp_min(0))
    rows, columns = gathered
    return (rows[..., :, None] * columns[..., None, :]).flatten(-2)
