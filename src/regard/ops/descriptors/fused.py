"""The same with a gradient that sums all its shares of x in one map, by products that add to what is there."""

import torch
from torch import Tensor

from .._operator import operator


def double_attention(
    x: Tensor, wb: Tensor, bb: Tensor, wv: Tensor, bv: Tensor, weight: Tensor, bias: Tensor, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _attend(x, wb, bb, wv, bv, weight, bias, residual)[:3]


def _forward(
    x: Tensor, wb: Tensor, bb: Tensor, wv: Tensor, bv: Tensor, weight: Tensor, bias: Tensor, residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b = x.shape[0]
    gather = torch.baddbmm(bb[:, None], wb.expand(b, -1, -1), x).softmax(2)
    distribute = torch.baddbmm(bv[:, None], wv.expand(b, -1, -1), x).softmax(1)
    pooled = torch.bmm(x, gather.mT)
    descriptors = torch.baddbmm(bias[:, None], weight.expand(b, -1, -1), pooled)
    out = torch.baddbmm(x, descriptors, distribute) if residual else torch.bmm(descriptors, distribute)
    return out, gather, distribute, pooled


def _fake(
    x: Tensor, wb: Tensor, bb: Tensor, wv: Tensor, bv: Tensor, weight: Tensor, bias: Tensor, residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (b, c, n), s = x.shape, wb.shape[0]
    return x.new_empty(b, weight.shape[0], n), x.new_empty(b, s, n), x.new_empty(b, s, n), x.new_empty(b, c, s)


def _backward(
    dout: Tensor,
    dgather: Tensor,
    ddistribute: Tensor,
    dpooled: Tensor,
    x: Tensor,
    wb: Tensor,
    bb: Tensor,
    wv: Tensor,
    bv: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    gather: Tensor,
    distribute: Tensor,
    pooled: Tensor,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    b = x.shape[0]
    descriptors = torch.baddbmm(bias[:, None], weight.expand(b, -1, -1), pooled)
    ddescriptors = torch.bmm(dout, distribute.mT)
    dpooled = torch.baddbmm(dpooled, weight.mT.expand(b, -1, -1), ddescriptors)
    dx = torch.baddbmm(dout, dpooled, gather) if residual else torch.bmm(dpooled, gather)
    dx = dx.contiguous()
    shares = []
    for to, maps, given, left, right, dim in ((wv, distribute, ddistribute, descriptors, dout, 1), (wb, gather, dgather, dpooled, x, 2)):
        dlogits = torch._softmax_backward_data(torch.baddbmm(given, left.mT, right), maps, dim, x.dtype)
        dx.baddbmm_(to.mT.expand(b, -1, -1), dlogits)
        shares += [torch.bmm(dlogits, x.mT).sum(0), dlogits.sum((0, 2))]
        del dlogits
    dwv, dbv, dwb, dbb = shares
    dweight, dbias = torch.bmm(ddescriptors, pooled.mT).sum(0), ddescriptors.sum((0, 2))
    return dx, dwb, dbb, dwv, dbv, dweight, dbias


def _flops(x, wb, bb, wv, bv, weight, *options) -> int:
    (b, c, n), s, f = x, wb[0], weight[0]
    return 2 * b * s * (n * (3 * c + f) + c * f)


def _backward_flops(dout, dgather, ddistribute, dpooled, *inputs) -> int:
    (b, c, n), s, f = inputs[0], inputs[1][0], inputs[5][0]
    return 2 * b * s * (n * (6 * c + 2 * f) + 3 * c * f)


_attend = operator(
    "double_attention",
    _forward,
    _backward,
    _fake,
    tensors=7,
    outputs=4,
    keep_outputs=True,
    flops=_flops,
    backward_flops=_backward_flops,
)
