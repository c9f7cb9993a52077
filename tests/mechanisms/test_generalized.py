"""Generalized attention: what only it has."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import RegardError
from regard.errors import RegardTypeError
from regard.ops import deformable_attention_weights

TYPES = [kind for kind in map("".join, itertools.product("01", repeat=4)) if kind != "0000"]


def module(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    out = regard.create("generalized", 13, **{"num_heads": 3, "position_embedding_dim": 8, "position_magnitude": 1.5, **options}).double()
    torch.nn.init.constant_(out.gamma, 0.7)
    return out


def by_the_definition(net, x: Tensor) -> tuple[Tensor, Tensor]:
    """Every term by itself, R of every pair formed, the range pixel by pixel."""
    (heads, d), s, t = (net.num_heads, net.head_dim), net.q_stride, net.kv_stride
    queries, keys = x[:, :, ::s, ::s], x[:, :, ::t, ::t]
    (h, w), (a, b) = queries.shape[2:], keys.shape[2:]
    e1, e2, e3, e4 = (digit == "1" for digit in net.attention_type)

    def project(linear, of: Tensor) -> Tensor:
        return torch.einsum("bchw,oc->bhwo", of, linear.weight).unflatten(-1, (heads, d))

    def features(linear, n: int, m: int) -> Tensor:
        far = (torch.arange(n)[:, None] * s - torch.arange(m) * t).double() * net.position_magnitude
        angle = far[..., None] / 1000 ** (4 * torch.arange(net.position_dim // 4) / net.position_dim).double()
        return (torch.cat((angle.sin(), angle.cos()), -1) @ linear.weight.T / 2**0.5).unflatten(-1, (heads, d))

    scores = x.new_zeros(x.shape[0], heads, h, w, a, b)
    if e1:
        scores = scores + torch.einsum("bijmd,brcmd->bmijrc", project(net.query_conv, queries), project(net.key_conv, keys))
    if e3:
        scores = scores + torch.einsum("md,brcmd->bmrc", net.appr_bias.view(heads, d), project(net.key_conv, keys))[:, :, None, None]
    if e2 or e4:
        r = features(net.appr_geom_fc_x, w, b)[None, :, None] + features(net.appr_geom_fc_y, h, a)[:, None, :, None]
        if e2:
            scores = scores + torch.einsum("bijmd,ijrcmd->bmijrc", project(net.query_conv, queries), r)
        if e4:
            scores = scores + torch.einsum("md,ijrcmd->mijrc", net.geom_bias.view(heads, d), r)
    if (reach := net.spatial_range) >= 0:
        allowed = torch.zeros(h, w, a, b, dtype=torch.bool)
        for i, j in itertools.product(range(h), range(w)):
            rows, columns = (slice(max((p - reach) // t, 0), (p + reach + 1) // t + 1) for p in (i, j))
            allowed[i, j, rows, columns] = True
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = scores.flatten(4).flatten(2, 3).softmax(-1)
    y = torch.einsum("bmnk,bkmd->bnmd", weights, project(net.value_conv, keys).flatten(1, 2)).flatten(2)
    y = F.linear(y, net.proj_conv.weight, net.proj_conv.bias).mT.unflatten(2, (h, w))
    y = F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False) if s > 1 else y
    return x + net.gamma * y, weights


@pytest.mark.parametrize(
    ("kv_stride", "q_stride", "spatial_range", "size"), [(2, 1, -1, (7, 9)), (3, 1, 4, (20, 7)), (1, 2, 0, (5, 19)), (2, 2, 30, (6, 7))]
)
@pytest.mark.parametrize("kind", TYPES)
def test_definition(kind: str, kv_stride: int, q_stride: int, spatial_range: int, size: tuple[int, int]) -> None:
    """Outputs, weights, gradients and chosen rows of every type, with windows and without."""
    net = module(attention_type=kind, kv_stride=kv_stride, q_stride=q_stride, spatial_range=spatial_range)
    x = torch.randn(2, 13, *size, dtype=torch.float64, requires_grad=True)
    (out, weights), (wanted, dense) = net(x, return_weights=True), by_the_definition(net, x)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(weights.expand_as(dense), dense)
    cotangent, leaves = torch.randn_like(out), [x, *net.parameters()]
    torch.testing.assert_close(torch.autograd.grad(out, leaves, cotangent), torch.autograd.grad(wanted, leaves, cotangent))
    if not net.shared:
        torch.testing.assert_close(net.weights(x, queries=torch.tensor([7, 1])), dense[:, :, [7, 1]])


@pytest.mark.parametrize("kind", ["1111", "0110", "0011", "0100"])
@pytest.mark.parametrize("spatial_range", [-1, 2])
def test_ways_agree(kind: str, spatial_range: int) -> None:
    """The operator with its own backward, wider heads, and the definition."""
    net, found = module(attention_type=kind, spatial_range=spatial_range), []
    x = torch.randn(2, 13, 9, 11, dtype=torch.float64, requires_grad=True)
    for impl in ("reference", "chunked", "extended"):
        with regard.use_impl(separable_scores=impl):
            out = net(x)
        found.append((out, *torch.autograd.grad(out.square().sum(), [x, *net.parameters()])))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_pieces_of_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces, cutting heads and queries unevenly, are one."""
    net, x = module(), torch.randn(2, 13, 9, 11, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(net(x).square().sum(), x)
    for scores in (7 * 30, 2 * 99 * 30, 1):
        monkeypatch.setattr("regard.ops.separable_scores.chunked.CPU_SCORES", scores)
        torch.testing.assert_close(torch.autograd.grad(net(x).square().sum(), x)[0], whole)


def test_it_learns_from_the_identity() -> None:
    net, x = regard.create("generalized", 8, num_heads=2, init="identity"), torch.randn(2, 8, 5, 6)
    assert torch.equal(net(x), x)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    (net(x) - torch.randn_like(x)).square().sum().backward()
    optimizer.step()
    assert (net(x) - x).abs().max() > 1e-3


def test_a_stored_range_is_not_needed() -> None:
    state = {**regard.to_official(module(spatial_range=3), "mmcv"), "local_constraint_map": torch.zeros(2, 2, 2, 2, dtype=torch.uint8)}
    assert state["query_conv.weight"].shape == (12, 13, 1, 1)
    other, x = regard.load_official(module(spatial_range=3), state), torch.randn(1, 13, 7, 8, dtype=torch.float64)
    assert torch.equal(other(x), module(spatial_range=3)(x))


def test_half_precision_hides_what_is_out_of_range() -> None:
    """The scores that hide a key stay finite in float16, on the way of other devices as well."""
    net, x = module(spatial_range=1).half(), torch.randn(1, 13, 9, 10, dtype=torch.float64).half()
    for impl in ("chunked", "extended"):
        with regard.use_impl(separable_scores=impl), torch.no_grad():
            torch.testing.assert_close(net(x).double(), module(spatial_range=1)(x.double()), rtol=0, atol=2e-2)


@pytest.mark.parametrize("k", [1, 3])
def test_deformable_convolution(k: int) -> None:
    """sum_m W_m A_m x against bilinear sampling by grid_sample."""
    torch.manual_seed(0)
    x, offset, kernel = (torch.randn(s, dtype=torch.float64) for s in ((2, 4, 6, 6), (2, 2 * k * k, 6, 6), (5, 4, k, k)))
    weights = deformable_attention_weights(offset, (6, 6))
    ours = torch.einsum("omc,bmpr,bcr->bop", kernel.flatten(2).mT, weights, x.flatten(2)).unflatten(2, (6, 6))
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    wanted = torch.zeros_like(ours)
    for m in range(k * k):
        place = torch.stack((columns + m % k - k // 2 + offset[:, 2 * m + 1], rows + m // k - k // 2 + offset[:, 2 * m]), -1)
        sampled = F.grid_sample(x, place * 2 / 5 - 1, padding_mode="zeros", align_corners=True)
        wanted = wanted + torch.einsum("oc,bchw->bohw", kernel[:, :, m // k, m % k], sampled)
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
    still = torch.einsum("omc,bmpr,bcr->bop", kernel.flatten(2).mT, deformable_attention_weights(0 * offset, (6, 6)), x.flatten(2))
    torch.testing.assert_close(still.unflatten(2, (6, 6)), F.conv2d(x, kernel, padding=k // 2))


@pytest.mark.parametrize("terms", ["1111", "0110", "0101"])
def test_heads_in_turn_are_the_heads_at_once(terms: str) -> None:
    """What keeps the tables of positions small on large maps, against all of them at once."""
    torch.manual_seed(0)
    block, x = module(attention_type=terms, num_heads=3), torch.randn(2, 13, 5, 7, dtype=torch.float64, requires_grad=True)
    torch.nn.init.ones_(block.gamma)
    results = []
    for way in ("whole", "blocked"):
        with regard.use_impl(blockwise=way):
            out = block(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])))
    for whole, blocked in zip(*results, strict=True):
        torch.testing.assert_close(blocked, whole)


def test_wrong_calls() -> None:
    wrong = ({"attention_type": "0000"}, {"attention_type": "111"}, {"attention_type": "1121"}, {"num_heads": 14}, {"kv_stride": 0})
    for options in (*wrong, {"position_embedding_dim": 6}, {"position_embedding_dim": 0}):
        with pytest.raises(RegardError, match=next(iter(options))):
            module(**options)
    assert module(attention_type="0010", position_embedding_dim=6).shared  # unused
    with pytest.raises(RegardError, match="no rows of weights"):
        regard.attend_rows(module(q_stride=2), torch.randn(1, 13, 4, 4).double(), queries=[0])
    with pytest.raises(RegardError, match="size"):
        deformable_attention_weights(torch.randn(1, 18, 4, 4), (4, 5))
    with pytest.raises(RegardTypeError, match="offset"):
        deformable_attention_weights(torch.zeros(1, 18, 4, 4, dtype=torch.long), (4, 4))


def test_a_range_beyond_the_map_costs_what_no_range_does() -> None:
    """Windows never hold more keys than there are, on either axis."""
    x = torch.randn(1, 13, 5, 40, dtype=torch.float64)
    for kind in ("1111", "0101", "1010"):
        everywhere = module(attention_type=kind)
        for reach in (4, 12, 1000):
            net = module(attention_type=kind, spatial_range=reach)
            with FlopCounterMode(display=False) as counter:
                out = net(x)
            assert counter.get_total_flops() == net.card.cost(net, B=1, H=5, W=40, N=200)
            if reach == 1000:
                torch.testing.assert_close(out, everywhere(x))
