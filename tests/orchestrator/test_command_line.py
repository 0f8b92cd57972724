"The command line and the TOML file: every option both ways, flags over the file, and what is said of mistakes."

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.data.warp import AugmentConfig
from learner.errors import UsageError
from learner.models import MODELS, named
from learner.optim import OPTIMIZERS
from learner.schedule import SCHEDULES
from orchestrator.command_line import parse, read_file
from orchestrator.config import Config, flag


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {}),
        ("--epochs 3", {"epochs": 3}),
        ("--epochs=3", {"epochs": 3}),
        ("--batch-size 64 --batch_size 32", {"batch_size": 32}),
        ("--batch_size=64", {"batch_size": 64}),
        ("--lr 1e-2", {"lr": 0.01}),
        ("--lr auto", {"lr": "auto"}),
        ("--lr own --optimizer muon", {"lr": 0.01, "optimizer": "muon"}),
        ("--gpus 4", {"gpus": "4"}),
        ("--gpus 0,2", {"gpus": "0,2"}),
        ("--gpus all", {"gpus": "all"}),
        ("--cpus 2 --data shapes", {"cpus": 2, "data": "shapes"}),
        ("--data=my_folder/of_images", {"data": "my_folder/of_images"}),
        ("--data my_folder", {"data": "my_folder"}),
        ("--local --debug --augment", {"local": True, "debug": True, "augment": "crop"}),
        ("--no-sync-batchnorm", {"sync_batchnorm": False}),
        ("--no_sync_batchnorm", {"sync_batchnorm": False}),
        ("--sync-batchnorm", {}),
        ("--address host:6379 --gpus 16", {"address": "host:6379", "gpus": "16"}),
        ("--schedule cosine --momentum 0.9", {"schedule": "cosine", "momentum": 0.9}),
        ("--bad_images skip --weight_decay 5e-4", {"bad_images": "skip", "weight_decay": 5e-4}),
        ("--runs elsewhere --name this --seed 7", {"runs": "elsewhere", "name": "this", "seed": 7}),
    ],
)
def test_flags(line: str, expected: dict[str, Any]) -> None:
    assert parse(line.split()) == Config(**expected)


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "data": st.sampled_from(["shapes", "a_b", "x-y"]),
        "size": st.integers(1, 512),
        "augment": st.sampled_from(["none", "crop", "full"]),
        "bad_images": st.sampled_from(["fail", "skip"]),
        "sync_batchnorm": st.booleans(),
        "epochs": st.integers(1, 10**6),
        "batch_size": st.integers(1, 10**6),
        "lr": st.just("auto") | st.floats(1e-300, 1e300),
        "schedule": st.sampled_from(["one_cycle", "constant", "cosine"]),
        "momentum": st.floats(0, 0.999),
        "weight_decay": st.floats(0, 1e300),
        "seed": st.integers(0, 2**63 - 1),
        "gpus": st.sampled_from(["1", "0,1", "all"]),
        "local": st.booleans(),
        "name": st.just("n"),
    },
)


def as_flags(changes: dict[str, Any], separator: str) -> list[str]:
    "The arguments that ask for these values."
    flags = []
    for name, value in changes.items():
        if value is False and name != "sync_batchnorm":
            continue
        typed = flag(name).replace("-", separator) if separator == "_" else flag(name)
        typed = "--" + typed.strip("_-")
        if isinstance(value, bool):
            flags.append(typed if value else typed.replace("--", "--no-"))
        else:
            flags += [typed, str(value)]
    return flags


@given(CHANGES, st.sampled_from("-_"))
def test_all_options_as_flags(changes: dict[str, Any], separator: str) -> None:
    assert parse(as_flags(changes, separator)) == Config(**changes)


def toml(value: Any) -> str:
    "A value in TOML."
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else repr(value)


@given(CHANGES, CHANGES, st.sampled_from("-_"))
def test_flags_win_over_the_file(tmp_path_factory, file: dict[str, Any], flags: dict[str, Any], separator: str) -> None:
    flags = {name: value for name, value in flags.items() if value is not False}
    path = tmp_path_factory.getbasetemp() / "options.toml"
    path.write_text("".join(f"{name.replace('_', separator)} = {toml(value)}\n" for name, value in file.items()))
    assert parse(["--config", str(path), *as_flags(flags, "-")]) == Config(**{**file, **flags})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--bacth-size 3", "--bacth-size is unknown; did you mean --batch-size?"),
        ("--batchsize=3", "--batchsize=3 is unknown; did you mean --batch-size?"),
        ("--epoch 3", "--epoch is unknown; did you mean --epochs?"),
        ("--learning-rate 3", "--learning-rate is unknown"),
        ("--gpu 1", "--gpu is unknown; did you mean --gpus?"),
        ("--zzz", "--zzz is unknown; --help lists all options"),
        ("shapes", "shapes is unknown; --help lists all options"),
        ("--epochs", "argument --epochs: expected one argument"),
        ("--epochs --local", "argument --epochs: expected one argument"),
        ("--epochs many", "argument --epochs: 'many' is no whole number"),
        ("--epochs 1.5", "argument --epochs: '1.5' is no whole number"),
        ("--lr fast", "argument --lr: 'fast' is no number"),
        ("--local=yes", "argument --local: ignored explicit argument 'yes'"),
        ("--schedule triangle", "--schedule triangle is not possible: it must be one of one_cycle, constant, cosine"),
        ("--config /no/such.toml", "--config /no/such.toml can't be read: No such file or directory"),
        ("--config /", "--config / can't be read: Is a directory"),
    ],
)
def test_mistakes(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(line.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epochs = ", "can't be read: Invalid value (at end of document)"),
        (b"epochs = 1\nepochs = 2", "can't be read: Cannot overwrite a value"),
        (b"\xff\xfe", "can't be read: "),
        (b"[" * 10_000, "can't be read: "),
        (b"epoch = 3", "epoch is unknown; did you mean epochs?"),
        (b"config = 'x.toml'", "config is unknown"),
        (b"[training]\nlr = 0.1", "training is unknown"),
        (b"epochs = '3'", "--epochs 3 is not possible: it must be of type int, without quotes"),
        (b"epochs = 3.0", "--epochs 3.0 is not possible: it must be of type int"),
        (b"local = 1", "--local 1 is not possible: it must be of type bool"),
        (b"lr = -1", "--lr -1 is not possible: it must be above 0, auto or own"),
        (b"gpus = true", "--gpus True is not possible: it must be of type str"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "options.toml"
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        parse(["--config", str(file)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").touch()
    assert read_file(str(tmp_path / "empty.toml")) == {}
    assert parse(["--config", str(tmp_path / "empty.toml")]) == Config()


def test_a_count_of_gpus_is_a_number_in_toml(tmp_path: Path) -> None:
    (tmp_path / "options.toml").write_text("gpus = 4")
    assert parse(["--config", str(tmp_path / "options.toml")]) == Config(gpus="4")


def test_help_is_a_page_with_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    page = capsys.readouterr().out
    for one in dataclasses.fields(Config):
        assert flag(one.name) in page
    assert "examples:" in page
    assert "default: imagenette160" in " ".join(page.split())
    assert max(map(len, page.splitlines())) <= 120


def test_help_names_what_there_is_to_choose_from(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    words = set(re.findall(r"\w+", capsys.readouterr().out))
    assert words >= {*MODELS, *OPTIMIZERS, *SCHEDULES}


@pytest.mark.parametrize("command", ["find_lr", "data_summary"])
def test_each_command_says_what_it_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], command)
    out = capsys.readouterr().out
    assert f"python -m orchestrator.{command}" in out and "what launch would" in " ".join(out.split())
    assert "Train an image classifier" not in out


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[2] / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_a_committed_recipe_can_be_read(recipe: Path) -> None:
    config = parse(["--config", str(recipe)])
    assert named(config.arch) and config.optimizer in OPTIMIZERS
    AugmentConfig.read(config.magnitudes)
