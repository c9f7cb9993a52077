"""The public form of pairwise and patchwise self-attention, re-expressed for timing: the authors' module (hszhao/SAN) with their CUDA operators
replaced by the unfold forms of their tests. The same operations in the same order, on the same weights.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.official import to_official


class UnfoldSan(nn.Module):
    """Windows of the keys, the places and the values copied by `unfold`; the network as a Sequential on all pairs; one product and sum."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.pairwise, self.k, self.share = hasattr(ours, "position"), ours.kernel_size, ours.share
        r, out, k = ours.rel_channels, ours.out_channels, ours.kernel_size
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(ours.channels, r, 1), nn.Conv2d(ours.channels, r, 1), nn.Conv2d(ours.channels, out, 1)
        hidden, last = (r, out // self.share) if self.pairwise else (out // self.share, k * k * out // self.share)
        width = r + 2 if self.pairwise else r * (k * k + 1)
        if self.pairwise:
            self.conv_p = nn.Conv2d(2, 2, 1)
        relu, norm = nn.ReLU(inplace=True), nn.BatchNorm2d
        first, second = nn.Conv2d(width, hidden, 1, bias=False), nn.Conv2d(hidden, last, 1)
        self.conv_w = nn.Sequential(norm(width), relu, first, norm(hidden), nn.ReLU(inplace=True), second)
        self.load_state_dict(to_official(ours, "hszhao/SAN"))
        self.pad = nn.ReflectionPad2d(k // 2)

    def windows(self, x: Tensor) -> Tensor:
        return F.unfold(self.pad(x), self.k).view(x.shape[0], x.shape[1], self.k**2, -1)

    def minus(self, a: Tensor, b: Tensor) -> Tensor:
        return a.flatten(2).unsqueeze(2) - self.windows(b)

    def places(self, height: int, width: int, like: Tensor) -> Tensor:
        columns = torch.linspace(-1.0, 1.0, width, device=like.device).unsqueeze(0).repeat(height, 1)
        rows = torch.linspace(-1.0, 1.0, height, device=like.device).unsqueeze(1).repeat(1, width)
        return torch.cat([columns.unsqueeze(0), rows.unsqueeze(0)]).unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        a, b, v = self.conv1(x), self.conv2(x), self.conv3(x)
        if self.pairwise:
            p = self.conv_p(self.places(height, width, x))
            w = self.conv_w(torch.cat([self.minus(a, b), self.minus(p, p).repeat(batch, 1, 1, 1)], 1)).softmax(-2)
        else:
            b = F.unfold(self.pad(b), self.k).view(batch, -1, 1, height * width)
            w = self.conv_w(torch.cat([a.view(batch, -1, 1, height * width), b], 1)).view(batch, -1, self.k**2, height * width)
        v = self.windows(v).view(batch, self.share, -1, self.k**2, height * width)
        return (w.unsqueeze(1) * v).sum(-2).view(batch, -1, height, width)


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "san_pairwise": {"hszhao, unfold": UnfoldSan},
    "san_patchwise": {"hszhao, unfold": UnfoldSan},
}
