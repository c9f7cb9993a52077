"""Inside the chunks, a block of weights at a time: they need no sum over other blocks, so none is kept, and the gradient computes them again.

Small chunks make one batched product; a long one is cut into rows, which in causal form take the keys up to their last one. The bias of a block is
a view of the vector over relative positions, the gradient of that vector a sum along the diagonals.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cuts import Group, groups, limit_of

CAUSAL_ROWS = 128


@dataclass(frozen=True)
class Inputs:
    """As in `gated_attention`, with `length` L of a chunk, and the masks negated: True = hidden."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    hidden_keys: Tensor | None
    hidden_pairs: Tensor | None
    seed: int
    length: int
    act: str
    causal: bool
    dropout: float

    def groups(self) -> Iterator[Group]:
        return groups(self.v.shape[0], self.v.shape[1], self.length, self.length**2, limit_of(self.v))


def spans(length: int, causal: bool, limit: int) -> Iterator[tuple[int, int, int]]:
    """First row and end of a block of weights, and how many keys it meets."""
    rows = max(16, min(limit // max(length, 1), CAUSAL_ROWS if causal else length))
    for first in range(0, length, rows):
        stop = min(first + rows, length)
        yield first, stop, stop if causal else length


# From the gradient of the weights, which it overwrites, to that of the scores.
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    """The weights of rows first..stop over `keys` keys of each chunk of a group: (chunks, rows, keys)."""

    group: Group
    first: int
    stop: int
    keys: int
    given: Inputs

    @property
    def window(self) -> slice:
        """The relative positions that the block meets, in the bias."""
        return slice(self.given.length - self.stop, self.given.length - 1 - self.first + self.keys)

    def hide(self, t: Tensor, value: float) -> Tensor:
        """Overwrite what the masks hide."""
        given = self.given
        if given.causal:
            square = t[..., self.first :]
            square.masked_fill_(torch.ones(square.shape[-2:], dtype=torch.bool, device=t.device).triu_(1), value)
        if given.hidden_keys is not None:
            t.masked_fill_(self.group.take(given.hidden_keys[..., None])[:, : self.keys].mT, value)
        if given.hidden_pairs is not None:
            b, n = given.v.shape[:2]
            t.masked_fill_(given.hidden_pairs.expand(b, n, n)[self.group.samples, self.first : self.stop, : self.keys], value)
        return t

    def weights(self, q: Tensor, k: Tensor) -> tuple[Tensor, Change]:
        """From the rows of q and the keys."""
        scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
        if self.given.bias is not None:
            scores += self.given.bias[self.window].unfold(0, self.keys, 1).flip(0)
        if self.given.act == "softmax":
            a = self.hide(self.hide(scores, torch.finfo(scores.dtype).min).softmax(-1), 0.0)
            return a, lambda grad: grad.sub_((grad * a).sum(-1, keepdim=True)).mul_(a)
        if self.given.act == "laplace":
            scores -= math.sqrt(0.5)
            a = self.hide((scores * math.sqrt(2 * math.pi)).erf_().add_(1).mul_(0.5), 0.0)
            return a, lambda grad: grad.mul_(self.hide(scores.square_().mul_(-2 * math.pi).exp_().mul_(math.sqrt(2)), 0.0))
        positive = self.hide(scores.relu_(), 0.0)
        return positive.square(), lambda grad: grad.mul_(positive).mul_(2)

    def keep(self, like: Tensor) -> Tensor | None:
        """The factors of dropout, the same whenever asked; None without dropout."""
        if not self.given.dropout:
            return None
        stays, number = 1 - self.given.dropout, self.group.samples.start * self.given.v.shape[1] + self.group.tokens.start + self.first
        generator = torch.Generator(like.device).manual_seed(self.given.seed + number)
        return torch.empty_like(like).bernoulli_(stays, generator=generator).div_(stays)

    def add_bias_gradient(self, total: Tensor, change: Tensor) -> None:
        change = change.sum(0).flip(0)
        rows, keys = change.shape  # read in rows one shorter than they are long, each diagonal is a column
        total[self.window] += F.pad(change, (0, rows)).flatten()[:-rows].view(rows, keys + rows - 1).sum(0)


def blocks(group: Group, given: Inputs) -> Iterator[tuple[Block, slice, slice]]:
    """The blocks of a group, with their rows and their keys."""
    for first, stop, keys in spans(group.length, given.causal, limit_of(given.v)):
        yield Block(group, first, stop, keys, given), slice(first, stop), slice(0, keys)


def forward(given: Inputs) -> Tensor:
    out = given.v.new_empty(given.v.shape)
    for group in given.groups():
        q, k, v = (group.take(t) for t in (given.q, given.k, given.v))
        part = v.new_empty(v.shape)
        for block, rows, keys in blocks(group, given):
            weights, _ = block.weights(q[:, rows], k[:, keys])
            kept = block.keep(weights)
            part[:, rows] = (weights if kept is None else weights.mul_(kept)).to(v.dtype) @ v[:, keys]
        group.put(out, part)
    return out


def backward(grad: Tensor, given: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias; that of no bias is empty."""
    dq, dk, dv = (t.new_empty(t.shape) for t in (given.q, given.k, given.v))
    dbias = grad.new_empty(0) if given.bias is None else torch.zeros_like(given.bias)
    for group in given.groups():
        q, k, v, g = (group.take(t) for t in (given.q, given.k, given.v, grad))
        part_q, dtype = q.new_empty(q.shape), torch.promote_types(v.dtype, torch.float32)
        part_k, part_v = (torch.empty_like(t, dtype=dtype) for t in (k, v))
        for block, rows, keys in reversed(list(blocks(group, given))):
            last = block.stop == group.length  # it comes first, and meets all keys
            weights, change = block.weights(q[:, rows], k[:, keys])
            toward = (g[:, rows] @ v[:, keys].mT).to(weights.dtype)
            kept = block.keep(weights)
            if kept is not None:
                toward, weights = toward.mul_(kept), weights * kept
            _add_product(part_v[:, keys], weights.to(v.dtype).mT, g[:, rows], last)
            scores = change(toward)
            if given.bias is not None:
                block.add_bias_gradient(dbias, scores)
            scores = scores.to(q.dtype)
            part_q[:, rows] = scores @ k[:, keys]
            _add_product(part_k[:, keys], scores.mT, q[:, rows], last)
        for total, part in ((dq, part_q), (dk, part_k), (dv, part_v)):
            group.put(total, part)
    return dq, dk, dv, dbias


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a b, or total = a b if it is the first."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b, beta=0 if first else 1)
    else:
        total.copy_(a @ b) if first else total.add_(a @ b)
