"""What only the LSTM has: three ways to the same numbers, its options, its gates and their picture."""

import itertools
import sys

import pytest
import torch
from torch import nn

import regard
from regard import RegardError, use_impl
from regard.ops.recurrent_scan import looped
from regard.plotting import plot_gates


@pytest.fixture(autouse=True)
def _quick():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def off_start(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return module


@pytest.mark.parametrize("peephole", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loop_has_the_derivative_of_the_definition(peephole, layer_norm, coupled, masked, monkeypatch):
    """Every output, every gate, every input and parameter, in float64."""
    monkeypatch.setattr(looped, "STEPS", 4)
    cell = off_start(regard.create("lstm_cell", 4, 5, layer_norm=layer_norm, peephole=peephole, coupled=coupled)).double()
    x, h, c = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((3, 6, 4), (3, 5), (3, 5)))
    mask = torch.rand(3, 6) > 0.4 if masked else None
    results = []
    for impl in ("looped", "reference"):
        with use_impl(recurrent_scan=impl):
            out, last, gates = cell(x, (h, c), mask=mask, return_gates=True)
        outs = [out, *last, *gates.values()]
        signs = torch.Generator().manual_seed(1)
        loss = torch.stack([(o * torch.randn(o.shape, generator=signs, dtype=o.dtype)).sum() for o in outs]).sum()
        results.append([*outs, *torch.autograd.grad(loss, [x, h, c, *cell.parameters()])])
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*results, strict=True))
    assert set(gates) == set("ifgoc") and all(g.shape == (3, 6, 5) for g in gates.values())


@pytest.mark.parametrize("bias", [False, True])
def test_all_ways_are_torchs_lstm(bias):
    theirs = nn.LSTM(6, 7, bias=bias, batch_first=True)
    ours = regard.load_official(regard.create("lstm_cell", 6, 7, bias=bias), theirs.state_dict())
    x, h, c = torch.randn(3, 40, 6), torch.randn(3, 7), torch.randn(3, 7)
    expected, (last_h, last_c) = theirs(x, (h[None], c[None]))
    expected.square().sum().backward()
    for impl in ("fused", "looped", "reference"):
        ours.zero_grad()
        with use_impl(recurrent_scan=impl):
            out, last = ours(x, (h, c))
        assert (
            torch.allclose(out, expected, atol=1e-6)
            and torch.allclose(last[0], last_h[0], atol=1e-6)
            and torch.allclose(last[1], last_c[0], atol=1e-6)
        )
        out.square().sum().backward()
        assert torch.allclose(ours.weight_hh.grad, theirs.weight_hh_l0.grad, atol=1e-4)
    assert [c.impl for c in regard.explain(ours, x)] == ["fused"]
    assert [c.impl for c in regard.explain(ours, x, return_gates=True)] == ["looped"]


def test_eval_mode_still_differentiates():
    cell, x = regard.create("lstm_cell", 3, 4).eval(), torch.randn(2, 5, 3, requires_grad=True)
    cell(x)[0].sum().backward()
    assert x.grad.abs().max() > 0


def test_masked_steps_copy_the_state():
    cell, x = off_start(regard.create("lstm_cell", 3, 4, peephole=True)), torch.randn(2, 7, 3)
    mask = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 1, 0, 0]]).bool()
    out, (h, c) = cell(x, mask=mask)
    for b in range(2):
        alone, (h1, c1) = cell(x[b : b + 1, mask[b]])
        assert torch.allclose(out[b, mask[b]], alone[0], atol=1e-6)
        assert torch.allclose(h[b], h1[0], atol=1e-6) and torch.allclose(c[b], c1[0], atol=1e-6)
    assert torch.equal(out[0, 2], out[0, 1]) and out[1, 0].abs().max() == 0
    out, state = cell(x, (h, c), mask=torch.zeros(2, 7, dtype=torch.bool))
    assert torch.equal(state[0], h) and torch.equal(state[1], c) and torch.equal(out, h[:, None].expand_as(out))


@pytest.mark.parametrize("options", [{}, {"layer_norm": True, "peephole": True}, {"coupled": True}])
def test_steps_show_the_gates_of_the_whole(options):
    cell, x = off_start(regard.create("lstm_cell", 3, 4, **options)), torch.randn(2, 5, 3)
    _, _, gates = cell(x, return_gates=True)
    state = None
    for t in range(5):
        h, state, now = cell.step(x[:, t], state, return_gates=True)
        assert all(torch.allclose(now[name], gates[name][:, t], atol=1e-6) for name in gates)
    assert torch.equal(h, state[0])
    if options.get("coupled"):
        assert torch.allclose(gates["i"], 1 - gates["f"]) and cell.weight_hh.shape == (12, 4)


def test_an_empty_sequence_changes_nothing():
    for options in ({}, {"layer_norm": True}):
        cell, state = regard.create("lstm_cell", 3, 4, **options), (torch.randn(2, 4), torch.randn(2, 4))
        out, last = cell(torch.randn(2, 0, 3), state)
        assert out.shape == (2, 0, 4) and all(torch.equal(a, b) for a, b in zip(last, state, strict=True))


@pytest.mark.parametrize("coupled", [False, True])
def test_forget_bias_is_the_sum_of_both(coupled):
    cell = regard.create("lstm_cell", 3, 4, coupled=coupled, forget_bias=1.5)
    total = (cell.bias_ih + cell.bias_hh).unflatten(0, (-1, 4))
    assert torch.allclose(total[0 if coupled else 1], torch.full((4,), 1.5))
    assert not torch.allclose(total[-1], torch.full((4,), 1.5))


def test_autocast_keeps_the_cell_in_float32():
    """With f = 1 the cell counts its steps; bfloat16 would stop counting at 256."""
    for options in ({}, {"peephole": True}):
        cell = regard.create("lstm_cell", 1, 1, **options)
        with torch.no_grad():
            for p in cell.parameters():
                p.zero_()
            cell.bias_ih.copy_(torch.tensor([30.0, 30.0, 30.0, 30.0]))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            _, (_, c) = cell(torch.zeros(1, 600, 1))
        assert abs(c.item() - 600) < 0.1


def test_keras_files():
    cell, x = regard.create("lstm_cell", 3, 4), torch.randn(2, 5, 3)
    state = regard.to_official(cell, "Keras LSTM")
    assert {name: tuple(t.shape) for name, t in state.items()} == {"kernel": (3, 16), "recurrent_kernel": (4, 16), "bias": (16,)}
    other = regard.load_official(regard.create("lstm_cell", 3, 4), state)
    assert torch.allclose(other(x)[0], cell(x)[0], atol=1e-6)


def test_any_length_in_one_graph():
    """The loop is one node of a traced graph, options and all."""
    cell = off_start(regard.create("lstm_cell", 3, 4, layer_norm=True, peephole=True)).eval()
    program = torch.export.export(cell, (torch.randn(2, 6, 3),), dynamic_shapes={"x": {1: torch.export.Dim.AUTO}})
    for t in (3, 50):
        x = torch.randn(2, t, 3)
        assert torch.allclose(program.module()(x)[0], cell(x)[0], atol=1e-6)


def test_opaque_operators_keep_their_promises():
    for cell in ("lstm", "lstm_peephole_norm", "lstm_coupled"):
        k = 3 if "coupled" in cell else 4
        a, w = torch.randn(4, 2, k * 3, requires_grad=True), torch.randn(k * 3, 3, requires_grad=True)
        state, extra = [torch.randn(2, 3, requires_grad=True) for _ in range(2)], []
        if "norm" in cell:
            extra = [torch.randn(s, requires_grad=True) for s in (12, 12, 3, 3, 3, 3, 3)]
        mask = torch.rand(4, 2) > 0.3
        torch.library.opcheck(torch.ops.regard.recurrent_scan, (cell, a, state, [w, *extra], mask))


def test_wrong_calls():
    cell, x = regard.create("lstm_cell", 3, 4), torch.randn(2, 5, 3)
    for call, match in (
        (lambda: cell(x[:, 0]), "step"),
        (lambda: cell.step(x), "forward"),
        (lambda: cell(x, x[:, 0]), "pair"),
        (lambda: cell(x, (torch.zeros(3, 4), torch.zeros(3, 4))), r"state's h must be \(batch, hidden_size\) = \(2, 4\), got \(3, 4\)"),
        (lambda: cell(x, mask=torch.ones(2, 4, dtype=torch.bool)), "mask"),
        (lambda: regard.create("lstm_cell", 3, 4, bias=False, forget_bias=1.0), "forget_bias=1.0 needs bias=True"),
        (lambda: regard.create("lstm_cell", 3, 0), "hidden_size=0"),
    ):
        with pytest.raises(RegardError, match=match):
            call()
    with pytest.raises(RegardError, match="fused"), use_impl(recurrent_scan="fused"):
        cell(x, return_gates=True)


def test_bias_and_peephole_keys():
    for options in itertools.product((False, True), repeat=3):
        bias, peephole, coupled = options
        names = set(regard.create("lstm_cell", 2, 3, bias=bias, peephole=peephole, coupled=coupled).state_dict())
        assert ("bias_ih" in names) == bias and ("peephole_f" in names) == peephole and ("peephole_i" in names) == (peephole and not coupled)


def test_gates_are_drawn_whole_or_not_at_all(tmp_path, monkeypatch):
    _, _, gates = regard.create("lstm_cell", 3, 4)(torch.randn(2, 5, 3), return_gates=True)
    path = plot_gates(gates, tmp_path / "gates.png", sample=1)
    assert path.read_bytes().startswith(b"\x89PNG") and [p.name for p in tmp_path.iterdir()] == ["gates.png"]
    with pytest.raises(RegardError, match="sample=2"):
        plot_gates(gates, path, sample=2)
    with pytest.raises(RegardError, match="empty"):
        plot_gates({}, path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RegardError, match="needs matplotlib"):
        plot_gates(gates, path)
