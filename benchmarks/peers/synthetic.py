"""Public forms of synthesizers and of de-attention, re-expressed for timing: every score of every sample and head is formed, (B, H, N, N)."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class _Copied(nn.Module):
    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.ours = copy.deepcopy(ours)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.ours.num_heads, -1)).transpose(1, 2)

    def merged(self, weights: Tensor, v: Tensor) -> Tensor:
        return self.ours.out_proj((weights @ v).transpose(1, 2).flatten(2))


class ExpandedSynthesizer(_Copied):
    """Community forms: constant scores repeated for every sample, mixtures added as full matrices, softmax, dropout-free product."""

    def scores(self, mode: str, x: Tensor) -> Tensor:
        m, n = self.ours, x.shape[1]
        if mode == "vanilla":
            return self.heads(m.q_proj(x)) @ self.heads(m.k_proj(x)).mT * m.head_dim**-0.5
        if mode == "random":
            return m.random.weight[:, :n, :n].expand(x.shape[0], -1, -1, -1)
        if mode == "factorized_random":
            part = m.factorized_random
            return (part.r1 @ part.r2.mT)[:, :n, :n].expand(x.shape[0], -1, -1, -1)
        if mode == "dense":
            return (self.heads(m.dense.w1(x)).relu() @ m.dense.w2 + m.dense.b2[:, None])[..., :n]
        part = m.factorized_dense
        z = self.heads(part.w1(x)).relu()
        a, c = z @ part.w2_a + part.b2_a[:, None], z @ part.w2_b + part.b2_b[:, None]
        return (a.repeat_interleave(c.shape[-1], -1) * c.repeat(1, 1, 1, a.shape[-1]))[..., :n]

    def forward(self, x: Tensor) -> Tensor:
        m = self.ours
        parts = [self.scores(mode, x) for mode in m.modes]
        alphas = [None] * len(parts) if isinstance(m.mix, str) else m.mix.softmax(0)
        scores = sum(part if alpha is None else alpha * part for alpha, part in zip(alphas, parts, strict=True)) if len(parts) > 1 else parts[0]
        if m.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
        return self.merged(scores.softmax(-1), self.heads(m.v_proj(x)))


class CdistCoda(_Copied):
    """The equations line by line, the distance by torch.cdist (leaner and faster than an (N, M, d) difference)."""

    def forward(self, x: Tensor) -> Tensor:
        m = self.ours
        q, k, v = (self.heads(p(x)) for p in (m.q_proj, m.k_proj, m.v_proj))
        negative = -m.beta * torch.cdist(q, k, p=1)
        if m.normalization == "center":
            negative = negative - negative.mean((-2, -1) if m.center_over == "matrix" else -1, keepdim=True)
        weights = torch.tanh(m.alpha * (q @ k.mT)) * negative.sigmoid()
        return self.merged(2 * weights if m.normalization == "scale" else weights, v)


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "synthesizer": {"expanded scores": ExpandedSynthesizer},
    "coda": {"cdist": CdistCoda},
}
