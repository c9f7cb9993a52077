"""Kernels kept apart: K K^H z = k (k^H z), so 2 r multiplications a frequency, not r^2; the target is subtracted while there is one channel of it."""

import torch
from torch import Tensor

from .._precision import full_precision
from .shrinkage import Shrink


def fourier_recon(x: Tensor, kernel: Tensor, after: Tensor, bound: Tensor, lam: float, steps: int, shrink: Shrink) -> tuple[Tensor, Tensor]:
    """As the reference, with `kernel` and `after` as real views (..., 2) and `bound` (1, C, 1, 1, 1), all with a leading axis of 1."""
    with full_precision(x):
        k, back, size = torch.view_as_complex(kernel), torch.view_as_complex(after), x.shape[-2:]

        def down(z: Tensor) -> Tensor:
            return (k.conj() * torch.fft.rfft2(z, norm="ortho")).sum(2)

        def up(spectrum: Tensor) -> Tensor:
            return torch.fft.irfft2(k * spectrum.unsqueeze(2), size, norm="ortho")

        spectrum = torch.fft.rfft2(x, norm="ortho")
        z = shrink(up(spectrum), lam)
        for _ in range(steps):
            z = shrink(z - up(down(z) - spectrum) / bound, lam / bound)
        # Two steps, not one product of the spectra: a kernel need not be that of a real filter, and the way back drops what is not real.
        decoded = torch.fft.irfft2(down(z), size, norm="ortho")
        return torch.fft.irfft2(back * torch.fft.rfft2(decoded, norm="ortho"), size, norm="ortho"), z
