"""Real bytes without a download: the Python source of the interpreter's own packages.

A file belongs wholly to training or wholly to test, by the hash of its name; files of equal content are kept once. Windows are cut anywhere in
the files of one package and one side, laid one after another, so that every window is full and neither length nor padding tells the package.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import require
from .batch import Batch

PREFERRED = (
    "asyncio", "email", "encodings", "idlelib", "importlib", "multiprocessing", "unittest", "xml",
    "tkinter", "ctypes", "concurrent", "http", "json", "logging", "urllib", "wsgiref",
)  # fmt: skip
NUM_CLASSES = 8
TEST_EVERY = 4  # every fourth file, in the order of the hashes of their names, is a test file
SMALLEST = 60_000  # bytes a package must have to be a class
VOCABULARY = 256


@dataclass(frozen=True)
class Corpus:
    """Bytes by class and side. `train[c]`, `test[c]`: (bytes,) uint8; `files`: the names on each side."""

    classes: tuple[str, ...]
    train: tuple[Tensor, ...]
    test: tuple[Tensor, ...]
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]


@cache
def corpus(root: str | None = None) -> Corpus:
    """Read the packages below `root` (the standard library by default), the first `NUM_CLASSES` of `PREFERRED` that are there and
    large enough."""
    base = Path(root or sysconfig.get_paths()["stdlib"])
    found: list[tuple[str, list[tuple[str, bytes]]]] = []
    seen: set[bytes] = set()
    for package in PREFERRED:
        files = _read(base, package, seen)
        if len(files) >= TEST_EVERY and sum(len(content) for _, content in files) >= SMALLEST:
            found.append((package, files))
        if len(found) == NUM_CLASSES:
            break
    require(
        len(found) >= 2,
        "task 'source': {} holds the source of {} packages, at least 2 are needed; use a Python that ships its standard library as .py files",
        base,
        len(found),
    )
    sides: dict[bool, list[Tensor]] = {False: [], True: []}
    names: dict[bool, list[str]] = {False: [], True: []}
    for _, files in found:
        for side in (False, True):
            mine = [file for place, file in enumerate(files) if (place % TEST_EVERY == TEST_EVERY - 1) is side]
            text = b"\n".join(content for _, content in mine)
            sides[side].append(torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy()))
            names[side] += [name for name, _ in mine]
    return Corpus(tuple(name for name, _ in found), tuple(sides[False]), tuple(sides[True]), tuple(names[False]), tuple(names[True]))


def _read(base: Path, package: str, seen: set[bytes]) -> list[tuple[str, bytes]]:
    """(name, content) of the package's modules, without its tests, in the order of the hashes of their names."""
    paths = [p for p in sorted((base / package).rglob("*.py")) if not any("test" in part for part in p.relative_to(base / package).parts[:-1])]
    files = []
    for path in paths:
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if len(content) >= 200 and digest not in seen:
            seen.add(digest)
            files.append((path.relative_to(base).as_posix(), content))
    return sorted(files, key=lambda file: hashlib.sha256(file[0].encode()).digest())


def _cut(stream: Tensor, starts: Tensor, length: int) -> Tensor:
    """(len(starts), length) int64 windows of a stream."""
    return stream[starts[:, None] + torch.arange(length)].long()


class SourceWindows:
    """Which package is this window of bytes from? `x` (B, length) bytes, `y` (B,) the package's index, balanced in training and test.

    With `language_model=True` the targets are the next bytes instead: `y` (B, length).

    Args:
        length: bytes in a window.
        test_per_class: held-out windows of each package, evenly spaced over its test files.
    """

    def __init__(self, length: int, *, test_per_class: int = 64, language_model: bool = False, root: str | None = None) -> None:
        self.corpus = corpus(root)
        self.length, self.language_model = length, language_model
        self.span = length + language_model
        shortest = min(len(stream) for stream in (*self.corpus.train, *self.corpus.test))
        require(length >= 4, "length={} is too short for windows of source; use at least 4", length)
        require(
            self.span <= shortest,
            "length={} is longer than the smallest package's test files ({} bytes); use a shorter one",
            length,
            shortest,
        )
        classes = range(len(self.corpus.classes))
        windows = [_cut(s, torch.linspace(0, len(s) - self.span, test_per_class).long(), self.span) for s in self.corpus.test]
        # Interleaved, so that the first windows alone are balanced too.
        x = torch.stack(windows, dim=1).flatten(0, 1)
        self.test = self._batch(x, torch.tensor(list(classes)).repeat(test_per_class))

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        labels = torch.randint(len(self.corpus.classes), (size,), generator=generator)
        places = torch.rand(size, generator=generator, dtype=torch.float64)
        rows = []
        for label, place in zip(labels.tolist(), places.tolist(), strict=True):
            stream = self.corpus.train[label]
            start = int(place * (len(stream) - self.span + 1))
            rows.append(stream[start : start + self.span])
        return self._batch(torch.stack(rows).long(), labels)

    def _batch(self, windows: Tensor, labels: Tensor) -> Batch:
        return Batch(windows[:, :-1], windows[:, 1:]) if self.language_model else Batch(windows, labels)
