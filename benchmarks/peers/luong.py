"""Public forms of Luong's attentions, re-expressed for timing: the same operations in the same order, on the same weights."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class OpenNMTGlobal(nn.Module):
    """OpenNMT-py: scores stored, softmax on flattened rows, context and state joined, outputs turned to time first."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.score_kind, self.dim, self.activation = ours.score, ours.dim, ours.activation
        for name, layer in ours.named_children():
            self.add_module(name, copy.deepcopy(layer))

    def score(self, h: Tensor, m: Tensor) -> Tensor:
        (b, t, d), s = h.shape, m.shape[1]
        if self.score_kind == "concat":
            wq = self.linear_query(h.view(-1, d)).view(b, t, 1, d).expand(b, t, s, d)
            uh = self.linear_context(m.contiguous().view(-1, d)).view(b, 1, s, d).expand(b, t, s, d)
            return self.v(torch.tanh(wq + uh).view(-1, d)).view(b, t, s)
        if self.score_kind == "general":
            h = self.linear_in(h.view(b * t, d)).view(b, t, d)
        return torch.bmm(h, m.transpose(1, 2))

    def weigh(self, h: Tensor, m: Tensor) -> Tensor:
        scores = self.score(h, m)
        return scores.view(-1, m.shape[1]).softmax(-1).view(scores.shape)

    def forward(self, h: Tensor) -> Tensor:
        b, t, d = h.shape
        c = torch.bmm(self.weigh(h, h), h)
        out = self.linear_out(torch.cat([c, h], 2).view(b * t, 2 * d)).view(b, t, d)
        out = torch.tanh(out) if self.activation else out
        return out.transpose(0, 1).contiguous().transpose(0, 1)


class DenseLocal(OpenNMTGlobal):
    """What public codes write for local-p: all scores, the window by a mask, softmax, then the Gaussian over every pair."""

    def __init__(self, ours: Any) -> None:
        super().__init__(ours)
        self.window, self.sigma = ours.window, ours.sigma

    def weigh(self, h: Tensor, m: Tensor) -> Tensor:
        s = torch.arange(m.shape[1], device=m.device, dtype=h.dtype)
        p = m.shape[1] * torch.sigmoid(self.v_p(torch.tanh(self.linear_p(h))))
        far = (s - p).abs() > self.window
        weights = self.score(h, m).masked_fill(far, float("-inf")).softmax(-1)
        return weights * torch.exp(-((s - p) ** 2) / (2 * self.sigma**2))


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "luong_global": {"OpenNMT": OpenNMTGlobal},
    "luong_local": {"dense": DenseLocal},
}
