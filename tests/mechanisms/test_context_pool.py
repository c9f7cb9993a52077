"""What only `context_pool` has: predicted windows, its own length n, padding, order, steps, maps, and what it costs under windows."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.errors import RegardError
from regard.ops._dispatch import use_impl


def test_output_is_the_weights_on_the_tokens() -> None:
    for options in ({}, {"window": 4}, {"causal": True, "context_len": 30}, {"radius": 0.9}):
        module, x = regard.create("context_pool", dim=6, **options).double(), torch.randn(2, 300, 6, dtype=torch.double)
        key_mask = torch.rand(2, 300) < 0.8
        out, weights = module(x, key_mask=key_mask, return_weights=True)
        torch.testing.assert_close(out, weights @ x)
        assert out[~key_mask].abs().max() == 0 and weights.mT[~key_mask].abs().max() == 0


def test_map_weights_are_of_rows_and_columns() -> None:
    module, x = regard.create("context_pool", channels=4, window=2).double(), torch.randn(2, 4, 5, 7, dtype=torch.double)
    out, weights = module(x, return_weights=True)
    torch.testing.assert_close(out.flatten(2).mT, weights @ x.flatten(2).mT)
    seen = weights[0, 2 * 7 + 3].view(5, 7) > 0
    assert torch.equal(seen, (torch.arange(7) - 3).abs()[None].expand(5, 7) <= 2)
    assert out.is_contiguous() and module(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_length_is_that_of_the_valid_tokens_the_longer_side_or_the_given_one() -> None:
    """sigma = radius n / 2 where the last convolution is zero."""

    def sigma(module: Any, x: torch.Tensor, **masks: Any) -> torch.Tensor:
        torch.nn.init.zeros_(module.predict[2].weight)
        torch.nn.init.zeros_(module.predict[2].bias)
        log_w, sharpness = module._predict(*module._tokens(x, masks.get("key_mask"), None), masks.get("key_mask"))
        assert torch.allclose(log_w[log_w > -1e20].exp(), torch.tensor(0.5))
        return (0.5 / sharpness).sqrt()[:, 0]

    x = torch.randn(2, 20, 4)
    torch.testing.assert_close(sigma(regard.create("context_pool", dim=4, radius=0.2), x), torch.full((2,), 2.0))
    mask = torch.arange(20) < torch.tensor([[20], [10]])
    torch.testing.assert_close(sigma(regard.create("context_pool", dim=4, radius=0.2), x, key_mask=mask), torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(sigma(regard.create("context_pool", dim=4, causal=True, context_len=100), x), torch.full((2,), 5.0))
    torch.testing.assert_close(sigma(regard.create("context_pool", channels=4), torch.randn(2, 4, 5, 40)), torch.full((2,), 2.0))


def test_one_token_pools_itself_and_nothing_pools_to_zeros() -> None:
    module, x = regard.create("context_pool", dim=4), torch.randn(2, 1, 4)
    torch.testing.assert_close(module(x), x)
    attending = regard.create("context_pool", dim=4, num_heads=2)
    x, mask = torch.randn(2, 9, 4), torch.ones(2, 9, dtype=torch.bool)
    mask[0] = False
    assert attending(x, key_mask=mask)[0].abs().max() == 0


def test_padding_before_the_sequence_is_no_part_of_it() -> None:
    """Position matters by differences alone, so a sequence padded on the left is the same too; long enough for tiles."""
    module, x = regard.create("context_pool", dim=6, num_heads=2).double(), torch.randn(2, 300, 6, dtype=torch.double)
    padded = torch.cat((1e3 * torch.ones(2, 50, 6), x, torch.full((2, 10, 6), float("nan"))), 1)
    mask = (torch.arange(360) >= 50) & (torch.arange(360) < 350)
    torch.testing.assert_close(module(padded, key_mask=mask.expand(2, -1))[:, 50:350], module(x))


def test_causal_prefixes_across_tiles() -> None:
    module, x = regard.create("context_pool", dim=6, num_heads=2, causal=True, context_len=400).double(), torch.randn(1, 600, 6, dtype=torch.double)
    whole = module(x)
    for t in (1, 128, 129, 450):
        torch.testing.assert_close(module(x[:, :t]), whole[:, :t])


@pytest.mark.parametrize(("window", "kernel_size"), [(0, 1), (0, 3), (1, 5), (7, 3)])
def test_steps_equal_the_whole(window: int, kernel_size: int) -> None:
    module = regard.create("context_pool", dim=6, causal=True, context_len=40, window=window, kernel_size=kernel_size).double()
    x, state = torch.randn(2, 21, 6, dtype=torch.double), module.init_state(2)
    shapes = [t.shape for t in state]
    out = []
    for t in range(21):
        y, state = module.step(x[:, t], state)
        out.append(y)
    torch.testing.assert_close(torch.stack(out, 1), module(x))
    assert [t.shape for t in state] == shapes


def test_steps_need_a_bounded_state() -> None:
    with pytest.raises(RegardError, match="causal=True"):
        regard.create("context_pool", dim=6, window=3).init_state(1)
    for options in ({}, {"window": 3, "num_heads": 2}):
        with pytest.raises(RegardError, match="needs a window"):
            regard.create("context_pool", dim=6, causal=True, context_len=9, **options).init_state(1)


def test_attention_after_the_pooling_is_that_of_multi_head() -> None:
    module, plain = regard.create("context_pool", dim=8, num_heads=2, radius=1e-9), regard.create("multi_head", 8, 2)
    plain.load_state_dict({name: t for name, t in module.state_dict().items() if "predict" not in name})
    x, mask = torch.randn(2, 9, 8), torch.rand(9, 9) < 0.6
    torch.testing.assert_close(module(x, attn_mask=mask), plain(x, attn_mask=mask))  # so narrow a window pools nothing


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"dim": 8, "window": 3}, (2, 1500, 8)),
        ({"dim": 8, "window": 50}, (2, 1501, 8)),
        ({"dim": 8, "window": 300}, (2, 1500, 8)),
        ({"dim": 8, "window": 5000}, (2, 1500, 8)),
        ({"dim": 8, "causal": True, "context_len": 9, "window": 200}, (2, 1500, 8)),
        ({"dim": 8, "causal": True, "context_len": 9}, (2, 1500, 8)),
        ({"channels": 8}, (2, 8, 40, 33)),
        ({"channels": 8, "window": 3}, (2, 8, 40, 64)),
        ({"channels": 8, "window": 20}, (2, 8, 64, 48)),
        ({"channels": 8, "window": 90}, (2, 8, 64, 48)),
    ],
)
def test_cost_of_tiles(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    module = regard.create("context_pool", device="meta", **options)
    with FlopCounterMode(display=False) as counter:
        module(torch.empty(shape, device="meta"))
    n = shape[1] if len(shape) == 3 else shape[2] * shape[3]
    stated = module.card.cost(module, B=shape[0], N=n, M=n, H=shape[2], W=shape[-1])
    assert abs(stated / counter.get_total_flops() - 1) < 0.05


def test_window_makes_it_linear() -> None:
    def flops(n: int) -> int:
        with FlopCounterMode(display=False) as counter:
            regard.create("context_pool", dim=16, window=100, device="meta")(torch.empty(1, n, 16, device="meta"))
        return counter.get_total_flops()

    assert 1.95 < flops(2**15) / flops(2**14) < 2.05


def test_second_derivatives_by_the_reference() -> None:
    module, x = regard.create("context_pool", dim=4).double(), torch.randn(1, 5, 4, dtype=torch.double, requires_grad=True)
    with use_impl("reference"):
        assert torch.autograd.gradgradcheck(module, (x,), fast_mode=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dim": 8, "kernel_size": 4}, "kernel_size=4"),
        ({"dim": 8, "causal": True}, "needs context_len"),
        ({"dim": 8, "causal": True, "context_len": 0}, "context_len=0"),
        ({"dim": 8, "num_heads": 3}, "dim=8 is not divisible by num_heads=3"),
        ({"dim": 8, "radius": 0.0}, "radius=0.0"),
        ({"dim": 8, "hidden_dim": 0}, "hidden_dim=0"),
        ({"dim": 8, "window": -1}, "window=-1"),
        ({"dim": 8, "dropout": 1.0}, "dropout=1.0"),
        ({"layout": "map", "dim": 8}, "maps have channels"),
        ({"dim": 8, "channels": 8}, "maps have channels"),
        ({"layout": "rows", "dim": 8}, "layout='rows'"),
        ({"channels": 8, "num_heads": 2}, "num_heads=2"),
        ({}, "dim=None"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(RegardError, match=text):
        regard.create("context_pool", **options)


def test_wrong_calls_are_named() -> None:
    x, mask = torch.randn(2, 9, 8), torch.ones(9, 9, dtype=torch.bool)
    with pytest.raises(RegardError, match="attn_mask is for the attention"):
        regard.create("context_pool", dim=8)(x, attn_mask=mask)
    with pytest.raises(RegardError, match="attn_mask must broadcast"):
        regard.create("context_pool", dim=8, num_heads=2)(x, attn_mask=mask[:, :8])
    with pytest.raises(RegardError, match="takes no key_mask"):
        regard.create("context_pool", channels=8)(torch.randn(2, 8, 3, 3), key_mask=mask[:2])


def test_dropout_is_of_the_attention() -> None:
    module, x = regard.create("context_pool", dim=8, num_heads=2, dropout=0.5), torch.randn(2, 9, 8)
    assert (module(x) - module(x)).abs().max() > 1e-3
    assert torch.equal(module.eval()(x), module(x))
    alone = regard.create("context_pool", dim=8, dropout=0.5)
    assert F.mse_loss(alone(x), alone(x)) == 0
