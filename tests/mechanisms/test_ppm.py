"""Pyramid pooling: the formula of both forms, both namings, the start without the levels, refusals."""

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official


def make(*args, **options):
    torch.manual_seed(0)
    return regard.create("ppm", *args, **options)


def joined(module, x):
    maps = [level(F.adaptive_avg_pool2d(x, n)) for n, level in zip(module.bins, module.levels, strict=True)]
    if module.gain is not None:
        maps = [module.gain * m for m in maps]
    return torch.cat([x, *(F.interpolate(m, x.shape[2:], mode="bilinear", align_corners=module.align_corners) for m in maps)], 1)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("norm", ["batch", None])
def test_equals_its_formula(align_corners, norm):
    x = torch.randn(2, 8, 7, 10)
    module = make(8, align_corners=align_corners, norm=norm)
    torch.testing.assert_close(module(x), joined(module, x))
    module = make(8, align_corners=align_corners, norm=norm, bottleneck=True, out_channels=5)
    torch.testing.assert_close(module(x), module.bottleneck(joined(module, x)))


def test_widths():
    assert make(12).out_channels == 24 and make(12, bottleneck=True).out_channels == 3
    assert make(12, hidden_channels=2, bins=(1, 5))(torch.randn(2, 12, 3, 4)).shape == (2, 16, 3, 4)


@pytest.mark.parametrize(("bottleneck", "key"), [(False, "features.1.1.weight"), (True, "psp_modules.1.1.conv.weight")])
def test_namings(bottleneck, key):
    module = make(8, bottleneck=bottleneck)
    state = to_official(module)
    assert torch.equal(state[key], module.levels[1].conv.weight)
    assert torch.equal(load_official(make(8, bottleneck=bottleneck, init="identity").eval(), state).levels[1].conv.weight, state[key])
    assert "psp_modules.0.1.bn.running_mean" in to_official(module, "mmsegmentation")


@pytest.mark.parametrize("bottleneck", [False, True])
def test_starts_without_the_levels_and_leaves_that(bottleneck):
    module, x = make(8, init="identity", bottleneck=bottleneck), torch.randn(2, 8, 5, 5)

    def without():
        empty = torch.cat((x, x.new_zeros(2, 8, 5, 5)), 1)
        return module.bottleneck(empty) if bottleneck else empty

    for mode in (True, False):
        module.train(mode)
        torch.testing.assert_close(module(x), without(), rtol=0, atol=1e-6 if bottleneck else 0)
    module.train()(x).square().sum().backward() if bottleneck else module.train()(x).sum().backward()
    assert module.gain.grad.abs() > 0
    with torch.no_grad():
        module.gain -= 0.1 * module.gain.grad
    assert not torch.allclose(module(x), without())


def test_a_batch_of_one_is_answered_before_anything_moves():
    module = make(8, bins=(2, 1))
    with pytest.raises(RegardError, match="norm=None"):
        module(torch.randn(1, 8, 4, 4))
    assert module.levels[0].norm.num_batches_tracked == 0
    assert make(8, bins=(2, 3))(torch.randn(1, 8, 4, 4)).shape == (1, 16, 4, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bins": ()}, "bins"),
        ({"bins": (0, 1)}, "bins"),
        ({"out_channels": 4}, "needs bottleneck=True"),
        ({"hidden_channels": 0}, "hidden_channels=0"),
        ({"bins": tuple(range(1, 10))}, "hidden width is 0"),
        ({"bottleneck": True, "out_channels": 0}, "out_channels=0"),
        ({"init": "zero"}, "init='zero'"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RegardError, match=words):
        make(8, **options)
