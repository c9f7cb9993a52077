"""Bilinear attention: the equations written out, masks, the counter, dropout's places, weight norm's names, and no tensor of all pairs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard import RegardError
from regard.parts.counting import Counter, overlap

from .shapes import Shapes

V, D = 7, 6


def module(shuffle: bool = True, **options) -> nn.Module:
    torch.manual_seed(0)
    out = regard.create("ban", V, D, **options).double().eval()
    for parameter in out.parameters() if shuffle else ():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return out


def pair(n: int = 5, m: int = 3, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(batch, *s, dtype=torch.float64, generator=generator) for s in ((n, V), (m, D)))  # type: ignore[return-value]


def boxes_for(v: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    low, sides = torch.rand(2, *v.shape[:2], 2, dtype=torch.float64, generator=generator)
    return torch.cat((low, low + sides), -1)


def by_hand(net: nn.Module, v: Tensor, q: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Words and weights by the equations, all pairs at once; `mask` (B, n, m)."""

    def linear(layer: nn.Module, x: Tensor) -> Tensor:
        return x @ (layer.weight_g * layer.weight_v / layer.weight_v.square().sum().sqrt()).mT + layer.bias

    h = net.att_h.weight_g * net.att_h.weight_v / net.att_h.weight_v.norm()
    logits = torch.einsum("gc,bic,bjc->bgij", h, linear(net.att_v, v).relu(), linear(net.att_q, q).relu()) + net.att_h.bias[:, None, None]
    weights = logits.masked_fill(~mask[:, None], -math.inf).flatten(2).softmax(-1).view(logits.shape)
    for g in range(net.glimpses):
        one, other = linear(net.joint_v[g], v).relu(), linear(net.joint_q[g], q).relu()
        q = q + linear(net.update[g], torch.einsum("bij,bic,bjc->bc", weights[:, g], one, other))[:, None]
    return q, weights


@pytest.mark.parametrize(("n", "m"), [(5, 3), (3, 5)])
@pytest.mark.parametrize("options", [{}, {"glimpses": 3, "rank_mult": 1}, {"glimpses": 33}])
def test_equations(n: int, m: int, options: dict) -> None:
    net, (v, q) = module(**options), pair(n, m)
    v[1, -1] = 0  # no object, by the authors' rule
    mask = torch.ones(2, n, m, dtype=torch.bool)
    mask[1, -1] = False
    expected, expected_weights = by_hand(net, v, q, mask)
    out, weights = net(v, q, return_weights=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones_like(weights[..., 0, 0]))


def test_classifier_takes_the_sum() -> None:
    net, (v, q) = module(num_classes=4), pair()
    words, _ = by_hand(net, v, q, torch.ones(2, 5, 3, dtype=torch.bool))
    first, second = net.classifier
    hidden = F.relu(words.sum(1) @ first.weight().mT + first.bias)
    torch.testing.assert_close(net(v, q), hidden @ second.weight().mT + second.bias)


@pytest.mark.parametrize(("n", "m"), [(31, 23), (23, 31)])
def test_no_tensor_of_all_pairs_and_features(n: int, m: int) -> None:
    torch.manual_seed(0)
    net = regard.create("ban", 41, 29, glimpses=2, num_classes=3).train()
    v, q = torch.randn(2, n, 41, requires_grad=True), torch.randn(2, m, 29, requires_grad=True)
    with Shapes() as shapes:
        net(v, q).square().sum().backward()
    rank = 3 * 29
    largest = max(math.prod(shape) for shape in shapes.seen)
    assert largest <= 2 * 2 * 31 * rank  # (batch, glimpses, the larger set, K); a pair tensor would have 2 * 23 * 31 * 29 at least
    assert not [s for s in shapes.seen if {n, m} <= set(s) and math.prod(s) > 2 * 2 * n * m]


def test_padding_changes_nothing() -> None:
    net, (v, q) = module(num_classes=4), pair()
    padded_v = torch.cat((v, torch.full_like(v[:, :2], 1e4)), 1).requires_grad_()
    padded_q = torch.cat((q, torch.full_like(q[:, :2], math.nan)), 1).requires_grad_()
    v_mask, q_mask = torch.arange(7).expand(2, -1) < 5, torch.arange(5).expand(2, -1) < 3
    expected, small = net(v, q, return_weights=True)
    out, weights = net(padded_v, padded_q, v_mask=v_mask, q_mask=q_mask, return_weights=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights[:, :, :5, :3], small)
    assert weights[:, :, 5:].abs().max() == 0 and weights[..., 3:].abs().max() == 0
    of_v, of_q = torch.autograd.grad(out.square().sum(), (padded_v, padded_q))
    assert of_v[:, 5:].abs().max() == 0 and of_q[:, 3:].abs().max() == 0 and of_v[:, :5].abs().max() > 0
    words = module()
    out = words(padded_v, padded_q, v_mask=v_mask, q_mask=q_mask)
    torch.testing.assert_close(out[:, :3], words(v, q))
    assert out[:, 3:].abs().max() == 0


@pytest.mark.parametrize("how", ["zeros", "v_mask", "q_mask"])
@pytest.mark.parametrize("counter", [0, 4])
def test_nothing_to_attend_gives_zeros(how: str, counter: int) -> None:
    net, (v, q) = module(counter=counter), pair()
    masks = {how: torch.tensor([[True], [False]]).expand(2, 5 if how == "v_mask" else 3)} if how != "zeros" else {}
    if how == "zeros":
        v[1] = 0
    v.requires_grad_(), q.requires_grad_()
    options = {"boxes": boxes_for(v)} if counter else {}
    out, weights = net(v, q, return_weights=True, **masks, **options)
    assert weights[1].abs().max() == 0 and weights[0].sum() > 1.99
    if how != "q_mask" and not counter:
        torch.testing.assert_close(out[1], q[1] + sum(layer.bias for layer in net.update))
    found = torch.autograd.grad(out.square().sum(), (v, q, *net.parameters()))
    assert out.isfinite().all() and all(g.isfinite().all() for g in found)


def counted_by_hand(counter: Counter, boxes: Tensor, logits: Tensor) -> Tensor:
    """One sample, one glimpse, number by number: boxes (n, 4), logits (n)."""
    keep = sorted(range(len(logits)), key=lambda i: -logits[i].item())[: counter.objects]
    a, box = logits[keep].sigmoid().tolist(), boxes[keep].tolist()

    def f(which: int, x: float) -> float:
        p = counter.weight[which].abs() / counter.weight[which].abs().sum()
        k = min(int(16 * x), 16)
        return (p[: k + 1].sum() + (16 * x - int(16 * x)) * p[min(k + 1, 16)]).item()

    def iou(r: list[float], s: list[float]) -> float:
        shared = math.prod(max(0.0, min(r[i + 2], s[i + 2]) - max(r[i], s[i])) for i in (0, 1))
        return shared / (sum((t[2] - t[0]) * (t[3] - t[1]) for t in (r, s)) - shared + 1e-12)

    n = range(counter.objects)
    apart = [[1 - iou(box[i], box[j]) for j in n] for i in n]
    once = [[f(3, a[i] * a[j]) * f(4, apart[i][j]) for j in n] for i in n]
    alike = [[f(2, 1 - abs(a[i] - a[j])) * math.prod(f(2, 1 - abs(once[k][i] - once[k][j])) for k in n) for j in n] for i in n]
    rows = [sum(row) for row in alike]
    score = sum(f(0, a[i] * a[j]) * f(1, apart[i][j]) / (rows[i] * rows[j]) for i in n for j in n) + sum(f(0, a[i] ** 2) / rows[i] for i in n)
    count = min(math.sqrt(score + 1e-20), counter.objects)
    sure = f(7, sum(abs(f(5, x) - 0.5) for x in a) / len(a) + sum(abs(f(6, x) - 0.5) for row in apart for x in row) / len(a) ** 2)
    features = torch.zeros(counter.objects + 1, dtype=torch.float64)
    for at, share in ((math.floor(count), 1 - count % 1), (min(math.floor(count) + 1, counter.objects), count % 1)):
        features[at] += share * sure
    return features


def test_counter_number_by_number() -> None:
    torch.manual_seed(0)
    counter = Counter(4).double()
    counter.weight.data += 0.5 * torch.randn(16, 17)
    boxes, logits = boxes_for(torch.zeros(2, 6, 1)), torch.randn(2, 3, 6, dtype=torch.float64)
    found = counter(boxes, logits)
    for b in range(2):
        for g in range(3):
            torch.testing.assert_close(found[b, g], counted_by_hand(counter, boxes[b], logits[b, g]), rtol=1e-9, atol=1e-9)


def test_counter_counts_each_object_once() -> None:
    """Four boxes at three places, one of them not attended: two objects."""
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [2.0, 0.0, 3.0, 1.0], [4.0, 0.0, 5.0, 1.0]])[None]
    found = Counter(4)(box, torch.tensor([[[30.0, 30.0, 30.0, -30.0]]]))[0, 0]
    assert found.argmax() == 2 and found[2] > 0.9 * found.sum()
    torch.testing.assert_close(overlap(box)[0, 0], torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_counter_in_the_module() -> None:
    net, (v, q) = module(counter=4, glimpses=1), pair()
    boxes = boxes_for(v)
    plain, _ = by_hand(net, v, q, torch.ones(2, 5, 3, dtype=torch.bool))
    h = net.att_h.weight()
    logits = torch.einsum("gc,bic,bjc->bgij", h, net.att_v(v).relu(), net.att_q(q).relu()) + net.att_h.bias[:, None, None]
    features = torch.stack([counted_by_hand(net.count, boxes[b], logits[b, 0].amax(1)) for b in range(2)])
    torch.testing.assert_close(net(v, q, boxes=boxes), plain + net.count_update[0](features).relu()[:, None], rtol=1e-7, atol=1e-7)


def test_places_of_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (v, q) = module(glimpses=2, dropout=(0.2, 0.5), num_classes=4), pair()
    seen = []
    monkeypatch.setattr(F, "dropout", lambda x, p, training: seen.append((x.shape[-1], p, training)) or x)
    net.train()(v, q)
    glimpse = [(V, 0.2, True), (D, 0.2, True), (D, 0.2, True)]
    assert sorted(seen) == sorted([(V, 0.2, True), (3 * D, 0.5, True), (D, 0.2, True), *glimpse, *glimpse, (2 * D, 0.5, True)])


def test_start() -> None:
    net = module(shuffle=False, glimpses=40)
    for layer in (net.att_h, net.att_v, net.joint_q[3]):
        torch.testing.assert_close(layer.weight_g, layer.weight_v.norm())
    assert 0.9 < net.att_h.weight_v.std() < 1.1 and 0.5 < net.att_h.bias.std() < 1.5
    assert torch.equal(Counter(3).weight[:, 0], torch.zeros(16)) and torch.equal(Counter(3).weight[:, 1:], torch.ones(16, 16))


def test_names_of_the_authors() -> None:
    net, (v, q) = module(glimpses=2, counter=3, num_classes=4), pair()
    expected = net(v, q, boxes=boxes_for(v))
    shapes = {
        "ban-vqa (h_mat, weight_v)": {"v_att.logits.h_mat_v": (1, 2, 1, 18), "v_att.logits.h_bias": (1, 2, 1, 1), "v_att.logits.h_mat_g": ()},
        "ban-vqa (h_net, weight_v)": {"v_att.logits.h_net.weight_v": (2, 18), "v_att.logits.h_net.bias": (2,), "counter.f.15.weight": (17,)},
        "ban-vqa (h_mat, parametrizations)": {
            "v_att.logits.parametrizations.h_mat.original1": (1, 2, 1, 18),
            "b_net.1.q_net.main.1.parametrizations.weight.original0": (),
            "b_net.1.q_net.main.1.bias": (D,),
        },
        "ban-vqa (h_net, parametrizations)": {"v_att.logits.h_net.parametrizations.weight.original1": (2, 18)},
    }
    for naming, wanted in shapes.items():
        state = {**regard.official.to_official(net, naming), "w_emb.emb.weight": torch.zeros(3), "q_emb.rnn.weight_hh_l0": torch.zeros(3)}
        assert wanted == {name: tuple(state[name].shape) for name in wanted}
        other = regard.load_official(regard.create("ban", V, D, counter=3, num_classes=4).double().eval(), state)
        assert torch.equal(other(v, q, boxes=boxes_for(v)), expected)


def test_weight_norm_is_torchs() -> None:
    torch.manual_seed(0)
    theirs = torch.nn.utils.parametrizations.weight_norm(nn.Linear(V, 3 * D), dim=None).double()
    theirs.parametrizations.weight.original0.data.mul_(1.7)
    net = module()
    prefix = "v_att.logits.v_net.main.1."
    state = regard.official.to_official(net, "ban-vqa (h_mat, parametrizations)") | {prefix + n: t for n, t in theirs.state_dict().items()}
    v, _ = pair()
    torch.testing.assert_close(regard.load_official(net, state).att_v(v), theirs(v))


def test_wrong_calls() -> None:
    for options in ({"glimpses": 0}, {"rank_mult": 0}, {"counter": -1}, {"dropout": 0.2}, {"dropout": (0.2, 1.0)}, {"num_classes": 0}, {"v_dim": 0}):
        with pytest.raises(RegardError, match=next(iter(options))):
            regard.create("ban", **{"v_dim": V, "q_dim": D, **options})
    net, (v, q) = module(), pair()
    counting = module(counter=4)
    wrong = (
        (net, (v, q[..., :5]), {}, "q has width 5"),
        (net, (v[:1], q), {}, "batch 1"),
        (net, (v[:, :0], q), {}, "at least one object"),
        (net, (v, q), {"v_mask": torch.ones(2, 5)}, "v_mask must be boolean"),
        (net, (v, q), {"q_mask": torch.ones(2, 5, dtype=torch.bool)}, "q_mask must have shape"),
        (counting, (v, q), {}, "counter=4 needs boxes"),
        (counting, (v[:, :3], q), {"boxes": boxes_for(v[:, :3])}, "only 3 objects"),
        (counting, (v, q), {"boxes": boxes_for(v)[..., :3]}, "boxes must be"),
    )
    for which, args, options, words in wrong:
        with pytest.raises(RegardError, match=words):
            which(*args, **options)
