"The callbacks at work on small folders of real images, as the book's chapter uses them."

import math

import pytest
import torch
from torch.testing import assert_close

from learner.callbacks import EMA, LRFinder, OneCycle, Progress, SetupLearner, TrackResults, lr_find
from learner.data.augment import Augment
from learner.data.files import open_split
from learner.data.loader import DataLoader, DataLoaders, Dataset
from learner.data.normalize import Normalize
from learner.errors import UserError
from learner.learner import Callback, CancelEpochException, Learner
from learner.losses import cross_entropy
from learner.lr_range import suggest
from learner.metrics import accuracy
from learner.models import simple_cnn, simple_cnn_bn
from learner.module import Module, Parameter

CLASSES = {"bird": (8, 3), "cat": (9, 5), "dog": (6, 2)}
SIZE = 24


@pytest.fixture
def dls(image_folder):
    split = open_split(image_folder(CLASSES), seed=0)
    train = DataLoader(Dataset(split.train, SIZE), 4, shuffle=True, n_workers=1)
    valid = DataLoader(Dataset(split.valid, SIZE), 4, n_workers=1)
    yield DataLoaders(train, valid)
    train.close()
    valid.close()


class Chain(Module):
    "A loss of its own making: each call gives the next of `values`; its gradient is 1."

    def __init__(self, values: list[float]) -> None:
        self.weight, self.values = Parameter(torch.ones(1)), iter(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight - self.weight.detach() + next(self.values)


def chained(values: list[float], n_batches: int, *cbs: Callback) -> Learner:
    "A learner whose losses are `values`."
    batches = [(torch.zeros(1), torch.zeros(1))] * n_batches
    return Learner(Chain(values), DataLoaders(batches), lambda preds, targets: preds.sum(), cbs=cbs)


def whole(loader: DataLoader, normalize: Normalize, model: Module) -> tuple[float, float]:
    "Loss and accuracy over a data set in one batch, computed plainly."
    samples = [loader.dataset[i] for i in range(len(loader.dataset))]
    x, y = torch.stack([x for x, _ in samples]).double() / 255, torch.stack([y for _, y in samples])
    x = ((x - torch.tensor(normalize.mean)) / torch.tensor(normalize.std)).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        preds = model(x)
    loss = torch.nn.functional.cross_entropy(preds, y).item()
    return loss, (preds.argmax(1) == y).double().mean().item()


@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_the_chapters_fit_and_its_numbers(dls: DataLoaders, lr: float, capsys) -> None:
    torch.manual_seed(0)
    setup, track = SetupLearner(device="cpu"), TrackResults()
    learn = Learner(simple_cnn(), dls, cross_entropy, lr=lr, cbs=[setup, track, Progress()])
    learn.fit(1)
    (row,) = track.history
    learn.model.eval()
    assert (row["valid_loss"], row["accuracy"]) == pytest.approx(whole(dls.valid, setup.normalize, learn.model), 1e-5)
    if lr == 0:  # the model of every batch is that of the end
        trained = whole(dls.train, setup.normalize, learn.model)
        assert (row["train_loss"], row["train_accuracy"]) == pytest.approx(trained, 1e-5)
    table = capsys.readouterr().out
    for word in ("epoch", "train_loss", "valid_loss", "accuracy", "time", f"{row['valid_loss']:.6f}"):
        assert word in table


def test_classes_of_a_colour_each_are_learned(dls: DataLoaders, capsys) -> None:
    torch.manual_seed(0)
    track = TrackResults()
    cbs = [SetupLearner("cpu"), OneCycle(0.1), track]
    Learner(simple_cnn_bn(3, 3), dls, lr=0.1, cbs=cbs).fit(3)
    assert track.history[-1]["valid_loss"] < track.history[0]["valid_loss"]
    assert track.history[-1]["train_accuracy"] > 0.6
    assert [row["epoch"] for row in track.history] == [0, 1, 2]
    assert capsys.readouterr().out.count("\n") == 4


def test_one_cycle_sets_the_chapters_rates() -> None:
    class Rates(Callback):
        order = 1

        def after_loss(self) -> None:
            rates.append(self.opt.lr)

    rates: list[float] = []
    cycle = OneCycle(0.3)
    learn = chained([1.0] * 100, 5, Rates(), cycle)
    for n_epochs in (4, 2):
        rates.clear()
        learn.fit(n_epochs)
        total = n_epochs * 5
        start = [0.3 * (0.1 + 0.9 * (i / total) / 0.25) for i in range(total) if i / total < 0.25]
        rest = [0.3 * (1 - (i / total - 0.25) / 0.75) for i in range(total) if i / total >= 0.25]
        assert rates == pytest.approx(start + rest) and cycle.lrs == rates


def test_setup_gives_the_model_normalised_channels_first(dls: DataLoaders) -> None:
    setup = SetupLearner("cpu")
    learn = Learner(simple_cnn(3, 3), dls, cbs=[setup])
    learn.fit(0)
    learn.batch = torch.randint(0, 256, (5, SIZE, SIZE, 3), dtype=torch.uint8), torch.zeros(5, dtype=torch.int64)
    pixels = learn.batch[0].double() / 255
    setup.before_batch()
    x, y = learn.batch
    assert x.shape == (5, 3, SIZE, SIZE) and x.dtype is torch.float32 and y.dtype is torch.int64
    assert_close(x.mean([0, 2, 3]), torch.zeros(3), atol=1e-5, rtol=0)
    assert_close(x.std([0, 2, 3], correction=0), torch.ones(3))
    assert setup.normalize.mean == pytest.approx(pixels.mean([0, 1, 2]).tolist())


def test_setup_augments_by_step_in_training_and_crops_the_centre_in_validation() -> None:
    plain, augment = Normalize((0.5,) * 3, (0.25,) * 3), Augment(16, seed=3)
    setup = SetupLearner("cpu", plain, augment)
    learn = Learner(simple_cnn(3, 3), DataLoaders([]), cbs=[setup])
    images, targets = torch.randint(0, 256, (5, 20, 20, 3), dtype=torch.uint8), torch.arange(5)
    for training, step, rows in ((True, 0, None), (True, 7, torch.tensor([2, 3, 4, 8, 9])), (False, 0, None)):
        learn.model.training, learn.global_step, learn.rows, learn.batch = training, step, rows, (images, targets)
        setup.before_batch()
        assert torch.equal(learn.batch[0], plain(augment(images, training, step, rows)))
    assert torch.equal(learn.batch[0], plain(images[:, 2:18, 2:18]))


def test_metrics_of_ones_own_are_divided_by_samples(capsys) -> None:
    track = TrackResults({"twos": lambda preds, targets: torch.full((), 2.0)})
    chained([3.0, 5.0], 2, track).fit(1)
    assert track.history[0]["train_twos"] == 2.0 and track.history[0]["train_loss"] == 4.0


def test_progress_counts_epochs_with_and_without_validation(capsys) -> None:
    for valid in (None, [(torch.zeros(1), torch.zeros(1))]):
        bar = Progress()
        learn = chained([1.0] * 10, 2, bar)
        learn.dls = DataLoaders(learn.dls.train, valid)
        learn.fit(3)
        out = capsys.readouterr().out
        assert all(f"Epoch {n}/3 " in out for n in (1, 2, 3))
        assert not hasattr(learn, "write_row")


def test_finder_leaves_the_model_bitwise_as_it_was_and_suggests(dls: DataLoaders) -> None:
    torch.manual_seed(0)
    finder = LRFinder(1e-4, 10.0, 20)
    learn = Learner(simple_cnn_bn(3, 3), dls, cbs=[SetupLearner("cpu"), finder])
    before = {name: tensor.clone() for name, tensor in learn.model.state_dict().items()}
    learn.fit(10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learn.model.state_dict().items())
    assert all(p.grad is None for p in learn.model.parameters())
    assert 1e-4 < finder.suggestion < 10.0
    assert len(finder.lrs) == len(finder.losses) == 20 or finder.test.diverged


def test_finder_sets_the_planned_rates_and_stops_the_fit_when_they_are_tried() -> None:
    finder = LRFinder(1e-3, 1.0, 4)
    learn = chained([4.0, 3.0, 2.0, 3.0, 3.0], 10, finder)
    learn.fit(5)
    assert finder.losses == [4.0, 3.0, 2.0, 3.0] and finder.lrs == pytest.approx([1e-3, 1e-2, 0.1, 1.0])
    assert learn.global_step == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e4])
def test_finder_stops_on_nan_and_on_divergence_and_restores(bad: float) -> None:
    finder = LRFinder(n_steps=50)
    learn = chained([2.0, 1.5, 1.25, bad] + [1.0] * 50, 50, finder)
    learn.fit(2)
    assert learn.global_step == 3
    assert finder.losses == [2.0, 1.5, 1.25] + [bad] * math.isfinite(bad)
    assert torch.equal(learn.model.weight, torch.ones(1))


def test_lr_find_takes_all_the_steps_it_needs_and_training_goes_on_as_if_it_had_not_been(dls, capsys) -> None:
    rows, finders = [], []
    for find in (False, True):
        dls.train.epoch = 0
        torch.manual_seed(0)
        track = TrackResults()
        learn = Learner(simple_cnn_bn(3, 3), dls, lr=0.01, cbs=[SetupLearner("cpu"), track, EMA(0.9), Progress()])
        if find:
            capsys.readouterr()
            finders.append(lr_find(learn, 1e-5, 1e-2, 30))
            assert not capsys.readouterr().out
        learn.fit(2)
        rows.append([(row["train_loss"], row["valid_loss"]) for row in track.history])
    assert rows[0] == rows[1], "bit for bit"
    [finder] = finders
    assert len(finder.losses) == 30 > len(dls.train)
    assert finder.suggestions == suggest(finder.test) and finder.suggestion == finder.suggestions["minimum"]
    assert not any(isinstance(cb, LRFinder) for cb in learn.cbs)


def test_a_fit_that_failed_before_the_finder_began_tells_why() -> None:
    class Failing(Callback):
        def before_fit(self) -> None:
            raise ZeroDivisionError

    learn = chained([1.0], 1, Failing(), LRFinder())
    with pytest.raises(ZeroDivisionError):
        learn.fit(1)


def test_results_are_told_where_a_callback_skips_training(capsys) -> None:
    class OnlyValidate(Callback):
        order = -1

        def before_epoch(self) -> None:
            if self.model.training:
                raise CancelEpochException

    track = TrackResults({})
    learn = chained([5.0, 6.0], 1, OnlyValidate(), track)
    learn.dls = DataLoaders(learn.dls.train, learn.dls.train)
    learn.fit(2)
    assert [(row["epoch"], row["valid_loss"]) for row in track.history] == [(0, 5.0), (1, 6.0)]


@pytest.mark.parametrize(("metrics", "told"), [
    ([accuracy], "have no names"), ({"loss": accuracy}, "'loss'"), ({"time": accuracy}, "'time'"),
    ({"train_accuracy": accuracy}, "'train_accuracy'"), ({"valid_loss": accuracy}, "'valid_loss'"),
])  # fmt: skip
def test_metrics_that_would_take_anothers_place_are_refused(metrics, told: str) -> None:
    with pytest.raises(UserError, match=told):
        TrackResults(metrics)


def test_a_metric_may_give_a_number_of_pythons(capsys) -> None:
    track = TrackResults({"answers": lambda preds, targets: 2 * len(targets)})
    chained([1.0, 1.0], 1, track).fit(1)
    assert track.history[0]["train_answers"] == 2
