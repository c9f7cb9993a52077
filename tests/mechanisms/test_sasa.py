"""Stand-alone self-attention: what its weights mean, what a head's sum is, borders, strides, the stem, and its namings."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard import RegardError, load_official, use_impl
from regard.official import to_official
from regard.ops._dispatch import explain

STEM = {"kernel_size": 4, "grouped": False, "relative": False, "value_mixtures": 3}


def module(channels: int = 8, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return regard.create("sasa", channels, **{"kernel_size": 3, "num_heads": 2, **options}).double().eval()


def maps(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def windows(x: Tensor, size: int, stride: int = 1) -> Tensor:
    """(B, C, k^2, H', W'), zero outside."""
    before, after = size // 2, size - 1 - size // 2
    return F.pad(x, (before, after, before, after)).unfold(2, size, stride).unfold(3, size, stride).flatten(-2).movedim(-1, 2)


@pytest.mark.parametrize("reduce", ["head", "all", "channel"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "bias": True}, {"mask_border": True, "out_channels": 12}, {"out_channels": 6}])
def test_the_definition(reduce: str, shared: bool, options: dict) -> None:
    net, x = module(logit_reduce=reduce, rel_shared=shared, **options), maps(2, 8, 5, 6)
    size, heads, d, width, s = 3, 2, net.head_dim, net.out_channels, net.stride
    if net.bias is not None:
        torch.nn.init.normal_(net.bias)
    q, k, v = net.weight_query(x)[..., ::s, ::s], windows(net.weight_key(x), size, s), windows(net.weight_value(x), size, s)
    r = torch.zeros(width, size, size, dtype=x.dtype)
    for c in range(width):
        n, i = divmod(c, d)
        if reduce == "channel" and not shared:  # rows first
            half = width // 2
            r[c] = net.relative_y[c][:, None].expand(-1, size) if c < half else net.relative_x[c - half].expand(size, -1)
        else:
            y, z = (net.relative_y, net.relative_x) if shared else (net.relative_y[n], net.relative_x[n])
            r[c] = z[i].expand(size, -1) if i < d // 2 else y[i - d // 2][:, None].expand(-1, size)
    terms = q[:, :, None] * (k + r.flatten(1)[None, :, :, None, None])
    if reduce == "head":
        logits = terms.unflatten(1, (heads, d)).sum(2)
    else:
        logits = terms.sum(1, keepdim=True).expand(-1, heads, -1, -1, -1) if reduce == "all" else terms
    if net.mask_border:
        logits = logits.masked_fill(windows(torch.ones_like(x[:, :1]), size, s) == 0, float("-inf"))
    weights = logits.softmax(2)
    expected = (weights.repeat_interleave(width // weights.shape[1], 1) * v).sum(2)
    expected = expected if net.bias is None else expected + net.bias
    out, found = net(x, return_weights=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, weights)


def test_projections() -> None:
    """Each head's channels come from its group of the input, unless told otherwise; He's initialization, by what goes out."""
    for grouped, entries in ((True, 16), (False, 64)):
        for conv in (lambda net: net.weight_query, lambda net: net.weight_key, lambda net: net.weight_value):
            weight = conv(module(64, out_channels=256, num_heads=4, grouped=grouped)).weight
            assert weight.shape == (256, entries, 1, 1)
            assert float(weight.detach().std()) == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert not module(bias=True).bias.any()


def test_odd_channels_have_one_more_column() -> None:
    net = module(out_channels=9, num_heads=3, grouped=False, rel_shared=False, logit_reduce="channel")
    assert (net.relative_y.shape, net.relative_x.shape) == ((4, 3), (5, 3))
    assert net(maps(1, 8, 4, 5)).shape == (1, 9, 4, 5)


def test_stem_mixes_values_by_their_place() -> None:
    net, x = module(**STEM), maps(2, 8, 6, 5)
    out, weights = net(x, return_weights=True)
    place = torch.zeros(3, 4, 4, dtype=x.dtype)
    for a in range(4):
        for b in range(4):
            place[:, a, b] = (net.emb_m @ (net.emb_y[:, a] + net.emb_x[:, b])).softmax(0)
    assert place.std() > 0.01
    v = sum(windows(value(x), 4) * part.view(16, 1, 1) for value, part in zip(net.weight_values, place, strict=True))
    torch.testing.assert_close(out, (weights.repeat_interleave(4, 1) * v).sum(2))


def test_means_come_after_attention() -> None:
    whole, net, x = module(), module(stride=2, downsample="avgpool"), maps(1, 8, 7, 6)
    torch.testing.assert_close(net(x), F.avg_pool2d(whole(x), 2))
    strided = module(stride=2)
    torch.testing.assert_close(strided(x), whole(x)[..., ::2, ::2])
    with pytest.raises(RegardError, match="at least 2 pixels"):
        net(maps(1, 8, 1, 4))


def test_masked_border_leaves_constant_maps_alone() -> None:
    x = torch.ones(1, 8, 5, 6, dtype=torch.float64)
    masked, plain = module(mask_border=True)(x), module()(x)
    assert (masked - masked[:, :, :1, :1]).abs().max() < 1e-12
    assert (plain - plain[:, :, :1, :1]).abs().max() > 1e-3


def test_ways_are_chosen_by_width() -> None:
    wide, narrow = module(64, num_heads=1, kernel_size=7), module(64, num_heads=8, kernel_size=7)
    assert [c.impl for net in (wide, narrow) for c in explain(net, maps(1, 64, 9, 8))] == ["blocks", "shifted"]
    with use_impl("reference"):
        expected = wide(maps(1, 64, 9, 8))
    torch.testing.assert_close(wide(maps(1, 64, 9, 8)), expected)


def test_public_namings_round_trip() -> None:
    own = {"out_channels": 12, "grouped": False, "rel_shared": False, "logit_reduce": "channel"}
    net = module(**own)
    written = to_official(net, "leaderj1001/Stand-Alone-Self-Attention")
    assert {name: tuple(t.shape) for name, t in written.items()} == {
        **{f"{name}_conv.weight": (12, 8, 1, 1) for name in ("query", "key", "value")},
        "rel_h": (6, 1, 1, 3, 1),
        "rel_w": (6, 1, 1, 1, 3),
    }
    torch.testing.assert_close(written["rel_h"][:, 0, 0, :, 0], net.relative_y)
    fresh = load_official(module(**own), {name: t + 1 for name, t in written.items()})
    for name, value in net.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], value + 1)
    stem = module(**STEM, logit_reduce="channel")
    written = to_official(stem, "leaderj1001/Stand-Alone-Self-Attention")
    assert {"emb_a", "emb_b", "emb_mix", "value_conv.2.weight"} <= set(written)
    torch.testing.assert_close(written["emb_a"], stem.emb_y)
    load_official(module(**STEM), written)


@pytest.mark.parametrize("reduce", ["channel", "head", "all"])
def test_tables_of_all_channels_are_no_tables_of_a_head(reduce: str) -> None:
    """For one head and a shared table the shapes agree, and rows would become columns."""
    own = {"out_channels": 12, "num_heads": 1, "grouped": False}
    state = to_official(module(**own, rel_shared=False, logit_reduce="channel"), "leaderj1001/Stand-Alone-Self-Attention")
    with pytest.raises(RegardError, match=r"unknown .*rel_h"):
        load_official(module(**own, logit_reduce=reduce), state)


def test_image_absolute_mixtures_are_refused() -> None:
    state = {name: torch.zeros(4, 14) if name in ("emb_x", "emb_y") else t for name, t in module(**STEM).state_dict().items()}
    with pytest.raises(RegardError, match="every place of one padded image"):
        load_official(module(**STEM), state)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"out_channels": 9}, "out_channels=9 is not divisible by num_heads=2"),
        ({"channels": 7, "out_channels": 8}, "channels=7 is not divisible by num_heads=2"),
        ({"kernel_size": 0}, "kernel_size=0"),
        ({"stride": 0}, "stride=0"),
        ({"downsample": "max"}, "downsample='max'"),
        ({"logit_reduce": "none"}, "logit_reduce='none'"),
        ({"value_mixtures": 0}, "value_mixtures=0"),
    ],
)
def test_wrong_options(options: dict, text: str) -> None:
    with pytest.raises(RegardError, match=text):
        module(**{"channels": 8, **options})
