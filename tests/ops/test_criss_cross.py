"""Criss-cross attention: both ways of computing it against a literal loop over crosses."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from regard.ops import criss_cross as op
from regard.ops._dispatch import use_impl
from regard.ops.criss_cross import lines


def maps(*space: int, d: int = 3, c: int = 4, b: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(b, *space, w, dtype=torch.float64, generator=generator).requires_grad_() for w in (d, d, c))  # type: ignore[return-value]


def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax over the set of pixels that differ from u on at most one axis."""
    out, space = torch.zeros_like(v), v.shape[1:-1]
    places = list(itertools.product(*map(range, space)))
    for b, u in itertools.product(range(len(v)), places):
        cross = [p for p in places if sum(i != j for i, j in zip(p, u, strict=True)) <= 1]
        assert len(cross) == sum(space) - len(space) + 1
        weights = torch.stack([q[(b, *u)] @ k[(b, *p)] for p in cross]).softmax(0)
        out[(b, *u)] = sum(w * v[(b, *p)] for w, p in zip(weights, cross, strict=True))
    return out


@pytest.mark.parametrize("space", [(3, 5), (4, 2), (1, 4), (4, 1), (1, 1), (2, 3, 4), (1, 3, 1)])
def test_equals_the_loop(space: tuple[int, ...]) -> None:
    args = maps(*space)
    with torch.no_grad():
        expected = loop(*args)
        torch.testing.assert_close(op.criss_cross(*args), expected, rtol=0, atol=1e-12)
        with use_impl("reference"):
            torch.testing.assert_close(op.criss_cross(*args), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [32 << 20, 100])
@pytest.mark.parametrize("space", [(3, 4), (5, 1), (1, 3)])
def test_gradients(space: tuple[int, int], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block, and in blocks of rows whose weights are computed again."""
    args = maps(*space)
    with use_impl("reference"):
        expected = op.criss_cross(*args)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, args, cotangent)
    monkeypatch.setattr(lines, "CHUNK_BYTES", chunk)
    assert (len(lines._blocks(args[0].transpose(0, 1))) > 1) == (chunk == 100 and space[0] > 1)
    out = op.criss_cross(*args)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(out, args, cotangent), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert gradcheck(op.criss_cross, args, fast_mode=True)


def test_weights() -> None:
    q, k, v = maps(3, 5)
    weights = op.criss_cross_weights(q, k)
    assert weights.shape == (2, 3, 5, 8)
    assert weights[..., :3].diagonal(dim1=1, dim2=3).abs().max() == 0, "the column leaves the pixel itself to the row"
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
    column = torch.einsum("bhwi,biwc->bhwc", weights[..., :3], v)
    row = torch.einsum("bhwj,bhjc->bhwc", weights[..., 3:], v)
    torch.testing.assert_close(column + row, op.criss_cross(q, k, v), rtol=0, atol=1e-12)


def test_any_strides() -> None:
    args = maps(3, 4)
    expected = op.criss_cross(*args)
    strided = [t.detach().permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1).requires_grad_() for t in args]
    out = op.criss_cross(*strided)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn(2, 4, 3, 4, dtype=torch.float64).permute(0, 2, 3, 1)
    for ours, theirs in zip(torch.autograd.grad(out, strided, cotangent), torch.autograd.grad(expected, args, cotangent), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_half_precision_scores_do_not_overflow() -> None:
    q = torch.full((1, 2, 3, 64), 100.0).half()
    out = op.criss_cross(q, q, torch.ones(1, 2, 3, 4).half())
    torch.testing.assert_close(out, torch.ones(1, 2, 3, 4).half())
