"One Worker with nobody beside it: what it reports, where it can go on from, what it keeps, what it shows."

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.comms import Solo
from cluster.local_batches import dealt
from cluster.messages import Chunk, Job
from cluster.worker import Worker, refuse_bad
from learner.data.files import Labelled
from learner.data.loader import Dataset, Readable, collate_readable, epoch_order
from learner.errors import UserError

LR = {"lr": 0.05}
Make = Callable[[Job], Worker]


@pytest.fixture
def worker() -> Iterator[Make]:
    "A factory of Workers."
    made: list[Worker] = []

    def make(job: Job) -> Worker:
        made.append(Worker(job, Solo(), torch.device("cpu"), 1))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_report_has_sums_counts_and_time(worker: Make, job: Job) -> None:
    chunk = Chunk(True, 0, 4, 4, (LR,) * 3)  # the last batch of 53 in eights has 5
    report = worker(job).run(chunk)
    assert (report.rank, report.chunk, report.counts) == (0, chunk, [8, 8, 5])
    assert report.batches.keys() == {"count", "loss", "accuracy"}
    assert report.batches["loss"] == pytest.approx(np.multiply(report.losses, report.counts))
    assert 0 <= sum(report.batches["accuracy"]) <= sum(report.counts) == report.own == 21
    assert 0 < report.seconds["data"] < report.seconds["total"]
    assert report.seconds["communication"] == 0
    assert report.bad_images == []


def test_parameters_stay_where_they_are(worker: Make, job: Job) -> None:
    "From the first step on, and when the body thaws: CUDA graphs are recorded for places in memory."
    one = worker(replace(job, optimizer="adam", fine_tune=True))
    before = [p.data_ptr() for p in one.learner.model.parameters()]
    one.run(Chunk(True, 0, 0, 0, ({**LR, "frozen": 1.0}, {**LR, "frozen": 1.0}, {**LR, "frozen": 0.0}, LR)))
    assert [p.data_ptr() for p in one.learner.model.parameters()] == before


def test_convolutions_have_weights_and_gradients_in_the_order_of_pictures(worker: Make, job: Job) -> None:
    one = worker(replace(job, arch="resnet18", momentum=0.9))
    one.run(Chunk(True, 0, 0, 0, (LR,)))
    convolutions = [p for p in one.learner.model.parameters() if p.dim() == 4]
    assert len(convolutions) == 20
    for tensor in (tensor for p in convolutions for tensor in (p, p.grad)):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_validation_changes_nothing(worker: Make, job: Job) -> None:
    one = worker(replace(job, arch="simple_cnn_bn", momentum=0.9))
    one.run(Chunk(True, 0, 0, 0, (LR,)))
    before = one.fingerprint()
    report = one.run(Chunk(False, 0, 0, 7, ({},) * 4))
    assert sum(report.counts) == len(job.valid)
    assert one.fingerprint() == before


def test_checksums_come_in_the_models_order_so_that_the_first_of_those_that_differ_says_most(
    worker: Make, job: Job
) -> None:
    one = worker(replace(job, arch="resnet18"))
    names = [name.removeprefix("0/") for name in one.checksums() if name.startswith("0/")]
    assert names == list(one.learner.model.state_dict()) != sorted(names)


def test_a_step_is_a_function_of_the_state_and_its_number(worker: Make, job: Job) -> None:
    mine = replace(job, augment="crop", presize=27)
    through, jumping = worker(mine), worker(mine)
    whole = through.run(Chunk(True, 1, 0, 7, (LR,) * 7))
    later = jumping.run(Chunk(True, 1, 0, 7, (LR,) * 3)).losses
    jumping.run(Chunk(False, 1, 0, 7, ({},)))  # another stream in between
    later += jumping.run(Chunk(True, 1, 3, 10, (LR,) * 4)).losses
    assert later == whole.losses
    assert jumping.fingerprint() == through.fingerprint()


def test_epochs_and_seeds_have_orders_of_their_own(worker: Make, job: Job) -> None:
    still = ({"lr": 0.0},) * 7
    one, other = worker(job), worker(replace(job, seed=4))
    first, second = one.run(Chunk(True, 0, 0, 0, still)), one.run(Chunk(True, 1, 0, 7, still))
    assert first.losses != second.losses
    assert sum(first.batches["loss"]) == pytest.approx(sum(second.batches["loss"]), rel=1e-5), "the same images"
    assert other.run(Chunk(True, 0, 0, 0, still)).losses != first.losses


def test_the_same_seed_gives_the_same_weights(worker: Make, job: Job) -> None:
    assert worker(job).fingerprint() == worker(job).fingerprint()
    assert worker(job).fingerprint() != worker(replace(job, seed=4)).fingerprint()


@pytest.mark.parametrize("trained_before", [0, 2])
def test_a_snapshot_brings_all_back(worker: Make, job: Job, trained_before: int) -> None:
    mine = replace(job, arch="simple_cnn_bn", momentum=0.9)
    one, undisturbed = worker(mine), worker(mine)
    for each in (one, undisturbed):
        each.run(Chunk(True, 0, 0, 0, (LR,) * trained_before)) if trained_before else None
    kept, before = one.snapshot(), one.fingerprint()
    one.run(Chunk(True, 0, 2, 2, ({"lr": float("inf")},) * 2, probe=True))  # a finder goes as far as NaN
    assert one.fingerprint() != before
    assert not all(np.isfinite(tensor).all() for tensor in one.state().values())
    one.load(kept)
    assert one.fingerprint() == before
    chunk = Chunk(True, 0, 2, 2, (LR,) * 3)
    assert one.run(chunk).losses == undisturbed.run(chunk).losses
    assert one.fingerprint() == undisturbed.fingerprint()


@pytest.mark.parametrize("name", ["0.weight", "0.norm.running_mean", "0.norm.running_var"])
def test_a_fingerprint_sees_one_bit(worker: Make, job: Job, name: str) -> None:
    one = worker(replace(job, arch="simple_cnn_bn"))
    before, tensor = one.fingerprint(), one.learner.model.state_dict()[name]
    tensor[(3, *[0] * (tensor.dim() - 1))].view(torch.int32).bitwise_xor_(1)
    assert one.fingerprint() != before


def test_a_fingerprint_sees_the_momentum(worker: Make, job: Job) -> None:
    one = worker(replace(job, momentum=0.9))
    one.run(Chunk(True, 0, 0, 0, (LR,)))
    before, state = one.fingerprint(), one.learner.opt.state_dict()
    next(iter(state.values())).add_(1)
    assert one.fingerprint() != before


def test_samples_are_what_the_model_sees(worker: Make, job: Job) -> None:
    images, targets = worker(job).samples(6)
    order = epoch_order(len(job.train), job.seed, 0)[:6]
    np.testing.assert_array_equal(images, collate_readable(Dataset(job.train, job.size), order).inputs)
    assert targets == [job.train.targets[i] for i in order]


def test_augmented_samples_show_the_augmentation(worker: Make, job: Job) -> None:
    images, _ = worker(replace(job, augment="crop", presize=27)).samples(6)
    assert images.shape == (6, 24, 24, 3)
    plain, _ = worker(job).samples(6)
    assert not np.array_equal(images, plain)


def test_bad_images_are_refused_by_name_or_left_out() -> None:
    bad = (("a.jpg", "it is empty"), ("b.jpg", "it is cut"))
    with pytest.raises(UserError, match=r"a.jpg is no readable image: it is empty.*--bad-images skip"):
        refuse_bad(bad, skip=False)
    refuse_bad(bad, skip=True)
    refuse_bad((), skip=False)


def test_a_batch_without_one_readable_image_is_no_step(worker: Make, job: Job) -> None:
    files = tuple("/no/such.jpg" for _ in job.train.files)
    one = worker(replace(job, train=Labelled(files, job.train.targets), skip_bad_images=True, arch="simple_cnn_bn"))
    before = {name: tensor for name, tensor in one.state().items() if "running" not in name}
    report = one.run(Chunk(True, 0, 0, 0, (LR,) * 2))
    assert (report.counts, report.batches["loss"], len(report.bad_images)) == ([0, 0], [0.0, 0.0], 16)
    for name, tensor in before.items():
        np.testing.assert_array_equal(one.state()[name], tensor, err_msg=name)


def test_the_first_scale_of_fp16_is_for_a_sum_over_the_batch(worker: Make, job: Job) -> None:
    one = worker(replace(job, precision="fp16", batch_size=24))
    before = one.fingerprint()
    one.run(Chunk(True, 0, 0, 0, (LR,)))
    assert one.learner.loss_scale == 2.0**16 / 32, "not halved: the first step is taken"
    assert one.fingerprint() != before


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_each_sample_is_dealt_to_one_part_by_its_row(parts: int) -> None:
    rows = torch.tensor([4, 5, 7, 8, 9])
    batch = Readable(rows[:, None, None, None].to(torch.uint8), 10 * rows, rows)
    dealt_out = [dealt(batch, number, parts) for number in range(parts)]
    assert sorted(row for part in dealt_out for row in part.rows.tolist()) == rows.tolist()
    for number, part in enumerate(dealt_out):
        assert (part.rows % parts == number).all()
        assert part.inputs.flatten().tolist() == part.rows.tolist()
        assert torch.equal(part.targets, 10 * part.rows)


class Reads(TorchDispatchMode):
    "Counts how often Python asks for a number that was computed: a GPU would have to be waited for. Rows are on CPUs."

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


BUSY = {"arch": "simple_cnn_bn", "augment": "crop", "presize": 27, "ema": 0.9, "clip": 1.0, "label_smoothing": 0.1}


@pytest.mark.parametrize("options", [BUSY, {"precision": "bf16", "accumulate": 2, "augment": "full", "presize": 30}])
def test_nobody_asks_for_a_number_within_a_chunk(worker: Make, job: Job, options: dict[str, Any]) -> None:
    "Losses stay on the device until the report. What looks for NaN in each step is for CPUs, where nobody waits."
    one = worker(replace(job, momentum=0.9, **options))
    one.learner.opt.looks.remove(one.guard.look)
    with Reads() as reads:
        one.run(Chunk(True, 0, 0, 0, (LR,) * 7))
        one.run(Chunk(False, 0, 0, 7, ({},) * 4))
    assert reads.count == 0


def test_a_chunk_that_came_to_no_end_leaves_nothing_in_the_next_report(worker: Make, job: Job, monkeypatch) -> None:
    mine, chunk = replace(job, activations=True), Chunk(True, 0, 0, 0, (LR,))
    expected = worker(mine).run(chunk).activations
    one = worker(mine)
    with monkeypatch.context() as broken:
        broken.setattr(one.learner, "step", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one.run(chunk)
    one.reducer.flat.zero_()
    found = one.run(chunk).activations
    assert found.keys() == expected.keys() == {0}
    for layer, sums in expected[0].items():
        np.testing.assert_array_equal(found[0][layer], sums)
