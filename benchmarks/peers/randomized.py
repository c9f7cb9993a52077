"""Public forms of randomized attention and LARA, re-expressed for timing: the same operations in the same order, on the same weights.

Outputs can be equal only without chance: time `randomized` with num_samples=-1 (or 0) and both with noise_std=0, which costs the same draws.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from regard.official import to_official


class _FusedProjections(nn.Module):
    """HKUNLP's base: one layer for queries, keys and values, heads cut by a permuted view."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        state = to_official(ours)
        self.num_heads, self.scale, self.std = ours.num_heads, ours.head_dim**-0.5, float(ours.noise_std)
        self.qkv, self.proj = nn.Linear(ours.dim, 3 * ours.dim, ours.qkv_bias), nn.Linear(ours.dim, ours.dim)
        for name in ("qkv", "proj"):
            getattr(self, name).load_state_dict({key[len(name) + 1 :]: t for key, t in state.items() if key.startswith(name + ".")})

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, dim = x.shape
        return self.qkv(x).reshape(b, n, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)

    def feature(self, y: Tensor, w: Tensor) -> Tensor:
        scores = torch.einsum("...nd,...md->...nm", w, y.shape[-1] ** -0.5 * y)
        return scores - y.shape[-1] ** -0.5 * torch.sum(y**2, dim=-1).unsqueeze(-2) / 2.0

    def merged(self, x: Tensor, out: Tensor) -> Tensor:
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class PublicRandomized(_FusedProjections):
    """RandomizedAttention: the N x N probabilities, the N x N scores of the features, their softmax."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__(ours)
        self.num_samples = ours.num_samples

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if self.num_samples == 0:
            mu = q + k.mean(-2, keepdim=True)
        else:
            pi = torch.einsum("...nd,...md->...nm", self.scale * q, k).softmax(-1)
            if self.num_samples == -1:
                mu = q + torch.einsum("...nm,...md->...nd", pi, k)
            else:
                b, h, n, d = q.shape
                with torch.no_grad():
                    index = torch.multinomial(pi.reshape(b * h * n, n), 1, replacement=True).reshape(b, h, n)
                mu = q + torch.gather(k, 2, index.unsqueeze(-1).repeat(1, 1, 1, d))
        w = mu + self.std * torch.randn_like(mu) if self.training else mu
        scores = torch.einsum("...nd,...md->...nm", w, self.scale * k) - self.scale * torch.sum(k**2, dim=-1).unsqueeze(-2) / 2.0
        return self.merged(x, torch.einsum("...nm,...md->...nd", scores.softmax(-1), v))


class PublicLara(_FusedProjections):
    """LinearRA with adaptive-1d proposals: a layer and a norm on every token, segment means, and whole (C, N) matrices for every term."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__(ours)
        self.landmarks, self.mis_type, self.alpha_coeff = ours.num_landmarks, ours.mis_type, ours.alpha_coeff
        d, state = ours.head_dim, to_official(ours)
        self.q_bar_gen, self.k_bar_gen = (nn.Sequential(nn.Linear(d, d), nn.LayerNorm(d)) for _ in range(2))
        for name in ("q_bar_gen", "k_bar_gen"):
            getattr(self, name).load_state_dict({key[len(name) + 1 :]: t for key, t in state.items() if key.startswith(name + ".")})

    def means(self, y: Tensor) -> Tensor:
        b, h, n, d = y.shape
        return y.reshape(b, h, self.landmarks, n // self.landmarks, d).mean(-2)  # every measured length divides

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q_bar, k_bar = self.means(self.q_bar_gen(q)), self.means(self.k_bar_gen(k))
        mu = q_bar + k_bar
        w = mu + self.std * torch.randn_like(mu) if self.training else mu
        log_q, log_k = self.feature(q, w), self.feature(k, w)
        kv = torch.einsum("...cm,...md->...cd", log_k.softmax(-1), v)
        log_mu, log_alpha = self.feature(mu, w), 0.0
        log_proposal = torch.logsumexp(log_mu, -1, keepdim=True)
        if self.mis_type == "mis-biased":
            log_alpha = torch.einsum("...cd,...nd->...cn", self.scale * mu, q)
        elif self.mis_type == "mis-opt":
            t = torch.einsum("...cd,...nd->...cn", self.scale * q_bar, q).softmax(-1)
            log_proposal = torch.diagonal(log_mu, dim1=-1, dim2=-2).unsqueeze(-1)
            alpha = torch.exp(log_proposal - torch.logsumexp(log_mu, -1, keepdim=True)) + self.alpha_coeff * (t - t.mean(-2, keepdim=True))
            log_alpha = torch.log(alpha.clamp(min=1e-8))
        ratio = log_alpha + (log_q + torch.logsumexp(log_k, -1, keepdim=True)) - log_proposal
        return self.merged(x, torch.einsum("...cn,...cd->...nd", ratio.softmax(-2), kv))


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "lara": {"HKUNLP LinearRA": PublicLara},
    "randomized": {"HKUNLP RA": PublicRandomized},
}
