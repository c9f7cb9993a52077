"""Relations within groups of channels: the form is chosen here."""

from torch import Tensor

from .. import _dispatch
from . import fused, reference

_dispatch.register("relate_groups", "fused")


def relate_groups(tpg: Tensor, out: Tensor, weight: Tensor, bias: Tensor, groups: int, scale: float, eps: float) -> Tensor:
    """GroupNorm(out (t <p, g>)): the inner products over a group's channels and all positions, `out` a grouped 1x1 convolution.

    Args:
        tpg: t, p and g, (B, 3 h, N), float32 at least.
        out: (C, h / groups).
        weight, bias: (C,), of the norm.
        groups: of the h and of the C channels.
        scale: factor on the inner products.
        eps: of the norm.

    Returns:
        (B, C, N).
    """
    automatic, why = ("fused", "on a CPU every pass over the map counts") if _dispatch.on_cpu(tpg) else ("reference", "arranged for CPU kernels")
    impl = fused if _dispatch.choose("relate_groups", automatic, why) == "fused" else reference
    return impl.relate_groups(tpg, out, weight, bias, groups, scale, eps)
