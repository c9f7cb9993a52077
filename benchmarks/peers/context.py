"""Public forms of mechanisms over whole maps, re-expressed for timing: the same operations in the same order, on the same weights.

Each takes one of our modules and copies its weights through `regard.official.to_official`, so outputs must be equal.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from regard.official import to_official


class ExplicitNonLocal(nn.Module):
    """AlexHex7 and mmcv, embedded Gaussian: three 1x1 convolutions, the N x N product, softmax, product with the values."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c, d = ours.channels, ours.hidden_channels
        self.g, self.theta, self.phi, self.W = nn.Conv2d(c, d, 1), nn.Conv2d(c, d, 1), nn.Conv2d(c, d, 1), nn.Conv2d(d, c, 1)
        self.load_state_dict(to_official(ours, "AlexHex7"))
        self.scale = d**-0.5 if ours.use_scale else 1.0

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        g = self.g(x).view(b, -1, x.shape[2] * x.shape[3]).permute(0, 2, 1)
        theta = self.theta(x).view(b, -1, x.shape[2] * x.shape[3]).permute(0, 2, 1)
        phi = self.phi(x).view(b, -1, x.shape[2] * x.shape[3])
        weights = (torch.matmul(theta, phi) * self.scale).softmax(-1) if self.scale != 1.0 else torch.matmul(theta, phi).softmax(-1)
        y = torch.matmul(weights, g).permute(0, 2, 1).contiguous().view(b, -1, *x.shape[2:])
        return self.W(y) + x


class OfficialCrissCross(nn.Module):
    """The authors' pure-python CrissCrossAttention, their mask on the device of x: six copies, a mask of all columns, one softmax over a copy."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c, d = ours.channels, ours.hidden_channels
        self.query_conv, self.key_conv, self.value_conv = nn.Conv2d(c, d, 1), nn.Conv2d(c, d, 1), nn.Conv2d(c, c, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.load_state_dict(to_official(ours, "CCNet"))
        self.recurrence = ours.recurrence

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.recurrence):
            x = self._once(x)
        return x

    def _once(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        maps = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        query_h, key_h, value_h = (m.permute(0, 3, 1, 2).contiguous().view(b * w, -1, h) for m in maps)
        query_w, key_w, value_w = (m.permute(0, 2, 1, 3).contiguous().view(b * h, -1, w) for m in maps)
        mask = -torch.diag(torch.tensor(float("inf")).repeat(h), 0).unsqueeze(0).repeat(b * w, 1, 1)
        energy_h = (torch.bmm(query_h.permute(0, 2, 1), key_h) + mask).view(b, w, h, h).permute(0, 2, 1, 3)
        energy_w = torch.bmm(query_w.permute(0, 2, 1), key_w).view(b, h, w, w)
        both = torch.softmax(torch.cat([energy_h, energy_w], 3), 3)
        weights_h = both[:, :, :, :h].permute(0, 2, 1, 3).contiguous().view(b * w, h, h)
        weights_w = both[:, :, :, h : h + w].contiguous().view(b * h, w, w)
        out_h = torch.bmm(value_h, weights_h.permute(0, 2, 1)).view(b, w, -1, h).permute(0, 2, 3, 1)
        out_w = torch.bmm(value_w, weights_w.permute(0, 2, 1)).view(b, h, -1, w).permute(0, 2, 1, 3)
        return self.gamma * (out_h + out_w) + x


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "non_local": {"explicit": ExplicitNonLocal},
    "criss_cross": {"official": OfficialCrissCross},
}
