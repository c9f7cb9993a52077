r"""Asymmetric non-local block: every position attends to the means of a few regions instead of to all positions.

    q = relu(BN(W_q x)),   K = pool(relu(BN(W_k y))),   V = pool(W_v y),   A = softmax(q^T K / sqrt(d)),   c = W A V
    out = dropout(relu(BN(F [c ; x])))

Zhu, Xu, Bai, Huang, Bai, "Asymmetric Non-local Neural Networks for Semantic Segmentation", ICCV 2019. arXiv:1908.07678.
Pyramid block (low_channels=None): y = x, and queries and keys are one layer; the authors run it twice a step, which moves its running statistics
twice: we run it once with BatchNorm momentum 0.19 = 1 - 0.9^2. Fusion block: y is another map, and no ReLU at the end.
Means, W_v, W and F are linear: x is pooled before W_v, and F W V is formed for the S regions, so neither values nor context exist as maps.
B batch, C channels, N positions, S regions, d hidden_channels, dv value_channels.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule, pointwise, rename
from ...ops.region_pool import pool_regions
from ...parts.conv_norm import ConvNorm
from ...parts.gates import INITS
from ...parts.linear import Linear
from ...parts.norm import Norm, check_batch_statistics, zero_init_
from ...parts.spatial import project_columns
from ...validate import check_map, check_option, whole_numbers


class AsymmetricNonLocal(Mechanism):
    """Args:
    channels, out_channels: of the input and the output; out_channels=None means channels.
    hidden_channels: of queries and keys; channels // 2 if None.
    value_channels: hidden_channels if None.
    low_channels: of the map that is attended to (`context`); None attends to the input itself.
    pool_sizes: bins a side of every level of regions.
    num_stages: how many blocks of queries, keys and values are summed.
    dropout: of whole channels at the end.
    norm: "batch", None, or a callable features -> module.
    zero_init: the projection of the context starts at zero, as init="identity" makes it whatever zero_init says.
    """

    card: ClassVar = Card(
        id="asymmetric_non_local",
        layout="map",
        paper=Paper(
            title="Asymmetric Non-local Neural Networks for Semantic Segmentation",
            authors="Zhen Zhu, Mengde Xu, Song Bai, Tengteng Huang, Xiang Bai",
            venue="ICCV",
            year=2019,
            arxiv="1908.07678",
        ),
        source="MendelXu/ANN@f4eabeb (Apache-2.0)",
        summary="Every position attends to the means of a pyramid of regions, of its own map or of another.",
        when="A segmentation head that needs global context at linear cost; with low_channels, to fuse two levels of a backbone.",
        flops="2*B*context_channels*W*(H*sides + regions) + 2*B*N*channels*out_channels + num_stages*(2*B*hidden_channels*W*(H*sides + regions)"
        " + 2*B*N*hidden_channels*(channels + (0 if low_channels is None else low_channels)) + 2*out_channels**2*value_channels"
        " + 2*B*regions*value_channels*(context_channels + out_channels) + 2*B*N*regions*(hidden_channels + out_channels))",
        grows={"N": 1.0},
        can=frozenset({"weights", "row_stochastic", "linear", "batch_statistics"}),
        example={"channels": 16},
        variants=(
            {"channels": 8, "hidden_channels": 6, "value_channels": 5, "pool_sizes": (2, 3), "num_stages": 2, "norm": None},
            {"channels": 8, "low_channels": 6, "out_channels": 10, "pool_sizes": (1, 3)},
        ),
        place="E",
    )

    def __init__(
        self,
        channels: int,
        *,
        hidden_channels: int | None = None,
        value_channels: int | None = None,
        out_channels: int | None = None,
        low_channels: int | None = None,
        pool_sizes: Sequence[int] = (1, 3, 6, 8),
        num_stages: int = 1,
        dropout: float = 0.05,
        norm: Norm = "batch",
        zero_init: bool = True,
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        pool_sizes = whole_numbers(pool_sizes, "pool_sizes")
        d = channels // 2 if hidden_channels is None else hidden_channels
        dv, out = d if value_channels is None else value_channels, channels if out_channels is None else out_channels
        hint = "channels={}, hidden_channels={}, value_channels={}, out_channels={}, num_stages={}: each at least 1"
        require(min(channels, d, dv, out, num_stages) > 0, hint, channels, d, dv, out, num_stages)
        require(low_channels is None or low_channels > 0, "low_channels={} must be at least 1, or None", low_channels)
        require(0 <= dropout < 1, "dropout={} must be at least 0 and below 1", dropout)
        check_option(init, INITS, "init")
        self.channels, self.hidden_channels, self.value_channels, self.out_channels, self.low_channels = channels, d, dv, out, low_channels
        self.pool_sizes, self.num_stages, self.dropout, self.norm, self.zero_init, self.init = pool_sizes, num_stages, dropout, norm, zero_init, init
        self.sides, self.regions = sum(pool_sizes), sum(n * n for n in pool_sizes)
        self.context_channels = channels if low_channels is None else low_channels
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        stages, momentum = range(num_stages), 0.19 if low_channels is None else 0.1
        self.key = nn.ModuleList(ConvNorm(self.context_channels, d, bias=True, norm=norm, momentum=momentum, **dd) for _ in stages)
        self.query = None if low_channels is None else nn.ModuleList(ConvNorm(channels, d, bias=True, norm=norm, **dd) for _ in stages)
        self.value = nn.ModuleList(Linear(self.context_channels, dv, **dd) for _ in stages)
        self.out = nn.ModuleList(Linear(dv, out, **dd) for _ in stages)
        self.fuse = ConvNorm(out + channels, out, bias=True, act=low_channels is None, norm=norm, **dd)
        if zero_init or init == "identity":
            for layer in self.out:
                zero_init_(layer)

    @staticmethod
    def example_inputs(options, *, batch, size, generator) -> dict[str, Tensor]:
        inputs = {"x": torch.randn(batch, options["channels"], *size, generator=generator)}
        if options.get("low_channels"):
            inputs["context"] = torch.randn(batch, options["low_channels"], *size, generator=generator)
        return inputs

    def key_maps(self) -> tuple[KeyMap, ...]:
        rules = []
        for i in range(self.num_stages):
            for theirs, part in (("0", "conv"), ("1.0", "norm")):
                key, query = f"stages.{i}.f_key.{theirs}.*", f"stages.{i}.f_query.{theirs}.*"
                if self.query is None:  # one layer under two names
                    rules.append(Rule((key, query), (f"key.{i}.{part}.*",), _read_once, lambda one, _: one * 2))
                else:
                    rules.append(rename(query, f"query.{i}.{part}.*"))
                rules.append(rename(key, f"key.{i}.{part}.*"))
            rules += [pointwise(f"stages.{i}.f_value.*", f"value.{i}.*"), pointwise(f"stages.{i}.W.*", f"out.{i}.*")]
        rules += [rename("conv_bn_dropout.0.*", "fuse.conv.*")]
        rules += [rename(f"conv_bn_dropout.1{'.0' if self.query is None else ''}.*", "fuse.norm.*")]
        return (KeyMap("MendelXu/ANN", tuple(rules)),)

    def forward(
        self, x: Float[Tensor, "b channels h w"], context: Float[Tensor, "b low h2 w2"] | None = None, *, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        """(B, C, H, W) -> (B, out_channels, H, W), or that and the weights (B, N, S), of every stage if there are several.

        context: (B, low_channels, H', W'), what is attended to, with low_channels alone.
        """
        check_map(x, self.channels)
        if self.low_channels is None:
            require(context is None, "context is only for a module made with low_channels, which is None")
            low = x
        else:
            require(context is not None, "a module with low_channels={} needs context, the low-level map", self.low_channels)
            assert context is not None
            check_map(context, self.low_channels, name="context")
            require(context.shape[0] == x.shape[0], "context has batch {} but x has batch {}", context.shape[0], x.shape[0])
            low = context
        key: Any = self.key[0]
        for norm, read in ((key.norm, low), (self.fuse.norm, x)):  # the other norms see one of these two sizes
            check_batch_statistics(norm, read.numel() // read.shape[1], "a batch of one map with one position")
        conv, size, pooled = self.fuse.conv, x.shape[2:], pool_regions(low, self.pool_sizes)
        of_context, own = conv.weight.flatten(1).tensor_split((self.out_channels,), 1)
        out = F.conv2d(x, own[:, :, None, None], conv.bias).flatten(2)
        weights = []
        for i in range(self.num_stages):
            attention = self._attention(x, low, i)
            value: Any = self.value[i]
            project: Any = self.out[i]
            values = project_columns(pooled, value.weight, value.bias)
            # Every row of weights sums to one: a bias of the context may be added to all regions.
            folded = project_columns(values, of_context @ project.weight, (of_context * project.bias).sum(1))
            out = torch.baddbmm(out, folded, attention.mT)
            weights.append(attention)
        out = F.dropout2d(self.fuse.finish(out.unflatten(2, size)), self.dropout, self.training)
        return (out, tuple(weights) if self.num_stages > 1 else weights[0]) if return_weights else out

    def _attention(self, x: Tensor, low: Tensor, stage: int) -> Tensor:
        keys = self.key[stage](low)
        queries = keys if self.query is None else self.query[stage](x)
        scores = torch.bmm(queries.flatten(2).mT, self.hidden_channels**-0.5 * pool_regions(keys, self.pool_sizes))
        return scores.softmax(-1).to(queries.dtype)


def _read_once(both: list[Tensor], module: nn.Module) -> list[Tensor]:
    """Keys and queries come from one layer, which the authors' files hold twice."""
    require(torch.equal(*both), "the two are one layer and must be equal; with low_channels queries have their own")
    return both[:1]
