"""Record the parameter names and shapes of every mechanism's example in tests/params/: run it when a change of names is meant."""

import json
from pathlib import Path

from regard import registry

folder = Path(__file__).parent / "params"
folder.mkdir(exist_ok=True)
for id in registry.ids():
    module = registry.create(id, **registry.card(id).example)
    text = json.dumps({name: list(t.shape) for name, t in module.state_dict().items()}, indent=1)
    (folder / f"{id}.json").write_text(text + "\n")
