"""What only the Set Transformer blocks have: unequal widths, two masks, padding that holds anything, the point cloud model's numbers."""

import pytest
import torch

import regard
from regard import RegardError
from regard.parts.set_blocks import MAB


@pytest.fixture(autouse=True)
def _quick():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def by_hand(block: MAB, x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    """One sample, one head at a time."""
    q, k, v = x @ block.fc_q.weight.T + block.fc_q.bias, y @ block.fc_k.weight.T + block.fc_k.bias, y @ block.fc_v.weight.T + block.fc_v.bias
    d, outs = block.out_dim // block.num_heads, []
    for h in range(block.num_heads):
        part = slice(h * d, (h + 1) * d)
        outs.append(q[:, part] + ((q[:, part] @ k[:, part].T) * scale).softmax(-1) @ v[:, part])
    out = torch.cat(outs, -1)
    return out + (out @ block.fc_o.weight.T + block.fc_o.bias).clamp_min(0)


@pytest.mark.parametrize(("scale", "factor"), [("dim", 24**-0.5), ("head", 6**-0.5)])
def test_mab_is_its_formula_with_three_widths(scale, factor):
    block = regard.create("mab", 10, 4, context_dim=7, out_dim=24, scale=scale)
    x, y = torch.randn(2, 5, 10), torch.randn(2, 9, 7)
    expected = torch.stack([by_hand(block, a, b, factor) for a, b in zip(x, y, strict=True)])
    assert torch.allclose(block(x, y), expected, atol=1e-5)


def test_mab_masks_queries_and_keys():
    block = regard.create("mab", 8, 2, context_dim=6, norm=True).eval()
    x, y = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 7, 6, requires_grad=True)
    queries, keys = torch.rand(2, 5) > 0.4, torch.rand(2, 7) > 0.4
    out, weights = block(x, y, key_mask=keys, query_mask=queries, return_weights=True)
    assert out[~queries].abs().max() == 0 and weights.transpose(1, 2)[~queries].abs().max() == 0
    for b in range(2):
        alone = block(x[b : b + 1, queries[b]], y[b : b + 1, keys[b]])
        assert torch.allclose(out[b, queries[b]], alone[0], atol=1e-6)
    out.square().sum().backward()
    assert x.grad[~queries].abs().max() == 0 and y.grad[~keys].abs().max() == 0


@pytest.mark.parametrize(
    ("id", "options"),
    [("sab", {}), ("isab", {"num_inducing": 3}), ("pma", {"num_seeds": 2, "rff": True}), ("set_transformer", {"hidden_dim": 8, "num_heads": 2})],
)
def test_padding_may_hold_anything(id, options):
    block = regard.create(id, 8, **({"num_heads": 2} | options)).eval()
    x, mask = torch.randn(3, 9, 8), torch.arange(9) < torch.tensor([[9], [4], [0]])
    dirty = x.masked_fill(~mask[..., None], float("nan")).requires_grad_()
    out = block(dirty, mask=mask)
    out.square().sum().backward()
    assert out.isfinite().all() and dirty.grad[mask].isfinite().all() and dirty.grad[~mask].abs().max() == 0
    assert all(p.grad.isfinite().all() for p in block.parameters())
    if id in ("sab", "isab"):
        assert out[~mask].abs().max() == 0
    alone = block(x[1:2, :4])
    assert torch.allclose(out[1:2, : alone.shape[1]], alone, atol=1e-5)


def test_pooling_weights_show_the_elements():
    model = regard.create("set_transformer", 3, 16, 2, num_outputs=4, num_heads=2, dropout=0.5).eval()
    x, mask = torch.randn(2, 6, 3), torch.arange(6) < torch.tensor([[6], [2]])
    out, weights = model(x, mask=mask, return_weights=True)
    assert out.shape == (2, 4, 2) and weights.shape == (2, 2, 4, 6)
    assert weights[1, ..., 2:].abs().max() == 0
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 4))


def test_sab_encoder_and_depths():
    model = regard.create("set_transformer", 3, 16, num_heads=2, encoder="sab", encoder_depth=3, decoder_depth=1)
    assert len(model.enc) == 3 and len(model.dec) == 3
    assert not any("I" in name.split(".") for name in model.state_dict())
    assert model(torch.randn(2, 5, 3)).shape == (2, 1, 1)


@pytest.mark.parametrize(("depth", "numbers"), [(0, [1, 3]), (2, [1, 2, 3, 5]), (2, [1, 3, 5, 7]), (1, [0, 1, 3])])
def test_dropout_modules_do_not_shift_the_decoder(depth, numbers):
    """The point cloud model is Dropout, PMA, Dropout, Linear: its file says dec.1 and dec.3."""
    options = {"hidden_dim": 8, "num_heads": 2, "num_inducing": 3, "decoder_depth": depth}
    source, target = (regard.create("set_transformer", 3, **options).eval() for _ in range(2))

    def renumbered(name: str) -> str:
        head, number, *rest = name.split(".")
        return ".".join((head, str(numbers[int(number)]), *rest)) if head == "dec" else name

    state = {renumbered(name): tensor for name, tensor in source.state_dict().items()}
    regard.load_official(target, state)
    x = torch.randn(2, 5, 3)
    assert torch.equal(source(x), target(x))
    assert regard.to_official(target, f"dec at {' '.join(map(str, numbers))}").keys() == state.keys()


def test_inducing_points_are_projected_once_for_the_batch():
    from torch.utils.flop_counter import FlopCounterMode

    block = regard.create("isab", 8, 2, num_inducing=4)
    counts = []
    for batch in (1, 2, 3):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            block(torch.randn(batch, 10, 8))
        counts.append(counter.get_total_flops())
    assert counts[2] - counts[1] == counts[1] - counts[0] == counts[0] - 2 * 4 * 8 * 8


def test_wrong_options_and_calls():
    with pytest.raises(RegardError, match="out_dim=10 is not divisible by num_heads=4"):
        regard.create("sab", 8, 4, out_dim=10)
    with pytest.raises(RegardError, match="scale='full'"):
        regard.create("mab", 8, 4, scale="full")
    with pytest.raises(RegardError, match="encoder='mean'"):
        regard.create("set_transformer", 8, encoder="mean")
    with pytest.raises(RegardError, match="encoder_depth=0"):
        regard.create("set_transformer", 8, encoder_depth=0)
    with pytest.raises(RegardError, match="query_mask"):
        regard.create("mab", 8, 4)(torch.randn(2, 3, 8), query_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(RegardError, match=r"context has width 8 .* context_dim=6"):
        regard.create("mab", 8, 4, context_dim=6)(torch.randn(2, 3, 8))
