r"""Feature bank operators: features of a short clip look into a bank of features of the whole video.

    avg, max: o = mean or max of the bank        nl: A = Wr x + br,  K = Wl bank + bl,  and layer by layer, K the same for all:
    t = softmax_M(scale theta(A) phi(K)^T) g(K);  A <- A + Wo ReLU(LN(t)) + bo   (post-activation: A <- ReLU(A + LN(Wo t + bo)))

Wu, Feichtenhofer, Fan, He, Krähenbühl, Girshick, "Long-Term Feature Banks for Detailed Video Understanding", CVPR 2019. arXiv:1812.05038.
LN has no gain and no shift. As in the authors' code a bank without mask is read whole, its padding too; the mask is not in the paper.
B batch, N queries (one in the authors' code; each is normalised alone), M bank entries, L num_layers.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule, pointwise
from ...ops._linear import linear
from ...ops.softmax_attention import attend, attention_weights
from ...parts.linear import Linear
from ...validate import check_mask, check_option, check_tokens

MODES = ("nl", "avg", "max")


class LongTermFeatureBank(Mechanism):
    """Args:
    dim: width of the queries.
    bank_dim: width of the bank's entries; dim if None.
    latent_dim: width in which queries and entries are compared, and of the output if `reduce_input`.
    mode: "nl" (attention), or "avg" and "max" (the bank pooled; no parameters; the queries say only how often it is repeated).
    num_layers: of attention, one after the other.
    pre_act, pre_act_norm: ReLU (after a norm) before the output projection; pre_act=False puts norm and ReLU around the sum instead.
    scale: divide the scores by the root of latent_dim.
    reduce_input: project the queries to latent_dim first; without, they stay of width `dim`.
    dropout: probability of dropping an element of the reduced queries, of the projected bank and of each layer's output in training.
    concat: put the queries before the output: width dim + the output's.
    """

    card: ClassVar = Card(
        id="feature_bank",
        layout="pair",
        paper=Paper(
            title="Long-Term Feature Banks for Detailed Video Understanding",
            authors="Chao-Yuan Wu, Christoph Feichtenhofer, Haoqi Fan, Kaiming He, Philipp Krähenbühl, Ross Girshick",
            venue="CVPR",
            year=2019,
            arxiv="1812.05038",
        ),
        source="facebookresearch/video-long-term-feature-banks@941b713 lib/models/lfb_helper.py (Apache-2.0)",
        summary="Features of a short clip attend to a bank of features of the whole video.",
        when="Long videos or streams: the backbone sees seconds, the bank remembers minutes.",
        # The cheaper of two equal ways: the bank projected, or the queries.
        flops="(2*B*N*dim*latent_dim if reduce_input else 0) + 4*B*N*num_layers*width*latent_dim"
        " + 2*B*min(M*latent_dim*(bank_dim + 2*num_layers*(latent_dim + N)),"
        " 2*N*num_layers*(latent_dim*(latent_dim + bank_dim) + M*bank_dim)) if mode == 'nl' else 0",
        grows={"N": 2.0},
        can=frozenset({"weights", "rows", "row_stochastic", "identity_start"}),
        checked_against="authors",
        uncertain="Caffe2 no longer runs: the authors' graph was evaluated operator by operator. More than one query a sample is ours.",
        example={"dim": 10, "bank_dim": 14, "latent_dim": 8},
        variants=(
            {"dim": 10, "latent_dim": 8, "num_layers": 1, "pre_act": False, "scale": False},
            {"dim": 10, "bank_dim": 6, "latent_dim": 8, "pre_act_norm": False, "reduce_input": False},
            {"dim": 10, "bank_dim": 6, "mode": "avg", "concat": True},
            {"dim": 10, "mode": "max", "concat": True},
        ),
        unless={
            "weights": "mode != 'nl'",
            "rows": "mode != 'nl'",
            "row_stochastic": "mode != 'nl'",
            "identity_start": "mode != 'nl' or reduce_input or concat or not pre_act",
        },
    )

    def __init__(
        self,
        dim: int,
        bank_dim: int | None = None,
        latent_dim: int = 512,
        mode: Literal["nl", "avg", "max"] = "nl",
        num_layers: int = 2,
        pre_act: bool = True,
        pre_act_norm: bool = True,
        scale: bool = True,
        reduce_input: bool = True,
        dropout: float = 0.2,
        concat: bool = False,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(mode, MODES, "mode")
        self.dim, self.bank_dim, self.latent_dim, self.num_layers = dim, dim if bank_dim is None else bank_dim, latent_dim, num_layers
        for name in ("dim", "bank_dim", "latent_dim", "num_layers"):
            require(getattr(self, name) > 0, "{}={} must be at least 1", name, getattr(self, name))
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        self.mode, self.pre_act, self.pre_act_norm, self.scale = mode, pre_act, pre_act_norm, scale
        self.reduce_input, self.dropout, self.concat = reduce_input, dropout, concat
        self.width = latent_dim if reduce_input else dim
        if mode != "nl":
            return
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.reduce_proj = Linear(dim, latent_dim, **dd) if reduce_input else None
        self.bank_proj = Linear(self.bank_dim, latent_dim, **dd)
        self.phi_g = Linear(latent_dim, 2 * num_layers * latent_dim, **dd)  # of all layers, which read the same bank: phi, g, phi, g, ...
        self.theta = nn.ModuleList(Linear(self.width, latent_dim, **dd) for _ in range(num_layers))
        self.out = nn.ModuleList(Linear(latent_dim, self.width, **dd) for _ in range(num_layers))
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=0.01) if name.endswith("weight") and not name.startswith("out") else nn.init.zeros_(parameter)

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        bank: Float[Tensor, "b m bank_dim"],
        *,
        bank_mask: Bool[Tensor, "b m"] | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n out"] | tuple[Tensor, Tensor]:
        """Returns (B, N, width), or that and the weights (B, L, N, M).

        Args:
            bank_mask: True = a real entry. Where a sample has none, pooling gives zeros and attention leaves the (reduced) queries as they are.
        """
        self._check(x, bank, bank_mask, return_weights)
        if self.mode == "nl":
            out, weights = self._look(x, bank, bank_mask, return_weights)
        else:
            out, weights = self._pool(bank, bank_mask)[:, None].repeat(1, x.shape[1], 1), None
        out = torch.cat([x, out], -1) if self.concat else out
        return out if weights is None else (out, weights)

    def weights(self, x: Tensor, bank: Tensor, *, queries: Tensor | None = None, bank_mask: Tensor | None = None) -> Tensor:
        """The weights of R chosen queries alone, (B, L, R, M); of all if None."""
        self._check(x, bank, bank_mask, True)
        weights = self._look(x if queries is None else x[:, queries], bank, bank_mask, True)[1]
        assert weights is not None
        return weights

    def _check(self, x: Tensor, bank: Tensor, bank_mask: Tensor | None, weights: bool) -> None:
        check_tokens(x, self.dim)
        check_tokens(bank, self.bank_dim, "bank", "bank_dim")
        require(bank.shape[0] == x.shape[0], "bank has batch {} but x has batch {}", bank.shape[0], x.shape[0])
        require(bank.shape[1] > 0, "bank has no entries: {}; pad it with zeros and pass bank_mask", tuple(bank.shape))
        check_mask(bank_mask, *bank.shape[:2], name="bank_mask")
        require(not weights or self.mode == "nl", "mode={!r} pools the bank and has no weights; they are of mode='nl'", self.mode)

    def _pool(self, bank: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return bank.mean(1) if self.mode == "avg" else bank.amax(1)
        hidden = ~mask[:, :, None]
        if self.mode == "avg":
            return bank.masked_fill(hidden, 0.0).sum(1) / mask.sum(1).clamp(min=1)[:, None].to(bank.dtype)
        return bank.masked_fill(hidden, float("-inf")).amax(1).masked_fill(~mask.any(1)[:, None], 0.0)

    def _look(self, x: Tensor, bank: Tensor, mask: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor | None]:
        start = x if self.reduce_proj is None else self._drop(self.reduce_proj(x))
        allowed = None if mask is None else mask[:, None, None]
        options = {"scale": self.latent_dim**-0.5 if self.scale else 1.0, "mask": allowed}
        few = self._few(x.shape[1], bank.shape[1])
        if few:
            shared = (bank[:, None],) * 2
            pairs = [shared] * self.num_layers
        else:
            rows = self.phi_g(self._drop(self.bank_proj(bank)))[:, None].chunk(2 * self.num_layers, -1)
            pairs = list(zip(rows[::2], rows[1::2], strict=True))
        a, weights = start, []
        for at, (keys, values) in enumerate(pairs):
            q = self.theta[at](a)
            q = (self._query(q, at) if few else q)[:, None]
            if wanted:
                weights.append(attention_weights(q, keys, **options))
            t = attend(q, keys, values, **options)[:, 0]
            a = self._step(a, self._value(t, at) if few else t, at)
        if mask is not None:
            a = torch.where(mask.any(1)[:, None, None], a, start)
        return a, torch.cat(weights, 1) if wanted else None

    def _few(self, n: int, m: int) -> bool:
        """Whether asking the bank itself is less work than projecting all of it.

        A constant added to a row of scores cancels and weights sum to one, so (theta phi^T) and p g pass through both projections of the bank
        to the side of the queries. Not where elements of the projected bank are dropped out, nor in an export, which is for any length.
        """
        if (self.training and self.dropout > 0) or torch.compiler.is_exporting():
            return False
        d, e, layers = self.latent_dim, self.bank_dim, self.num_layers
        return 2 * n * layers * (d * (d + e) + m * e) < m * d * (e + 2 * layers * (d + n))

    def _query(self, theta: Tensor, layer: int) -> Tensor:
        phi = self.phi_g.weight.unflatten(0, (self.num_layers, 2, -1))[layer, 0]
        return theta @ phi @ self.bank_proj.weight

    def _value(self, t: Tensor, layer: int) -> Tensor:
        g, shift = (p.unflatten(0, (self.num_layers, 2, -1))[layer, 1] for p in (self.phi_g.weight, self.phi_g.bias))
        return linear(self.bank_proj(t), g, shift)

    def _step(self, a: Tensor, t: Tensor, layer: int) -> Tensor:
        if self.pre_act:
            t = F.layer_norm(t, t.shape[-1:]) if self.pre_act_norm else t
            return a + self._drop(self.out[layer](t.relu()))
        t = self.out[layer](t)
        return (a + self._drop(F.layer_norm(t, t.shape[-1:]))).relu()

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def key_maps(self) -> tuple[KeyMap, ...]:
        """Caffe2's blobs; found by what their names end in, for the reduction's begins with the name of its input."""
        return (self._blobs("video-long-term-feature-banks", "", "*"), self._blobs("video-long-term-feature-banks, under p.", "p.", "p."))

    def _blobs(self, name: str, prefix: str, found: str) -> KeyMap:
        rules = []
        for ours, theirs in (("weight", "w"), ("bias", "b")):
            rules += [pointwise(f"{prefix}input_fbonl_reduc_{theirs}", f"reduce_proj.{ours}", 3)]
            rules += [pointwise(f"*_fbonl_reduc_{theirs}", f"reduce_proj.{ours}", 3)]
            rules += [pointwise(f"{found}lfb_1x1_{theirs}", f"bank_proj.{ours}", 3)]
            blobs = tuple(f"{found}lfb_nl{at}_{part}_{theirs}" for at in range(self.num_layers) for part in ("phi", "g"))
            rules += [Rule(blobs, (f"phi_g.{ours}",), _stack, _unstack)]
            for at in range(self.num_layers):
                rules += [pointwise(f"{found}lfb_nl{at}_{part}_{theirs}", f"{part}.{at}.{ours}", 3) for part in ("theta", "out")]
        return KeyMap(name, tuple(rules))

    @staticmethod
    def example_inputs(options: Mapping[str, Any], *, batch: int, size: Any, generator: torch.Generator) -> dict[str, Tensor]:
        n = size if isinstance(size, int) else torch.Size(size).numel()
        widths = {"x": options["dim"], "bank": options.get("bank_dim", options["dim"])}
        return {name: torch.randn(batch, n, width, generator=generator) for name, width in widths.items()}


def _stack(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
    return [torch.cat([t.flatten(1) if t.ndim > 1 else t for t in tensors])]


def _unstack(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
    (t,) = tensors
    return [part[..., None, None, None] if t.ndim > 1 else part for part in t.chunk(2 * module.num_layers)]  # type: ignore[operator]
