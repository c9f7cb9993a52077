"""What only the SAN layers have: batch norms over values that are never stored, relations, borders, and what the layers reduce to."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard import RegardError
from regard.testing.subject import shuffle_

D = torch.float64
COMMON: dict[str, Any] = {"channels": 6, "out_channels": 8, "rel_channels": 3, "share": 4, "kernel_size": 3, "dtype": D}
SHAPES = [
    {"padding_mode": "reflect"},
    {"padding_mode": "zero", "stride": 2},
    {"padding_mode": "mask", "dilation": 2},
    {"padding_mode": "reflect", "stride": 2, "dilation": 2},
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def make(id: str, **options: Any) -> Any:
    module = regard.create(id, **{**COMMON, **options})
    shuffle_(module)
    return module.train()


def neighbours(m: Any, x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, K, H', W')."""
    d, k, s = m.dilation, m.kernel_size, m.stride
    r = d * (k // 2)
    h, w = x.shape[-2:]
    x = F.pad(x, (r,) * 4, "reflect" if m.padding_mode == "reflect" else "constant")
    return torch.stack([x[..., y * d : y * d + h : s, z * d : z * d + w : s] for y in range(k) for z in range(k)], 2)


def plain(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, every pair stored, norms as they are."""
    phi, psi, beta = (F.conv2d(x, f.weight[..., None, None], f.bias) for f in (m.phi, m.psi, m.beta))
    here, around, s = phi[..., :: m.stride, :: m.stride], neighbours(m, psi), m.stride
    inside = neighbours(m, torch.ones_like(x[:1, :1])) if m.padding_mode == "mask" else None

    def norm(module: nn.Module, t: Tensor) -> Tensor:
        """Over the pairs that are inside the map."""
        if inside is None or m.card.id == "san_patchwise":
            return module(t)
        kept = inside.bool().expand(t.shape[0], 1, *t.shape[2:])[:, 0]
        rows = t.movedim(1, -1)
        out = torch.zeros_like(rows)
        out[kept] = module(rows[kept][:, :, None, None])[:, :, 0, 0]
        return out.movedim(-1, 1)

    def linear(layer: nn.Module, t: Tensor) -> Tensor:
        return F.linear(t.movedim(1, -1), layer.weight, layer.bias).movedim(-1, 1)  # type: ignore[arg-type]

    def network(t: Tensor) -> Tensor:
        """Channels second; BatchNorm2d takes four axes."""
        shape = t.shape
        folded = inside is None or m.card.id == "san_patchwise"
        t = t.flatten(3) if folded and t.ndim == 5 else t
        t = linear(m.fc1, norm(m.norm1, t).relu())
        t = linear(m.fc2, norm(m.norm2, t).relu())
        return t.unflatten(-1, shape[-2:]) if folded and len(shape) == 5 else t

    if m.card.id == "san_pairwise":
        wide = here[:, :, None].expand(-1, -1, m.kernel_size**2, -1, -1)
        delta = {
            "summation": lambda: wide + around,
            "subtraction": lambda: wide - around,
            "concatenation": lambda: torch.cat([wide, around], 1),
            "hadamard": lambda: wide * around,
            "dot": lambda: (wide * around).sum(1, keepdim=True),
        }[m.relation]()
        if m.position:
            h, w = x.shape[-2:]
            grid = torch.stack([torch.linspace(-1, 1, w, dtype=D).expand(h, w), torch.linspace(-1, 1, h, dtype=D)[:, None].expand(h, w)])
            p = F.conv2d(grid[None], m.places.weight[..., None, None], m.places.bias)
            delta = torch.cat([delta, (p[..., ::s, ::s][:, :, None] - neighbours(m, p)).expand(x.shape[0], -1, -1, -1, -1)], 1)
        logits = network(delta)
        logits = logits if inside is None else logits.masked_fill(inside == 0, float("-inf"))
        weights = logits.softmax(2)
    else:
        own = neighbours(m, phi)
        delta = {
            "concatenation": lambda: torch.cat([here, around.flatten(1, 2)], 1),
            "star": lambda: (here[:, :, None] * around).sum(1),
            "clique": lambda: torch.einsum("brjhw,brlhw->bjlhw", own, around).flatten(1, 2),
        }[m.relation]()
        weights = network(delta).unflatten(1, (-1, m.kernel_size**2))
        weights = weights if inside is None else weights * inside
    groups = weights.shape[1]
    values = neighbours(m, beta).unflatten(1, (-1, groups))
    return (weights[:, None] * values).sum(3).flatten(1, 2), weights


CASES = [("san_pairwise", r) for r in ("subtraction", "summation", "concatenation", "hadamard", "dot")]
CASES += [("san_patchwise", r) for r in ("concatenation", "star", "clique")]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("id", "relation"), CASES)
def test_trains_as_the_plain_form(id: str, relation: str, shape: dict[str, Any]) -> None:
    """Outputs, weights, gradients and running statistics of two steps, then the outputs in eval."""
    found: list[list[Tensor]] = []
    for call in (plain, lambda m, x: m(x, return_weights=True)):
        torch.manual_seed(0)
        m, x, kept = make(id, relation=relation, **shape), randn(2, 6, 7, 8).requires_grad_(), []
        for _ in range(2):
            out, weights = call(m, x)
            grads = torch.autograd.grad(out, [x, *m.parameters()], randn(*out.shape, seed=1))
            kept += [out, weights, *grads]
        out, weights = call(m.eval(), x)
        found.append([*kept, *(b.double() for b in m.buffers()), out, weights])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_norms_without_running_statistics_momentum_or_parameters() -> None:
    found = []
    for call in (plain, lambda m, x: m(x, return_weights=True)):
        torch.manual_seed(0)
        m = make("san_pairwise")
        m.norm1, m.norm2 = nn.BatchNorm2d(5, affine=False, momentum=None, dtype=D), nn.BatchNorm2d(3, track_running_stats=False, dtype=D)
        out = [call(m, randn(2, 6, 7, 8, seed=i))[0] for i in range(3)]
        found.append([*out, *(b.double() for b in m.buffers()), call(m.eval(), randn(2, 6, 7, 8))[0]])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("mode", ["reflect", "mask"])
def test_a_constant_map_gives_its_values(mode: str) -> None:
    """Weights sum to one, also at the border."""
    m = make("san_pairwise", padding_mode=mode)
    x = randn(2, 6, 1, 1).expand(-1, -1, 5, 6)
    torch.testing.assert_close(m(x), F.conv2d(x, m.beta.weight[..., None, None], m.beta.bias))


def test_without_places_a_turned_map_gives_a_turned_output() -> None:
    m, x = make("san_pairwise", position=False), randn(2, 6, 7, 8)
    torch.testing.assert_close(m(x.rot90(1, (2, 3))), m(x).rot90(1, (2, 3)))
    m = make("san_pairwise")
    assert not torch.allclose(m(x.rot90(1, (2, 3))), m(x).rot90(1, (2, 3)), rtol=1e-2)


def test_patchwise_with_a_fixed_kernel_is_a_depthwise_convolution() -> None:
    m, kernel = make("san_patchwise"), randn(2, 3, 3)
    with torch.no_grad():
        m.fc2.weight.zero_()
        m.fc2.bias.copy_(kernel.flatten())
    x = randn(2, 6, 7, 8)
    beta = F.pad(F.conv2d(x, m.beta.weight[..., None, None], m.beta.bias), (1, 1, 1, 1), "reflect")
    torch.testing.assert_close(m(x), F.conv2d(beta, kernel[[c % 2 for c in range(8)], None], groups=8))


def test_masked_pixels_have_no_weight() -> None:
    for id in ("san_pairwise", "san_patchwise"):
        weights = make(id, padding_mode="mask")(randn(2, 6, 4, 5), return_weights=True)[1]
        assert weights[..., :3, 0, :].abs().max() == 0
        assert weights[..., :3, 1:, 1:-1].abs().min() > 0


def test_wrong_calls() -> None:
    for id in ("san_pairwise", "san_patchwise"):
        with pytest.raises(RegardError, match="out_channels=10 is not divisible by share=4"):
            make(id, out_channels=10)
        with pytest.raises(RegardError, match="kernel_size=4 must be odd"):
            make(id, kernel_size=4)
        with pytest.raises(RegardError, match="relation='cross' is not one of"):
            make(id, relation="cross")
        with pytest.raises(RegardError, match="more than 4 rows and columns, got a map of 4 x 9"):
            make(id, dilation=4)(randn(2, 6, 4, 9))
        with pytest.raises(RegardError, match="BatchNorm in training"):
            make(id, padding_mode="mask")(randn(1, 6, 1, 1))
        assert make(id, padding_mode="mask").eval()(randn(1, 6, 1, 1)).isfinite().all()
    with pytest.warns(UserWarning, match="2401 pairs"):
        make("san_patchwise", kernel_size=7, relation="clique")
