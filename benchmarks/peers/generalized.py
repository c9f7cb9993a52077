"""mmcv's generalized attention, re-expressed for timing: the same operations in the same order, on the same weights."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard.official import to_official


class ExplicitGeneralized(nn.Module):
    """All energies (B, M, h, w, h', w') stored, a term at a time; position features repeated for each sample; one softmax. Not E2 without E4."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        c, self.heads, self.d = ours.channels, ours.num_heads, ours.head_dim
        self.terms = [digit == "1" for digit in ours.attention_type]
        self.q_stride, self.kv_stride, self.width, self.magnitude = ours.q_stride, ours.kv_stride, ours.position_dim, ours.position_magnitude
        e1, e2, e3, e4 = self.terms
        inner = self.heads * self.d
        if e1 or e2:
            self.query_conv = nn.Conv2d(c, inner, 1, bias=False)
        if e1 or e3:
            self.key_conv = nn.Conv2d(c, inner, 1, bias=False)
        self.value_conv, self.proj_conv = nn.Conv2d(c, inner, 1, bias=False), nn.Conv2d(inner, c, 1)
        if e2 or e4:
            self.appr_geom_fc_x, self.appr_geom_fc_y = (nn.Linear(self.width // 2, inner, bias=False) for _ in range(2))
        if e3:
            self.appr_bias = nn.Parameter(torch.zeros(inner))
        if e4:
            self.geom_bias = nn.Parameter(torch.zeros(inner))
        self.gamma = nn.Parameter(torch.zeros(1))
        self.load_state_dict(to_official(ours, "mmcv"))

    def forward(self, x: Tensor) -> Tensor:
        e1, e2, e3, e4 = self.terms
        m, d = self.heads, self.d
        x_q = nn.functional.avg_pool2d(x, 1, self.q_stride) if self.q_stride > 1 else x
        x_kv = nn.functional.avg_pool2d(x, 1, self.kv_stride) if self.kv_stride > 1 else x
        (n, _, h, w), (h_kv, w_kv) = x_q.shape, x_kv.shape[2:]
        query = self.query_conv(x_q).view(n, m, d, h * w).permute(0, 1, 3, 2) if e1 or e2 else x
        key = self.key_conv(x_kv).view(n, m, d, h_kv * w_kv) if e1 or e3 else x
        if not (e1 or e2 or e4):
            energy = torch.matmul(self.appr_bias.view(1, m, 1, d).repeat(n, 1, 1, 1), key).view(n, m, 1, h_kv * w_kv)
            h = w = 1
        else:
            energy = x.new_zeros(n, m, h, w, h_kv, w_kv)
            if e1:
                content = query + self.appr_bias.view(1, m, 1, d) if e3 else query
                energy = torch.matmul(content, key).view(n, m, h, w, h_kv, w_kv)
            elif e3:
                energy = energy + torch.matmul(self.appr_bias.view(1, m, 1, d).repeat(n, 1, 1, 1), key).view(n, m, 1, 1, h_kv, w_kv)
            if e2 or e4:
                far_x, far_y = self._features(self.appr_geom_fc_x, n, w, w_kv), self._features(self.appr_geom_fc_y, n, h, h_kv)
                if e2:
                    asked = (query + self.geom_bias.view(1, m, 1, d)).view(n, m, h, w, d)
                    energy_x = torch.matmul(asked.permute(0, 1, 3, 2, 4), far_x.permute(0, 1, 2, 4, 3)).permute(0, 1, 3, 2, 4).unsqueeze(4)
                    energy_y = torch.matmul(asked, far_y.permute(0, 1, 2, 4, 3)).unsqueeze(5)
                else:
                    bias = self.geom_bias.view(1, m, d, 1).repeat(n, 1, 1, 1)
                    energy_x = torch.matmul(far_x.reshape(n, m, w * w_kv, d), bias).view(n, m, 1, w, 1, w_kv)
                    energy_y = torch.matmul(far_y.reshape(n, m, h * h_kv, d), bias).view(n, m, h, 1, h_kv, 1)
                energy = energy + (energy_x + energy_y)
            energy = energy.view(n, m, h * w, h_kv * w_kv)
        weights = torch.softmax(energy, 3)
        value = self.value_conv(x_kv).view(n, m, d, h_kv * w_kv).permute(0, 1, 3, 2)
        out = torch.matmul(weights, value).permute(0, 1, 3, 2).contiguous().view(n, m * d, h, w)
        out = self.proj_conv(out)
        if self.q_stride > 1:
            out = nn.functional.interpolate(out, size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.gamma * out + x

    def _features(self, fc: nn.Linear, n: int, size: int, size_kv: int) -> Tensor:
        far = (torch.arange(size)[:, None] * self.q_stride - torch.arange(size_kv)[None] * self.kv_stride).float() * self.magnitude
        angle = far[..., None] / 1000 ** (4.0 / self.width * torch.arange(self.width / 4))
        features = fc(torch.cat((angle.sin(), angle.cos()), 2)).view(1, size, size_kv, self.heads, self.d).permute(0, 3, 1, 2, 4)
        return features.repeat(n, 1, 1, 1, 1) / math.sqrt(2)


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {"generalized": {"mmcv": ExplicitGeneralized}}
