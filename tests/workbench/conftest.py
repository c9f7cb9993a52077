from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The toys can be imported, and the cache of speeds is the test's own."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
