"""Context-Transformer: its equations row by row, masks, class vectors, and the pooling of score maps."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import regard
from regard import RegardError
from regard.testing.subject import shuffle_

GOLDENS = sorted((Path(__file__).parents[1] / "goldens" / "context_transformer").glob("*.safetensors"))
context_pool = regard.create("context_transformer", 2, 2).functions["context_pool"]


def module(**options) -> nn.Module:
    torch.manual_seed(0)
    out = regard.create("context_transformer", 6, 4, **options).double().eval()
    shuffle_(out)
    return out


def pair(p: int = 7, m: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, n, 6, dtype=torch.float64, generator=generator) for n in (p, m))  # type: ignore[return-value]


@pytest.mark.parametrize("mode", ["transfer", "incremental"])
@torch.no_grad()
def test_equations(mode: str) -> None:
    net, (x, context) = module(mode=mode, scale=3.0), pair()
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    for given in (None, mask):
        out, weights = net(x, context, context_mask=given, return_weights=True)
        for b in range(2):
            entries = context[b] if given is None else context[b, mask[b]]
            phi, g = (entries @ layer.weight.T + layer.bias + entries for layer in (net.phi, net.g))
            for i, s in enumerate(x[b]):
                a = (phi @ (net.theta.weight @ s + net.theta.bias + s)).softmax(0)
                mixed = s + (a @ g) * net.w_z
                scores = 3.0 * net.target.weight @ (mixed / mixed.norm())
                if mode == "incremental":
                    scores = torch.cat([net.fc_base.weight @ s + net.fc_base.bias + s, scores])
                torch.testing.assert_close(out[b, i], scores)
                torch.testing.assert_close(weights[b, i] if given is None else weights[b, i, mask[b]], a)
        torch.testing.assert_close(net(x, context, context_mask=given), out)


def test_masked_entries_are_not_there() -> None:
    net, (x, context) = module(), pair()
    mask = torch.tensor([[True] * 5, [False] * 5])
    mask[0, 3:] = False
    far = context.masked_fill(~mask[:, :, None], 1e3).requires_grad_()
    out, weights = net(x.requires_grad_(), far, context_mask=mask, return_weights=True)
    torch.testing.assert_close(out[:1], net(x[:1], context[:1, :3]))
    own = x[1] / x[1].norm(dim=1, keepdim=True)
    torch.testing.assert_close(out[1], 5 * own @ net.target.weight.T)  # without entries: its own scores
    assert weights[1].abs().max() == 0
    gradients = torch.autograd.grad(out.square().sum(), [x, far, *net.parameters()])
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert gradients[1][~mask].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_zeros_give_zeros(dtype: torch.dtype) -> None:
    net = regard.create("context_transformer", 6, 4, dtype=dtype)  # w_z is zero at the start
    x, context = torch.randn(1, 3, 6).to(dtype), torch.randn(1, 2, 6).to(dtype)
    x[0, 1] = 0
    out = net(x, context)
    assert out.dtype == dtype
    assert torch.equal(out[0, 1], torch.zeros(4, dtype=dtype))
    assert bool((out[0, ::2] != 0).all())


def test_large_scores_are_finite() -> None:
    net, (x, context) = module().float(), pair()
    out = net((300 * x).float().requires_grad_(), (300 * context).float())
    (gradient,) = torch.autograd.grad(out.sum(), net.theta.weight)
    assert bool(out.isfinite().all() and gradient.isfinite().all())


def test_a_fresh_module_does_not_look_at_the_context() -> None:
    net, (x, context) = regard.create("context_transformer", 6, 4, "incremental").double(), pair()
    out = net(x, context)
    assert torch.equal(out, net(x, -context))
    assert torch.equal(out[..., :6], x)
    for layer in (net.theta, net.phi, net.g):
        assert layer.bias.abs().max() == 0
    wide = regard.create("context_transformer", 200, 3)
    assert abs(wide.theta.weight.std().item() / (2 / 200) ** 0.5 - 1) < 0.05


def test_normalised_scores_are_cosines() -> None:
    net, (x, context) = module(), pair()
    net.normalize()
    torch.testing.assert_close(net.target.weight.norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert net(x, context).abs().max() <= 5


def test_imprint() -> None:
    net, generator = module(), torch.Generator().manual_seed(2)
    before = net.target.weight.clone()
    features, labels = torch.randn(5, 6, dtype=torch.float64, generator=generator), torch.tensor([0, 3, 0, 3, 0], dtype=torch.int32)
    net.imprint(features, labels)
    unit = features / features.norm(dim=1, keepdim=True)
    for c in (0, 3):
        mean = unit[labels == c].mean(0)
        torch.testing.assert_close(net.target.weight[c], mean / mean.norm())
    assert torch.equal(net.target.weight[1:3], before[1:3])
    assert net.target.weight.requires_grad
    for wrong, text in (
        ((features[:, :5], labels), "features must be"),
        ((features, labels[:4]), r"labels must be \(5,\)"),
        ((features, labels + 1), r"labels \[4\] are not among the 4 novel classes"),
        ((features, labels.float()), "labels must be a tensor of class numbers"),
    ):
        with pytest.raises(RegardError, match=text):
            net.imprint(*wrong)


def test_wrong_calls() -> None:
    net, (x, context) = module(), pair()
    mask = torch.ones(2, 5, dtype=torch.bool)
    for wrong, options, text in (
        ((x, context[0]), {}, "context must be"),
        ((x, context[..., :5]), {}, "context has width 5"),
        ((x, context[:1]), {}, "context has batch 1 but x has batch 2"),
        ((x, context[:, :0]), {}, "context has no entries"),
        ((x, context), {"context_mask": mask[:, :4]}, "context_mask must have shape"),
        ((x, context), {"context_mask": mask.long()}, "context_mask must be boolean"),
    ):
        with pytest.raises(RegardError, match=text):
            net(*wrong, **options)
    for options, text in (({"mode": "base"}, "mode='base'"), ({"num_novel": 0}, "num_novel=0"), ({"dim": 0}, "dim=0")):
        with pytest.raises(RegardError, match=text):
            regard.create("context_transformer", **{"dim": 6, "num_novel": 4, **options})


def test_the_rest_of_the_detector_is_ignored() -> None:
    net = module(mode="incremental")
    state = regard.to_official(net)
    assert {"Wz", "OBJ_Target.weight", "scale", "fc_base.bias"} <= set(state)
    rest = {f"{name}.0.weight": torch.zeros(1) for name in ("base", "Norm", "extras", "loc", "conf", "obj")}
    other = regard.load_official(regard.create("context_transformer", 6, 4, "incremental", 1.0).double(), state | rest)
    assert torch.equal(other(*pair()), net(*pair()))  # the file's scale


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_pooling_and_weights_are_the_authors(path: Path) -> None:
    with safe_open(str(path), "pt") as file:
        meta, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    kwargs, pool = json.loads(meta["kwargs"]), json.loads(meta["pool"])
    maps = [tensors[f"maps.{i}"] for i in range(len(pool["anchors"]))]
    x, context = context_pool(maps, pool["anchors"], kwargs["dim"], pool["kernel"])
    assert torch.equal(x, tensors["input.x"])
    assert torch.equal(context, tensors["input.context"])
    state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    net = regard.load_official(regard.create("context_transformer", **kwargs), state)
    rows = tensors["weights"]
    torch.testing.assert_close(regard.attend_rows(net, x, queries=list(range(rows.shape[1])), context=context), rows)


def test_pooling_of_scales() -> None:
    maps = [torch.randn(2, 6, 7, 5), torch.randn(2, 6, 4, 4)]
    x, context = context_pool(maps, 2, 3)
    assert x.shape == (2, 2 * (35 + 16), 3)
    assert context.shape == (2, 2 * (3 * 2 + 2 * 2), 3)  # 3 x 3 and 2 x 2, borders kept
    assert torch.equal(x[0, 2 * 5 * 2 + 1], maps[0][0, 3:, 2, 0])  # row 2, column 0, second anchor
    assert torch.equal(context[0, 1], maps[0][0, 3:, :3, :3].amax((1, 2)))
    overlapping = context_pool(maps, 2, 3, kernel=3, stride=1)[1]
    assert overlapping.shape == (2, 2 * (5 * 3 + 2 * 2), 3)
    for arguments, text in (
        (([], 2, 3), "maps is empty"),
        ((maps[0], 2, 3), "maps must be a list of tensors, got Tensor"),
        ((maps, [2], 3), "anchors=.* has 1 entries for 2 maps"),
        ((maps, 3, 3), r"maps\[0\] must be \(2, 3 anchors \* 3"),
        (([maps[0], maps[1][:1]], 2, 3), r"maps\[1\] must be \(2,"),
        ((maps, 2, 3, 0), "kernel=0 must be at least 1"),
    ):
        with pytest.raises(RegardError, match=text):
            context_pool(*arguments)
