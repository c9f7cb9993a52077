"""Luna: the causal form against its equations, masks, steps, the memory stream, blocks."""

import pytest
import torch
from safetensors.torch import load, save

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official
from regard.ops.linear_attention import api


def make(**options):
    torch.manual_seed(0)
    return regard.create("luna", 12, 3, **{"memory_len": 4, **options}).double().eval()


def causal_by_tokens(module, x, memory, mask, slots):
    """Token by token, head by head, as the definition reads."""
    n, h, d = x.shape[1], module.num_heads, module.head_dim

    def heads(t):
        return t.unflatten(2, (h, d)).transpose(1, 2)

    q, kp, p = heads(module.q_proj(x)), heads(module.pc_proj(x)), heads(module.pq_proj(memory))
    k, v = (heads(module.c_proj(x)),) * 2 if module.tie_kv else (heads(module.k_proj(x)), heads(module.v_proj(x)))
    w = torch.log2(1 + 2 ** (kp @ p.mT / d**0.5)) * mask[:, None, :, None]
    rows = []
    for t in range(n):
        count = mask[:, : t + 1].sum(1).clamp_min(1)[:, None, None]
        a = q[:, :, t : t + 1] / d**0.5 @ (k[:, :, : t + 1].mT @ w[:, :, : t + 1]) / count[..., None]
        a = a.masked_fill(~slots[:, None, None], -torch.inf).softmax(-1)
        rows.append(a @ (w[:, :, : t + 1].mT @ v[:, :, : t + 1]) / count[..., None])
    return module.out_proj(torch.cat(rows, 2).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("tie_kv", [True, False])
@pytest.mark.parametrize("n", [1, 9, 130])
def test_causal_form_equals_its_equations(tie_kv, n):
    module = make(causal=True, tie_kv=tie_kv)
    x, memory = torch.randn(2, n, 12, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    mask, slots = torch.rand(2, n) > 0.3, torch.tensor([[True] * 5, [True, False, True, True, False]])
    out, expected = module(x, memory=memory, key_mask=mask, memory_mask=slots), causal_by_tokens(module, x, memory, mask, slots)
    assert torch.allclose(out, expected, atol=1e-11)
    g = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (x, memory), g), torch.autograd.grad(expected, (x, memory), g), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("tie_kv", [True, False])
def test_steps_equal_the_whole_with_a_memory_of_the_caller(tie_kv):
    module, x, memory = make(causal=True, tie_kv=tie_kv), torch.randn(2, 9, 12, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    slots = torch.tensor([[True] * 5, [True, False, True, True, False]])
    with torch.no_grad():
        whole = module(x, memory=memory, memory_mask=slots)
        state = module.init_state(2, memory=memory, memory_mask=slots)
        for t in range(9):
            state = type(state)(**load(save({n: s.contiguous() for n, s in state._asdict().items()})))
            out, state = module.step(x[:, t], state)
            assert torch.allclose(out, whole[:, t], atol=1e-12)
    with pytest.raises(RegardError, match="causal=True"):
        make().init_state(1)


def test_memory_stream():
    module, x, context = make(num_memory_heads=2), torch.randn(2, 7, 12, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    out, memory, weights = module(x, context, return_memory=True, return_weights=True)
    assert memory.shape == (2, 4, 12)
    assert weights.shape == (2, 3, 7, 4)
    k = v = module.c_proj(memory).unflatten(2, (3, 4)).transpose(1, 2)
    q = module.q_proj(x).unflatten(2, (3, 4)).transpose(1, 2)
    assert torch.allclose((q @ k.mT / 2).softmax(-1), weights)
    assert torch.allclose(module.out_proj((weights @ v).transpose(1, 2).flatten(2)), out)
    long = torch.randn(2, 9, 12, dtype=torch.float64)
    assert module(x, memory=long, return_memory=True)[1].shape == long.shape
    same = make(causal=True)(x, memory=long, return_memory=True)[1]
    assert torch.equal(same, long)


def test_memory_mask_hides_slots_from_queries_but_packs_them():
    module, x = make(), torch.randn(2, 7, 12, dtype=torch.float64)
    slots = torch.tensor([[True, True, False, True]] * 2)
    out, memory = module(x, memory_mask=slots, return_memory=True)
    plain, same = module(x, return_memory=True)
    assert torch.equal(memory, same)
    assert not torch.allclose(out, plain)
    short = module(x, memory=module.memory[slots[0]].expand(2, -1, -1))
    assert torch.allclose(out, short)


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_allowed_gives_zeros_before_the_projections(causal):
    module, x = make(causal=causal), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    out, memory = module(x, key_mask=torch.zeros(2, 5, dtype=torch.bool), return_memory=True)
    if causal:
        assert torch.allclose(out, module.out_proj.bias.expand_as(out))
    else:
        assert (memory == 0).all()
    blind = module(x, memory_mask=torch.zeros(2, 4, dtype=torch.bool))
    assert torch.allclose(blind, module.out_proj.bias.expand_as(out))
    (out.sum() + blind.sum()).backward()
    assert x.grad.isfinite().all()


def test_one_slot_passes_every_token_on():
    """Through a memory of one slot every output still feels every input."""
    module, x = make(memory_len=1), torch.randn(1, 6, 12, dtype=torch.float64, requires_grad=True)
    for t in range(6):
        (g,) = torch.autograd.grad(module(x)[0, t].square().sum(), x)
        assert (g.abs().amax(-1) > 0).all()


def test_blocks_change_nothing(monkeypatch):
    module, x = make(causal=True), torch.randn(3, 40, 12, dtype=torch.float64, requires_grad=True)
    mask, slots = torch.rand(3, 40) > 0.3, torch.rand(3, 4) > 0.2
    slots[:, 0] = True
    results = []
    for block in (api.BLOCK, 1):
        monkeypatch.setattr(api, "BLOCK", block)
        out = module(x, key_mask=mask, memory_mask=slots)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_acts_in_training_alone(causal):
    module, x = make(causal=causal, dropout=0.5), torch.randn(2, 7, 12, dtype=torch.float64)
    assert torch.equal(module(x), make(causal=causal)(x))
    module.train()
    assert not torch.allclose(module(x), module(x))


def test_files_of_a_layer_lack_the_memory_and_files_of_a_model_have_it():
    module = make()
    state = to_official(module)
    assert "projected_embeddings" in state
    twin = load_official(regard.create("luna", 12, 3, memory_len=4).double(), state)
    assert torch.equal(twin.memory, module.memory)
    del state["projected_embeddings"]
    load_official(twin, state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_dim": 5}, "head_dim=5"),
        ({"num_memory_heads": 5}, "num_memory_heads=5"),
        ({"memory_len": 0}, "memory_len=0"),
        ({"causal": True, "context_dim": 8}, "context_dim=8"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RegardError, match=words):
        make(**options)


def test_wrong_calls():
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    with pytest.raises(RegardError, match="attn_mask"):
        make()(x, attn_mask=torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(RegardError, match="context"):
        make(causal=True)(x, x)
    with pytest.raises(RegardError, match="learned_memory=False"):
        make(learned_memory=False)(x)
    with pytest.raises(RegardError, match="memory"):
        make()(x, memory=torch.randn(2, 4, 11, dtype=torch.float64))
    with pytest.raises(RegardError, match="memory has batch 3"):
        make()(x, memory=torch.randn(3, 4, 12, dtype=torch.float64))
    with pytest.raises(RegardError, match="memory_mask"):
        make()(x, memory_mask=torch.ones(2, 5, dtype=torch.bool))
