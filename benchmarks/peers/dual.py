"""Public forms of DANet's blocks and head and of SAGAN's block, re-expressed for timing: the same operations in the same order.

Each takes one of our modules and copies its weights through `regard.official.to_official`, so outputs must be equal.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.official import to_official


class PAM(nn.Module):
    """The authors' position module: three 1x1 convolutions, the N x N product, softmax, product with the values, gain and addition."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.query_conv, self.key_conv = nn.Conv2d(channels, hidden, 1), nn.Conv2d(channels, hidden, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        query = self.query_conv(x).view(b, -1, w * h).permute(0, 2, 1)
        weights = torch.softmax(torch.bmm(query, self.key_conv(x).view(b, -1, w * h)), -1)
        out = torch.bmm(self.value_conv(x).view(b, -1, w * h), weights.permute(0, 2, 1))
        return self.gamma * out.view(b, c, h, w) + x


class CAM(nn.Module):
    """The authors' channel module: Gram matrix, subtraction from its rows' maxima written out, softmax, product, gain and addition."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        energy = torch.bmm(x.view(b, c, -1), x.view(b, c, -1).permute(0, 2, 1))
        weights = torch.softmax(torch.max(energy, -1, keepdim=True)[0].expand_as(energy) - energy, -1)
        return self.gamma * torch.bmm(weights, x.view(b, c, -1)).view(b, c, h, w) + x


class DANetHead(nn.Module):
    """The authors' head; all classifiers run whether their output is asked for or not."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c, h, classes = ours.channels, ours.hidden_channels, ours.out_channels

        def layer(width: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(width, h, 3, padding=1, bias=False), nn.BatchNorm2d(h), nn.ReLU())

        self.conv5a, self.conv5c, self.conv51, self.conv52 = layer(c), layer(c), layer(h), layer(h)
        self.sa, self.sc = PAM(h, ours.query_channels), CAM()
        self.conv6, self.conv7, self.conv8 = (nn.Sequential(nn.Dropout2d(ours.dropout), nn.Conv2d(h, classes, 1)) for _ in range(3))
        self.load_state_dict(to_official(ours))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        position, channel = self.conv51(self.sa(self.conv5a(x))), self.conv52(self.sc(self.conv5c(x)))
        return self.conv8(position + channel), self.conv6(position), self.conv7(channel)


class BigGANAttention(nn.Module):
    """BigGAN's block without spectral norm: four 1x1 convolutions, max pooling, the weights kept, gain and addition."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c, d, v = ours.channels, ours.hidden_channels, ours.value_channels
        self.theta, self.phi, self.g, self.o = (nn.Conv2d(*widths, 1, bias=False) for widths in ((c, d), (c, d), (c, v), (v, c)))
        self.gamma = nn.Parameter(torch.zeros(()))
        self.load_state_dict(to_official(ours, "BigGAN"))

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = self.theta(x).flatten(2), F.max_pool2d(self.phi(x), 2).flatten(2), F.max_pool2d(self.g(x), 2).flatten(2)
        weights = F.softmax(torch.bmm(theta.transpose(1, 2), phi), -1)
        return self.gamma * self.o(torch.bmm(g, weights.transpose(1, 2)).view(x.shape[0], -1, *x.shape[2:])) + x


def _position(ours: nn.Module) -> nn.Module:
    peer = PAM(ours.channels, ours.hidden_channels)
    peer.load_state_dict(to_official(ours))
    return peer


def _channel(ours: nn.Module) -> nn.Module:
    peer = CAM()
    peer.load_state_dict(to_official(ours))
    return peer


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "position": {"authors": _position},
    "channel_affinity": {"authors": _channel},
    "dual": {"authors": DANetHead},
    "sagan": {"BigGAN": BigGANAttention},
}
