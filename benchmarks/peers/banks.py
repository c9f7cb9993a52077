"""Public forms of the two pairs that read a bank of entries, re-expressed for timing: the same operations in the same order."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.official import to_official


class PublicBank(nn.Module):
    """The authors' graph, and mmaction2's: one actor a row, the bank repeated for each, 1x1x1 convolutions, the weights stored."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        d, width = ours.latent_dim, ours.width
        self.scale, self.rate = d**-0.5, ours.dropout
        self.reduce, self.lfb = nn.Conv3d(ours.dim, d, 1), nn.Conv3d(ours.bank_dim, d, 1)
        kinds = {"theta": (width, d), "phi": (d, d), "g": (d, d), "out": (d, width)}
        self.layers = nn.ModuleList(nn.ModuleDict({name: nn.Conv3d(*widths, 1) for name, widths in kinds.items()}) for _ in range(ours.num_layers))
        blobs = to_official(ours)
        with torch.no_grad():
            for name, conv in self.named_modules():
                if isinstance(conv, nn.Conv3d):
                    at = name.split(".")
                    blob = {"reduce": "input_fbonl_reduc", "lfb": "lfb_1x1"}.get(name) or f"lfb_nl{at[1]}_{at[2]}"
                    conv.weight.copy_(blobs[f"{blob}_w"])
                    conv.bias.copy_(blobs[f"{blob}_b"])

    def forward(self, x: Tensor, bank: Tensor) -> Tensor:
        b, n, _ = x.shape
        a = F.dropout(self.reduce(x.reshape(b * n, -1, 1, 1, 1)), self.rate, self.training)
        entries = bank.repeat_interleave(n, 0).transpose(1, 2).contiguous()[..., None, None]
        entries = F.dropout(self.lfb(entries), self.rate, self.training)
        for layer in self.layers:
            theta, phi, g = layer["theta"](a).flatten(2), layer["phi"](entries).flatten(2), layer["g"](entries).flatten(2)
            p = (torch.bmm(theta.transpose(1, 2), phi) * self.scale).softmax(2)
            t = torch.bmm(g, p.transpose(1, 2))[..., None, None]
            t = F.relu(F.layer_norm(t, t.shape[1:]))
            a = F.dropout(layer["out"](t), self.rate, self.training) + a
        return a.reshape(b, n, -1)


class OfficialContextTransformer(nn.Module):
    """The authors' forward after the score maps: five passes over the scores, and all P x M weights stored."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        k = ours.dim
        self.theta, self.phi, self.g = nn.Linear(k, k), nn.Linear(k, k), nn.Linear(k, k)
        self.Wz, self.OBJ_Target = nn.Parameter(torch.zeros(k)), nn.Linear(k, ours.num_novel, bias=False)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.load_state_dict(to_official(ours))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        theta, phi, g = self.theta(x) + x, self.phi(context) + context, self.g(context) + context
        weight = F.softmax(torch.matmul(theta, phi.transpose(1, 2)), dim=2)
        novel = x + torch.matmul(weight, g) * self.Wz
        novel = novel / novel.norm(dim=2, keepdim=True)
        return self.OBJ_Target(novel) * self.scale


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "feature_bank": {"authors": PublicBank},
    "context_transformer": {"authors": OfficialContextTransformer},
}
