"""Sparse reconstruction: precision settled, the implementation chosen, a few heads or channels at a time."""

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._precision import at_least_float32, full_precision
from ..linear_attention import blockwise
from . import blocked, factored, folded, reference, solve
from .shrinkage import SHRINK

_dispatch.register("sparse_recon", "folded", "blocked")
_dispatch.register("fourier_recon", "factored")


def sparse_recon(
    q: Tensor,
    v: Tensor,
    random: Tensor,
    *,
    static: Tensor | None = None,
    mixing: Tensor,
    threshold: Tensor,
    step: Tensor,
    steps: int,
    shrink: str,
) -> tuple[Tensor, Tensor]:
    """P z with z a sparse code of v on P, by `steps` steps of shrinkage on 0.5 |v - P z|^2 + threshold |z|_1 (where U = I, step = 1 and "relu").

    P (N, m) has unit columns: features exp(u R - |u|^2 / 2) / sqrt(m) of the queries at unit length u, then static atoms. With G = P^T P, y = P^T v:

        z_0 = S_t(y),   z <- S_rt(z - r (U G U z - y)),   r = step / (1 + largest row sum of |G|), through which no gradient flows

    Args:
        q, v: (B, H, N, d).
        random: R, (H, d, m).
        static: further atoms, (1, H, N, m').
        mixing: U, square in all atoms. threshold, step: t and the numerator of r, of one element.
        shrink: S, "relu" or "gelu".

    Returns:
        (B, H, N, d) in v's dtype, and z (B, H, m + m', d). Computed in float32 at least.
    """
    given, exact = v.dtype, at_least_float32(q, v)
    with full_precision(v):
        q, v, random, mixing, threshold, step = (t.to(exact) for t in (q, v, random.unsqueeze(0), mixing[None, None], threshold, step))
        threshold, step = threshold.view(1, 1, 1, 1), step.view(1, 1, 1, 1)
        static = None if static is None else static.to(exact)
        plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or v.device.type != "cpu"
        choice = ("folded", "compiled, under a function transform or not on the CPU") if plain else ("blocked", "features stay in the cache")
        impl = _dispatch.choose("sparse_recon", *choice)
        if impl == "reference":
            out, code = reference.sparse_recon(q, v, random, static, mixing, threshold, step, steps, SHRINK[shrink])
            return out.to(given), code
        static, gram = (None, None) if static is None else solve.static_atoms(static)
        run = blocked.sparse_recon if impl == "blocked" else folded.sparse_recon
        out, code = run(q, v, random, static, gram, mixing, threshold, step, steps, SHRINK[shrink])
        return out.to(given), code


def fourier_recon(
    x: Tensor, kernel: Tensor, after: Tensor, bound: Tensor, *, lam: float, steps: int, shrink: str, return_code: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Convolutional sparse reconstruction of each channel by kernels as large as the map, kept as half spectra.

    z_0 = S_lam(k * x),   z <- S_{lam / L}(z - (k k^H * z - k * x) / L),   out = after * (k^H * z)

    Args:
        x: (B, C, H, W).
        kernel, after: real views of complex spectra, (C, r, H, W // 2 + 1, 2) and (C, H, W // 2 + 1, 2).
        bound: L, (C,).

    Returns:
        (B, C, H, W) in the dtype of `x`, and z (B, C, r, H, W) or None. Computed in float32 at least.
    """
    if not x.numel():  # there are no transforms of nothing
        return x, x.unsqueeze(2).expand(-1, -1, kernel.shape[1], -1, -1) if return_code else None
    given, exact = x.dtype, at_least_float32(x)
    with full_precision(x):
        x, kernel, after, bound = (t.to(exact) for t in (x, kernel, after, bound))
        options: Any = {"lam": lam, "steps": steps, "shrink": SHRINK[shrink]}
        impl = _dispatch.choose("fourier_recon", "factored", "one input for each channel: 2 r products a frequency in place of r^2")
        if impl == "reference":
            kernel, after = torch.view_as_complex(kernel), torch.view_as_complex(after)
            out, code = reference.fourier_recon(x, kernel, after, bound, **options)
            return out.to(given), code if return_code else None
        tensors: Any = (x, kernel.unsqueeze(0), after.unsqueeze(0), bound[None, :, None, None, None])
        if return_code:
            out, code = factored.fourier_recon(*tensors, **options)
            return out.to(given), code

        def core(*tensors: Any) -> Tensor:
            return factored.fourier_recon(*tensors, **options)[0].flatten(2).unsqueeze(-1)

        floats = 6 * kernel.shape[1] * x.shape[2] * x.shape[3]
        return blockwise(core, *tensors, floats=floats).squeeze(-1).unflatten(2, x.shape[2:]).to(given), None


def largest_singular(kernel: Tensor) -> Tensor:
    """The largest singular value over all frequencies of Re(k k^H), (C,), for spectra (C, r, ..., 2) as real views.

    Re(k k^H) = a a^T + b b^T of the real and imaginary parts has the non-zero eigenvalues of the 2 x 2 Gram matrix of a and b.
    """
    a, b = kernel.to(at_least_float32(kernel)).unbind(-1)
    aa, bb, ab = (p.sum(1).flatten(1) for p in (a * a, b * b, a * b))
    return ((aa + bb + ((aa - bb).square() + 4 * ab.square()).sqrt()) / 2).amax(1)
