"""The replay of golden files can fail, and says why."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from regard.errors import RegardError
from regard.testing.goldens import find, verify, verify_file

GOLDENS = Path(__file__).parent / "goldens"
GOOD = GOLDENS / "multi_head" / "self_plain.safetensors"


def rewritten(path: Path, *, tensors=None, meta=None, drop=(), source: Path = GOOD) -> Path:
    """A copy of a golden file with some tensors or metadata changed."""
    with safe_open(source, "pt") as file:
        kept = {k: file.get_tensor(k) for k in file.keys() if k not in drop}  # noqa: SIM118
        old = file.metadata()
    save_file({**kept, **(tensors or {})}, path, {k: v for k, v in {**old, **(meta or {})}.items() if v is not None})
    return path


def load(name: str, source: Path = GOOD) -> torch.Tensor:
    with safe_open(source, "pt") as file:
        return file.get_tensor(name)


def test_good_file_agrees() -> None:
    verdict = verify_file(GOOD)
    assert verdict.ok
    assert verdict.outputs is not None and 0 < verdict.outputs < 2e-5
    assert verdict.gradients is not None and 0 < verdict.gradients < 1e-4


@pytest.mark.parametrize("name", ["output", "grad.x", "grad_state.in_proj_weight"])
def test_wrong_number_fails(tmp_path: Path, name: str) -> None:
    t = load(name).clone()
    t.view(-1)[3] += 1e-3 * t.abs().max()
    verdict = verify_file(rewritten(tmp_path / "x.safetensors", tensors={name: t}))
    assert not verdict.ok
    assert "off by" in verdict.error


def test_wrong_statistics_fail(tmp_path: Path) -> None:
    source = GOLDENS / "cbam" / "train.safetensors"
    name = "after.SpatialGate.spatial.bn.running_var"
    verdict = verify_file(rewritten(tmp_path / "x.safetensors", tensors={name: load(name, source) * 1.01}, source=source))
    assert not verdict.ok
    assert verdict.statistics is not None and verdict.statistics > 1e-3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"meta": {"id": "no_such"}}, "no mechanism 'no_such'"),
        ({"meta": {"kwargs": None}}, "lacks ['kwargs']"),
        ({"meta": {"kwargs": json.dumps({"dim": 24, "num_heads": 5})}}, "not divisible"),
        ({"meta": {"kwargs": json.dumps({"dim": 24, "num_heads": 4, "part": "head"})}}, "has no part 'head'"),
        ({"drop": ("state.out_proj.bias",)}, "out_proj.bias"),
        ({"drop": ("output",)}, "holds no output"),
    ],
)
def test_what_does_not_apply_says_why(tmp_path: Path, change: dict, said: str) -> None:
    verdict = verify_file(rewritten(tmp_path / "x.safetensors", **change))
    assert not verdict.ok
    assert said in verdict.error


def test_part_of_a_system_is_skipped(tmp_path: Path) -> None:
    kwargs = {"meta": {"kwargs": json.dumps({"component": "generator"})}}
    verdict = verify_file(rewritten(tmp_path / "x.safetensors", **kwargs))
    assert verdict.ok and verdict.skipped and "'generator'" in verdict.error
    assert verdict.outputs is None
    assert not verify_file(GOOD).skipped


def test_broken_file_is_a_verdict(tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not a tensor")
    assert "not a readable safetensors file" in verify_file(path).error


def test_find_takes_files_and_folders(tmp_path: Path) -> None:
    shutil.copy(GOOD, tmp_path / "one.safetensors")
    assert len(find([tmp_path, tmp_path / "one.safetensors"])) == 1
    assert next(verify([tmp_path])).ok
    with pytest.raises(RegardError, match="does not exist"):
        find([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RegardError, match="holds no"):
        find([tmp_path / "empty"])
