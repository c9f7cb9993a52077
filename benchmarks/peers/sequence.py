"""Public forms of sequence mechanisms, re-expressed for timing: the same operations in the same order, on the same weights.

Each takes one of our modules and copies its weights, so outputs must be equal; None where it has no such options.
"""

import copy
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.official import to_official


class TorchMultihead(nn.Module):
    """nn.MultiheadAttention in eval with need_weights=False, which takes torch's own fast path."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(ours.dim, ours.num_heads, dropout=ours.dropout, bias=ours.qkv_bias, batch_first=True)
        self.attention.load_state_dict(to_official(ours, "torch.nn.MultiheadAttention"))

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class MaskedSDPA(nn.Module):
    """What users write for a sparse pattern: scaled_dot_product_attention under a boolean N x N mask, kept between calls."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.pattern, self.mask = ours.num_heads, ours.allowed, None
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
            for linear in (ours.q_proj, ours.k_proj, ours.v_proj, ours.out_proj)
        )
        self.load_state_dict(ours.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape[-1] != x.shape[1]:
            self.mask = self.pattern.mask(x.shape[1], self.num_heads, x.device)[None]  # four axes: with three the kernel stores all weights
        q, k, v = (p(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2).flatten(2))


class Projected(nn.Module):
    """Our linear layers by name, and heads as the public codes cut them."""

    def __init__(self, ours: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.num_heads = ours.num_heads
        for name in names:
            setattr(self, name, copy.deepcopy(getattr(ours, name)))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class BucketedLocal(Projected):
    """local-attention: buckets of queries beside their own keys and those of the bucket before, concatenated; scores stored, masked twice."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__(ours, ("q_proj", "k_proj", "v_proj", "out_proj"))
        self.window = ours.stride

    def around(self, x: Tensor, pad: float = 0.0) -> Tensor:
        before = F.pad(x, (0, 0) * (x.ndim - 2) + (1, 0), value=pad)
        return torch.cat((before[:, :-1], before[:, 1:]), 2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (self.heads(p(x)).flatten(0, 1).unflatten(1, (-1, self.window)) for p in (self.q_proj, self.k_proj, self.v_proj))
        at = torch.arange(n, device=x.device, dtype=x.dtype).view(1, -1, self.window, 1)
        i, j = at, self.around(at, -1.0).transpose(2, 3)
        scores = torch.einsum("bwie,bwje->bwij", q * q.shape[-1] ** -0.5, self.around(k))
        lowest = -torch.finfo(scores.dtype).max
        scores = scores.masked_fill((i < j) | (i >= j + self.window), lowest).masked_fill(j == -1, lowest)
        out = torch.einsum("bwij,bwje->bwie", scores.softmax(-1), self.around(v))
        return self.out_proj(out.flatten(1, 2).unflatten(0, (b, -1)).transpose(1, 2).flatten(2))


class PublicPerformer(Projected):
    """performer-pytorch: the projection repeated for every sample and head, features stored, numerator and denominator apart."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__(ours, ("q_proj", "k_proj", "v_proj", "out_proj"))
        self.register_buffer("projection", ours.projection.clone())
        self.eps = ours.eps

    def features(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        scale = x.shape[-1] ** -0.25
        projected = torch.einsum("bhnd,bhmd->bhnm", scale * x, self.projection.expand(*x.shape[:2], -1, -1).contiguous())
        half = ((scale * x) ** 2).sum(-1, keepdim=True) / 2
        return self.projection.shape[0] ** -0.5 * (torch.exp(projected - half - projected.amax(axes, keepdim=True).detach()) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.features(q, (-1,)), self.features(k, (-1, -2))
        return self.out_proj(self.mix(q, k, v).transpose(1, 2).flatten(2))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inverse = 1.0 / torch.einsum("bhnm,bhm->bhn", q, k.sum(-2))
        return torch.einsum("bhme,bhnm,bhn->bhne", torch.einsum("bhnm,bhne->bhme", k, v), q, inverse)


class PublicCausalPerformer(PublicPerformer):
    """performer-pytorch without its CUDA extension: cumulative sums of outer products, 128 positions at a time."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sums, products, out = 0.0, 0.0, []
        for a, b, c in zip(*(t.split(128, -2) for t in (q, k, v)), strict=True):
            sums = sums + b.cumsum(-2)
            products = products + torch.einsum("bhnm,bhne->bhnme", b, c).cumsum(-3)
            out.append(torch.einsum("bhnme,bhnm,bhn->bhne", products, a, 1.0 / (a * (sums + 1e-6)).sum(-1)))
            sums, products = sums[..., -1:, :], products[..., -1:, :, :]
        return torch.cat(out, -2)


class PublicLuna(Projected):
    """fairseq-apollo: time first, heads folded into the batch, explicit softmax for pack and unpack."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__(ours, ("pq_proj", "pc_proj", "q_proj", "c_proj", "out_proj"))
        self.memory = nn.Parameter(ours.memory.detach().clone())

    def folded(self, x: Tensor) -> Tensor:
        return x.contiguous().view(x.shape[0], x.shape[1] * self.num_heads, -1).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        (n, b, dim), scale = x.shape, (x.shape[2] // self.num_heads) ** -0.5
        memory = self.memory[:, None].expand(-1, b, -1)
        keys = self.folded(self.pc_proj(x))
        packed = torch.bmm(torch.bmm(self.folded(self.pq_proj(memory)) * scale, keys.transpose(1, 2)).softmax(-1), keys)
        packed = packed.transpose(0, 1).contiguous().view(-1, b, dim)
        keys = self.folded(self.c_proj(packed))
        out = torch.bmm(torch.bmm(self.folded(self.q_proj(x)) * scale, keys.transpose(1, 2)).softmax(-1), keys)
        return self.out_proj(out.transpose(0, 1).contiguous().view(n, b, dim)).transpose(0, 1)


class PublicCausalLuna(PublicLuna):
    """fairseq-apollo's parallel causal form: outer products of every position, then their running sum."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        (n, b, dim), scale = x.shape, (x.shape[2] // self.num_heads) ** -0.5
        count = torch.arange(1, n + 1, dtype=x.dtype)[:, None]
        slots = self.folded(self.pq_proj(self.memory[:, None].expand(-1, b, -1)) * scale)
        w = F.softplus(torch.bmm(self.folded(self.pc_proj(x)), slots.transpose(1, 2)), beta=math.log(2))
        q, k = self.folded(self.q_proj(x) * scale), self.folded(self.c_proj(x))
        a = (torch.einsum("bnd,bndl->bnl", q, (k[..., None] * w[:, :, None]).cumsum(1)) / count).softmax(-1)
        out = torch.einsum("bnl,bnld->bnd", a, (w[..., None] * k[:, :, None]).cumsum(1)) / count
        return self.out_proj(out.transpose(0, 1).contiguous().view(n, b, dim)).transpose(0, 1)


class PublicEfficient(Projected):
    """linear-attention-transformer: two softmaxes and two einsums on (batch, heads, positions, channels)."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__(ours, ("queries", "keys", "values", "reprojection"))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(p(x)) for p in (self.queries, self.keys, self.values))
        context = torch.einsum("bhnd,bhne->bhde", k.softmax(-2), v)
        return self.reprojection(torch.einsum("bhnd,bhde->bhne", q.softmax(-1), context).transpose(1, 2).reshape(x.shape))


def _performer(ours: nn.Module) -> nn.Module:
    return (PublicCausalPerformer if ours.causal else PublicPerformer)(ours)


def _luna(ours: nn.Module) -> nn.Module:
    return (PublicCausalLuna if ours.causal else PublicLuna)(ours)


def _masked(ours: nn.Module) -> nn.Module | None:
    return None if ours.pattern == "local" else MaskedSDPA(ours)


def _bucketed(ours: nn.Module) -> nn.Module | None:
    return BucketedLocal(ours) if ours.pattern == "local" else None


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module | None]]] = {
    "efficient": {"linear-attention": PublicEfficient},
    "luna": {"fairseq-apollo": _luna},
    "multi_head": {"nn.MultiheadAttention": TorchMultihead},
    "performer": {"performer-pytorch": _performer},
    "sparse": {"masked SDPA": _masked, "local-attention": _bucketed},
}
