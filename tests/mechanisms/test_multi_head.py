"""What only multi-head attention has: grouped heads, positions, alignment to the end, weights of chosen rows."""

import pytest
import torch
from torch import Tensor

import regard
from regard.errors import RegardError
from regard.ops.softmax_attention import attend, attention_weights, causal_mask
from regard.parts.positions import alibi_slopes


def brute_force(m, x: Tensor, context: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """The equations, head by head and query by query."""
    q, k, v = m.q_proj(x), m.k_proj(context), m.v_proj(context)
    d, out = m.head_dim, []
    for i in range(m.num_heads):
        g = i * m.num_kv_heads // m.num_heads
        scores = q[..., i * d : (i + 1) * d] @ k[..., g * d : (g + 1) * d].mT * m.scale
        scores = scores if bias is None else scores + bias[i]
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        out.append(scores.softmax(-1).nan_to_num(0.0) @ v[..., g * d : (g + 1) * d])
    return m.out_proj(torch.cat(out, -1))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))


def test_grouped_heads(x: Tensor) -> None:
    m = regard.create("multi_head", 24, 6, num_kv_heads=2)
    torch.testing.assert_close(m(x), brute_force(m, x, x))


@pytest.mark.parametrize("heads", [4, 6])
def test_alibi(x: Tensor, heads: int) -> None:
    m = regard.create("multi_head", 24, heads, alibi=True)
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    bias = -torch.tensor(alibi_slopes(heads))[:, None, None] * distance
    torch.testing.assert_close(m(x), brute_force(m, x, x, bias))


def test_alibi_slopes_of_the_reference_recipe() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


def test_toeplitz_bias(x: Tensor) -> None:
    m = regard.create("multi_head", 24, 3, rel_pos_bias="toeplitz", max_len=10)
    torch.nn.init.normal_(m.rel_pos_bias.weight)
    index = torch.arange(9)[:, None] - torch.arange(9) + 9
    torch.testing.assert_close(m(x), brute_force(m, x, x, m.rel_pos_bias.weight[:, index]))
    with pytest.raises(RegardError, match="11 is longer than max_len=10"):
        m(torch.randn(1, 11, 24))


def test_t5_buckets() -> None:
    both = regard.create("multi_head", 8, 2, rel_pos_bias="t5").rel_pos_bias
    past = regard.create("multi_head", 8, 2, rel_pos_bias="t5", causal=True).rel_pos_bias
    offsets = torch.tensor([-500, -128, -20, -9, -8, -7, -1, 0, 1, 7, 8, 500])
    # 32 buckets, 16 a side: eight exact ones, then logarithmic up to 128 (key minus query; later keys take the upper half).
    assert both._bucket(offsets).tolist() == [15, 15, 10, 8, 8, 7, 1, 0, 17, 23, 24, 31]
    assert past._bucket(offsets).tolist() == [31, 31, 17, 9, 8, 7, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_scores_depend_on_distance_alone(x: Tensor, interleaved: bool) -> None:
    m = regard.create("multi_head", 24, 2, rope=True, rope_dim=8, rope_interleaved=interleaved)
    plain = m(x)
    torch.testing.assert_close(m(x, positions=torch.arange(9) + 100), plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(m(x, positions=2 * torch.arange(9)), plain, atol=1e-4)
    a, b = (0, 1) if interleaved else (0, 4)
    q = m.q_proj(x)[0, 3, :12]
    from regard.parts.positions import rotary

    turned = rotary(m.q_proj(x)[:, None, :, :12], torch.arange(9), 8, 10000.0, interleaved)[0, 0, 3]
    angle = torch.tensor(3.0)  # the first pair turns by its position
    torch.testing.assert_close(turned[a], q[a] * angle.cos() - q[b] * angle.sin())
    torch.testing.assert_close(turned[b], q[b] * angle.cos() + q[a] * angle.sin())
    torch.testing.assert_close(turned[8:], q[8:])


def test_qk_norm_makes_scores_blind_to_length(x: Tensor) -> None:
    m = regard.create("multi_head", 24, 3, qk_norm=True, qkv_bias=False)
    weights = m(x, return_weights=True)[1]
    torch.testing.assert_close(m(5 * x, return_weights=True)[1], weights, rtol=1e-4, atol=1e-5)


def test_causal_is_aligned_to_the_end(x: Tensor) -> None:
    m = regard.create("multi_head", 24, 3, causal=True)
    torch.testing.assert_close(m(x[:, -1:], x), m(x)[:, -1:])  # one new query sees the whole cache
    torch.testing.assert_close(m(x[:, -4:], x), brute_force(m, x[:, -4:], x, mask=causal_mask(4, 9)))
    out = m(x, x[:, :4])  # more queries than keys: the first five see none
    torch.testing.assert_close(out[:, :5], m.out_proj.bias.expand(2, 5, 24))
    assert out.isfinite().all()


def test_no_keys_at_all(x: Tensor) -> None:
    m = regard.create("multi_head", 24, 3)
    torch.testing.assert_close(m(x, x[:, :0]), m.out_proj.bias.expand(2, 9, 24))


def test_bias_and_mask_together(x: Tensor) -> None:
    m = regard.create("multi_head", 24, 3, scale=0.3)
    bias, mask = torch.randn(3, 9, 9), torch.rand(9, 9) > 0.3
    torch.testing.assert_close(m(x, attn_bias=bias, attn_mask=mask), brute_force(m, x, x, bias, mask))
    with pytest.raises(RegardError, match="attn_bias must be a floating-point tensor"):
        m(x, attn_bias=mask)


@pytest.mark.parametrize("widths", [(8, 24), (24, 8)])
def test_unequal_widths(widths: tuple[int, int]) -> None:
    q, k, v = torch.randn(2, 3, 5, widths[0]), torch.randn(2, 3, 7, widths[0]), torch.randn(2, 3, 7, widths[1])
    torch.testing.assert_close(attend(q, k, v), attention_weights(q, k) @ v)


def test_weights_of_chosen_rows() -> None:
    q, k = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    rows = torch.tensor([1, 7])
    whole = attention_weights(q, k, causal=True)
    torch.testing.assert_close(attention_weights(q[:, :, rows], k, mask=causal_mask(9, 9)[rows]), whole[:, :, rows])


def test_dropout_acts_in_training_alone(x: Tensor) -> None:
    m = regard.create("multi_head", 24, 3, dropout=0.5)
    assert not torch.equal(m.train()(x), m(x))
    assert torch.equal(m.eval()(x), m(x))
