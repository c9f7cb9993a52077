"""The GRU's loop forward and back, written out.

As in the LSTM's, the backward pass computes beforehand, for the whole sequence, all that does not depend on later steps.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import EPS, GRU
from .normalised import Normalised


def gru_forward(cell: GRU, a: Tensor, state: Sequence[Tensor], params: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    (h,), w, width = state, dict(zip(cell.recurrent(), params, strict=True)), state[0].shape[-1]
    gates = torch.empty_like(a, memory_format=torch.contiguous_format)
    hs = a.new_empty(*a.shape[:2], width)
    turned, bias = w["weight_hh"].mT, w.get("bias_hh")
    steps = (t.unbind() for t in (a[..., :-width], a[..., -width:], gates[..., :-width], gates[..., -width:], hs))
    for t, (a_first, a_n, first, n, now) in enumerate(zip(*steps, strict=True)):
        r, z = first[:, :width], first[:, -width:]
        if cell.reset_after:
            b = h @ turned if bias is None or cell.layer_norm else torch.addmm(bias, h, turned)
            if cell.layer_norm:
                b = F.layer_norm(b, b.shape[-1:], w["ln_hh.weight"], w["ln_hh.bias"], EPS)
                b = b if bias is None else b.add_(bias)
            torch.add(a_first, b[:, :-width], out=first).sigmoid_()
            torch.addcmul(a_n, r, b[:, -width:], out=n)
        else:
            torch.addmm(a_first, h, turned[:, :-width], out=first).sigmoid_()
            torch.addmm(a_n, r * h, turned[:, -width:], out=n)
        n.tanh_()
        torch.lerp(h, n, z, out=now) if cell.minimal else torch.lerp(n, h, z, out=now)
        if mask is not None:
            now.copy_(torch.where(mask[t, :, None], now, h))
        h = now
    return [hs, gates]


def gru_backward(
    cell: GRU,
    grads: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    mask: Tensor | None,
    carry: Sequence[Tensor],
) -> list[Tensor]:
    (grad_h, grad_gates), (hs, gates), width = grads, saved, state[0].shape[-1]
    w = dict(zip(cell.recurrent(), params, strict=True))
    weight, bias = w["weight_hh"], w.get("bias_hh")
    h_before = torch.cat((state[0][None], hs[:-1]))
    first, n = gates[..., :-width], gates[..., -width:]
    r, z = first[..., :width], first[..., -width:]
    norm = None
    if cell.reset_after:  # what r multiplies
        b = h_before @ (weight if cell.layer_norm else weight[-width:]).mT
        norm = Normalised(b, w["ln_hh.weight"], w["ln_hh.bias"]) if cell.layer_norm else None
        reset = (norm.out if norm else b)[..., -width:]
        reset = reset if bias is None else reset + bias[-width:]
    else:
        reset = h_before
    # Derivatives: of h by the pre-activations of z and n, of what r has multiplied by that of r, of h by the one before.
    slope = first * (1 - first)
    by_r = reset * slope[..., :width]
    keep = 1 - z if cell.minimal else z
    by_zn = torch.stack(((h_before - n) * slope[..., -width:], (1 - keep) * (1 - n * n)), 2)
    if cell.minimal:
        by_zn[:, :, 0].neg_()
    if mask is not None:
        by_zn.mul_(mask[..., None, None])
        keep = keep.masked_fill(~mask[..., None], 1.0)
    # The gates' own gradients; the loop adds the others.
    da = torch.zeros_like(gates) if grad_gates is None else torch.cat((slope, 1 - n * n), -1).mul_(grad_gates)
    parts = da.unflatten(-1, (-1, width))
    db = torch.empty_like(gates) if cell.reset_after else da
    dz = torch.empty_like(gates) if norm else db
    (dh,) = carry
    for t in range(gates.shape[0] - 1, -1, -1):
        if grad_h is not None:
            dh = dh + grad_h[t]
        dr, dn = parts[t, :, 0], parts[t, :, -1]
        parts[t, :, -2:].addcmul_(dh[:, None], by_zn[t])
        du = dn if cell.reset_after else dn @ weight[-width:]
        dr.addcmul_(du, by_r[t])
        if cell.reset_after:
            db[t, :, :-width] = da[t, :, :-width]
            torch.mul(dn, r[t], out=db[t, :, -width:])
            if norm:
                dz[t] = norm.back(db[t], t)
            dh = torch.addmm(dh * keep[t], dz[t], weight)
        else:
            dh = torch.addmm(dh * keep[t], da[t, :, :-width], weight[:-width]).addcmul_(du, r[t])
    if cell.reset_after:
        found = {"weight_hh": dz.flatten(0, 1).mT @ h_before.flatten(0, 1), "bias_hh": db.sum((0, 1))}
        found |= zip(("ln_hh.weight", "ln_hh.bias"), norm.parameters(db), strict=True) if norm else ()
    else:
        seen = [h_before] * (cell.rows - 1) + [r * h_before]
        found = {"weight_hh": torch.cat([d.flatten(0, 1).mT @ s.flatten(0, 1) for d, s in zip(parts.unbind(2), seen, strict=True)])}
    return [da, dh, *(found[name] for name in cell.recurrent())]
