"""Public forms of block-structured attention, re-expressed for timing: the same operations in the same order, on the same weights."""

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .sequence import MaskedSDPA


class PublicMRA(nn.Module):
    """mlpen/mra-attention (MRA-2, no mask) with its torch forms for the CUDA kernels: blocks gathered, row maxima scattered, sums by index_add."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.b, self.resolution = ours.num_heads, ours.block_size, ours.resolution
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (copy.deepcopy(getattr(ours, f"{n}_proj")) for n in ("q", "k", "v", "out"))

    def forward(self, x: Tensor) -> Tensor:
        (batch, length, _), b = x.shape, self.b
        n = length // b
        q, k, v = (self.heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        scale = 1 / math.sqrt(q.shape[-1])
        q_mean, k_mean, v_mean = (t.reshape(-1, n, b, t.shape[-1]).mean(-2) for t in (q, k, v))
        low = torch.matmul(q_mean, k_mean.transpose(-1, -2)) * scale
        low_max = low.max(-1, keepdim=True).values
        with torch.no_grad():
            priority = (low - low_max).reshape(-1, n * n)
            top = priority.topk(self.resolution.refined(n), dim=-1)
            refined = (priority >= top.values.min(-1, keepdim=True).values).float().reshape(-1, n, n)
        sample = torch.arange(len(q))[:, None]
        rows = torch.div(top.indices, n, rounding_mode="floor")
        q_blocks, k_blocks, v_blocks = (t.reshape(-1, n, b, t.shape[-1]) for t in (q, k, v))
        high = torch.matmul(q_blocks[sample, rows], k_blocks[sample, top.indices % n].transpose(-1, -2)) * scale
        flat = (rows + n * sample).reshape(-1)
        with torch.no_grad():
            best = high.max(-1).values.reshape(-1, b)
            high_max = torch.full((len(q) * n, b), -1e9).scatter_reduce(0, flat[:, None].expand(-1, b), best, "amax")
        high = torch.exp(high - high_max[flat].reshape(*high.shape[:3], 1))
        part = torch.matmul(high, v_blocks[sample, top.indices % n])
        high_out = torch.zeros(len(q) * n, b, v.shape[-1]).index_add(0, flat, part.flatten(0, 1)).reshape(v.shape)
        high_sum = torch.zeros(len(q) * n, b).index_add(0, flat, high.sum(-1).flatten(0, 1)).reshape(-1, length)
        weights = torch.exp(low - low_max - 1e4 * refined) * b
        low_out = torch.matmul(weights, v_mean)[:, :, None].repeat(1, 1, b, 1).reshape(v.shape)
        low_sum = weights.sum(-1)[:, :, None].repeat(1, 1, b).reshape(-1, length)
        change = low_max.repeat(1, 1, b).reshape(-1, length) - high_max.reshape(-1, length)
        low_by, high_by = torch.exp(change * (change <= 0).float()), torch.exp(-change * (change > 0).float())
        out = (high_out * high_by[..., None] + low_out * low_by[..., None]) / (high_sum * high_by + low_sum * low_by + 1e-6)[..., None]
        return self.out_proj(out.reshape(batch, self.num_heads, length, -1).transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2).reshape(-1, x.shape[1], x.shape[2] // self.num_heads)


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "hypercube": {"masked SDPA": MaskedSDPA},
    "mra": {"mlpen/mra-attention": PublicMRA},
}
