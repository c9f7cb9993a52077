"""The plain recurrent cell's loop forward and back, written out."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import EPS, RNN
from .normalised import Normalised


def rnn_forward(cell: RNN, a: Tensor, state: Sequence[Tensor], params: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    (h,), w = state, dict(zip(cell.recurrent(), params, strict=True))
    hs = torch.empty_like(a, memory_format=torch.contiguous_format)
    turned, activate = w["weight_hh"].mT, torch.tanh_ if cell.nonlinearity == "tanh" else torch.relu_
    for t, (a_t, now) in enumerate(zip(a.unbind(), hs.unbind(), strict=True)):
        if cell.layer_norm:
            torch.add(F.layer_norm(h @ turned, h.shape[-1:], w["ln_hh.weight"], w["ln_hh.bias"], EPS), a_t, out=now)
        else:
            torch.addmm(a_t, h, turned, out=now)
        activate(now)
        if mask is not None:
            now.copy_(torch.where(mask[t, :, None], now, h))
        h = now
    return [hs]


def rnn_backward(
    cell: RNN,
    grads: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    mask: Tensor | None,
    carry: Sequence[Tensor],
) -> list[Tensor]:
    (grad_h,), (hs,), w = grads, saved, dict(zip(cell.recurrent(), params, strict=True))
    h_before = torch.cat((state[0][None], hs[:-1]))
    norm = Normalised(h_before @ w["weight_hh"].mT, w["ln_hh.weight"], w["ln_hh.bias"]) if cell.layer_norm else None
    # A step that was masked shows the state before it and has another slope, which no gradient meets.
    slopes = torch.ones_like(hs).addcmul_(hs, hs, value=-1) if cell.nonlinearity == "tanh" else (hs > 0).to(hs.dtype)
    if mask is not None:
        slopes.mul_(mask[..., None])
    da = torch.empty_like(hs)
    db = torch.empty_like(hs) if norm else da
    (dh,) = carry
    for t in range(hs.shape[0] - 1, -1, -1):
        if grad_h is not None:
            dh = dh + grad_h[t]
        torch.mul(dh, slopes[t], out=da[t])
        if norm:
            db[t] = norm.back(da[t], t)
        back = db[t] @ w["weight_hh"]
        dh = back if mask is None else back + dh.masked_fill(mask[t, :, None], 0.0)
    found = [db.flatten(0, 1).mT @ h_before.flatten(0, 1), *(norm.parameters(da) if norm else ())]
    return [da, dh, *found]
