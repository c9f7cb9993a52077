"""Numbers of every pair of a pixel and a pixel of its window, brought through small networks without ever being stored: relations and patches.

`relate` describes the pairs; a batch norm on them is an affine map whose statistics come from sums over the map alone (`statistics`), or, behind a
relu and a linear layer, from the second moments of the pairs (`through`). Statistics are kept in float64, so that no difference of sums matters.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import require
from ...validate import check_option
from .. import _dispatch
from . import relation_pieces
from .api import window_relate
from .relation_pieces import windows
from .window import Window, accumulator

Relation = Literal["summation", "subtraction", "concatenation", "hadamard", "dot"]
RELATIONS = ("summation", "subtraction", "concatenation", "hadamard", "dot")
Statistics = tuple[Tensor, Tensor, Tensor]  # mean, variance (biased), how many values

for _op in ("window_map", "window_moments", "window_accumulate"):
    _dispatch.register(_op, "pieces")
_WHY = "some offsets at a time; the pairs are built again in the backward"


@dataclass(frozen=True)
class Pairs:
    """Numbers of each pair, in three kinds of rows: `given`, left (x) right_j + shift, left + right_j.

    Args:
        left: (D, B, H', W').
        right: (D, B, H + 2 r, W + 2 r), padded.
        given: (E, k^2, B, H', W').
        shift: of the first rows of left and right, those that multiply.
        inside: (k^2, H', W'), one where the window is inside the map; empty if every pixel counts.
        window: kernel_size, stride and dilation.
    """

    left: Tensor
    right: Tensor
    given: Tensor
    shift: Tensor
    inside: Tensor
    window: Window

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.window.kernel_size, self.window.stride, self.window.dilation

    def statistics(self) -> Statistics:
        """Over the pairs, images and pixels, for each row."""
        left, right, given = (t.double() for t in (self.left, self.right, self.given))
        p, total = self.shift.shape[0], (1, 2, 3)
        near, squares = self._over_window(right), self._over_window(right.square())
        each = self.inside.double().sum(0) if self.inside.numel() else left.new_full((), float(self.window.kernel_size**2))
        count = each.expand(left.shape[2:]).sum() * left.shape[1]
        kept = given * self.inside[:, None] if self.inside.numel() else given
        first = [kept.sum((1, 2, 3, 4)), (left[:p] * near[:p]).sum(total), (left[p:] * each + near[p:]).sum(total)]
        second = [(kept * given).sum((1, 2, 3, 4)), (left[:p].square() * squares[:p]).sum(total)]
        second += [(left[p:].square() * each + 2 * left[p:] * near[p:] + squares[p:]).sum(total)]
        mean = torch.cat(first) / count
        return mean, (torch.cat(second) / count - mean.square()).clamp(min=0), count

    def _over_window(self, x: Tensor) -> Tensor:
        """The sum over the window of each output pixel, (..., padded) -> (..., H', W')."""
        k, stride, dilation = self.sizes
        high, wide = (n - (k - 1) * dilation for n in x.shape[-2:])
        return x.unfold(-2, high, dilation).sum(-3).unfold(-2, wide, dilation).sum(-3)[..., ::stride, ::stride]

    def affine(self, scale: Tensor, shift: Tensor) -> "Pairs":
        """scale times each row, plus shift: still pairs."""
        e, p = self.given.shape[0], self.shift.shape[0]
        scale, shift = scale.to(self.left.dtype)[:, None, None, None], shift.to(self.left.dtype)[:, None, None, None]
        own, rest = scale[e:], shift[e + p :]
        left = own * self.left + F.pad(rest, (0, 0, 0, 0, 0, 0, p, 0))
        right = torch.cat([self.right[:p], own[p:] * self.right[p:]])
        return replace(self, left=left, right=right, given=scale[:e, None] * self.given + shift[:e, None], shift=shift[e : e + p, 0, 0, 0])

    def through(self, weight: Tensor) -> Statistics:
        """The statistics of weight @ relu(pairs), weight (R, rows)."""
        if _dispatch.choose("window_moments", "pieces", _WHY) == "reference":
            rows = torch.cat([self._all().relu(), torch.ones_like(self._all()[:1])])
            rows = rows * self.inside[:, None] if self.inside.numel() else rows
            moments = torch.einsum("dkbhw,ekbhw->de", rows.double(), rows.double())
        else:
            moments = relation_pieces.window_moments(self.left, self.right, self.given, self.shift, self.inside, *self.sizes)
        count = moments[-1, -1].detach()
        mean, weight = moments[:-1, -1] / count, weight.double()
        spread = moments[:-1, :-1] / count - mean[:, None] * mean
        return weight @ mean, (weight @ spread * weight).sum(1).clamp(min=0), count

    def map(self, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        """w2 relu(w1 relu(pairs) + b1) + b2 for every pair: (B, G, k^2, H', W')."""
        w1, b1, w2, b2 = (t.to(self.left.dtype) for t in (w1, b1, w2, b2))
        if _dispatch.choose("window_map", "pieces", _WHY) == "reference":
            hidden = torch.einsum("rd,dkbhw->rkbhw", w1, self._all().relu()) + b1[:, None, None, None, None]
            return torch.einsum("gr,rkbhw->bgkhw", w2, hidden.relu()) + b2[:, None, None, None]
        w1, w2 = torch.cat([w1, b1[:, None]], 1), torch.cat([w2, b2[:, None]], 1)
        return relation_pieces.window_map(self.left, self.right, self.given, self.shift, w1, w2, *self.sizes)

    def _all(self) -> Tensor:
        """Every number, (rows, k^2, B, H', W'): the definition."""
        p, right = self.shift.shape[0], windows(self.right, *self.sizes).flatten(2, 3).movedim(1, 2)
        products = self.left[:p, None] * right[:p] + self.shift[:, None, None, None, None]
        return torch.cat([self.given, products, self.left[p:, None] + right[p:]])


def pad(x: Tensor, window: Window) -> Tensor:
    """A map (..., H, W) with what lies around it: its mirror image, or zeros."""
    reach = window.dilation * (window.kernel_size - 1) // 2
    mirrored = window.padding == "reflect" and x.numel()  # torch mirrors nothing empty
    return F.pad(x, (reach,) * 4, "reflect" if mirrored else "constant")


def check_reach(window: Window, height: int, width: int) -> None:
    """A mirror image needs a map larger than how far the window reaches."""
    reach = window.dilation * (window.kernel_size - 1) // 2
    enough = window.padding != "reflect" or (height > reach and width > reach)
    way = "use a larger size, or make the module with padding_mode='zero'"
    require(enough, "padding_mode='reflect' needs more than {} rows and columns, got a map of {} x {}; {}", reach, height, width, way)


def inside_map(x: Tensor, window: Window) -> Tensor:
    """(k^2, H', W'): one where the window of an output pixel of the map x (..., H, W) is inside it, zero elsewhere."""
    offsets = window.dilation * (torch.arange(window.kernel_size, device=x.device) - window.kernel_size // 2)[:, None]
    at = [window.stride * torch.arange(-(-n // window.stride), device=x.device) + offsets for n in x.shape[-2:]]
    rows, columns = ((a >= 0) & (a < n) for a, n in zip(at, x.shape[-2:], strict=True))
    return (rows[:, None, :, None] & columns[:, None, :]).flatten(0, 1).to(x.dtype)


def relate(queries: Tensor, keys: Tensor, relation: Relation, window: Window, places: Tensor | None = None) -> Pairs:
    """The relation of every query with the keys of its window, followed by the difference of their places.

    Args:
        queries, keys: (B, R, H, W); queries count where the window has a centre.
        relation: "summation", "subtraction", "concatenation" (2 R numbers), "hadamard" or "dot" (one number).
        window: padding="mask" leaves pixels outside the map out of all statistics.
        places: (P, H, W).
    """
    check_option(relation, RELATIONS, "relation")
    check_reach(window, *keys.shape[-2:])
    dtype, s, batch = accumulator(queries), window.stride, keys.shape[0]
    keys, here = keys.to(dtype).transpose(0, 1), queries.to(dtype)[..., ::s, ::s].transpose(0, 1)
    left, right, shift, given = here, keys, here.new_empty(0), here.new_empty(0, window.kernel_size**2, *here.shape[1:])
    if relation == "subtraction":
        right = -keys
    elif relation == "concatenation":
        left, right = torch.cat([here, torch.zeros_like(here)]), torch.cat([torch.zeros_like(keys), keys])
    elif relation == "hadamard":
        shift = here.new_zeros(here.shape[0])
    elif relation == "dot":
        given = window_dots(queries[..., ::s, ::s], keys.transpose(0, 1), window).to(dtype).transpose(0, 1)[None]
        left, right = here[:0], keys[:0]
    if places is not None:
        places = places.to(dtype)[:, None].expand(-1, batch, -1, -1)
        left, right = torch.cat([left, places[..., ::s, ::s]]), torch.cat([right, -places])
    inside = inside_map(here.new_empty(1, *keys.shape[-2:]), window) if window.padding == "mask" else here.new_empty(0)
    return Pairs(left.contiguous(), pad(right, window).contiguous(), given, shift, inside, window)


def window_dots(queries: Tensor, keys: Tensor, window: Window) -> Tensor:
    """Inner products of queries (B, R, H', W') with the keys (B, R, H, W) of their windows, zero outside the map: (B, k^2, H', W')."""
    window = replace(window, padding="zero") if window.padding == "mask" else window
    return window_relate(queries[:, None], keys[:, None], window)[:, 0]


@dataclass(frozen=True)
class Patches:
    """Numbers of each pixel of a window, or of each pair (j, l) of its pixels: `maps` (rows, B, H + 2 r, W + 2 r) seen through it.

    With `pairs` the maps are those of the (2 k - 1)^2 differences l - j, read at j.
    """

    maps: Tensor
    window: Window
    pairs: bool = False

    @property
    def numbers(self) -> int:
        """Of each patch."""
        count = self.window.kernel_size**2
        return count * (count if self.pairs else self.maps.shape[0])

    def statistics(self) -> Statistics:
        """Over images and output pixels, for each number of a patch: those of an offset j after one another, or of a row if not `pairs`."""
        maps = self.maps.double()
        first, second = (self._over_pixels(t.sum(1)) for t in (maps, maps.square()))
        k, s, d = self.window.kernel_size, self.window.stride, self.window.dilation
        high, wide = (-(-(n - (k - 1) * d) // s) for n in self.maps.shape[-2:])
        count = first.new_full((), 1.0) * (self.maps.shape[1] * high * wide)
        first, second = ((t.mT if self.pairs else t).flatten() for t in (first, second))
        mean = first / count
        return mean, (second / count - mean.square()).clamp(min=0), count

    def _over_pixels(self, x: Tensor) -> Tensor:
        k, s, d = self.window.kernel_size, self.window.stride, self.window.dilation
        high, wide = (n - (k - 1) * d for n in x.shape[-2:])
        x = x.unfold(-2, high, d)[..., ::s].sum(-1).unfold(-1, wide, d)[..., ::s].sum(-1).flatten(1)
        if not self.pairs:
            return x
        at = torch.arange(k, device=x.device)
        apart = at[:, None] - at + k - 1
        row = (apart[:, None, :, None] * (2 * k - 1) + apart[None, :, None, :]).reshape(k * k, k * k)
        return x[row, torch.arange(k * k, device=x.device)]

    def accumulate(self, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
        """weight @ relu(scale numbers + shift), for scale, shift (numbers,), weight (M, numbers): (M, B, H', W')."""
        count = self.window.kernel_size**2
        scale, shift, weight = (t.to(self.maps.dtype).unflatten(-1, (-1, count)) for t in (scale, shift, weight))
        if self.pairs:
            scale, shift, weight = scale.mT, shift.mT, weight.mT
        sizes = self.window.kernel_size, self.window.stride, self.window.dilation
        if _dispatch.choose("window_accumulate", "pieces", _WHY) == "pieces":
            return relation_pieces.window_accumulate(self.maps, scale, shift, weight, *sizes, self.pairs)
        seen = windows(self.maps, *sizes).flatten(2, 3)
        if self.pairs:
            k = self.window.kernel_size
            seen = seen.unflatten(0, (2 * k - 1, -1))
            blocks = [seen[k - 1 - j // k :, k - 1 - j % k :, :, j][:k, :k].flatten(0, 1) for j in range(k * k)]
            seen = torch.stack(blocks, 2)
        rows = (seen * scale[:, None, :, None, None] + shift[:, None, :, None, None]).relu()
        return torch.einsum("mrk,rbkhw->mbhw", weight, rows)


def pair_differences(queries: Tensor, keys: Tensor, window: Window) -> Patches:
    """Inner products of every two pixels j, l of a window: queries (B, R, H, W) at j, keys at l."""
    reach = window.dilation * (window.kernel_size - 1)
    wide = Window(2 * window.kernel_size - 1, dilation=window.dilation, offset_first=-reach)
    return Patches(window_dots(pad(queries, window), pad(keys, window), wide).transpose(0, 1).contiguous(), window, pairs=True)
