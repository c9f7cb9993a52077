from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The toys can be imported, and the cache of speeds is the test's own; matplotlib keeps its own, building one takes seconds."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
