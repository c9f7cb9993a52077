"""What the context is for: boxes that could be either of two classes, told apart by what else is in the picture."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard

SOURCE, BOXES = 12, 12


def pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scores of the boxes (count, BOXES, SOURCE), of which the first is the one to tell, and its class.

    That box looks as much like source class 0 as like 1, whichever of the two novel classes it is. Another box, anywhere, shows source class 2
    with novel class 0 and source class 3 with novel class 1; the rest are of the other classes.
    """
    labels = torch.randint(2, (count,), generator=generator)
    kinds = torch.randint(4, SOURCE, (count, BOXES), generator=generator)
    kinds[:, 1:].scatter_(1, torch.randint(BOXES - 1, (count, 1), generator=generator), (2 + labels)[:, None])
    scores = 2 * F.one_hot(kinds, SOURCE).float()
    scores[:, 0] = 0
    scores[:, 0, :2] = 1.5
    return scores + 0.2 * torch.randn(scores.shape, generator=generator), labels


def accuracy(look: bool, steps: int = 600) -> float:
    torch.manual_seed(0)
    net, generator = regard.create("context_transformer", SOURCE, 2), torch.Generator().manual_seed(1)
    scores, labels = pictures(64, generator)
    net.imprint(scores[:, 0], labels)
    net.w_z.requires_grad_(look)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        scores, labels = pictures(64, generator)
        optimizer.zero_grad()
        F.cross_entropy(net(scores[:, :1], scores)[:, 0], labels).backward()
        optimizer.step()
        net.normalize()
    scores, labels = pictures(2000, torch.Generator().manual_seed(2))
    with torch.no_grad():
        return (net(scores[:, :1], scores)[:, 0].argmax(1) == labels).float().mean().item()


@pytest.mark.slow
def test_context_tells_confused_classes_apart() -> None:
    """Measured: 1.0 with the module (so with two other seeds), with w_z held at zero 0.51.

    With larger scores (4 in place of 2, 30 boxes) one seed of two did not leave chance in 1500 steps: the unscaled softmax starts saturated. And
    64 pictures alone, seen again and again, are learnt by heart (0.49 on unseen ones).
    """
    looking, alone = accuracy(look=True), accuracy(look=False)
    assert looking > 0.9
    assert 0.4 < alone < 0.6, (looking, alone)
