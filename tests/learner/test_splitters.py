"Splits are partitions, the same for the same seed; classes keep their shares, and never validate as a whole."

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.data.labels import parent_label, read_table
from learner.data.splitters import (
    SPLIT,
    Splitter,
    at_random,
    automatic,
    by_table,
    grandparent,
    listed,
    make_splitter,
    stratified,
    where,
)
from learner.errors import UsageError

# Sizes of classes, of which one at least has two images, so that one of them can validate.
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=8).filter(lambda each: max(each) > 1)
fractions = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**31)


def names_of(counts: Sequence[int]) -> list[str]:
    "Names in folders c0, c1 ..., so many in each."
    return sorted(f"c{label}/{i:03}.jpg" for label, n in enumerate(counts) for i in range(n))


def never(name: str) -> str:
    "A labeller for splitters that must not ask."
    raise AssertionError(f"asked for the label of {name}")


def chosen(splitter: Splitter, names: Sequence[str], get_y=never) -> tuple[list[str], list[str]]:
    "The names that train and those that validate."
    train, valid = splitter(names, get_y)
    return [names[i] for i in train], [names[i] for i in valid]


@given(sizes, fractions, seeds, st.sampled_from([at_random, stratified]))
def test_a_random_split_is_an_ordered_partition_that_its_seed_decides(counts, fraction, seed, make) -> None:
    names = names_of(counts)
    train, valid = chosen(make(fraction, seed), names, parent_label)
    assert sorted(train + valid) == names and train == sorted(train) and valid == sorted(valid) and valid
    assert chosen(make(fraction, seed), names, parent_label) == (train, valid)


@given(sizes, fractions, seeds, st.sampled_from([at_random, stratified]))
def test_every_class_has_an_image_to_train_on(counts, fraction, seed, make) -> None:
    train, _ = chosen(make(fraction, seed), names_of(counts), parent_label)
    assert {parent_label(name) for name in train} == {f"c{label}" for label in range(len(counts))}


@given(sizes, fractions, seeds)
def test_a_random_part_has_its_share_unless_classes_must_train(counts, fraction, seed) -> None:
    _, valid = chosen(at_random(fraction, seed), names_of(counts), parent_label)
    n = sum(counts)
    assert len(valid) == min(n - len(counts), max(1, round(n * fraction)))


@given(sizes, fractions, seeds)
def test_a_stratified_part_keeps_the_share_of_each_class_within_one_image(counts, fraction, seed) -> None:
    _, valid = chosen(stratified(fraction, seed), names_of(counts), parent_label)
    found = Counter(map(parent_label, valid))
    assert all(abs(found[f"c{label}"] - n * fraction) <= 1 for label, n in enumerate(counts))
    if min(counts) * (1 - fraction) >= 1 and sum(counts) * fraction >= 1:
        assert len(valid) == round(sum(counts) * fraction)


@pytest.mark.parametrize("make", [at_random, stratified])
def test_another_seed_splits_otherwise_and_not_in_order(make) -> None:
    names = names_of([50, 50])
    splits = [chosen(make(0.2, seed), names, parent_label)[1] for seed in range(3)]
    assert len({tuple(valid) for valid in [*splits, names[:20], names[-20:], names[:10] + names[50:60]]}) == 6


@pytest.mark.parametrize("make", [at_random, stratified])
@pytest.mark.parametrize(("counts", "problem"), [([1, 1, 1], "each of the 3 classes has only one"), ([], "none of 0")])
def test_classes_of_one_image_each_are_refused(make, counts: list[int], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        make(0.5, 0)(names_of(counts), parent_label)


@pytest.mark.parametrize("train", ["train", "Train", "training"])
@pytest.mark.parametrize("valid", ["valid", "val", "validation", "test", "testing", "VAL"])
def test_parts_are_found_by_the_names_in_use(train: str, valid: str) -> None:
    names = sorted([f"{train}/a/1.jpg", f"{train}/b/2.jpg", f"{valid}/a/3.jpg", "other/b/4.jpg", "5.jpg"])
    for splitter in (grandparent, automatic(0)):
        assert chosen(splitter, names) == ([f"{train}/a/1.jpg", f"{train}/b/2.jpg"], [f"{valid}/a/3.jpg"])


def test_a_validation_part_goes_before_a_test_part() -> None:
    assert chosen(grandparent, ["test/a/1.jpg", "train/a/2.jpg", "val/a/3.jpg"])[1] == ["val/a/3.jpg"]


def test_parts_are_found_below_a_folder_that_holds_all() -> None:
    names = ["x/y/train/a/1.jpg", "x/y/val/a/2.jpg"]
    assert chosen(automatic(0), names) == (names[:1], names[1:])
    assert chosen(automatic(0), ["images/1.jpg", "images/2.jpg"], lambda _: "a")[1]


@pytest.mark.parametrize(("there", "lacking"), [("train", "validation"), ("val", "training")])
def test_one_part_alone_is_refused(there: str, lacking: str) -> None:
    for splitter in (grandparent, automatic(0)):
        with pytest.raises(UsageError, match=rf"a {lacking} part .* has images; there is {there}/ alone"):
            splitter([f"{there}/a/1.jpg", f"{there}/b/2.jpg"], parent_label)


def test_neither_part_is_refused_by_grandparent_and_split_at_random_by_auto() -> None:
    names = names_of([5, 5])
    with pytest.raises(UsageError, match=r"no folder of a training part \(train/, training/\) has images; add some"):
        grandparent(names, never)
    assert chosen(automatic(7), names, parent_label) == chosen(at_random(0.2, 7), names, parent_label)


def test_a_function_decides_where_it_is_asked() -> None:
    names = names_of([3, 3])
    assert chosen(where(lambda name: name.endswith("1.jpg")), names)[1] == ["c0/001.jpg", "c1/001.jpg"]


def test_a_list_validates_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("c1/002.jpg\n\n  ./c0/001.jpg \n")
    names = names_of([3, 3])
    splitter = make_splitter("valid.txt", 0, tmp_path)
    assert chosen(splitter, names)[1] == ["c0/001.jpg", "c1/002.jpg"]
    with pytest.raises(UsageError, match=r"the list names 2 images that are not there, the first x.jpg; .* as in c0/"):
        listed(["c0/001.jpg", "x.jpg", "y.jpg"])(names, never)


def test_a_column_says_what_validates(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("path,label,is_valid,other\na/1.jpg,a,True,0\nb/2.jpg,b,False,1\n")
    names = ["a/1.jpg", "b/2.jpg"]
    assert chosen(make_splitter("x.csv", 0, tmp_path), names) == (["b/2.jpg"], ["a/1.jpg"])
    assert chosen(make_splitter("x.csv:other", 0, tmp_path), names) == (["a/1.jpg"], ["b/2.jpg"])
    table = read_table(tmp_path / "x.csv")
    with pytest.raises(UsageError, match=r"1 of 3 images have no part; the first, c/3.jpg: .*x.csv has no row"):
        by_table(table)([*names, "c/3.jpg"], never)
    with pytest.raises(UsageError, match=r"x.csv names 1 images that are not there, the first b/2.jpg"):
        by_table(table)(names[:1], never)
    with pytest.raises(UsageError, match=r"has 'a' as its label, which must be True or False"):
        by_table(table, "label")(names, never)


@pytest.mark.parametrize("make", [at_random, stratified])
def test_a_share_may_be_left_out(make) -> None:
    names = names_of([10, 30])
    text = "random" if make is at_random else "stratified"
    for said in (text, f"{text}:0.2", f"{text}:.20"):
        assert chosen(make_splitter(said, 3), names, parent_label) == chosen(make(0.2, 3), names, parent_label)


@pytest.mark.parametrize(
    "text", ["", "rnd", "random:", "random:0", "random:1", "random:1.5", "random:0.2x", "auto:0.2"]
)
def test_a_split_that_is_none_is_refused_with_those_that_are(text: str) -> None:
    assert SPLIT.fullmatch(text) is None
    with pytest.raises(UsageError, match=rf"a split by {text} is not possible: it must be auto, grandparent, random"):
        make_splitter(text, 0)


@pytest.mark.parametrize("text", ["none.txt", "none.csv"])
def test_a_list_that_is_not_there_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=f"{text} can't be read: No such file"):
        make_splitter(text, 0, tmp_path)


def test_a_file_as_named_goes_before_one_in_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.txt").write_text("a\n")
    monkeypatch.chdir(tmp_path)
    assert chosen(make_splitter("x.txt", 0, "data"), ["a", "b"])[1] == ["a"]
    (tmp_path / "x.txt").write_text("b\n")
    assert chosen(make_splitter("x.txt", 0, "data"), ["a", "b"])[1] == ["b"]
