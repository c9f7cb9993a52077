"""Adaptive context: the formula in the authors' order, names, hand-set gates, the start without context."""

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official


def make(*args, **options):
    torch.manual_seed(0)
    return regard.create("adaptive_context", *args, **options)


def in_the_authors_order(module, x):
    maps = []
    for i, s in enumerate(module.sizes):
        regions, u = module.pooled[i](F.adaptive_avg_pool2d(x, s)).flatten(2), module.input[i](x)
        g = module.glob[i](u.mean((2, 3), keepdim=True))
        gates = module.affinity[i]((u + g).movedim(1, 3)).sigmoid().flatten(1, 2)
        z = (gates @ regions.mT).mT.unflatten(2, x.shape[2:])
        r = F.relu(module.residual[i](z) * (1 if module.gain is None else module.gain) + u)
        maps.append(r if module.fuse is None else module.fuse[i](r))
    return maps[0] if module.bottleneck is None else module.bottleneck(torch.cat((x, *maps), 1))


@pytest.mark.parametrize("scales", [2, (2,), (1, 3)])
@pytest.mark.parametrize(("norm", "fusion"), [("batch", True), (None, False)])
def test_equals_its_formula(scales, norm, fusion):
    module, x = make(8, scales=scales, norm=norm, fusion=fusion, hidden_channels=4), torch.randn(3, 8, 7, 5)
    out, weights = module(x, return_weights=True)
    torch.testing.assert_close(out, in_the_authors_order(module, x))
    shapes = [tuple(w.shape) for w in (weights if module.pyramid else (weights,))]
    assert shapes == [(3, s * s, 7, 5) for s in module.sizes]


def test_names():
    x = torch.randn(2, 8, 5, 4)
    for options, key in (({"scales": 3}, "gla.weight"), ({}, "acm_modules.3.gla.weight")):
        module = make(8, **options).eval()
        state = to_official(module)
        assert state[key].shape[1:] == (2, 1, 1)
        other = load_official(regard.create("adaptive_context", 8, **options).eval(), state)
        assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("scales", [2, (1, 2)])
def test_starts_without_context_and_leaves_that(scales):
    module, x = make(8, scales=scales, init="identity", hidden_channels=6), torch.randn(3, 8, 5, 5)

    def without():
        maps = [fuse(layer(x)) for layer, fuse in zip(module.input, module.fuse, strict=True)]
        return maps[0] if module.bottleneck is None else module.bottleneck(torch.cat((x, *maps), 1))

    for mode in (True, False):
        module.train(mode)
        assert torch.equal(module(x), without())
    module(x).square().sum().backward()
    assert module.gain.grad.abs() > 0
    with torch.no_grad():
        module.gain -= 0.1 * module.gain.grad
    assert not torch.allclose(module(x), without())


def test_wrong_calls():
    for options, words in (
        ({"scales": ()}, "scales"),
        ({"scales": 0}, "scales"),
        ({"hidden_channels": 0}, "hidden_channels=0"),
        ({"init": "zero"}, "init='zero'"),
    ):
        with pytest.raises(RegardError, match=words):
            make(8, **options)
    module = make(8, scales=2)
    with pytest.raises(RegardError, match="norm=None"):
        module(torch.randn(1, 8, 4, 4))
    assert module.pooled[0].norm.num_batches_tracked == 0
