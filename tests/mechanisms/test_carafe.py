"""CARAFE: its function, its start as a box filter, its borders, and both namings."""

import pytest
import torch
import torch.nn.functional as F

import regard
from regard import RegardError, load_official
from regard.official import to_official
from regard.ops.local_window import carafe


def module(channels: int = 8, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    net = regard.create("carafe", channels, **{"compressed_channels": 4, **options}).double().eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return net


@pytest.mark.parametrize("options", [{}, {"up_group": 4, "scale_factor": 3, "up_kernel": 3}, {"norm": "batch"}, {"scale_factor": 1}])
def test_module_is_its_function(options: dict) -> None:
    net, x = module(**options), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    out, weights = net(x, return_weights=True)
    k, g, s = net.up_kernel, net.up_group, net.scale_factor
    assert weights.shape == (2, g, k * k, 5 * s, 6 * s)
    torch.testing.assert_close(weights.sum(2), torch.ones_like(weights[:, :, 0]))
    torch.testing.assert_close(carafe(x, weights, k, g, s), out)
    torch.testing.assert_close(carafe(x, weights.flatten(1, 2), k, g, s), out)


def test_constant_maps_darken_only_at_the_border() -> None:
    net = module()
    x = torch.ones(1, 8, 9, 10, dtype=torch.float64)
    out, weights = net(x, return_weights=True)
    torch.testing.assert_close(out[:, :, 4:-4, 4:-4], torch.ones_like(out[:, :, 4:-4, 4:-4]))
    inside = weights[0, 0].unflatten(0, (5, 5))[2:, 2:, 0, 0].sum()  # of the first pixel
    torch.testing.assert_close(out[0, :, 0, 0], inside.expand(8))
    assert inside < 0.99


def test_zero_encoder_is_a_box_filter_of_nearest_upsampling() -> None:
    net = module()
    torch.nn.init.zeros_(net.encoder.weight)
    torch.nn.init.zeros_(net.encoder.bias)
    x = torch.randn(1, 8, 5, 6, dtype=torch.float64)
    expected = F.interpolate(F.avg_pool2d(x, 5, 1, 2, count_include_pad=True), scale_factor=2, mode="nearest")
    torch.testing.assert_close(net(x), expected)


def test_fresh_module_is_nearly_that_filter() -> None:
    torch.manual_seed(0)
    net = regard.create("carafe", 16)
    x = torch.randn(2, 16, 6, 7)
    expected = F.interpolate(F.avg_pool2d(x, 5, 1, 2, count_include_pad=True), scale_factor=2, mode="nearest")
    assert (net(x) - expected).abs().max() < 0.05


def test_groups_have_their_own_weights() -> None:
    net, x = module(up_group=2), torch.randn(1, 4, 5, 6, dtype=torch.float64)
    out, weights = net(torch.cat([x, x], 1), return_weights=True)
    assert (weights[:, 0] - weights[:, 1]).abs().max() > 0.1
    assert (out[:, :4] - out[:, 4:]).abs().max() > 0.1


def test_a_norm_decides_the_naming() -> None:
    """mmcv's has none; what is written by default is what some public code reads."""
    for norm, key in ((None, "channel_compressor.weight"), ("batch", "comp.conv.weight")):
        assert key in to_official(regard.create("carafe", 8, norm=norm))


@pytest.mark.parametrize(
    ("naming", "options", "key"),
    [("mmcv", {}, "content_encoder.bias"), ("XiaLiPKU/CARAFE", {"norm": "batch"}, "enc.bn.running_mean")],
)
def test_namings_round_trip(naming: str, options: dict, key: str) -> None:
    net = module(**options)
    written = to_official(net, naming)
    assert key in written
    fresh = load_official(module(**options), {k: v + 1 for k, v in written.items()})
    for name, value in net.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], value + 1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"up_kernel": 4}, "up_kernel=4"),
        ({"encoder_kernel": 2}, "encoder_kernel=2"),
        ({"up_group": 3}, "up_group=3"),
        ({"scale_factor": 0}, "scale_factor=0"),
        ({"scale_factor": 1.5}, "scale_factor=1.5"),
        ({"norm": "layer"}, "norm='layer'"),
    ],
)
def test_wrong_options(options: dict, text: str) -> None:
    with pytest.raises(RegardError, match=text):
        module(**options)


def test_batch_norm_of_one_pixel() -> None:
    with pytest.raises(RegardError, match="single pixel"):
        module(norm="batch").train()(torch.randn(1, 8, 1, 1, dtype=torch.float64))
