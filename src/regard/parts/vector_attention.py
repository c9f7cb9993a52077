"""What pairwise and patchwise self-attention share: their sizes checked, their three features of a map, their authors' names."""

import torch
from torch import Tensor, nn

from ..errors import require
from ..official import pointwise, rename
from ..ops.local_window import Window
from ..validate import check_divisible, check_option
from .spatial import project_columns

SAN_RULES = (
    *(pointwise(f"{theirs}.*", f"{ours}.*") for theirs, ours in (("conv1", "phi"), ("conv2", "psi"), ("conv3", "beta"))),
    rename("conv_w.0.*", "norm1.*"),
    pointwise("conv_w.2.*", "fc1.*"),
    rename("conv_w.3.*", "norm2.*"),
    pointwise("conv_w.5.*", "fc2.*"),
)


def checked_sizes(
    channels: int, out_channels: int | None, rel_channels: int | None, share: int, kernel_size: int, stride: int, dilation: int, padding_mode: str
) -> tuple[int, int, Window]:
    """The widths of the output and of the features related, and the window."""
    out_channels = channels // 4 if out_channels is None else out_channels
    rel_channels = max(channels // 16, 1) if rel_channels is None else rel_channels
    smallest = min(channels, out_channels, rel_channels)
    require(smallest > 0, "channels={}, out_channels={} and rel_channels={} must be at least 1", channels, out_channels, rel_channels)
    check_divisible(out_channels, share, "out_channels", "share")
    check_option(padding_mode, ("reflect", "zero", "mask"), "padding_mode")
    require(kernel_size > 0 and kernel_size % 2 == 1, "kernel_size={} must be odd", kernel_size)
    return out_channels, rel_channels, Window(kernel_size, stride, dilation, padding_mode)  # type: ignore[arg-type]


def features(x: Tensor, *layers: nn.Linear) -> list[Tensor]:
    """1x1 convolutions of a map (B, C, H, W), in one product."""
    joined = project_columns(x.flatten(2), torch.cat([f.weight for f in layers]), torch.cat([f.bias for f in layers]))
    return list(joined.unflatten(2, x.shape[2:]).split([f.out_features for f in layers], 1))
