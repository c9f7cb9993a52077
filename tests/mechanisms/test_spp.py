"""Spatial pyramid pooling: order of the output, boxes, windows, refusals."""

import pytest
import torch

import regard
from regard.errors import RegardError, RegardTypeError


@pytest.mark.parametrize("size", [(7, 5), (13, 13), (40, 11)])
def test_length_and_order(size):
    module, x = regard.create("spp", 4, levels=(3, 1)), torch.randn(2, 4, *size)
    out = module(x)
    assert out.shape == (2, module.out_features) == (2, 40)
    torch.testing.assert_close(out[:, 36:], x.amax((2, 3)))
    torch.testing.assert_close(out[:, 9 * 2 + 3 * 1 + 0], x[:, 2, size[0] // 3 : -(-2 * size[0] // 3), : -(-size[1] // 3)].amax((1, 2)))


def test_every_cell_is_in_a_bin():
    for size in ((7, 5), (13, 4)):
        x = torch.randn(1, 1, *size, requires_grad=True)
        regard.create("spp", levels=(3,), pool="mean")(x).sum().backward()
        assert (x.grad > 0).all()


def test_no_clamping_nan_and_flips():
    module, x = regard.create("spp", levels=(1,)), torch.randn(2, 3, 5, 6) - 10
    assert (module(x) < 0).all() and torch.equal(module(x), module(x.flip(2, 3)))
    x[0, 1, 2, 3] = torch.nan
    assert module(x).isnan().nonzero().tolist() == [[0, 1]]


def test_boxes_are_maps_cut_out():
    module, x = regard.create("spp", 3), torch.randn(2, 3, 9, 8, requires_grad=True)
    boxes = torch.tensor([[0, 1, 2, 8, 5], [1, 0, 0, 9, 8], [1, 4, 4, 5, 5]])
    out = module(x, boxes)
    for row, (i, y0, x0, y1, x1) in zip(out, boxes.tolist(), strict=True):
        torch.testing.assert_close(row, module(x[i : i + 1, :, y0:y1, x0:x1])[0])
    torch.testing.assert_close(module(x, [boxes[:1, 1:], boxes[1:, 1:]]), out)
    assert module(x, [[], boxes[1:, 1:]]).shape == (2, module.out_features)
    out.sum().backward()
    assert x.grad[0, :, :1].abs().max() == 0 < x.grad[1].abs().max()


def test_windows_refuse_what_does_not_fit():
    module = regard.create("spp", 2, levels=(4,), binning="window")
    assert module(torch.randn(1, 2, 13, 13)).shape == (1, 32)
    with pytest.raises(RegardError, match=r"level 4 are \[6, 6\]"):
        module(torch.randn(1, 2, 7, 7))


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        (torch.tensor([[0, 2, 2, 2, 4]]), "empty or leaves"),
        (torch.tensor([[0, 0, 0, 6, 4]]), "empty or leaves"),
        (torch.tensor([[2, 0, 0, 1, 1]]), "empty or leaves"),
        (torch.tensor([[0, 0, 1, 1]]), r"\(K, 5\)"),
        ([torch.tensor([[0, 0, 1, 1]])], "lists 1 images"),
        (torch.tensor([[0.0, 0, 0, 1, 1]]), "integers"),
    ],
)
def test_wrong_boxes(boxes, words):
    with pytest.raises(RegardError, match=words):
        regard.create("spp")(torch.randn(2, 3, 5, 5), boxes)


def test_wrong_options():
    for options in ({"levels": ()}, {"levels": (0,)}, {"pool": "sum"}, {"binning": "caffe"}, {"channels": 0}):
        with pytest.raises(RegardError, match=next(iter(options))):
            regard.create("spp", **options)
    with pytest.raises(RegardError, match="out_features needs channels"):
        regard.create("spp").out_features  # noqa: B018
    with pytest.raises(RegardTypeError):
        regard.create("spp")(torch.ones(1, 1, 2, 2, dtype=torch.long))
    with pytest.raises(RegardError, match="axes"):
        regard.create("spp")(torch.ones(3))
