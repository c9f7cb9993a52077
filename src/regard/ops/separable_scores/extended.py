"""The fused kernel on wider heads: [q ; row ; column] . [k ; onehot(a) ; onehot(b)] is the whole score, and nothing N x K is stored."""

import torch
from torch import Tensor

from ..softmax_attention import attend


def extended_attend(q: Tensor, k: Tensor, v: Tensor, row: Tensor, column: Tensor) -> Tensor:
    rows, columns = (torch.eye(t.shape[-1], dtype=k.dtype, device=k.device) for t in (row, column))
    places = torch.cat((rows.repeat_interleave(column.shape[-1], 0), columns.repeat(row.shape[-1], 1)), -1)
    keys = torch.cat((k, places.expand(*k.shape[:2], -1, -1)), -1)
    least = torch.finfo(q.dtype).min / 4
    scores = [t.clamp_min(least).to(q.dtype) for t in (row, column)]  # an infinite one times a zero would be NaN
    return attend(torch.cat((q, *scores), -1), keys, v, scale=1.0)
