"""What double, cgnl, glore and spygr are for: context from the whole map at a cost linear in its size, chosen by content."""

import itertools
import time

import pytest
import torch

import regard

MARKERS = 4


@pytest.mark.slow
def test_every_pixel_receives_the_value_of_the_marker_it_asks_for() -> None:
    """double, weights set by hand. Channels: the marker a pixel is, the marker it asks for, a value. One descriptor for the whole map, as in se or
    gc, cannot answer different requests. Measured: exact; the matrix from values to answers has rank 4 = the number of maps.
    """
    net = regard.create("double", 2 * MARKERS + 1, hidden_channels=1, num_maps=MARKERS, residual=False)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        for k in range(MARKERS):
            net.gather.weight[k, k] = net.distribute.weight[k, MARKERS + k] = 30.0
        net.feature.weight[0, -1] = net.out.weight[-1, 0] = 1.0
    torch.manual_seed(0)
    x = torch.zeros(1, 2 * MARKERS + 1, 12, 12)
    flat, places, asks = x.flatten(2), torch.randperm(144)[:MARKERS], torch.randint(MARKERS, (144,))
    flat[0, -1] = torch.randn(144)
    flat[0, torch.arange(MARKERS), places] = 1.0
    flat[0, MARKERS + asks, torch.arange(144)] = 1.0
    out, (gather, distribute) = net(x, return_weights=True)
    assert (out.flatten(2)[0, -1] - flat[0, -1, places][asks]).abs().max() < 1e-3
    matrix = distribute.flatten(2)[0].mT @ gather.flatten(2)[0]
    assert torch.linalg.matrix_rank(matrix, rtol=1e-5) <= MARKERS


@pytest.mark.slow
def test_two_objects_exchange_their_states() -> None:
    """glore, weights set by hand: node i detects object i, the graph swaps the nodes, and every pixel of one object receives the state of the other
    wherever they are. 20 random places; measured: exact.
    """
    net = regard.create("glore", 4, hidden_channels=2, state_channels=2, norm=None)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.project.weight[0, 0] = net.project.weight[1, 1] = 1.0
        net.state.weight[0, 2] = net.state.weight[1, 3] = 1.0
        net.adjacency.weight.copy_(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))  # cancels the identity, swaps
        net.update.weight.copy_(torch.eye(2))
        net.extend.weight[2, 0] = net.extend.weight[3, 1] = 1.0
    torch.manual_seed(0)
    for _ in range(20):
        x, states = torch.zeros(1, 4, 10, 10), torch.rand(2, 2)
        flat, (one, two) = x.flatten(2), torch.randperm(100)[:2]
        for kind, place in enumerate((one, two)):
            flat[0, kind, place], flat[0, 2:, place] = 1.0, states[kind]
        term = (net(x) - x).flatten(2)[0, 2:]
        torch.testing.assert_close(term[:, one], states[1])
        torch.testing.assert_close(term[:, two], states[0])


@pytest.mark.slow
def test_the_series_comes_to_the_kernel_as_fast_as_taylor_says() -> None:
    """cgnl, exact_beta, float64, arguments 2 gamma t p up to 1.7: the largest difference from the series of order 30 at orders 0 to 6, before the
    norm. Each is below the remainder bound z^(o+1) / (o+1)! exp(z) * sum |g|. Measured: 3.1, 1.2, 0.32, 7.8e-2, 1.9e-2, 4.0e-3, 9.0e-4.
    """
    torch.manual_seed(0)
    gamma, t, p, g = 0.1, *torch.randn(3, 1, 1, 4, 16, dtype=torch.float64).unbind(0)

    def series(order: int) -> torch.Tensor:
        net = regard.create("cgnl", 8, groups=1, kernel="rbf", order=order, gamma=gamma, exact_beta=True, dtype=torch.float64)
        return net._series(t, p, g)

    z = 2 * gamma * float(t.abs().max() * p.abs().max())
    errors, bound = [float((series(o) - series(30)).abs().max()) for o in range(7)], float(g.abs().sum() * torch.tensor(z).exp())
    for o, error in enumerate(errors):
        bound *= z / (o + 1)
        assert error < bound
    assert all(later < earlier for earlier, later in itertools.pairwise(errors)) and errors[-1] < 1e-3 * errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("id", ["double", "cgnl", "glore", "spygr"])
def test_linear_in_the_positions(id: str) -> None:
    """Forward of 64 x 64 against 128 x 128, batch 1, 64 channels: least CPU time of 25 interleaved runs; N^2 would be 16 times as long.
    Measured in three runs on a loaded machine: double 3.0 to 3.2, cgnl 3.2 to 4.8, glore 2.6 to 3.0, spygr 3.5 to 4.4.
    """
    net, times = regard.create(id, 64).eval(), {}
    maps = [torch.randn(1, 64, side, side) for side in (64, 128)]
    for _ in range(25):
        for x in maps:
            start = time.process_time()
            with torch.no_grad():
                net(x)
            times.setdefault(x.shape, []).append(time.process_time() - start)
    small, large = (min(times[x.shape]) for x in maps)
    assert large / small < 8
