"""The estimate as products: skinny matrix products, every exponential taken once, no logarithm of an (N, C) matrix, no (C, M) matrix.

    sum_c softmax_c(log alpha_c + a_c) kv_c = sum_c alpha_c p_c kv_c / sum_c alpha_c p_c,   p = softmax_c(a)

|q|^2 is the same for all c and cancels.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _flops  # noqa: F401  (the fused CPU kernel is counted)
from ..linear_attention import blockwise
from ..softmax_attention import attend_key_bias
from .reference import LOWEST, Mixture, densities

aten = torch.ops.aten
SAMPLES = 1 << 20  # floats of keys at a time: 4 MB


def estimate(x: Mixture, v: Tensor) -> Tensor:
    w, scale = x.samples, x.q.shape[-1] ** -0.5
    mu, copies = x.q_centres + x.k_centres, w.shape[2] // x.q_centres.shape[2]
    own, total = densities(mu, w, x.present)
    kv, log_sum = _summaries(x.k, v, w, x.key_mask)
    bias = log_sum - (own if x.mis_type == "mis-opt" else total)
    if x.present is not None:
        bias = bias.masked_fill(~x.present.repeat(1, 1, copies), LOWEST)
    if x.mis_type != "mis-opt":
        return attend_key_bias(x.q, w + mu.repeat(1, 1, copies, 1) if x.mis_type == "mis-biased" else w, kv, bias, scale=scale)

    def core(
        q: Tensor, w: Tensor, bias: Tensor, kv: Tensor, balance: Tensor, q_centres: Tensor, query_mask: Tensor | None, present: Tensor | None
    ) -> Tensor:
        extra = _shares(q, q_centres, query_mask, present)
        extra = extra if copies == 1 else extra.repeat(1, 1, 1, copies)
        p = _scores(q, w, bias).softmax(-1) * torch.add(balance, extra, alpha=x.alpha_coeff).clamp_min(1e-8)
        return (p @ kv) * p.sum(-1, keepdim=True).reciprocal()

    balance = (own - total).exp().unsqueeze(2)
    tensors = (x.q, w, bias.unsqueeze(2), kv, balance, x.q_centres, x.query_mask, x.present)
    return blockwise(core, *tensors, floats=6 * x.q.shape[2] * w.shape[2])


def _shares(q: Tensor, centres: Tensor, mask: Tensor | None, present: Tensor | None) -> Tensor:
    """t - mean_c t, t the share of each query in a proposal: a softmax over the queries."""
    scores = q @ (centres * q.shape[-1] ** -0.5).mT
    t = (scores if mask is None else scores.masked_fill(~mask.unsqueeze(-1), LOWEST)).softmax(2)
    if present is None:
        return t - t.mean(-1, keepdim=True)
    here = present.unsqueeze(2)
    return t - (t * here).sum(-1, keepdim=True) / here.sum(-1, keepdim=True)


def _scores(y: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """s y w^T + bias in one product, (B, H, n, C)."""
    y3, w3, bias3 = (t.flatten(0, 1) for t in (y, w, bias))
    return torch.baddbmm(bias3, y3, w3.mT, alpha=y.shape[-1] ** -0.5).unflatten(0, y.shape[:2])


def _summaries(k: Tensor, v: Tensor, w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum_m softmax_m(b_c) v_m, (B, H, C, dv), and log sum_m e^b_c, (B, H, C), with b_c(m) = L(k_m, w_c)."""
    plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or k.device.type != "cpu"
    if not plain and k.shape[-1] == v.shape[-1]:
        return _Summaries.apply(k, v, w, mask)  # type: ignore[return-value]
    norm = -0.5 * k.shape[-1] ** -0.5 * k.square().sum(-1, keepdim=True)
    if mask is not None:
        gone = ~mask.unsqueeze(-1)
        k, v, norm = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0), norm.masked_fill(gone, LOWEST)
    scores = _scores(k, w, norm)
    top = scores.detach().amax(2, keepdim=True)
    weights = (scores - top).exp()
    sums = weights.sum(2)
    return (weights.mT @ v) * sums.reciprocal().unsqueeze(-1), top.squeeze(2) + sums.log()


class _Summaries(torch.autograd.Function):
    """The fused CPU kernel gives both, but takes a gradient of the first alone: dS = P (dO v^T - rowsum(dO * O)).

    A gradient g of the logarithm of the sums adds P g. So the values get a channel of ones, whose output is one; handed back as 1 - g with a
    gradient of one it adds just that.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        attend, scale = aten._scaled_dot_product_flash_attention_for_cpu, k.shape[-1] ** -0.5
        parts = [attend(*_widened(k, v, w, mask, some), 0.0, False, attn_mask=None, scale=scale) for some in _samples(k)]
        out, log_sum = (torch.cat(found) for found in zip(*parts, strict=True))
        ctx.save_for_backward(k, v, w, mask, out, log_sum)
        return out[..., :-1], log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        k, v, w, mask, out, log_sum = ctx.saved_tensors
        out, grad = torch.cat((out[..., :-1], 1 - grads[1].unsqueeze(-1)), -1), _with_ones(grads[0])
        differentiate, scale = aten._scaled_dot_product_flash_attention_for_cpu_backward, k.shape[-1] ** -0.5
        dk, dv, dw = torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(w)
        for some in _samples(k):
            tensors = (grad[some], *_widened(k, v, w, mask, some), out[some], log_sum[some])
            w1, k1, v1 = differentiate(*tensors, 0.0, False, attn_mask=None, scale=scale)
            torch.sub(k1[..., :-1], k[some] * k1[..., -1:], out=dk[some])
            dv[some], dw[some] = v1[..., :-1], w1[..., :-1]
        if mask is not None:
            gone = ~mask.unsqueeze(-1)
            dk, dv = dk.masked_fill_(gone, 0.0), dv.masked_fill_(gone, 0.0)
        return dk, dv, dw, None


def _samples(k: Tensor) -> list[slice]:
    """Parts of the batch to work through one after the other, so that what is temporary stays small."""
    step = max(1, SAMPLES // math.prod(k.shape[1:]))
    return [slice(first, first + step) for first in range(0, max(1, k.shape[0]), step)]


def _widened(k: Tensor, v: Tensor, w: Tensor, mask: Tensor | None, some: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [w, 1], keys [k, -|k|^2 / 2], values [v, 1]; of masked keys zeros and a score that leaves no weight."""
    k, v, w = k[some], v[some], w[some]
    norm = -0.5 * k.square().sum(-1, keepdim=True)
    if mask is not None:
        gone = ~mask[some].unsqueeze(-1)
        k, v, norm = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0), norm.masked_fill(gone, LOWEST)
    return _with_ones(w), torch.cat((k, norm), -1), _with_ones(v)


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat((x, torch.ones_like(x[..., :1])), -1)
