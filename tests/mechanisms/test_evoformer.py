"""What only the Evoformer's parts have: masks of two kinds, both transposed forms, frames, memory by rows, OpenFold's names."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.mechanisms.structure.evoformer import KINDS, TAKES
from regard.testing.subject import shuffle_, tensors
from regard.workbench.measure import peak_bytes

SMALL: dict[str, dict[str, Any]] = {
    "block": {**regard.card("evoformer").example},
    "msa_row": {"msa_dim": 10, "pair_dim": 8, "head_dim": 4, "num_heads": 2},
    "msa_column": {"msa_dim": 10, "head_dim": 4, "num_heads": 2},
    "msa_column_global": {"msa_dim": 10, "head_dim": 4, "num_heads": 2},
    "outer_product_mean": {"msa_dim": 10, "pair_dim": 8, "hidden_dim": 3},
    "triangle_multiplication": {"pair_dim": 8, "hidden_dim": 6},
    "triangle_attention": {"pair_dim": 8, "head_dim": 4, "num_heads": 2},
    "pair_transition": {"pair_dim": 8, "factor": 2},
    "msa_transition": {"msa_dim": 10, "factor": 2},
    "ipa": {"single_dim": 10, "pair_dim": 8, "head_dim": 4, "num_heads": 2, "num_qk_points": 2, "num_v_points": 3},
}
WEIGHTED = ("msa_row", "msa_column", "msa_column_global", "triangle_attention", "ipa")


def made(part: str, **options: Any) -> Any:
    torch.manual_seed(0)
    module = regard.create("evoformer", **{"part": part, **SMALL[part], **options})
    shuffle_(module)
    return module.eval()


def inputs(part: str, n: int = 9, s: int = 5, b: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(b, *shape, generator=generator)

    every = {"msa": noise(s, n, 10), "pair": noise(n, n, 8), "single": noise(n, 10), "translations": noise(n, 3)}
    every["rotations"] = torch.linalg.qr(noise(n, 3, 3))[0]
    return {name: every[name] for name in TAKES[part][0]}


def masks(part: str, real: int, n: int, s: int, b: int = 2) -> dict[str, Tensor]:
    """The first `real` residues and all but the last sequence are there."""
    residues, sequences = torch.arange(n) < real, torch.arange(s) < s - 1
    every = {"mask": residues, "pair_mask": residues[:, None] & residues, "msa_mask": sequences[:, None] & residues}
    return {name: every[name].expand(b, *every[name].shape) for name in TAKES[part][1]}


@pytest.mark.parametrize("part", KINDS)
def test_masked_elements_are_silent(part: str) -> None:
    """Real outputs are those without the padding, residues and a sequence; whatever the padding holds; no gradient reaches it."""
    module, n, real, s = made(part), 9, 6, 5
    long = inputs(part, n, s)
    long = {name: t.clone() for name, t in long.items()}
    lead = {"msa": 2, "pair": 2, "single": 1, "rotations": 1, "translations": 1}

    def cut(name: str, t: Tensor) -> Tensor:
        t = t[:, : s - 1, :real] if name == "msa" else t
        return t[:, :real, :real] if name == "pair" else t[:, :real] if lead[name] == 1 else t

    leaves = {name: t.requires_grad_() for name, t in long.items()}
    found = tensors(module(**leaves, **masks(part, real, n, s)))
    expected = tensors(module(**{name: cut(name, t) for name, t in long.items()}))
    kinds = ("msa", "pair") if part == "block" else ("single",) if part == "ipa" else ("msa",) if part.startswith("msa") else ("pair",)
    for kind, out, alone in zip(kinds, found, expected, strict=True):
        torch.testing.assert_close(cut(kind, out), alone, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad([cut(kind, out).square().sum() for kind, out in zip(kinds, found, strict=True)], list(leaves.values()))
    for name, g in zip(leaves, grads, strict=True):
        leak = g.clone()
        cut(name, leak).zero_()
        assert leak.abs().max() == 0, name


@pytest.mark.parametrize("part", KINDS)
def test_nothing_allowed_is_finite(part: str) -> None:
    module, given = made(part), {name: t.requires_grad_() for name, t in inputs(part).items()}
    nothing = {name: torch.zeros_like(t) for name, t in masks(part, 9, 9, 5).items()}
    out = tensors(module(**given, **nothing))
    grads = torch.autograd.grad([t.square().sum() for t in out], list(given.values()), allow_unused=True)
    assert all(t.isfinite().all() for t in (*out, *(g for g in grads if g is not None)))
    if part in WEIGHTED:
        assert module.weights(**given, **nothing).abs().max() == 0
    if part in ("ipa", "outer_product_mean", "pair_transition"):
        assert part == "outer_product_mean" or out[0].abs().max() == 0


@pytest.mark.parametrize("part", WEIGHTED)
def test_weights_hide_the_masked_and_come_in_rows(part: str) -> None:
    module, given, hidden = made(part), inputs(part), masks(part, 6, 9, 5)
    with torch.no_grad():
        weights = module.weights(**given, **hidden)
        out, beside = module(**given, **hidden, return_weights=True)
        torch.testing.assert_close(out, module(**given, **hidden), rtol=0, atol=0)
        torch.testing.assert_close(beside, weights, rtol=0, atol=0)
        keys = 4 if "column" in part else 6
        assert weights[..., keys:].abs().max() == 0
        torch.testing.assert_close(weights.sum(-1)[:, :3], torch.ones(weights[:, :3].shape[:-1]))
        if part != "msa_column_global":
            chosen = torch.tensor([3, 0])
            torch.testing.assert_close(module.weights(**given, **hidden, queries=chosen), weights[..., chosen, :], rtol=1e-5, atol=1e-6)


def test_weights_are_what_the_output_is_made_of() -> None:
    module, given = made("triangle_attention"), inputs("triangle_attention")
    body = module.body
    with torch.no_grad():
        z = body.layer_norm(given["pair"])
        v = body.mha.linear_v(z).unflatten(3, (2, 4)).transpose(2, 3)
        o = (module.weights(**given) @ v).transpose(2, 3).flatten(3)
        torch.testing.assert_close(module(**given), body.mha.linear_o(o * body.mha.linear_g(z).sigmoid()))


@pytest.mark.parametrize(("part", "modes"), [("triangle_attention", ("starting", "ending"))])
def test_ending_is_starting_transposed(part: str, modes: tuple[str, str]) -> None:
    one, two = (made(part, mode=mode) for mode in modes)
    two.load_state_dict(one.state_dict())
    pair = inputs(part)["pair"]
    mask = torch.rand(2, 9, 9) > 0.3
    with torch.no_grad():
        torch.testing.assert_close(two(pair, mask), one(pair.transpose(1, 2), mask.mT).transpose(1, 2))


def test_block_starts_as_identity_and_options_matter() -> None:
    given = inputs("block")
    fresh = regard.create("evoformer", **SMALL["block"]).train()
    msa, pair = fresh(**given)
    assert torch.equal(msa, given["msa"]) and torch.equal(pair, given["pair"])
    with torch.no_grad():
        plain = made("block")
        base = plain(**given, **masks("block", 6, 9, 5))
        for option, value in (("column_attention", False), ("opm_first", True), ("mask_transition", False)):
            other = made("block", **{option: value})
            other.load_state_dict(plain.state_dict(), strict=value is True or option == "mask_transition")
            assert not torch.allclose(tensors(other(**given, **masks("block", 6, 9, 5)))[0], base[0]), option


def test_dropout_is_shared_along_rows_and_columns() -> None:
    """Each of the four triangle updates of a block drops whole columns of channels together: along rows, and after the ending node along columns."""
    module = made("block", pair_dropout=0.5, msa_dropout=0.0)
    body, seen = module.body.train(), []
    keep = body._drop
    body._drop = lambda update, rate, axis: seen.append((keep(torch.ones_like(update), rate, axis), axis)) or update
    body(**inputs("block"))
    assert [axis for _, axis in seen] == [1, 1, 1, 1, 2]
    for dropped, axis in seen[1:]:
        assert set(dropped.unique().tolist()) == {0.0, 2.0}
        assert (dropped == dropped.narrow(axis, 0, 1)).all() and not (dropped == dropped.narrow(3 - axis, 0, 1)).all()


@pytest.mark.parametrize("part", KINDS)
def test_cost_with_fewer_sequences_than_residues(part: str) -> None:
    module, given = made(part), inputs(part, n=40, s=7, b=1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(**given)
    assert module.card.cost(module, B=1, N=40, M=7) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("part", KINDS)
def test_exports_with_free_sizes(part: str) -> None:
    module, given = made(part), inputs(part)
    free = {5: torch.export.Dim.AUTO, 9: torch.export.Dim.AUTO}
    shapes = tuple({axis: free[size] for axis, size in enumerate(t.shape) if size in free} for t in given.values())
    program = torch.export.export(module, tuple(given.values()), dynamic_shapes={"inputs": shapes}, strict=False)
    other = inputs(part, n=13, s=6)
    with torch.no_grad():
        for found, expected in zip(tensors(program.module()(*other.values())), tensors(module(**other)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "impl", "part"),
    [
        ("shared_bias_attention", "rows", "triangle_attention"),
        ("shared_bias_attention", "kept", "msa_row"),
        ("outer_product_mean", "rows", "outer_product_mean"),
        ("triangle_multiplication", "rows", "triangle_multiplication"),
        ("feed_forward", "chunked", "msa_transition"),
    ],
)
def test_ways_equal_the_reference_over_many_pieces(op: str, impl: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    monkeypatch.setattr(importlib.import_module(f"regard.ops.{op}.{'chunked' if impl == 'chunked' else 'rows'}"), "CPU", 500)
    module, given = made(part), {name: t.requires_grad_() for name, t in inputs(part).items()}
    hidden = masks(part, 6, 9, 5)
    wanted = [*given.values(), *module.parameters()]
    results = []
    for way in (impl, "reference"):
        with regard.use_impl(**{op: way}):
            out = module(**given, **hidden)
        results.append([out, *torch.autograd.grad(out.sin().sum(), wanted)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_fused_names_of_openfold() -> None:
    module = made("block")
    state = regard.to_official(module, "OpenFold, fused")
    assert "pair_stack.tri_mul_out.linear_ab_p.weight" in state and "pair_stack.tri_mul_in.linear_a_g.bias" not in state
    weight = module.state_dict()["body.pair_stack.tri_mul_out.linear_a_p.weight"]
    assert torch.equal(state["pair_stack.tri_mul_out.linear_ab_p.weight"][: len(weight)], weight)
    other = regard.load_official(regard.create("evoformer", **SMALL["block"]), state)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), module.state_dict().values(), strict=True))


def test_ipa_far_from_the_origin() -> None:
    """Squared distances are taken after centring: 10^4 from the origin float32 still gives what it gives near it."""
    module, given = made("ipa"), inputs("ipa")
    far = {**given, "translations": given["translations"] + torch.tensor([1e4, -2e4, 5e3])}
    with torch.no_grad():
        near = module.double()(**{k: t.double() for k, t in given.items()})
        torch.testing.assert_close(module.float()(**far).double(), near, rtol=2e-2, atol=2e-2)


def test_half_precision_of_the_pair_product_does_not_overflow() -> None:
    module, pair = made("triangle_multiplication").half(), 300 * inputs("triangle_multiplication")["pair"]
    module.body.linear_a_p.weight.data.mul_(300)
    module.body.linear_b_p.weight.data.mul_(300)
    with torch.no_grad():
        assert module(pair.half()).isfinite().all()


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("block", {"pair": torch.zeros(2, 9, 8, 8)}, "as many rows as columns"),
        ("block", {"msa": torch.zeros(2, 5, 8, 10)}, "pair and msa differ"),
        ("msa_row", {"pair": torch.zeros(2, 7, 7, 8)}, "pair and msa differ"),
        ("block", {"msa_mask": torch.ones(2, 5, 9)}, "msa_mask must be boolean"),
        ("block", {"pair_mask": torch.ones(2, 9, 8, dtype=torch.bool)}, "pair_mask must have shape"),
        ("ipa", {"rotations": torch.zeros(2, 9, 9)}, "rotations must be"),
        ("ipa", {"translations": torch.zeros(2, 9, 4)}, "translations must be"),
        ("ipa", {"pair": torch.zeros(2, 8, 8, 8)}, "pair and single differ"),
        ("ipa", {"mask": torch.ones(2, 9)}, "mask must be boolean"),
        ("msa_column", {"pair": torch.zeros(2, 9, 9, 8)}, "takes msa, msa_mask"),
        ("triangle_attention", {"pair": None}, "needs pair"),
        ("outer_product_mean", {"return_weights": True}, "no weights"),
        ("msa_column_global", {"msa": torch.zeros(2, 5, 0, 10)}, "no sequence or no residue"),
    ],
)
def test_wrong_calls_are_answered(part: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(regard.RegardError, match=said):
        made(part)(**{**inputs(part), **change})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"part": "triangle"}, "part='triangle'"),
        ({"part": "msa_row", "hidden_dim": 3}, "hidden_dim=3 is no option of part='msa_row'"),
        ({"part": "triangle_attention", "mode": "outgoing"}, "mode='outgoing'"),
        ({"part": "triangle_multiplication", "mode": "ending"}, "mode='ending'"),
        ({"part": "ipa", "num_heads": 0}, "num_heads=0"),
        ({"msa_dropout": 1.0}, "msa_dropout=1.0"),
        ({"part": "pair_transition", "factor": 0}, "factor=0"),
    ],
)
def test_wrong_options_are_answered(options: dict[str, Any], said: str) -> None:
    with pytest.raises(regard.RegardError, match=said):
        regard.create("evoformer", **options)


def test_outer_product_never_stores_all_outer_products() -> None:
    module, msa = made("outer_product_mean", hidden_dim=16), torch.randn(1, 3, 96, 10)
    with torch.no_grad():
        peak = peak_bytes(lambda: module(msa), msa.device)
    assert peak < 4 * 96 * 96 * 16 * 16 / 1.5
