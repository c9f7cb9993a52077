"""Probabilistic attention as its authors publish it, re-expressed for timing: the same operations in the same order, on the same weights."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class PublicProbabilistic(nn.Module):
    """apple/ml-probabilistic-attention between our projections: channels before positions, squared distances of all pairs formed in every E step."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.alpha, self.beta = ours.num_heads, ours.alpha or ours.head_dim**-0.5, ours.beta
        self.magnitude, self.iters, self.precision = ours.magnitude_priors, ours.key_adaptation_iters, ours.key_prior_precision
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (copy.deepcopy(f) for f in (ours.q_proj, ours.k_proj, ours.v_proj, ours.out_proj))

    def posterior(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q2, k2 = (q**2).sum(-2), (k**2).sum(-2)
        scores = q2.unsqueeze(-1) + k2.unsqueeze(-2) - 2 * torch.einsum("bhdn,bhdm->bhnm", q, k)
        scores = -0.5 * self.alpha * scores
        v2 = (v**2).sum(-2)
        if self.magnitude:
            scores += 0.5 * self.alpha * k2.unsqueeze(-2)
            scores += 0.5 * self.beta * v2.unsqueeze(-2)
        weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
        return weights.div(weights.sum(-1, keepdim=True) + 1e-20)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(2, (self.num_heads, -1)).permute(0, 2, 3, 1) for p in (self.q_proj, self.k_proj, self.v_proj))
        weights = self.posterior(q, k, v)
        for _ in range(self.iters):
            moved, mass = torch.einsum("bhnm,bhdn->bhdm", weights, q), weights.sum(-2, keepdim=True)
            if self.precision is not None:
                moved, mass = self.precision * k + self.alpha * moved, self.precision + self.alpha * mass
            k = moved.div(mass)
            weights = self.posterior(q, k, v)
        torch.zeros_like(v)  # the offsets of value positions, made whether there are any or not
        out = torch.einsum("bhnm,bhdm->bhdn", weights, v)
        return self.out_proj(out.permute(0, 3, 1, 2).flatten(2))


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {"probabilistic": {"ml-probabilistic-attention": PublicProbabilistic}}
