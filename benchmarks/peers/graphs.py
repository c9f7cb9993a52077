"""Public forms of the linear-cost context blocks, re-expressed for timing: the same operations in the same order.

Each takes one of our modules and copies its weights through `regard.official.to_official`, so outputs must be equal. SpyGR has no public code that
follows the paper: beside it stands its equation written out over all pairs of positions.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.official import to_official


class PublicA2(nn.Module):
    """gjylt: three convolutions of x, softmaxes on permuted copies; with the projection and residual of the paper."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.m, self.n = ours.hidden_channels, ours.num_maps
        self.convA = nn.Conv2d(ours.channels, self.m, 1)
        self.convB, self.convV = (nn.Conv2d(ours.channels, self.n, 1) for _ in range(2))
        self.convZ = nn.Conv2d(self.m, ours.channels, 1)
        self.load_state_dict(to_official(ours))

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        feature, maps, vectors = self.convA(x), self.convB(x), self.convV(x)
        feature = feature.view(b, 1, self.m, h * w).permute(0, 2, 1, 3).reshape(b, self.m, h * w)
        maps = maps.view(b, 1, self.n, h * w).permute(0, 2, 1, 3).reshape(b * self.n, h * w)
        vectors = vectors.view(b, 1, self.n, h * w).permute(0, 1, 3, 2).reshape(b * h * w, self.n)
        maps = F.softmax(maps, 1).view(b, self.n, h * w).permute(0, 2, 1)
        vectors = F.softmax(vectors, 1).view(b, h * w, self.n).permute(0, 2, 1)
        z = torch.bmm(torch.bmm(feature, maps), vectors)
        return x + self.convZ(z.view(b, self.m, h, w))


class OfficialCGNL(nn.Module):
    """KaiyuYue: a loop over groups, inner products as matrix products of one row and one column; powers stored for the series."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c, h = ours.channels, ours.hidden_channels
        self.groups, self.rbf, self.order, self.gamma = ours.num_groups, ours.kernel == "rbf", ours.order, ours.gamma
        self.t, self.p, self.g = (nn.Conv2d(c, h, 1, bias=False) for _ in range(3))
        self.z = nn.Conv2d(h, c, 1, groups=self.groups, bias=False)
        self.gn = nn.GroupNorm(self.groups, c)
        self.load_state_dict(to_official(ours))

    def kernel(self, t: Tensor, p: Tensor, g: Tensor) -> Tensor:
        b, c, h, w = t.shape
        if not self.rbf:
            t, p, g = t.view(b, 1, -1), p.view(b, 1, -1), g.view(b, -1, 1)
            return torch.bmm(torch.bmm(p, g), t).view(b, c, h, w)
        t, p, g = t.view(b, 1, -1), p.view(b, 1, -1), g.view(b, 1, -1)
        beta = math.exp(-2 * self.gamma)
        taylor = [beta * (2 * self.gamma) ** o / math.factorial(o) for o in range(self.order + 1)]
        t_powers = torch.cat([a * t.pow(o) for o, a in enumerate(taylor)], 1)
        p_powers = torch.cat([p.pow(o) for o in range(self.order + 1)], 1)
        att = torch.bmm(p_powers, g.transpose(1, 2))
        return torch.bmm(att.transpose(1, 2), t_powers).view(b, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        t, p, g = self.t(x), self.p(x), self.g(x)
        parts = zip(*(m.split(m.shape[1] // self.groups, 1) for m in (t, p, g)), strict=True)
        return self.gn(self.z(torch.cat([self.kernel(*part) for part in parts], 1))) + x


class OfficialGloRe(nn.Module):
    """facebookresearch: two convolutions of x, one-dimensional convolutions on permuted contiguous nodes, the state map written out."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c, s, n = ours.channels, ours.state_channels, ours.hidden_channels
        self.s, self.n, self.normalize = s, n, ours.normalize
        self.conv_state, self.conv_proj = nn.Conv2d(c, s, 1), nn.Conv2d(c, n, 1)
        self.gcn = nn.ModuleDict({"conv1": nn.Conv1d(n, n, 1), "conv2": nn.Conv1d(s, s, 1, bias=False)})
        self.conv_extend, self.blocker = nn.Conv2d(s, c, 1, bias=False), nn.BatchNorm2d(c, eps=1e-4)
        self.load_state_dict(to_official(ours))

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        state, proj = self.conv_state(x).view(b, self.s, -1), self.conv_proj(x).view(b, self.n, -1)
        nodes = torch.matmul(state, proj.permute(0, 2, 1))
        nodes = nodes * (1.0 / state.shape[2]) if self.normalize else nodes
        step = self.gcn["conv1"](nodes.permute(0, 2, 1).contiguous()).permute(0, 2, 1).contiguous() + nodes
        y = torch.matmul(self.gcn["conv2"](F.relu(step)), proj)
        return x + self.blocker(self.conv_extend(y.view(b, self.s, h, w)))


class ExplicitSpyGR(nn.Module):
    """The equation over all pairs: the affinity of N x N, its degrees, the Laplacian, level by level."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c, m = ours.channels, ours.hidden_channels
        shapes = {"phi": (c, m, True), "attn": (c, m, True), "graph": (c, c, False)}
        self.levels = nn.ModuleList(nn.ModuleDict({k: nn.Conv2d(i, o, 1, bias=b) for k, (i, o, b) in shapes.items()}) for _ in range(ours.num_levels))
        self.residual = ours.residual
        self.load_state_dict(to_official(ours))

    def reason(self, x: Tensor, level: nn.ModuleDict) -> Tensor:
        phi = F.relu(level["phi"](x)).flatten(2)
        lam = torch.sigmoid(level["attn"](x.mean((2, 3), keepdim=True))).flatten(2)
        affinity = torch.bmm(phi.transpose(1, 2), lam * phi)
        degree = affinity.sum(2)
        root = torch.where(degree > 0, torch.where(degree > 0, degree, 1.0).rsqrt(), 0.0)
        laplacian = torch.eye(degree.shape[1], dtype=x.dtype) - root[:, :, None] * affinity * root[:, None]
        return F.relu(torch.bmm(level["graph"](x).flatten(2), laplacian)).view_as(x)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for _ in self.levels[1:]:
            maps.append(F.max_pool2d(maps[-1], 2))
        found = [self.reason(m, level) for m, level in zip(maps, self.levels, strict=True)]
        out = found[-1]
        for y in reversed(found[:-1]):
            out = y + F.interpolate(out, size=y.shape[2:], mode="nearest")
        return x + out if self.residual else out


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module | None]]] = {
    "double": {"gjylt": lambda ours: PublicA2(ours) if ours.reconstruct and ours.residual and ours.frames == 1 else None},
    "cgnl": {"authors": lambda ours: None if ours.use_scale or ours.exact_beta else OfficialCGNL(ours)},
    "glore": {"authors": lambda ours: OfficialGloRe(ours) if ours.dims == 2 else None},
    "spygr": {"explicit": ExplicitSpyGR},
}
