"""Local relation: the definition written out, the prior, borders, and its naming."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard import RegardError, load_official
from regard.official import to_official


def module(channels: int = 12, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    net = regard.create("local_relation", channels, **{"kernel_size": 3, "share": 4, **options}).double().eval()
    if hasattr(net, "geometry_table"):
        torch.nn.init.normal_(net.geometry_table)
    return net


def maps(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


OPTIONS = [
    {},
    {"similarity": "squared", "stride": 2, "key_dim": 2, "geometry": "table", "scale": 0.3},
    {"similarity": "absolute", "dilation": 2, "geometry": "none", "kernel_size": 5},
    {"stride": 3, "dilation": 2, "geometry_hidden": 5},
    {"kernel_size": 5, "geometry_hidden": 5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(6, 5), (1, 2)])
def test_the_definition(options: dict, size: tuple[int, int]) -> None:
    net, x = module(**options), maps(2, 12, *size)
    k, s, d, r, e = net.kernel_size, net.stride, net.dilation, net.kernel_size // 2, net.key_dim
    out, weights = net(x, return_weights=True)
    q, keys = (conv(x).unflatten(1, (3, e)) for conv in (net.query, net.key))
    inner = torch.zeros(2, 12, *weights.shape[-2:], dtype=x.dtype)
    for b, g, y, z in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, *weights.shape[-2:]))).tolist():
        logits, seen = torch.full((k, k), float("-inf"), dtype=x.dtype), torch.zeros(k, k, 4, dtype=x.dtype)
        for i in range(k):
            for j in range(k):
                row, column = s * y + d * (i - r), s * z + d * (j - r)
                if not (0 <= row < size[0] and 0 <= column < size[1]):
                    continue
                one, other = q[b, g, :, s * y, s * z], keys[b, g, :, row, column]
                phi = {"product": one * other, "squared": -((one - other) ** 2), "absolute": -(one - other).abs()}[net.similarity].sum()
                prior = 0.0
                if net.geometry == "table":
                    prior = net.geometry_table[g, i, j]
                elif net.geometry == "mlp":
                    offset = torch.tensor([(j - r) / r, (i - r) / r], dtype=x.dtype)[:, None, None]
                    prior = net.geometry_l2(net.geometry_l1(offset).relu())[g, 0, 0]
                logits[i, j] = net.scale * phi + prior
                seen[i, j] = x[b, 4 * g : 4 * g + 4, row, column]
        expected = logits.flatten().softmax(0)
        torch.testing.assert_close(weights[b, g, :, y, z], expected)
        inner[b, 4 * g : 4 * g + 4, y, z] = expected @ seen.flatten(0, 1)
    torch.testing.assert_close(out, net.out(inner))


def test_queries_shift_with_keys() -> None:
    """squared and absolute see differences alone; product does not."""
    for similarity, same in (("squared", True), ("absolute", True), ("product", False)):
        net, x = module(similarity=similarity), maps(1, 12, 5, 6)
        before = net(x)
        with torch.no_grad():
            net.key.bias += 0.7
        assert (net(x) - before).abs().max() > (1e-3 if same else -1)  # for product it only moves the logits by 0.7 q: nothing changes
        with torch.no_grad():
            net.query.bias += 0.7
        assert ((net(x) - before).abs().max() < 1e-9) == same


def test_half_precision_keeps_logits_in_single() -> None:
    net, x = module(similarity="squared").half(), 400 * maps(1, 12, 5, 6).half()  # squares above 65504
    out, weights = net(x, return_weights=True)
    assert out.dtype == weights.dtype == torch.float16
    assert bool(out.isfinite().all())
    torch.testing.assert_close(weights.float().sum(2), torch.ones_like(weights[:, :, 0]).float(), atol=2e-3, rtol=0)


def test_naming_round_trips() -> None:
    net = module()
    written = to_official(net, "community")
    assert set(written) == {
        *(f"{layer}.{part}" for layer in ("kmap.l", "qmap.l", "gp.l1", "gp.l2", "final1x1") for part in ("weight", "bias")),
        "gp.position",
    }
    torch.testing.assert_close(written["kmap.l.weight"], net.key.weight)
    fresh = load_official(module(), {name: t + 1 for name, t in written.items()})
    for name, value in net.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], value + 1)
    assert to_official(module(geometry="table"), "community")["gp.table"].shape == (3, 3, 3)
    del written["gp.position"]  # gan3sh500's files, whose groups interleave, lack it
    with pytest.raises(RegardError, match="geometry_position"):
        load_official(module(), written)


def test_defaults() -> None:
    net = regard.create("local_relation", 64)
    assert (net.kernel_size, net.groups, net.key_dim, net.geometry_hidden, net.scale) == (7, 8, 1, 4, 1.0)
    assert regard.create("local_relation", 8).geometry_hidden == 1
    assert not regard.create("local_relation", 8, geometry="table").geometry_table.any()


def test_window_of_one_pixel() -> None:
    net, x = module(kernel_size=1), maps(1, 12, 3, 4)
    torch.testing.assert_close(net(x), net.out(x))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"share": 5}, "channels=12 is not divisible by share=5"),
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"similarity": "cosine"}, "similarity='cosine'"),
        ({"geometry": "free"}, "geometry='free'"),
        ({"key_dim": 0}, "key_dim=0"),
        ({"dilation": 0}, "dilation=0"),
        ({"geometry_hidden": 0}, "geometry_hidden=0"),
    ],
)
def test_wrong_options(options: dict, text: str) -> None:
    with pytest.raises(RegardError, match=text):
        module(**options)


def test_border_is_left_out() -> None:
    x = torch.ones(1, 12, 5, 7, dtype=torch.float64)
    out = module()(x)
    assert (out - out[:, :, :1, :1]).abs().max() < 1e-12
    assert F.unfold(x, 3, padding=1).std() > 0
