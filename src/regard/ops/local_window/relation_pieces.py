"""The fast ways of `relations`: some offsets, images and rows at a time in a buffer that stays in the cache; the backward builds it again.

Maps are (channels, B, H, W), padded by the caller, so that a product over channels is one matrix product over all pixels and images. `pairs` holds
the numbers of every pair of a pixel and a pixel of its window, with a last row of ones, so that biases and sums are part of the products.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._operator import operator
from .window import chunks

Piece = tuple[Any, ...]
CACHE = 8  # a piece is this much smaller than the 8 MB of `chunks`: several buffers of its size are in use


def windows(x: Tensor, kernel: int, stride: int, dilation: int) -> Tensor:
    """A view (..., padded height, padded width) -> (..., k, k, H', W'): what each output pixel sees at each offset."""
    high, wide = (n - (kernel - 1) * dilation for n in x.shape[-2:])
    return x.unfold(-2, high, dilation).unfold(-2, wide, dilation)[..., ::stride, ::stride]


class _Pairs:
    """relu(left (x) right_j + shift) for the first rows and relu(left + right_j) for the others, after relu(given_j)."""

    def __init__(self, left: Tensor, right: Tensor, given: Tensor, shift: Tensor, kernel: int, stride: int, dilation: int) -> None:
        self.left, self.given, self.shift = left, given.unflatten(1, (kernel, kernel)), shift
        self.right = windows(right, kernel, stride, dilation).movedim(1, 3)
        self.kernel, self.split, self.products = kernel, given.shape[0], shift.shape[0]
        self.rows = given.shape[0] + left.shape[0]

    def pieces(self) -> Iterator[Piece]:
        batch, height, width = self.left.shape[1:]
        unit = CACHE * (self.rows + 1) * width * self.left.itemsize
        for y in range(self.kernel):
            for x, images, rows in chunks((self.kernel, batch, height), unit, self.left.device):
                yield y, x, images, rows

    def build(self, piece: Piece) -> Tensor:
        """(rows + 1, pairs of the piece)."""
        left, right, given = self._parts(piece)
        out = left.new_empty(self.rows + 1, *given.shape[1:])
        dots, products, sums = out[:-1].split([self.split, self.products, self.rows - self.split - self.products])
        dots.copy_(given)
        torch.mul(left[: self.products], right[: self.products], out=products).add_(self.shift[:, None, None, None, None])
        torch.add(left[self.products :], right[self.products :], out=sums)
        torch.relu_(out[:-1])
        out[-1].fill_(1)
        return out.flatten(1)

    def _parts(self, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        y, x, images, rows = piece
        return self.left[:, None, images, rows], self.right[:, y, x, images, rows], self.given[:, y, x, images, rows]

    def scatter(self, grads: "_PairGradients", piece: Piece, d: Tensor) -> None:
        """Add the gradients of a piece, those of the entries that the relu cut off being zero."""
        y, x, images, rows = piece
        left, right, given = self._parts(piece)
        d = d.view(self.rows, *given.shape[1:])
        dots, products, sums = d.split([self.split, self.products, self.rows - self.split - self.products])
        grads.given[:, y, x, images, rows] = dots
        p = self.products
        if p:
            grads.shift += products.sum((1, 2, 3, 4))
            grads.left[:p, images, rows] += (products * right[:p]).sum(1)
            products = products * left[:p]
        grads.left[p:, images, rows] += sums.sum(1)
        for i, column in enumerate(range(x.start, x.stop)):
            there = grads.windows[:, y, column, images, rows]
            there[:p] += products[:, i]
            there[p:] += sums[:, i]


class _PairGradients:
    def __init__(self, left: Tensor, right: Tensor, given: Tensor, shift: Tensor, kernel: int, stride: int, dilation: int) -> None:
        self.left, self.right, self.shift = torch.zeros_like(left), torch.zeros_like(right), torch.zeros_like(shift)
        self.dots = torch.zeros_like(given, memory_format=torch.contiguous_format)
        self.given = self.dots.unflatten(1, (kernel, kernel))
        self.windows = windows(self.right, kernel, stride, dilation).movedim(1, 3)

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.left, self.right, self.dots, self.shift


def _map(left: Tensor, right: Tensor, given: Tensor, shift: Tensor, w1: Tensor, w2: Tensor, kernel: int, stride: int, dilation: int) -> Tensor:
    out = _map_like(left, right, given, shift, w1, w2, kernel, stride, dilation)
    at = out.unflatten(2, (kernel, kernel)).movedim((1, 0), (0, 3))
    pairs = _Pairs(left, right, given, shift, kernel, stride, dilation)
    for y, x, images, rows in pairs.pieces():
        hidden = _hidden(w1, pairs.build((y, x, images, rows)))
        there = at[:, y, x, images, rows]
        there.copy_(torch.mm(w2, hidden).view(there.shape))
    return out


def _hidden(w1: Tensor, built: Tensor) -> Tensor:
    """(R + 1, pairs): relu(W1 built), and ones."""
    out = built.new_empty(w1.shape[0] + 1, built.shape[1])
    torch.mm(w1, built, out=out[:-1]).relu_()
    out[-1].fill_(1)
    return out


def _map_backward(
    dy: Tensor, left: Tensor, right: Tensor, given: Tensor, shift: Tensor, w1: Tensor, w2: Tensor, kernel: int, stride: int, dilation: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    pairs = _Pairs(left, right, given, shift, kernel, stride, dilation)
    grads = _PairGradients(left, right, given, shift, kernel, stride, dilation)
    at = dy.unflatten(2, (kernel, kernel)).movedim((1, 0), (0, 3))
    dw1, dw2 = torch.zeros_like(w1), torch.zeros_like(w2)
    for piece in pairs.pieces():
        built = pairs.build(piece)
        hidden = _hidden(w1, built)
        y, x, images, rows = piece
        d = at[:, y, x, images, rows].flatten(1)
        dw2.addmm_(d, hidden.mT)
        d = _cut(torch.mm(w2[:, :-1].mT, d), hidden[:-1])
        dw1.addmm_(d, built.mT)
        pairs.scatter(grads, piece, _cut(torch.mm(w1[:, :-1].mT, d), built[:-1]))
    return *grads.all(), dw1, dw2


def _cut(d: Tensor, activated: Tensor) -> Tensor:
    """The gradient before a relu."""
    return torch.ops.aten.threshold_backward(d, activated, 0)


def _moments(left: Tensor, right: Tensor, given: Tensor, shift: Tensor, inside: Tensor, kernel: int, stride: int, dilation: int) -> Tensor:
    pairs = _Pairs(left, right, given, shift, kernel, stride, dilation)
    out = _moments_like(left, right, given, shift, inside, kernel, stride, dilation).zero_()
    for piece in pairs.pieces():
        built = _real(pairs, piece, inside)
        out += torch.mm(built, built.mT)
    return out


def _real(pairs: _Pairs, piece: Piece, inside: Tensor) -> Tensor:
    """The pairs of a piece, zero (the ones too) where the window is outside the map."""
    built, (y, x, images, rows) = pairs.build(piece), piece
    if inside.numel():
        shape = (x.stop - x.start, images.stop - images.start, rows.stop - rows.start, -1)
        built.view(built.shape[0], *shape).mul_(inside.unflatten(0, (pairs.kernel, pairs.kernel))[y, x, None, rows])
    return built


def _moments_backward(
    dy: Tensor, left: Tensor, right: Tensor, given: Tensor, shift: Tensor, inside: Tensor, kernel: int, stride: int, dilation: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = _Pairs(left, right, given, shift, kernel, stride, dilation)
    grads = _PairGradients(left, right, given, shift, kernel, stride, dilation)
    both = (dy + dy.mT)[:-1].to(left.dtype)
    for piece in pairs.pieces():
        built = _real(pairs, piece, inside)
        pairs.scatter(grads, piece, _cut(torch.mm(both, built), built[:-1]))
    return grads.all()


def _map_like(left: Tensor, right: Tensor, given: Tensor, shift: Tensor, w1: Tensor, w2: Tensor, kernel: int, *options: Any) -> Tensor:
    return left.new_empty(left.shape[1], w2.shape[0], kernel * kernel, *left.shape[2:])


def _moments_like(left: Tensor, right: Tensor, given: Tensor, *options: Any) -> Tensor:
    rows = left.shape[0] + given.shape[0] + 1
    return left.new_empty(rows, rows, dtype=torch.float64)


def _map_flops(left: Any, right: Any, given: Any, shift: Any, w1: Any, w2: Any, kernel: int, *options: Any) -> int:
    """The two products of the network, biases not counted."""
    pairs = kernel * kernel * left[1] * left[2] * left[3]
    return 2 * pairs * ((left[0] + given[0]) * w1[0] + (w2[1] - 1) * w2[0])


def _map_backward_flops(dy: Any, left: Any, right: Any, given: Any, shift: Any, w1: Any, *rest: Any) -> int:
    """The first product once more, and the gradients of both factors of both."""
    pairs = rest[1] ** 2 * left[1] * left[2] * left[3]
    return 2 * _map_flops(left, right, given, shift, w1, *rest) + 2 * pairs * (left[0] + given[0]) * w1[0]


def _moments_flops(left: Any, right: Any, given: Any, shift: Any, inside: Any, kernel: int, *options: Any) -> int:
    return 2 * kernel * kernel * left[1] * left[2] * left[3] * (left[0] + given[0]) ** 2


def _moments_backward_flops(dy: Any, *rest: Any) -> int:
    return _moments_flops(*rest)


window_map = operator("window_map", _map, _map_backward, _map_like, tensors=6, flops=_map_flops, backward_flops=_map_backward_flops)
window_moments = operator(
    "window_moments",
    _moments,
    _moments_backward,
    _moments_like,
    tensors=5,
    wanted=(0, 1, 2, 3),
    flops=_moments_flops,
    backward_flops=_moments_backward_flops,
)


def _boxes(left: tuple[int, int, int], rows: int, x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Images and rows of a map (B, H', W') with so many rows of numbers at a time."""
    for _, images, lines in chunks((1, left[0], left[1]), CACHE * rows * left[2] * x.itemsize, x.device):
        yield images, lines


class _Patches:
    """relu(scale_j right_j + shift_j), one offset j at a time, for the channels of `right`, or those k^2 that pair j with each offset."""

    def __init__(self, right: Tensor, scale: Tensor, shift: Tensor, kernel: int, stride: int, dilation: int, pairs: bool) -> None:
        self.kernel, self.pairs = kernel, pairs
        self.seen = self.view(windows(right.contiguous(), kernel, stride, dilation))
        self.scale, self.shift = (t[..., None].unflatten(0, (kernel, -1) if pairs else (-1, 1)) for t in (scale, shift))

    def view(self, seen: Tensor) -> Tensor:
        """(channels, B, k, k, H', W') -> (channels as two axes, k, k, B, H', W')."""
        return seen.movedim(1, 3).unflatten(0, (2 * self.kernel - 1, -1) if self.pairs else (-1, 1))

    def at(self, seen: Tensor, y: int, x: int, images: slice, rows: slice) -> Tensor:
        part, k = seen[:, :, y, x, images, rows], self.kernel
        return part[k - 1 - y : 2 * k - 1 - y, k - 1 - x : 2 * k - 1 - x] if self.pairs else part

    def build(self, seen: Tensor, j: int) -> Tensor:
        scale, shift = (t[:, :, j, :, None, None] for t in (self.scale, self.shift))
        return torch.mul(seen, scale).add_(shift).relu_()


def _accumulate(right: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, kernel: int, stride: int, dilation: int, pairs: bool) -> Tensor:
    out = _accumulate_like(right, scale, shift, weight, kernel, stride, dilation, pairs)
    patches, by_offset = _Patches(right, scale, shift, kernel, stride, dilation, pairs), weight.movedim(2, 0).contiguous()
    for images, rows in _boxes((out.shape[1], out.shape[2], out.shape[3]), scale.shape[0], right):
        there = out[:, images, rows]
        total = right.new_zeros(out.shape[0], there[0].numel())
        for j, w in enumerate(by_offset):
            built = patches.build(patches.at(patches.seen, j // kernel, j % kernel, images, rows), j)
            total.addmm_(w, built.view(scale.shape[0], -1))
        there.copy_(total.view(there.shape))
    return out


def _accumulate_backward(
    dy: Tensor, right: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, kernel: int, stride: int, dilation: int, pairs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    patches, by_offset = _Patches(right, scale, shift, kernel, stride, dilation, pairs), weight.movedim(2, 0).contiguous()
    dright, dweight = torch.zeros_like(right, memory_format=torch.contiguous_format), torch.zeros_like(by_offset)
    dscale, dshift = (right.new_zeros(kernel * kernel, scale.shape[0]) for _ in range(2))
    shown = patches.view(windows(dright, kernel, stride, dilation))
    for images, rows in _boxes((dy.shape[1], dy.shape[2], dy.shape[3]), scale.shape[0], right):
        d = dy[:, images, rows].flatten(1)
        for j, w in enumerate(by_offset):
            place = (j // kernel, j % kernel, images, rows)
            seen = patches.at(patches.seen, *place)
            built = patches.build(seen, j)
            flat = built.view(scale.shape[0], -1)
            dweight[j].addmm_(d, flat.mT)
            dbuilt = _cut(torch.mm(w.mT, d), flat)
            dshift[j] += dbuilt.sum(1)
            dbuilt = dbuilt.view(built.shape)
            dscale[j] += torch.mul(dbuilt, seen, out=built).flatten(0, 1).flatten(1).sum(1)
            patches.at(shown, *place).addcmul_(dbuilt, patches.scale[:, :, j, :, None, None])
    return dright, dscale.mT.contiguous(), dshift.mT.contiguous(), dweight.movedim(0, 2).contiguous()


def _accumulate_like(right: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, kernel: int, stride: int, dilation: int, pairs: bool) -> Tensor:
    high, wide = ((n - (kernel - 1) * dilation - 1) // stride + 1 for n in right.shape[2:])
    return right.new_empty(weight.shape[0], right.shape[1], high, wide)


def _accumulate_flops(right: Any, scale: Any, shift: Any, weight: Any, kernel: int, stride: int, dilation: int, pairs: bool) -> int:
    high, wide = ((n - (kernel - 1) * dilation - 1) // stride + 1 for n in right[2:])
    return 2 * weight[0] * weight[1] * weight[2] * right[1] * high * wide


def _accumulate_backward_flops(dy: Any, *rest: Any) -> int:
    return 2 * _accumulate_flops(*rest)


window_accumulate = operator(
    "window_accumulate",
    _accumulate,
    _accumulate_backward,
    _accumulate_like,
    tensors=4,
    flops=_accumulate_flops,
    backward_flops=_accumulate_backward_flops,
)
