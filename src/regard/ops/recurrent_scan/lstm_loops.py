"""The LSTM's loop forward and back, written out.

The backward pass computes all that does not depend on later steps for the whole sequence at once; a step is then a few element-wise calls
and one product, and the gradient of the recurrent weights is one product at the end. Forward, the arithmetic is that of the reference, in order.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import EPS, LSTM
from .normalised import Normalised


def lstm_forward(cell: LSTM, a: Tensor, state: Sequence[Tensor], params: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    (h, c), w, width = state, dict(zip(cell.recurrent(), params, strict=True)), state[0].shape[-1]
    gates = torch.empty_like(a, memory_format=torch.contiguous_format)
    hs, cs = (a.new_empty(*a.shape[:2], width) for _ in range(2))
    parts, turned = gates.unflatten(-1, (-1, width)), w["weight_hh"].mT
    for t in range(a.shape[0]):
        z, (*first, f, g, o) = gates[t], parts[t].unbind(1)
        if cell.layer_norm:
            z.copy_(F.layer_norm(h @ turned, z.shape[-1:], w["ln_hh.weight"], w["ln_hh.bias"], EPS)).add_(a[t])
        else:
            torch.addmm(a[t], h, turned, out=z)
        if cell.peephole:
            f.addcmul_(c, w["peephole_f"])
            for i in first:
                i.addcmul_(c, w["peephole_i"])
        z[:, : -2 * width].sigmoid_()
        g.tanh_()
        torch.mul(f, c, out=cs[t]).addcmul_(1 - f if cell.coupled else first[0], g)
        if cell.peephole:
            o.addcmul_(cs[t], w["peephole_o"])
        o.sigmoid_()
        u = F.layer_norm(cs[t], (width,), w["ln_c.weight"], w["ln_c.bias"], EPS) if cell.layer_norm else cs[t]
        torch.tanh(u, out=hs[t]).mul_(o)
        if mask is not None:
            hs[t] = torch.where(mask[t, :, None], hs[t], h)
            cs[t] = torch.where(mask[t, :, None], cs[t], c)
        h, c = hs[t], cs[t]
    return [hs, cs, gates]


def lstm_backward(
    cell: LSTM,
    grads: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    mask: Tensor | None,
    carry: Sequence[Tensor],
) -> list[Tensor]:
    (grad_h, grad_c, grad_gates), (hs, cs, gates), width = grads, saved, state[0].shape[-1]
    names = cell.recurrent()
    w = dict(zip(names, params, strict=True))
    h_before, c_before = torch.cat((state[0][None], hs[:-1])), torch.cat((state[1][None], cs[:-1]))
    *first, f, g, o = gates.unflatten(-1, (-1, width)).unbind(2)
    # The cell before the mask put the old one back.
    fresh = cs if mask is None else f * c_before + (1 - f if cell.coupled else first[0]) * g
    norm_c = norm_z = None
    if cell.layer_norm:
        norm_c = Normalised(fresh, w["ln_c.weight"], w["ln_c.bias"])
        norm_z = Normalised(h_before @ w["weight_hh"].mT, w["ln_hh.weight"], w["ln_hh.bias"])
    leaving = torch.tanh(norm_c.out if norm_c else fresh)
    # Derivatives: of h by the pre-activation of o and by the normalised cell; of the cell by the other pre-activations.
    slopes = torch.cat((gates[..., : -2 * width] * (1 - gates[..., : -2 * width]), 1 - g * g, o * (1 - o)), -1)
    by_o, by_u = leaving * slopes[..., -width:], o * (1 - leaving * leaving)
    inner = torch.stack((c_before - g, 1 - f) if cell.coupled else (g, c_before, first[0]), 2)
    inner = inner * slopes[..., :-width].unflatten(-1, (-1, width))
    # From here on: what the gates' own gradients add.
    slopes = torch.zeros_like(gates) if grad_gates is None else slopes.mul_(grad_gates)
    da = torch.empty_like(gates)
    parts = da.unflatten(-1, (-1, width))
    dz = torch.empty_like(gates) if cell.layer_norm else da
    du = torch.empty_like(by_u) if cell.layer_norm else by_u
    dh, dc = carry
    for t in range(gates.shape[0] - 1, -1, -1):
        dh = dh if grad_h is None else dh + grad_h[t]
        dc = dc if grad_c is None else dc + grad_c[t]
        old_h = old_c = None
        if mask is not None:
            real = mask[t, :, None]
            old_h, old_c = dh.masked_fill(real, 0.0), dc.masked_fill(real, 0.0)
            dh, dc = dh.masked_fill(~real, 0.0), dc.masked_fill(~real, 0.0)
        do = torch.addcmul(slopes[t, :, -width:], dh, by_o[t], out=da[t, :, -width:])
        dc = dc + norm_c.back(torch.mul(dh, by_u[t], out=du[t]), t) if norm_c else torch.addcmul(dc, dh, by_u[t])
        if cell.peephole:
            dc = torch.addcmul(dc, do, w["peephole_o"])
        torch.addcmul(slopes[t, :, :-width].unflatten(-1, (-1, width)), dc[:, None], inner[t], out=parts[t, :, :-1])
        dc = dc * f[t]
        if cell.peephole:
            dc = torch.addcmul(dc, parts[t, :, -3], w["peephole_f"])
            dc = dc if cell.coupled else torch.addcmul(dc, parts[t, :, 0], w["peephole_i"])
        if norm_z:
            dz[t] = norm_z.back(da[t], t)
        dh = dz[t] @ w["weight_hh"]
        if old_h is not None and old_c is not None:
            dh, dc = dh + old_h, dc + old_c
    found = {"weight_hh": dz.flatten(0, 1).mT @ h_before.flatten(0, 1)}
    if norm_z and norm_c:
        found |= zip(("ln_hh.weight", "ln_hh.bias", "ln_c.weight", "ln_c.bias"), (*norm_z.parameters(da), *norm_c.parameters(du)), strict=True)
    if cell.peephole:
        found |= {"peephole_o": (parts[:, :, -1] * fresh).sum((0, 1)), "peephole_f": (parts[:, :, -3] * c_before).sum((0, 1))}
        found["peephole_i"] = (parts[:, :, 0] * c_before).sum((0, 1))
    return [da, dh, dc, *(found[name] for name in names)]
