"""The layers hold, and the contract would notice if they did not."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINT = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]


def test_layers_hold() -> None:
    done = subprocess.run(LINT, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_planted_imports_are_caught(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src" / "regard", tmp_path / "regard", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    (tmp_path / "regard" / "ops" / "planted.py").write_text("from ..registry import create\n")
    with (tmp_path / "regard" / "mechanisms" / "sequence" / "multi_head.py").open("a") as file:
        file.write("\nfrom ..channel import se\n")
    done = subprocess.run(LINT, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path), "PATH": ""})
    assert done.returncode == 1
    assert "Layers: each imports only what stands below it BROKEN" in done.stdout
    assert "Mechanisms do not import one another BROKEN" in done.stdout


def test_local_mechanisms_cut_no_windows_themselves() -> None:
    """Their windows are those of ops/local_window and ops/deform: no copy of a neighbourhood, no gather, no sampling stands in their files."""
    files = [file for file in (ROOT / "src" / "regard" / "mechanisms" / "local").glob("*.py") if file.name != "__init__.py"]
    assert len(files) == 7
    for file in files:
        text = file.read_text()
        assert "ops.local_window import" in text, file.name
        own = [word for word in (".unfold(", "F.unfold", "nn.Unfold", "as_strided", "grid_sample", ".gather(", ".roll(") if word in text]
        assert not own, (file.name, own)


def test_linear_layers_are_those_that_are_fast_on_the_cpu() -> None:
    folder = ROOT / "src" / "regard"
    spared = {"parts/weight_norm.py"}  # only its start values are used
    files = [*folder.glob("mechanisms/**/*.py"), *folder.glob("parts/**/*.py")]
    plain = {str(file.relative_to(folder)) for file in files if "nn.Linear(" in file.read_text()}
    assert len(files) > 100 and plain <= spared, plain - spared
