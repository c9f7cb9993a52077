"""Few-shot cross attention: the equations over the whole correlation, pooling, statistics, and no correlation in memory."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import regard
from regard import RegardError

from .shapes import Shapes

GOLDEN = Path(__file__).parents[1] / "goldens" / "cross_attention_few_shot" / "train_bn_6x6.safetensors"


def module(size: tuple[int, int] = (3, 4), **options) -> nn.Module:
    torch.manual_seed(0)
    out = regard.create("cross_attention_few_shot", size, **{"reduction": 3, **options}).double().eval()
    for tensor in (*out.parameters(), out.norm.running_mean, out.norm.running_var):
        tensor.data.add_(0.3 * torch.rand_like(tensor))
    return out


def episode(size: tuple[int, int] = (3, 4), batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(batch, n, 5, *size, dtype=torch.float64, generator=generator) for n in (2, 3))  # type: ignore[return-value]


def by_hand(net: nn.Module, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maps and weights from the correlation of all positions."""
    p, q = p.flatten(3), q.flatten(3)
    cosine = torch.einsum("bicx,bjcy->bijxy", F.normalize(p, dim=2), F.normalize(q, dim=2))

    def weights(a: Tensor) -> Tensor:
        hidden = net.squeeze(a.mean(3))
        normed = F.batch_norm(hidden.flatten(0, 2), net.norm.running_mean, net.norm.running_var, net.norm.weight, net.norm.bias, net.training)
        kernel = net.expand(normed.view(hidden.shape).relu())
        return ((a * kernel[:, :, :, None]).mean(-1) / net.temperature).softmax(-1)

    of_p, of_q = weights(cosine), weights(cosine.mT)
    maps = (torch.einsum("b i c x, b i j x -> b j i c x", p, 1 + of_p), torch.einsum("b j c y, b i j y -> b j i c y", q, 1 + of_q))
    return *(m.unflatten(-1, net.spatial_size) for m in maps), of_p, of_q  # type: ignore[return-value]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"reduction": 12, "temperature": 0.5}])
def test_equations(training: bool, options: dict) -> None:
    (p, q), net = episode(), module(**options).train(training)
    expected = by_hand(module(**options).train(training), p, q)
    maps, weights = net(p, q, return_weights=True)
    for found, wanted in zip((*maps, *weights), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_pooled_is_the_mean_of_the_maps() -> None:
    (p, q), net = episode(), module()
    maps = net(p, q)
    means, weights = net(p, q, pooled=True, return_weights=True)
    for found, whole in zip(means, maps, strict=True):
        torch.testing.assert_close(found, whole.mean((-2, -1)))
    for found, wanted in zip(net(p, q, pooled=True), means, strict=True):
        torch.testing.assert_close(found, wanted)
    assert weights[0].shape == weights[1].shape == (2, 2, 3, 12)


@pytest.mark.parametrize("pooled", [False, True])
def test_no_correlation_in_memory(pooled: bool) -> None:
    torch.manual_seed(0)
    net = regard.create("cross_attention_few_shot", (7, 9)).train()  # 63 positions
    p, q = torch.randn(1, 2, 5, 7, 9, requires_grad=True), torch.randn(1, 3, 5, 7, 9, requires_grad=True)
    with Shapes() as shapes:
        sum(t.square().sum() for t in net(p, q, pooled=pooled)).backward()
    assert not [s for s in shapes.seen if s.count(63) > 1]
    made = [s for s in shapes.seen if torch.Size(s).numel() >= 2 * 3 * 5 * 63]  # the maps of all pairs
    assert bool(made) is not pooled


def test_statistics_move_twice_classes_first(tmp_path: Path) -> None:
    """The authors' running statistics after one step in training, from the golden file; and not those of the other order."""
    tensors = load_file(shutil.copy(GOLDEN, tmp_path))
    state = {name[6:]: t for name, t in tensors.items() if name.startswith("state.")}
    after = {name[12:]: t for name, t in tensors.items() if name.startswith("state_after.")}
    moved = {}
    for order in (("support", "query"), ("query", "support")):
        net = regard.load_official(regard.create("cross_attention_few_shot"), state).train()
        net(*(tensors[f"input.{name}"] for name in order))
        moved[order[0]] = {name: regard.official.to_official(net)[name] for name in after}
        assert net.norm.num_batches_tracked == state["conv1.bn.num_batches_tracked"] + 2
    assert len(after) == 2
    for name, wanted in after.items():
        torch.testing.assert_close(moved["support"][name], wanted, rtol=2e-5, atol=2e-6)
    assert any(not torch.allclose(moved["query"][name], wanted, rtol=1e-4) for name, wanted in after.items())


def test_vectors_of_zeros() -> None:
    (p, q), net = episode(), module()
    p[:, :, :, 0, 0], q[0] = 0, 0
    p.requires_grad_(), q.requires_grad_()
    maps, weights = net(p, q, return_weights=True)
    sum(m.square().sum() for m in maps).backward()
    assert all(t.isfinite().all() for t in (*maps, *weights, p.grad, q.grad))
    torch.testing.assert_close(weights[0][0], torch.full_like(weights[0][0], 1 / 12))  # nothing is shared with a map of zeros


def test_half_precision_divides_by_the_temperature_in_float32() -> None:
    (p, q), net = episode(), module()
    exact = net(p, q, return_weights=True)[1]
    half = net.bfloat16()(p.bfloat16(), q.bfloat16(), return_weights=True)
    assert half[0][0].dtype == torch.bfloat16 and half[1][0].dtype == torch.float32
    for found, wanted in zip(half[1], exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0.1, atol=5e-3)
        torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), rtol=1e-6, atol=1e-6)


def test_large_inputs_give_what_their_directions_give() -> None:
    (p, q), net = episode(), module()
    for found, wanted in zip(net(1e3 * p, 1e-3 * q, return_weights=True)[1], net(p, q, return_weights=True)[1], strict=True):
        torch.testing.assert_close(found, wanted)


def test_names_of_the_authors() -> None:
    (p, q), net = episode(), module()
    plain = regard.official.to_official(net)
    assert plain["conv1.conv.weight"].shape == (4, 12, 1, 1) and plain["conv2.weight"].shape == (12, 4, 1, 1)
    whole = {f"cam.{name}": t for name, t in plain.items()} | {"base.layer1.0.conv1.weight": torch.zeros(2), "clasifier.bias": torch.zeros(1)}
    for state in (plain, whole):
        other = regard.load_official(regard.create("cross_attention_few_shot", (3, 4), 3).double().eval(), state)
        assert torch.equal(other(p, q)[0], net(p, q)[0])


def test_start() -> None:
    torch.manual_seed(0)
    net = regard.create("cross_attention_few_shot", (20, 20), 4)
    assert abs(net.squeeze.weight.std().item() - (2 / 100) ** 0.5) < 0.003 and abs(net.expand.weight.std().item() - (2 / 400) ** 0.5) < 0.002


def test_wrong_calls() -> None:
    for options, words in (
        ({"spatial_size": 6}, "spatial_size"),
        ({"spatial_size": (0, 6)}, "spatial_size"),
        ({"reduction": 0}, "reduction"),
        ({"reduction": 37}, "reduction=37"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(RegardError, match=words):
            regard.create("cross_attention_few_shot", **options)
    (p, q), net = episode(), module()
    for args, words in (
        ((p[0], q), "support must be"),
        ((p, q[0]), "query must be"),
        ((p, q.long()), "query must be a floating"),
        ((p, q[:, :, :4]), "support has channels 5 but query has 4"),
        ((p[:1], q), "support has batch 1"),
        ((p, q[..., :3]), "fusion layer"),
        ((p.mT, q.mT), "spatial_size"),
        ((p[:, :0], q), "empty"),
    ):
        with pytest.raises(RegardError, match=words):
            net(*args)
    with pytest.raises(RegardError, match=r"eval\(\)"):
        net.train()(p[:1, :1], q[:1, :1])
