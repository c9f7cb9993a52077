"""LARA: every proposal and weighing against the equations, landmarks, padding, blocks, weights."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import regard
from regard import use_impl
from regard.errors import RegardError
from regard.official import to_official
from regard.ops.importance_sampling import products
from regard.ops.linear_attention import api
from regard.parts.landmarks import segment_means, segments_present

POOLS = ["pool", "pool-mixed", "pool-vmixed", "no-param-pool", "no-param-pool-mixed", "no-param-pool-vmixed"]
KINDS = ["mis-opt", "mis-bh", "mis-biased"]


def make(**options):
    torch.manual_seed(0)
    module = regard.create("lara", 12, 3, **{"num_landmarks": 4, **options}).double().eval()
    for p in module.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return module


def heads(module, x):
    return [p(x).unflatten(2, (3, 4)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj)]


def feature(y, w):
    return y.shape[-1] ** -0.5 * (w * y).sum(-1) - y.shape[-1] ** -0.5 * y.square().sum(-1) / 2


def centres(module, q, k, v, grid):
    """Landmarks as the definition reads, for one sample; q, k, v (H, N, d)."""
    c, found = module.num_landmarks, []
    for y, name in ((q, "q_proposal"), (k, "k_proposal")):
        net = getattr(module, name, None)
        if module.proposal == "adaptive-1d":
            n0, z = y.shape[1] // c, net(y)
            sizes = [n0] * ((n0 + 1) * c - y.shape[1]) + [n0 + 1] * (y.shape[1] - n0 * c) if y.shape[1] > c else [1] * y.shape[1]
            found.append(torch.stack([part.mean(1) for part in z.split(sizes, 1)], 1))
            continue
        side = math.isqrt(c)
        z = F.adaptive_avg_pool2d(y.mT.unflatten(2, grid), side).flatten(2).mT
        if net is not None:
            z = net(z.transpose(0, 1).flatten(1)).unflatten(1, (3, 4)).transpose(0, 1) if module.pool_module == "dense" else net(z)
        found.append(z)
    qc, kc = found
    if module.proposal.endswith("mixed"):
        logits = kc.shape[-1] ** -0.5 * kc @ kc.mT
        if module.proposal.endswith("vmixed"):
            pooled = F.adaptive_avg_pool2d(v.mT.unflatten(2, grid), math.isqrt(c)).flatten(2)
            logits = logits + (pooled.norm(dim=1) + 1e-4).log()[:, None]
        kc = logits.softmax(-1) @ kc
    return qc, kc


def by_queries(module, x, grid, keys, noise):
    """Sample by sample, head by head, query by query; keys (B, N) bool."""
    out, s = [], module.head_dim**-0.5
    for b in range(x.shape[0]):
        q, k, v = (t[0] for t in heads(module, x[b : b + 1]))
        if module.proposal == "adaptive-1d":
            q, k, v = (t * keys[b][:, None] for t in (q, k, v))
        qcs, kcs = centres(module, q, k, v, grid)
        rows = []
        for h in range(3):
            qc, mu = qcs[h], qcs[h] + kcs[h]
            w, twice = mu, 1
            if noise is not None:
                e = noise[b, h] * (module.head_dim**0.25 if module.noise_std == "unbiased" else module.noise_std)
                twice = 2 if module.multisample or module.antithetic else 1
                w = torch.cat((mu, mu)) + e if module.multisample else torch.cat((mu + e, mu - e)) if module.antithetic else mu + e
            mu, qc = mu.repeat(twice, 1), qc.repeat(twice, 1)
            scores = feature(k[h][None], w[:, None]).masked_fill(~keys[b], -torch.inf)
            kv, z = scores.softmax(1) @ v[h], scores.logsumexp(1)
            p = feature(mu[None], w[:, None])
            t = (s * q[h] @ qc.T).softmax(0)
            r = feature(q[h][:, None], w[None]) + z
            if module.mis_type == "mis-opt":
                alpha = (p.softmax(1).diagonal() + module.alpha_coeff * (t - t.mean(1, keepdim=True))).clamp(min=1e-8)
                r = r + alpha.log() - p.diagonal()
            else:
                r = r - p.logsumexp(1) + (s * q[h] @ mu.T if module.mis_type == "mis-biased" else 0.0)
            rows.append(r.softmax(1) @ kv)
        out.append(torch.cat(rows, 1))
    return module.out_proj(torch.stack(out))


def agrees(module, x, grid, keys, noise):
    x = x.clone().requires_grad_()
    given = {"grid_size": grid, "noise": noise, "key_mask": keys}
    out, expected = module(x, **given), by_queries(module, x, grid, torch.ones(x.shape[:2], dtype=torch.bool) if keys is None else keys, noise)
    assert torch.allclose(out, expected, atol=1e-11)
    g, leaves = torch.randn_like(out), [x, *module.parameters()]
    found, wanted = (torch.autograd.grad(y, leaves, g, allow_unused=True, materialize_grads=True) for y in (out, expected))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(found, wanted, strict=True))
    with use_impl("reference"):
        assert torch.allclose(module(x, **given), expected, atol=1e-11)
    weights = module.weights(x, grid_size=grid, noise=noise, key_mask=keys)
    assert torch.allclose(module.out_proj((weights @ heads(module, x)[2]).transpose(1, 2).flatten(2)), expected, atol=1e-11)
    rows = torch.tensor([5, 1])
    assert torch.allclose(module.weights(x, queries=rows, grid_size=grid, noise=noise, key_mask=keys), weights[:, :, rows])


@pytest.mark.parametrize(("proposal", "mis_type"), list(itertools.product([*POOLS, "adaptive-1d"], KINDS)))
@pytest.mark.parametrize("masked", [False, True])
def test_equations_in_eval(proposal, mis_type, masked):
    module = make(proposal=proposal, mis_type=mis_type, alpha_coeff=0.7)
    keys = torch.arange(15) < torch.tensor([[15], [11]]) if masked else None
    agrees(module, torch.randn(2, 15, 12, dtype=torch.float64), (3, 5), keys, None)


@pytest.mark.parametrize(("mis_type", "twice"), list(itertools.product(KINDS, [{}, {"antithetic": True}, {"multisample": True}])))
@pytest.mark.parametrize("proposal", ["pool", "adaptive-1d"])
def test_equations_in_training(proposal, mis_type, twice):
    module = make(proposal=proposal, mis_type=mis_type, noise_std="unbiased", **twice).train()
    noise = torch.randn(2, 3, 8 if "multisample" in twice else 4, 4, dtype=torch.float64)
    agrees(module, torch.randn(2, 15, 12, dtype=torch.float64), (3, 5), None, noise)


def test_dense_nets_see_all_heads():
    module = make(pool_module="dense")
    assert module.q_proposal.linear.weight.shape == (12, 12)
    agrees(module, torch.randn(2, 15, 12, dtype=torch.float64), (3, 5), None, None)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 7, 8, 11])
def test_segments(n):
    y = torch.randn(2, 3, n, 2, dtype=torch.float64)
    count = min(n, 4)
    mask = torch.ones(2, 1, n, dtype=torch.bool)
    assert torch.allclose(segment_means(y, count, mask), segment_means(y, count, None))
    assert segments_present(mask, count).all()
    if n > 4:
        sizes = [n // 4] * ((n // 4 + 1) * 4 - n) + [n // 4 + 1] * (n % 4)
        assert torch.allclose(segment_means(y, 4, None), torch.stack([p.mean(2) for p in y.split(sizes, 2)], 2))


@pytest.mark.parametrize("n", [6, 8, 9])
def test_a_short_sequence_has_each_token_for_a_landmark(n):
    agrees(make(proposal="adaptive-1d", num_landmarks=8), torch.randn(2, n, 12, dtype=torch.float64), None, None, None)


@pytest.mark.parametrize("mis_type", KINDS)
@pytest.mark.parametrize("length", [1, 3, 6, 9])
def test_mask_pooling_makes_padding_silent(mis_type, length):
    x, keys = torch.randn(2, 11, 12, dtype=torch.float64), torch.arange(11) < torch.tensor([[length], [11]])
    scattered = torch.randperm(11)[:length].sort().values
    module = make(proposal="adaptive-1d", mis_type=mis_type, mask_pooling=True)
    alone = module(x[:1, :length])
    assert torch.allclose(module(x, key_mask=keys)[:1, :length], alone, atol=1e-11)
    with use_impl("reference"):
        assert torch.allclose(module(x, key_mask=keys)[:1, :length], alone, atol=1e-11)
    spread, holes = torch.randn(1, 11, 12, dtype=torch.float64), torch.zeros(1, 11, dtype=torch.bool)
    spread[0, scattered], holes[0, scattered] = x[0, :length], True
    assert torch.allclose(module(spread, key_mask=holes)[:, scattered], alone, atol=1e-11)
    theirs = make(proposal="adaptive-1d", mis_type=mis_type)  # with a single key every mixture is its value
    assert torch.allclose(theirs(x, key_mask=keys)[:1, :length], theirs(x[:1, :length]), atol=1e-4) == (length == 1)


@pytest.mark.parametrize("options", [{"proposal": "adaptive-1d"}, {"proposal": "adaptive-1d", "mask_pooling": True}, {"grid_size": (2, 3)}])
@pytest.mark.parametrize("mis_type", KINDS)
def test_nothing_allowed_gives_zeros_before_the_projection(options, mis_type):
    module, x = make(mis_type=mis_type, **options), torch.randn(2, 6, 12, dtype=torch.float64, requires_grad=True)
    keys = torch.tensor([[False] * 6, [True] * 6])
    out, weights = module(x, key_mask=keys, return_weights=True)
    assert torch.allclose(out[0], module.out_proj.bias.expand_as(out[0]))
    assert (weights[0] == 0).all()
    out.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("mis_type", KINDS)
def test_blocks_change_nothing(mis_type, monkeypatch):
    module = make(proposal="adaptive-1d", mis_type=mis_type, mask_pooling=True).train()
    x = torch.randn(3, 40, 12, dtype=torch.float64, requires_grad=True)
    noise, keys, results = torch.randn(3, 3, 4, 4, dtype=torch.float64), torch.rand(3, 40) > 0.3, []
    for kept in (api.KEPT, 0):
        monkeypatch.setattr(api, "KEPT", kept)
        monkeypatch.setattr(api, "BLOCK", 1)
        monkeypatch.setattr(products, "SAMPLES", kept)
        out = module(x, key_mask=keys, noise=noise)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_training_draws_and_eval_does_not():
    module, x = make(proposal="adaptive-1d", antithetic=True), torch.randn(2, 9, 12, dtype=torch.float64)
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.allclose(module(x), module(x))
    out, weights = module(x, return_weights=True)
    assert torch.allclose(module.out_proj((weights @ heads(module, x)[2]).transpose(1, 2).flatten(2)), out)
    assert torch.equal(*(module(x, generator=torch.Generator().manual_seed(1)) for _ in range(2)))


def test_names_follow_the_proposal():
    assert "q_bar_gen.2.weight" in to_official(make())
    assert "k_bar_gen.1.bias" in to_official(make(proposal="adaptive-1d"))
    assert not any("bar_gen" in key for key in to_official(make(proposal="no-param-pool")))


def test_landmarks_that_do_not_fit_are_told():
    with pytest.warns(UserWarning, match="num_landmarks=11 is no square: 9"):
        module = make(num_landmarks=11)
    with pytest.warns(UserWarning, match="smaller than its 3 x 3"):
        assert module(torch.randn(1, 8, 12, dtype=torch.float64), grid_size=(2, 4)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"proposal": "ortho"}, "proposal='ortho'"),
        ({"mask_pooling": True}, "adaptive-1d"),
        ({"proposal": "adaptive-1d", "pool_module": "dense"}, "pool_module='dense'"),
        ({"mis_type": "best"}, "mis_type='best'"),
        ({"num_landmarks": 0}, "num_landmarks=0"),
        ({"noise_std": -1.0}, "noise_std=-1.0"),
        ({"causal": True}, "causal"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RegardError, match=words):
        make(**options)


def test_wrong_calls():
    module, x = make(), torch.randn(2, 6, 12, dtype=torch.float64)
    with pytest.raises(RegardError, match="grid_size="):
        module(x)
    with pytest.raises(RegardError, match=r"\(2, 4\) does not fit 6"):
        module(x, grid_size=(2, 4))
    with pytest.raises(RegardError, match="noise must have shape"):
        module(x, grid_size=(2, 3), noise=torch.zeros(2, 3, 5, 4, dtype=torch.float64))
    with pytest.raises(RegardError, match="context"):
        module(x, x, grid_size=(2, 3))
    with pytest.raises(RegardError, match="attn_mask"):
        module(x, attn_mask=torch.ones(6, 6, dtype=torch.bool), grid_size=(2, 3))
