"""What only `mra` has: patches of images, priors, what it returns beside its output, padding where it is exact, what it refuses."""

from typing import Any

import pytest
import torch

import regard
from regard.errors import RegardError, RegardTypeError
from regard.official import to_official


def module(**options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    out = regard.create("mra", 12, 3, **options).eval()
    for parameter in out.parameters():  # the small starting weights would make all scores alike
        parameter.data.normal_(std=0.5)
    return out


def test_blocks_of_a_grid_are_patches() -> None:
    """A grid is a permutation of tokens: the module on permuted tokens without a grid gives the same, and each row of blocks is one patch."""
    grid = {"grid_size": (4, 12), "patch": (2, 3), "block_size": 6, "blocks_per_row": 2}
    image, plain = module(**grid), module(block_size=6, blocks_per_row=2)
    assert regard.create("mra", 8, 2, grid_size=(8, 16)).patch == (4, 8)
    order = torch.arange(48).view(2, 2, 4, 3).transpose(1, 2).flatten()
    assert order[:6].tolist() == [0, 1, 2, 12, 13, 14]
    x, key_mask = torch.randn(2, 48, 12), torch.rand(2, 48) < 0.7
    for mask in (None, key_mask):
        out, weights, blocks = image(x, key_mask=mask, return_weights=True, return_blocks=True)
        masked = None if mask is None else mask[:, order]
        out2, weights2, blocks2 = plain(x[:, order], key_mask=masked, return_weights=True, return_blocks=True)
        torch.testing.assert_close(out[:, order], out2)
        torch.testing.assert_close(weights[:, :, order][..., order], weights2)
        assert torch.equal(blocks, blocks2) and blocks.sum((-1, -2)).unique().tolist() == [16]
        chosen = torch.tensor([47, 3])
        torch.testing.assert_close(image.weights(x, key_mask=mask, queries=chosen), weights[:, :, chosen])


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_weights_multiply_the_values_and_blocks_are_where_they_are_exact(mode: str) -> None:
    net = module(block_size=4, mode=mode)
    net.resolution = type(net.resolution)(4, 9, coarse=mode == "full")
    x = torch.randn(2, 27, 12)
    out, weights, blocks = net(x, return_weights=True, return_blocks=True)
    v = net.v_proj(x).unflatten(2, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(net.out_proj((weights @ v).transpose(1, 2).flatten(2)), out, rtol=1e-4, atol=1e-5)
    fine = blocks.repeat_interleave(4, -1).repeat_interleave(4, -2)[..., :27, :27]
    if mode == "sparse":
        assert weights[~fine].abs().max() == 0
    else:  # one weight a block
        rest = weights[..., :24].unflatten(-1, (6, 4))
        spread = (rest.amax(-1) - rest.amin(-1))[~fine[..., :24:4]]
        assert spread.max() < 1e-6


def test_padding_that_fills_the_last_block_is_exact_and_more_is_where_all_is_refined() -> None:
    x = torch.randn(1, 13, 12)
    for options, padded in (({"block_size": 4, "blocks_per_row": 1}, 16), ({"block_size": 4, "blocks_per_row": 4}, 17)):
        net = module(**options)
        whole = torch.cat((x, torch.randn(1, padded - 13, 12)), 1)
        out = net(whole, key_mask=torch.arange(padded)[None] < 13)
        torch.testing.assert_close(out[:, :13], net(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out[:, 13:], net.out_proj.bias.expand(1, padded - 13, -1))


def test_a_coarse_block_of_equal_tokens_is_exact() -> None:
    """Where all tokens of a block are alike its mean is each of them, so that one value a block loses nothing."""
    net = module(block_size=4, blocks_per_row=1)
    x = torch.randn(2, 5, 12).repeat_interleave(4, 1)
    net2 = regard.create("multi_head", 12, 3)
    net2.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(x), net2(x), rtol=1e-4, atol=1e-5)


def test_empty_rows_only_on_request() -> None:
    x = torch.randn(1, 20, 12)
    with pytest.raises(RegardError, match="num_blocks=4 is below the 5 rows"):
        module(block_size=4, num_blocks=4)(x)
    out, blocks = module(block_size=4, num_blocks=4, allow_empty_rows=True, mode="sparse", out_proj=False)(x, return_blocks=True)
    empty = ~blocks.any(-1).repeat_interleave(4, -1)
    assert empty.any()
    assert out.unflatten(2, (3, 4)).transpose(1, 2)[empty].abs().max() == 0


def test_official_names() -> None:
    net = module(out_proj=False, qkv_bias=False)
    assert set(to_official(net, "mlpen/mra-attention")) == {f"{name}.weight" for name in ("query", "key", "value")}
    state = to_official(module(), "transformers MraAttention")
    assert {"self.query.weight", "output.dense.bias"} < set(state)
    norm = {"output.LayerNorm.weight": torch.ones(12), "output.LayerNorm.bias": torch.zeros(12)}
    other = regard.load_official(regard.create("mra", 12, 3), {**state, **norm})
    torch.testing.assert_close(other.state_dict(), module().state_dict())


def test_starts_as_bert_and_may_be_wider_than_its_input() -> None:
    net = regard.create("mra", 64, 4, head_dim=32, out_proj=False)
    assert 0.015 < net.q_proj.weight.std() < 0.025 and net.q_proj.bias.abs().max() == 0
    assert net(torch.randn(1, 40, 64)).shape == (1, 40, 128)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": "half"}, "mode='half'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"blocks_per_row": 0}, "blocks_per_row=0"),
        ({"patch": (4, 8)}, "needs grid_size"),
        ({"grid_size": (8, 12)}, r"grid_size=\(8, 12\) is not divisible by patch=\(4, 8\)"),
        ({"grid_size": (8, 8), "patch": (4, 4)}, r"patch=\(4, 4\) must have block_size=32 pixels"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(RegardError, match=text):
        regard.create("mra", 12, 3, **options)


def test_wrong_calls_are_named() -> None:
    net, x = module(grid_size=(8, 8)), torch.randn(2, 64, 12)
    with pytest.raises(RegardError, match="takes no context"):
        net(x, x)
    with pytest.raises(RegardError, match="takes no attn_mask"):
        net(x, attn_mask=torch.ones(64, 64, dtype=torch.bool))
    with pytest.raises(RegardError, match="60 positions, but grid_size"):
        net(x[:, :60])
    with pytest.raises(RegardTypeError, match="causal"):
        regard.create("mra", 12, 3, causal=True)
