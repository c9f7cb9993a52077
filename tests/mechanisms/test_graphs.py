"""double, cgnl, glore and spygr: their formulas written out, namings, starting values, limits, errors."""

import math

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official
from regard.ops._dispatch import use_impl
from regard.parts.spatial import project_distribute, project_gather


def make(*args, **options):
    torch.manual_seed(0)
    return regard.create(*args, **options)


def apply(layer, columns):
    return F.linear(columns.mT, layer.weight, layer.bias).mT


@pytest.mark.parametrize("width", [2, 6, 40])
def test_projections_commute_with_gathering(width):
    """Widths on both sides of the choice of order."""
    torch.manual_seed(0)
    x, maps, up, down = torch.randn(2, 6, 35), torch.randn(2, 4, 35), torch.randn(width, 6), torch.randn(6, width)
    descriptors = torch.randn(2, width, 4)
    torch.testing.assert_close(project_gather(x, maps, up), up @ x @ maps.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(project_distribute(descriptors, maps, down, onto=x), x + down @ descriptors @ maps, rtol=1e-4, atol=1e-4)
    mixing, bias = maps.softmax(1), torch.randn(6)
    expected = down @ descriptors @ mixing + bias[:, None]
    torch.testing.assert_close(project_distribute(descriptors, mixing, down, bias), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"num_maps": 1}, {"num_maps": 30}, {"num_maps": 9, "hidden_channels": 2}, {"reconstruct": False, "residual": False}]
)
def test_double_equals_its_formula(options):
    module, x = make("double", 8, **options), torch.randn(2, 8, 5, 3)
    columns = x.flatten(2)
    b, v = apply(module.gather, columns).softmax(2), apply(module.distribute, columns).softmax(1)
    z = apply(module.feature, columns) @ b.mT @ v
    expected = x + apply(module.out, z).unflatten(2, (5, 3)) if module.reconstruct else z.unflatten(2, (5, 3))
    out, weights = module(x, return_weights=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, (b.unflatten(2, (5, 3)), v.unflatten(2, (5, 3))))


def test_double_gathers_over_the_frames_of_a_clip():
    module, x = make("double", 8, frames=3), torch.randn(6, 8, 4, 5)
    tall = x.unflatten(0, (2, 3)).transpose(1, 2).flatten(2, 3)  # the frames of a clip, one below the other
    expected = make("double", 8)(tall).unflatten(2, (3, 4)).transpose(1, 2).flatten(0, 1)
    out, weights = module(x, return_weights=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights[0].unflatten(0, (2, 3)).sum((1, 3, 4)), torch.ones(2, 2))
    with pytest.raises(RegardError, match="frames=3"):
        module(x[:4])


def pairs(t, p, kernel):
    """The affinity of all pairs of entries, (B, G, L, L)."""
    return kernel(t.flatten(2)[..., :, None], p.flatten(2)[..., None, :])


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("kernel", ["dot", "rbf", "exact"])
@pytest.mark.parametrize("use_scale", [False, True])
def test_cgnl_equals_the_affinity_of_all_pairs(kernel, use_scale, impl):
    gamma = 0.05
    options = {"kernel": "dot"} if kernel == "dot" else {"kernel": "rbf", "gamma": gamma, "exact_beta": kernel == "exact", "order": 25}
    module = make("cgnl", 8, groups=2, zero_init=False, use_scale=use_scale, dtype=torch.float64, **options)
    for layer in (module.theta, module.phi, module.g):
        layer.weight.data.mul_(60)
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    t, p, g = (apply(layer, x.flatten(2)).unflatten(1, (2, -1)) for layer in (module.theta, module.phi, module.g))
    forms = {
        "dot": lambda a, b: a * b,
        "rbf": lambda a, b: math.exp(-2 * gamma) * torch.exp(2 * gamma * a * b),
        "exact": lambda a, b: torch.exp(-gamma * (a - b) ** 2),
    }
    y = pairs(t, p, forms[kernel]) @ g.flatten(2)[..., None]
    y = y.view_as(t) / (math.sqrt(2 * 12) if use_scale else 1.0)
    z = torch.cat([w @ part for w, part in zip(module.out.weight.chunk(2), y.unbind(1), strict=True)], 1)
    expected = x + module.norm(z).unflatten(2, (3, 4))
    with use_impl(relate_groups=impl):
        torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
def test_cgnl_inner_products_get_an_exact_gradient_through_the_norm(size):
    """Float32 against float64: the norm cancels nearly all of it, and a difference of large numbers would leave noise."""
    module, found = make("cgnl", 16, groups=4, zero_init=False), {}
    for impl in ("fused", "reference"):
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(1)
            x = size * torch.randn(2, 16, 9, 7).to(dtype)
            copy = make("cgnl", 16, groups=4, zero_init=False).to(dtype)
            copy.load_state_dict(module.state_dict())
            with use_impl(relate_groups=impl):
                (copy(x) * torch.linspace(-1, 1, x.numel(), dtype=dtype).sin().view_as(x)).sum().backward()
            found[impl, dtype] = copy.phi.weight.grad.double()
        exact = found[impl, torch.float64]
        assert (found[impl, torch.float32] - exact).abs().max() < 1e-4 * exact.abs().max()
    torch.testing.assert_close(found["fused", torch.float64], found["reference", torch.float64])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("state", [2, None])
def test_glore_equals_its_formula(normalize, state):
    module, x = make("glore", 8, hidden_channels=3, state_channels=state, normalize=normalize, zero_init=False), torch.randn(2, 8, 4, 5)
    s, p = apply(module.state, x.flatten(2)), apply(module.project, x.flatten(2))
    v = s @ p.mT / (20 if normalize else 1)
    h = torch.einsum("jk,bck->bcj", module.adjacency.weight, v) + module.adjacency.bias + v
    y = module.extend.weight @ (module.update.weight @ h.relu()) @ p
    expected = x + F.batch_norm(y.unflatten(2, (4, 5)), None, None, training=True, eps=1e-4)
    out, maps = module(x, return_weights=True)
    torch.testing.assert_close((out, maps.flatten(2)), (expected, p), rtol=1e-4, atol=1e-5)


def test_glore_without_a_graph_is_two_projections():
    module, x = make("glore", 8, norm=None, zero_init=False), torch.rand(2, 8, 4, 5)
    with torch.no_grad():
        for layer in (module.adjacency, module.state, module.project):
            layer.weight.abs_()
            layer.bias.zero_()
        module.adjacency.weight.zero_()
        module.update.weight.copy_(torch.eye(4))
    s, p = apply(module.state, x.flatten(2)), apply(module.project, x.flatten(2))
    torch.testing.assert_close(module(x).flatten(2), x.flatten(2) + module.extend.weight @ s @ p.mT @ p, rtol=1e-5, atol=1e-4)


def laplacian(module, x):
    """I - D^-1/2 A D^-1/2 of a one-level module, written out, and the degrees."""
    (phi, lam), *_ = module(x, return_weights=True)[1]
    affinity = (phi * lam[:, None]) @ phi.mT
    degree = affinity.sum(2)
    root = torch.where(degree > 0, degree, 1).rsqrt() * (degree > 0)
    return torch.eye(degree.shape[1], dtype=x.dtype) - root[:, :, None] * affinity * root[:, None], degree


def test_spygr_applies_a_normalised_laplacian():
    module, x = make("spygr", 6, hidden_channels=4, num_levels=1, dtype=torch.float64), torch.randn(2, 6, 4, 5, dtype=torch.float64)
    graph, degree = laplacian(module, x)
    values = torch.linalg.eigvalsh(graph)
    assert values.min() > -1e-12 and values.max() < 1 + 1e-12
    assert (graph @ degree.sqrt()[:, :, None]).abs().max() < 1e-12
    expected = (module.levels[0]["graph"].weight @ x.flatten(2) @ graph).relu()
    torch.testing.assert_close(module(x).flatten(2), expected, rtol=1e-12, atol=1e-12)


def test_spygr_without_links_keeps_every_position():
    module = make("spygr", 6, hidden_channels=4, num_levels=1)
    module.levels[0]["phi"].bias.data.fill_(-100.0)
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    out = module(x)
    torch.testing.assert_close(out.flatten(2), (module.levels[0]["graph"].weight @ x.flatten(2)).relu())
    out.sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in module.parameters())


def test_spygr_diagonal_too_small_for_a_float():
    module = make("spygr", 6, hidden_channels=4, num_levels=1)
    x, before = torch.randn(2, 6, 4, 5), module.levels[0]["attn"]
    torch.nn.init.zeros_(before.weight)
    torch.nn.init.zeros_(before.bias)
    expected = module(x)
    before.bias.data.fill_(-200.0)  # sigmoid(-200) is 0 in float32; a common factor changes nothing
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    ("id", "options", "key", "shape"),
    [
        ("double", {}, "convZ.weight", (8, 2, 1, 1)),
        ("cgnl", {"groups": 2}, "z.weight", (8, 2, 1, 1)),
        ("glore", {}, "gcn.conv1.weight", (2, 2, 1)),
        ("glore", {"dims": 3}, "conv_state.weight", (4, 8, 1, 1, 1)),
        ("spygr", {"hidden_channels": 3, "num_levels": 2}, "levels.1.graph.weight", (8, 8, 1, 1)),
    ],
)
def test_namings(id, options, key, shape):
    module = make(id, 8, **options)
    state = to_official(module)
    assert state[key].shape == shape
    torch.manual_seed(1)
    again = load_official(regard.create(id, 8, **options), state).state_dict()
    assert all(torch.equal(again[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("id", "options"),
    [
        ("double", {}),
        ("cgnl", {"groups": 2}),
        ("cgnl", {"groups": 2, "kernel": "rbf"}),
        ("glore", {}),
        ("glore", {"norm": None}),
        ("spygr", {"residual": True}),
    ],
)
def test_a_step_leaves_the_identity(id, options):
    extra = {"zero_init": False} if id != "spygr" else {"hidden_channels": 4, "num_levels": 2}
    module, x = make(id, 8, init="identity", **extra, **options), torch.randn(2, 8, 5, 6)
    assert torch.equal(module(x), x)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    (module(x) * torch.randn_like(x)).sum().backward()
    optimizer.step()
    assert not torch.allclose(module(x), x)


@pytest.mark.parametrize(
    ("id", "options", "words"),
    [
        ("double", {"num_maps": 0}, "num_maps=0"),
        ("double", {"reconstruct": False}, "residual=True"),
        ("double", {"residual": False, "init": "identity"}, "init='identity'"),
        ("double", {"residual": False, "reconstruct": False, "zero_init": True}, "zero_init=True"),
        ("cgnl", {"groups": 3}, "groups=3"),
        ("cgnl", {"hidden_channels": 4, "groups": 8}, "hidden_channels=4"),
        ("cgnl", {"kernel": "rbf", "order": -1}, "order=-1"),
        ("cgnl", {"gamma": 0.0}, "gamma=0.0"),
        ("cgnl", {"kernel": "gaussian"}, "kernel='gaussian'"),
        ("glore", {"hidden_channels": 0}, "hidden_channels=0"),
        ("glore", {"dims": 4}, "dims=4"),
        ("spygr", {"num_levels": 0}, "num_levels=0"),
        ("spygr", {"init": "identity"}, "residual=True"),
    ],
)
def test_wrong_options(id, options, words):
    with pytest.raises(RegardError, match=words):
        make(id, 8, **options)


def test_spygr_on_a_map_too_small_for_its_levels():
    with pytest.raises(RegardError, match="num_levels=3"):
        make("spygr", 4)(torch.randn(1, 4, 3, 9))


@pytest.mark.parametrize("id", ["cgnl", "glore"])
def test_sums_over_positions_survive_half_precision(id):
    module = make(id, 8, zero_init=False, **({"groups": 2} if id == "cgnl" else {})).half().eval()
    x = 8 * torch.ones(1, 8, 48, 48).half() + torch.randn(1, 8, 48, 48).half()
    expected = make(id, 8, zero_init=False, **({"groups": 2} if id == "cgnl" else {})).eval()
    expected.load_state_dict({k: v.float() for k, v in module.state_dict().items()})
    out, target = module(x).float(), expected(x.float())
    assert (out - target).abs().max() < 1e-2 * target.abs().max()


def test_glore_sums_beyond_float16_under_autocast():
    """Float32 until the norm has made them small again."""
    module, x = make("glore", 64, zero_init=False), 8 * torch.randn(2, 64, 28, 28).relu()
    module.extend.weight.data.mul_(100)
    with torch.autocast("cpu", torch.float16):
        out = module(x.half())
    assert out.dtype == torch.float16 and out.isfinite().all() and module.norm.running_mean.isfinite().all()
