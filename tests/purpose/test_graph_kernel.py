"""What a graph kernel is for: attention that reaches many hops in one layer."""

import pytest
import torch
from torch import nn

import regard

pytestmark = pytest.mark.slow
NODES, SPINE = 60, 30


def caterpillars(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Paths with leaves and two hubs of six leaves each, 6 apart (label 1) or 18 (label 0); shuffled, told apart by nothing within 2 hops."""
    adjacency, labels = torch.zeros(count, NODES, NODES), torch.randint(0, 2, (count,), generator=generator)
    for graph, near in zip(adjacency, labels.tolist(), strict=True):
        spine = torch.arange(SPINE - 1)
        graph[spine, spine + 1] = 1
        first = int(torch.randint(0, SPINE - 6 if near else SPINE - 18, (1,), generator=generator))
        leaves = torch.arange(SPINE, NODES)
        at = torch.randperm(SPINE, generator=generator)[: NODES - SPINE]
        at[:6], at[6:12] = first, first + (6 if near else 18)
        graph[at, leaves] = 1
    adjacency = adjacency + adjacency.mT
    order = torch.stack([torch.randperm(NODES, generator=generator) for _ in range(count)])
    return torch.stack([a[o][:, o] for a, o in zip(adjacency, order, strict=True)]), labels


class Classifier(nn.Module):
    """Degrees in, two layers of attention on one kernel, the mean of the nodes out."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.degree, self.out = nn.Embedding(12, 32), nn.Linear(32, 2)
        self.layers = nn.ModuleList(regard.create("graph_kernel", 32, 4, activation="elu", **options) for _ in range(2))

    def forward(self, adjacency: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        x = self.degree(adjacency.sum(-1).clamp_max(11).long())
        for layer in self.layers:
            x = x + layer(x, kernel=kernel)
        return self.out(x.mean(1))


def accuracy(**options) -> float:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    (graphs, labels), (others, wanted) = caterpillars(600, generator), caterpillars(300, generator)
    model = Classifier(**options)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    with torch.no_grad():
        kernel, other_kernel = (model.layers[0].kernel_of(a) for a in (graphs, others))
    for _ in range(400):
        chosen = torch.randint(0, 600, (32,), generator=generator)
        loss = nn.functional.cross_entropy(model(graphs[chosen], kernel[chosen]), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return (model(others, other_kernel).argmax(1) == wanted).float().mean().item()


def test_walks_reach_where_neighbours_do_not():
    """Do two hubs lie 6 or 18 apart? Accuracy on new graphs after 400 steps. Measured: walks of 10 nodes 0.997, one hop 0.527.

    The test first proposed, whether a tree of 60 nodes closes a cycle of 16 to 24 or one of 4, was learned by neither in this time (one hop 0.51,
    walks of 6 nodes 0.53, of 10 nodes 0.53): degrees, all a node is given, hardly differ there.
    """
    walks, hop = accuracy(kernel="random_walk", walk_length=10), accuracy(kernel="adjacency")
    print(f"walks of 10 nodes {walks:.3f}, one hop {hop:.3f}")
    assert walks > 0.9 and hop < 0.65


def test_exact_visits_are_the_mean_of_walks():
    """The root mean square difference falls as one over the root of the number of walks. Measured: 0.0261 for 50, 0.0066 for 800."""
    generator = torch.Generator().manual_seed(0)
    graphs, _ = caterpillars(2, generator)
    exact, errors = regard.create("graph_kernel", 8, 2).random_walk_frequency(graphs, 6, 0.9), []
    for walks in (50, 800):
        drawn = regard.create("graph_kernel", 8, 2).random_walk_frequency(graphs, 6, 0.9, num_walks=walks, generator=generator)
        errors.append((drawn - exact).square().mean().sqrt().item())
    print("rms difference", errors)
    assert 3 < errors[0] / errors[1] < 5.3
