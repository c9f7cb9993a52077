"""Attention of narrow queries and keys in blocks of queries: equals the reference, whole and in blocks, and works with torch's tools."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regard.ops._dispatch import use_impl
from regard.ops.pairwise_affinity import narrow, pairwise_attention


def rows(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def inputs() -> list[torch.Tensor]:
    return [rows(2, 9, 3, seed=0), rows(2, 7, 3, seed=1), rows(2, 7, 64, seed=2)]


@pytest.mark.parametrize("small", [0.0, 40.0])
@pytest.mark.parametrize("block", [1, 4 * 7 * 8, 1 << 20])
def test_equals_the_reference(monkeypatch: pytest.MonkeyPatch, block: int, small: float) -> None:
    """One query at a time, four (the last block is smaller), all at once; with and without maxima taken off; inputs may be views."""
    monkeypatch.setattr(narrow, "BLOCK_BYTES", block)
    monkeypatch.setattr(narrow, "SMALL", small)
    q, k, v = inputs()
    joined = torch.cat((k, v), 2).split((3, 64), 2)
    cotangent = rows(2, 9, 64, seed=3).detach()
    found = narrow.pairwise_attention(q, *joined, 0.7)
    with use_impl("reference"):
        expected = pairwise_attention(q, k, v, scale=0.7)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(found, (q, k, v), cotangent), torch.autograd.grad(expected, (q, k, v), cotangent), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradient_large_scores_and_count() -> None:
    q, k, v = inputs()
    assert torch.autograd.gradcheck(lambda *t: narrow.pairwise_attention(*t, 0.7), (q, k, v), fast_mode=True)
    assert narrow.pairwise_attention(1e4 * q, k, v, 1.0).isfinite().all()
    with FlopCounterMode(display=False) as counter:
        narrow.pairwise_attention(q, k, v, 1.0)
    assert counter.get_total_flops() == 2 * 2 * 9 * 7 * (3 + 64)


def test_under_vmap_and_grad() -> None:
    q, k, v = (torch.stack([t, 2 * t]).detach() for t in inputs())
    together = torch.func.vmap(lambda *t: narrow.pairwise_attention(*t, 1.0))(q, k, v)
    torch.testing.assert_close(together[1], narrow.pairwise_attention(q[1], k[1], v[1], 1.0))
    found = torch.func.grad(lambda t: narrow.pairwise_attention(t, k[0], v[0], 1.0).square().sum())(q[0])
    x = q[0].requires_grad_()
    (expected,) = torch.autograd.grad(narrow.pairwise_attention(x, k[0], v[0], 1.0).square().sum(), x)
    torch.testing.assert_close(found, expected)
