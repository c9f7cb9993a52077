"""Performer: every feature map against its equations, the life of the projection, steps, masks, blocks."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official
from regard.ops.linear_attention import api

MAPS = [
    {"feature_map": "favor+"},
    {"feature_map": "favor+", "eps": 1e-2, "eps_inside_ratio": False, "per_head_features": True},
    {"feature_map": "favor+", "eps": 0.0, "normalize_qk": True},
    {"feature_map": "relu", "rope": True},
    {"feature_map": "relu", "num_features": 0},
    {"feature_map": "relu", "kernel_fn": F.softplus, "eps": 1e-2},
    {"feature_map": "trig", "per_head_features": True, "denom_min": 1e-3},
    {"feature_map": "softmax"},
]


def make(**options):
    torch.manual_seed(0)
    module = regard.create("performer", 12, 2, **{"num_features": 10, **options} if options.get("feature_map") != "softmax" else options)
    return module.double().eval()


def features(module, y, query, causal, mask):
    """phi as defined, one head at a time; mask (M,) leaves keys out of every maximum."""
    d, kind, out = y.shape[-1], module.feature_map, []
    for b in range(y.shape[0]):
        for h in range(y.shape[1]):
            z = y[b, h] * d**-0.25
            real = torch.ones(len(z), dtype=torch.bool) if query else mask[b]
            w = None if module.projection is None else module.projection if module.projection.ndim == 2 else module.projection[h]
            half = z.square().sum(-1, keepdim=True) / 2
            if kind == "softmax":
                raw = y[b, h]
                phi = raw.softmax(-1) if query else raw.exp() if causal else raw.masked_fill(~real[:, None], -math.inf).softmax(0)
            elif kind == "relu":
                phi = (module.kernel_fn or F.relu)(z if w is None else z @ w.T) + module.eps
            elif kind == "favor+":
                p = z @ w.T
                c = (p.amax(-1, keepdim=True) if query else p[real].max()).detach()
                e = (p - half - c).exp()
                phi = (e + module.eps) / len(w) ** 0.5 if module.eps_inside_ratio else e / len(w) ** 0.5 + module.eps
            else:
                e = (half - half[real].max().detach()).exp()
                phi = e * torch.cat(((z @ w.T).sin(), (z @ w.T).cos()), -1) / len(w) ** 0.5
            out.append(phi if query else phi * real[:, None])
    return torch.stack(out).unflatten(0, y.shape[:2])


def by_pairs(module, q, k, v, mask):
    fq, fk = features(module, q, True, module.causal, mask), features(module, k, False, module.causal, mask)
    pairs = fq @ fk.mT
    total = pairs.sum(-1, keepdim=True)
    if module.causal:
        pairs = pairs.tril()
        total = pairs.sum(-1, keepdim=True) + 1e-6 * fq.sum(-1, keepdim=True)
    total = total if module.denom_min is None else total.clamp_min(module.denom_min)
    return pairs @ v / total


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", MAPS, ids=str)
def test_equals_its_equations_in_value_and_gradient(options, causal):
    module = make(causal=causal, **options)
    q, k, v = (torch.randn(2, 2, 70, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.rand(2, 70) > 0.3
    mask[:, 0] = True
    out, expected = module.attend(q, k, v, key_mask=mask), by_pairs(module, q, k, v, mask)
    assert torch.allclose(out, expected, atol=1e-11)
    g = torch.randn_like(out)
    for ours, theirs in zip(torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(expected, (q, k, v), g), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)


def test_masked_keys_leave_the_maximum():
    """All projections negative: a masked key counted as zero would be the largest, and be felt through eps."""
    module = make(eps=0.1)
    module.projection.copy_(-module.projection.abs())
    q, k, v = (torch.rand(2, 2, 9, 6, dtype=torch.float64) + 1 for _ in range(3))
    mask = torch.arange(9).expand(2, 9) < 6
    assert torch.allclose(module.attend(q, k, v, key_mask=mask), module.attend(q, k[:, :, :6], v[:, :, :6]), atol=1e-12)


@pytest.mark.parametrize("options", MAPS, ids=str)
def test_a_step_ends_the_sequence_so_far(options):
    """`step` gives what the module gives the prefix, exactly; its state is plain tensors that a file can hold."""
    module, x = make(causal=True, **options), torch.randn(2, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        state = module.init_state(2)
        for t in range(9):
            state = type(state)(**load(save({n: s.contiguous() for n, s in state._asdict().items()})))
            out, state = module.step(x[:, t], state)
            assert torch.allclose(out, module(x[:, : t + 1])[:, -1], atol=1e-10)


@pytest.mark.parametrize("options", [m for m in MAPS if m["feature_map"] in ("relu", "softmax")], ids=str)
def test_maps_without_a_shared_maximum_keep_the_prefix_exactly(options):
    module, x = make(causal=True, **options), torch.randn(2, 80, 12, dtype=torch.float64)
    with torch.no_grad():
        whole = module(x)
        for t in (1, 7, 64, 65):
            assert torch.allclose(module(x[:, :t]), whole[:, :t], atol=1e-12)


def test_favor_prefix_differs_by_about_eps():
    """The authors' maximum over all keys lets later keys be felt through eps: small, and there."""
    module, x = make(causal=True), torch.randn(2, 40, 12, dtype=torch.float64)
    with torch.no_grad():
        off = (module(x)[:, :5] - module(x[:, :5])).abs().max().item()
    assert 1e-9 < off < 1e-3


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [*MAPS[:2], {"learnable_features": True}, MAPS[6]], ids=str)
def test_blocks_change_nothing(monkeypatch, options, causal):
    module, x = make(causal=causal, **options), torch.randn(3, 33, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 33) > 0.3
    results = []
    for block in (api.BLOCK, 1):
        monkeypatch.setattr(api, "BLOCK", block)
        out = module(x, key_mask=mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_weights_are_the_implied_matrix():
    module, x = make(feature_map="relu", causal=True), torch.randn(2, 9, 12, dtype=torch.float64)
    out, weights = module(x, return_weights=True)
    v = module.v_proj(x).unflatten(2, (2, 6)).transpose(1, 2)
    assert torch.allclose(module.out_proj((weights @ v).transpose(1, 2).flatten(2)), out)
    assert (weights.triu(1) == 0).all()


def test_projection_lives_as_documented():
    module, x = make(redraw_interval=2), torch.randn(1, 4, 12, dtype=torch.float64)
    first = module.projection.clone()
    for _ in range(5):
        module(x)  # eval never redraws
    module.train()
    seen = []
    for _ in range(5):
        module(x)
        seen.append(module.projection.clone())
    same = [torch.equal(a, b) for a, b in zip([first, *seen], seen, strict=False)]
    assert same == [True, True, False, True, False]
    module.redraw(torch.Generator().manual_seed(3))
    again = module.projection.clone()
    module.redraw(torch.Generator().manual_seed(3))
    assert torch.equal(module.projection, again)
    assert not make(learnable_features=True, redraw_interval=1).train()(x).isnan().any()
    kept = make(learnable_features=True, redraw_interval=1).train()
    before = kept.projection.clone()
    kept(x), kept(x)
    assert torch.equal(kept.projection, before)
    with pytest.raises(RegardError, match="no projection"):
        make(feature_map="softmax").redraw()


def test_recomputation_keeps_the_projection_of_its_forward():
    """A checkpointed layer whose redraw falls due inside the backward pass would otherwise get wrong gradients."""
    module, x = make(redraw_interval=1).train(), torch.randn(1, 4, 12, dtype=torch.float64, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    before = module.projection.clone()
    out.sum().backward()
    assert torch.equal(module.projection, before)


def test_compiles_in_training_across_redraws():
    module, x = make(redraw_interval=1).train(), torch.randn(1, 4, 12, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        first = compiled(x)
        assert torch.equal(compiled(x), first)
        module.redraw()
        assert not torch.allclose(compiled(x), first)


@pytest.mark.parametrize("scaling", [0, 1])
def test_projection_rows_are_orthogonal_in_blocks(scaling):
    w = regard.create("performer", 16, 2, num_features=20, ortho_scaling=scaling).projection
    unit = w / w.norm(dim=1, keepdim=True)
    for block in unit.split(8):
        assert torch.allclose(block @ block.T, torch.eye(len(block)), atol=1e-5)
    if scaling:
        assert torch.allclose(w.norm(dim=1), torch.full((20,), 8**0.5))
    assert not torch.allclose(unit[:8] @ unit[8:16].T, torch.eye(8), atol=0.1)
    assert regard.create("performer", 256).num_features == int(32 * math.log(32)) == 110


def test_projection_of_one_call():
    module, x, w = make(), torch.randn(1, 4, 12, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    out = module(x, projection=w)
    assert not torch.allclose(out, module(x))
    assert torch.allclose(module(x, projection=w.expand(2, -1, -1)), out)
    with pytest.raises(RegardError, match="projection"):
        module(x, projection=w[:, :5])


@pytest.mark.parametrize("naming", [keymap.name for keymap in regard.registry.get("performer").official])
def test_namings(naming):
    module = make(per_head_features=True, qkv_bias=True)
    state = to_official(module, naming)
    twin = load_official(make(per_head_features=True, qkv_bias=True, ortho_scaling=1), state)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True))
    load_official(make(feature_map="softmax", qkv_bias=True), state)  # its projection has no use there


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"feature_map": "elu"}, "feature_map"),
        ({"num_features": 0}, "num_features=0"),
        ({"kernel_fn": F.relu}, "kernel_fn"),
        ({"redraw_interval": 0}, "redraw_interval=0"),
        ({"ortho_scaling": 2}, "ortho_scaling=2"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RegardError, match=words):
        regard.create("performer", 12, 2, **options)


def test_wrong_calls():
    x = torch.randn(1, 4, 12)
    with pytest.raises(RegardError, match="attn_mask"):
        regard.create("performer", 12, 2)(x, attn_mask=torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(RegardError, match="causal"):
        regard.create("performer", 12, 2, causal=True)(x, torch.randn(1, 5, 12))
    with pytest.raises(RegardError, match="causal=True"):
        regard.create("performer", 12, 2).init_state(1)
