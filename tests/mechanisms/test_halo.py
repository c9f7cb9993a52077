"""HaloNet attention: what its weights mean, ragged maps, both ways of stride 2, borders, and its two namings."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard import RegardError, load_official
from regard.official import to_official


def module(channels: int = 8, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return regard.create("halo", channels, **{"num_heads": 2, "block_size": 4, "halo_size": 1, **options}).double().eval()


def maps(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    "options", [{}, {"mask_border": True, "scale_pos_embed": True, "qkv_bias": True}, {"stride": 2}, {"qk_head_dim": 3, "v_head_dim": 5}]
)
def test_output_is_weights_times_values(options: dict) -> None:
    net, x = module(**options), maps(2, 8, 8, 12)
    out, weights = net(x, return_weights=True)
    side, heads, d, dv = 4 // net.query_stride, 2, net.qk_head_dim, net.v_head_dim
    assert weights.shape == (2, 2, 2, 3, side**2, 36)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    v = net.kv(x).unflatten(1, (heads, d + dv))[:, :, d:]
    windows = F.pad(v, (1, 1, 1, 1)).unfold(3, 6, 4).unfold(4, 6, 4).flatten(-2)
    y = torch.einsum("bnrsqk,bndrsk->bndrsq", weights, windows).unflatten(-1, (side, side)).permute(0, 1, 2, 3, 5, 4, 6)
    torch.testing.assert_close(out, y.reshape(out.shape))


def test_ragged_map_is_the_padded_map_cropped() -> None:
    net, x = module(), maps(1, 8, 7, 9)
    torch.testing.assert_close(net(x), net(F.pad(x, (0, 3, 0, 1)))[:, :, :7, :9])
    biased = module(qkv_bias=True)
    k = biased.kv.bias.detach()
    assert k.abs().max() > 0  # then padding x would not be padding the keys
    assert (biased(x) - biased(F.pad(x, (0, 3, 0, 1)))[:, :, :7, :9]).abs().max() > 1e-4


def test_blocks_of_one_are_a_window_for_each_pixel() -> None:
    net, x = module(block_size=1, halo_size=2), maps(1, 8, 5, 6)
    q, kv = net.q(x).unflatten(1, (2, -1)), F.pad(net.kv(x), (2, 2, 2, 2)).unflatten(1, (2, -1))
    k, v = kv[:, :, : net.qk_head_dim], kv[:, :, net.qk_head_dim :]
    out = net(x).unflatten(1, (2, -1))
    for row in range(5):
        for column in range(6):
            p = q[0, :, :, row, column]
            bias = (p @ net.height_rel[4:].mT)[:, :, None] + (p @ net.width_rel[4:].mT)[:, None]
            logits = torch.einsum("nd,ndij->nij", p, k[0, ..., row : row + 5, column : column + 5]) * net.scale + bias
            expected = torch.einsum("nk,ndk->nd", logits.flatten(1).softmax(1), v[0, ..., row : row + 5, column : column + 5].flatten(2))
            torch.testing.assert_close(out[0, :, :, row, column], expected)


@pytest.mark.parametrize("options", [{"avg_down": True}, {"block_size": 3}])
def test_stride_two_by_means(options: dict) -> None:
    whole, net, x = module(**{**options, "avg_down": False}), module(stride=2, **options), maps(1, 8, 12, 12)
    torch.testing.assert_close(net(x), F.avg_pool2d(whole(x), 2))


def test_stride_two_needs_whole_blocks() -> None:
    with pytest.raises(RegardError, match="width=10"):
        module(stride=2)(maps(1, 8, 8, 10))


def test_mask_border_leaves_constant_maps_alone() -> None:
    """All values equal: any weights on real pixels give that value; zero keys of the padding dilute it."""
    x = torch.ones(1, 8, 6, 6, dtype=torch.float64)
    masked, plain = module(mask_border=True)(x), module()(x)
    assert (masked - masked[:, :, :1, :1]).abs().max() < 1e-12
    assert (plain - plain[:, :, :1, :1]).abs().max() > 1e-3


def test_options_matter_and_layout_is_kept() -> None:
    net, x = module(), maps(1, 8, 8, 8)
    scaled = load_official(module(scale_pos_embed=True), net.state_dict())
    assert (net(x) - scaled(x)).abs().max() > 1e-3
    assert net(x).is_contiguous()
    last = x.contiguous(memory_format=torch.channels_last)
    assert net(last).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(net(last), net(x))


@pytest.mark.parametrize("naming", ["timm", "lucidrains/halonet-pytorch"])
def test_namings_round_trip(naming: str) -> None:
    net = module(out_proj=True, qkv_bias=True, qk_head_dim=3, v_head_dim=5)
    written = to_official(net, naming)
    if naming != "timm":
        assert written["to_kv.weight"].shape == (16, 8) and written["to_q.weight"].shape == (6, 8)
        torch.testing.assert_close(written["to_kv.weight"][3:6], net.kv.weight[8:11].flatten(1))  # keys of the second head
        torch.testing.assert_close(written["to_kv.weight"][6:11], net.kv.weight[3:8].flatten(1))  # values of the first head
    fresh = load_official(module(out_proj=True, qkv_bias=True, qk_head_dim=3, v_head_dim=5), {k: v + 1 for k, v in written.items()})
    for name, value in net.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], value + 1)


def test_widths() -> None:
    assert module(64, num_heads=8, qk_ratio=0.5).qk_head_dim == 4  # 32 / 8
    assert module(20, num_heads=2).qk_head_dim == 12  # 20 rounds up to 24
    assert module(16, out_channels=24, num_heads=3, out_proj=True, v_head_dim=7)(maps(1, 16, 4, 4)).shape == (1, 24, 4, 4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stride": 3}, "stride=3"),
        ({"num_heads": 3}, "out_channels=8 is not divisible by num_heads=3"),
        ({"halo_size": -1}, "halo_size=-1"),
        ({"block_size": 0}, "block_size=0"),
    ],
)
def test_wrong_options(options: dict, text: str) -> None:
    with pytest.raises(RegardError, match=text):
        module(**options)
