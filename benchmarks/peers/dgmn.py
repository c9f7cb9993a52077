"""dgmn without the authors' CUDA operators: samples by grid_sample, all kept, shared by the filters and the message.

No public form runs on a CPU; this is what one writes with torch alone. It samples once where the authors' code samples twice.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.official import to_official


class GridSampleGraph(nn.Module):
    """ReDynamicWeightsCat33 with affinities, four branches."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.groups, self.dilations, channels, filters = ours.groups, ours.dilations, ours.channels, 9 * ours.groups + 9
        for letter, rho in zip("abcd", self.dilations, strict=True):
            setattr(self, f"off_conv{letter}", nn.Conv2d(channels, 18, 3, padding=rho, dilation=rho, bias=False))
            setattr(self, f"kernel_conv{letter}", nn.Conv2d(channels, filters, 3, bias=False))
        for i in range(4):
            setattr(self, f"gamma{i + 1}", nn.Parameter(torch.ones(1)))
        self.load_state_dict(to_official(ours))

    def _sample(self, x: Tensor, offset: Tensor, rho: int) -> Tensor:
        """(B, C, 9, H W)."""
        batch, channels, height, width = x.shape
        tap = torch.arange(-1, 2) * rho
        row = torch.arange(height)[:, None] + tap.repeat_interleave(3)[:, None, None] + offset[:, 0::2]
        column = torch.arange(width) + tap.repeat(3)[:, None, None] + offset[:, 1::2]
        grid = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], -1)
        found = F.grid_sample(x, grid.view(batch, 9 * height, width, 2), padding_mode="zeros", align_corners=False)
        return found.view(batch, channels, 9, height * width)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        out = x
        for i, (letter, rho) in enumerate(zip("abcd", self.dilations, strict=True)):
            u = self._sample(x, getattr(self, f"off_conv{letter}")(x), rho)
            f = getattr(self, f"kernel_conv{letter}").weight.flatten(1) @ u.view(batch, channels * 9, -1)
            filters = f[:, : 9 * self.groups]
            affinity = (filters if i == 3 else f)[:, -9:].softmax(1)
            weights = filters.unflatten(1, (self.groups, 9)) * affinity[:, None]
            u = u.view(batch, self.groups, -1, 9, height * width).permute(0, 1, 4, 2, 3).contiguous().view(-1, channels // self.groups, 9)
            message = torch.bmm(u, weights.transpose(2, 3).reshape(-1, 9, 1))
            message = message.view(batch, self.groups, height * width, -1).permute(0, 1, 3, 2).reshape(x.shape)
            out = out + getattr(self, f"gamma{i + 1}") * message
        return out


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {"dgmn": {"grid_sample": GridSampleGraph}}
