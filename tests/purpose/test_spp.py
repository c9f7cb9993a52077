"""What a pyramid of maxima is for: one length for every size, and the whole map seen at every level."""

import math

import pytest
import torch

import regard


@pytest.mark.slow
def test_fixed_length_and_brute_force_bins() -> None:
    """Measured: 50 maxima a channel for maps of 7x5, 13x13 and 40x11, each equal to brute force bit for bit; level 1 unmoved by flips."""
    torch.manual_seed(0)
    module = regard.create("spp", 4)
    for h, w in ((7, 5), (13, 13), (40, 11)):
        x = torch.randn(2, 4, h, w)
        out = module(x)
        assert out.shape == (2, 200)
        bins = []
        for n in (6, 3, 2, 1):
            rows, columns = ([(i * length // n, math.ceil((i + 1) * length / n)) for i in range(n)] for length in (h, w))
            bins += [x[:, c, a:b, d:e].amax((1, 2)) for c in range(4) for a, b in rows for d, e in columns]
        assert torch.equal(out, torch.stack(bins, 1))
        assert torch.equal(module(x.flip(3))[:, -4:], out[:, -4:])
