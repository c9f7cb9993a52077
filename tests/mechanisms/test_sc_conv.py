"""Self-calibrated convolution: the formula in both ways of upsampling, two paths, namings, the start without calibration, errors."""

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official


def make(*args, **options):
    torch.manual_seed(0)
    return regard.create("sc_conv", *args, **options)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_equals_its_formula(mode):
    module, x = make(8, pooling_r=2, up_mode=mode, stride=2).eval(), torch.randn(2, 8, 7, 9)

    def conv(layer, value, stride=1):
        return layer.norm(F.conv2d(value, layer.conv.weight, stride=stride, padding=1))

    small = conv(module.k2, x[:, :, :6, :8].unflatten(3, (4, 2)).unflatten(2, (3, 2)).mean((3, 5)))
    if mode == "nearest":
        up = small[:, :, torch.arange(7) * 3 // 7][..., torch.arange(9) * 4 // 9]
    else:
        up = F.interpolate(small, (7, 9), mode="bilinear", align_corners=False)
    gate = (x + up).sigmoid()
    out, found = module(x, return_weights=True)
    torch.testing.assert_close(found, gate)
    torch.testing.assert_close(out, conv(module.k4, conv(module.k3, x) * gate, 2))
    assert out.shape == (2, 8, 4, 5)


def test_two_paths_keep_their_halves():
    module, x = make(8, two_path=True).eval(), torch.randn(2, 8, 5, 6)
    alone = make(4).eval()
    alone.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("k1")})
    out, gate = module(x, return_weights=True)
    torch.testing.assert_close(out, torch.cat((module.k1(x[:, :4]), alone(x[:, 4:])), 1))
    assert gate.shape == (2, 4, 5, 6)


@pytest.mark.parametrize(("two_path", "keys"), [(False, {"k2.1.weight", "k2.2.bias"}), (True, {"k1.0.weight", "scconv.k4.1.running_var"})])
def test_namings(two_path, keys):
    module, x = make(8, two_path=two_path).eval(), torch.randn(1, 8, 5, 6)
    state = to_official(module)
    assert keys <= set(state) and not any(".conv." in key or ".norm." in key for key in state)
    torch.manual_seed(1)
    other = load_official(regard.create("sc_conv", 8, two_path=two_path).eval(), state)
    assert torch.equal(other(x), module(x))


def test_starts_without_calibration_and_leaves_it():
    module, x = make(8, init="identity"), torch.randn(2, 8, 6, 6)
    for mode in (True, False):
        assert torch.equal(module.train(mode)(x), module.k4(module.k3(x)))
    module(x).square().sum().backward()
    assert module.gain.grad.abs() > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pooling_r": 0}, "pooling_r=0"),
        ({"padding": 0}, "padding=0"),
        ({"dilation": 2, "padding": 1}, "dilation=2 leave it None"),
        ({"groups": 3}, "groups=3"),
        ({"groups": 8, "two_path": True}, "half the channels=4"),
        ({"up_mode": "bicubic"}, "up_mode='bicubic'"),
        ({"init": "zero"}, "init='zero'"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RegardError, match=words):
        make(8, **options)


def test_wrong_calls():
    with pytest.raises(RegardError, match="channels=7"):
        make(7, two_path=True)
    with pytest.raises(RegardError, match="pooling_r=4"):
        make(8)(torch.randn(1, 8, 3, 9))
    with pytest.raises(RegardError, match=r"eval\(\)"):
        make(8).train()(torch.randn(1, 8, 4, 4))
    assert make(8, norm=None).train()(torch.randn(1, 8, 4, 4)).shape == (1, 8, 4, 4)
    assert make(8, padding=2, dilation=2)(torch.randn(2, 8, 9, 8)).shape == (2, 8, 9, 8)


@pytest.mark.parametrize("two_path", [False, True])
def test_a_single_position_is_answered_before_anything_is_updated(two_path):
    module = regard.create("sc_conv", 8, pooling_r=2, stride=8, two_path=two_path)
    with pytest.raises(RegardError, match="BatchNorm in training"):
        module(torch.randn(1, 8, 8, 8))
    assert all(int(b) == 0 for name, b in module.named_buffers() if name.endswith("num_batches_tracked"))
