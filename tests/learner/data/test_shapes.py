"The generated dataset is the same for the same seed, laid out as Imagenette, and not to be told by colour or place."

import resource
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from learner.data.shapes import CLASSES, FIGURES, Points, generate, picture
from learner.errors import UsageError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        generate(tmp_path / name, seed=seed, train=20, valid=10)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert not set(a.values()) & set(c.values())
    assert len(set(a.values())) == 30


def test_an_image_does_not_depend_on_how_many_are_made(tmp_path: Path) -> None:
    generate(tmp_path / "few", train=10, valid=10)
    generate(tmp_path / "more", train=30, valid=20)
    assert contents(tmp_path / "few").items() <= contents(tmp_path / "more").items()


def test_a_disk_that_takes_a_part_of_a_file_is_no_success(tmp_path: Path) -> None:
    "As the last room on it does; Pillow's own writing of JPEGs passes over that."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            generate(tmp_path, train=10, valid=10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_layout_counts_and_progress(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    generate(tmp_path, train=25, valid=10, progress=lambda *step: seen.append(step))
    found = Counter(path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*/*.JPEG"))
    assert sum(found.values()) == 35
    assert found == {f"{split}/{name}": count for split, name, count in expected_counts()}
    assert seen == [("drawing shapes", done, 35) for done in range(1, 36)]


def expected_counts() -> list[tuple[str, str, int]]:
    train = [("train", name, 3 if place < 5 else 2) for place, name in enumerate(CLASSES)]
    return train + [("val", name, 1) for name in CLASSES]


def test_files_are_jpegs_of_many_sizes_and_some_are_grey(tmp_path: Path) -> None:
    generate(tmp_path, train=190, valid=10)
    with ExitStack() as files:
        images = [files.enter_context(Image.open(path)) for path in tmp_path.rglob("*.JPEG")]
    assert {image.format for image in images} == {"JPEG"}
    assert {image.mode for image in images} == {"RGB", "L"}
    assert all(80 <= side <= 200 for image in images for side in image.size)
    assert len({image.size for image in images}) > 150
    aspects = [image.width / image.height for image in images]
    assert min(aspects) < 0.7
    assert max(aspects) > 1.4


def small(split: str, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    images = [picture(42, split, index).convert("RGB").resize((8, 8), Image.Resampling.BOX) for index in range(count)]
    return np.stack([np.asarray(image, float).ravel() for image in images]), np.arange(count) % len(CLASSES)


def test_mean_pictures_do_not_tell_the_class() -> None:
    (x, y), (valid_x, valid_y) = small("train", 1000), small("val", 400)
    means = np.stack([x[y == label].mean(0) for label in range(len(CLASSES))])
    nearest = ((valid_x[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (nearest == valid_y).mean() < 0.35
    colours, valid_colours = means.reshape(10, 64, 3).mean(1), valid_x.reshape(-1, 64, 3).mean(1)
    nearest = ((valid_colours[:, None] - colours) ** 2).sum(-1).argmin(1)
    assert (nearest == valid_y).mean() < 0.2


def area(points: Points) -> float:
    x, y = points.T
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)


def test_all_figures_have_about_the_same_area() -> None:
    for name, polygons in FIGURES.items():
        overlap = 0.25 if name == "cross" else 0.0
        assert 1.6 < sum(map(area, polygons)) - overlap < 2.1, name


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"train": 9}, {"valid": 0}])
def test_what_cannot_be_made_is_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"shapes with seed=.* cannot be made: .* 10 classes"):
        generate(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())
