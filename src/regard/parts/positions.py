"""Where a token stands: rotary embedding, ALiBi slopes, learned relative biases."""

import math

import torch
from torch import Tensor, nn

from ..errors import require
from ..validate import check_option


def rotary(x: Tensor, positions: Tensor, rope_dim: int, base: float, interleaved: bool) -> Tensor:
    """Rotate pairs of the first `rope_dim` channels of x (B, H, N, d) by position * base^(-2 j / rope_dim).

    Pairs are (j, j + rope_dim / 2), or (2 j, 2 j + 1) when interleaved. `positions` is (N,) or (B, N). Su et al., arXiv 2104.09864.
    """
    theta = base ** (-torch.arange(0, rope_dim, 2, device=x.device, dtype=torch.float32) / rope_dim)
    angle = positions.to(torch.float32)[..., None] * theta
    angle = angle[:, None] if positions.ndim == 2 else angle
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    turned, rest = x[..., :rope_dim], x[..., rope_dim:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def rotate(x: Tensor, positions: Tensor | None, name: str, rope_dim: int, base: float, interleaved: bool) -> Tensor:
    """`rotary` at `positions`, (N,) or (B, N), or at 0, 1, ... if None; `name` is what errors call them."""
    positions = torch.arange(x.shape[2], device=x.device) if positions is None else positions
    fits = positions.shape[-1] == x.shape[2] and positions.ndim in (1, 2)
    require(fits, "{} must be (positions,) or (batch, positions) for {} positions, got {}", name, x.shape[2], tuple(positions.shape))
    return rotary(x, positions, rope_dim, base, interleaved)


def alibi_slopes(num_heads: int) -> list[float]:
    """The fixed slopes of ALiBi (Press et al., arXiv 2108.12409), with the reference recipe for a number of heads that is no power of two."""
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    doubled = [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * power + 1)]
    return slopes + doubled[0::2][: num_heads - power]


def offsets(n: int, m: int, queries: Tensor | None, device: torch.device) -> Tensor:
    """Key minus query, (n, m), queries aligned to the end of the keys; the rows of chosen `queries` alone if they are given."""
    queries = torch.arange(n, device=device) if queries is None else queries
    return torch.arange(m, device=device) - (queries[:, None] + (m - n))


class RelativeBias(nn.Module):
    """A learned score per head and relative position, added before the softmax.

    kind="t5": `weight` (num_buckets, H), logarithmic buckets up to max_distance (Raffel et al., arXiv 1910.10683).
    kind="toeplitz": `weight` (H, 2 max_len - 1), one entry for each distance.
    """

    def __init__(
        self, kind: str, num_heads: int, bidirectional: bool, max_len: int | None, num_buckets: int, max_distance: int, device=None, dtype=None
    ) -> None:
        super().__init__()
        check_option(kind, ("t5", "toeplitz"), "rel_pos_bias")
        self.kind, self.bidirectional, self.max_len = kind, bidirectional, max_len
        self.num_buckets, self.max_distance = num_buckets, max_distance
        if kind == "toeplitz":
            require(max_len is not None and max_len > 0, "rel_pos_bias='toeplitz' needs max_len, the longest sequence; got max_len={}", max_len)
            shape = (num_heads, 2 * (max_len or 0) - 1)
        else:
            require(num_buckets >= 4 and num_buckets % 2 == 0, "num_buckets={} must be even and at least 4", num_buckets)
            require(max_distance > num_buckets, "max_distance={} must be larger than num_buckets={}", max_distance, num_buckets)
            shape = (num_buckets, num_heads)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, n: int, m: int, queries: Tensor | None = None) -> Tensor:
        """(H, n, m), or (H, R, m) for R chosen queries."""
        offset = offsets(n, m, queries, self.weight.device)
        if self.kind == "toeplitz":
            assert self.max_len is not None
            longest = max(n, m)
            require(longest <= self.max_len, "a sequence of {} is longer than max_len={} of rel_pos_bias='toeplitz'", longest, self.max_len)
            return self.weight[:, self.max_len - 1 - offset]
        return self.weight[self._bucket(offset)].permute(2, 0, 1)

    def _bucket(self, offset: Tensor) -> Tensor:
        """Key minus query -> bucket: half of the buckets exact, the others logarithmic; one half for each side when bidirectional."""
        buckets, base = self.num_buckets, torch.zeros_like(offset)
        if self.bidirectional:
            buckets //= 2
            base, offset = (offset > 0) * buckets, offset.abs()
        else:
            offset = (-offset).clamp_min(0)
        exact = buckets // 2
        far = exact + (torch.log(offset.clamp_min(1).float() / exact) / math.log(self.max_distance / exact) * (buckets - exact)).long()
        return base + torch.where(offset < exact, offset, far.clamp_max(buckets - 1))


def position_bias(
    n: int, m: int, attn_bias: Tensor | None, alibi_heads: int, relative: RelativeBias | None, like: Tensor, queries: Tensor | None = None
) -> Tensor | None:
    """`attn_bias` plus ALiBi for `alibi_heads` heads (0 for none), on the device and in the dtype of `like`, plus the relative bias.

    (..., n, m), or the rows of chosen `queries`, which `attn_bias` then has already.
    """
    bias = attn_bias
    if alibi_heads:
        slopes = torch.tensor(alibi_slopes(alibi_heads), device=like.device, dtype=like.dtype)
        alibi = -slopes[:, None, None] * offsets(n, m, queries, like.device).abs()
        bias = alibi if bias is None else bias + alibi
    if relative is not None:
        bias = relative(n, m, queries) if bias is None else bias + relative(n, m, queries)
    return bias
