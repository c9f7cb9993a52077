"""What context pooling is for: labels that hang on a phrase of varying length are in reach of one layer, and the widths follow the phrases."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard

pytestmark = pytest.mark.slow
N, SYMBOLS, WIDTH = 64, 4, 32


def batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Segments of 3 to 15 symbols between delimiters; every symbol's label is the most frequent of its segment. Also the segments' lengths."""
    x, y, length = torch.full((count, N), SYMBOLS), torch.zeros(count, N, dtype=torch.long), torch.zeros(count, N)
    for row in range(count):
        at = 0
        while at < N:
            size = min(int(torch.randint(3, 16, (), generator=generator)), N - at)
            favourite = torch.randint(SYMBOLS, (1,), generator=generator).expand(size)
            other = torch.randint(SYMBOLS, (size,), generator=generator)
            segment = torch.where(torch.rand(size, generator=generator) < 0.5, favourite, other)
            x[row, at : at + size], length[row, at : at + size] = segment, size
            y[row, at : at + size] = torch.bincount(segment, minlength=SYMBOLS).argmax()
            at += size + 1
    return x, y, length


class OneLayer(nn.Module):
    def __init__(self, attention: nn.Module, hidden: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(SYMBOLS + 1, WIDTH), nn.Parameter(0.02 * torch.randn(N, WIDTH))
        self.attention, self.norms = attention, nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.mlp = nn.Sequential(nn.Linear(WIDTH, hidden), nn.GELU(), nn.Linear(hidden, WIDTH))
        self.out = nn.Linear(WIDTH, SYMBOLS)

    def seen(self, x: Tensor) -> Tensor:
        """What the attention layer gets."""
        return self.norms[0](self.embed(x) + self.place)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place
        h = h + self.attention(self.seen(x))
        return self.out(h + self.mlp(self.norms[1](h)))


def trained(id: str, hidden: int, **options: int) -> OneLayer:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    net = OneLayer(regard.create(id, dim=WIDTH, num_heads=4, **options), hidden)
    optimizer, batches = torch.optim.Adam(net.parameters(), lr=2e-3), [batch(32, generator) for _ in range(60)]
    for step in range(500):
        x, y, _ = batches[step % 60]
        real = x < SYMBOLS
        optimizer.zero_grad()
        F.cross_entropy(net(x)[real], y[real]).backward()
        optimizer.step()
    return net.eval()


def test_majority_of_a_segment() -> None:
    """One layer, 15 800 parameters, accuracy on the symbols: 0.93 with pooling before the attention, 0.65 without (saying the symbol itself: 0.64).

    Correlation of sigma with the segment's length: 0.57 after 500 steps, 0.71 in another run of 600. With kernel_size 3, whose two convolutions see
    five tokens, 0.90 and 0.37.
    """
    torch.set_num_threads(1)
    pooled = trained("context_pool", 64, kernel_size=9)
    budget = sum(p.numel() for p in pooled.parameters())
    plain = trained("multi_head", 64 + 76)
    assert abs(sum(p.numel() for p in plain.parameters()) / budget - 1) < 0.02
    x, y, length = batch(200, torch.Generator().manual_seed(2))
    real = x < SYMBOLS
    with torch.no_grad():
        accuracy = {name: (net(x).argmax(-1) == y)[real].float().mean().item() for name, net in (("pooled", pooled), ("plain", plain))}
        _, sharpness = pooled.attention._predict(pooled.seen(x), (1, N), None)  # type: ignore[operator]
    sigma = (0.5 / sharpness).sqrt()
    correlation = torch.corrcoef(torch.stack((sigma[real], length[real])))[0, 1].item()
    print(accuracy, f"correlation {correlation:.2f}")
    assert accuracy["pooled"] > accuracy["plain"] + 0.15
    assert correlation > 0.4
