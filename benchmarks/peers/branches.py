"""Public forms of the mechanisms that replace a convolution, and of BAM, re-expressed for timing: the same operations in the same order.

Each takes one of our modules and copies its weights through `regard.official.to_official`, so outputs must be equal.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.official import to_official


def _conv_bn(c_in: int, c_out: int, k: int = 3, dilation: int = 1, groups: int = 1) -> nn.ModuleDict:
    conv = nn.Conv2d(c_in, c_out, k, padding=dilation * (k - 1) // 2, dilation=dilation, groups=groups, bias=False)
    return nn.ModuleDict({"conv": conv, "bn": nn.BatchNorm2d(c_out)})


class TimmSK(nn.Module):
    """timm SelectiveKernel, 3x3 and dilated 3x3: branches stacked, summed for the mean, 1x1 convolutions on it, product of the stack, summed."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c, h = ours.channels, ours.hidden_channels
        self.paths = nn.ModuleList(_conv_bn(c, c, dilation=d, groups=ours.groups) for d in (1, 2))
        attention = {
            "fc_reduce": nn.Conv2d(c, h, 1, bias=False),
            "bn": nn.BatchNorm2d(h),
            "fc_select": nn.Conv2d(h, 2 * c, 1, bias=False),
        }
        self.attn = nn.ModuleDict(attention)
        self.load_state_dict(to_official(ours, "timm"))

    def forward(self, x: Tensor) -> Tensor:
        stack = torch.stack([F.relu(path["bn"](path["conv"](x)), inplace=True) for path in self.paths], 1)
        pooled = stack.sum(1).mean((2, 3), keepdim=True)
        logits = self.attn["fc_select"](F.relu(self.attn["bn"](self.attn["fc_reduce"](pooled)), inplace=True))
        weights = logits.view(x.shape[0], 2, -1, 1, 1).softmax(1)
        return (stack * weights).sum(1)


class SplAt(nn.Module):
    """The authors' SplAtConv2d: branches split, added for the mean, multiplied, added."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c, h, self.radix, self.groups = ours.channels, ours.hidden_channels, ours.radix, ours.groups
        r, k = self.radix, self.groups
        self.conv = nn.Conv2d(c, r * c, 3, padding=1, groups=r * k, bias=False)
        self.bn0, self.bn1 = nn.BatchNorm2d(r * c), nn.BatchNorm2d(h)
        self.fc1, self.fc2 = nn.Conv2d(c, h, 1, groups=k), nn.Conv2d(h, r * c, 1, groups=k)
        self.load_state_dict(to_official(ours))

    def _attention(self, pooled: Tensor) -> Tensor:
        logits = self.fc2(F.relu(self.bn1(self.fc1(pooled)), inplace=True))
        return logits.view(pooled.shape[0], self.groups, self.radix, -1).transpose(1, 2).softmax(1).reshape(pooled.shape[0], -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        u = F.relu(self.bn0(self.conv(x)), inplace=True)
        maps = torch.split(u, u.shape[1] // self.radix, 1)
        weights = torch.split(self._attention(F.adaptive_avg_pool2d(sum(maps), 1)), u.shape[1] // self.radix, 1)
        return sum(weight * one for weight, one in zip(weights, maps, strict=True)).contiguous()


class TimmSplit(SplAt):
    """timm SplitAttn: the same with the branches as an axis, summed by reductions."""

    def forward(self, x: Tensor) -> Tensor:
        u = F.relu(self.bn0(self.conv(x)), inplace=True)
        u = u.reshape(u.shape[0], self.radix, -1, *u.shape[2:])
        weights = self._attention(u.sum(1).mean((2, 3), keepdim=True))
        return (u * weights.reshape(*u.shape[:3], 1, 1)).sum(1).contiguous()


class OfficialSC(nn.Module):
    """The authors' SCConv: sequences of modules, the gate as upsampled map, sum, sigmoid, product."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c = ours.channels

        def layer() -> list[nn.Module]:
            return [nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)]

        self.k2 = nn.Sequential(nn.AvgPool2d(ours.pooling_r), *layer())
        self.k3, self.k4 = nn.Sequential(*layer()), nn.Sequential(*layer())
        self.load_state_dict(to_official(ours))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(torch.add(x, F.interpolate(self.k2(x), x.shape[2:])))
        return self.k4(torch.mul(self.k3(x), gate))


class OfficialBAM(nn.Module):
    """The authors' BAM as it was meant: both branches expanded to full maps, then four passes over them."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c, h, d = ours.channels, ours.hidden_channels, ours.dilation
        channel = {"fc_0": nn.Linear(c, h), "bn_1": nn.BatchNorm1d(h), "fc_final": nn.Linear(h, c)}
        spatial: dict[str, nn.Module] = {"conv_reduce0": nn.Conv2d(c, h, 1), "bn_reduce0": nn.BatchNorm2d(h), "conv_final": nn.Conv2d(h, 1, 1)}
        for i in range(2):
            spatial |= {f"conv_di_{i}": nn.Conv2d(h, h, 3, padding=d, dilation=d), f"bn_di_{i}": nn.BatchNorm2d(h)}
        self.c, self.s = nn.ModuleDict(channel), nn.ModuleDict(spatial)
        state = to_official(ours)
        self.load_state_dict({k.replace("channel_att.gate_c.gate_c_", "c.").replace("spatial_att.gate_s.gate_s_", "s."): v for k, v in state.items()})

    def forward(self, x: Tensor) -> Tensor:
        c, s = self.c, self.s
        pooled = F.avg_pool2d(x, x.shape[2:], stride=x.shape[2:]).flatten(1)
        channel = c["fc_final"](F.relu(c["bn_1"](c["fc_0"](pooled))))[:, :, None, None].expand_as(x)
        plane = x
        for name in ("reduce0", "di_0", "di_1"):
            plane = F.relu(s[f"bn_{name}"](s[f"conv_{name}"](plane)))
        return (1 + torch.sigmoid(channel * s["conv_final"](plane).expand_as(x))) * x


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "sk": {"timm": TimmSK},
    "split": {"timm": TimmSplit, "authors": SplAt},
    "sc_conv": {"authors": OfficialSC},
    "bam": {"authors": OfficialBAM},
}
