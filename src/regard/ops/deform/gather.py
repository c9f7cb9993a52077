"""The fast way: pixels channels last, samples made some at a time and made again in the backward instead of being kept."""

from typing import Any

import torch
from torch import Tensor

from .._operator import operator
from .._precision import at_least_float32, full_precision
from .samples import Samples, bordered, boxes, gather, gather_backward, unbordered

Ints = list[int]


def _tapwise(x: Tensor, box: tuple[slice, slice], slots: int, dtype: torch.dtype) -> Tensor:
    """Weights (B, slots t, H', W') or (B, slots, t, H', W') of the samples of a box, (b, q, slots, t)."""
    flat = x.flatten(-2).flatten(1, -2)[box[0], :, box[1]]
    return flat.mT.to(dtype).unflatten(2, (slots, -1)).contiguous()


def _unit(x: Tensor, kernel: Ints, slots: int) -> int:
    """Bytes worked on for one output: its samples, and some tables of what their corners are."""
    return 4 * kernel[0] * kernel[1] * (x.shape[1] + 24 * slots)


def _unfold(x: Tensor, offset: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Tensor:
    dtype, (batch, channels, *size), places = at_least_float32(x, offset), x.shape, offset.shape[2] * offset.shape[3]
    taps, table = kernel[0] * kernel[1], bordered(x, dtype)
    out = x.new_empty(batch, channels * taps, places)
    for box in boxes(batch, places, _unit(x, kernel, groups), x.device):
        at = Samples(offset, size, kernel, stride, padding, dilation, groups, box, dtype)
        u = gather(table[box[0]].reshape(-1, channels // groups), at.rows(groups).view(-1, 4), at.share.view(-1, 4))
        out[box[0], :, box[1]].unflatten(1, (groups, -1, taps)).copy_(u.view(*at.share.shape[:-1], -1).permute(0, 2, 4, 3, 1))
    return out


def _unfold_backward(
    dy: Tensor, x: Tensor, offset: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> tuple[Tensor, Tensor]:
    dtype, (batch, channels, *size), places = at_least_float32(x, offset), x.shape, offset.shape[2] * offset.shape[3]
    taps, table = kernel[0] * kernel[1], bordered(x, dtype)
    dtable, doffset = torch.zeros_like(table), offset.new_empty(*offset.shape[:2], places)
    for box in boxes(batch, places, _unit(x, kernel, groups), x.device):
        at = Samples(offset, size, kernel, stride, padding, dilation, groups, box, dtype)
        du = dy[box[0], :, box[1]].unflatten(1, (groups, -1, taps)).permute(0, 4, 1, 3, 2).to(dtype).reshape(-1, channels // groups)
        part, dpart = (t[box[0]].view(-1, channels // groups) for t in (table, dtable))
        dshare = gather_backward(du, part, dpart, at.rows(groups).view(-1, 4), at.share.view(-1, 4))
        doffset[box[0], :, box[1]] = at.backward(dshare.view(at.share.shape))
    return unbordered(dtable, x), doffset.view(offset.shape)


def _apply(w: Tensor, x: Tensor, offset: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Tensor:
    dtype, (batch, channels, *size), places = at_least_float32(x, offset, w), x.shape, offset.shape[2] * offset.shape[3]
    groups, taps, table = w.shape[1], kernel[0] * kernel[1], bordered(x, dtype)
    out = x.new_empty(batch, places, channels)
    for box in boxes(batch, places, _unit(x, kernel, 1), x.device):
        at = Samples(offset, size, kernel, stride, padding, dilation, 1, box, dtype)
        weights, part, width = _tapwise(w, box, groups, dtype), table[box[0]].view(-1, channels), at.share.shape[:2]
        if groups == 1:  # no sample is made: a bag is all corners of all taps
            y = gather(part, at.pixel.view(-1, 4 * taps), at.weighted(weights).view(-1, 4 * taps))
        else:
            u = gather(part, at.pixel.view(-1, 4), at.share.view(-1, 4)).view(*width, taps, groups, -1)
            y = u.mul_(weights.mT.contiguous()[..., None]).sum(2)
        out[box] = y.view(*width, channels)
    return out


def _apply_backward(
    dy: Tensor, w: Tensor, x: Tensor, offset: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, (batch, channels, *size), places = at_least_float32(x, offset, w), x.shape, offset.shape[2] * offset.shape[3]
    groups, taps, table = w.shape[1], kernel[0] * kernel[1], bordered(x, dtype)
    dtable, doffset, dw = torch.zeros_like(table), offset.new_empty(*offset.shape[:2], places), w.new_empty(batch, groups * taps, places)
    for box in boxes(batch, places, _unit(x, kernel, 1), x.device):
        at = Samples(offset, size, kernel, stride, padding, dilation, 1, box, dtype)
        weights, dout = _tapwise(w, box, groups, dtype), dy[box].to(dtype)
        part, dpart = (t[box[0]].view(-1, channels) for t in (table, dtable))
        if groups == 1:
            bags = at.pixel.view(-1, 4 * taps), at.weighted(weights).view(-1, 4 * taps)
            dshare = gather_backward(dout.reshape(-1, channels), part, dpart, *bags).view(at.share.shape)
            dweights, dshare = (dshare * at.share).sum(-1), dshare * weights[..., None]
        else:
            bags, dout = (at.pixel.view(-1, 4), at.share.view(-1, 4)), dout.unflatten(2, (1, groups, -1))
            dweights = gather(part, *bags).view(*dout.shape[:2], taps, *dout.shape[3:]).mul_(dout).sum(-1).mT
            dshare = gather_backward((weights.mT.contiguous()[..., None] * dout).view(-1, channels), part, dpart, *bags).view(at.share.shape)
        dw[box[0], :, box[1]] = dweights.flatten(2).mT
        doffset[box[0], :, box[1]] = at.backward(dshare)
    return dw.view(w.shape), unbordered(dtable, x), doffset.view(offset.shape)


def _columns(u: Tensor, groups: int) -> Tensor:
    """Samples (b, q, o, t, c) as factors of `groups` products, (groups, b q, ...): by channel and tap; with one group, as they lie."""
    if groups == 1:
        return u.reshape(1, u.shape[0] * u.shape[1], -1)
    return u.transpose(-1, -2).flatten(0, 1).reshape(u.shape[0] * u.shape[1], groups, -1).transpose(0, 1)


def _samples(columns: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """The transpose of `_columns`; `shape` is that of the samples."""
    if groups == 1:
        return columns.view(shape)
    b, q, o, t, c = shape
    return columns.transpose(0, 1).reshape(b, q, o, c, t).transpose(-1, -2)


def _kernel(weight: Tensor, groups: int, offset_groups: int, dtype: torch.dtype) -> Tensor:
    """The other factor, (groups, O / groups, ...), in the order of `_columns`."""
    w = weight.to(dtype).flatten(2)
    if groups == 1:
        return w.unflatten(1, (offset_groups, -1)).transpose(2, 3).flatten(1)[None]
    return w.flatten(1).unflatten(0, (groups, -1))


def _kernel_backward(dw: Tensor, weight: Tensor, groups: int, offset_groups: int) -> Tensor:
    if groups == 1:
        taps = weight.shape[2] * weight.shape[3]
        return dw[0].unflatten(1, (offset_groups, taps, -1)).transpose(2, 3).reshape(weight.shape).to(weight.dtype)
    return dw.reshape(weight.shape).to(weight.dtype)


def _convolve(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    offset_groups: int,
) -> Tensor:
    dtype, (batch, channels, *size), places = at_least_float32(x, offset, weight), x.shape, offset.shape[2] * offset.shape[3]
    kernel, table = list(weight.shape[2:]), bordered(x, dtype)
    w = _kernel(weight, groups, offset_groups, dtype)
    out = x.new_empty(batch, places, weight.shape[0])
    with full_precision(x):
        for box in boxes(batch, places, _unit(x, kernel, offset_groups), x.device):
            at = Samples(offset, size, kernel, stride, padding, dilation, offset_groups, box, dtype)
            shares = at.share if mask is None else at.weighted(_tapwise(mask, box, offset_groups, dtype))
            u = gather(table[box[0]].view(-1, channels // offset_groups), at.rows(offset_groups).view(-1, 4), shares.view(-1, 4))
            y = torch.bmm(w, _columns(u.view(*shares.shape[:-1], -1), groups).mT)  # this way round: a product with few columns is slow
            out[box] = y.flatten(0, 1).mT.unflatten(0, shares.shape[:2])
    return out


def _convolve_backward(
    dy: Tensor,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    offset_groups: int,
) -> list[Tensor]:
    dtype, (batch, channels, *size), places = at_least_float32(x, offset, weight), x.shape, offset.shape[2] * offset.shape[3]
    kernel, table = list(weight.shape[2:]), bordered(x, dtype)
    w = _kernel(weight, groups, offset_groups, dtype)
    dtable, dw, doffset = torch.zeros_like(table), torch.zeros_like(w), offset.new_empty(*offset.shape[:2], places)
    dmask = x.new_empty(0) if mask is None else mask.new_empty(*mask.shape[:2], places)
    with full_precision(x):
        for box in boxes(batch, places, _unit(x, kernel, offset_groups), x.device):
            at = Samples(offset, size, kernel, stride, padding, dilation, offset_groups, box, dtype)
            factor = None if mask is None else _tapwise(mask, box, offset_groups, dtype)
            shares = at.share if factor is None else at.weighted(factor)
            rows, flat = at.rows(offset_groups).view(-1, 4), shares.view(-1, 4)
            part, dpart = (t[box[0]].view(-1, channels // offset_groups) for t in (table, dtable))
            u = gather(part, rows, flat).view(*shares.shape[:-1], -1)
            dout = dy[box].to(dtype).flatten(0, 1).unflatten(1, (groups, -1)).transpose(0, 1)
            dw += torch.bmm(dout.mT, _columns(u, groups))
            du = _samples(torch.bmm(dout, w), u.shape, groups).reshape(-1, channels // offset_groups)
            dshares = gather_backward(du, part, dpart, rows, flat).view(shares.shape)
            if factor is not None:
                dmask[box[0], :, box[1]] = (dshares * at.share).sum(-1).flatten(2).mT
                dshares = dshares * factor[..., None]
            doffset[box[0], :, box[1]] = at.backward(dshares)
    dmask = dmask if mask is None else dmask.view(mask.shape)
    return [unbordered(dtable, x), doffset.view(offset.shape), _kernel_backward(dw, weight, groups, offset_groups), dmask]


def _like_tokens(x: Tensor, offset: Tensor, width: int) -> Tensor:
    return x.new_empty(x.shape[0], offset.shape[2] * offset.shape[3], width)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _contiguous(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _outputs(offset_shape: Any) -> int:
    return offset_shape[0] * offset_shape[2] * offset_shape[3]


def _unfold_flops(x_shape: Any, offset_shape: Any, kernel: Ints, *options: Any) -> int:
    """Four multiply-adds for a sample of a channel; its gradient with respect to the map and to the four shares: twice that."""
    return 2 * 4 * kernel[0] * kernel[1] * x_shape[1] * _outputs(offset_shape)


def _apply_flops(w_shape: Any, x_shape: Any, offset_shape: Any, kernel: Ints, *options: Any) -> int:
    return _unfold_flops(x_shape, offset_shape, kernel)


def _convolve_flops(x_shape: Any, offset_shape: Any, weight_shape: Any, *options: Any) -> int:
    """The samples, and one product."""
    width, inner, *kernel = weight_shape
    return _unfold_flops(x_shape, offset_shape, kernel) + 2 * kernel[0] * kernel[1] * inner * width * _outputs(offset_shape)


def _convolve_backward_flops(dy_shape: Any, x_shape: Any, offset_shape: Any, weight_shape: Any, *options: Any) -> int:
    """The samples again, their gradients, and those of both factors of the product."""
    return 2 * _convolve_flops(x_shape, offset_shape, weight_shape) + _unfold_flops(x_shape, offset_shape, weight_shape[2:])


deform_unfold = operator(
    "deform_unfold",
    _unfold,
    _unfold_backward,
    lambda x, offset, kernel, *_: x.new_empty(x.shape[0], x.shape[1] * kernel[0] * kernel[1], offset.shape[2] * offset.shape[3]),
    tensors=2,
    fake_backward=lambda dy, x, offset, *_: (_like(x), _contiguous(offset)),
    flops=_unfold_flops,
    backward_flops=lambda dy_shape, *shapes: 2 * _unfold_flops(*shapes),
)
deform_apply = operator(
    "deform_apply",
    _apply,
    _apply_backward,
    lambda w, x, offset, *_: _like_tokens(x, offset, x.shape[1]),
    tensors=3,
    fake_backward=lambda dy, w, x, offset, *_: (_contiguous(w), _like(x), _contiguous(offset)),
    flops=_apply_flops,
    backward_flops=lambda dy_shape, *shapes: 2 * _apply_flops(*shapes),
)
deform_convolve = operator(
    "deform_convolve",
    _convolve,
    _convolve_backward,
    lambda x, offset, weight, *_: _like_tokens(x, offset, weight.shape[0]),
    tensors=4,
    fake_backward=lambda dy, x, offset, weight, mask, *_: [
        _like(x),
        _contiguous(offset),
        _contiguous(weight),
        x.new_empty(0) if mask is None else _contiguous(mask),
    ],
    flops=_convolve_flops,
    backward_flops=_convolve_backward_flops,
)
