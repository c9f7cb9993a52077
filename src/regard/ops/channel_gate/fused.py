"""The same values with fewer and better vectorised passes over the map, chiefly in the backward.

Autograd's own formulas write whole maps that are only reduced or added afterwards: grad * x for a gate's gradient, expand / N for a
mean's, a boolean map for a maximum's, one outer product for each use of x in attention pooling.
"""

import math

import torch
from torch import Tensor
from torch.autograd import Function

_CHUNK = 32 * 2**20  # bytes; the C library hands larger buffers back to the system each time


def scale(x: Tensor, gate: Tensor) -> Tensor:
    return _Scale.apply(x, gate)  # type: ignore[no-any-return]


def mean(x: Tensor, dim: int) -> Tensor:
    """A sum's gradient is an expanded view, which autograd adds in place; a mean's is a map of its own."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.sum(dim, dtype=wide) / x.shape[dim]).to(x.dtype)


def amax(x: Tensor, dim: int) -> Tensor:
    return _Max.apply(x, dim)  # type: ignore[no-any-return]


def attention_pool(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return _AttentionPool.apply(x, weight, bias)  # type: ignore[no-any-return]


class _Scale(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gate: Tensor) -> Tensor:
        return x * gate

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, gate = ctx.saved_tensors
        dx = (grad * gate).to(x.dtype) if ctx.needs_input_grad[0] else None
        dgate = None
        if ctx.needs_input_grad[1]:
            x = x.to(grad.dtype)
            if gate.shape[1] == x.shape[1] and math.prod(gate.shape[2:]) == 1:
                dgate = torch.linalg.vecdot(grad.flatten(2), x.flatten(2)).reshape(gate.shape)
            else:
                rows = max(1, _CHUNK // max(1, x[0].numel() * x.element_size()))
                pairs = zip(grad.split(rows), x.split(rows), strict=True)
                dims = [d for d in range(1, x.ndim) if gate.shape[d] == 1]
                dgate = torch.cat([(g * part).sum(dims, keepdim=True) if dims else g * part for g, part in pairs])
            dgate = dgate.to(gate.dtype)
        return dx, dgate


class _Max(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return x.amax(dim)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.dim = inputs
        ctx.save_for_backward(x, output)

    @staticmethod
    def backward(ctx, grad):
        x, top = ctx.saved_tensors
        # In place the comparison keeps the floating type, and is then vectorised.
        hit = x.detach().clone().eq_(top.detach().unsqueeze(ctx.dim))
        count = hit.sum(ctx.dim, dtype=torch.promote_types(x.dtype, torch.float32))
        return hit * (grad / count).to(x.dtype).unsqueeze(ctx.dim), None


class _AttentionPool(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        # A row vector times a matrix: as a matrix times a column, the batched product is ten times slower on the CPU.
        logits = torch.bmm(weight.to(x.dtype).expand(x.shape[0], 1, -1), x)
        if bias is not None:
            logits = logits + bias
        attention = logits.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1).to(x.dtype)
        return torch.bmm(attention, x.mT).squeeze(1), attention.squeeze(1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, output[1])

    @staticmethod
    def backward(ctx, dpooled, dattention):
        x, weight, attention = ctx.saved_tensors
        dpooled, attention = dpooled.to(x.dtype).unsqueeze(1), attention.unsqueeze(1)
        da = torch.bmm(dpooled, x) + dattention.to(x.dtype).unsqueeze(1)
        dlogits = attention * (da - (da * attention).sum(-1, keepdim=True))
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            left = torch.cat((dpooled, weight.to(x.dtype).expand_as(dpooled)), 1)
            right = torch.cat((attention, dlogits), 1)
            dx = torch.bmm(right.mT, left).mT if x.stride(1) == 1 else torch.bmm(left.mT, right)
        if ctx.needs_input_grad[1]:
            dweight = torch.bmm(dlogits, x.mT).sum((0, 1)).to(weight.dtype)
        dbias = dlogits.sum().reshape(1).to(weight.dtype) if ctx.has_bias else None
        return dx, dweight, dbias
