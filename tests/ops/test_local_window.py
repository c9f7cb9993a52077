"""The neighbourhood engine: every way against literal loops and against the reference, in pieces, in half precision, counted and bounded."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import RegardError, use_impl
from regard.ops import local_window
from regard.ops.local_window import (
    Window,
    blocks,
    carafe,
    flat,
    opaque,
    shifted,
    tiles,
    window_apply,
    window_attention,
    window_attention_weights,
    window_relate,
)
from regard.workbench.measure import peak_bytes

D = torch.float64


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written is NaN."""

    def poison(name: str, holder: object) -> None:
        plain = getattr(holder, name)
        monkeypatch.setattr(holder, name, lambda *a, **k: plain(*a, **k).fill_(float("nan")))

    poison("new_empty", Tensor)
    poison("empty_like", torch)


@pytest.fixture(params=["whole", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in boxes of one image, one group and one or two rows."""
    if request.param == "pieces":

        def small(sizes: tuple[int, int, int], unit: int, device: torch.device):
            for i in range(sizes[0]):
                for j in range(sizes[1]):
                    for k in range(0, sizes[2], 2):
                        yield slice(i, i + 1), slice(j, j + 1), slice(k, min(k + 2, sizes[2]))

        for module in (shifted, tiles, blocks, flat):
            monkeypatch.setattr(module, "chunks", small)


def agree(call, inputs: list[Tensor], op: str, impls: tuple[str, ...]) -> None:
    """Values and gradients of every way equal those of the reference."""

    def run(impl: str) -> list[Tensor]:
        xs = [x.clone().requires_grad_() for x in inputs]
        with use_impl(**{op: impl}):
            y = call(*xs)
        return [y, *torch.autograd.grad(y, xs, randn(*y.shape, seed=5))]

    expected = run("reference")
    for impl in impls:
        for one, other in zip(run(impl), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# batch, channels, height, width, groups, window, scale, grouping
CASES = [
    (2, 6, 7, 9, 2, Window(5), 2, "contiguous"),
    (2, 6, 7, 9, 3, Window(3, stride=2), 1, "interleaved"),
    (1, 4, 5, 11, 2, Window(3, dilation=2, padding="reflect"), 1, "contiguous"),
    (1, 4, 9, 11, 2, Window(4, stride=2, dilation=2), 1, "interleaved"),
    (2, 4, 2, 3, 1, Window(7), 3, "contiguous"),
    (1, 6, 13, 17, 3, Window(7, padding="reflect"), 1, "interleaved"),
    (1, 2, 1, 1, 1, Window(5), 2, "contiguous"),
    (1, 2, 9, 8, 1, Window(4, offset_first=-1), 1, "contiguous"),
    (1, 2, 19, 5, 1, Window(3), 2, "contiguous"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_apply_ways_agree(case: tuple, pieces: None) -> None:
    batch, channels, height, width, groups, window, scale, grouping = case
    w = randn(batch, groups, window.kernel_size**2, scale**2, -(-height // window.stride), -(-width // window.stride))
    v = randn(batch, channels, height, width, seed=1)
    impls = ("shifted", "tiles") if window.stride == window.dilation == 1 else ("shifted",)
    agree(lambda w, v: window_apply(w, v, window, groups=grouping, scale_factor=scale), [w, v], "window_apply", impls)


@pytest.mark.parametrize("impl", ["reference", "shifted", "tiles"])
def test_apply_is_the_loop(impl: str) -> None:
    x, w = randn(1, 4, 3, 4), randn(1, 2, 9, 6, 8, seed=1)
    with use_impl(window_apply=impl):
        y = carafe(x, w, 3, 2, 2)
    for c in range(4):
        for row in range(6):
            for column in range(8):
                at = [(row // 2 + i - 1, column // 2 + j - 1) for i in range(3) for j in range(3)]
                inside = [(j, i, k) for j, (i, k) in enumerate(at) if 0 <= i < 3 and 0 <= k < 4]
                expected = sum(float(w[0, c // 2, j, row, column] * x[0, c, i, k]) for j, i, k in inside)
                assert float(y[0, c, row, column]) == pytest.approx(expected, abs=1e-12)


# batch, heads, d, dv, height, width, block, halo, stride, padding
BLOCKS = [
    (2, 2, 3, 3, 8, 12, 4, 1, 1, "zero"),
    (1, 3, 4, 2, 7, 9, 4, 2, 1, "mask"),
    (2, 1, 3, 18, 8, 8, 4, 2, 2, "zero"),
    (1, 2, 17, 3, 3, 2, 7, 3, 1, "mask"),
    (1, 2, 3, 3, 5, 4, 1, 2, 1, "zero"),
    (1, 2, 3, 3, 5, 4, 2, 0, 1, "mask"),
    (1, 1, 2, 2, 1, 1, 3, 5, 1, "zero"),
    (1, 2, 3, 4, 9, 10, 2, 5, 1, "mask"),
]


def attention_inputs(case: tuple) -> list[Tensor]:
    batch, heads, d, dv, height, width, block, halo, stride, _ = case
    size = 2 * (block + 2 * halo) - 1
    q = randn(batch, heads, d, -(-height // stride), -(-width // stride))
    return [q, randn(batch, heads, d, height, width, seed=1), randn(batch, heads, dv, height, width, seed=2), randn(size, d), randn(size, d, seed=1)]


def attention_options(case: tuple) -> dict:
    *_, block, halo, stride, padding = case
    return {"window": Window(block + 2 * halo, stride, padding=padding, offset_first=-halo), "block": block, "scale": 0.3, "rel_scale": 1.7}


@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_attention_ways_agree(case: tuple, pieces: None) -> None:
    options = attention_options(case)

    def call(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return window_attention(q, k, v, rel=(rows, columns), **options)

    agree(call, attention_inputs(case), "window_attention", ("blocks", "sdpa"))


@pytest.mark.parametrize("impl", ["reference", "blocks", "sdpa"])
@pytest.mark.parametrize("case", [BLOCKS[1], BLOCKS[2]], ids=str)
def test_attention_is_the_loop(case: tuple, impl: str) -> None:
    q, k, v, rows, columns = attention_inputs(case)
    batch, heads, _, _, height, width, block, halo, stride, padding = case
    win, side = block + 2 * halo, block // stride
    with use_impl(window_attention=impl):
        out = window_attention(q, k, v, rel=(rows, columns), **attention_options(case))
    weights = window_attention_weights(q, k, rel=(rows, columns), **attention_options(case))
    for b, n, y, x in torch.cartesian_prod(*(torch.arange(size) for size in (batch, heads, *q.shape[3:]))).tolist():
        top, left = y // side * block - halo, x // side * block - halo
        logits, values = [], []
        for i in range(win):
            for j in range(win):
                inside = 0 <= top + i < height and 0 <= left + j < width
                key = k[b, n, :, top + i, left + j] if inside else torch.zeros_like(k[0, 0, :, 0, 0])
                p = q[b, n, :, y, x] @ (rows[i - y % side + win - 1] + columns[j - x % side + win - 1])
                logits.append(q[b, n, :, y, x] @ key * 0.3 + p * 1.7 if inside or padding == "zero" else torch.tensor(float("-inf"), dtype=D))
                values.append(v[b, n, :, top + i, left + j] if inside else torch.zeros_like(v[0, 0, :, 0, 0]))
        row = torch.stack(logits).softmax(0)
        torch.testing.assert_close(out[b, n, :, y, x], row @ torch.stack(values))
        torch.testing.assert_close(weights[b, n, y // side, x // side, y % side * side + x % side], row)


# batch, heads, d, dv, height, width, window, tables ("shared", "each", None), mixtures
PIXELS = [
    (2, 3, 4, 4, 7, 9, Window(3), "shared", None),
    (1, 2, 3, 5, 8, 5, Window(4), "each", 3),
    (1, 2, 2, 2, 9, 11, Window(3, stride=2, dilation=2, padding="mask"), "shared", None),
    (2, 1, 3, 2, 2, 3, Window(7, padding="mask"), "shared", None),
    (1, 4, 1, 1, 5, 6, Window(5), "each", None),
    (1, 2, 3, 3, 9, 10, Window(4, padding="mask"), None, 2),
    (1, 2, 3, 17, 10, 13, Window(5, padding="mask"), None, None),
    (1, 2, 3, 3, 1, 1, Window(3), "shared", None),
    (1, 1, 2, 3, 6, 7, Window(3, dilation=2, padding="reflect"), "shared", None),
    (2, 2, 2, 2, 5, 8, Window(2, stride=3, offset_first=0), None, None),
    (1, 2, 3, 3, 9, 4, Window(4, offset_first=-1), "shared", None),
]


def pixel_inputs(case: tuple) -> tuple[list[Tensor], dict]:
    batch, heads, d, dv, height, width, window, tables, mixtures = case
    q = randn(batch, heads, d, *(-(-n // window.stride) for n in (height, width)))
    size = (window.kernel_size, d) if tables == "shared" else (heads, window.kernel_size, d)
    inputs = [q, randn(batch, heads, d, height, width, seed=1), randn(batch, heads, (mixtures or 1) * dv, height, width, seed=2)]
    inputs += [randn(*size, seed=3), randn(*size, seed=4)] if tables else []
    inputs += [randn(mixtures, window.kernel_size**2, seed=5)] if mixtures else []
    return inputs, {"window": window, "scale": 0.7, "rel_scale": 1.3}


def pixel_call(case: tuple, options: dict):
    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        rel = (rest[0], rest[1]) if case[7] else None
        return window_attention(q, k, v, rel=rel, mix=rest[-1] if case[8] else None, **options)

    return call


@pytest.mark.parametrize("case", PIXELS, ids=str)
def test_pixel_ways_agree(case: tuple, pieces: None) -> None:
    inputs, options = pixel_inputs(case)
    window = case[6]
    plain = window.stride == window.dilation == 1 and window.padding != "reflect" and case[8] is None
    impls = ("shifted", *(("sdpa",) if plain else ()), *(("blocks",) if plain and case[7] != "each" else ()))
    agree(pixel_call(case, options), inputs, "window_attention", impls)


@pytest.mark.parametrize("case", [PIXELS[1], PIXELS[2], PIXELS[3]], ids=str)
def test_pixel_attention_is_the_loop(case: tuple) -> None:
    inputs, options = pixel_inputs(case)
    (batch, heads, _, _, height, width, window, tables, mixtures), (q, k, v, rows, columns, *mix) = case, inputs
    out = pixel_call(case, options)(*inputs)
    weights = window_attention_weights(q, k, rel=(rows, columns), **options)
    values, parts = v.unflatten(2, (mixtures or 1, -1)), mix[0] if mix else torch.ones(1, window.kernel_size**2, dtype=D)
    for b, n, y, x in torch.cartesian_prod(*(torch.arange(size) for size in (batch, heads, *q.shape[3:]))).tolist():
        logits, seen = [], []
        for i in range(window.kernel_size):
            for j in range(window.kernel_size):
                a, c = (window.stride * at + window.dilation * (o - window.kernel_size // 2) for at, o in ((y, i), (x, j)))
                inside = 0 <= a < height and 0 <= c < width
                row, column = ((t if tables == "shared" else t[n]) for t in (rows, columns))
                p = 1.3 * (q[b, n, :, y, x] @ (row[i] + column[j]))
                if inside:
                    p = p + 0.7 * (q[b, n, :, y, x] @ k[b, n, :, a, c])
                elif window.padding == "mask":
                    p = torch.tensor(float("-inf"), dtype=D)
                logits.append(p)
                mixed = parts[:, i * window.kernel_size + j] @ values[b, n, :, :, a, c] if inside else torch.zeros(values.shape[3], dtype=D)
                seen.append(mixed)
        expected = torch.stack(logits).softmax(0)
        torch.testing.assert_close(weights[b, n, :, y, x], expected)
        torch.testing.assert_close(out[b, n, :, y, x], expected @ torch.stack(seen))


@pytest.mark.parametrize("op", ["product", "squared", "absolute"])
@pytest.mark.parametrize(
    "window",
    [
        Window(3),
        Window(7, padding="mask"),
        Window(4, stride=2, padding="mask"),
        Window(3, stride=2, dilation=2),
        Window(3, padding="reflect"),
        Window(2, stride=3),
    ],
    ids=str,
)
@pytest.mark.parametrize(("height", "width"), [(7, 9), (5, 2)])
def test_relate_ways_agree(op: str, window: Window, height: int, width: int, pieces: None) -> None:
    q = randn(2, 3, 2, -(-height // window.stride), -(-width // window.stride))
    k = randn(2, 3, 2, height, width, seed=1)
    agree(lambda q, k: window_relate(q, k, window, op, scale=0.6).clamp(min=-1e3), [q, k], "window_relate", ("shifted",))


@pytest.mark.parametrize("impl", ["reference", "shifted", "blocks", "sdpa"])
def test_what_is_masked_never_wins(impl: str) -> None:
    """Every logit on the map is -3000, far below any mask of moderate size."""
    q, v = (torch.ones(1, 1, 3, 4, 5) for _ in range(2))
    with use_impl(window_attention=impl):
        torch.testing.assert_close(window_attention(q, -1e3 * q, v, Window(5, padding="mask"), scale=1.0), v)


@pytest.mark.parametrize("op", ["product", "squared", "absolute"])
def test_relate_of_what_is_masked_has_no_gradient(op: str) -> None:
    inputs, found = [randn(1, 2, 3, 4, 5, seed=s).requires_grad_() for s in range(2)], {}
    for impl in ("reference", "shifted"):
        with use_impl(window_relate=impl):
            logits = window_relate(*inputs, Window(3, padding="mask"), op)
        found[impl] = torch.autograd.grad(logits, inputs, randn(*logits.shape, seed=2))
    torch.testing.assert_close(found["shifted"], found["reference"])


def test_relate_is_the_loop() -> None:
    q, k = randn(1, 1, 2, 2, 3), randn(1, 1, 2, 4, 6, seed=1)
    found = {op: window_relate(q, k, Window(3, stride=2, padding="mask"), op, scale=2.0) for op in ("product", "squared", "absolute")}
    for y, x, i, j in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 3, 3))).tolist():
        a, c, one = 2 * y + i - 1, 2 * x + j - 1, q[0, 0, :, y, x]
        inside = 0 <= a < 4 and 0 <= c < 6
        other = k[0, 0, :, a, c] if inside else one
        expected = {"product": one @ other, "squared": -(one - other).square().sum(), "absolute": -(one - other).abs().sum()}
        for op, logits in found.items():
            assert float(logits[0, 0, 3 * i + j, y, x]) == pytest.approx(2 * float(expected[op]) if inside else float("-inf"))


def test_opaque_operators_keep_their_contract() -> None:
    w, v = randn(2, 2, 9, 4, 4, 3).requires_grad_(), randn(2, 2, 3, 4, 3).requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for way in ("shifted", "tiles"):
        torch.library.opcheck(torch.ops.regard.window_apply.default, (w, v, 3, 1, 1, -1, 2, way), test_utils=checks)
        torch.autograd.gradcheck(lambda w, v, way=way: opaque.window_apply(w, v, 3, 1, 1, -1, 2, way), (w, v), fast_mode=True)
    q, k, u = (randn(1, 2, 3, 4, 5, seed=s).requires_grad_() for s in range(3))
    rel = randn(2 * (4 + 2 - 1), 3).requires_grad_()
    torch.library.opcheck(torch.ops.regard.window_attention.default, (q, k, u, rel, 4, 2, -1, 0.5, True), test_utils=checks)
    torch.autograd.gradcheck(lambda *x: opaque.window_attention(*x, 4, 2, -1, 0.5, True), (q, k, u, rel), fast_mode=True)


@pytest.mark.parametrize("blocked", [False, True])
def test_pixel_operators_keep_their_contract(blocked: bool) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    q, k = (randn(1, 2, 3, 4, 5, seed=s).requires_grad_() for s in range(2))
    v, rel, mix = randn(1, 2, 4, 4, 5, seed=2).requires_grad_(), randn(1, 6, 3).requires_grad_(), None if blocked else randn(2, 9).requires_grad_()
    options = (3, 1, 1, -1, 0.5, True, blocked)
    torch.library.opcheck(torch.ops.regard.pixel_attention.default, (q, k, v, rel, mix, *options), test_utils=checks)
    torch.library.opcheck(torch.ops.regard.pixel_attention.default, (q, k, v, None, None, *options), test_utils=checks)
    given = [x for x in (q, k, v, rel, mix) if x is not None]
    torch.autograd.gradcheck(lambda *x: opaque.pixel_attention(*x[:4], x[4] if len(x) > 4 else None, *options), given, fast_mode=True)
    for op in ("product", "squared", "absolute"):
        torch.library.opcheck(torch.ops.regard.window_relate.default, (q, k, op, 3, 1, 1, -1, 0.5, False), test_utils=checks)
        torch.autograd.gradcheck(lambda q, k, op=op: opaque.window_relate(q, k, op, 3, 1, 1, -1, 0.5, False), (q, k), fast_mode=True)


@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [False, True])
def test_all_ways_compile_whole(dynamic: bool) -> None:
    q, k, v = (randn(1, 2, 3, 6, 7, seed=s).requires_grad_() for s in range(3))
    tables = randn(3, 3).requires_grad_(), randn(3, 3, seed=1).requires_grad_()

    def call(q: Tensor, k: Tensor, v: Tensor, *rel: Tensor) -> Tensor:
        return window_attention(q, k, v, Window(3), rel=rel) + window_relate(q, k, Window(3, padding="zero"), "squared").softmax(2).sum((2,), True)

    inputs = (q, k, v, *tables)
    expected = call(*inputs)
    found = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*inputs)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("impl", ["shifted", "tiles"])
def test_half_precision_sums_in_single(impl: str) -> None:
    """49 summands of one sign: sums kept in bfloat16 would be off by 1e-2."""
    w, v = randn(1, 1, 49, 1, 9, 9).abs().bfloat16(), randn(1, 8, 9, 9).abs().bfloat16()
    with use_impl(window_apply="reference"):
        expected = window_apply(w.float(), v.float(), Window(7))
    with use_impl(window_apply=impl):
        y = window_apply(w, v, Window(7))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=5e-3, atol=1e-2)


@pytest.mark.parametrize("op", ["product", "squared", "absolute", "attention"])
def test_half_precision_rounds_once(op: str, pieces: None) -> None:
    """Values and gradients are those in float32, rounded to bfloat16 (2**-8) at the end; logits stay in float32."""
    q, k, v = (randn(1, 2, 3, 9, 8, seed=s).bfloat16() for s in range(3))
    inputs = [q, k] if op != "attention" else [q, k, v, *(randn(5, 3, seed=s).bfloat16() for s in range(2)), randn(3, 25).bfloat16()]
    window, name = Window(5, padding="mask" if op == "attention" else "zero"), "window_attention" if op == "attention" else "window_relate"

    def run(impl: str, inputs: list[Tensor]) -> list[Tensor]:
        xs = [x.clone().requires_grad_() for x in inputs]
        with use_impl(**{name: impl}):
            y = window_attention(*xs[:3], window, rel=(xs[3], xs[4]), mix=xs[5]) if op == "attention" else window_relate(*xs, window, op)
        assert y.dtype == (xs[0].dtype if op == "attention" else torch.float32)
        return [y, *torch.autograd.grad(y, xs, randn(*y.shape, seed=5).bfloat16().to(y.dtype))]

    for one, other in zip(run("shifted", inputs), run("reference", [x.float() for x in inputs]), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=4e-3, atol=1e-5)


@pytest.mark.parametrize(("groups", "kernel"), [(8, 7), (4, 5)])
def test_memory_of_apply_is_bounded(groups: int, kernel: int) -> None:
    """Forward and backward grow by less than 4 times weights and values together, results included."""
    w, v = randn(2, groups, kernel**2, 1, 56, 56, dtype=torch.float32), randn(2, groups, 8, 56, 56, dtype=torch.float32)

    def both() -> object:
        y = shifted.forward(w, v, kernel, 1, 1, -(kernel // 2), 1)
        return y, shifted.backward(y, w, v, kernel, 1, 1, -(kernel // 2), 1)

    assert peak_bytes(both, w.device) < 4 * 4 * (w.numel() + v.numel())


def test_no_temporary_is_large() -> None:
    """At 112 x 112, 256 channels, where a copy of all windows would be 300 MB: nothing above 32 MB, and little besides the results."""
    q, k, v = (randn(1, 8, 32, 112, 112, seed=s, dtype=torch.float32) for s in range(3))
    rel = randn(38, 32, dtype=torch.float32)
    assert peak_bytes(lambda: blocks.forward(q, k, v, rel, 13, 7, -3, 0.2, False, False), q.device) < 4 * v.numel() + 24 * 2**20


def test_choice_is_told() -> None:
    def chosen(**options) -> str:
        module = regard.create("carafe", **options)
        from regard.ops._dispatch import explain

        return explain(module, torch.zeros(1, options["channels"], 3, 3))[0].impl

    assert chosen(channels=32, compressed_channels=4) == "tiles"
    assert chosen(channels=32, compressed_channels=4, up_group=4) == "shifted"
    assert chosen(channels=32, compressed_channels=4, scale_factor=1) == "shifted"


def test_cost_is_counted() -> None:
    w, v = torch.empty(2, 2, 25, 4, 6, 7, device="meta"), torch.empty(2, 6, 6, 7, device="meta")
    with FlopCounterMode(display=False) as counter:
        window_apply(w.requires_grad_(), v, Window(5), scale_factor=2).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 25 * 2 * 6 * 4 * 42


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: carafe(randn(1, 4, 3, 3), randn(1, 9, 6, 5), 3), "weights must be"),
        (lambda: carafe(randn(1, 4, 3, 3), randn(1, 9, 6, 6), 4), "up_kernel=4"),
        (lambda: carafe(randn(1, 4, 3, 3), randn(1, 27, 6, 6), 3, 3), "up_group=3"),
        (lambda: carafe(randn(1, 4, 3, 3), randn(1, 9, 6, 6), 3, 1, 2.0), "scale_factor=2.0"),  # type: ignore[arg-type]
        (lambda: window_apply(randn(1, 1, 25, 2, 2), randn(1, 4, 2, 2), Window(5, padding="reflect")), "longer than 2"),
        (lambda: window_apply(randn(1, 1, 25, 2, 2), randn(1, 4, 2, 2), Window(3)), "weights must be"),
        (lambda: Window(0), "kernel_size=0"),
        (lambda: Window(3, padding="wrap"), "padding='wrap'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_calls(call, text: str) -> None:
    with pytest.raises(RegardError, match=text):
        call()


def test_public_names() -> None:
    assert set(local_window.__all__) >= {"Window", "carafe", "window_apply", "window_attention", "window_attention_weights", "window_relate"}
