"""Invariant point attention (algorithm 22, of the monomer): attention over residues that also compares points placed by their frames."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...errors import require
from ...ops._precision import at_least_float32, full_precision
from ...validate import check_mask, check_tokens
from .checks import check_frames, check_pair, check_widths
from .layers import linear


class Points(nn.Module):
    """Points in the frame of each residue: (B, N, H, P, 3). The layer's rows are all x, then all y, then all z."""

    def __init__(self, dim: int, num_heads: int, points: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads, self.points = num_heads, points
        self.linear = linear(dim, 3 * num_heads * points, **dd)

    def forward(self, single: Tensor) -> Tensor:
        return self.linear(single).unflatten(2, (3, self.num_heads, self.points)).movedim(2, 4)


class InvariantPointAttention(nn.Module):
    """Scores from queries and keys, from the pairs, and from the squared distances of points; rigid motions of all frames change nothing."""

    def __init__(
        self, pair_dim: int, single_dim: int = 384, head_dim: int = 16, num_heads: int = 12, num_qk_points: int = 4, num_v_points: int = 8, **dd: Any
    ) -> None:
        super().__init__()
        check_widths(single_dim=single_dim, pair_dim=pair_dim, head_dim=head_dim, num_heads=num_heads)
        check_widths(num_qk_points=num_qk_points, num_v_points=num_v_points)
        self.single_dim, self.pair_dim, self.head_dim, self.num_heads = single_dim, pair_dim, head_dim, num_heads
        self.num_qk_points, self.num_v_points = num_qk_points, num_v_points
        self.linear_q = linear(single_dim, num_heads * head_dim, **dd)
        self.linear_kv = linear(single_dim, 2 * num_heads * head_dim, **dd)
        self.linear_q_points = Points(single_dim, num_heads, num_qk_points, **dd)
        self.linear_kv_points = Points(single_dim, num_heads, num_qk_points + num_v_points, **dd)
        self.linear_b = linear(pair_dim, num_heads, **dd)
        self.head_weights = nn.Parameter(torch.full((num_heads,), math.log(math.e - 1), **dd))  # softplus of it is 1
        self.linear_out = linear(num_heads * (head_dim + 4 * num_v_points + pair_dim), single_dim, "final", **dd)

    def forward(
        self,
        single: Float[Tensor, "b n c"],
        pair: Float[Tensor, "b n n z"],
        rotations: Float[Tensor, "b n 3 3"],
        translations: Float[Tensor, "b n 3"],
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        self._check(single, pair, rotations, translations, mask)
        place = translations - _centre(translations, mask)
        weights, v, v_points = self._attend(single, pair, rotations, place, mask)
        with full_precision(single):
            mixed = weights @ torch.cat((v, v_points.flatten(3).transpose(1, 2)), 3)
            o, o_points = mixed[..., : self.head_dim].transpose(1, 2), mixed[..., self.head_dim :].transpose(1, 2).unflatten(3, (-1, 3))
            o_points = (o_points - place[:, :, None, None].to(o.dtype)) @ rotations[:, :, None].to(o.dtype)  # the inverse of R is its transpose
            norms = (o_points.square().sum(-1) + 1e-8).sqrt()
            o_pair = weights.transpose(1, 2) @ pair.to(weights.dtype)
            found = [o.flatten(2), *(t.flatten(2) for t in o_points.unbind(-1)), norms.flatten(2), o_pair.flatten(2)]
            found = torch.cat(found, 2).to(single.dtype)
        out = self.linear_out(found)
        return out if mask is None else out.masked_fill(~mask.unsqueeze(-1), 0.0)

    def weights(
        self, single: Tensor, pair: Tensor, rotations: Tensor, translations: Tensor, mask: Tensor | None = None, *, queries: Tensor | None = None
    ) -> Tensor:
        """(B, H, N, N); for chosen residues, (B, H, chosen, N)."""
        self._check(single, pair, rotations, translations, mask)
        return self._attend(single, pair, rotations, translations - _centre(translations, mask), mask, queries)[0]

    def _attend(
        self, single: Tensor, pair: Tensor, rotations: Tensor, place: Tensor, mask: Tensor | None, queries: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weights, the values (B, H, N, c), and the points that are values (B, N, H, P, 3), in at least float32."""
        own, asked = (t if queries is None else t[:, queries] for t in (single, pair))
        frames = (rotations, place) if queries is None else (rotations[:, queries], place[:, queries])
        q, pairs = self.linear_q(own).unflatten(2, (self.num_heads, -1)), self.linear_b(asked)
        k, v = self.linear_kv(single).unflatten(2, (self.num_heads, -1)).chunk(2, 3)
        q_points, kv_points = self.linear_q_points(own), self.linear_kv_points(single)
        with full_precision(single):
            dtype = at_least_float32(single)
            q_points = _to_global(q_points.to(dtype), *frames)
            k_points, v_points = _to_global(kv_points.to(dtype), rotations, place).split((self.num_qk_points, self.num_v_points), 3)
            # -w/2 |q - k|^2 = w q k - w/2 |k|^2 - w/2 |q|^2, and the softmax over k does not see the last.
            w = (F.softplus(self.head_weights.to(dtype)) * (3 * 9 * self.num_qk_points / 2) ** -0.5)[:, None]
            queries_ = torch.cat((q.to(dtype) * (3 * self.head_dim) ** -0.5, q_points.flatten(3) * w), 3).transpose(1, 2)
            keys = torch.cat((k.to(dtype), k_points.flatten(3)), 3).transpose(1, 2)
            lengths = k_points.square().sum((3, 4)).mT * (-0.5 * w)
            scores = queries_ @ keys.mT + lengths[:, :, None] + pairs.to(dtype).movedim(3, 1) * 3**-0.5
            if mask is None:
                return scores.softmax(-1), v.to(dtype).transpose(1, 2), v_points
            hidden = ~mask[:, None, None]
            weights = scores.masked_fill(hidden, torch.finfo(dtype).min).softmax(-1).masked_fill(hidden, 0.0)
            return weights, v.to(dtype).transpose(1, 2), v_points

    def _check(self, single: Tensor, pair: Tensor, rotations: Tensor, translations: Tensor, mask: Tensor | None) -> None:
        check_tokens(single, self.single_dim, "single", "single_dim")
        require(single.shape[1] > 0, "single has no residue: {}", tuple(single.shape))
        check_pair(pair, self.pair_dim, like=("single", single, 1))
        check_frames(single, rotations, translations)
        check_mask(mask, *single.shape[:2], name="mask")


def _to_global(points: Tensor, rotations: Tensor, translations: Tensor) -> Tensor:
    """R p + t of points (B, N, H, P, 3)."""
    return points @ rotations[:, :, None].to(points.dtype).mT + translations[:, :, None, None].to(points.dtype)


def _centre(translations: Tensor, mask: Tensor | None) -> Tensor:
    """Where the residues are, (B, 1, 3). Its place changes nothing but rounding, so no gradient flows through it."""
    t = translations.detach()
    if mask is None:
        return t.mean(1, keepdim=True)
    real = mask.unsqueeze(-1).to(t.dtype)
    return (t * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
