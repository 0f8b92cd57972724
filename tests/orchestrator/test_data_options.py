"What may be said of the data on the command line: splits, labels, channels; end to end, and every mistake."

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from learner.data.block import DataBlock, make_block
from learner.data.files import image_files, open_split
from learner.data.loader import epoch_order
from learner.errors import UsageError
from orchestrator.build import first_images, make_job, open_data
from orchestrator.config import Config
from orchestrator.data_summary import main as data_summary

PETS = r"(.+)_\d+.jpg$"


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    "Twelve pictures of three breeds, dark, medium and bright, in one folder, of different shapes."
    rng = np.random.default_rng(3)
    (tmp_path / "pets/images").mkdir(parents=True)
    for number in range(12):
        pixels = 40 + 80 * (number % 3) + rng.integers(0, 30, (20 + number, 25, 3))
        breed = ("Abyssinian", "great_pyrenees", "pug")[number % 3]
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"pets/images/{breed}_{number}.jpg")
    return tmp_path / "pets"


@pytest.fixture
def digits(tmp_path: Path) -> Callable[..., Path]:
    "A factory of grey PNGs of 28 x 28, so many of each class in each part: `digits(train=8, valid=4)`."

    def make(classes: str = "37", **parts: int) -> Path:
        rng = np.random.default_rng(5)
        for part, count in parts.items():
            for place, label in enumerate(classes):
                (tmp_path / "digits" / part / label).mkdir(parents=True)
                for number in range(count):
                    pixels = rng.integers(0, 60, (28, 28))
                    pixels[2 * place + 2 : 2 * place + 8] += 180
                    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"digits/{part}/{label}/{number}.png")
        return tmp_path / "digits"

    return make


@pytest.fixture
def train(here, tmp_path: Path) -> Callable[..., tuple]:
    "Train for an epoch in this process: what it printed, config.json, and model.json."

    def run(data: Path, *arguments: str) -> tuple:
        folders = ["--data", data, "--data-dir", tmp_path / "cache", "--runs", tmp_path / "runs", "--name", "x"]
        small = ["--cache", "off", "--size", 16, "--batch-size", 4, "--epochs", 1, "--local", "--cpus", 1]
        ended = here(*folders, *small, *arguments)
        if ended.code:
            return ended, None, None
        latest = sorted((tmp_path / "runs/x").iterdir())[-1]
        return ended, *(json.loads((latest / f"{name}.json").read_text()) for name in ("config", "model"))

    return run


def test_the_pets_are_trained_by_their_names(pets: Path, train) -> None:
    ended, config, model = train(pets, "--label-regex", PETS, "--split", "stratified:.25")
    assert ended.code == 0, ended.err
    assert model["classes"] == ["Abyssinian", "great_pyrenees", "pug"] and model["channels"] == 3
    assert (config["resolved"]["train_images"], config["resolved"]["valid_images"]) == (9, 3)
    assert config["split"] == "stratified:.25" and config["label_regex"] == PETS


def test_a_random_share_and_its_seed(pictures: Path, tmp_path: Path) -> None:
    splits = [open_split_of(pictures, split="random:0.5", seed=seed) for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]
    assert len(splits[0].valid) == 41 and set(splits[0].train.files) | set(splits[0].valid.files) == set(
        image_files(pictures)
    )


def open_split_of(root: Path, **options):
    folder, block = open_data(Config(data=str(root), **options))
    return block.open(folder)


def test_the_options_are_the_block_that_they_name(pictures: Path) -> None:
    assert open_split_of(pictures) == DataBlock().open(pictures)
    assert open_split_of(pictures, split="stratified", seed=7) == make_block(pictures, "stratified", seed=7).open(
        pictures
    )


def noisy_table(root: Path) -> None:
    "A table as fast.ai's, with a column where each tenth training image is labelled ant, and one without noise."
    rows = ["path,noisy_labels_0,noisy_labels_25,is_valid"]
    for number, file in enumerate(image_files(root)):
        part, label, name = Path(file).parts[-3:]
        rows.append(f"{part}/{label}/{name},{label},{'ant' if number % 10 == 0 else label},{part == 'val'}")
    (root / "noisy.csv").write_text("\n".join(rows) + "\n")


def test_noisy_labels_come_from_the_column_that_is_named(digits, train) -> None:
    root = digits(train=6, val=2)
    noisy_table(root)
    ended, config, model = train(root, "--labels-csv", "noisy.csv:noisy_labels_0")
    assert ended.code == 0, ended.err
    assert model["classes"] == ["3", "7"] and config["resolved"]["valid_images"] == 4
    noisy = open_split_of(root, labels_csv="noisy.csv:noisy_labels_25")
    assert noisy.vocab.classes == ("3", "7", "ant") and noisy.train.targets.count(2) == 2


def test_a_list_of_files_validates(pets: Path, train) -> None:
    (pets / "valid.txt").write_text("images/pug_2.jpg\nimages/Abyssinian_0.jpg\n")
    _, config, _ = train(pets, "--label-regex", PETS, "--split", "valid.txt")
    assert config["resolved"]["valid_images"] == 2


@pytest.mark.parametrize(
    ("classes", "parts"), [("37", {"train": 8, "valid": 4}), ("0123456789", {"training": 2, "testing": 1})]
)
def test_the_layouts_of_mnist_are_trained_in_grey(digits, train, classes: str, parts: dict[str, int]) -> None:
    ended, config, model = train(digits(classes, **parts), "--arch", "simple_net")
    assert ended.code == 0, ended.err
    assert model["channels"] == config["resolved"]["channels"] == 1 and config["channels"] == "auto"
    assert len(model["normalize"]["mean"]) == 1 and model["classes"] == list(classes)
    assert re.search(r"\nchannels +1\n", ended.out)


def test_channels_may_be_set_against_what_the_images_are(digits, train, pictures: Path) -> None:
    _, _, model = train(digits(train=8, valid=4), "--channels", "3")
    assert model["channels"] == len(model["normalize"]["mean"]) == 3
    _, _, model = train(pictures, "--channels", "1", "--augment")
    assert model["channels"] == len(model["normalize"]["mean"]) == 1


def test_grey_is_decoded_and_kept_alike(digits, train, tmp_path: Path) -> None:
    root = digits(train=8, valid=4)
    without = train(root)[0].out
    kept = [train(root, "--cache", str(tmp_path / "stores"))[0].out for _ in range(2)]
    table = [[line.split()[:4] for line in out.splitlines() if line[:2] == "0 "] for out in (without, *kept)]
    assert table[0] == table[1] == table[2] != []


def job_of(root: Path, **options):
    config = Config(data=str(root), **{"size": 16, **options})
    return make_job(config, open_split_of(root))


def test_one_image_in_colour_makes_it_three_channels_even_at_batches_of_one(digits) -> None:
    root = digits(train=20, valid=1)
    assert job_of(root, batch_size=1).channels == 1
    Image.new("RGB", (28, 28), (9, 9, 10)).save(root / "train/3/4.png")
    assert job_of(root, batch_size=1).channels == 3


def test_the_channel_that_auto_keeps_is_what_decoding_in_grey_gives(digits) -> None:
    root = digits(train=6, valid=1)
    split = open_split_of(root)
    seen = [first_images(Config(data="x", size=20, channels=channels), split).inputs for channels in ("auto", 1)]
    assert seen[0].shape == (12, 20, 20, 1) and (seen[0] == seen[1]).all()
    assert job_of(root).normalize == job_of(root, channels=1).normalize


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--split", "rnadom:0.2"], "--split rnadom:0.2 is not possible: it must be auto, grandparent, random"),
        (["--split", "random:1.2"], "--split random:1.2 is not possible"),
        (["--split", "none.txt"], "none.txt can't be read: No such file"),
        (["--label-regex", "(.+"], "'(.+' is no regular expression: missing )"),
        (["--label-regex", ".+"], "'.+' has no group"),
        (
            ["--label-regex", r"^(\d)_x"],
            r"82 of 82 images have no label; the first, train/ant/0.JPEG: the pattern '^(\d)_x'",
        ),
        (["--label-regex", "(J)PEG"], "only one class, 'J'"),
        (["--labels-csv", "x.csv", "--label-regex", "(.)"], "give only one"),
        (["--labels-csv", "x.txt"], "it must be FILE.csv or FILE.csv:COLUMN"),
        (["--labels-csv", "none.csv"], "none.csv can't be read: No such file"),
        (["--channels", "2"], "--channels 2 is not possible: it must be auto, 1 or 3"),
        (["--channels", "grey"], "--channels grey is not possible: it must be auto, 1 or 3"),
    ],
)
def test_a_mistake_is_refused_in_a_sentence(pictures: Path, train, options: list[str], problem: str, tmp_path) -> None:
    ended, _, _ = train(pictures, *options)
    assert ended.code == 2 and problem in ended.err and ended.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("value", [2, "1", 3.0, True, None])
def test_channels_in_a_file_are_auto_1_or_3(value: object) -> None:
    with pytest.raises(UsageError, match="--channels"):
        Config(channels=value)


def test_the_summary_walks_through_the_options(pets: Path, capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert data_summary(["--data", str(pets), "--label-regex", PETS, "--size", "16"]) == 0
    out = capsys.readouterr().out
    assert "1. get_items: 12 files, the first images/Abyssinian_0.jpg" in out
    assert "item transform decode(size=16, channels=3): uint8 array of shape (16, 16, 3)" in out
    assert "float32 tensor of shape (8, 3, 16, 16)" in out
    with Image.open(tmp_path / "runs/pets-batch.png") as picture:
        assert min(picture.size) > 100
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pets", "runs"]


def test_the_summary_says_which_step_breaks(pets: Path, capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert data_summary(["--data", str(pets)]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("1. get_items: 12 files") and "2. " in out
    assert err.startswith("error: vocab: ") and "only one class, 'images'" in err and "--label-regex" in err


def test_a_bad_image_beyond_the_sample_is_named(image_folder, tmp_path, capsys) -> None:
    root = image_folder({"cat": (12, 2), "dog": (12, 3)})
    files = open_split(root, 42).train.files
    Path(files[epoch_order(len(files), 42, 0)[-1]]).write_bytes(b"")
    assert data_summary(["--data", str(root), "--runs", str(tmp_path / "r")]) == 1
    assert "is no readable image: the file is empty" in capsys.readouterr().err


def test_the_summary_shows_grey_in_grey(digits, capsys, tmp_path: Path) -> None:
    root = digits(train=6, valid=2)
    assert data_summary(["--data", str(root), "--runs", str(tmp_path / "r")]) == 0
    assert "uint8 tensor of shape (8, 64, 64, 1)" in capsys.readouterr().out
