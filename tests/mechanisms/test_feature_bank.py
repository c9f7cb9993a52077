"""Feature bank: the authors' equations entry by entry, the way without projecting the bank, masks, blobs, and the store."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import RegardError
from regard.parts.feature_bank_store import FeatureBank
from regard.testing.subject import shuffle_

FEW, MANY = (1, 40), (9, 7)  # queries and entries: the bank as it is, and the bank projected


def module(dim: int = 6, **options) -> nn.Module:
    torch.manual_seed(0)
    out = regard.create("feature_bank", dim, **{"bank_dim": 5, "latent_dim": 4, **options}).double().eval()
    shuffle_(out)
    return out


def pair(n: int, m: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, bank = torch.randn(2, n, 6, dtype=torch.float64, generator=generator), torch.randn(2, m, 5, dtype=torch.float64, generator=generator)
    return x, bank, torch.arange(m) < torch.tensor([[m], [m - 3]])


def written_out(net: nn.Module, x: Tensor, bank: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One query at a time, as the authors' rows; only real entries."""
    outputs, weights = [], []
    blobs = {name: t.flatten(1) if t.ndim > 1 else t for name, t in regard.to_official(net).items()}
    for sample, entries, real in zip(x, bank, mask, strict=True):
        for a in sample:
            if net.reduce_input:
                a = blobs["input_fbonl_reduc_w"] @ a + blobs["input_fbonl_reduc_b"]
            k = entries[real] @ blobs["lfb_1x1_w"].T + blobs["lfb_1x1_b"]
            for at in range(net.num_layers):
                w, b = ({kind: blobs[f"lfb_nl{at}_{kind}_{end}"] for kind in ("theta", "phi", "g", "out")} for end in "wb")
                scores = (k @ w["phi"].T + b["phi"]) @ (w["theta"] @ a + b["theta"])
                p = (scores * (net.latent_dim**-0.5 if net.scale else 1)).softmax(0)
                t = p @ (k @ w["g"].T + b["g"])
                if net.pre_act:
                    t = (t - t.mean()) / (t.var(correction=0) + 1e-5).sqrt() if net.pre_act_norm else t
                    a = a + w["out"] @ t.clamp(min=0) + b["out"]
                else:
                    t = w["out"] @ t + b["out"]
                    a = (a + (t - t.mean()) / (t.var(correction=0) + 1e-5).sqrt()).clamp(min=0)
                weights.append(F.pad(p, (0, len(real) - len(p))))
            outputs.append(a)
    n, layers, m = x.shape[1], net.num_layers, bank.shape[1]
    return torch.stack(outputs).unflatten(0, (-1, n)), torch.stack(weights).reshape(-1, n, layers, m).transpose(1, 2)


@pytest.mark.parametrize("sizes", [FEW, MANY])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 3, "scale": False}, {"pre_act": False}, {"pre_act_norm": False, "num_layers": 1}, {"reduce_input": False}, {"concat": True}],
)
@torch.no_grad()
def test_equations(sizes: tuple[int, int], options: dict) -> None:
    net, (x, bank, mask) = module(**options), pair(*sizes)
    assert net._few(*sizes) == (sizes == FEW)
    for given, real in ((None, torch.ones_like(mask)), (mask, mask)):
        out, weights = net(x, bank, bank_mask=given, return_weights=True)
        expected, expected_weights = written_out(net, x, bank, real)
        if net.concat:
            expected = torch.cat([x, expected], -1)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(net(x, bank, bank_mask=given), expected)
        torch.testing.assert_close(weights, expected_weights)


def test_both_ways_agree_in_gradients_and_the_card_has_the_cheaper() -> None:
    net, (x, bank, mask) = module(), pair(*FEW)
    found = []
    for few in (True, False):
        net._few = lambda n, m, few=few: few
        leaves = [t.clone().requires_grad_() for t in (x, bank)]
        result = net(*leaves, bank_mask=mask)
        parameters = [p for name, p in net.named_parameters() if name != "phi_g.bias"]  # its phi part has no gradient in exact arithmetic
        found.append([result, *torch.autograd.grad(result.square().sum(), [*leaves, *parameters])])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    del net._few
    for n, m in (FEW, (2, 100), MANY):
        x, bank, _ = pair(n, m)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(x, bank)
        assert counter.get_total_flops() == net.card.cost(net, B=2, N=n, M=m)


@pytest.mark.parametrize("sizes", [FEW, MANY])
@pytest.mark.parametrize("mode", ["nl", "avg", "max"])
def test_masked_entries_are_not_there(mode: str, sizes: tuple[int, int]) -> None:
    net, (x, bank, mask) = module(mode=mode), pair(*sizes)
    padded = bank.masked_fill(~mask[:, :, None], 1e4).requires_grad_()
    out = net(x, padded, bank_mask=mask)
    for i, real in enumerate(mask):
        torch.testing.assert_close(out[i : i + 1], net(x[i : i + 1], bank[i : i + 1, real]))
    (gradient,) = torch.autograd.grad(out.square().sum(), padded)
    assert gradient[~mask].abs().max() == 0
    assert gradient[mask].abs().max() > 0
    torch.testing.assert_close(net(x, bank, bank_mask=torch.ones_like(mask)), net(x, bank))


@pytest.mark.parametrize("sizes", [FEW, MANY])
@pytest.mark.parametrize("options", [{}, {"pre_act": False}, {"reduce_input": False}, {"mode": "avg"}, {"mode": "max"}])
def test_a_sample_without_entries_stays_as_it_is(options: dict, sizes: tuple[int, int]) -> None:
    net, (x, bank, mask) = module(**options), pair(*sizes)
    mask[0] = False
    leaves = [t.requires_grad_() for t in (x, bank)]
    out = net(*leaves, bank_mask=mask)
    if net.mode != "nl":
        expected = torch.zeros_like(out[0])
    else:
        expected = net.reduce_proj(x[0]) if net.reduce_input else x[0]
        assert net(x, bank, bank_mask=mask, return_weights=True)[1][0].abs().max() == 0
    torch.testing.assert_close(out[0], expected)
    gradients = torch.autograd.grad(out.square().sum(), [*leaves, *net.parameters()], allow_unused=True)
    assert all(g is None or bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize(("mode", "concat"), [("avg", False), ("max", True)])
def test_pooling(mode: str, concat: bool) -> None:
    net, (x, bank, _) = module(mode=mode, concat=concat), pair(3, 5)
    pooled = {"avg": bank.mean(1), "max": bank.max(1).values}[mode][:, None].expand(-1, 3, -1)
    assert torch.equal(net(x, bank), torch.cat([x, pooled], -1) if concat else pooled)
    assert not list(net.parameters())
    with pytest.raises(RegardError, match=f"mode='{mode}' pools the bank and has no weights"):
        net(x, bank, return_weights=True)


def test_gradients_of_few_queries() -> None:
    net, (x, bank, mask) = module(), pair(1, 16)
    assert net._few(1, 16)
    assert torch.autograd.gradcheck(
        lambda *t: net(*t, bank_mask=mask, return_weights=True), [x.requires_grad_(), bank.requires_grad_()], fast_mode=True
    )


def test_training_drops_and_the_weights_are_of_the_same_draws() -> None:
    net, (x, bank, _) = module(num_layers=2, dropout=0.5).train(), pair(*FEW)
    results = []
    for wanted in (False, True):
        torch.manual_seed(3)
        results.append(net(x, bank, return_weights=wanted))
    assert torch.equal(results[0], results[1][0])
    assert not torch.allclose(results[0], net(x, bank))


def test_what_is_dropped_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, bank, _) = module(dropout=0.5).train(), pair(*FEW)
    dropped, drop = [], F.dropout
    monkeypatch.setattr(F, "dropout", lambda t, p, training: dropped.append((*t.shape, p, training)) or drop(t, p, training))
    net(x, bank)
    assert dropped == [(2, 1, 4, 0.5, True), (2, 40, 4, 0.5, True), *[(2, 1, 4, 0.5, True)] * 2]  # queries, bank, each layer's output


def test_half_precision_of_few_queries_is_close() -> None:
    net, (x, bank, _) = module(), pair(*FEW)
    with torch.no_grad():
        exact = net(x, bank)
        half = net.bfloat16()(x.bfloat16(), bank.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).abs().max() < 3e-2 * exact.abs().max()


def test_start() -> None:
    net = regard.create("feature_bank", 64, latent_dim=64).eval()
    x, bank = torch.randn(1, 2, 64), torch.randn(1, 5, 64)
    assert torch.equal(net(x, bank), net.reduce_proj(x))
    assert all(not p.any() for name, p in net.named_parameters() if name.endswith("bias") or name.startswith("out"))
    for weight in (net.reduce_proj.weight, net.bank_proj.weight, net.theta[0].weight, net.phi_g.weight):
        assert 0.009 < weight.std().item() < 0.011


def test_blobs_are_found_by_what_their_names_end_in() -> None:
    net, other, (x, bank, _) = module(), module(num_layers=2), pair(2, 5)
    blobs = regard.to_official(net)
    assert blobs["lfb_1x1_w"].shape == (4, 5, 1, 1, 1)
    assert blobs["lfb_nl1_g_w"].shape == (4, 4, 1, 1, 1)
    assert blobs["lfb_nl1_g_b"].shape == (4,)
    for prefix, stem in (("", "box_pooled"), ("gpu_0/", "roi_feat"), ("p.", "input")):
        renamed = {prefix + name.replace("input_fbonl", f"{stem}_fbonl"): t for name, t in blobs.items()}
        for parameter in other.parameters():
            nn.init.zeros_(parameter)
        assert torch.equal(regard.load_official(other, renamed)(x, bank), net(x, bank))
    with pytest.raises(RegardError, match=r"unknown lfb_nl0_phi_w.* missing lfb_nl2_phi_w, lfb_nl2_g_w \(here phi_g.weight\)"):
        regard.load_official(module(num_layers=3), blobs)


def test_wrong_calls() -> None:
    net, (x, bank, mask) = module(), pair(3, 5)
    for wrong, text in (
        ((x, bank[0]), "bank must be"),
        ((x, bank[..., :4]), "bank has width 4 .* bank_dim=5"),
        ((x, bank[:1]), "bank has batch 1 but x has batch 2"),
        ((x, bank[:, :0]), "bank has no entries"),
        ((x, bank.long()), "int64"),
    ):
        with pytest.raises(RegardError, match=text):
            net(*wrong)
    for wrong_mask, text in ((mask[:, :4], r"bank_mask must have shape \(2, 5\)"), (mask.float(), "bank_mask must be boolean")):
        with pytest.raises(RegardError, match=text):
            net(x, bank, bank_mask=wrong_mask)
    for options, text in (
        ({"mode": "sum"}, "mode='sum'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"latent_dim": 0}, "latent_dim"),
    ):
        with pytest.raises(RegardError, match=text):
            regard.create("feature_bank", 6, **options)


def test_store() -> None:
    bank = FeatureBank(max_per_step=2)
    rows = torch.arange(12.0).view(6, 2).requires_grad_()
    bank.add(3, rows[:1])
    bank.add(5, rows[1:4])
    bank.add(3, rows[4:5])
    bank.add(9, rows[5:])
    found, mask = bank.window(5, 4)  # steps 3, 4, 5, 6
    assert found.shape == (8, 2)
    assert not found.requires_grad
    assert torch.equal(found[:4], rows[[0, 4, 1, 2]])
    assert found[4:].abs().max() == 0
    assert torch.equal(mask, torch.arange(8) < 4)
    assert not bank.window(100, 4)[1].any()
    drawn = {tuple(bank.window(5, 1, generator=torch.Generator().manual_seed(s))[0][:, 0].tolist()) for s in range(40)}
    assert {x for pair in drawn for x in pair} == {2.0, 4.0, 6.0}
    assert all(len(set(pair)) == 2 for pair in drawn)


def test_store_refuses() -> None:
    bank = FeatureBank(2)
    with pytest.raises(RegardError, match="the bank is empty"):
        bank.window(0, 3)
    bank.add(0, torch.zeros(1, 4))
    for call, text in (
        (lambda: FeatureBank(0), "max_per_step=0"),
        (lambda: bank.add(0, torch.zeros(4)), "features must be"),
        (lambda: bank.add(0, torch.zeros(1, 5)), r"\(5, torch.float32, 'cpu'\)"),
        (lambda: bank.add(0, torch.zeros(1, 4).double()), "float64"),
        (lambda: bank.add(0.5, torch.zeros(1, 4)), "step must be a whole number, got 0.5"),
        (lambda: bank.window(0, 0), "size=0"),
    ):
        with pytest.raises(RegardError, match=text):
            call()
