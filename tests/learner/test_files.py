"Which files are listed, how they are split, and what is refused before anything starts."

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.data.files import (
    EXTENSIONS,
    Labelled,
    Vocab,
    check_parts,
    image_files,
    list_files,
    open_split,
    parent_label,
    split_files,
)
from learner.data.splitters import at_random
from learner.errors import UsageError


def touch(root: Path, names: Iterable[str]) -> Path:
    "Empty files of these names below `root`: listing never opens one."
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def relative(files: Iterable[str], root: Path) -> list[str]:
    return [Path(file).relative_to(root).as_posix() for file in files]


def test_images_are_listed_in_order_at_any_depth_whatever_the_case(tmp_path: Path) -> None:
    names = ["b/2.JPG", "b/10.jpeg", "a/x.y.Png", "a/deep/er/z.webp", "top.TIFF", "a/été 1.bmp"]
    others = ["a/notes.txt", "a/jpg", "b/1.jpg.part", "b/archive.tgz"]
    touch(tmp_path, [*names, *others])
    assert relative(image_files(tmp_path), tmp_path) == sorted(names)
    assert image_files(str(tmp_path)) == image_files(tmp_path) == sorted(image_files(tmp_path))


def test_every_extension_is_listed(tmp_path: Path) -> None:
    touch(tmp_path, [f"a{extension}" for extension in EXTENSIONS])
    assert len(image_files(tmp_path)) == len(EXTENSIONS)


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, ["a/1.jpg", "a/._1.jpg", ".jpg", ".cache/2.jpg", "a/.thumbs/3.png"])
    assert relative(image_files(tmp_path), tmp_path) == ["a/1.jpg"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch(tmp_path, ["data/a/1.jpg", "data/a/b/2.jpg", "elsewhere/4.jpg", "elsewhere/more/5.jpg"])
    root = tmp_path / "data"
    (root / "a/3.jpg").symlink_to(root / "a/1.jpg")
    (root / "a/b/loop").symlink_to(root / "a")
    (root / "a/itself").symlink_to("itself")
    (root / "latest").symlink_to("a")
    for name in "cd":
        (root / name).symlink_to("../elsewhere")
    (tmp_path / "elsewhere/back").symlink_to("../data")
    (tmp_path / "elsewhere/more/other").symlink_to(root / "a/b")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path)
    names = ["a/1.jpg", "a/3.jpg", "a/b/2.jpg"]
    found = relative(image_files(root), root)
    assert found in ([*names, *there] for there in (["c/4.jpg", "c/more/5.jpg"], ["d/4.jpg", "d/more/5.jpg"]))


def test_what_comes_twice_or_from_nowhere_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, [f"{name}/{i}.jpg" for name in "ab" for i in range(2)])
    with pytest.raises(UsageError, match=r"names 4 files twice, the first .*a/0\.jpg"):
        split_files(tmp_path, lambda root: image_files(root) * 2, splitter=at_random(0.5, 0))
    for stray in (-1, 4):
        with pytest.raises(UsageError, match=f"names image {stray}; they are numbered from 0 to 3"):
            split_files(tmp_path, splitter=lambda names, get_y, stray=stray: ([0, 2], [stray]))


@pytest.mark.parametrize("name", ["data/train/a/1.jpg", "a/val/1.jpg", "b/Test/1.jpg"])
def test_parts_that_are_not_on_top_are_not_split_at_random_unless_asked(tmp_path: Path, name: str) -> None:
    touch(tmp_path, [name, *(f"{folder}/{i}.jpg" for folder in ("x", "y") for i in range(5))])
    with pytest.raises(UsageError, match=f"not clear: {name} lies in a part's folder"):
        open_split(tmp_path, seed=0)
    assert len(split_files(tmp_path, splitter=at_random(0.2, 0)).valid) == 2


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere can't be listed: No such file"):
        image_files(tmp_path / "nowhere")


@pytest.mark.parametrize(("there", "lacking"), [("train", "validation"), ("val", "training")])
def test_one_part_alone_is_refused_with_what_to_do(tmp_path: Path, there: str, lacking: str) -> None:
    touch(tmp_path, [f"{there}/{name}/{i}.jpg" for name in "ab" for i in range(5)])
    with pytest.raises(
        UsageError, match=rf"{tmp_path}: no folder of a {lacking} part .*there is {there}/ alone; .*random"
    ):
        open_split(tmp_path, seed=0)
    assert len(open_split(tmp_path / there, seed=0).train) == 8


def test_a_folder_without_parts_is_split_at_random(tmp_path: Path) -> None:
    names = [f"{name}/{i}.jpg" for name in ("a", "b") for i in range(10)]
    touch(tmp_path, names)
    split = open_split(str(tmp_path), seed=1, valid_fraction=0.25)
    assert (len(split.train), len(split.valid)) == (15, 5)
    assert sorted(relative(split.train.files + split.valid.files, tmp_path)) == names
    for part in (split.train, split.valid):
        assert [split.vocab.classes[target] for target in part.targets] == [parent_label(file) for file in part.files]
    assert open_split(tmp_path, seed=1, valid_fraction=0.25) == split != open_split(tmp_path, 2, 0.25)


def test_classes_are_those_of_the_training_part_in_order(tmp_path: Path) -> None:
    touch(tmp_path, ["train/dog/1.jpg", "train/cat/2.jpg", "train/eel/3.jpg", "valid/eel/4.jpg", "valid/cat/5.jpg"])
    split = open_split(tmp_path, seed=0)
    assert split.vocab == Vocab(("cat", "dog", "eel")) and len(split.vocab) == 3
    assert split.train.targets == (0, 1, 2) and split.valid.targets == (0, 2)


def test_a_validation_label_that_was_never_trained_is_refused_with_its_file(tmp_path: Path) -> None:
    touch(tmp_path, ["train/dog/1.jpg", "train/cat/2.jpg", "valid/dog/3.jpg", "valid/dogs/4.jpg"])
    with pytest.raises(UsageError) as caught:
        open_split(tmp_path, seed=0)
    for part in (f"{tmp_path}: valid/dogs/4.jpg validates", "'dogs'", "nearest: 'dog'", "cat, dog"):
        assert part in str(caught.value)


def test_one_class_is_refused_by_name(tmp_path: Path) -> None:
    touch(tmp_path, ["train/dog/1.jpg", "train/dog/2.jpg", "valid/dog/3.jpg"])
    with pytest.raises(UsageError, match="only one class, 'dog'"):
        open_split(tmp_path, seed=0)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ([], r"{root} has no images \(.*\.jpg"),
        (["a/notes.txt", "a/.1.jpg"], "{root} has no images"),
        (["train/a/notes.txt", "valid/a/1.jpg"], "{root}: no folder of a training part .* has images"),
        (["train/a/1.jpg", "train/b/1.jpg", "valid/a/x"], "{root}: no folder of a validation part .* has images"),
        (["a/1.jpg"], "{root}: none of 1 images can validate: the class 'a' has only one, and that"),
        (["a/1.jpg", "2.jpg"], "{root}: 1 of 2 images have no label; the first, 2.jpg: it lies in no folder"),
    ],
)
def test_nothing_to_train_or_validate_on_is_refused(tmp_path: Path, names: list[str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem.format(root=tmp_path)):
        open_split(touch(tmp_path, names), seed=0)


@pytest.mark.parametrize("name", ["nowhere", "file.jpg"])
def test_what_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    touch(tmp_path, ["file.jpg"])
    with pytest.raises(UsageError, match=f"{name} is no folder"):
        open_split(tmp_path / name, seed=0)


def test_files_are_named_alike_however_the_folder_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, ["data/b/1.jpg", "data/a/2.jpg"])
    monkeypatch.chdir(tmp_path / "data")
    for root in (".", "../data", "../data/", tmp_path / "data", f"{tmp_path}/./data//"):
        files, names = list_files(root)
        assert names == ["a/2.jpg", "b/1.jpg"] and [Path(file).resolve() for file in files] == [
            (tmp_path / "data" / name).resolve() for name in names
        ]


def test_what_a_function_lists_is_sorted_and_named(tmp_path: Path) -> None:
    touch(tmp_path, ["b/1.jpg", "a/2.jpg", "a/3.png"])
    files, names = list_files(tmp_path, lambda root: sorted(Path(root).rglob("*.jpg"), reverse=True))
    assert files == [str(tmp_path / name) for name in names] and names == ["a/2.jpg", "b/1.jpg"]


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        (([0, 1], []), "none of 3 images is left to validate"),
        (([], [0]), "none of 3 images is left to train"),
        (([0, 1], [1, 2]), "names 1 images twice, the first b"),
        (([0, 0], [1, 2]), "names 1 images twice, the first a"),
    ],
)
def test_parts_that_are_none_are_refused(parts: tuple[list[int], list[int]], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        check_parts(parts, ["a", "b", "c"])


def test_parts_may_be_numbers_of_any_kind(tmp_path: Path) -> None:
    for kind in (torch.tensor, np.array, tuple):
        assert check_parts((kind([2, 0]), kind([1])), ["a", "b", "c"]) == ([2, 0], [1])
    masks = [([True, False, True], [False]), (torch.tensor([True]), [1]), (np.array([True]), [1]), ([0.9], [2.2])]
    for none in (([0], None), 3, ([0],), (["a"], [1]), *masks):
        with pytest.raises(UsageError, match="must give two lists of images' numbers"):
            check_parts(none, ["a", "b", "c"])  # type: ignore[arg-type]


def test_the_vocab_encodes_and_a_labelled_set_has_a_length() -> None:
    vocab = Vocab.of(["b", "a", "b"])
    assert vocab.encode(["1", "2", "3"], ["b", "a", "b"]) == [1, 0, 1]
    assert len(Labelled(("1", "2"), (1, 0))) == 2
    assert parent_label(os.path.join("data", "train", "ox", "1.jpg")) == "ox"
