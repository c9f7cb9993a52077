"""Public forms of the channel gates, re-expressed for timing: the same operations in the same order, on the same weights.

Each takes one of our modules and copies its weights through `regard.official.to_official`, so outputs must be equal.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.official import to_official


class TimmSE(nn.Module):
    """timm SEModule: mean with kept axes, two 1x1 convolutions on the (B, C, 1, 1) map."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(ours.channels, ours.hidden_channels, 1), nn.Conv2d(ours.hidden_channels, ours.channels, 1)
        self.load_state_dict(to_official(ours, "timm"))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class TimmECA(nn.Module):
    """timm EcaModule: conv1d over (B, 1, C), gate expanded before the product."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, ours.kernel_size, padding=ours.kernel_size // 2, bias=False)
        self.load_state_dict(to_official(ours))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1)).sigmoid().view(x.shape[0], -1, 1, 1)
        return x * gate.expand_as(x)


class OfficialECA(TimmECA):
    """The authors' eca_layer: adaptive pooling, transposed and back."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(x, 1)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1).sigmoid()
        return x * y.expand_as(x)


class OfficialCBAM(nn.Module):
    """The authors' CBAM: pooling with kernel = map size, the MLP once a pool, max and mean over channels concatenated."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(ours.channels, ours.hidden_channels), nn.Linear(ours.hidden_channels, ours.channels)
        self.conv = nn.Conv2d(2, 1, ours.kernel_size, padding=ours.kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(1, momentum=0.01)
        self.load_state_dict({name.removeprefix("mlp."): value for name, value in ours.state_dict().items()})

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        pooled = [F.avg_pool2d(x, size, stride=size), F.max_pool2d(x, size, stride=size)]
        logits = torch.stack([self.fc2(F.relu(self.fc1(p.flatten(1)))) for p in pooled]).sum(0)
        x = x * logits.sigmoid()[:, :, None, None].expand_as(x)
        planes = torch.cat((x.max(1)[0].unsqueeze(1), x.mean(1).unsqueeze(1)), 1)
        return x * self.norm(self.conv(planes)).sigmoid()


class TimmCBAM(nn.Module):
    """timm CbamModule: 1x1 convolutions on pooled maps, planes (mean, max)."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(ours.channels, ours.hidden_channels, 1, bias=ours.bias)
        self.fc2 = nn.Conv2d(ours.hidden_channels, ours.channels, 1, bias=ours.bias)
        self.conv = nn.Conv2d(2, 1, ours.kernel_size, padding=ours.kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)
        state = {name.split(".", 1)[1]: value for name, value in to_official(ours, "timm").items()}
        self.load_state_dict({name.replace("conv.conv", "conv").replace("conv.bn", "bn"): value for name, value in state.items()})

    def _mlp(self, pooled: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(pooled)))

    def forward(self, x: Tensor) -> Tensor:
        x = x * (self._mlp(x.mean((2, 3), keepdim=True)) + self._mlp(x.amax((2, 3), keepdim=True))).sigmoid()
        planes = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)
        return x * self.bn(self.conv(planes)).sigmoid()


class MmcvGC(nn.Module):
    """The authors' and mmcv's ContextBlock with fusion ("add",): a 1x1 convolution to one plane, matmul with a (HW, 1) operand."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c, h = ours.channels, ours.hidden_channels
        self.conv_mask = nn.Conv2d(c, 1, 1)
        self.channel_add_conv = nn.Sequential(nn.Conv2d(c, h, 1), nn.LayerNorm([h, 1, 1]), nn.ReLU(inplace=True), nn.Conv2d(h, c, 1))
        self.load_state_dict(to_official(ours, "xvjiarui/GCNet"))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        attention = self.conv_mask(x).view(b, 1, h * w).softmax(2).unsqueeze(-1)
        context = torch.matmul(x.view(b, c, h * w).unsqueeze(1), attention).view(b, c, 1, 1)
        return x + self.channel_add_conv(context)


class TimmGC(nn.Module):
    """timm GlobalContext with fuse_add alone: the same with a LayerNorm over the channel axis of a map."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        c, h = ours.channels, ours.hidden_channels
        self.conv_attn = nn.Conv2d(c, 1, 1)
        self.mlp_add = nn.ModuleDict({"fc1": nn.Conv2d(c, h, 1), "norm": nn.LayerNorm(h), "fc2": nn.Conv2d(h, c, 1)})
        self.load_state_dict(to_official(ours, "timm"))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        attention = self.conv_attn(x).reshape(b, 1, h * w).softmax(-1).unsqueeze(3)
        context = (x.reshape(b, c, h * w).unsqueeze(1) @ attention).view(b, c, 1, 1)
        hidden = self.mlp_add["norm"](self.mlp_add["fc1"](context).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.mlp_add["fc2"](F.relu(hidden))


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "se": {"timm": TimmSE},
    "eca": {"timm": TimmECA, "authors": OfficialECA},
    "cbam": {"timm": TimmCBAM, "authors": OfficialCBAM},
    "gc": {"timm": TimmGC, "mmcv": MmcvGC},
}
