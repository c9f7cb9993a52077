r"""Global reasoning: project the map to a few nodes, let the nodes reason by a graph convolution, project back.

    V = (Ws X + bs) P',  P = Wp X + bp;   H = V A' + a + V over the nodes;   out = X + BN(We Wg relu(H) P)

Chen, Rohrbach, Yan, Yan, Feng, Kalantidis, "Graph-Based Global Reasoning Networks", CVPR 2019. arXiv:1811.12814. The paper has the Laplacian
I - A where the authors' code, which we follow, has I + A, a bias and a ReLU between the steps. X (C, N): C channels, N positions,
s state_channels, n hidden_channels = nodes, B batch.
"""

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, pointwise, rename
from ...ops._precision import at_least_float32, full_precision
from ...parts.gates import INITS
from ...parts.linear import Linear
from ...parts.norm import Norm, check_batch_statistics, make_norm, zero_init_
from ...parts.spatial import project_columns, project_distribute, project_gather
from ...validate import check_map, check_option

_PRODUCTS = "min(channels*hidden_channels*(state_channels + N), state_channels*N*(channels + hidden_channels))"


class GlobalReasoning(Mechanism):
    """Args:
    channels: of the input and the output.
    hidden_channels: nodes; channels // 4 but at least 1 if None.
    state_channels: of a node; twice hidden_channels if None.
    dims: number of spatial axes, 1 to 3.
    normalize: divide the sums over positions by N; right wherever the size of the maps varies.
    norm: "batch", None, or a callable channels -> module, on the output of the last projection.
    zero_init: start as the identity, as init="identity" does whatever `zero_init` says.
    """

    card: ClassVar = Card(
        id="glore",
        layout="map",
        paper=Paper(
            title="Graph-Based Global Reasoning Networks",
            authors="Yunpeng Chen, Marcus Rohrbach, Zhicheng Yan, Shuicheng Yan, Jiashi Feng, Yannis Kalantidis",
            venue="CVPR",
            year=2019,
            arxiv="1811.12814",
        ),
        source="facebookresearch/GloRe@9c6a734 (MIT)",
        summary="Projects a map to a few nodes, reasons between them by a graph convolution, and projects back.",
        when="A few units late in image and video networks; with normalize=True on maps of varying size.",
        flops=f"2*B*N*channels*hidden_channels + 4*B*{_PRODUCTS} + 2*B*hidden_channels*state_channels*(hidden_channels + state_channels)",
        grows={"N": 1.0},
        can=frozenset({"weights", "linear", "any_dims", "permutation_equivariant", "identity_start", "batch_statistics"}),
        example={"channels": 16},
        variants=(
            {"channels": 12, "hidden_channels": 4, "state_channels": 3, "normalize": True, "norm": None, "zero_init": False},
            {"channels": 8, "hidden_channels": 5, "state_channels": 2, "normalize": True, "zero_init": False},
            {"channels": 8, "hidden_channels": 4, "dims": 1, "normalize": True, "zero_init": False},
        ),
        place="C",
    )

    def __init__(
        self,
        channels: int,
        *,
        hidden_channels: int | None = None,
        state_channels: int | None = None,
        dims: int = 2,
        normalize: bool = False,
        norm: Norm = "batch",
        zero_init: bool = True,
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(dims, (1, 2, 3), "dims")
        check_option(init, INITS, "init")
        require(channels > 0, "channels={} must be at least 1", channels)
        nodes = max(channels // 4, 1) if hidden_channels is None else hidden_channels
        state = 2 * nodes if state_channels is None else state_channels
        require(min(nodes, state) > 0, "hidden_channels={} and state_channels={} must be at least 1", nodes, state)
        self.channels, self.hidden_channels, self.state_channels, self.dims = channels, nodes, state, dims
        self.normalize, self.zero_init, self.init = normalize, zero_init, init
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.state, self.project = Linear(channels, state, **dd), Linear(channels, nodes, **dd)
        self.adjacency = Linear(nodes, nodes, **dd)
        self.update = Linear(state, state, bias=False, **dd)
        self.extend = Linear(state, channels, bias=False, **dd)
        self.norm = make_norm(norm, channels, dims, eps=1e-4, **dd)
        if zero_init or init == "identity":
            zero_init_(self.extend if norm is None else self.norm)

    def key_maps(self) -> tuple[KeyMap, ...]:
        layers = (("conv_state", "state"), ("conv_proj", "project"), ("conv_extend", "extend"))
        steps = (("gcn.conv1", "adjacency"), ("gcn.conv2", "update"))
        rules = [pointwise(f"{theirs}.*", f"{ours}.*") for theirs, ours in layers]
        rules += [pointwise(f"{theirs}.*", f"{ours}.*", 1) for theirs, ours in steps]
        return (KeyMap("facebookresearch/GloRe", (*rules, rename("blocker.*", "norm.*"))),)

    def forward(
        self, x: Float[Tensor, "b channels *space"], return_weights: bool = False
    ) -> Float[Tensor, "b channels *space"] | tuple[Tensor, Tensor]:
        """Returns the map, or that and P (B, n, *space)."""
        check_map(x, self.channels, self.dims)
        check_batch_statistics(self.norm, x.numel() // self.channels, "a batch of one 1-position map")
        size, wide = x.shape[2:], at_least_float32(x)
        columns = x.flatten(2)
        maps = project_columns(columns, self.project.weight, self.project.bias)
        with full_precision(x):  # sums over positions without a softmax leave the range of half precision
            p, weights = maps.to(wide), [layer.weight.to(wide) for layer in (self.state, self.adjacency, self.update, self.extend)]
            nodes = project_gather(columns.to(wide), p, weights[0]) + self.state.bias.to(wide)[:, None] * p.sum(2)[:, None]
            nodes = nodes / p.shape[2] if self.normalize else nodes
            nodes = F.linear(nodes, weights[1], self.adjacency.bias.to(wide)) + nodes
            y = project_distribute(project_columns(nodes.relu(), weights[2]), p, weights[3])
        y = self.norm(y.to(self.extend.weight.dtype).unflatten(2, size))  # before the norm the sums may leave the range of a half-precision x
        out = x + y.to(x.dtype)
        return (out, maps.unflatten(2, size)) if return_weights else out
