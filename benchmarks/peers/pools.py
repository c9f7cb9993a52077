"""Public forms of the pyramid heads, re-expressed for timing: the same operations in the same order, our weights by their authors' names."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.official import to_official


class CaffeLevels(nn.Module):
    """One pooling of the whole map for each level."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.levels, self.pool = ours.levels, F.adaptive_max_pool2d if ours.pool == "max" else F.adaptive_avg_pool2d

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.pool(x, n).flatten(1) for n in self.levels], 1)


def _conv_bn_relu(c_in: int, c_out: int, k: int = 1) -> nn.Sequential:
    parts = {"conv": nn.Conv2d(c_in, c_out, k, padding=k // 2, bias=False), "bn": nn.BatchNorm2d(c_out), "relu": nn.ReLU(inplace=True)}
    layer = nn.Sequential()
    for name, part in parts.items():
        layer.add_module(name, part)
    return layer


class PublicPPM(nn.Module):
    """semseg and mmsegmentation: pool, convolve, interpolate, concatenate; mmsegmentation's 3x3 convolution of all that."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c, h, self.align = ours.channels, ours.hidden_channels, ours.align_corners
        self.psp_modules = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), _conv_bn_relu(c, h)) for n in ours.bins)
        self.bottleneck = _conv_bn_relu(c + len(ours.bins) * h, ours.out_channels, 3) if ours.bottleneck is not None else None
        self.load_state_dict(to_official(ours, "mmsegmentation"))

    def forward(self, x: Tensor) -> Tensor:
        maps = [F.interpolate(one(x), x.shape[2:], mode="bilinear", align_corners=self.align) for one in self.psp_modules]
        out = torch.cat([x, *maps], 1)
        return out if self.bottleneck is None else self.bottleneck(out)


class OfficialAPNB(nn.Module):
    """The authors' pyramid block of one stage: the shared layer run for queries and again for keys, values convolved and then pooled."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c, d, dv, out = ours.channels, ours.hidden_channels, ours.value_channels, ours.out_channels
        self.d, self.sizes = d, ours.pool_sizes
        stage = nn.Module()
        stage.f_key = nn.Sequential(nn.Conv2d(c, d, 1), nn.Sequential(nn.BatchNorm2d(d), nn.ReLU(inplace=True)))
        stage.f_query, stage.f_value, stage.W = stage.f_key, nn.Conv2d(c, dv, 1), nn.Conv2d(dv, out, 1)
        self.stages = nn.ModuleList([stage])
        last = nn.Sequential(nn.BatchNorm2d(out), nn.ReLU(inplace=True))
        self.conv_bn_dropout = nn.Sequential(nn.Conv2d(out + c, out, 1), last, nn.Dropout2d(ours.dropout))
        self.load_state_dict(to_official(ours))

    def pooled(self, x: Tensor) -> Tensor:
        return torch.cat([F.adaptive_avg_pool2d(x, n).flatten(2) for n in self.sizes], 2)

    def forward(self, x: Tensor) -> Tensor:
        (stage,) = self.stages
        value = self.pooled(stage.f_value(x)).transpose(1, 2)
        query, key = stage.f_query(x).flatten(2).transpose(1, 2), self.pooled(stage.f_key(x))
        weights = (torch.matmul(query, key) * self.d**-0.5).softmax(-1)
        context = torch.matmul(weights, value).transpose(1, 2).contiguous().view(x.shape[0], -1, *x.shape[2:])
        return self.conv_bn_dropout(torch.cat([stage.W(context), x], 1))


class OfficialACM(nn.Module):
    """The authors' module of one scale."""

    def __init__(self, c: int, h: int, s: int, fusion: bool) -> None:
        super().__init__()
        self.s = s
        self.pooled_redu_conv, self.input_redu_conv, self.global_info = _conv_bn_relu(c, h), _conv_bn_relu(c, h), _conv_bn_relu(h, h)
        self.gla, self.residual_conv = nn.Conv2d(h, s * s, 1), _conv_bn_relu(h, h)
        self.fusion_conv = _conv_bn_relu(h, h) if fusion else None

    def forward(self, x: Tensor) -> Tensor:
        regions = self.pooled_redu_conv(F.adaptive_avg_pool2d(x, self.s)).flatten(2).transpose(1, 2).contiguous()
        u = self.input_redu_conv(x)
        g = F.interpolate(self.global_info(F.adaptive_avg_pool2d(u, 1)), u.shape[2:], mode="bilinear", align_corners=False)
        gates = torch.sigmoid(self.gla(u + g).permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.s**2))
        z = torch.matmul(gates, regions).permute(0, 2, 1).contiguous().view_as(u)
        r = F.relu(self.residual_conv(z) + u)
        return r if self.fusion_conv is None else self.fusion_conv(r)


class OfficialAPC(nn.Module):
    """The authors' pyramid: every scale, concatenated with the map, a 3x3 convolution."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c, h = ours.channels, ours.hidden_channels
        self.acm_modules = nn.ModuleList(OfficialACM(c, h, s, ours.fusion) for s in ours.sizes)
        self.bottleneck = _conv_bn_relu(c + len(ours.sizes) * h, h, 3)
        self.load_state_dict(to_official(ours))

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(torch.cat([x, *(one(x) for one in self.acm_modules)], 1))


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "spp": {"levels": CaffeLevels},
    "ppm": {"mmsegmentation": PublicPPM},
    "asymmetric_non_local": {"authors": OfficialAPNB},
    "adaptive_context": {"authors": OfficialAPC},
}
