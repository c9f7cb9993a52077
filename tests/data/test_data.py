"""The data are what they claim: repeatable, disjoint, balanced, answerable."""

import re

import pytest
import torch

from regard.data.batch import IGNORE, FixedData
from regard.data.digits import digits
from regard.data.listops import listops, spell
from regard.data.mqar import mqar
from regard.data.shapes import CLASSES, shapes
from regard.data.source import SourceWindows, corpus
from regard.errors import RegardError


def rows(x: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in x}


@pytest.mark.parametrize(
    "make",
    [
        lambda: listops(24, train=60, test=30),
        lambda: mqar(32, pairs=4, train=60, test=30),
        lambda: shapes(16, train=12, test=6),
        digits,
        lambda: digits(tokens=True),
    ],
    ids=["listops", "mqar", "shapes", "digits", "digits tokens"],
)
def test_same_seed_same_data_and_nothing_on_both_sides(make) -> None:
    one, two = make(), make()
    for side in ("train", "test"):
        a, b = getattr(one, side), getattr(two, side)
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    assert not rows(one.train.x) & rows(one.test.x)
    drawn = [data.draw(8, torch.Generator().manual_seed(3)).x for data in (one, two)]
    assert torch.equal(*drawn)


def test_source_splits_by_file_and_balances_packages() -> None:
    found = corpus()
    assert not set(found.train_files) & set(found.test_files)
    assert len(found.classes) == 8
    for package in found.classes:
        assert any(name.startswith(f"{package}/") for name in found.test_files)
    data = SourceWindows(64, test_per_class=8)
    assert data.test.y.bincount().tolist() == [8] * 8
    assert data.test.y[:16].bincount().tolist() == [2] * 8, "a prefix must be balanced too: curves are read on one"
    batch = data.draw(2000, torch.Generator().manual_seed(0))
    assert batch.y.bincount().min() > 180
    assert torch.equal(batch.x, data.draw(2000, torch.Generator().manual_seed(0)).x)


def test_source_windows_come_from_their_side() -> None:
    data = SourceWindows(200, test_per_class=4)
    batch = data.draw(40, torch.Generator().manual_seed(1))
    for x, y in zip(batch.x, batch.y, strict=True):
        text = x.to(torch.uint8).numpy().tobytes()
        assert text in data.corpus.train[int(y)].numpy().tobytes()
    for x, y in zip(data.test.x, data.test.y, strict=True):
        assert x.to(torch.uint8).numpy().tobytes() in data.corpus.test[int(y)].numpy().tobytes()


def test_language_model_targets_are_the_next_bytes() -> None:
    batch = SourceWindows(32, language_model=True).draw(4, torch.Generator().manual_seed(0))
    assert batch.x.shape == batch.y.shape == (4, 32)
    assert torch.equal(batch.x[:, 1:], batch.y[:, :-1])


def test_digits_keep_their_shares() -> None:
    data = digits()
    assert len(data.train) + len(data.test) == 1797
    assert data.test.y.bincount().min() >= 43 and data.test.y.bincount().max() <= 46
    tokens = digits(tokens=True)
    assert torch.equal(tokens.test.x.float() / 16, data.test.x.flatten(1))


def read_back(text: str) -> int:
    """Evaluate by rewriting the innermost list again and again: another way than the generator's."""
    pattern = re.compile(r"\[(MIN|MAX|MED|SM)((?: \d)+) \]")
    while match := pattern.search(text):
        values = [int(word) for word in match[2].split()]
        match match[1]:
            case "MIN":
                value = min(values)
            case "MAX":
                value = max(values)
            case "SM":
                value = sum(values) % 10
            case _:
                import statistics

                value = int(statistics.median(values))
        text = text[: match.start()] + str(value) + text[match.end() :]
    return int(text)


def test_listops_answers_agree_with_another_evaluator() -> None:
    data = listops(60, train=150, test=50, seed=5)
    both = [(x, y) for part in (data.train, data.test) for x, y in zip(part.x, part.y, strict=True)]
    assert all(read_back(spell(x.tolist())) == int(y) for x, y in both)
    lengths = torch.cat((data.train.key_mask, data.test.key_mask)).sum(1)
    assert lengths.min() >= 15 and lengths.max() <= 60
    assert bool(((data.train.x != 0) == data.train.key_mask).all())
    assert len({int(y) for _, y in both}) == 10


def test_mqar_every_query_has_its_answer_before_it() -> None:
    data = mqar(32, pairs=4, vocabulary=32, train=50, test=20)
    for x, y in zip(data.test.x.tolist(), data.test.y.tolist(), strict=True):
        queries = [place for place, value in enumerate(y) if value != IGNORE]
        assert len(queries) == 4 and all(place >= 8 for place in queries)
        for place in queries:
            assert x[x.index(x[place]) + 1] == y[place], "the value stands right after the key's first appearance"
            assert x.index(x[place]) < 8


def test_shapes_have_every_class_and_other_photographs_in_the_test() -> None:
    from regard.data.shapes import TEST_PHOTOS, TRAIN_PHOTOS

    data = shapes(16, train=600, test=10)
    assert not set(TRAIN_PHOTOS) & set(TEST_PHOTOS)
    share = data.train.y.flatten().bincount(minlength=len(CLASSES)) / data.train.y.numel()
    assert (share > 0.01).all() and share[0] > 0.5
    assert data.train.x.min() >= 0 and data.train.x.max() <= 1
    # Colour is no shortcut: a sprite's mean brightness lies about where the background's does.
    grey = data.train.x.mean(1)
    means = torch.stack([grey[data.train.y == kind].mean() for kind in range(1, len(CLASSES))])
    assert (means.max() - means.min()) < 0.1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mqar(31), "length=31"),
        (lambda: mqar(16, pairs=8), "at least 32"),
        (lambda: mqar(64, pairs=8, vocabulary=8), "vocabulary=8"),
        (lambda: listops(4), "5 <= shortest"),
        (lambda: shapes(8), "side=8"),
        (lambda: SourceWindows(10**9), "length=1000000000"),
    ],
)
def test_wrong_sizes_are_said(call, words: str) -> None:
    with pytest.raises(RegardError, match=words):
        call()


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(RegardError, match="pip install"):
        digits()


def test_draw_is_with_replacement_from_training_only() -> None:
    data = mqar(32, pairs=4, train=10, test=5)
    assert isinstance(data, FixedData)
    assert rows(data.draw(100, torch.Generator().manual_seed(0)).x) <= rows(data.train.x)
