"""Plain networks over maps: a small residual classifier and a small segmentation network. Attention is a constructor argument."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .slot import MapSlot, Slot, build


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """conv-norm-relu-conv-norm, the slot (place A: after the last norm, before the addition), the addition, relu."""

    def __init__(self, inputs: int, channels: int, slot: Slot, stride: int = 1) -> None:
        super().__init__()
        self.enter, self.leave = _conv(inputs, channels, stride), _conv(channels, channels)
        module = build(slot, channels)
        self.slot = MapSlot(module) if module is not None else None
        same = stride == 1 and inputs == channels
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.leave(F.relu(self.enter(x)))
        if self.slot is not None:
            out = self.slot(out)
        return F.relu(out + self.skip(x))


class ResNet(nn.Module):
    """A map -> class: a stem and one residual block per width, halving the map from the second on. (B, inputs, H, W) -> (B, classes).

    Args:
        inputs: channels of the picture.
        num_classes: of the classifier.
        slot: the mechanism of each block.
        widths: channels of the blocks.
    """

    def __init__(self, inputs: int, num_classes: int, slot: Slot, *, widths: tuple[int, ...] = (32, 64)) -> None:
        super().__init__()
        self.stem = _conv(inputs, widths[0])
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.blocks = nn.ModuleList(ResidualBlock(a, b, slot, stride=1 if i == 0 else 2) for i, (a, b) in enumerate(pairs))
        self.classify = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.classify(x.mean((-2, -1)))


class SegmentationNet(nn.Module):
    """A map -> a class per pixel: blocks at half the side, then back up with the stem's details. (B, inputs, H, W) -> (B, classes, H,
    W)."""

    def __init__(self, inputs: int, num_classes: int, slot: Slot, *, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.stem = _conv(inputs, width // 2)
        self.down = _conv(width // 2, width, stride=2)
        self.blocks = nn.ModuleList(ResidualBlock(width, width, slot) for _ in range(depth))
        self.merge = _conv(width + width // 2, width)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.stem(x))
        x = F.relu(self.down(fine))
        for block in self.blocks:
            x = block(x)
        x = F.interpolate(x, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        x = F.relu(self.merge(torch.cat((x, fine), dim=1)))
        return self.classify(x)
