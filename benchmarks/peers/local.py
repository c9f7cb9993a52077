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


class UnfoldSasa(nn.Module):
    """The paper's layer as the public codes go about it (convolve a padded map, unfold keys and values), with the sum over each head they lack."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.k, self.heads = ours.kernel_size, ours.num_heads
        groups = ours.weight_query.groups
        self.weight_query, self.weight_key, self.weight_value = (
            nn.Conv2d(ours.channels, ours.out_channels, 1, groups=groups, bias=False) for _ in range(3)
        )
        self.relative_x, self.relative_y = (nn.Parameter(torch.empty_like(t)) for t in (ours.relative_x, ours.relative_y))
        self.load_state_dict(to_official(ours, "MerHS/SASA-pytorch"))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        r, half = self.k // 2, self.relative_x.shape[0]
        padded = F.pad(x, [r] * 4)
        q = self.weight_query(padded)[:, :, r : r + height, r : r + width].unflatten(1, (self.heads, -1))
        maps = self.weight_key(padded), self.weight_value(padded)
        k, v = (m.unfold(2, self.k, 1).unfold(3, self.k, 1).unflatten(1, (self.heads, -1)) for m in maps)
        columns = torch.einsum("bnchw,ck->bnhwk", q[:, :, :half], self.relative_x)
        rows = torch.einsum("bnchw,ck->bnhwk", q[:, :, half:], self.relative_y)
        logits = (q[..., None, None] * k).sum(2) + columns[..., None, :] + rows[..., None]
        weights = logits.flatten(-2).softmax(-1).view_as(logits)
        return torch.einsum("bnhwij,bnchwij->bnchw", weights, v).reshape(batch, -1, height, width)


class UnfoldLocalRelation(nn.Module):
    """Community layers: keys and values unfolded, one weight map for the channels of a group; softmax and borders as the operator has them."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.k, self.groups = ours.kernel_size, ours.groups
        self.kmap, self.qmap = (nn.ModuleDict({"l": nn.Conv2d(ours.channels, self.groups, 1)}) for _ in range(2))
        self.gp = nn.Module()
        self.gp.register_buffer("position", torch.empty(1, 2, self.k, self.k))
        self.gp.l1, self.gp.l2 = nn.Conv2d(2, ours.geometry_hidden, 1), nn.Conv2d(ours.geometry_hidden, self.groups, 1)
        self.final1x1 = nn.Conv2d(ours.channels, ours.channels, 1)
        self.load_state_dict(to_official(ours, "community"))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, _, _ = x.shape
        unfold: dict[str, int] = {"kernel_size": self.k, "padding": self.k // 2}
        q = self.qmap["l"](x).view(batch, self.groups, 1, -1)
        k = F.unfold(self.kmap["l"](x), **unfold).view(batch, self.groups, self.k**2, -1)
        prior = self.gp.l2(self.gp.l1(self.gp.position).relu()).view(1, self.groups, -1, 1)  # type: ignore[operator]
        outside = F.unfold(torch.ones_like(x[:1, :1]), **unfold) == 0
        weights = (q * k + prior).masked_fill(outside[:, None], -100.0).softmax(2)
        values = F.unfold(x, **unfold).view(batch, self.groups, channels // self.groups, self.k**2, -1)
        return self.final1x1((weights[:, :, None] * values).sum(3).view(x.shape))


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "halo": {"timm": TimmHalo},
    "carafe": {"unfold": UnfoldCarafe},
    "sasa": {"unfold": UnfoldSasa},
    "local_relation": {"unfold": UnfoldLocalRelation},
}
