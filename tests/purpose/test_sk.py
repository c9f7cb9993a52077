"""What the choice between kernels is for: alike branches share equally, and a decided choice is that branch."""

import copy

import pytest
import torch

import regard


@pytest.mark.slow
def test_alike_branches_share_equally() -> None:
    """Measured: weights exactly 1/3 each, output equal to one branch up to rounding."""
    torch.manual_seed(0)
    module, x = regard.create("sk", 16, kernel_sizes=(3, 3, 3), groups=4).eval(), torch.randn(4, 16, 9, 7)
    with torch.no_grad():
        for r in (1, 2):
            module.branches[r] = copy.deepcopy(module.branches[0])
        module.fc2.weight.copy_(module.fc2.weight[:16].repeat(3, 1))
        out, weights = module(x, return_weights=True)
        assert torch.equal(weights, torch.full_like(weights, 1 / 3))
        torch.testing.assert_close(out, module.branches[0](x), rtol=0, atol=2e-6)


@pytest.mark.slow
def test_a_decided_choice_is_that_branch() -> None:
    """Measured: with a logit of +50 on branch 1 the output is branch 1 up to rounding; the weights sum to one."""
    torch.manual_seed(0)
    module, x = regard.create("sk", 16, groups=4, attn_bias=True).eval(), torch.randn(4, 16, 9, 7)
    with torch.no_grad():
        torch.testing.assert_close(module(x, return_weights=True)[1].sum(1), torch.ones(4, 16))
        module.fc2.bias[16:] += 50
        torch.testing.assert_close(module(x), module.branches[1](x))


@pytest.mark.slow
def test_the_large_kernel_on_two_grains() -> None:
    """Labels: orientation of stripes, of period 4 or 8. Measured: mean weight of the large kernel 0.77 and 0.78, accuracy 1.0 and 1.0.

    The paper's figure (the large kernel gains on large objects) hardly shows at this size, so it is printed and not demanded.
    """
    torch.manual_seed(0)
    module, readout = regard.create("sk", 8, groups=1, kernel_sizes=(3, 7), dilated=False, min_hidden=8), torch.nn.Linear(8, 2)
    optimizer = torch.optim.Adam([*module.parameters(), *readout.parameters()], lr=5e-3)

    def batch(n: int, period: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, phase = torch.randint(0, 2, (n,)), 6.28 * torch.rand(n, 1, 1)
        rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        along = torch.where(y.bool()[:, None, None], rows, columns)
        stripes = torch.sin(6.28 * along / period[:, None, None] + phase)
        return stripes[:, None] + torch.randn(n, 8, 16, 16), y

    for _ in range(120):
        x, y = batch(32, 4.0 * (1 + torch.randint(0, 2, (32,))))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(readout(module(x).mean((2, 3))), y).backward()
        optimizer.step()
    module.eval()
    with torch.no_grad():
        shares = {}
        for period in (4.0, 8.0):
            x, y = batch(500, torch.full((500,), period))
            out, weights = module(x, return_weights=True)
            accuracy = (readout(out.mean((2, 3))).argmax(1) == y).float().mean().item()
            shares[period] = (weights[:, 1].mean().item(), accuracy)
    print("mean weight of the large kernel and accuracy by period", shares)
    assert min(accuracy for _, accuracy in shares.values()) > 0.9
