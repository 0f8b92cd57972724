"Dropout: masks against the same hash in Python's integers, that they look random, and that no split changes them."

import copy
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from learner.callbacks import SetupLearner
from learner.data.normalize import Normalize
from learner.dropout import Dropout, dropouts, mix32_, mix64, sample_keys, set_keys
from learner.errors import UsageError
from learner.layers import Flatten, Linear
from learner.learner import Learner
from learner.module import Module, Sequential
from learner.optim import SGD

seeds = st.integers(0, 2**64)
M64, M32 = (1 << 64) - 1, (1 << 32) - 1


def splitmix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M64
    return x ^ x >> 31


def lowbias(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D & M32
    x = (x ^ x >> 15) * 0x846CA68B & M32
    return x ^ x >> 16


def key_of(seed: int, step: int, row: int) -> int:
    key = seed & M32
    for number in (seed >> 32 & M32, step, row):
        key = splitmix(key) + number & M64
    return splitmix(key)


def stays(p: float, key: int, layer: int, call: int, element: int) -> bool:
    "Whether an element stays, in unsigned arithmetic."
    mixed = lowbias((key ^ splitmix((layer << 8 | call) << 40 | element)) & M32)
    return (mixed + (1 << 31) & M32) >= int(p * (1 << 32))  # signed order: the top bit counts the other way round


def keyed(p: float, seed: int, step: int, rows: torch.Tensor, layer: int = 0) -> Dropout:
    "The last of `layer` + 1 Dropouts with keys for `rows`."
    layers = [Dropout(p) for _ in range(layer + 1)]
    set_keys(layers, sample_keys(seed, step, rows))
    return layers[-1]


def test_splitmix64_gives_the_published_first_number() -> None:
    assert mix64(torch.tensor(0x9E3779B97F4A7C15 - (1 << 64))).item() & M64 == 0xE220A8397B1DCDAF


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5))
def test_hashes_equal_unsigned_arithmetic(numbers) -> None:
    wide, narrow = torch.tensor(numbers), torch.tensor([n & M32 for n in numbers]).int()
    assert [n & M64 for n in mix64(wide).tolist()] == [splitmix(n & M64) for n in numbers]
    assert [n & M32 for n in mix32_(narrow).tolist()] == [lowbias(n & M32) for n in numbers]


@given(
    st.floats(0.01, 0.99), seeds, st.integers(0, 2**40), st.lists(st.integers(0, 2**31), max_size=4, unique=True),
    st.integers(0, 3), st.sampled_from([(), (3,), (2, 2, 3)]),
)  # fmt: skip
def test_a_mask_depends_on_seed_step_row_layer_call_and_element_alone(p, seed, step, rows, layer, shape) -> None:
    drop = keyed(p, seed, step, torch.tensor(rows, dtype=torch.int64), layer)
    x = torch.rand(len(rows), *shape, dtype=torch.float64) + 1
    n = x[0].numel() if rows else 0
    for call in range(2):
        expected = [stays(p, key_of(seed, step, row), layer, call, e) for row in rows for e in range(n)]
        assert_close(drop(x), x * torch.tensor(expected, dtype=torch.bool).view(x.shape) / (1 - p))


def test_masks_look_independent() -> None:
    n, p = 1024, 0.3
    first = keyed(p, 1, 0, torch.arange(n))
    masks = [first, first, keyed(p, 1, 1, torch.arange(n)), keyed(p, 2, 0, torch.arange(n)),
             keyed(p, 1, 0, torch.arange(n), 1), keyed(p, 1, 0, torch.arange(n, 2 * n))]  # fmt: skip
    stay = torch.stack([(drop(torch.ones(n, n)) > 0).double() for drop in masks])
    error = (p * (1 - p)) ** 0.5
    assert abs(stay.mean() - (1 - p)) < 5 * error / stay.numel() ** 0.5
    for means in (stay.mean(1), stay.mean(2)):
        assert means.std().item() == pytest.approx(error / n**0.5, rel=0.1)
    centred = (stay - (1 - p)) / error
    for one in range(len(masks)):  # sums of n products of independent numbers have the standard deviation sqrt(n)
        others = centred[one:]
        rows, columns = others @ centred[one].T / n**0.5, others.transpose(1, 2) @ centred[one] / n**0.5
        for pairs in (rows, columns):
            pairs[0].fill_diagonal_(0)
            assert pairs.std().item() == pytest.approx(1, abs=0.02) and pairs.abs().max() < 6.5


@pytest.mark.slow
def test_compiled_code_counts_in_32_bits() -> None:
    "As for a GPU: torch folds what is added to a count into it, and where that takes more bits nothing is compiled."
    from torch._inductor import config
    from torch._inductor.index_propagation import IndexPropagation

    layer, counts, given = keyed(0.3, 1, 2, torch.arange(4), layer=1), [], IndexPropagation.materialize_expr

    def note(self: Any, expr: Any, dtype: torch.dtype) -> Any:
        counts.extend([expr] if getattr(expr, "free_symbols", None) else [])
        return given(self, expr, dtype)

    with patch.object(IndexPropagation, "materialize_expr", note), config.patch(force_disable_caches=True):
        torch.compile(lambda x: layer(x), dynamic=False, fullgraph=True)(torch.ones(4, 6))
    assert counts
    assert all(abs(int(number)) < 1 << 31 for count in counts for number in count.atoms(sympy.Integer))


def test_alone_it_draws_anew_from_torchs_stream_and_keeps_the_mean() -> None:
    torch.manual_seed(1)
    drop, x = Dropout(0.25), torch.ones(500, 40)
    first, second = drop(x), drop(x)
    assert not torch.equal(first, second)
    assert_close(first.unique(), torch.tensor([0, 4 / 3]))
    assert first.mean().item() == pytest.approx(1, abs=0.02)
    torch.manual_seed(1)
    drop.calls = 0
    assert torch.equal(drop(x), first)


def test_the_mean_is_kept_in_bf16() -> None:
    x = torch.linspace(1, 2, 100_000).bfloat16()[None]
    y = keyed(0.1, 0, 0, torch.arange(1))(x)
    stay = y != 0
    assert y.dtype == torch.bfloat16
    assert (y[stay].double() / x[stay].double() * 0.9).mean().item() == pytest.approx(1, abs=2e-4)


def test_gradients_pass_where_numbers_do() -> None:
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    y = Dropout(0.5)(x)
    y.sum().backward()
    assert_close(x.grad, (y != 0) * torch.full_like(x, 2))


def test_nothing_is_dropped_in_evaluation_or_with_p_0() -> None:
    x = torch.randn(3, 4)
    assert Dropout(0.9).eval()(x) is x and Dropout(0.0)(x) is x


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, float("nan")])
def test_impossible_probabilities_are_refused(p) -> None:
    with pytest.raises(UsageError, match=f"p={p}"):
        Dropout(p)


def test_another_number_of_samples_than_keys_is_refused() -> None:
    with pytest.raises(UsageError, match="a batch of 4 and was called with 8"):
        keyed(0.5, 0, 0, torch.arange(4))(torch.ones(8, 2))


def test_the_order_in_memory_changes_nothing() -> None:
    x = torch.randn(4, 3, 5, 6)
    drop, same = keyed(0.5, 3, 2, torch.arange(4)), keyed(0.5, 3, 2, torch.arange(4))
    y = drop(x.to(memory_format=torch.channels_last))
    assert torch.equal(y, same(x)) and y.is_contiguous(memory_format=torch.channels_last)


def two_drops() -> Module:
    "A model that drops pixels, then hidden numbers."
    torch.manual_seed(0)
    return Sequential(Flatten(), Dropout(0.3), Linear(48, 16), Dropout(0.5), Linear(16, 3)).double()


class Doubles(Normalize):
    "Normalises to float64."

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x).double()


def gradients_of(model: Module, batch, rows, step: int = 5, seed: int = 9) -> list[torch.Tensor]:
    "Of the sum of losses of `batch`, which stands at `rows` of its step's global batch, at each parameter."
    setup = SetupLearner("cpu", Doubles((0.5,) * 3, (0.2,) * 3), seed=seed)
    learn = Learner(copy.deepcopy(model), SimpleNamespace(), lambda a, b: a.square().sum(), cbs=[setup])
    learn.opt, learn.batch, learn.rows, learn.global_step = SGD(learn.model.parameters(), 0.0), batch, rows, step
    learn.zero_grad = lambda: None  # type: ignore[method-assign]
    learn("before_fit")
    learn.one_batch()
    assert all(drop.keys is None for drop in dropouts(learn.model))
    return [p.grad for p in learn.model.parameters()]


@given(st.lists(st.integers(0, 4), min_size=2, max_size=4), st.integers(0, 100))
def test_a_split_batch_drops_what_the_whole_one_does(sizes, step) -> None:
    model, n = two_drops(), sum(sizes)
    inputs, targets = torch.randint(0, 256, (n, 4, 4, 3), dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)
    whole = gradients_of(model, (inputs, targets), None, step)
    parts = zip(inputs.split(sizes), targets.split(sizes), torch.arange(n).split(sizes))
    split = [gradients_of(model, (x, y), rows, step) for x, y, rows in parts]
    assert_close([sum(grads) for grads in zip(*split)], whole)


def test_a_learner_repeats_a_steps_masks_and_changes_them_with_step_and_seed() -> None:
    batch = torch.randint(0, 256, (4, 4, 4, 3), dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    model = two_drops()
    assert_close(gradients_of(model, batch, None), gradients_of(model, batch, torch.arange(4)), rtol=0, atol=0)
    for other in ({"step": 6}, {"seed": 10}):
        assert not torch.equal(gradients_of(model, batch, None)[0], gradients_of(model, batch, None, **other)[0])


def test_a_learners_batch_leaves_torchs_stream_alone() -> None:
    batch = torch.randint(0, 256, (4, 4, 4, 3), dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    model = two_drops()
    before = torch.get_rng_state()
    gradients_of(model, batch, None)
    assert torch.equal(torch.get_rng_state(), before)
