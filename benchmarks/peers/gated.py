"""The public forms of gated attention, lucidrains/FLASH-pytorch, re-expressed for timing: the same operations in the same order, our weights."""

import copy
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PublicT5(nn.Module):
    """The bias of every pair looked up in an embedding, at each call."""

    def __init__(self, weight: Tensor, scale: float, causal: bool) -> None:
        super().__init__()
        self.embedding, self.scale, self.causal = nn.Embedding(*weight.shape), scale, causal
        self.embedding.load_state_dict({"weight": weight})

    def forward(self, scores: Tensor) -> Tensor:
        i, j = scores.shape[-2:]
        back = -(torch.arange(j)[None, :] - torch.arange(i)[:, None])
        buckets, first = 32, 0
        if self.causal:
            back = torch.max(back, torch.zeros_like(back))
        else:
            buckets //= 2
            first = (back < 0).long() * buckets
            back = torch.abs(back)
        exact = buckets // 2
        far = exact + (torch.log(back.float() / exact) / math.log(128 / exact) * (buckets - exact)).long()
        far = torch.min(far, torch.full_like(far, buckets - 1))
        return self.embedding(first + torch.where(back < exact, back, far))[..., 0] * self.scale


class _Public(nn.Module):
    """Norm, a projection to value and gate, one to queries and keys, offset and scale, output."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.causal, self.norm, self.bias_scale = ours.causal, copy.deepcopy(ours.norm), ours.qk_dim**0.5
        e, s, dim = ours.hidden_dim, ours.qk_dim, ours.dim
        self.to_hidden, self.to_qk, self.to_out = nn.Linear(dim, 2 * e), nn.Linear(dim, s), copy.deepcopy(ours.out_proj)
        for name in ("weight", "bias"):
            gate, value, z = getattr(ours.proj, name).detach().split([e, e, s])
            self.to_hidden.load_state_dict({name: torch.cat((value, gate))}, strict=False)
            self.to_qk.load_state_dict({name: z.clone()}, strict=False)
        self.gamma, self.beta = (nn.Parameter(t.detach().clone()) for t in (ours.gamma, ours.beta))
        self.rel_pos_bias = PublicT5(ours.rel_pos_bias.weight.detach(), self.bias_scale, ours.causal)

    def views(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        normed = self.norm(x)
        value, gate = F.silu(self.to_hidden(normed)).chunk(2, dim=-1)
        out = torch.einsum("...d,hd->...hd", F.silu(self.to_qk(normed)), self.gamma) + self.beta
        return value, gate, out.unbind(dim=-2)


class PublicGAU(_Public):
    """The bias is added before the division by N there: it gets N times the weights."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[-2]
        value, gate, (q, k) = self.views(x)
        scores = torch.einsum("bid,bjd->bij", q, k)
        self.rel_pos_bias.scale = self.bias_scale * n
        scores = scores + self.rel_pos_bias(scores)
        weights = F.relu(scores / n) ** 2
        if self.causal:
            weights = weights.masked_fill(torch.ones((n, n), dtype=torch.bool).triu(1), 0.0)
        return self.to_out(torch.einsum("bij,bjd->bid", weights, value) * gate) + x


class PublicFLASH(_Public):
    """Five tensors padded and cut into groups, the sums of every group stored."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__(ours)
        self.size = ours.chunk_size

    def forward(self, x: Tensor) -> Tensor:
        n, g = x.shape[-2], self.size
        value, gate, (q, k, lq, lk) = self.views(x)
        padding, mask = -n % g, None
        if padding:
            q, k, lq, lk, value = (F.pad(t, (0, 0, 0, padding)) for t in (q, k, lq, lk, value))
            mask = F.pad(torch.ones(x.shape[:2], dtype=torch.bool), (0, padding)).unflatten(1, (-1, 1, g))
        q, k, lq, lk, value = (t.unflatten(1, (-1, g)) for t in (q, k, lq, lk, value))
        scores = torch.einsum("...id,...jd->...ij", q, k) / g
        weights = F.relu(scores + self.rel_pos_bias(scores)) ** 2
        if mask is not None:
            weights = weights.masked_fill(~mask, 0.0)
        if self.causal:
            weights = weights.masked_fill(torch.ones((g, g), dtype=torch.bool).triu(1), 0.0)
        local = torch.einsum("...ij,...jd->...id", weights, value)
        if self.causal:
            sums = torch.einsum("bgnd,bgne->bgde", lk, value) / g
            sums = F.pad(sums.cumsum(dim=1), (0, 0, 0, 0, 1, -1))
            across = torch.einsum("bgde,bgnd->bgne", sums, lq)
        else:
            across = torch.einsum("bgnd,bde->bgne", lq, torch.einsum("bgnd,bgne->bde", lk, value) / n)
        local, across = (t.flatten(1, 2)[:, :n] for t in (local, across))
        return self.to_out(gate * (local + across)) + x


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "gau": {"FLASH-pytorch GAU": PublicGAU},
    "mixed_chunk": {"FLASH-pytorch": PublicFLASH},
}
