r"""Counting objects from attention: boxes that overlap and are attended alike count once.

Zhang, Hare, Prügel-Bennett, "Learning to Count Objects in Natural Images for Visual Question Answering", ICLR 2018. arXiv:1802.05766.
"""

import torch
from torch import Tensor, nn

from ..ops._precision import at_least_float32, full_precision

PIECES, FUNCTIONS = 16, 16  # the authors make 16 functions and use the first 8


class Counter(nn.Module):
    """A soft count from 0 to `objects`, as objects + 1 features, from the `objects` most attended boxes.

    `weight` (16, 17) holds the slopes of the piecewise linear functions f0 to f15.
    """

    def __init__(self, objects: int, device=None, dtype=None) -> None:
        super().__init__()
        self.objects = objects
        self.weight = nn.Parameter(torch.ones(FUNCTIONS, PIECES + 1, device=device, dtype=dtype))
        with torch.no_grad():
            self.weight[:, 0] = 0

    def forward(self, boxes: Tensor, logits: Tensor) -> Tensor:
        """boxes (B, N, 4) as x1, y1, x2, y2 and attention logits (B, G, N) of their objects -> (B, G, objects + 1), in float32 at least."""
        wide = at_least_float32(logits)
        with full_precision(logits):
            top, index = logits.to(wide).topk(self.objects, -1, sorted=False)
            chosen = boxes.to(wide)[:, None].expand(-1, logits.shape[1], -1, -1).gather(2, index[..., None].expand(-1, -1, -1, 4))
            return self._features(top.sigmoid(), 1 - overlap(chosen))

    def _features(self, a: Tensor, distance: Tensor) -> Tensor:
        f = [monotone(w) for w in self.weight.to(a.dtype)[:8]]
        both = a[..., :, None] * a[..., None, :]
        single = f[3](both) * f[4](distance)
        alike = f[2](1 - (single[..., :, None] - single[..., None, :]).abs()).prod(-3) * f[2](1 - (a[..., :, None] - a[..., None, :]).abs())
        rows = alike.sum(-1)
        score = f[0](both) * f[1](distance) / (rows[..., :, None] * rows[..., None, :])
        count = (score.sum((-2, -1)) + (f[0](a * a) / rows).sum(-1) + 1e-20).sqrt().clamp(0, self.objects)
        near = (1 - (count[..., None] - torch.arange(self.objects + 1, device=a.device)).abs()).clamp(min=0)
        sure = f[7]((f[5](a) - 0.5).abs().mean(-1) + (f[6](distance) - 0.5).abs().mean((-2, -1)))
        return near * sure[..., None]


def monotone(weight: Tensor):
    """The rising piecewise linear function on [0, 1] with f(1) = 1 whose slopes go as |weight| (17); weight[0] is f(0)."""
    p = weight.abs() / weight.abs().sum()
    height = p.cumsum(0)

    def f(x: Tensor) -> Tensor:
        y = PIECES * x
        piece = y.detach().long().clamp(0, PIECES)
        return height[piece] + (y - piece) * p[(piece + 1).clamp(max=PIECES)]

    return f


def overlap(boxes: Tensor) -> Tensor:
    """Intersection over union of all pairs of boxes (..., N, 4): (..., N, N)."""
    low, high = boxes.split(2, -1)
    area = (high - low).clamp(min=0).prod(-1)
    sides = torch.minimum(high[..., :, None, :], high[..., None, :, :]) - torch.maximum(low[..., :, None, :], low[..., None, :, :])
    shared = sides.clamp(min=0).prod(-1)
    return shared / (area[..., :, None] + area[..., None, :] - shared + 1e-12)
