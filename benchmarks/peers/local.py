"""Public forms of the neighbourhood mechanisms, re-expressed for timing: the same operations in the same order, on the same weights.

Each takes one of our modules and copies its weights through `regard.official.to_official`, so outputs must be equal.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.official import to_official


class TimmHalo(nn.Module):
    """timm HaloAttn: kv projection, padded map cut by `unfold` views, weights stored, relative logits by pad and reshape."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.heads, self.d, self.dv, self.block, self.halo = ours.num_heads, ours.qk_head_dim, ours.v_head_dim, ours.block_size, ours.halo_size
        self.win, self.scale = ours.window, ours.scale
        self.q = nn.Conv2d(ours.channels, self.heads * self.d, 1, bias=False)
        self.kv = nn.Conv2d(ours.channels, self.heads * (self.d + self.dv), 1, bias=False)
        self.pos_embed = nn.ParameterDict({name: torch.empty(2 * self.win - 1, self.d) for name in ("height_rel", "width_rel")})
        self.load_state_dict(to_official(ours, "timm"))

    def _relative(self, q: Tensor, table: Tensor, order: tuple[int, ...]) -> Tensor:
        n, high, wide, _ = q.shape
        size = table.shape[0]
        x = (q @ table.transpose(-1, -2)).reshape(-1, wide, size)
        x = F.pad(F.pad(x, [0, 1]).flatten(1), [0, size - wide]).reshape(-1, wide + 1, size)[:, :wide, self.win - 1 :]
        return x.reshape(n, high, 1, wide, self.win).expand(-1, -1, self.win, -1, -1).permute(order)

    def _positions(self, q: Tensor) -> Tensor:
        batch, blocks = q.shape[:2]
        q = q.reshape(-1, self.block, self.block, self.d)
        wide = self._relative(q, self.pos_embed["width_rel"], (0, 1, 3, 2, 4))
        high = self._relative(q.transpose(1, 2), self.pos_embed["height_rel"], (0, 3, 1, 4, 2))
        return (high + wide).reshape(batch, blocks, self.block**2, self.win**2)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        b, rows, columns = self.block, height // self.block, width // self.block
        q = self.q(x).reshape(-1, self.d, rows, b, columns, b).permute(0, 1, 3, 5, 2, 4)
        q = q.reshape(batch * self.heads, self.d, -1, rows * columns).transpose(1, 3)
        kv = F.pad(self.kv(x), [self.halo] * 4)
        kv = kv.unfold(2, self.win, b).unfold(3, self.win, b).reshape(batch * self.heads, self.d + self.dv, rows * columns, -1).permute(0, 2, 3, 1)
        k, v = kv.split([self.d, self.dv], -1)
        weights = ((q @ k.transpose(-1, -2)) * self.scale + self._positions(q)).softmax(-1)
        out = (weights @ v).transpose(1, 3).reshape(-1, b, b, rows, columns)
        return out.permute(0, 3, 1, 4, 2).contiguous().view(batch, self.heads * self.dv, height, width)


class UnfoldCarafe(nn.Module):
    """XiaLiPKU CARAFE with mmcv's layers: nearest upsampling, then an unfold of dilation s, then one einsum over the k^2 copies."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.k, self.s = ours.up_kernel, ours.scale_factor
        self.channel_compressor = nn.Conv2d(ours.channels, ours.compressed_channels, 1)
        self.content_encoder = nn.Conv2d(ours.compressed_channels, (self.k * self.s) ** 2, ours.encoder_kernel, padding=ours.encoder_kernel // 2)
        self.load_state_dict(to_official(ours, "mmcv"))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        weights = F.pixel_shuffle(self.content_encoder(self.channel_compressor(x)), self.s).softmax(1)
        x = F.interpolate(x, scale_factor=self.s, mode="nearest")
        x = F.unfold(x, self.k, dilation=self.s, padding=self.k // 2 * self.s)
        return torch.einsum("bkhw,bckhw->bchw", weights, x.view(batch, channels, -1, height * self.s, width * self.s))


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {"halo": {"timm": TimmHalo}, "carafe": {"unfold": UnfoldCarafe}}
