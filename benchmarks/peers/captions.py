"""Public forms of attention over annotations, re-expressed for timing: the same operations in the same order, on the same weights."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class TutorialSteps(nn.Module):
    """sgrvinod's decoder: at every step the annotations are projected again, and all sums of locations by width are stored."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.encoder_att, self.decoder_att, self.full_att = (
            copy.deepcopy(getattr(ours.attention, f"{n}_att")) for n in ("encoder", "decoder", "full")
        )
        self.f = torch.relu if ours.activation == "relu" else torch.tanh
        self.f_beta = copy.deepcopy(ours.f_beta)
        self.temperature, self.hard = getattr(ours, "temperature", 1.0), hasattr(ours, "temperature")

    def forward(self, query: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        outputs, rows = [], []
        for h in query.unbind(1):
            att1, att2 = self.encoder_att(context), self.decoder_att(h)
            att = self.full_att(self.f(att1 + att2.unsqueeze(1))).squeeze(2)
            alpha = torch.softmax(self.temperature * att, 1)
            # The authors' hard attention multiplies all annotations by a one-hot vector.
            weights = torch.zeros_like(alpha).scatter_(1, alpha.argmax(1, keepdim=True), 1.0) if self.hard else alpha
            z = (context * weights.unsqueeze(2)).sum(1)
            outputs.append(z if self.f_beta is None else torch.sigmoid(self.f_beta(h)) * z)
            rows.append(alpha)
        return torch.stack(outputs, 1), torch.stack(rows, 1)


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "soft_attention": {"sgrvinod": TutorialSteps},
    "hard_attention": {"one-hot": TutorialSteps},
}
