"""Public forms of `vars` and `context_pool`: the authors' blocks in their order of operations, and the plain softmax over all pairs."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AuthorsVARS(nn.Module):
    """bfshi/VARS, "d" and "sd": the dictionary formed, normalised and copied; three operations a step."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.heads, self.lam, self.steps = ours.num_heads, ours.lam, ours.num_steps
        self.qkv, self.proj = ours.qkv, ours.proj
        self.register_buffer("rand_matrix", ours.rand_matrix)
        self.kernel = ours.kernel if ours.variant == "sd" else None
        self.learned_k, self.learned_lam, self.learned_L = ours.learned_k, ours.learned_lam, ours.learned_L

    def forward(self, x: Tensor) -> Tensor:
        b, n, dim = x.shape
        q, v = self.qkv(x).reshape(b, n, 2, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        u = F.normalize(q * (dim // self.heads) ** -0.25, dim=-1)
        atoms = torch.exp(u @ self.rand_matrix - u.norm(dim=-1, keepdim=True) ** 2 / 2) / self.rand_matrix.shape[-1] ** 0.5
        if self.kernel is not None:
            atoms = torch.cat((atoms, self.kernel.repeat(b, 1, 1, 1)), -1)
        atoms = F.normalize(atoms, dim=-2)
        keys = atoms.clone()
        gram = atoms.transpose(-2, -1) @ keys
        target = keys.transpose(-2, -1) @ v
        bound = (gram.norm(p=1, dim=-1).max(-1)[0].detach()[..., None, None] + 1) / self.learned_L
        lam = self.learned_lam * self.lam
        mixed = self.learned_k[None, None] @ gram @ self.learned_k
        z = torch.sign(target) * F.gelu(target.abs() - lam)
        for _ in range(self.steps):
            z = z - (mixed @ z - target) / bound
            z = torch.sign(z) * F.gelu(z.abs() - lam / bound)
        return self.proj((atoms @ z).transpose(1, 2).reshape(b, n, dim))


class AuthorsConvVARS(nn.Module):
    """bfshi/VARS, "s": every pair of kernels multiplied, grouped convolutions in the Fourier domain."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.size, self.lam, self.steps = ours.grid_size[0], ours.lam, ours.num_steps
        self.v, self.proj, self.norm1, self.kernel, self.kernel2 = ours.v, ours.proj, ours.norm1, ours.kernel, ours.kernel2
        self.register_buffer("L", ours.L)

    def filtered(self, x: Tensor, weight: Tensor) -> Tensor:
        group, out, into = weight.shape[:3]
        x = x.reshape(x.shape[0], group, 1, into, self.size, self.size).float()
        x = (torch.fft.rfftn(x, dim=(-2, -1), norm="ortho") * weight[None]).sum(3)
        return torch.fft.irfftn(x, s=(self.size, self.size), dim=(-2, -1), norm="ortho").reshape(-1, group * out, self.size**2)

    def forward(self, x: Tensor) -> Tensor:
        k = torch.view_as_complex(self.kernel)
        last = k.permute(0, 3, 4, 1, 2)
        pairs = (last.unsqueeze(-1) * last.conj().transpose(-2, -1).unsqueeze(3)).sum(-2).permute(0, 3, 4, 1, 2)
        target = self.filtered(self.v(x).transpose(-2, -1), k)
        bound = self.L.view(-1, 1).repeat(1, k.shape[1]).view(-1)[None, :, None]
        z = torch.sign(target) * F.relu(target.abs() - self.lam)
        for _ in range(self.steps):
            z = z - (self.filtered(z, pairs) - target) / bound
            z = torch.sign(z) * F.relu(z.abs() - self.lam / bound)
        out = self.filtered(self.filtered(z, k.conj().transpose(1, 2)), torch.view_as_complex(self.kernel2))
        return self.proj(self.norm1["bn"](out).transpose(-2, -1))


class PlainContextPool(nn.Module):
    """The softmax over all pairs and one product; then nn.MultiheadAttention's arithmetic by the fused kernel."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        ours = self.ours
        tokens = x.flatten(2).mT if ours.layout == "map" else x
        rows, past = (x if ours.layout == "map" else x.mT), (ours.kernel_size - 1, 0) if ours.causal else (0, 0)
        w, s = ours.predict[2](F.pad(ours.predict[0](F.pad(rows, past)).relu(), past)).unbind(1)
        length = ours.context_len if ours.causal else max(x.shape[2:] if ours.layout == "map" else x.shape[1:2])
        sigma = (ours.radius * length * s.sigmoid()).clamp_min(1e-3)
        axes = [torch.arange(size, dtype=x.dtype) for size in w.shape[1:]]
        at = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
        offset = at[:, None] - at
        scores = F.logsigmoid(w).flatten(1)[:, None] - offset.square().sum(-1) / (2 * sigma.flatten(1)[:, :, None] ** 2)
        if ours.window is not None:
            scores = scores.masked_fill(offset.abs().amax(-1) > ours.window, float("-inf"))
        if ours.causal:
            scores = scores.masked_fill(offset[..., 0] < 0, float("-inf"))
        y = scores.softmax(-1) @ tokens
        if ours.num_heads:
            q, k, v = (p(y).unflatten(2, (ours.num_heads, -1)).transpose(1, 2) for p in (ours.q_proj, ours.k_proj, ours.v_proj))
            y = ours.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=ours.causal).transpose(1, 2).flatten(2))
        return y.mT.reshape(x.shape) if ours.layout == "map" else y


def _vars(ours: nn.Module) -> nn.Module:
    return (AuthorsConvVARS if ours.variant == "s" else AuthorsVARS)(ours)


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "context_pool": {"softmax over pairs": PlainContextPool},
    "vars": {"bfshi/VARS": _vars},
}
