"""What the RNN and the GRU have of their own, beside what test_lstm_cell.py asks of the three: options, ways to the same numbers, files of others."""

import itertools

import pytest
import torch
from torch import nn

import regard
from regard import RegardError, use_impl
from regard.errors import RegardTypeError
from regard.ops.recurrent_scan import looped
from regard.ops.recurrent_scan.cells import CELLS


@pytest.fixture(autouse=True)
def _quick():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def off_start(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return module


CASES = [("rnn_cell", {"nonlinearity": act, "layer_norm": norm}) for act in ("tanh", "relu") for norm in (False, True)]
CASES += [
    ("gru_cell", {"layer_norm": norm, "reset_after": after, "minimal": minimal})
    for norm, after, minimal in itertools.product((False, True), repeat=3)
    if after or not norm
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("id", "options"), CASES)
def test_the_loop_has_the_derivative_of_the_definition(id, options, masked, bias, monkeypatch):
    """Every output, every gate, every input and parameter, in float64."""
    monkeypatch.setattr(looped, "STEPS", 4)
    cell = off_start(regard.create(id, 4, 5, bias=bias, **options)).double()
    x, h = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((3, 6, 4), (3, 5)))
    mask = torch.rand(3, 6) > 0.4 if masked else None
    results = []
    for impl in ("looped", "reference"):
        with use_impl(recurrent_scan=impl):
            out, last, gates = cell(x, h, mask=mask, return_gates=True)
        outs = [out, last, *gates.values()]
        signs = torch.Generator().manual_seed(1)
        loss = torch.stack([(o * torch.randn(o.shape, generator=signs, dtype=o.dtype)).sum() for o in outs]).sum()
        results.append([*outs, *torch.autograd.grad(loss, [x, h, *cell.parameters()])])
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*results, strict=True))
    assert set(gates) == set("" if id == "rnn_cell" else "fn" if options["minimal"] else "rzn")


def definition(x, h, w, options):
    """The GRU of the card's formulas, in the card's words."""
    width = h.shape[-1]
    k = len(w["weight_ih"]) // width
    a, out = x @ w["weight_ih"].mT + w["bias_ih"], []
    for t in range(x.shape[1]):
        b = h @ w["weight_hh"].mT + w["bias_hh"]
        f = [torch.sigmoid(a[:, t, i * width : (i + 1) * width] + b[:, i * width : (i + 1) * width]) for i in range(k - 1)]
        inner = f[0] * b[:, -width:] if options["reset_after"] else (f[0] * h) @ w["weight_hh"][-width:].mT + w["bias_hh"][-width:]
        n = torch.tanh(a[:, t, -width:] + inner)
        h = (1 - f[0]) * h + f[0] * n if options["minimal"] else (1 - f[1]) * n + f[1] * h
        out.append(h)
    return torch.stack(out, 1)


@pytest.mark.parametrize("reset_after", [False, True])
@pytest.mark.parametrize("minimal", [False, True])
def test_gru_is_its_formula(reset_after, minimal):
    options = {"reset_after": reset_after, "minimal": minimal}
    cell = off_start(regard.create("gru_cell", 4, 5, **options))
    x, h = torch.randn(2, 7, 4), torch.randn(2, 5)
    with torch.no_grad():
        assert torch.allclose(cell(x, h)[0], definition(x, h, cell.state_dict(), options), atol=1e-6)


TORCHS = [("rnn_cell", nn.RNN, {"nonlinearity": "tanh"}), ("rnn_cell", nn.RNN, {"nonlinearity": "relu"}), ("gru_cell", nn.GRU, {})]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("id", "layer", "options"), TORCHS)
def test_all_ways_are_torchs(id, layer, options, bias):
    theirs = layer(6, 7, bias=bias, batch_first=True, **options)
    ours = regard.load_official(regard.create(id, 6, 7, bias=bias, **options), theirs.state_dict())
    x, h = torch.randn(3, 40, 6), torch.randn(3, 7)
    expected, last_h = theirs(x, h[None])
    expected.square().sum().backward()
    for impl in ("fused", "looped", "reference"):
        ours.zero_grad()
        with use_impl(recurrent_scan=impl):
            out, last = ours(x, h)
        assert torch.allclose(out, expected, atol=1e-6) and torch.allclose(last, last_h[0], atol=1e-6)
        out.square().sum().backward()
        assert torch.allclose(ours.weight_hh.grad, theirs.weight_hh_l0.grad, atol=2e-4)
    assert [c.impl for c in regard.explain(ours, x)] == ["looped"]
    with torch.no_grad():
        assert [c.impl for c in regard.explain(ours, x)] == ["fused"]
        assert [c.impl for c in regard.explain(ours, x, return_gates=True)] == ["fused" if id == "rnn_cell" else "looped"]
    assert regard.to_official(ours, f"torch.nn.{layer.__name__}").keys() == theirs.state_dict().keys()


@pytest.mark.parametrize(("id", "options"), CASES)
def test_masked_steps_copy_the_state(id, options):
    cell, x = off_start(regard.create(id, 3, 4, **options)), torch.randn(2, 7, 3)
    mask = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 1, 0, 0]]).bool()
    out, h = cell(x, mask=mask)
    for b in range(2):
        alone, h1 = cell(x[b : b + 1, mask[b]])
        assert torch.allclose(out[b, mask[b]], alone[0], atol=1e-6) and torch.allclose(h[b], h1[0], atol=1e-6)
    assert torch.equal(out[0, 2], out[0, 1]) and out[1, 0].abs().max() == 0


@pytest.mark.parametrize(("id", "options"), CASES)
def test_steps_show_the_gates_of_the_whole(id, options):
    cell, x = off_start(regard.create(id, 3, 4, **options)), torch.randn(2, 5, 3)
    _, _, gates = cell(x, return_gates=True)
    state = None
    for t in range(5):
        h, state, now = cell.step(x[:, t], state, return_gates=True)
        assert now.keys() == gates.keys() and all(torch.allclose(now[name], gates[name][:, t], atol=1e-6) for name in gates)
    assert torch.equal(h, state)


def test_an_empty_sequence_changes_nothing():
    for id, options in CASES:
        cell, h = regard.create(id, 3, 4, **options), torch.randn(2, 4)
        out, last, gates = cell(torch.randn(2, 0, 3), h, return_gates=True)
        assert out.shape == (2, 0, 4) and torch.equal(last, h) and all(g.shape == (2, 0, 4) for g in gates.values())


def keras_gru(x, kernel, recurrent, bias, reset_after):
    """keras.layers.GRU's step in its own order and names: z, r, h."""
    width, h, out = len(recurrent), x.new_zeros(len(x), len(recurrent)), []
    input_bias, recurrent_bias = bias if reset_after else (bias, None)
    for t in range(x.shape[1]):
        x_z, x_r, x_h = (x[:, t] @ kernel + input_bias).split(width, -1)
        if reset_after:
            r_z, r_r, r_h = (h @ recurrent + recurrent_bias).split(width, -1)
            z, r = torch.sigmoid(x_z + r_z), torch.sigmoid(x_r + r_r)
            hh = torch.tanh(x_h + r * r_h)
        else:
            z, r = torch.sigmoid(x_z + h @ recurrent[:, :width]), torch.sigmoid(x_r + h @ recurrent[:, width : 2 * width])
            hh = torch.tanh(x_h + (r * h) @ recurrent[:, 2 * width :])
        h = z * h + (1 - z) * hh
        out.append(h)
    return torch.stack(out, 1)


@pytest.mark.parametrize("reset_after", [False, True])
def test_keras_gru_files(reset_after):
    x = torch.randn(2, 6, 3)
    theirs = {"kernel": torch.randn(3, 12), "recurrent_kernel": torch.randn(4, 12), "bias": torch.randn(*(2,) * reset_after, 12)}
    cell = regard.load_official(regard.create("gru_cell", 3, 4, reset_after=reset_after), theirs)
    assert torch.allclose(cell(x)[0], keras_gru(x, *theirs.values(), reset_after), atol=1e-6)
    back = regard.to_official(cell, "Keras GRU" if reset_after else "Keras GRU, reset_after=False")
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)
    with pytest.raises(RegardError, match="bias"):
        regard.load_official(regard.create("gru_cell", 3, 4, reset_after=not reset_after), theirs)


def test_keras_simple_rnn_files():
    x, theirs = torch.randn(2, 6, 3), {"kernel": torch.randn(3, 4), "recurrent_kernel": torch.randn(4, 4), "bias": torch.randn(4)}
    cell = regard.load_official(regard.create("rnn_cell", 3, 4), theirs)
    h = torch.tanh(x[:, 0] @ theirs["kernel"] + theirs["bias"])
    h = torch.tanh(x[:, 1] @ theirs["kernel"] + theirs["bias"] + h @ theirs["recurrent_kernel"])
    assert torch.allclose(cell(x)[0][:, 1], h, atol=1e-6)
    assert all(torch.equal(t, theirs[name]) for name, t in regard.to_official(cell, "Keras SimpleRNN").items())


def test_others_files_go_only_where_they_mean_the_same():
    torchs = nn.GRU(3, 4).state_dict()
    for options in ({"reset_after": False}, {"minimal": True}):
        with pytest.raises(RegardError, match="does not fit"):
            regard.load_official(regard.create("gru_cell", 3, 4, **options), torchs)


def test_any_length_in_one_graph():
    for id, options in (("gru_cell", {"layer_norm": True}), ("rnn_cell", {"nonlinearity": "relu"})):
        cell = off_start(regard.create(id, 3, 4, **options)).eval()
        program = torch.export.export(cell, (torch.randn(2, 6, 3),), dynamic_shapes={"x": {1: torch.export.Dim.AUTO}})
        for t in (3, 50):
            x = torch.randn(2, t, 3)
            assert torch.allclose(program.module()(x)[0], cell(x)[0], atol=1e-6)


@pytest.mark.parametrize("name", ["rnn_tanh", "rnn_relu_norm", "gru", "gru_norm", "gru_before", "gru_minimal_bare"])
def test_opaque_operators_keep_their_promises(name):
    cell, width = CELLS[name], 3
    rows = cell.rows * width
    shapes = {"weight_hh": (rows, width)}
    params = [torch.randn(shapes.get(name, (rows,)), requires_grad=True) for name in cell.recurrent()]
    a, mask = torch.randn(4, 2, rows, requires_grad=True), torch.rand(4, 2) > 0.3
    torch.library.opcheck(torch.ops.regard.recurrent_scan, (name, a, [torch.randn(2, width, requires_grad=True)], params, mask))


def test_second_derivatives_need_the_reference():
    cell, x = regard.create("gru_cell", 3, 4), torch.randn(2, 5, 3, requires_grad=True)
    (once,) = torch.autograd.grad(cell(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RegardError, match="differentiable once"):
        once.sum().backward()
    with use_impl("reference"):
        (once,) = torch.autograd.grad(cell(x)[0].sum(), x, create_graph=True)
    once.square().sum().backward()
    assert cell.weight_hh.grad.abs().max() > 0


def test_wrong_calls():
    cell, x = regard.create("gru_cell", 3, 4), torch.randn(2, 5, 3)
    for call, match in (
        (lambda: cell(x[:, 0]), "step"),
        (lambda: cell.step(x), "forward"),
        (lambda: cell.step(x[:, 0, :2]), "width 2"),
        (lambda: cell(x[..., :2]), "width 2"),
        (lambda: cell(x, torch.zeros(3, 4)), r"state's h must be \(batch, hidden_size\) = \(2, 4\), got \(3, 4\)"),
        (lambda: cell(x, torch.zeros(2, 5)), "hidden_size"),
        (lambda: cell(x, mask=torch.ones(2, 4, dtype=torch.bool)), "mask"),
        (lambda: regard.create("gru_cell", 3, 4, layer_norm=True, reset_after=False), "layer_norm=True needs reset_after=True"),
        (lambda: regard.create("rnn_cell", 3, 4, nonlinearity="gelu"), "nonlinearity='gelu'"),
        (lambda: regard.create("rnn_cell", 0, 4), "input_size=0"),
    ):
        with pytest.raises(RegardError, match=match):
            call()
    with pytest.raises(RegardTypeError, match="only LSTMs have a pair"):
        cell(x, (torch.zeros(2, 4), torch.zeros(2, 4)))
    with pytest.raises(RegardError, match="fused"), use_impl(recurrent_scan="fused"):
        cell(x, return_gates=True)


def test_autocast_keeps_the_state_in_float32():
    """A relu state with the identity as its weights counts its steps; bfloat16 would stop counting at 256."""
    for trained in (False, True):
        cell = regard.create("rnn_cell", 1, 1, nonlinearity="relu")
        with torch.no_grad():
            for p, value in zip(cell.parameters(), (0.0, 1.0, 1.0, 0.0), strict=True):
                p.fill_(value)
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(trained):
            _, h = cell(torch.zeros(1, 600, 1))
        assert h.item() == 600
