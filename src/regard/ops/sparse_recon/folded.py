"""The dictionary never formed: its column norms go where things are small, and static atoms meet each other once for the whole batch."""

from torch import Tensor

from .shrinkage import Shrink
from .solve import features, solve, unit


def sparse_recon(
    q: Tensor,
    v: Tensor,
    random: Tensor,
    static: Tensor | None,
    static_gram: Tensor | None,
    mixing: Tensor,
    threshold: Tensor,
    step: Tensor,
    steps: int,
    shrink: Shrink,
) -> tuple[Tensor, Tensor]:
    f = features(unit(q), random)
    sums = (f.mT @ f, f.mT @ v, None, None) if static is None else (f.mT @ f, f.mT @ v, f.mT @ static, static.mT @ v)
    z, weights = solve(*sums, static_gram, mixing, threshold, step, steps, shrink)
    if static is None:
        return f @ weights, z
    moving, still = weights.tensor_split([f.shape[-1]], -2)
    return f @ moving + static @ still, z
