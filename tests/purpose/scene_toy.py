"""The toy of soft and hard attention: naming the colour of the cell that a query points to."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard.ops.attention_losses import hard_attention_loss

CELLS, COLOURS, STEPS = 9, 5, 4


def scenes(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Nine cells, each with a mark that no other cell has and a colour, in any order; the marks asked for in turn; the colours of their cells."""
    marks = torch.rand(batch, CELLS, generator=generator).argsort(1)
    colours = torch.randint(COLOURS, (batch, CELLS), generator=generator)
    asked = torch.randint(CELLS, (batch, STEPS), generator=generator)
    at = (marks[:, None] == asked[..., None]).long().argmax(-1)
    return F.one_hot(asked, CELLS).float(), torch.cat((F.one_hot(marks, CELLS), F.one_hot(colours, COLOURS)), -1).float(), colours.gather(1, at)


def accuracy(id: str | None, *, steps: int = 400, seed: int = 0, surrogate: bool = True, **options: object) -> float:
    """Of colours named on unseen scenes. Without an id the decoder sees the mean of the cells; hard attention may do without its `surrogate`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    attention = regard.create(id, CELLS + COLOURS, CELLS, 64, gate=None, **options) if id else None
    name = nn.Sequential(nn.Linear(CELLS + COLOURS + CELLS, 64), nn.ReLU(), nn.Linear(64, COLOURS))
    optimizer = torch.optim.Adam([*name.parameters(), *(attention.parameters() if attention else ())], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    baseline = torch.tensor(1.6)
    for _ in range(steps):
        query, cells, colours = scenes(64, generator)
        optimizer.zero_grad()
        if attention is None:
            z = cells.mean(1, keepdim=True).expand(-1, STEPS, -1)
        elif id == "hard_attention":
            z, weights, indices = attention(query, cells, generator=generator)
        else:
            z, _ = attention(query, cells)
        cost = F.cross_entropy(name(torch.cat((z, query), -1)).mT, colours, reduction="none")
        loss = cost.sum(1).mean()
        if id == "hard_attention" and surrogate:
            reward, baseline = hard_attention_loss(weights, indices, cost, baseline)
            loss = loss + reward
        loss.backward()
        optimizer.step()
        schedule.step()
    if attention is not None:
        attention.eval()
    with torch.no_grad():
        query, cells, colours = scenes(2000, generator)
        z = attention(query, cells)[0] if attention else cells.mean(1, keepdim=True).expand(-1, STEPS, -1)
        return (name(torch.cat((z, query), -1)).argmax(-1) == colours).float().mean().item()
