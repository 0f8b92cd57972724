"DataBlock: each step replaced, state from the training part alone, the walk in words, and a picture of a batch."

from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from learner.callbacks.setup import SetupLearner
from learner.data.block import DataBlock, Samples, as_tensor, make_block, squash
from learner.data.files import image_files, open_split
from learner.data.images import open_image
from learner.data.labels import matching
from learner.data.normalize import Normalize
from learner.data.splitters import at_random, where
from learner.data.walk import describe, summary
from learner.errors import UsageError
from learner.figures import GAP, SIDE, show_batch
from learner.learner import Callback, Learner
from learner.losses import cross_entropy
from learner.models import simple_cnn

CLASSES = {"cat": (6, 2), "dog": (5, 3)}
PETS = r"(.+)_\d+.jpg$"


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    "Two breeds of five, ten of one shape each, in one folder."
    for number in range(10):
        breed = "great_pyrenees" if number % 2 else "Abyssinian"
        picture = np.full((20 + number, 30, 3), 100 + 10 * number, np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / f"images/{breed}_{number}.jpg")
    return tmp_path


def test_the_default_block_is_open_split(image_folder) -> None:
    root = image_folder(CLASSES)
    assert DataBlock().open(root) == open_split(root, seed=42) == make_block(root).open(root)
    flattened = DataBlock().open(root / "train")
    assert flattened == open_split(root / "train", 42) and len(flattened.valid) == 2


def test_each_step_can_be_replaced(image_folder) -> None:
    root = image_folder(CLASSES)
    split = DataBlock(
        get_items=lambda folder: [file for file in image_files(folder) if not file.endswith("0.jpg")],
        get_y=lambda name: "first" if "/1." in name else "later",
        splitter=where(lambda name: name.startswith("valid")),
    ).open(root)
    assert split.vocab.classes == ("first", "later")
    assert [Path(file).name for file in split.valid.files] == ["1.jpg", "1.jpg", "2.jpg"]
    assert split.valid.targets == (0, 0, 1) and len(split.train) == 9


def test_labels_by_pattern_and_a_random_split(pets: Path) -> None:
    block = make_block(pets, "stratified:0.4", PETS, seed=3)
    split = block.open(pets)
    assert split.vocab.classes == ("Abyssinian", "great_pyrenees")
    assert len(split.train) == 6 and split.valid.targets == (0, 0, 1, 1)
    assert block.open(pets) == split != make_block(pets, "stratified:0.4", PETS, seed=4).open(pets)


def write_noisy(root: Path, drop: int = 0, extra: str = "") -> Path:
    "A table as fast.ai's for Imagenette, where half of the training labels are those of the other class."
    lines = ["path,noisy_labels_0,noisy_labels_50,is_valid"]
    for number, file in enumerate(image_files(root)[drop:]):
        part, label, name = Path(file).parts[-3:]
        noisy = {"cat": "dog", "dog": "cat"}[label] if part == "train" and number % 2 else label
        lines.append(f"{part}/{label}/{name},{label},{noisy},{part == 'valid'}")
    (root / "noisy.csv").write_text("\n".join([*lines, *([extra] if extra else [])]) + "\n")
    return root / "noisy.csv"


def test_a_table_labels_and_its_is_valid_splits(image_folder) -> None:
    root = image_folder(CLASSES)
    write_noisy(root)
    clean = make_block(root, labels_csv="noisy.csv:noisy_labels_0").open(root)
    assert clean == open_split(root, 0)
    noisy = make_block(root, labels_csv="noisy.csv:noisy_labels_50").open(root)
    assert noisy.train.files == clean.train.files and noisy.valid == clean.valid
    assert sum(a != b for a, b in zip(noisy.train.targets, clean.train.targets)) == 5
    flipped = (root / "noisy.csv").read_text().replace("False", "x").replace("True", "False").replace("x", "True")
    (root / "flipped.csv").write_text(flipped)
    assert make_block(root, labels_csv="flipped.csv:noisy_labels_0").open(root).train == clean.valid
    assert make_block(root, "grandparent", labels_csv="flipped.csv:noisy_labels_0").open(root) == clean


def test_files_that_table_and_folder_do_not_share_are_refused(image_folder) -> None:
    root = image_folder(CLASSES)
    write_noisy(root, drop=2)
    with pytest.raises(UsageError, match=r"2 of 16 images have no label; the first, train/cat/0.jpg: .*noisy.csv has"):
        make_block(root, "grandparent", labels_csv="noisy.csv:noisy_labels_0").open(root)
    write_noisy(root, extra="train/cat/99.jpg,cat,cat,False")
    with pytest.raises(UsageError, match=r"noisy.csv names 1 images that are not there, the first train/cat/99.jpg"):
        make_block(root, labels_csv="noisy.csv:noisy_labels_0").open(root)


def test_two_ways_to_label_are_refused(image_folder) -> None:
    with pytest.raises(UsageError, match="give only one"):
        make_block(image_folder(CLASSES), label_regex=PETS, labels_csv="x.csv")


def test_a_class_that_only_validates_is_refused_with_a_remedy_that_fits(image_folder) -> None:
    root = image_folder({**CLASSES, "eel": (2, 1)})
    (root / "valid.txt").write_text("train/eel/0.jpg\ntrain/eel/1.jpg\nvalid/eel/0.jpg\nvalid/cat/0.jpg\n")
    with pytest.raises(UsageError) as caught:
        make_block(root, "valid.txt").open(root)
    for part in (
        f"{root}: train/eel/0.jpg validates",
        "'eel' as no training image is",
        "let images of that class train",
    ):
        assert part in str(caught.value)


def test_a_part_without_labels_is_refused_with_the_way_to_leave_it_out(image_folder) -> None:
    root = image_folder({"ant": (2, 0), "cat": (2, 0)})
    (root / "test").mkdir()
    (root / "train/ant/0.jpg").rename(root / "test/1.jpg")
    with pytest.raises(UsageError, match=r"test/1.jpg validates, and is labelled 'test'.* have no labels, leave them"):
        make_block(root).open(root)
    assert len(make_block(root / "train").open(root / "train").valid) == 1


def test_state_comes_from_the_training_part_alone(tmp_path: Path) -> None:
    for part, value in (("train", 100), ("valid", 200)):
        for label, step in (("a", 0), ("b", 20)):
            (tmp_path / part / label).mkdir(parents=True)
            Image.fromarray(np.full((8, 8, 3), value + step, np.uint8)).save(tmp_path / part / label / "1.png")
    block = DataBlock(item_tfms=(squash(8),))
    split = block.open(tmp_path)
    batch, _ = block.first_batch(split)
    normalize = block.batch_tfm(batch)
    torch.testing.assert_close(normalize(batch), Normalize.of(batch)(batch), rtol=0, atol=0)
    (valid, _) = next(iter(block.loaders(split, n_workers=0).valid))
    torch.testing.assert_close(normalize(valid).mean(), torch.tensor(10.0))  # (210 - 110) / 10


def test_batch_transforms_follow_each_other_and_see_what_the_one_before_gives() -> None:
    class Centre:
        "Subtracts the mean of the batch that it was made of."

        def __init__(self, mean: float) -> None:
            self.mean = mean

        @classmethod
        def of(cls, batch: torch.Tensor) -> "Centre":
            return cls(float(batch.mean()))

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x - self.mean

    tfm = DataBlock(batch_tfms=(torch.Tensor.float, lambda x: x * 2, Centre)).batch_tfm(torch.tensor([1, 3]))
    assert tfm(torch.tensor([1, 3])).tolist() == [-2, 2] and tfm(torch.tensor([5])).tolist() == [6]


def test_a_learner_trains_on_a_block_with_channels_of_its_own(image_folder) -> None:
    def edges(picture: np.ndarray) -> np.ndarray:
        return np.stack([picture[..., 0], np.diff(picture[..., 0], axis=0, prepend=0)], -1)

    block = DataBlock(item_tfms=(squash(16), edges))
    split = block.open(image_folder(CLASSES))
    dls = block.loaders(split, batch_size=4, n_workers=0)
    learner = Learner(simple_cnn(2, 2), dls, cross_entropy, lr=0.1, cbs=[SetupLearner("cpu")])
    learner.fit(1)
    assert learner.global_step == 3 and next(iter(dls.train))[0].shape == (4, 16, 16, 2)


def test_a_learner_sees_what_the_batch_transforms_give(image_folder) -> None:
    class Darkest:
        "Has a state of its own, which it finds in the training batch: pictures less their least value."

        def __init__(self, least: float) -> None:
            self.least = least

        @classmethod
        def of(cls, batch: torch.Tensor) -> "Darkest":
            return cls(float(batch.min()))

        def __call__(self, batch: torch.Tensor) -> torch.Tensor:
            return (batch - self.least).permute(0, 3, 1, 2)

    class Seen(Callback):
        def after_predict(self) -> None:
            batches[self.model.training] = self.batch[0]

    batches: dict[bool, torch.Tensor] = {}
    block = DataBlock(item_tfms=[squash(16)], batch_tfms=[torch.Tensor.float, Darkest])
    dls = block.loaders(split := block.open(image_folder(CLASSES)), batch_size=50, n_workers=0)
    Learner(simple_cnn(3, 2), dls, cbs=[SetupLearner("cpu"), Seen()]).fit(1)
    assert batches[True].min() == 0, "the training batch's own least value"
    raw = torch.stack([Samples(split.valid, block.item_tfms)[i][0] for i in range(len(split.valid))]).float()
    least = float(block.first_batch(split)[0].min())
    assert torch.equal(batches[False], (raw - least).permute(0, 3, 1, 2)), "and validation's less that of training"


def test_the_walk_tells_each_step_of_a_block_that_works(image_folder) -> None:
    root = image_folder(CLASSES)
    walk = summary(DataBlock(item_tfms=(squash(16), torch.tensor)), root, n=4)
    assert walk.broken is None
    names, told = zip(*walk.steps)
    assert names == (
        "get_items", "splitter", "get_y", "vocab", "item transform decode(size=16, channels=3)",
        "item transform tensor", "batch of 4", "batch transform Normalize",
    )  # fmt: skip
    assert told[0] == "16 files, the first train/cat/0.jpg"
    assert told[1].startswith("11 train, 5 validate, 0 do neither; the sample to follow is train/")
    assert told[2] in ("16 labels, the sample's 'cat'", "16 labels, the sample's 'dog'")
    assert told[3].startswith("2 classes (cat, dog) from the training part; the sample's is number ")
    assert told[4].startswith("uint8 array of shape (16, 16, 3), values ")
    assert told[6].startswith("inputs: uint8 tensor of shape (4, 16, 16, 3), values ") and "(4,)" in told[6]
    assert told[7].startswith("float32 tensor of shape (4, 3, 16, 16), values -")
    assert str(walk).splitlines()[0] == "1. get_items: 16 files, the first train/cat/0.jpg"


def test_the_walk_finds_that_pictures_of_different_sizes_can_not_be_stacked(pets: Path) -> None:
    block = DataBlock(get_y=matching(PETS), splitter=at_random(0.2, 0), item_tfms=(open_image,))
    walk = summary(block, pets, n=4)
    assert walk.steps[-1][0] == "item transform open_image" and walk.broken is not None
    name, reason = walk.broken
    assert name == "batch of 4"
    for part in ("can't be stacked", "30, 3) and (2", "such as squash(128)"):
        assert part in reason
    assert str(walk).endswith(f"6. batch of 4 breaks: {reason}")
    with pytest.raises(UsageError, match="can't be stacked"):
        next(iter(block.loaders(block.open(pets), n_workers=0).train))


def fail(made: object) -> None:
    raise ZeroDivisionError("half of nothing")


@pytest.mark.parametrize(
    ("steps", "where_", "reason"),
    [
        ({"get_items": lambda root: []}, "get_items", "has no images"),
        ({"get_items": fail}, "get_items", "ZeroDivisionError: half of nothing"),
        ({"splitter": lambda names, get_y: ([0, 1], [1])}, "splitter", "names 1 images twice"),
        ({"splitter": at_random(0.2, 0)}, "splitter", "the first, images/Abyssinian_0.jpg: the pattern"),
        ({"splitter": lambda names, get_y: ([0], [1])}, "get_y", "the first, images/Abyssinian_0.jpg: the pattern"),
        ({"get_y": lambda name: "cat"}, "vocab", "only one class, 'cat'"),
        ({"get_y": matching(PETS), "item_tfms": (fail,)}, "item transform fail", "ZeroDivisionError: half of"),
        ({"get_y": matching(PETS), "item_tfms": ()}, "batch of 8", "gives a str; it must give numbers"),
        ({"get_y": matching(PETS), "batch_tfms": (fail,)}, "batch transform fail", "half of nothing"),
    ],
)
def test_the_walk_says_where_and_why_a_step_breaks(pets: Path, steps: dict, where_: str, reason: str) -> None:
    block = DataBlock(**{"get_y": matching("(no)"), "splitter": at_random(0.2, 0), "item_tfms": (squash(8),), **steps})
    walk = summary(block, pets)
    assert walk.broken is not None and walk.broken[0] == where_ and reason in walk.broken[1]
    assert where_ not in [name for name, _ in walk.steps]


def test_the_walk_names_a_file_that_is_no_image(pets: Path) -> None:
    for file in (pets / "images").iterdir():
        file.write_text("no image")
    walk = summary(make_block(pets, label_regex=PETS), pets)
    assert walk.broken is not None and "is no readable image: cannot identify" in walk.broken[1]


def test_values_are_described_by_kind_shape_and_range() -> None:
    assert describe(torch.tensor([[1.0, 3.0]])) == "float32 tensor of shape (1, 2), values 1 to 3, mean 2"
    assert describe(np.array([1, 2], np.uint8)) == "uint8 array of shape (2,), values 1 to 2, mean 1.5"
    assert describe(torch.tensor([True])).startswith("bool tensor of shape (1,), values 1 to 1")
    assert describe(Image.new("L", (4, 3))) == "L picture of 4 x 3 pixels"
    assert describe("x" * 100).startswith("str 'xxx") and len(describe("x" * 100)) < 50
    assert describe(torch.zeros(0)).startswith("Tensor tensor([]")


@pytest.mark.parametrize("made", [[[1, 2]], np.ones((1, 2)), Image.new("L", (2, 1)), torch.ones(1, 2)])
def test_numbers_in_any_form_become_a_tensor(made: object) -> None:
    assert as_tensor(made).shape == (1, 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_shown_with_its_labels(image_folder, channels: int) -> None:
    block = DataBlock(item_tfms=(squash(12, channels),))
    split = block.open(image_folder(CLASSES))
    batch = block.first_batch(split, n=9)
    grid = np.asarray(show_batch(batch, split.vocab.classes, n=6))
    times = -(-SIDE // 12)
    cells = [grid[:, place * (12 * times + GAP) + GAP // 2 :][:, : 12 * times] for place in range(8)]
    titles = [cell[: -12 * times] for cell in cells]
    for cell, pixels in zip(cells, batch[0][:6].numpy()):
        shown = cell[-12 * times :].reshape(12, times, 12, times, 3)
        np.testing.assert_array_equal(shown, np.broadcast_to(pixels[:, None, :, None], shown.shape))
    for one, other in combinations(range(6), 2):
        assert (batch[1][one] == batch[1][other]) == np.array_equal(titles[one], titles[other])
    assert all(title.min() < 128 for title in titles[:6])
    assert all((cell == 255).all() for cell in cells[6:])


def test_the_same_block_splits_alike_wherever_the_folder_lies(pets: Path, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("z") / "other"
    pets.joinpath("images").rename(tmp := pets / "copy")
    (elsewhere / "images").mkdir(parents=True)
    for file in tmp.iterdir():
        (elsewhere / "images" / file.name).write_bytes(file.read_bytes())
    tmp.rename(pets / "images")
    block = DataBlock(get_y=matching(PETS), splitter=at_random(0.3, 5))
    here, there = block.open(pets), block.open(elsewhere)
    assert [Path(f).name for f in here.valid.files] == [Path(f).name for f in there.valid.files]
    assert here.train.targets == there.train.targets


def test_squash_is_decode_with_its_size() -> None:
    assert isinstance(squash(5), partial) and squash(5, 1).keywords == {"size": 5, "channels": 1}
