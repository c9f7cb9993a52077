r"""Local relation layer: a pixel gathers its neighbours by how well scalars of the two compose, and by a learned prior on their offset.

    A_g(p, p') = softmax_p'(scale phi(q_g(p), k_g(p')) + f_g(p' - p)),   y[c, p] = sum_p' A_{c // m}(p, p') x[c, p'],   then a 1x1 convolution
    phi = q . k ("product"), -|q - k|^2 ("squared"), -|q - k| ("absolute")

Hu, Zhang, Xie, Lin, "Local Relation Networks for Image Recognition", ICCV 2019. arXiv:1904.11491.
Following the authors' operator, m contiguous channels share a weight and pixels outside the map are left out. Not in the paper: the width of the
prior's hidden layer (max(G // 2, 1), as community code has it) and geometry="table" (the operator's).
B batch, C channels, m share, G = C / m groups, H, W the map's sides, k kernel_size, e key_dim.
"""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, rename
from ...ops.local_window import Window, window_apply, window_relate
from ...validate import check_divisible, check_map, check_option


class LocalRelation(Mechanism):
    """Args:
    channels, share: C; channels that share a weight, m.
    kernel_size, stride, dilation: of the window; the side is odd.
    key_dim: entries of a query and a key of each group.
    similarity, scale: phi, and what multiplies it.
    geometry, geometry_hidden: the prior, from an MLP on the offset ("mlp") of that width, a free table ("table"), or none ("none").
    """

    card: ClassVar = Card(
        id="local_relation",
        layout="map",
        paper=Paper(
            title="Local Relation Networks for Image Recognition",
            authors="Han Hu, Zheng Zhang, Zhenda Xie, Stephen Lin",
            venue="ICCV",
            year=2019,
            arxiv="1904.11491",
        ),
        source="microsoft/Swin-Transformer@be50b6c (branch LR-Net, MIT): the operator",
        summary="Averages neighbours by the similarity of scalars and a prior on their offset, with one set of weights for several channels.",
        when="In place of the 3x3 convolution of a bottleneck, with a 7x7 window.",
        flops="2*B*ceil(H/stride)*ceil(W/stride)*(channels*groups*key_dim + kernel_size**2*(groups*key_dim + channels) + channels**2)"
        " + 2*B*H*W*channels*groups*key_dim + (2*kernel_size**2*geometry_hidden*(2 + groups) if geometry == 'mlp' else 0)",
        grows={"N": 1.0},
        can=frozenset({"weights", "linear"}),
        checked_against="equations",
        uncertain="The authors released the CUDA operator, no layer; the width of the prior's hidden layer is not in the paper.",
        example={"channels": 16, "kernel_size": 3, "share": 4},
        variants=(
            {"channels": 8, "kernel_size": 5, "share": 2, "key_dim": 3, "similarity": "squared", "geometry": "table", "dilation": 2},
            {"channels": 8, "kernel_size": 3, "share": 8, "similarity": "absolute", "geometry": "none", "scale": 0.5},
        ),
        place="B",
    )
    official: ClassVar = (
        KeyMap(
            "community",
            (rename("kmap.l.*", "key.*"), rename("qmap.l.*", "query.*"), rename("gp.*", "geometry_*"), rename("final1x1.*", "out.*")),
        ),
    )

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        share: int = 8,
        key_dim: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        similarity: Literal["product", "squared", "absolute"] = "product",
        geometry: Literal["mlp", "table", "none"] = "mlp",
        geometry_hidden: int | None = None,
        scale: float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_divisible(channels, share, "channels", "share")
        require(channels > 0 and key_dim > 0, "channels={} and key_dim={} must be at least 1", channels, key_dim)
        require(kernel_size > 0 and kernel_size % 2 == 1, "kernel_size={} must be odd", kernel_size)
        require(min(stride, dilation) > 0, "stride={} and dilation={} must be at least 1", stride, dilation)
        check_option(similarity, ("product", "squared", "absolute"), "similarity")
        check_option(geometry, ("mlp", "table", "none"), "geometry")
        require(geometry_hidden is None or geometry_hidden > 0, "geometry_hidden={} must be None or at least 1", geometry_hidden)
        self.channels, self.kernel_size, self.share, self.key_dim = channels, kernel_size, share, key_dim
        self.stride, self.dilation, self.similarity, self.geometry, self.scale = stride, dilation, similarity, geometry, scale
        self.groups = groups = channels // share
        self.geometry_hidden = max(groups // 2, 1) if geometry_hidden is None else geometry_hidden
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = nn.Conv2d(channels, groups * key_dim, 1, **dd)
        self.key = nn.Conv2d(channels, groups * key_dim, 1, **dd)
        if geometry == "mlp":
            radius = kernel_size // 2
            offset = torch.arange(-radius, radius + 1, **dd).to(dtype or torch.get_default_dtype()) / max(radius, 1)
            rows, columns = torch.meshgrid(offset, offset, indexing="ij")
            self.register_buffer("geometry_position", torch.stack([columns, rows])[None])
            self.geometry_l1 = nn.Conv2d(2, self.geometry_hidden, 1, **dd)
            self.geometry_l2 = nn.Conv2d(self.geometry_hidden, groups, 1, **dd)
        elif geometry == "table":
            self.geometry_table = nn.Parameter(torch.zeros(groups, kernel_size, kernel_size, **dd))
        self.out = nn.Conv2d(channels, channels, 1, **dd)

    def forward(
        self, x: Float[Tensor, "b channels h w"], *, return_weights: bool = False
    ) -> Float[Tensor, "b channels h_out w_out"] | tuple[Tensor, Tensor]:
        """Returns (B, C, ceil(H / stride), ceil(W / stride)), or that and the weights (B, G, k ** 2, H', W')."""
        check_map(x, self.channels)
        window = Window(self.kernel_size, self.stride, self.dilation, "mask")
        q = self.query(x[..., :: self.stride, :: self.stride]).unflatten(1, (self.groups, -1))
        k = self.key(x).unflatten(1, (self.groups, -1))
        logits = window_relate(q, k, window, self.similarity, scale=self.scale)
        prior = self.prior()
        weights = (logits if prior is None else logits + prior[..., None, None]).softmax(2).to(x.dtype)
        out = self.out(window_apply(weights, x, window))
        return (out, weights) if return_weights else out

    def prior(self) -> Tensor | None:
        """f, (G, k ** 2): the same for every pixel and every image."""
        if self.geometry == "none":
            return None
        if self.geometry == "table":
            return self.geometry_table.flatten(1)
        return self.geometry_l2(self.geometry_l1(self.geometry_position).relu())[0].flatten(1)
