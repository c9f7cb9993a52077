r"""Context-Transformer: every prior box of a detector reads its source-class scores again, with the help of the whole picture's.

    A = softmax_M(theta(S) phi(C)^T),   S' = S + (A g(C)) * w_z,   scores = scale T S' / |S'|;   theta, phi, g: y -> W y + b + y

Yang, Wang, Chen, Liu, Qiao, "Context-Transformer: Tackling Object Confusion for Few-Shot Detection", AAAI 2020. arXiv:2003.07304.
As in the authors' code theta, phi and g are residual (in the paper they are not) and A is not scaled. Not there: the mask, and the 1e-12 that keeps
a row of zeros from a division by zero. B batch, P prior boxes, M pooled ones, K dim source classes.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require, require_type
from ...mechanism import Mechanism
from ...official import KeyMap, rename
from ...ops._linear import linear
from ...ops._precision import at_least_float32
from ...ops.softmax_attention import attend, attention_weights
from ...parts.linear import Linear
from ...parts.prior_maps import context_pool
from ...validate import check_floating, check_mask, check_option, check_tokens

EPS = 1e-12


class ContextTransformer(Mechanism):
    """Args:
    dim: K, scores per box: the source classes.
    num_novel: classes to tell.
    mode: "transfer" gives the novel scores alone, "incremental" puts scores of the source classes before them.
    scale: the novel scores are this times a cosine, once the class vectors have unit norm; a buffer, for files hold it.
    """

    card: ClassVar = Card(
        id="context_transformer",
        layout="pair",
        paper=Paper(
            title="Context-Transformer: Tackling Object Confusion for Few-Shot Detection",
            authors="Ze Yang, Yali Wang, Xianyu Chen, Jianzhuang Liu, Yu Qiao",
            venue="AAAI",
            year=2020,
            arxiv="2003.07304",
        ),
        source="Ze-Yang/Context-Transformer@493fb6b models/RFB_Net_vgg.py (MIT)",
        summary="Prior boxes attend to the picture's pooled source-class scores before they are told apart as novel classes.",
        when="Few-shot detection on a single-shot detector trained on many other classes.",
        flops="2*B*(N + 2*M)*dim**2 + 4*B*N*M*dim + 2*B*N*dim*num_novel + (2*B*N*dim**2 if mode == 'incremental' else 0)",
        grows={"N": 2.0},
        can=frozenset({"weights", "rows", "row_stochastic"}),
        example={"dim": 10, "num_novel": 5},
        variants=({"dim": 9, "num_novel": 4, "mode": "incremental", "scale": 2.0},),
    )
    official: ClassVar = (
        KeyMap(
            "Context-Transformer",
            (rename("Wz", "w_z"), rename("OBJ_Target.weight", "target.weight")),
            ignore=(r"(module\.)?(base|Norm|extras|loc|conf|obj)\..*",),
        ),
    )
    functions: ClassVar = {"context_pool": context_pool}

    def __init__(
        self, dim: int, num_novel: int, mode: Literal["transfer", "incremental"] = "transfer", scale: float = 5.0, *, device=None, dtype=None
    ) -> None:
        super().__init__()
        require(dim > 0, "dim={} must be at least 1", dim)
        require(num_novel > 0, "num_novel={} must be at least 1", num_novel)
        check_option(mode, ("transfer", "incremental"), "mode")
        self.dim, self.num_novel, self.mode = dim, num_novel, mode
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("scale", torch.full((1,), float(scale), **dd))
        self.theta, self.phi, self.g = (Linear(dim, dim, **dd) for _ in range(3))
        self.w_z = nn.Parameter(torch.zeros(dim, **dd))
        self.target = Linear(dim, num_novel, bias=False, **dd)
        self.fc_base = Linear(dim, dim, **dd) if mode == "incremental" else None
        for layer in (self.theta, self.phi, self.g):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
            nn.init.zeros_(layer.bias)
        if self.fc_base is not None:
            nn.init.zeros_(self.fc_base.weight)
            nn.init.zeros_(self.fc_base.bias)

    def forward(
        self,
        x: Float[Tensor, "b p dim"],
        context: Float[Tensor, "b m dim"],
        *,
        context_mask: Bool[Tensor, "b m"] | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b p classes"] | tuple[Tensor, Tensor]:
        """Returns the scores (B, P, num_novel) or (B, P, K + num_novel), or them and the weights (B, P, M).

        Args:
            context_mask: True = a real entry. A sample without any is scored by its own boxes alone.
        """
        self._check(x, context, context_mask)
        q, k = _residual(x, self.theta), _residual(context, self.phi)
        v = _residual(context, self.g) * self.w_z  # on the M entries rather than on the P sums of them
        seen = attend(q[:, None], k[:, None], v[:, None], scale=1.0, mask=_rows(context_mask))[:, 0]
        mixed = x + seen
        scores = self.target(mixed)
        norm = torch.linalg.vector_norm(mixed, dim=-1, keepdim=True, dtype=at_least_float32(mixed)).clamp_min(EPS)  # of no use in float16
        scores = (scores * (self.scale / norm)).to(scores.dtype)
        if self.fc_base is not None:
            scores = torch.cat([_residual(x, self.fc_base), scores], -1)
        return (scores, self.weights(x, context, context_mask=context_mask)) if return_weights else scores

    def weights(self, x: Tensor, context: Tensor, *, queries: Tensor | None = None, context_mask: Tensor | None = None) -> Tensor:
        """The weights of R chosen boxes alone, (B, R, M); of all if None."""
        self._check(x, context, context_mask)
        q = _residual(x if queries is None else x[:, queries], self.theta)
        return attention_weights(q[:, None], _residual(context, self.phi)[:, None], scale=1.0, mask=_rows(context_mask))[:, 0]

    @torch.no_grad()
    def normalize(self) -> None:
        """Give every class vector unit norm; to be called after each step of the optimizer."""
        self.target.weight.copy_(F.normalize(self.target.weight, eps=EPS))

    @torch.no_grad()
    def imprint(self, features: Float[Tensor, "n dim"], labels: Int[Tensor, " n"]) -> None:
        """Start each class vector from examples: the mean of its boxes' scores at unit norm, itself at unit norm. A class without any stays."""
        check_floating(features, "features")
        require(features.ndim == 2 and features.shape[1] == self.dim, "features must be (examples, {}), got {}", self.dim, tuple(features.shape))
        whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        require_type(whole, "labels must be a tensor of class numbers, got {}", getattr(labels, "dtype", type(labels).__name__))
        require(labels.shape == features.shape[:1], "labels must be ({},), got {}", len(features), tuple(labels.shape))
        outside = labels[(labels < 0) | (labels >= self.num_novel)].unique().tolist()
        require(not outside, "labels {} are not among the {} novel classes, 0 to {}", outside, self.num_novel, self.num_novel - 1)
        labels = labels.long()
        sums = torch.zeros_like(self.target.weight).index_add_(0, labels, F.normalize(features, eps=EPS).to(self.target.weight))
        there = torch.zeros(self.num_novel, dtype=torch.bool, device=sums.device).index_fill_(0, labels, True)
        self.target.weight.copy_(torch.where(there[:, None], F.normalize(sums, eps=EPS), self.target.weight))

    def _check(self, x: Tensor, context: Tensor, mask: Tensor | None) -> None:
        check_tokens(x, self.dim)
        check_tokens(context, self.dim, "context")
        require(context.shape[0] == x.shape[0], "context has batch {} but x has batch {}", context.shape[0], x.shape[0])
        require(context.shape[1] > 0, "context has no entries: {}", tuple(context.shape))
        check_mask(mask, *context.shape[:2], name="context_mask")

    @staticmethod
    def example_inputs(options: Mapping[str, Any], *, batch: int, size: Any, generator: torch.Generator) -> dict[str, Tensor]:
        n = size if isinstance(size, int) else torch.Size(size).numel()
        return {name: torch.randn(batch, n, options["dim"], generator=generator) for name in ("x", "context")}


def _residual(x: Tensor, layer: nn.Linear) -> Tensor:
    """W x + b + x as one product."""
    return linear(x, layer.weight + torch.eye(layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype), layer.bias)


def _rows(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, None, None]
