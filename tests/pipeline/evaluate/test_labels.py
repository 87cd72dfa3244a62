"""Labels of two sets as one numbering, and the sets that have none."""

from pathlib import Path

import pytest

from data_shards.errors import UserError
from data_shards.index import ShardSet
from data_shards.pack import Source
from data_shards.removed import Removed, read_removed, remove
from pipeline.evaluate.labels import read_labels
from tests.photos import write_tiles
from tests.pipeline.evaluate.sets import labelled, packed


def shards_with(folder: Path, labels: list[str | None]) -> ShardSet:
    files = sorted(write_tiles(folder / "photos", len(labels)).glob("*/*.jpg"))
    sources = [Source(str(file), name=file.name, label=label) for file, label in zip(files, labels, strict=True)]
    return packed(folder / "set", sources)


def whole(shards: ShardSet) -> tuple[ShardSet, Removed]:
    """With what was removed of it."""
    return shards, read_removed(shards)


def test_numbers_stand_for_the_names_of_the_images_in_both_sets(tmp_path: Path) -> None:
    bank, held_out = labelled(tmp_path, 60)
    labels = read_labels(whole(bank), whole(held_out))
    assert labels.names == [f"photo-{n}" for n in range(6)]
    for shards, numbers in ((bank, labels.bank), (held_out, labels.held_out)):
        assert [labels.names[number] for number in numbers] == shards.table()["label"].to_pylist()


def test_removed_images_have_no_number_and_take_their_class_along(tmp_path: Path) -> None:
    bank = shards_with(tmp_path, ["a", "b", "c", "a", "b"])
    found = bank.table()["label"].to_pylist().index("c")
    remove(bank, [bank.table()["key"].to_pylist()[found]], force=True)
    labels = read_labels(whole(bank), whole(bank))
    assert labels.names == ["a", "b"]
    assert [n for n, number in enumerate(labels.bank) if number < 0] == [found]


@pytest.mark.parametrize("gone", ["bank", "held_out"])
def test_a_set_of_which_every_image_was_removed_is_refused(tmp_path: Path, gone: str) -> None:
    sets = {name: shards_with(tmp_path / name, ["a", "b", "a"]) for name in ("bank", "held_out")}
    remove(sets[gone], sets[gone].table()["key"].to_pylist(), force=True)
    with pytest.raises(UserError, match=f"{gone}/set: all its images were removed"):
        read_labels(**{name: whole(shards) for name, shards in sets.items()})


@pytest.mark.parametrize(
    ("bank", "held_out", "said"),
    [
        (["a", "b", None, None], ["a"], r"bank/set: 2 of 4 images have no label"),
        (["a", "b"], [None], r"held/set: 1 of 1 images have no label"),
        (["a", "a"], ["a"], r"its images have one label, 'a'; telling them apart needs two"),
        (["a", "b"], ["a", "dog", "cow", "dog"], r"held/set: 2 of its labels are none of .*bank/set's \('(dog|cow)'\)"),
    ],
)
def test_sets_that_cannot_be_asked_about_are_refused_in_words(
    tmp_path: Path, bank: list[str | None], held_out: list[str | None], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        read_labels(whole(shards_with(tmp_path / "bank", bank)), whole(shards_with(tmp_path / "held", held_out)))
