"""What cannot work is said before any work, with the value and the way out."""

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from regard.errors import RegardError
from regard.workbench import speeds
from regard.workbench.compare import CompareConfig, compare, plan
from regard.workbench.config import Budget, parse_budget, parse_options, split_name


def make(*candidates: str, task: str = "digits", **more) -> CompareConfig:
    return CompareConfig(candidates or ("none",), task, **{"out": Path("unused"), "budget": "2steps", **more})


def test_words_are_read() -> None:
    assert split_name("luna:memory_len=32,mode=mean") == ("luna", {"memory_len": 32, "mode": "mean"})
    assert split_name("my.pkg:Mine:sizes=(1, 2),deep=True") == ("my.pkg:Mine", {"sizes": (1, 2), "deep": True})
    assert parse_options("a='x,y',b=1e-3", "c") == {"a": "x,y", "b": 1e-3}
    assert parse_budget("1.5m") == Budget(90, "s") and parse_budget("500steps") == Budget(500, "steps")
    assert Budget(20000, "ex").steps(64, 1.0) == 313
    assert Budget(60, "s").steps(64, 0.01234) == 4900, "rounded to two significant digits"
    assert Budget(1, "s").steps(64, 5.0) == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (make("nothing_like_it"), "no mechanism 'nothing_like_it'"),
        (make("none", "none"), "given twice"),
        (make("none:a=1"), "takes no options"),
        (make("multi_head:heads=3", task="source"), "num_heads"),
        (make("toys:Nobody"), "Nobody.*Gate"),
        (make("no_such_package:X"), "no_such_package"),
        (make("toys:Gate:wrong=1"), "wrong"),
        (make("toys:Halves"), "same shape"),
        (make("toys:Looks", task="source_lm"), "later tokens"),
        (make("multi_head", task="shapes"), "over maps; multi_head .sequence. cannot sit there"),
        (make(task="nonsense"), "there are source"),
        (make(task="source:dimm=3"), "unknown options"),
        (make(task="source:dim=0"), "dim=0"),
        (make(task="digits:layout=ring"), "layout='ring'"),
        (make(lengths=(16,)), "length"),
        (make(task="mqar", lengths=(16,)), "pairs=8"),
        (make(budget="soon"), "budget='soon'"),
        (make(budget="1.5steps"), "whole"),
        (make(seeds=0), "seeds=0"),
        (make(batch_size=0), "batch_size=0"),
        (make(device="tpu"), "device='tpu'"),
        (make(cost_lengths=()), "cost_lengths"),
    ],
)
def test_wrong_calls_are_said(config: CompareConfig, words: str) -> None:
    with pytest.raises(RegardError, match=words):
        plan(config)


def test_choices_follow_the_candidates() -> None:
    assert plan(make("toys:Gate")).host == "map"
    tokens = plan(make("multi_head"))
    assert tokens.host == "tokens" and tokens.lengths == (64,) and tokens.cost_lengths == (64, 128, 256)
    assert plan(make("none", task="source", lengths=(64, 128))).cost_lengths == (64, 128, 256, 512)


def test_an_unwritable_folder_is_said_before_training(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RegardError, match="cannot be written"):
        compare(make(out=blocked / "run"), Console(quiet=True))


def test_an_existing_run_needs_resume(tmp_path: Path) -> None:
    (tmp_path / "results.db").write_text("")
    with pytest.raises(RegardError, match="--resume"):
        compare(make(out=tmp_path), Console(quiet=True))


def test_speeds_survive_a_bad_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds.remember("a", 0.5)
    speeds.remember("b", 0.25)
    assert speeds.recall("a") == 0.5 and speeds.recall("b") == 0.25
    speeds.path().write_text("{")
    assert speeds.recall("a") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    speeds.remember("a", 0.5)
    assert speeds.recall("a") is None


def test_import_is_light() -> None:
    code = "import sys, regard.workbench.compare; print([m for m in ('matplotlib', 'sklearn', 'skimage', 'scipy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
