"""Channel attention of DANet: what only it has."""

import pytest
import torch

import regard
from regard import RegardError


@pytest.mark.parametrize("invert", [True, False])
@pytest.mark.parametrize("size", [(9,), (3, 4), (2, 3, 2)])
def test_is_the_formula_of_the_code_and_of_the_paper(invert: bool, size: tuple[int, ...]) -> None:
    net = regard.create("channel_affinity", 5, invert=invert, gamma_init=-0.6).double()
    x = (0.3 * torch.randn(2, 5, *size, dtype=torch.float64)).requires_grad_()
    rows = x.flatten(2)
    energy = rows @ rows.mT
    weights = (energy.amax(-1, keepdim=True) - energy if invert else energy).softmax(-1)
    out, found = net(x, return_weights=True)
    torch.testing.assert_close(found, weights)
    torch.testing.assert_close(out, (x.flatten(2) - 0.6 * weights @ rows).reshape(x.shape))
    assert torch.autograd.gradcheck(net, x)


def test_half_precision_sums_in_float32() -> None:
    """Values near 4 on 4096 positions: their sums of squares leave the range of float16."""
    torch.manual_seed(0)
    net = regard.create("channel_affinity", 4, gamma_init=0.5)
    x = 4 + torch.randn(1, 4, 64, 64)
    out, weights = net.half()(x.half(), return_weights=True)
    assert out.dtype == weights.dtype == torch.float16 and out.isfinite().all()
    expected = net.float()(x.half().float())
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-2)


def test_identity_start_under_autocast() -> None:
    """Nothing is rounded to bfloat16 on the way: the map comes back bit for bit."""
    net, x = regard.create("channel_affinity", 6), torch.randn(2, 6, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x), x)


def test_wrong_calls() -> None:
    for channels, options, words in ((0, {}, "channels=0"), (4, {"init": "no"}, "init='no'")):
        with pytest.raises(RegardError, match=words):
            regard.create("channel_affinity", channels, **options)
