"""torch's own kernels (oneDNN, cuDNN): fastest, and silent about their gates. And what they cost, for the counter."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .cells import Cell, Weights, free_bias

aten = torch.ops.aten


def scan(cell: Cell, x: Tensor, state: Sequence[Tensor], weights: Weights) -> tuple[Tensor, list[Tensor]]:
    """x (B, T, I) -> h of every step (B, T, H), and the last state."""
    bias = free_bias(cell, weights)
    biases = [] if bias is None else [bias, weights["bias_hh"] if "bias_hh" in cell.recurrent() else torch.zeros_like(bias)]
    flat = [weights["weight_ih"], weights["weight_hh"], *biases]
    if x.is_cuda:  # cuDNN wants one buffer, in this order, and else packs one itself with a warning
        buffer = torch.cat([w.flatten() for w in flat]).split([w.numel() for w in flat])
        flat = [part.view_as(w) for part, w in zip(buffer, flat, strict=True)]
    start = [s[None].contiguous() for s in state]
    kernel = getattr(torch._VF, cell.fused or "")  # type: ignore[attr-defined]
    given = start if len(start) > 1 else start[0]
    out, *last = kernel(x, given, flat, len(flat) == 4, 1, 0.0, torch.is_grad_enabled(), False, True)
    return out, [s[0] for s in last]


def _products(x: Sequence[int], weights: Sequence[Sequence[int]]) -> int:
    return sum(2 * x[0] * x[1] * prod(w) for w in weights if len(w) == 2)


@register_flop_formula(aten.mkldnn_rnn_layer)
def _onednn(x: Any, w_ih: Any, w_hh: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _products(x, (w_ih, w_hh))


@register_flop_formula(aten.mkldnn_rnn_layer_backward)
def _onednn_backward(x: Any, w_ih: Any, w_hh: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * _products(x, (w_ih, w_hh))


@register_flop_formula(aten._cudnn_rnn)
def _cudnn(x: Any, weights: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _products(x, weights)


@register_flop_formula(aten._cudnn_rnn_backward)
def _cudnn_backward(x: Any, weights: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * _products(x, weights)
