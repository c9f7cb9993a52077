"""The command line: output, JSON, exit codes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import regard
from regard.cli import main, parse_options
from regard.errors import RegardError

GOLDENS = Path(__file__).parent / "goldens"


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("list", "show", "cite", "check", "verify", "compare", "new"))


def test_list_and_its_filters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)] == regard.ids()
    assert main(["list", "--layout", "sequence", "--causal", "--linear", "--json"]) == 0
    found = [row["id"] for row in json.loads(capsys.readouterr().out)]
    assert found == regard.ids(layout="sequence", can=("causal", "linear")) and "multi_head" not in found
    assert main(["list", "--mask", "--family", "sets"]) == 0
    assert "set_transformer" in capsys.readouterr().out


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "multi_head"]) == 0
    out = capsys.readouterr().out
    assert "Attention Is All You Need" in out and "num_heads" in out
    assert main(["show", "multi_head", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["paper"]["year"] == 2017


def test_unknown_id_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "multi_haed"]) == 2
    assert "did you mean 'multi_head'" in capsys.readouterr().err


def test_cite(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cite", "multi_head", "se"]) == 0
    assert capsys.readouterr().out.count("@inproceedings") == 2


def test_check_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "multi_head", "--only", "any_size", "--json"]) == 0
    assert {row["status"] for row in json.loads(capsys.readouterr().out)} == {"pass"}
    assert main(["check", "regard.testing.mutants.tokens:MasksValuesOnly", "--only", "padding_invariance"]) == 1
    assert "FAIL padding_invariance" in capsys.readouterr().out
    assert main(["check", "multi_head", "--only", "no_such_check"]) == 2
    assert main(["check", "no.such.module:Class"]) == 2


def test_check_of_a_plain_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Mine(nn.Module):\n"
        "    def __init__(self, dim, scale=1.0):\n"
        "        super().__init__(); self.f = nn.Linear(dim, dim); self.scale = scale\n"
        "    def forward(self, x):\n"
        "        return x + self.scale * self.f(x).softmax(1).mean(1, keepdim=True)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["check", "mine:Mine", "--options", "dim=8,scale=2.0", "--only", "batch_permutation", "gradcheck_in_float64"]) == 0
    assert main(["check", "mine:Nothing"]) == 2
    assert "no nn.Module class 'Nothing'" in capsys.readouterr().err


def test_verify_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(GOLDENS / "multi_head"), "--json"]) == 0
    assert all(row["ok"] for row in json.loads(capsys.readouterr().out))
    (tmp_path / "bad.safetensors").write_bytes(b"12345678")
    assert main(["verify", str(tmp_path), str(GOLDENS / "multi_head" / "self_plain.safetensors")]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "1 of 2 agree" in out
    assert main(["verify", str(tmp_path / "nowhere")]) == 2


def test_verify_counts_what_it_skips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = {"id": "sagan", "case": "generator", "kwargs": json.dumps({"component": "generator"}), "mode": "eval"}
    save_file({"output": torch.zeros(1)}, tmp_path / "generator.safetensors", meta)
    assert main(["verify", str(tmp_path), str(GOLDENS / "multi_head" / "self_plain.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "skip" in out and "1 of 1 agree" in out and "1 skipped" in out
    assert main(["verify", str(tmp_path)]) == 1  # nothing was replayed


@pytest.mark.parametrize(("layout", "name"), [("sequence", "my_idea"), ("set", "my_bag"), ("map", "my_gate")])
def test_new_writes_a_mechanism_that_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", name, "--layout", layout]) == 0
    kind = "".join(part.capitalize() for part in name.split("_"))
    assert main(["check", f"{name}:{kind}"]) == 0
    assert main(["new", name, "--layout", layout]) == 2
    assert main(["new", "Not-A-Name", "--layout", layout]) == 2


def test_options_are_literals() -> None:
    assert parse_options("dim=32,norm=None,mode=soft,pools=('avg', 'max')") == {"dim": 32, "norm": None, "mode": "soft", "pools": ("avg", "max")}
    with pytest.raises(RegardError, match="key=value"):
        parse_options("dim 32")
