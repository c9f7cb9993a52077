"""ripple: every option against its equations one pair at a time, both layouts, free and given grids, the start, wrong calls."""

import pytest
import torch

import regard
from regard.errors import RegardError

OPTIONS = [
    {},
    {"max_radius": 1},
    {"max_radius": 9},
    {"max_radius": 3, "threshold": 0.6},
    {"max_radius": 4, "threshold": 1.0},
    {"feature_map": "relu", "head_dim": 5},
    {"feature_map": "favor", "num_features": 7, "eps": 1e-3, "threshold": 0.3},
]


def make(**options):
    torch.manual_seed(0)
    module = regard.create("ripple", 12, 2, **options).double().eval()
    module.spatial_proj.weight.data.mul_(3)
    return module


def by_pairs(module, x, height, width, key_mask):
    heads, d, radius = module.num_heads, module.head_dim, module.max_radius
    q, k, v = (f(x).unflatten(2, (heads, d)).transpose(1, 2) for f in (module.q_proj, module.k_proj, module.v_proj))

    def phi(y):
        if module.feature_map != "favor":
            return y.relu() if module.feature_map == "relu" else torch.where(y > 0, y + 1, y.exp())
        z, w = y * d**-0.25, module.feature_projection
        return torch.exp(torch.einsum("bhnd,hmd->bhnm", z, w) - z.square().sum(-1, keepdim=True) / 2) / w.shape[1] ** 0.5

    s = torch.sigmoid(module.spatial_proj(x)).unflatten(2, (heads, radius)).transpose(1, 2)
    weights = phi(q) @ phi(k).mT
    for b in range(x.shape[0]):
        for h in range(heads):
            for p in range(height * width):
                stick, rings, spent = 1.0, [], 0.0
                for r in range(radius):
                    a = s[b, h, p, r] * stick
                    rings.append(a)
                    stick, spent = stick * (1 - s[b, h, p, r]), spent + a
                    if module.threshold is not None and spent >= module.threshold:
                        stick = 1 - spent
                        break
                for t in range(height * width):
                    r = max(abs(p // width - t // width), abs(p % width - t % width))
                    seen = 1.0 if key_mask is None else key_mask[b, t].item()
                    weights[b, h, p, t] = weights[b, h, p, t] * (rings[r] if r < len(rings) else stick) * seen
    weights = weights / (weights.sum(-1, keepdim=True) + module.eps)
    return weights, module.out_proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_its_equations(options):
    module, (height, width) = make(grid_size=(3, 4), **options), (3, 4)
    x, mask = torch.randn(2, 12, 12, dtype=torch.float64), torch.rand(2, 12) > 0.2
    with torch.no_grad():
        for key_mask in (None, mask):
            weights, expected = by_pairs(module, x, height, width, key_mask)
            for module.method in ("dense", "window", "sat"):
                out, given = module(x, key_mask=key_mask, return_weights=True)
                assert torch.allclose(out, expected, atol=1e-10), module.method
                assert torch.allclose(given, weights, atol=1e-10)
            chosen = torch.tensor([11, 0, 4])
            assert torch.allclose(module.weights(x, queries=chosen, key_mask=key_mask), weights[:, :, chosen], atol=1e-10)


@pytest.mark.parametrize("size", [(13, 11), (1, 29), (24, 23)], ids=str)
def test_tables_and_windows_equal_dense_products_in_single_precision(size):
    module = make(grid_size=size).float()
    x, outs = torch.randn(2, size[0] * size[1], 12), []
    with torch.no_grad():
        for module.method in ("dense", "window", "sat"):
            outs.append(module(x))
    assert all((out - outs[0]).abs().max() < 1e-5 * outs[0].abs().max() for out in outs)


def test_a_map_is_its_tokens():
    tokens, maps = make(grid_size=(3, 4)), make(layout="map")
    maps.load_state_dict(tokens.state_dict())
    x, mask = torch.randn(2, 12, 3, 4, dtype=torch.float64), torch.rand(2, 3, 4) > 0.3
    out = maps(x, key_mask=mask)
    assert out.shape == x.shape
    assert torch.allclose(out.flatten(2).mT, tokens(x.flatten(2).mT, key_mask=mask.flatten(1)))


def test_grids():
    """The call's grid overrides the module's, and -1 is what the tokens fill; another grid of the same tokens is another result."""
    module, x = make(grid_size=(3, 4)), torch.randn(2, 12, 12, dtype=torch.float64)
    assert torch.equal(module(x, grid_size=(-1, 4)), module(x))
    assert torch.equal(module(x, grid_size=(3, -1)), module(x))
    assert not torch.allclose(module(x, grid_size=(4, 3)), module(x))
    assert torch.equal(make(grid_size=(4, -1))(x), module(x, grid_size=(4, 3)))


def test_starts_with_equal_weights():
    module = regard.create("ripple", 12, 2, (8, 8), max_radius=5)
    module.spatial_proj.weight.data.zero_()
    assert torch.allclose(module._profile(torch.randn(1, 64, 12)), torch.full((1, 2, 64, 6), 1 / 6))


def test_sure_sticks_stay_finite():
    """Sticks of exactly 0 and 1: the profile is exact and its gradient finite."""
    module = make(grid_size=(3, 3), max_radius=3)
    module.spatial_proj.bias.data.copy_(torch.tensor([1e4, 0.0, 0.0, -1e4, 1e4, -1e4]))
    x = torch.randn(1, 9, 12, dtype=torch.float64, requires_grad=True)
    profile = module._profile(x)
    assert torch.allclose(profile[0, 0], torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).expand(9, 4))
    assert torch.allclose(profile[0, 1], torch.tensor([0.0, 1, 0, 0], dtype=torch.float64).expand(9, 4))
    module(x).sum().backward()
    assert x.grad.isfinite().all()


def test_no_feature_at_all_gives_zeros():
    module = make(grid_size=(2, 2), feature_map="relu")
    module.q_proj.bias.data.fill_(-1e3)
    module.out_proj.bias.data.zero_()
    assert (module(torch.randn(1, 4, 12, dtype=torch.float64)) == 0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_radius": 0}, "max_radius=0"),
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"grid_size": (-1, -1)}, "grid_size"),
        ({"grid_size": (0, 4)}, "grid_size"),
        ({"layout": "graph"}, "layout='graph'"),
        ({"feature_map": "softmax"}, "feature_map"),
        ({"num_features": 8}, "num_features=8"),
        ({"method": "fft"}, "method='fft'"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RegardError, match=words):
        regard.create("ripple", 12, 2, **options)


def test_wrong_calls():
    x = torch.randn(1, 7, 12)
    with pytest.raises(RegardError, match="grid_size"):
        regard.create("ripple", 12, 2)(x)
    for grid in ((2, 3), (2, -1)):
        with pytest.raises(RegardError, match=r"7 positions.* has 6"):
            regard.create("ripple", 12, 2, grid)(x)
    maps = regard.create("ripple", 12, 2, layout="map")
    with pytest.raises(RegardError, match="grid_size"):
        maps(torch.randn(1, 12, 2, 3), grid_size=(3, 2))
    with pytest.raises(RegardError, match="key_mask"):
        maps(torch.randn(1, 12, 2, 3), key_mask=torch.ones(1, 6, dtype=torch.bool))
