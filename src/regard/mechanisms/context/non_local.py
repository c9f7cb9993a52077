r"""Non-local block: every position of a map gathers from all positions, weighted by a function of the pair.

    y_i = sum_j f(x_i, x_j) g(x_j) / Z,   out = x + Wo y,   theta, phi, g linear in x
    embedded_gaussian: f/Z = softmax_j(s theta_i . phi_j)     gaussian: f/Z = softmax_j(x_i . x_j)
    dot_product: f/Z = theta_i . phi_j / M                    concatenation: f/Z = relu(w . [theta_i ; phi_j]) / M

Wang, Girshick, Gupta, He, "Non-local Neural Networks", CVPR 2018. arXiv:1711.07971. The scale s = d^-1/2 is in the authors' code,
not in the paper. B batch, C channels, N positions, M keys (fewer than N if pooled), d hidden_channels.
"""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule, pointwise, rename
from ...ops.pairwise_affinity import affinity_weights, pairwise_attention, pairwise_dot, pairwise_relu
from ...parts.gates import INITS
from ...parts.linear import Linear
from ...parts.norm import Norm, check_batch_statistics, make_norm, zero_init_
from ...parts.spatial import flatten_space, halve, halve_rows, project_rows, project_to_map
from ...validate import check_map, check_option

MODES = ("embedded_gaussian", "gaussian", "dot_product", "concatenation")
SOFTMAX = MODES[:2]
_KEYS = "((N//2 if dims == 1 else (H//2)*(W//2) if dims == 2 else H*(N//(H*W)//2)*(W//2)) if sub_sample else N)"


class NonLocal(Mechanism):
    """Args:
    channels: of the input and the output.
    dims: number of spatial axes, 1 to 3.
    reduction, hidden_channels: the inner width is hidden_channels, or channels // reduction but at least 1 if that is None.
    mode: the pairwise function.
    use_scale: factor d ** -0.5 on the scores of mode "embedded_gaussian"; no other mode is scaled.
    sub_sample: max pooling by 2 of keys and values, after their projections (of three axes only the last two).
    pool_first: that pooling on x before the projections (the authors' Caffe2 code).
    norm: "batch", None, or a callable channels -> module, on the output of the last projection.
    zero_init: start as the identity, as init="identity" does whatever zero_init says.
    """

    card: ClassVar = Card(
        id="non_local",
        layout="map",
        paper=Paper(
            title="Non-local Neural Networks",
            authors="Xiaolong Wang, Ross Girshick, Abhinav Gupta, Kaiming He",
            venue="CVPR",
            year=2018,
            arxiv="1711.07971",
        ),
        source="open-mmlab/mmcv@a8073c7, AlexHex7/Non-local_pytorch@ec15789, facebookresearch/video-nonlocal-net@c253ed5 (Apache-2.0)",
        summary="Every position gathers from all positions in one layer, weighted by a chosen function of the pair.",
        when="One or two blocks in the middle of a network that needs far context; dot_product and concatenation stay cheap on large maps.",
        flops=f"2*B*N*channels*((0 if mode == 'gaussian' else 1 if mode == 'concatenation' else hidden_channels) + hidden_channels)"
        f" + 2*B*({_KEYS} if pool_first else N)*channels*(hidden_channels + key_width)"
        f" + (4*B*N*{_KEYS}*(max(channels, hidden_channels) if mode == 'gaussian' else hidden_channels) if mode in {SOFTMAX} else 0)"
        f" + (2*B*(N + {_KEYS})*hidden_channels**2 if mode == 'dot_product' else 0)"
        " + (2*hidden_channels*channels*(2 if key_width == 1 else 1) if mode == 'concatenation' else 0)"
        f" + (2*hidden_channels*B*{_KEYS} if mode == 'concatenation' and key_width != 1 else 0)",
        grows={"N": 2.0},
        can=frozenset({"weights", "rows", "any_dims", "identity_start", "permutation_equivariant", "row_stochastic"}),
        unless={"permutation_equivariant": "sub_sample", "row_stochastic": f"mode not in {SOFTMAX}"},
        bounds={"official_names_round_trip": (1e-6, "takes_bias")},  # a running mean takes the bias that mmcv's layer has not
        checked_against="public",
        uncertain="Replayed against mmcv and AlexHex7; the authors' Caffe2 code was read, not run.",
        example={"channels": 16},
        variants=(
            {"channels": 12, "mode": "gaussian", "hidden_channels": 5, "norm": "batch"},
            {"channels": 16, "sub_sample": True, "use_scale": False, "norm": "batch"},
            {"channels": 8, "dims": 1, "reduction": 3, "zero_init": False},
        ),
        place="C",
    )

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        reduction: int = 2,
        hidden_channels: int | None = None,
        mode: Literal["embedded_gaussian", "gaussian", "dot_product", "concatenation"] = "embedded_gaussian",
        use_scale: bool = True,
        sub_sample: bool = False,
        pool_first: bool = False,
        norm: Norm = None,
        zero_init: bool = True,
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(dims, (1, 2, 3), "dims")
        check_option(mode, MODES, "mode")
        require(channels > 0 and reduction > 0, "channels={} and reduction={} must be at least 1", channels, reduction)
        d = max(channels // reduction, 1) if hidden_channels is None else hidden_channels
        require(d > 0, "hidden_channels={} must be at least 1", d)
        self.channels, self.dims, self.reduction, self.hidden_channels, self.mode = channels, dims, reduction, d, mode
        self.use_scale, self.sub_sample, self.pool_first, self.zero_init, self.init = use_scale, sub_sample, pool_first, zero_init, init
        check_option(init, INITS, "init")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        embeds, adds = mode != "gaussian", mode == "concatenation"
        self.g = Linear(channels, d, **dd)
        self.theta, self.phi = (Linear(channels, d, **dd) if embeds else None for _ in range(2))
        self.concat_project = Linear(2 * d, 1, bias=False, **dd) if adds else None
        self.out = Linear(d, channels, **dd)  # under a norm its bias changes nothing; the plain naming has one
        self.norm = make_norm(norm, channels, dims, **dd)
        self.takes_bias = isinstance(self.norm, _BatchNorm) and self.norm.running_mean is not None
        for linear in (self.g, self.theta, self.phi, self.out):
            if linear is not None:
                nn.init.normal_(linear.weight, std=0.01)
                nn.init.zeros_(linear.bias)
        if zero_init or init == "identity":
            zero_init_(self.out if norm is None else self.norm)
        # Unless the pooling sits between phi and w, the number w . phi is all that "concatenation" needs of a key.
        self.key_width = 0 if not embeds else 1 if adds and not (sub_sample and not pool_first) else d

    def key_maps(self) -> tuple[KeyMap, ...]:
        numbered, plain = (".0", "") if self.sub_sample else ("", ".0"), isinstance(self.norm, nn.Identity)
        pairs = [(f"{ours}{number}", ours) for ours in ("g", "theta", "phi") for number in (numbered if ours != "theta" else ("",))]
        bare = [] if plain else [Rule(("conv_out.conv.weight",), ("out.weight", "out.bias"), _add_bias, _drop_bias)]
        if self.takes_bias:
            names = ("out.weight", "out.bias", "norm.running_mean")
            bare = [Rule(("conv_out.conv.weight", "conv_out.bn.running_mean"), names, _add_bias, _bias_in_mean)]
        mmcv = [*(pointwise(f"{theirs}.conv.*", f"{ours}.*") for theirs, ours in pairs), *bare, pointwise("conv_out.conv.*", "out.*")]
        mmcv += [rename("conv_out.bn.*", "norm.*"), pointwise("concat_project.conv.*", "concat_project.*", 2)]
        alex = [*(pointwise(f"{theirs}.*", f"{ours}.*") for theirs, ours in pairs), rename("W.1.*", "norm.*")]
        alex += [pointwise("W.*" if plain else "W.0.*", "out.*"), pointwise("concat_project.0.*", "concat_project.*", 2)]
        return KeyMap("mmcv", tuple(mmcv)), KeyMap("AlexHex7", tuple(alex))

    def forward(
        self, x: Float[Tensor, "b channels *space"], return_weights: bool = False
    ) -> Float[Tensor, "b channels *space"] | tuple[Tensor, Tensor]:
        """Returns the map, or that and the weights (B, N, M) of queries and keys in row-major order."""
        q, k, v = self._embed(x)
        if self.mode in SOFTMAX:
            y = pairwise_attention(q, k, v, scale=self._scale)
        else:
            y = pairwise_dot(q, k, v) if self.mode == "dot_product" else pairwise_relu(q, k, v)
        out = x + self.norm(project_to_map(y, self.out.weight, self.out.bias, x.shape[2:]))
        return (out, self._weights(q, k)) if return_weights else out

    def weights(self, x: Float[Tensor, "b channels *space"], *, queries: Tensor | None = None) -> Tensor:
        """The weights of R chosen positions alone, (B, R, M); of all if None."""
        q, k, _ = self._embed(x)
        return self._weights(q if queries is None else q[:, queries], k)

    @property
    def _scale(self) -> float:
        return self.hidden_channels**-0.5 if self.use_scale and self.mode == "embedded_gaussian" else 1.0

    def _weights(self, q: Tensor, k: Tensor) -> Tensor:
        kind = "softmax" if self.mode in SOFTMAX else "dot" if self.mode == "dot_product" else "relu"
        return affinity_weights(q, k, kind, scale=self._scale)

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """theta (B, N, d), phi (B, M, d), g (B, M, d); "concatenation": w . theta (B, N), w . phi (B, M), g."""
        check_map(x, self.channels, self.dims)
        halved = x.shape[-2:] if self.dims > 1 else x.shape[-1:]
        require(not self.sub_sample or min(halved) > 1, "sub_sample=True needs a size of 2 on the axes it halves, got {}", tuple(halved))
        check_batch_statistics(self.norm, x.numel() // self.channels, "a batch of one 1-position map")
        rows, size, d, later = flatten_space(x), x.shape[2:], self.hidden_channels, self.sub_sample and not self.pool_first
        if self.theta is None or self.phi is None:
            rows = rows.contiguous()
            key = flatten_space(halve(x)).contiguous() if self.sub_sample else rows
            v = project_rows(rows if later else key, self.g.weight, self.g.bias)
            return rows, key, halve_rows(v, size) if later else v
        query, key, w = (self.theta.weight, self.theta.bias), (self.phi.weight, self.phi.bias), None
        if self.concat_project is not None:
            w = self.concat_project.weight.unflatten(1, (2, d))
            query = (w[:, 0] @ query[0], (w[:, 0] * query[1]).sum(1))
            key = key if later else (w[:, 1] @ key[0], (w[:, 1] * key[1]).sum(1))
        weight, bias = (torch.cat(parts) for parts in zip(query, key, (self.g.weight, self.g.bias), strict=True))
        a = query[0].shape[0]
        if self.sub_sample and self.pool_first:
            q, kv = project_rows(rows, weight[:a], bias[:a]), project_rows(flatten_space(halve(x)), weight[a:], bias[a:])
        else:
            q, kv = project_rows(rows, weight, bias).tensor_split((a,), 2)
            kv = halve_rows(kv, size) if later else kv
        k, v = kv[..., :-d], kv[..., -d:]
        return (q, k, v) if w is None else (q[..., 0], k @ w[0, 1] if later else k[..., 0], v)


def _add_bias(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
    weight, *mean = tensors
    return [weight.flatten(1), weight.new_zeros(weight.shape[0]), *mean]


def _drop_bias(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
    """mmcv's last layer has no bias under a norm: a module whose bias is in use cannot be written so."""
    if bool(module.state_dict()["out.bias"].any()):
        raise RuntimeError("out.bias is not zero")
    return [tensors[0].reshape(*tensors[0].shape, *[1] * getattr(module, "dims", 2))]


def _bias_in_mean(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
    """Batch statistics take a constant out again, and a running mean that is smaller by it does so in evaluation."""
    weight, bias, mean = tensors
    return [weight.reshape(*weight.shape, *[1] * getattr(module, "dims", 2)), mean - bias]
