"""N workers = 1 worker, and every sample counts once, with real Ray workers where nothing divides evenly.

53 training and 29 validation images in batches of 8 leave last batches of 5, in batches of 13 of 1 and 3: with 3
workers, some of those have nothing to do. LocalGang is the reference, and test_reference.py checks that one against
plain torch.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster.gang import LocalGang
from cluster.messages import Job
from cluster.ray_gang import RayGang
from learner.data.mix import MixConfig
from learner.data.normalize import Normalize

RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "weight_decay": 1e-2, "augment": "crop", "presize": 27},
    "techniques": {
        "arch": "simple_cnn_bn",
        "optimizer": "nesterov",
        "momentum": 0.9,
        "label_smoothing": 0.1,
        "clip": 0.5,
        "ema": 0.9,
        "accumulate": 2,
    },
    "weighed": {
        "class_weights": (0.1, 0.9, 3.0, 0.5),
        "label_smoothing": 0.1,
        "decay_weights_only": True,
        "weight_decay": 0.1,
        "lsuv": True,
        "activations": True,
        "arch": "simple_cnn_bn",
        "momentum": 0.9,
    },
    "grey": {"arch": "simple_cnn_bn", "channels": 1, "normalize": Normalize((0.5,), (0.25,))},
    "frozen": {"fine_tune": True, "arch": "simple_cnn_bn", "momentum": 0.9},
    "mixed": {"augment": "full", "presize": 30, "mix": MixConfig(mixup=0.4, cutmix=1.0)},
    "batchnorm": {"arch": "simple_cnn_bn", "momentum": 0.9, "augment": "crop", "presize": 27},
}
RTOL, ATOL = 5e-5, 1e-5  # sums of float32 in another order, over 14 or 10 steps; ten times what was seen


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, int], Any]:
    "What one worker in this process made of each recipe."
    return {}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [8, 13])
@pytest.mark.parametrize("recipe", RECIPES)
def test_n_workers_are_one(
    ray_gang: RayGang,
    local_gang: Callable[[Job], LocalGang],
    drive: Callable[..., Any],
    job: Job,
    alone: dict[tuple[str, int], Any],
    recipe: str,
    batch_size: int,
    world_size: int,
) -> None:
    mine = replace(job, batch_size=batch_size, **RECIPES[recipe])
    frozen = {"frozen": 1.0} if mine.fine_tune else {}
    if (recipe, batch_size) not in alone:
        alone[recipe, batch_size] = drive(local_gang(mine), mine, **frozen)
    one = alone[recipe, batch_size]
    ray_gang.start(mine, world_size)
    many = drive(ray_gang, mine, **frozen)
    assert many.counts == one.counts
    assert many.trained["loss"][1] == 2 * len(job.train), "every training image once an epoch"
    assert many.valid["loss"][1] == many.valid["accuracy"][1] == 2 * len(job.valid), "and every validation image"
    np.testing.assert_allclose(many.losses, one.losses, rtol=RTOL)
    np.testing.assert_allclose(many.valid["loss"][0], one.valid["loss"][0], rtol=RTOL)
    assert many.valid["accuracy"] == one.valid["accuracy"]
    for name, tensor in one.states[0].items():
        np.testing.assert_allclose(many.states[0][name], tensor, rtol=RTOL, atol=ATOL, err_msg=name)
    assert_ranks_agree(many, world_size)


ADAPTIVE: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam", "weight_decay": 0.01, "body_apart": True},
    "adamw": {"optimizer": "adamw", "decay_weights_only": True, "precision": "bf16"},
    "lamb": {"optimizer": "lamb", "weight_decay": 0.01, "precision": "fp16"},
    "muon": {"optimizer": "muon", "weight_decay": 0.01},
    "rmsprop": {"optimizer": "rmsprop", "momentum": 0.9},
    "fine-tuned": {"optimizer": "adamw", "decay_weights_only": True, "fine_tune": True},
    "progressive": {"augment": "full", "presize": 30, "progressive": True},
    "simple_net": {"arch": "simple_net", "momentum": 0.9},
    "mixed and weighed": {"mix": MixConfig(mixup=0.4), "class_weights": (0.1, 0.9, 3.0, 0.5), "momentum": 0.9},
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_two_workers_are_one_where_steps_are_of_one_length(
    ray_gang: RayGang, local_gang: Callable[[Job], LocalGang], drive: Callable[..., Any], job: Job, name: str
) -> None:
    """As above, at rates at which such optimizers learn; compared is what the model gives, and weights to a step.

    They divide a gradient by its own size, so where that is about zero, its rounding makes whole steps.
    """
    mine = replace(job, **ADAPTIVE[name])
    hypers = (
        {"lr": 2e-3}
        | ({"body_lr": 2e-4} if mine.fine_tune or mine.body_apart else {})
        | ({"size": 20} if mine.progressive else {})
    )
    alone = local_gang(mine)
    ray_gang.start(mine, 2)
    one, many = drive(alone, mine, **hypers), drive(ray_gang, mine, **hypers)
    exact = mine.precision == "fp32"
    near = {"rtol": 1e-4} if exact else {"rtol": 2e-2}
    np.testing.assert_allclose(many.losses, one.losses, **near)
    np.testing.assert_allclose(many.valid["loss"][0], one.valid["loss"][0], **near)
    for key, tensor in one.states[0].items():
        np.testing.assert_allclose(many.states[0][key], tensor, atol=2e-3 if exact else 1e-2, rtol=1e-3, err_msg=key)
    assert_ranks_agree(many, 2)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["conv_net", "resnet18", "xresnet50", "xresnet18_mish_se_blur"])
def test_two_workers_are_one_with_deep_models(
    ray_gang: RayGang, local_gang: Callable[[Job], LocalGang], drive: Callable[..., Any], job: Job, arch: str
) -> None:
    "At a small rate: BatchNorm over a few pixels of a few samples makes much of the rounding of large steps."
    mine = replace(job, arch=arch, size=48, presize=48, batch_size=27, momentum=0.9)
    alone = local_gang(mine)
    ray_gang.start(mine, 2)
    one, many = (drive(gang, mine, lr=1e-5) for gang in (alone, ray_gang))
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-4)
    np.testing.assert_allclose(many.valid["loss"][0], one.valid["loss"][0], rtol=1e-3)
    for name, tensor in one.states[0].items():
        np.testing.assert_allclose(many.states[0][name], tensor, rtol=1e-3, atol=1e-4, err_msg=name)
    assert_ranks_agree(many, 2)


@pytest.mark.parametrize("batch_size", [8, 2])
def test_what_layers_give_is_that_of_the_global_batch(
    ray_gang: RayGang, local_gang: Callable[[Job], LocalGang], drive: Callable[..., Any], job: Job, batch_size: int
) -> None:
    "Also where one of three ranks has no sample; recorded is the first step of each epoch."
    mine = replace(job, batch_size=batch_size, activations=True, lsuv=True, arch="simple_cnn_bn")
    ray_gang.start(mine, 3)
    one, many = drive(local_gang(mine), mine, lr=1e-4), drive(ray_gang, mine, lr=1e-4)
    steps = -(-len(job.train) // batch_size)
    assert many.activations.keys() == one.activations.keys() == {
        (step, layer) for step in (0, steps) for layer in one.layers
    }  # fmt: skip
    assert {"0_ConvLayer", "5_Linear"} <= one.layers
    for key, sums in one.activations.items():
        assert many.activations[key][0] == sums[0] > 0, "numbers seen"
        np.testing.assert_allclose(many.activations[key][1:3], sums[1:3], rtol=1e-3, atol=1e-2)
        assert np.abs(many.activations[key][3:] - sums[3:]).sum() <= 0.01 * sums[0], "a few at the edge of a bin"


def assert_ranks_agree(outcome: Any, world_size: int) -> None:
    "All ranks hold the same bits, running statistics included."
    assert len(outcome.prints) == world_size
    assert len(set(outcome.prints)) == 1
    for state in outcome.states[1:]:
        for name, tensor in outcome.states[0].items():
            np.testing.assert_array_equal(state[name], tensor, err_msg=name)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_length_of_chunks_changes_nothing(
    ray_gang: RayGang, drive: Callable[..., Any], job: Job, world_size: int
) -> None:
    mine = replace(job, **RECIPES["batchnorm"])
    outcomes = []
    for length in (1, 3, 100):
        ray_gang.start(mine, world_size)
        outcomes.append(drive(ray_gang, mine, length=length))
    for other in outcomes[1:]:
        assert other.losses == outcomes[0].losses, "bit for bit"
        assert other.prints == outcomes[0].prints


@pytest.mark.parametrize("batch_size", [8, 13])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_with_local_batchnorm(
    ray_gang: RayGang, drive: Callable[..., Any], job: Job, world_size: int, batch_size: int
) -> None:
    mine = replace(job, **RECIPES["batchnorm"], batch_size=batch_size, sync_batchnorm=False)
    ray_gang.start(mine, world_size)
    outcome = drive(ray_gang, mine)
    assert_ranks_agree(outcome, world_size)
    assert np.isfinite([*outcome.losses, outcome.valid["loss"][0]]).all()
    assert all(np.isfinite(tensor).all() for tensor in outcome.states[0].values())
    assert outcome.valid["loss"][1] == 2 * len(job.valid)


def test_the_switch_of_batchnorm_switches(ray_gang: RayGang, drive: Callable[..., Any], job: Job) -> None:
    losses = []
    for sync in (True, False):
        mine = replace(job, **RECIPES["batchnorm"], sync_batchnorm=sync)
        ray_gang.start(mine, 2)
        losses.append(drive(ray_gang, mine, epochs=1).losses)
    assert losses[0][0] != pytest.approx(losses[1][0], rel=1e-3), "statistics of 4 images are not those of 8"
