"""What only graph-kernel attention has: its kernels, sparse graphs, kernels of low rank, sampled walks, isolated nodes."""

import pytest
import torch

import regard
from regard import RegardError, use_impl
from regard.ops.graph_kernels import diffusion_kernel, random_walk_frequency, symmetric_operator, taylor_kernel


@pytest.fixture(autouse=True)
def _quick():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def graph(n: int = 9, batch: int = 2, chance: float = 0.4) -> torch.Tensor:
    edges = (torch.rand(batch, n, n) < chance).float().triu(1)
    return edges + edges.mT


def test_visits_are_the_sum_of_powers():
    a = graph() * torch.rand(2, 9, 9)  # weighted, not symmetric
    a[0, 3] = 0.0
    p = a / a.sum(-1, keepdim=True).clamp_min(1e-30)
    expected = sum(0.8**t * torch.linalg.matrix_power(p.double(), t) for t in range(5))
    assert torch.allclose(random_walk_frequency(a, 5, 0.8).double(), expected, atol=1e-6)
    assert torch.equal(random_walk_frequency(a, 1), torch.eye(9).expand(2, 9, 9))


def test_sampled_walks_have_the_exact_mean():
    a = graph(7)
    a[1, :, 2] = a[1, 2] = 0.0
    draw = random_walk_frequency(a, 4, 0.9, num_walks=3000, generator=torch.Generator().manual_seed(1))
    again = random_walk_frequency(a, 4, 0.9, num_walks=3000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw, again)
    assert (draw - random_walk_frequency(a, 4, 0.9)).abs().max() < 0.05
    assert torch.equal(draw[1, 2], torch.eye(7)[2])  # no edge, no step


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kernel", ["random_walk", "diffusion", "adjacency"])
def test_sparse_graphs_give_the_same(kernel):
    module, x, a = regard.create("graph_kernel", 8, 2, kernel=kernel), torch.randn(2, 9, 8), graph()
    assert torch.allclose(module(x, a.to_sparse_coo()), module(x, a), atol=1e-6)
    assert torch.allclose(module(x, a[0].to_sparse_csr()), module(x, a[0]), atol=1e-6)
    mask = torch.rand(2, 9) > 0.3
    assert torch.allclose(module(x, a.to_sparse_coo(), node_mask=mask), module(x, a, node_mask=mask), atol=1e-6)


def test_kernels_of_the_operator():
    s, t = symmetric_operator(graph()), torch.tensor([0.5, 2.0])
    exact = torch.stack([torch.linalg.matrix_exp(h * s.double()) for h in t], 1)
    assert torch.allclose(diffusion_kernel(s, t).double(), exact, atol=1e-5)
    assert torch.allclose(diffusion_kernel(s.clone().requires_grad_(), t).double(), exact, atol=1e-5)
    skew = s * torch.rand_like(s)
    assert torch.allclose(diffusion_kernel(skew, t), torch.linalg.matrix_exp(t[:, None, None] * skew[:, None]), atol=1e-6)
    c = torch.rand(2, 6)
    for operator in (s, skew):
        total = sum(c[:, i, None, None].double() * torch.linalg.matrix_power(operator.double(), i)[:, None] for i in range(6))
        assert torch.allclose(taylor_kernel(operator, c).double(), total, atol=1e-5)


def test_eigenvectors_never_carry_the_gradient_of_the_graph():
    """A complete graph has N - 1 equal eigenvalues: through eigh its gradient would be NaN."""
    module, a = regard.create("graph_kernel", 8, 2, kernel="diffusion"), (1 - torch.eye(6))[None].requires_grad_()
    module(torch.randn(1, 6, 8), a).square().sum().backward()
    assert a.grad.isfinite().all() and a.grad.abs().max() > 0 and module.heat_params.grad.abs().min() > 0


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_a_kernel_is_made_once_and_passed(attention):
    module = regard.create("graph_kernel", 8, 2, attention=attention, kernel="diffusion")
    x, a = torch.randn(2, 9, 8), graph()
    assert torch.equal(module(x, kernel=module.kernel_of(a)), module(x, a))
    walks = regard.create("graph_kernel", 8, 2, attention=attention, walk_length=4, decay=0.9)
    assert torch.allclose(walks(x, kernel=walks.kernel_of(a)), walks(x, a), atol=1e-6)
    assert torch.allclose(walks(x, frequency=walks.random_walk_frequency(a, 4, 0.9)), walks(x, a), atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_low_rank_equals_the_weights_written_out(masked):
    module = regard.create("graph_kernel", 8, 2, attention="linear", kernel_norm=1)
    x, frequency = torch.randn(2, 40, 8, requires_grad=True), torch.rand(2, 40, 3)
    mask = torch.rand(2, 40) > 0.3 if masked else None
    results = []
    for impl in ("low_rank", "reference"):
        with use_impl(graph_kernels=impl):
            out = module(x, frequency=frequency, node_mask=mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, module.k_proj.weight])))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))
    module, long = regard.create("graph_kernel", 32, 2, attention="linear"), torch.randn(1, 600, 32)
    assert "low_rank" in {c.impl for c in regard.explain(module, long, frequency=torch.rand(1, 600, 3))}
    assert "low_rank" not in {c.impl for c in regard.explain(module, long, frequency=torch.rand(1, 600, 600))}


def test_fused_equals_the_weights_written_out_where_most_of_the_graph_is_out_of_reach():
    module = regard.create("graph_kernel", 8, 2, walk_length=2)
    x, a = 30 * torch.randn(2, 12, 8), graph(12, chance=0.15)
    out, weights = module(x, a, return_weights=True)
    with use_impl("reference"):
        assert torch.allclose(module(x, a), out, atol=1e-5)
    far = random_walk_frequency(a, 2) @ random_walk_frequency(a, 2).mT == 0
    assert far.any() and weights.transpose(0, 1)[:, far].abs().max() == 0


def test_isolated_and_masked_nodes():
    a = graph()
    a[:, 4] = a[:, :, 4] = 0.0
    for options in ({}, {"kernel": "diffusion"}, {"kernel": "taylor", "num_terms": 4}, {"attention": "linear"}, {"kernel": "adjacency"}):
        module = regard.create("graph_kernel", 8, 2, **options)
        x = torch.randn(2, 9, 8, requires_grad=True)
        out = module(x, a)
        out.square().sum().backward()
        assert out.isfinite().all() and x.grad.isfinite().all(), options
        dirty = x.detach().clone()
        dirty[:, 7:] = float("nan")
        mask = (torch.arange(9) < 7).expand(2, 9)
        padded = module(dirty, a, node_mask=mask)
        assert torch.allclose(padded[:, :7], module(x[:, :7], a[:, :7, :7]), atol=1e-5) and padded[:, 7:].abs().max() == 0, options
    module = regard.create("graph_kernel", 8, 2)
    assert torch.allclose(module(x, a)[:, 4], module.v_proj(x)[:, 4], atol=1e-6)  # an isolated node sees itself alone
    kernel = torch.ones(9, 9)
    kernel[2] = 0.0
    assert module(x, kernel=kernel)[:, 2].abs().max() == 0
    with use_impl("reference"):
        assert module(x, kernel=kernel)[:, 2].abs().max() == 0


def test_without_a_kernel_it_is_plain_attention():
    module, x = regard.create("graph_kernel", 8, 2, kernel="none"), torch.randn(2, 5, 8)
    q, k, v = (p(x).unflatten(2, (2, 4)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert torch.allclose(module(x), plain, atol=1e-6)


def test_checkpoints_of_the_notebook():
    module, other = (regard.create("graph_kernel", 8, 2, out_dim=12) for _ in range(2))
    state = regard.to_official(module, "GKATLayer")
    assert set(state) == {f"{j}.fc_{r}.weight" for j in range(2) for r in "QKV"} and state["1.fc_V.weight"].shape == (6, 8)
    assert torch.equal(state["1.fc_V.weight"], module.v_proj.weight[6:])
    x, a = torch.randn(2, 9, 8), graph()
    regard.load_official(other, {f"layers.1.{name}": tensor for name, tensor in state.items()})
    assert torch.equal(other(x, a), module(x, a))


def test_wrong_calls():
    module, x, a = regard.create("graph_kernel", 8, 2), torch.randn(2, 9, 8), graph()
    for given, match in (
        ({"adjacency": -a}, "adjacency must not be negative"),
        ({"adjacency": a[:, :5]}, "adjacency must be square"),
        ({"adjacency": a[:, :5, :5]}, "adjacency is for 5 nodes but x has 9"),
        ({"adjacency": a[:1].repeat(3, 1, 1)}, "adjacency has batch 3 but x has batch 2"),
        ({"adjacency": a.long()}, "adjacency must be a floating-point tensor"),
        ({}, "needs the adjacency"),
        ({"kernel": a, "frequency": a}, "both given"),
        ({"kernel": torch.ones(2, 3, 9, 9)}, "kernel has .* heads but num_heads=2"),
        ({"kernel": -a}, "kernel must not be negative"),
    ):
        with pytest.raises(RegardError, match=match):
            module(x, **given)
    with pytest.raises(RegardError, match="kernel='walk'"):
        regard.create("graph_kernel", 8, 2, kernel="walk")
    with pytest.raises(RegardError, match="walk_length=0"):
        regard.create("graph_kernel", 8, 2, walk_length=0)
