"""The report, the table and the plots, on an invented comparison and on the awkward cases."""

import html
import json
import math
import os
import random
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from regard.errors import RegardError
from regard.workbench.plots import write_plots
from regard.workbench.report import render, write_report
from regard.workbench.summary import (
    AttentionPicture,
    CandidateSummary,
    Cost,
    CurvePoint,
    Estimate,
    Machine,
    Summary,
    TaskFacts,
    TrialResult,
)
from regard.workbench.table import COLUMNS, bytes_text, conclusion, count_text, estimate_text, labels, table, time_text

LENGTHS, COST_LENGTHS, SEEDS = (256, 1024), (128, 256, 512, 1024, 2048), (0, 1, 2)
MACHINE = Machine("AMD EPYC 7B13", 8, 4, 31.3, "cpu", "3.11.9", "2.13.0", "0.1.0", "a1b2c3d", 212.0, 18.5)
TASK = TaskFacts(
    "listops",
    "ListOps",
    "Nested lists of digits with MAX, MIN, MEDIAN and SUM; the answer is a digit.",
    "generated from the grammar of arXiv:1804.06028, embedded",
    "accuracy",
    "Share of held-out expressions whose digit is right",
    True,
    0.1,
    "Classifier: 4 layers, width 64, 4 heads, mean over positions",
)
HOSTILE = '</script><script>alert(1)</script>"><img src=x onerror=alert(2)>'


def fake_candidate(
    name: str, accuracy: float, base: float, exponent: float, *, rng: random.Random, **more: object
) -> tuple[CandidateSummary, list[TrialResult]]:
    """A candidate whose figures follow simple laws with some noise, and its trainings."""
    trials, score, speed = [], {}, {}
    for length in LENGTHS:
        final = [accuracy - 0.02 * (length == 1024) + rng.gauss(0, 0.006) for _ in SEEDS]
        rate = 3000 / base * (256 / length) ** exponent
        for seed, value in zip(SEEDS, final, strict=True):
            steps = [50 * k for k in range(1, 25)]
            curve = tuple(
                CurvePoint(
                    step,
                    step * 32,
                    step * 32 / rate * (1 + 0.03 * seed),
                    2.3 - (2.3 - 1.2) * (1 - math.exp(-step / 350)) + rng.gauss(0, 0.02),
                    0.1 + (value - 0.1) * (1 - math.exp(-step / 300)) + rng.gauss(0, 0.006),
                )
                for step in steps
            )
            trials.append(TrialResult(name, length, seed, "ok", "", value, 1200, rate * (1 + rng.gauss(0, 0.01)), curve))
        score[length] = Estimate(sum(final) / 3, 4.303 * (max(final) - min(final)) / 1.7 / math.sqrt(3), tuple(final))
        speed[length] = Estimate(rate, rate * 0.02, (rate, rate, rate))
    costs = []
    for length in COST_LENGTHS:
        ms = base * (length / 256) ** exponent * (1 + rng.gauss(0, 0.03)) + 0.6
        flops = 3.1e8 * base * (length / 256) ** exponent
        costs.append(
            Cost(
                name,
                length,
                8,
                ms,
                ms * 0.97,
                ms * 1.06,
                flops,
                int(2.4e6 * base * (length / 256) ** exponent),
                flops / 6.1e8,
                ms / (flops / 6.1e8),
            )
        )
    fields = {
        "name": name,
        "id": name.split(":")[0],
        "title": name.split(":")[0].split(".")[0].replace("_", " ").capitalize() + " attention",
        "paper": "",
        "checked_against": "authors",
        "options": {},
        "parameters": 213_450,
        "score": score,
        "examples_per_second": speed,
        "costs": tuple(costs),
        "time_exponent": exponent * 0.94,
        "memory_exponent": exponent * 0.97,
        "flops_exponent": exponent,
        "crossover_length": None,
        "cannot": (),
        "failures": (),
    }
    return CandidateSummary(**{**fields, **more}), trials  # pyright: ignore[reportArgumentType]


def fake_summary() -> Summary:
    """A comparison such as `regard compare` makes: six candidates, three seeds, two lengths."""
    rng = random.Random(3)
    made = [
        fake_candidate("multi_head", 0.392, 5.0, 1.9, rng=rng, paper="Vaswani et al., Attention Is All You Need, NeurIPS 2017, arXiv:1706.03762"),
        fake_candidate(
            "luna:memory_len=32",
            0.388,
            3.9,
            1.02,
            rng=rng,
            paper="Ma et al., Luna, NeurIPS 2021, arXiv:2106.01540",
            options={"memory_len": 32},
            crossover_length=256,
            cannot=("attn_mask", "step"),
            parameters=231_002,
        ),
        fake_candidate(
            "linformer:k=64",
            0.361,
            3.1,
            1.0,
            rng=rng,
            crossover_length=128,
            cannot=("causal", "attn_mask", "step"),
            checked_against="public",
        ),
        fake_candidate("performer", 0.352, 4.4, 1.05, rng=rng, crossover_length=512, cannot=("weights", "attn_mask"), checked_against="equations"),
        fake_candidate(
            "none", 0.301, 1.1, 0.98, rng=rng, title="No attention: every position alone", id=None, checked_against="", crossover_length=128
        ),
        fake_candidate(
            "my_package.attention:MyVeryLongClass:num_heads=4,causal=True",
            0.377,
            4.1,
            1.45,
            rng=rng,
            id=None,
            checked_against="",
            crossover_length=1024,
            cannot=("no_mask: it takes no mask of any kind, so padded positions take part", "weights"),
            options={"num_heads": 4, "causal": True},
        ),
    ]
    size = 48
    soft = [[math.exp(-abs(r - c) / (3 + r / 8)) + 0.2 * (c % 7 == 0) for c in range(size)] for r in range(size)]
    weights = tuple(tuple(v / sum(row) for v in row) for row in soft)
    disc = tuple(tuple(max(0.0, 1 - math.hypot(r - 15, c - 12) / 14) for c in range(32)) for r in range(32))
    around = tuple(tuple(math.exp(-((r - 15) ** 2 + (c - 12) ** 2) / 90) for c in range(32)) for r in range(32))
    return Summary(
        title="multi_head, luna, linformer and others on ListOps",
        command="regard compare multi_head luna:memory_len=32 linformer:k=64 performer none "
        "my_package.attention:MyVeryLongClass:num_heads=4,causal=True --task listops --lengths 256,1k --seeds 3",
        started="2026-03-01T12:30:00+00:00",
        seconds=1843.0,
        task=TASK,
        machine=MACHINE,
        lengths=LENGTHS,
        cost_lengths=COST_LENGTHS,
        seeds=SEEDS,
        budget="1,200 steps of 32 examples",
        candidates=tuple(candidate for candidate, _ in made),
        trials=tuple(trial for _, trials in made for trial in trials),
        pictures=(
            AttentionPicture("multi_head", "Layer 2, head 1: [MAX 2 9 [MIN 4 7] 0]; each row a query, each column a key.", weights),
            AttentionPicture("luna:memory_len=32", "Layer 2: the pixels that the marked one looks at.", around, disc),
        ),
    )


def awkward_summary() -> Summary:
    """Twelve candidates, a hostile name, lower is better, sides of maps, one seed, missing and failed figures, no pictures."""
    rng = random.Random(5)
    nan = math.nan
    made = [fake_candidate(f"candidate_{k}", 1.9 + 0.02 * k, 4 + 0.1 * k, 1 + k / 12, rng=rng) for k in range(9)]
    made.append(fake_candidate(HOSTILE, 1.95, 5.0, 1.5, rng=rng, id=None, title="<b>bold</b>", checked_against=HOSTILE, cannot=(HOSTILE,)))
    made.append(fake_candidate("a.b:Same:a_long_option_name=1", 1.93, 5.0, 1.5, rng=rng))
    candidates = [
        replace(c, score={n: Estimate(e.mean, None, e.values[:1]) for n, e in c.score.items()}, time_exponent=nan if k == 2 else c.time_exponent)
        for k, (c, _) in enumerate(made)
    ]
    bad = tuple(Cost("failing", n, 8, nan, nan, nan, nan, 0, nan, nan, "out of memory: <8 GiB & counting>") for n in COST_LENGTHS)
    failing = replace(
        candidates[0],
        name="failing",
        score={},
        examples_per_second={},
        costs=bad,
        time_exponent=None,
        memory_exponent=None,
        flops_exponent=None,
        failures=("length 1024 seed 0: not a number in the loss </script>", "it also warned"),
    )
    task = replace(TASK, title="Text8", metric="bits per byte", higher_is_better=False, chance=8.0, length_name="side")
    trials = [t for _, several in made for t in several if t.seed == 0]
    trials.append(
        TrialResult("failing", 1024, 0, "failed", "not a number in the loss </script>", None, 120, None, (CurvePoint(50, 1600, 3.0, nan, nan),))
    )
    return replace(
        fake_summary(),
        task=task,
        seeds=(0,),
        candidates=(*candidates, failing),
        trials=tuple(trials),
        pictures=(),
        notes=("One seed only.",),
    )


def single(summary: Summary) -> Summary:
    """One candidate, one length, one seed."""
    c = summary.candidates[0]
    c = replace(c, score={256: Estimate(0.4, None, (0.4,))}, costs=c.costs[1:2], time_exponent=None, memory_exponent=None, flops_exponent=None)
    trials = tuple(t for t in summary.trials if (t.candidate, t.length, t.seed) == (c.name, 256, 0))
    return replace(summary, candidates=(c,), lengths=(256,), cost_lengths=(256,), seeds=(0,), trials=trials, pictures=())


def nothing(summary: Summary) -> Summary:
    """Every training failed and nothing was measured."""
    candidates = tuple(replace(c, score={}, examples_per_second={}, costs=(), failures=("it broke",)) for c in summary.candidates)
    return replace(summary, candidates=candidates, trials=(), pictures=())


CASES = {
    "usual": fake_summary,
    "awkward": awkward_summary,
    "single": lambda: single(fake_summary()),
    "nothing": lambda: nothing(fake_summary()),
    "no candidates": lambda: replace(fake_summary(), candidates=(), trials=(), pictures=()),
}


def embedded(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="summary">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_written(case: str, tmp_path: Path) -> None:
    summary = CASES[case]()
    path = write_report(summary, tmp_path / "out")
    assert path == tmp_path / "out" / "report.html"
    page = path.read_text()
    assert page.count("<script") == page.count("</script>") == 3
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    for width in (100, 140):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        with console.file:
            console.print(table(summary, width))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        for candidate in summary.candidates:
            assert labels(summary)[candidate.name][:12] in text


@pytest.mark.parametrize("case", ["awkward", "single", "nothing"])
def test_plots_are_written(case: str, tmp_path: Path) -> None:
    pictures = write_plots(CASES[case](), tmp_path)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["accuracy_latency.png", "curves.png", "growth.png"]


def test_plots_without_matplotlib_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RegardError, match=r"pip install 'regard\[bench\]'"):
        write_plots(fake_summary(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_page_loads_nothing() -> None:
    page = render(fake_summary())
    for tag, address in re.findall(r"<(\w+)[^>]*?(?:src|href)\s*=\s*[\"']?([^\"' >]+)", page):
        assert (tag == "a" and address.startswith("https://arxiv.org/abs/")) or address.startswith("data:"), (tag, address)
    assert "@import" not in page and not re.search(r"url\(|fetch\(|XMLHttpRequest", page)


def test_hostile_texts_are_escaped() -> None:
    page = render(awkward_summary())
    assert "<script>alert" not in page and "<img" not in page and "<b>bold" not in page
    assert html.escape("</script><script>alert(1)") in page
    assert embedded(page)["candidates"][9]["name"] == HOSTILE


def test_embedded_numbers_are_the_summary() -> None:
    summary = fake_summary()
    data = embedded(render(summary))
    for candidate, read in zip(summary.candidates, data["candidates"], strict=True):
        assert {int(n): e["mean"] for n, e in read["score"].items()} == {n: e.mean for n, e in candidate.score.items()}
        assert [c["latency_ms"] for c in read["costs"]] == [c.latency_ms for c in candidate.costs]
        assert [c["peak_bytes"] for c in read["costs"]] == [c.peak_bytes for c in candidate.costs]
    assert data["trials"][0]["curve"][0]["loss"] == summary.trials[0].curve[0].loss
    assert embedded(render(awkward_summary()))["candidates"][-1]["costs"][0]["latency_ms"] is None


def test_everything_is_defined() -> None:
    summary = fake_summary()
    page = render(summary)
    for key in [*(column.key for column in COLUMNS), "cannot", "checked", "accuracy", "growth", "curves", "pictures"]:
        text = re.search(rf'data-define="{key}"><dt>(.+?)</dt><dd>(.+?)</dd>', page, re.DOTALL)
        assert text and len(text[2]) > 30 and "{" not in text[2], key
    reading = page[page.index('id="candidates"') :]
    for candidate in summary.candidates:
        assert f"<code>{html.escape(candidate.name)}</code>" in reading
    assert html.escape(summary.command) in reading and MACHINE.cpu in reading and MACHINE.torch in reading
    assert 'href="https://arxiv.org/abs/1706.03762"' in reading


def scores(summary: Summary, *values: tuple[float, float | None]) -> Summary:
    candidates = tuple(
        replace(c, score={256: Estimate(mean, half, (mean,) if half is None else (mean,) * 3)})
        for c, (mean, half) in zip(summary.candidates, values, strict=False)
    )
    return replace(summary, candidates=candidates, lengths=(256,))


def test_conclusion_is_honest_about_noise() -> None:
    summary = fake_summary()
    clear = conclusion(scores(summary, (0.5, 0.01), (0.4, 0.01)))
    assert "`multi_head` is best" in clear and "beyond the 95 % intervals" in clear and "a batch" in clear
    assert conclusion(scores(summary, (0.5, 0.06), (0.4, 0.06))).startswith("No difference in accuracy beyond the noise of 3 seeds")
    partly = conclusion(scores(summary, (0.5, 0.01), (0.49, 0.01), (0.3, 0.01)))
    assert "no different beyond the noise of 3 seeds from `luna:memory_len=32`" in partly and "`luna:memory_len=32` is the fastest of them" in partly
    assert "one seed cannot tell" in conclusion(scores(summary, (0.5, None), (0.4, None)))
    assert conclusion(scores(summary, (0.11, 0.02), (0.1, 0.02))).startswith("No candidate is better than chance (0.1")
    assert "better than chance" not in conclusion(scores(summary, (0.5, 0.6), (0.4, 0.01)))
    lower = replace(summary, task=replace(TASK, metric="bits per byte", higher_is_better=False, chance=8.0))
    assert "`luna:memory_len=32` is best" in conclusion(scores(lower, (1.5, 0.01), (1.4, 0.01)))
    assert "nothing to compare" in conclusion(nothing(summary))
    failed = scores(summary, (0.5, 0.01), (0.4, 0.01))
    failed = replace(failed, candidates=(*failed.candidates, replace(failed.candidates[0], name="mine", score={})))
    assert conclusion(failed).endswith("`mine` did not finish.")


def test_numbers_have_units_and_sensible_digits() -> None:
    assert [time_text(v) for v in (0.0123, 0.85, 0.99999, 12.34, 999.9, 1500)] == [
        "12.3 µs",
        "850 µs",
        "1.00 ms",
        "12.3 ms",
        "1.00 s",
        "1.50 s",
    ]
    assert [count_text(v) for v in (7, 213_450, 999_999, 1.5e9)] == ["7", "213 k", "1.00 M", "1.50 G"]
    assert [bytes_text(v) for v in (512, 1024, 3 * 2**20)] == ["512 B", "1.00 KiB", "3.00 MiB"]
    assert estimate_text(Estimate(0.41234, 0.0119, ())) == "0.412 ± 0.012"
    assert estimate_text(Estimate(0.41234, 0.0001, ())) == "0.412 ± <0.001"
    assert estimate_text(Estimate(41.234, None, ())) == "41.23"


def test_short_names_differ() -> None:
    summary = fake_summary()
    twins = [replace(summary.candidates[0], name=f"pkg.one:A_class_with_a_long_name:option_number={k}") for k in range(3)]
    short = labels(replace(summary, candidates=tuple(twins)))
    assert len(set(short.values())) == 3 and all(len(text) <= 26 for text in short.values())
    assert labels(summary)["multi_head"] == "multi_head"


def test_interrupted_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(single(fake_summary()), tmp_path)
    before = path.read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(fake_summary(), tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_in_a_browser(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or "/usr/bin/chromium"
    if not Path(chromium).exists():
        pytest.skip("no chromium on this machine")
    arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    errors: list[str] = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=arguments)
        try:
            for number, case in enumerate(CASES[name] for name in ("usual", "awkward", "nothing")):
                page = browser.new_page(viewport={"width": 400, "height": 800})
                page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
                page.on("pageerror", lambda error: errors.append(str(error)))
                page.on("request", lambda request: errors.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
                page.goto(write_report(case(), tmp_path / str(number)).as_uri())
                assert page.evaluate("document.documentElement.scrollWidth") <= 400, "the page scrolls sideways on a phone"
                page.close()
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto((tmp_path / "0" / "report.html").as_uri())
            names = "() => [...document.querySelectorAll('#results [data-length]:not([hidden]) tbody code')].map(n => n.textContent)"
            assert page.evaluate(names)[0] in ("multi_head", "luna:memory_len=32")
            page.click("#results [data-length='1024'] th[data-key=latency] button")
            assert page.evaluate(names)[0] == "none" and page.evaluate(names)[-1] == "multi_head"
            page.click("#results [data-length='1024'] th[data-key=latency] button")
            assert page.evaluate(names)[0] == "multi_head"
            assert "training step" in page.text_content("#metric-plot")
            page.click("#curves-bar button[data-value=seconds]")
            assert "seconds of training" in page.text_content("#metric-plot")
            page.click("#results-bar button[data-value='2048']")
            assert page.is_visible("#results [data-length='2048']") and not page.is_visible("#results [data-length='1024']")
            page.locator("#accuracy-plot").scroll_into_view_if_needed()
            # The event of this scrolling, which hides the tooltip, comes a frame later.
            page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            box = page.locator("#accuracy-plot path.mark").first.bounding_box()
            page.mouse.move(box["x"] + 4, box["y"] + 4)
            assert "quartiles" in page.text_content("#tip") and page.is_visible("#tip")
        finally:
            browser.close()
    assert not errors
