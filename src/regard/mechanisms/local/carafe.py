r"""CARAFE: upsampling in which every output pixel is a convex combination, predicted from content, of a k x k neighbourhood of the input.

    y[c, Y, X] = sum_j w[g(c), j, Y, X] x[c, (Y // s, X // s) + j],   w = softmax_j(shuffle(encoder(compressor(x))))

Wang, Chen, Xu, Liu, Loy, Lin, "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019. arXiv:1905.02188.
Following the authors' code, pixels outside the map are zero and the weights are not normalised again there: borders are darkened.
Not in the paper: norm="batch", the XiaLiPKU form (batch norms, a ReLU). B batch, C channels, H, W the input's sides, s scale_factor, k up_kernel.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, rename
from ...ops.local_window import Window, carafe, window_apply
from ...parts.norm import check_batch_statistics
from ...validate import check_divisible, check_map, check_option


class ContentAwareReassembly(Mechanism):
    """Args:
    channels: of the input and the output.
    scale_factor: s, a whole number; 1 gives a smoothing that depends on the content.
    up_kernel, up_group: side k of the neighbourhood (odd); groups of channels with weights of their own.
    encoder_kernel, encoder_dilation, compressed_channels: of the convolution that predicts the weights.
    norm: None, or "batch" for norms after both convolutions, in place of their biases, and a ReLU after the first.
    """

    card: ClassVar = Card(
        id="carafe",
        layout="map",
        paper=Paper(
            title="CARAFE: Content-Aware ReAssembly of FEatures",
            authors="Jiaqi Wang, Kai Chen, Rui Xu, Ziwei Liu, Chen Change Loy, Dahua Lin",
            venue="ICCV",
            year=2019,
            arxiv="1905.02188",
        ),
        source="open-mmlab/mmcv@a8073c7 mmcv/ops/carafe.py (Apache-2.0), XiaLiPKU/CARAFE@bb0d819",
        summary="Upsamples with a predicted kernel for every output pixel.",
        when="In place of nearest, bilinear or transposed-convolution upsampling in pyramids, segmentation heads and decoders.",
        flops="2*B*N*compressed_channels*(channels + encoder_kernel**2*up_group*up_kernel**2*scale_factor**2)"
        " + 2*B*N*scale_factor**2*up_kernel**2*channels",
        grows={"N": 1.0},
        can=frozenset({"weights", "linear", "upsamples"}),
        checked_against="authors",
        uncertain="The authors' CUDA operator was replaced by a literal loop of its kernel.",
        example={"channels": 8, "compressed_channels": 4, "up_kernel": 3},
        variants=(
            {"channels": 8, "scale_factor": 3, "up_group": 2, "encoder_dilation": 2, "compressed_channels": 4, "norm": "batch"},
            {"channels": 32, "compressed_channels": 4},
            {"channels": 8, "scale_factor": 1, "encoder_kernel": 1, "compressed_channels": 4},
        ),
        place="E",
    )
    official: ClassVar = (
        KeyMap("mmcv", (rename("channel_compressor.*", "compressor.*"), rename("content_encoder.*", "encoder.*"))),
        KeyMap(
            "XiaLiPKU/CARAFE",
            (
                rename("comp.conv.*", "compressor.*"),
                rename("comp.bn.*", "compressor_norm.*"),
                rename("enc.conv.*", "encoder.*"),
                rename("enc.bn.*", "encoder_norm.*"),
            ),
        ),
    )
    functions: ClassVar = {"carafe": carafe}

    def __init__(
        self,
        channels: int,
        *,
        scale_factor: int = 2,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
        norm: Literal["batch"] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        whole = isinstance(scale_factor, int) and scale_factor >= 1
        require(whole, "scale_factor={} must be a whole number of at least 1; resize the result for others", scale_factor)
        require(up_kernel > 0 and up_kernel % 2 == 1, "up_kernel={} must be odd", up_kernel)
        require(encoder_kernel > 0 and encoder_kernel % 2 == 1, "encoder_kernel={} must be odd", encoder_kernel)
        require(encoder_dilation > 0, "encoder_dilation={} must be at least 1", encoder_dilation)
        require(compressed_channels > 0, "compressed_channels={} must be at least 1", compressed_channels)
        check_divisible(channels, up_group, "channels", "up_group")
        check_option(norm, (None, "batch"), "norm")
        self.channels, self.scale_factor, self.up_kernel, self.up_group = channels, scale_factor, up_kernel, up_group
        self.encoder_kernel, self.encoder_dilation = encoder_kernel, encoder_dilation
        self.compressed_channels, self.norm = compressed_channels, norm
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        width, pad = up_group * up_kernel**2 * scale_factor**2, (encoder_kernel - 1) * encoder_dilation // 2
        self.compressor = nn.Conv2d(channels, compressed_channels, 1, bias=norm is None, **dd)
        self.compressor_norm = nn.BatchNorm2d(compressed_channels, **dd) if norm else None
        self.encoder = nn.Conv2d(compressed_channels, width, encoder_kernel, padding=pad, dilation=encoder_dilation, bias=norm is None, **dd)
        self.encoder_norm = nn.BatchNorm2d(width, **dd) if norm else None
        if norm is None:
            nn.init.xavier_uniform_(self.compressor.weight)
            nn.init.normal_(self.encoder.weight, std=0.001)
            for conv in (self.compressor, self.encoder):
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)

    def key_maps(self) -> tuple[KeyMap, ...]:
        mmcv, reimplementation = self.official
        return (mmcv,) if self.norm is None else (reimplementation,)

    def forward(
        self, x: Float[Tensor, "b channels h w"], *, return_weights: bool = False
    ) -> Float[Tensor, "b channels s_h s_w"] | tuple[Tensor, Tensor]:
        """Returns (B, C, s H, s W), or that and the weights (B, up_group, k ** 2, s H, s W)."""
        check_map(x, self.channels)
        k, s, g = self.up_kernel, self.scale_factor, self.up_group
        if self.compressor_norm is not None:
            check_batch_statistics(self.compressor_norm, x.shape[0] * x.shape[2] * x.shape[3], "a single pixel")
        u = self.compressor(x)
        u = u if self.compressor_norm is None else self.compressor_norm(u).relu()
        u = self.encoder(u)
        u = u if self.encoder_norm is None else self.encoder_norm(u)
        # Before any shuffle the s x s output pixels over an input pixel are s^2 channels: softmax and sums stay on the input's grid.
        u = u.unflatten(1, (g, k * k, s * s))
        weights = u.softmax(2, torch.promote_types(u.dtype, torch.float32)).to(x.dtype)
        out = window_apply(weights, x, Window(k), scale_factor=s)
        return (out, F.pixel_shuffle(weights.flatten(1, 3), s).unflatten(1, (g, k * k))) if return_weights else out
