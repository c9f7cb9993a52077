r"""Self-attention of SAGAN: every pixel gathers from a pooled map, so that both eyes get one colour and a dog four legs.

    beta = softmax_j(theta_i . phi_j),   out_i = x_i + gamma Wo sum_j beta_ij g_j,   theta = Wt x,   phi = pool(Wp x),   g = pool(Wg x)

Zhang, Goodfellow, Metaxas, Odena, "Self-Attention Generative Adversarial Networks", ICML 2019. arXiv:1805.08318. No scaling.
The defaults are the authors' code: 2x2 max pooling and values of half the width. The paper's text has neither; pool=1, value_reduction=1,
qkv_bias=True, out_proj=False is heykeetae's form of it. B batch, C channels, N positions, M pooled positions.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule, pointwise, rename
from ...ops.pairwise_affinity import affinity_weights, pairwise_attention
from ...parts.gates import INITS
from ...parts.linear import Linear
from ...parts.spatial import flatten_space, project_rows, project_to_map, unflatten_space
from ...parts.spectral import SpectralLinear
from ...parts.squeeze import hidden_width
from ...validate import check_map, check_option


def _gamma(theirs: str, *shape: int) -> Rule:
    """Their gain of this shape, or of any with one number, is our scalar."""
    return Rule((theirs,), ("gamma",), lambda t, _: [t[0].reshape(())], lambda t, _: [t[0].reshape(shape)])


def _kernel(theirs: str, ours: str) -> Rule:
    """A TensorFlow kernel (1, 1, in, out)."""
    return Rule((theirs,), (ours,), lambda t, _: [t[0].flatten(0, 2).mT], lambda t, _: [t[0].mT[None, None]])


_TENSORFLOW = {"sn_conv_theta": "theta", "sn_conv_phi": "phi", "sn_conv_g": "g", "sn_conv_attn": "o"}
_HEYKEETAE = {"query_conv": "theta", "key_conv": "phi", "value_conv": "g"}


class SAGANAttention(Mechanism):
    """Args:
    channels: of the input and the output.
    reduction: queries and keys have channels // reduction channels.
    value_reduction: values have channels // value_reduction channels.
    pool: side of the max pooling of keys and values; 1 has none.
    qkv_bias: biases of the three projections.
    out_proj: project what was gathered back to `channels`; without it value_reduction must be 1.
    spectral_norm: divide all weights by an estimate of their largest singular value.
    init: "identity" or "default": either starts as the identity, with a gain of zero.
    """

    card: ClassVar = Card(
        id="sagan",
        layout="map",
        paper=Paper(
            title="Self-Attention Generative Adversarial Networks",
            authors="Han Zhang, Ian Goodfellow, Dimitris Metaxas, Augustus Odena",
            venue="ICML",
            year=2019,
            arxiv="1805.08318",
        ),
        source="brain-research/self-attention-gan@ad9612e (Apache-2.0), run as ajbrock/BigGAN-PyTorch@9845943 (MIT); "
        "heykeetae/Self-Attention-GAN@8714a54 (no license file)",
        summary="Every pixel gathers from a pooled map by an unscaled softmax, onto itself.",
        when="One block at 32 x 32 or 64 x 64 in the generator and the discriminator of a convolutional GAN.",
        flops="2*B*N*channels*(2*hidden_channels + value_channels*(2 if out_proj else 1))"
        " + 2*B*N*((H//pool)*(W//pool))"
        "*(hidden_channels + value_channels if value_channels >= 64 and hidden_channels < value_channels else 2*max(hidden_channels, value_channels))"
        " + (4*channels*(2*hidden_channels + value_channels*(2 if out_proj else 1)) if spectral_norm else 0)",
        grows={"N": 2.0},
        can=frozenset({"weights", "rows", "row_stochastic", "permutation_equivariant", "identity_start"}),
        unless={"permutation_equivariant": "pool > 1"},
        bounds={"gradcheck_in_float64": (1.0, "spectral_norm")},  # the vectors of the power iteration are constants by definition
        uncertain="The authors' TensorFlow 1 graph was not run; BigGAN-PyTorch has the same block.",
        returns=("y", "weights"),
        example={"channels": 16, "pool": 1},
        variants=(
            {"channels": 16},
            {"channels": 16, "reduction": 4, "spectral_norm": True},
            {"channels": 8, "value_reduction": 1, "pool": 1, "qkv_bias": True, "out_proj": False},
        ),
        place="C",
    )

    def __init__(
        self,
        channels: int,
        reduction: int = 8,
        value_reduction: int = 2,
        pool: int = 2,
        qkv_bias: bool = False,
        out_proj: bool = True,
        spectral_norm: bool = False,
        *,
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(init, INITS, "init")
        require(pool > 0, "pool={} must be at least 1", pool)
        require(channels > 0 and value_reduction > 0, "channels={} and value_reduction={} must be at least 1", channels, value_reduction)
        self.channels, self.reduction, self.value_reduction, self.pool, self.init = channels, reduction, value_reduction, pool, init
        self.qkv_bias, self.out_proj, self.spectral_norm = qkv_bias, out_proj, spectral_norm
        d = self.hidden_channels = hidden_width(channels, reduction, None)
        self.value_channels = channels // value_reduction
        require(self.value_channels > 0, "channels={} with value_reduction={} leaves no channel for the values", channels, value_reduction)
        require(out_proj or value_reduction == 1, "out_proj=False needs value_reduction=1, got {}", value_reduction)
        linear, dd = SpectralLinear if spectral_norm else Linear, {"device": device, "dtype": dtype}
        self.theta, self.phi = (linear(channels, d, qkv_bias, **dd) for _ in range(2))
        self.g = linear(channels, self.value_channels, qkv_bias, **dd)
        self.o = linear(self.value_channels, channels, False, **dd) if out_proj else None
        self.gamma = nn.Parameter(torch.zeros((), **dd))

    def key_maps(self) -> tuple[KeyMap, ...]:
        biggan = [pointwise(f"{name}.weight", f"{name}.weight") for name in ("theta", "phi", "g", "o")]
        named = [*(pointwise(f"{theirs}.weight", f"{ours}.weight") for theirs, ours in _HEYKEETAE.items())]
        named += [rename(f"{theirs}.bias", f"{ours}.bias") for theirs, ours in _HEYKEETAE.items()]
        graph = [_kernel(f"{theirs}/w", f"{ours}.weight") for theirs, ours in _TENSORFLOW.items()]
        graph += [rename(f"{theirs}/u", f"{ours}.u0") for theirs, ours in _TENSORFLOW.items()]
        return (
            KeyMap("BigGAN", (*biggan, _gamma("gamma"))),
            KeyMap("heykeetae", (*named, _gamma("gamma", 1))),
            KeyMap("TensorFlow", (*graph, _gamma("sigma_ratio")), optional=(r".*\.sv0",)),
        )

    def forward(
        self, x: Float[Tensor, "b channels h w"], *, return_weights: bool = False, update_u: bool = True
    ) -> Float[Tensor, "b channels h w"] | tuple[Float[Tensor, "b channels h w"], Float[Tensor, "b n m"]]:
        """Returns the map, or that and the weights (B, N, M) of positions and pooled positions in row-major order.

        With spectral_norm each call in training moves the vectors of the power iterations, unless `update_u` is False.
        """
        update = update_u and self.training
        q, k, v = self._embed(x, update)
        y = pairwise_attention(q, k, v)
        y = unflatten_space(y, x.shape[2:]) if self.o is None else project_to_map(y, self._weight(self.o, update), None, x.shape[2:])
        out = torch.addcmul(x, self.gamma, y)
        return (out, affinity_weights(q, k, "softmax")) if return_weights else out

    def weights(self, x: Float[Tensor, "b channels h w"], *, queries: Tensor | None = None) -> Float[Tensor, "b r m"]:
        """The weights of R chosen positions alone, (B, R, M); of all if None."""
        q, k, _ = self._embed(x, False)
        return affinity_weights(q if queries is None else q[:, queries], k, "softmax")

    def _embed(self, x: Tensor, update: bool) -> tuple[Tensor, Tensor, Tensor]:
        """theta (B, N, d), phi (B, M, d), g (B, M, value_channels)."""
        check_map(x, self.channels)
        require(min(x.shape[2:]) >= self.pool, "pool={} needs a size of at least that on both axes, got {}", self.pool, tuple(x.shape[2:]))
        layers, d = (self.theta, self.phi, self.g), self.hidden_channels
        weight = torch.cat([self._weight(layer, update) for layer in layers])
        bias = torch.cat([layer.bias for layer in layers]) if self.qkv_bias else None
        q, kv = project_rows(flatten_space(x), weight, bias).split((d, d + self.value_channels), 2)
        if self.pool > 1:
            kv = flatten_space(F.max_pool2d(unflatten_space(kv, x.shape[2:]), self.pool))
        k, v = kv.split((d, self.value_channels), 2)
        return q, k, v

    @staticmethod
    def _weight(layer: Any, update: bool) -> Tensor:
        return layer.normalised(update) if isinstance(layer, SpectralLinear) else layer.weight
