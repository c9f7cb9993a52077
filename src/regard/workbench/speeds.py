"""Speeds of steps that this machine has shown before: they make a budget in seconds the same number of steps every time.

They are kept in `$XDG_CACHE_HOME/regard/plans.json` (`~/.cache` by default). A cache that cannot be read or written is no error: the speed is
then measured again.
"""

import json
import os
from pathlib import Path
from typing import Any

from ..files import write_whole


def path() -> Path:
    """Where the speeds are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regard" / "plans.json"


def recall(key: str) -> float | None:
    """Seconds a step remembered under this key."""
    value = _read().get(key)
    return float(value) if isinstance(value, int | float) and value > 0 else None


def remember(key: str, seconds_per_step: float) -> None:
    """Keep a speed; silently not, where the folder cannot be written."""
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        write_whole(path(), json.dumps({**_read(), key: seconds_per_step}, indent=1, sort_keys=True))
    except OSError:
        return


def _read() -> dict[str, Any]:
    try:
        found = json.loads(path().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
