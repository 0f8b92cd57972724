"interpret: pictures and tables of one validation, which agree with each other and with what predict would say."

import csv
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from orchestrator import interpret
from orchestrator.loaded_run import LoadedRun
from orchestrator.predictions import predictions

NAMES = ("confusion", "most_confused", "top_losses", "classes")


@pytest.fixture(scope="module")
def folder(trained) -> Path:
    "What the command leaves."
    return interpret.run({"run": str(trained), "local": True, "top": 9})


def rows(folder: Path, name: str) -> list[list[str]]:
    "A table without its heading."
    with open(folder / f"{name}.csv", newline="") as file:
        return list(csv.reader(file))[1:]


def test_the_confusion_matrix_counts_each_image_of_each_class_once(folder) -> None:
    confusion = {row[0]: list(map(int, row[1:])) for row in rows(folder, "confusion")}
    assert {name: sum(counts) for name, counts in confusion.items()} == {"ant": 8, "bee": 7, "cat": 7, "dog": 7}
    names = list(confusion)
    wrong = {(a, b): confusion[a][names.index(b)] for a in names for b in names if a != b}
    assert {(a, b): int(n) for a, b, n in rows(folder, "most_confused")} == {k: n for k, n in wrong.items() if n}


def test_classes_are_as_the_matrix_has_them(folder) -> None:
    confusion = [list(map(int, row[1:])) for row in rows(folder, "confusion")]
    for place, (_, precision, recall, _, images) in enumerate(rows(folder, "classes")):
        column, row = sum(line[place] for line in confusion), sum(confusion[place])
        right = confusion[place][place]
        assert (float(precision), float(recall)) == pytest.approx((right / (column or 1), right / row), abs=1e-4)
        assert int(images) == row


def test_top_losses_are_all_images_with_what_predict_says_of_them(folder, trained, pictures) -> None:
    found = rows(folder, "top_losses")
    assert sorted(row[0] for row in found) == sorted(map(str, (pictures / "val").glob("*/*")))
    losses = [float(row[4]) for row in found]
    assert losses == sorted(losses, reverse=True)
    run = LoadedRun.open(str(trained))
    for row, prediction in zip(found, predictions(run, [row[0] for row in found], 4, 8)):
        assert Path(row[0]).parent.name == row[1]
        assert (row[2], float(row[3])) == (prediction.classes[0][0], pytest.approx(prediction.classes[0][1], abs=1e-5))


@pytest.mark.parametrize("name", NAMES)
def test_each_picture_is_a_file_and_in_tensorboard(folder, trained, name) -> None:
    with Image.open(folder / f"{name}.png") as picture:
        picture.load()
        assert min(picture.size) > 100
        assert len(set(picture.convert("L").tobytes())) > 10
    events = EventAccumulator(str(trained / "tensorboard" / "pictures"))
    events.Reload()
    assert f"interpret/{name}" in events.Tags()["images"]


def test_it_says_what_is_confused_and_where_the_pictures_are(trained, capsys) -> None:
    assert interpret.main([str(trained), "--local", "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert "predicted" in out
    assert str(trained / "interpret") in out
    assert interpret.main([str(trained), "--top", "1000"]) == 2
    assert "--top 1000" in capsys.readouterr().err
