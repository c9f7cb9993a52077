"""Public forms of bilinear attention and of few-shot cross attention, re-expressed for timing: the same operations in the same order."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.official import to_official


class Normed(nn.Module):
    """A linear layer under torch's weight norm with dim=None: the matrix is made at every call."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        linear = nn.Linear(inputs, outputs)
        self.weight_v, self.bias, self.weight_g = linear.weight, linear.bias, nn.Parameter(linear.weight.detach().norm())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, -1), self.bias)


def fc(inputs: int, outputs: int, dropout: float, act: bool = True) -> nn.ModuleDict:
    return nn.ModuleDict({"main": nn.Sequential(nn.Dropout(dropout), Normed(inputs, outputs), *([nn.ReLU()] if act else []))})


class OfficialBAN(nn.Module):
    """jnhwkim, without counter and classifier: three-operand einsums."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        v, d, g, k = ours.v_dim, ours.q_dim, ours.glimpses, ours.q_dim * ours.rank_mult
        first, second = ours.dropout
        logits = nn.ModuleDict({"v_net": fc(v, k, first), "q_net": fc(d, k, first), "dropout": nn.Dropout(second)})
        for name, shape in (("h_mat_v", (1, g, 1, k)), ("h_mat_g", ()), ("h_bias", (1, g, 1, 1))):
            logits.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.v_att = nn.ModuleDict({"logits": logits})
        self.b_net = nn.ModuleList(nn.ModuleDict({"v_net": fc(v, d, first), "q_net": fc(d, d, first)}) for _ in range(g))
        self.q_prj = nn.ModuleList(fc(d, d, first, act=False) for _ in range(g))
        self.load_state_dict(to_official(ours))

    def forward(self, v: Tensor, q: Tensor) -> Tensor:
        net = self.v_att["logits"]
        v_, q_ = net["dropout"](net["v_net"]["main"](v)), net["q_net"]["main"](q)
        h = torch._weight_norm(net.h_mat_v, net.h_mat_g, -1)
        logits = torch.einsum("xhyk,bvk,bqk->bhvq", h, v_, q_) + net.h_bias
        mask = (v.abs().sum(2) == 0)[:, None, :, None].expand(logits.shape)
        logits.data.masked_fill_(mask.data, -float("inf"))
        att = F.softmax(logits.view(*logits.shape[:2], -1), 2).view(logits.shape)
        for g, (net, project) in enumerate(zip(self.b_net, self.q_prj, strict=True)):
            joint = torch.einsum("bvk,bvq,bqk->bk", net["v_net"]["main"](v), att[:, g], net["q_net"]["main"](q))
            q = project["main"](joint.unsqueeze(1)) + q
        return q


class OfficialCAM(nn.Module):
    """blue-blue272: the correlation of all positions of every pair, stored."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        m, hidden = ours.positions, ours.hidden_channels
        self.temperature = ours.temperature
        self.conv1 = nn.ModuleDict({"conv": nn.Conv2d(m, hidden, 1), "bn": nn.BatchNorm2d(hidden)})
        self.conv2 = nn.Conv2d(hidden, m, 1)
        self.load_state_dict(to_official(ours))

    def attention(self, a: Tensor) -> Tensor:
        pooled = a.mean(3).transpose(1, 3)
        kernel = self.conv2(F.relu(self.conv1["bn"](self.conv1["conv"](pooled)))).transpose(1, 3).unsqueeze(3)
        return F.softmax(torch.mean(a * kernel, -1) / self.temperature, -1) + 1

    def forward(self, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        b, n1, c, h, w = support.shape
        n2 = query.shape[1]
        f1, f2 = support.view(b, n1, c, -1), query.view(b, n2, c, -1)
        norm1 = F.normalize(f1, p=2.0, dim=2, eps=1e-12).transpose(2, 3).unsqueeze(2)
        norm2 = F.normalize(f2, p=2.0, dim=2, eps=1e-12).unsqueeze(1)
        a1 = torch.matmul(norm1, norm2)
        a2 = a1.transpose(3, 4)
        a1, a2 = self.attention(a1), self.attention(a2)
        f1 = (f1.unsqueeze(2) * a1.unsqueeze(3)).view(b, n1, n2, c, h, w)
        f2 = (f2.unsqueeze(1) * a2.unsqueeze(3)).view(b, n1, n2, c, h, w)
        return f1.transpose(1, 2), f2.transpose(1, 2)


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module | None]]] = {
    "ban": {"authors": lambda ours: None if ours.counter or ours.num_classes else OfficialBAN(ours)},
    "cross_attention_few_shot": {"authors": OfficialCAM},
}
