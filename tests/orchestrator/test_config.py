"Each rule of Config, and that every value is either taken or refused in one sentence."

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.errors import UsageError, shown
from learner.module import Parameter
from learner.optim import OPTIMIZERS, make_optimizer
from orchestrator.config import MOMENTUMS, RATES, Config, flag

FIELDS = {one.name: one for one in dataclasses.fields(Config)}
INF, NAN = float("inf"), float("nan")
GOOD = [
    ("data", "shapes"), ("size", 1), ("augment", "full"), ("size", "128:160"), ("mixup", 0.4),
    ("bad_images", "skip"), ("sync_batchnorm", False),
    ("epochs", 1), ("batch_size", 1), ("lr", 0.5), ("lr", 1), ("lr", "auto"), ("schedule", "cosine"),
    ("momentum", 0), ("momentum", 0.99), ("weight_decay", 0), ("weight_decay", 5.0), ("seed", 0), ("gpus", "0,2"),
    ("gpus", None), ("cpus", 1), ("cpus", None), ("cpus", "2:4"), ("local", True),
    ("address", "10.0.0.1:6379"), ("address", "h-2:1"),
    ("body_lr", 0.01), ("lsuv", True), ("balance_classes", True), ("decay_weights_only", True), ("activations", True),
    ("backend", "gloo"), ("backend", None), ("name", "my.run_2+x-y"), ("name", None), ("debug", True),
]  # fmt: skip
BAD = [
    ("size", 0), ("size", -64), ("size", 64.0), ("augment", True), ("size", True), ("size", None),
    ("augment", 1), ("augment", "yes"), ("augment", None), ("bad_images", "ignore"), ("bad_images", None),
    ("epochs", 0), ("epochs", -1), ("epochs", 1.5), ("batch_size", 0), ("batch_size", -8), ("batch_size", INF),
    ("lr", 0), ("lr", -0.1), ("lr", INF), ("lr", NAN), ("lr", "find"), ("lr", True), ("lr", None),
    ("schedule", "one-cycle"), ("schedule", ""), ("momentum", -0.1), ("momentum", 1), ("momentum", NAN),
    ("weight_decay", -1e-9), ("weight_decay", INF), ("weight_decay", NAN), ("seed", -1), ("seed", 0.5),
    ("body_lr", 0.0), ("body_lr", INF), ("lsuv", 1), ("activations", "yes"),
    ("cpus", 0), ("cpus", -2), ("cpus", "two"), ("cpus", "2:"), ("cpus", ":4"),
    ("cpus", "2:4:6"), ("cpus", 2.0), ("cpus", "2-4"), ("gpus", 4), ("gpus", ["0"]), ("local", 0),
    ("address", "host"), ("address", "host:"), ("address", ":1"), ("address", "a b:1"), ("address", "a:b:c"),
    ("address", ""),
    ("backend", "mpi"), ("name", ""), ("name", "a/b"), ("name", "../x"), ("name", ".hidden"), ("name", "a b"),
    ("name", "-x"), ("data", None), ("data", 3), ("runs", ["runs"]), ("debug", "on"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_what_is_possible_is_taken(name: str, value: Any) -> None:
    assert getattr(Config(**{name: value}), name) == value


def test_each_optimizer_has_a_rate_that_stands_where_none_is_given() -> None:
    assert RATES.keys() == OPTIMIZERS.keys()
    for name, rate in RATES.items():
        assert Config(optimizer=name).lr == Config(optimizer=name, lr="own").lr == rate
        assert Config(optimizer=name, lr=0.7).lr == 0.7
    assert Config().lr == 0.1, "the book's"


def test_each_optimizer_has_the_momentum_of_its_own() -> None:
    assert MOMENTUMS.keys() == OPTIMIZERS.keys()
    for name, momentum in MOMENTUMS.items():
        optimizer = make_optimizer(name, [Parameter(torch.zeros(3, 3))], None, None, None)
        assert getattr(optimizer, "momentum", 0.0) == momentum == Config(optimizer=name).own_momentum
        assert Config(optimizer=name, momentum=0.3).own_momentum == 0.3
    with pytest.raises(UsageError, match="--momentum 0 is not possible: it must be above 0 with nesterov"):
        Config(optimizer="nesterov", momentum=0)
    assert Config(optimizer="one's own").own_momentum is None, "its default stands"


def test_what_would_be_dropped_is_refused() -> None:
    with pytest.raises(UsageError, match="--schedule constant is not possible: it must be left out with --fine-tune"):
        Config(fine_tune=1, schedule="constant")
    with pytest.raises(UsageError, match=r"--momentum 0\.5 is not possible: it must be left out with --moms"):
        Config(moms="0.95,0.85,0.95", momentum=0.5)


@pytest.mark.parametrize("moms", ["0,0.5,0.9", "0.9,0.5,1", "0.9,0.5", "0.9,.0,0.9"])
def test_momentum_moves_between_0_and_1(moms: str) -> None:
    assert Config(moms="0.95,.85,0.95").momentums == (0.95, 0.85, 0.95)
    with pytest.raises(UsageError, match="it must be A,B,C, each above 0 and below 1"):
        Config(moms=moms)


@pytest.mark.parametrize("both", [{"lsuv": True, "init": "runs/a"}, {"body_lr": 0.1, "fine_tune": 1}])
def test_what_contradicts_itself_is_refused(both: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="it must be left out with --"):
        Config(**both)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_what_is_not_is_refused_with_value_and_rule(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        Config(**{name: value})
    text = str(caught.value)
    assert text.startswith(f"{flag(name)} {value} is not possible: it must be ")
    assert "\n" not in text


@given(
    st.sampled_from(sorted(FIELDS)),
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=4) | st.lists(st.just("a")),
)
def test_every_value_is_taken_as_declared_or_refused(name: str, value: Any) -> None:
    try:
        config = Config(**{name: value})
    except UsageError as error:
        assert any(text in str(error) for text in (str(value), repr(value), shown(value)))
    else:
        kinds = {"str": str, "int": int, "float": (int, float), "bool": bool, "None": type(None)}
        allowed = str(FIELDS[name].type).split(" | ")
        assert any(isinstance(value, kinds[kind]) for kind in allowed)  # type: ignore[arg-type]
        assert isinstance(value, bool) == (allowed == ["bool"]), "True is no number"
        json.loads(json.dumps(dataclasses.asdict(config)))


def test_all_choices_are_taken() -> None:
    for name, one in FIELDS.items():
        for choice in one.metadata["choices"]:
            assert getattr(Config(**{name: choice}), name) == choice


def test_defaults_are_those_of_the_issue() -> None:
    config = Config()
    assert (config.data, config.runs, config.schedule, config.bad_images) == (
        "imagenette160", "runs", "one_cycle", "fail",
    )  # fmt: skip
    assert {"one_cycle", "constant", "cosine"} <= set(FIELDS["schedule"].metadata["choices"])
    assert Config.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_everything_has_a_help() -> None:
    for one in FIELDS.values():
        assert one.metadata["help"]


@pytest.mark.parametrize(("size", "presize"), [(64, 72), (24, 27), (128, 144)])
def test_augmentation_crops_out_of_more(size: int, presize: int) -> None:
    assert Config(size=size).presize == size
    assert Config(size=size, augment="crop").presize == presize


def test_a_flag_is_a_name_with_dashes() -> None:
    assert flag("batch_size") == "--batch-size"
