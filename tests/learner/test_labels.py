"What a name is labelled: by folder, pattern and table, and what is said where a label can't be had."

import csv
from collections.abc import Iterable
from pathlib import Path

import pytest

from learner.data.labels import NoAnswer, check_labelling, label_all, matching, parent_label, read_table, split_column
from learner.errors import UsageError

PETS = r"(.+)_\d+.jpg$"
NOISY = ["path", "noisy_labels_0", "noisy_labels_1", "noisy_labels_5", "noisy_labels_25", "noisy_labels_50", "is_valid"]


def write_csv(file: Path, rows: Iterable[Iterable[object]]) -> str:
    with open(file, "w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return str(file)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("images/great_pyrenees_173.jpg", "great_pyrenees"),
        ("Abyssinian_1.jpg", "Abyssinian"),
        ("a_2/images/basset_hound_10.jpg", "basset_hound"),
    ],
)
def test_the_pets_are_labelled_by_their_pattern(name: str, label: str) -> None:
    assert matching(PETS)(name) == label


def test_a_pattern_with_a_slash_sees_the_path() -> None:
    assert matching("^/([^/]+)/images/")("train/images/1.jpg") == "train"
    assert matching(r"/([^/]+)_\d+.jpg$")("pug_1.jpg") == matching(r"/([^/]+)_\d+.jpg$")("a/pug_2.jpg") == "pug"
    assert matching("^([^_]+)_")("train_1/x_1.jpg") == "x"


def test_what_does_not_match_is_counted_and_the_first_named_with_the_pattern() -> None:
    names = ["images/pug_1.jpg", "images/cover.jpg", "images/beagle_2.jpg", "images/cover2.jpg"]
    with pytest.raises(UsageError) as caught:
        label_all(names, matching(PETS))
    for part in ("2 of 4 images", "images/cover.jpg", f"'{PETS}'"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(.+", r"'\(\.\+' is no regular expression: missing \)"),
        (r".+_\d+.jpg$", "has no group: put the label in round brackets"),
        ("(a){99999999999}", "is no regular expression: .*too large"),
    ],
)
def test_a_pattern_that_is_none_is_refused(pattern: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        matching(pattern)


@pytest.mark.parametrize("label", ["", "  ", None, 3])
def test_an_empty_label_is_refused_with_its_file(label: object) -> None:
    with pytest.raises(UsageError, match=rf"1 of 2 images have no label; the first, b/2.jpg: its label is {label!r}"):
        label_all(["a/1.jpg", "b/2.jpg"], lambda name: label if name == "b/2.jpg" else "a")


def test_a_group_that_took_no_part_is_an_empty_label() -> None:
    with pytest.raises(UsageError, match="1 of 1 images have no label"):
        label_all(["1.jpg"], matching("(a)?1"))


def test_a_file_in_no_folder_has_no_label_by_folder() -> None:
    assert parent_label("train/ox/1.jpg") == parent_label("ox/1.jpg") == "ox"
    with pytest.raises(NoAnswer, match="lies in no folder"):
        parent_label("1.jpg")


def test_a_table_like_the_noisy_labels_gives_each_of_its_columns(tmp_path: Path) -> None:
    rows = [["train/a/1.jpg", "a", "a", "a", "b", "b", False], ["val/b/2.jpg", "b", "b", "b", "b", "b", True]]
    table = read_table(write_csv(tmp_path / "noisy.csv", [NOISY, *rows]))
    names = ["train/a/1.jpg", "val/b/2.jpg"]
    assert label_all(names, table.labels("noisy_labels_0")) == ["a", "b"]
    assert label_all(names, table.labels("noisy_labels_25")) == ["b", "b"]
    assert [table.is_valid()(name) for name in names] == [False, True]


def test_the_only_column_of_labels_needs_no_name(tmp_path: Path) -> None:
    table = read_table(write_csv(tmp_path / "x.csv", [["name", "label", "is_valid"], ["./a//1.jpg", " cat ", "0"]]))
    assert table.labels()("a/1.jpg") == "cat" and table.is_valid()("a/1.jpg") is False


def test_a_mark_of_byte_order_and_empty_lines_are_no_matter(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("\ufeffname,label\r\n\r\na.jpg,é\r\n", encoding="utf-8")
    assert read_table(tmp_path / "x.csv").labels()("a.jpg") == "é"


def test_a_column_that_is_not_there_or_not_clear_is_refused_with_those_that_are(tmp_path: Path) -> None:
    table = read_table(write_csv(tmp_path / "x.csv", [["path", "one", "two"], ["a.jpg", "x", "y"]]))
    with pytest.raises(UsageError, match=r"x.csv has no column 'three'; its columns are one, two"):
        table.labels("three")
    with pytest.raises(
        UsageError, match=r"has 2 columns of labels \(one, two\); name the one you mean: .*x.csv:COLUMN"
    ):
        table.labels()
    with pytest.raises(UsageError, match="no column 'is_valid'"):
        table.is_valid()


def test_files_that_the_table_lacks_are_counted(tmp_path: Path) -> None:
    table = read_table(write_csv(tmp_path / "x.csv", [["path", "label"], ["a.jpg", "x"]]))
    with pytest.raises(UsageError, match=r"2 of 3 images have no label; the first, b.jpg: .*x.csv has no row for it"):
        label_all(["a.jpg", "b.jpg", "c.jpg"], table.labels())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is no table: its first line must name the columns"),
        (b"path\na.jpg\n", "is no table"),
        (b"path,label\na.jpg,x\na.jpg,y\n", "has two rows for a.jpg"),
        (b"path;label\na.jpg;x\n", "with commas between"),
        (b"path,label, label,,\na.jpg,x,y,,\n", "has two columns 'label'"),
        (b"path,label\na.jpg\n", "has 1 values for a.jpg, but 2 columns"),
        (b"path,label\n\xff.jpg,x\n", "can't be read: .*utf-8"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(UsageError, match=problem):
        read_table(tmp_path / "x.csv")


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none.csv can't be read: No such file"):
        read_table(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("text", "file", "column"),
    [("x.csv", "x.csv", None), ("a/x.CSV:two", "a/x.CSV", "two"), ("a:b/x.csv:c:d", "a:b/x.csv", "c:d")],
)
def test_a_column_is_named_behind_the_file(text: str, file: str, column: str | None) -> None:
    assert split_column(text) == (file, column)


@pytest.mark.parametrize("options", [("(.+)_", "x.csv"), ("(", None), (None, "x.txt"), (None, "x.csv:")])
def test_labelling_that_can_not_be_is_refused_before_any_file_is_read(options: tuple[str | None, str | None]) -> None:
    with pytest.raises(UsageError):
        check_labelling(*options)
