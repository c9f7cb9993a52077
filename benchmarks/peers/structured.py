"""Dense forms of kernel attention with weights by position, re-expressed for timing: all N x N pairs, on the same weights."""

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sequence import Projected


class FlaxTopological(Projected):
    """scenic's core on a line or a grid: the mask gathered from its parameters into N x N, features relu, eps on every entry, rows normalised."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__(ours, ("q_proj", "k_proj", "v_proj", "out_proj"))
        self.rpe, self.grid, self.index = copy.deepcopy(ours.rpe), ours.grid_size, None

    def mask(self, n: int) -> Tensor:
        if self.index is None or self.index.shape[0] != n:
            sides = self.grid or (n,)
            axes = torch.meshgrid(*(torch.arange(s) for s in sides), indexing="ij")
            self.index = torch.zeros(n, n, dtype=torch.long)
            for axis, width in zip(axes, self.rpe.shape[1:], strict=True):
                self.index = self.index * width + axis.flatten()[:, None] - axis.flatten() + width // 2
        return self.rpe.flatten(1)[:, self.index].abs()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = F.relu(q * q.shape[-1] ** -0.5) + 1e-8, F.relu(k) + 1e-8
        weights = torch.einsum("bhnd,bhmd->bhnm", q, k) * self.mask(x.shape[1]) + 1e-8
        weights = weights / weights.sum(-1, keepdim=True)
        return self.out_proj(torch.einsum("bhnm,bhmd->bhnd", weights, v).transpose(1, 2).flatten(2))


class DenseRipple(Projected):
    """The equations written out: all pairs, each with the weight of its ring; no public code exists."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__(ours, ("q_proj", "k_proj", "v_proj", "out_proj", "spatial_proj"))
        self.grid, self.radius, self.eps, self.ring = ours.grid_size, ours.max_radius, ours.eps, None

    def forward(self, x: Tensor) -> Tensor:
        if self.ring is None:
            at = torch.cartesian_prod(*(torch.arange(side) for side in self.grid))
            self.ring = (at[:, None] - at).abs().amax(-1).clamp_max(self.radius)
        q, k, v = (self.heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, s = F.elu(q) + 1, F.elu(k) + 1, self.heads(self.spatial_proj(x)).sigmoid()
        left = (1 - s).cumprod(-1)
        profile = torch.cat((s * F.pad(left, (1, 0), value=1.0)[..., :-1], left[..., -1:]), -1)
        weights = (q @ k.mT) * profile.gather(3, self.ring.expand(*profile.shape[:2], -1, -1))
        out = (weights @ v) / (weights.sum(-1, keepdim=True) + self.eps)
        return self.out_proj(out.transpose(1, 2).flatten(2))


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "masked_linear": {"Flax core, dense": FlaxTopological},
    "ripple": {"dense pairs": DenseRipple},
}
