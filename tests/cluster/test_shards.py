"Which samples are whose, checked against what a partition is, for any numbers."

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.shards import local_batch, n_batches, part

COUNTS = st.integers(0, 300)
WORLDS = st.integers(1, 20)


@given(COUNTS, WORLDS)
def test_parts_partition(n: int, world_size: int) -> None:
    parts = [part(n, rank, world_size) for rank in range(world_size)]
    assert [i for one in parts for i in one] == list(range(n)), "contiguous, in the order of ranks, each once"
    sizes = [len(one) for one in parts]
    assert max(sizes) - min(sizes) <= 1


@given(COUNTS, st.integers(1, 70), WORLDS, st.randoms(use_true_random=False))
def test_an_epoch_has_every_sample_once(n: int, batch_size: int, world_size: int, random) -> None:
    order = list(range(n))
    random.shuffle(order)
    seen: list[int] = []
    for batch in range(n_batches(n, batch_size)):
        parts = [local_batch(n, batch_size, batch, rank, world_size) for rank in range(world_size)]
        together = [order[place] for one in parts for place in one.places]
        assert [row for one in parts for row in one.rows] == list(range(len(together)))
        assert all(one.n == len(together) and list(one.rows) == list(one.mine) for one in parts)
        assert together == order[batch * batch_size :][:batch_size], "the global batch does not depend on the workers"
        seen += together
    assert Counter(seen) == Counter(range(n))


@given(COUNTS, st.integers(1, 70))
def test_only_the_last_batch_is_smaller(n: int, batch_size: int) -> None:
    sizes = [len(local_batch(n, batch_size, batch, 0, 1).mine) for batch in range(n_batches(n, batch_size))]
    assert all(size == batch_size for size in sizes[:-1])
    assert all(1 <= size <= batch_size for size in sizes[-1:])


@pytest.mark.parametrize(("world_size", "expected"), [(1, [1]), (2, [0, 1]), (3, [0, 0, 1])])
def test_fewer_samples_than_ranks(world_size: int, expected: list[int]) -> None:
    assert [len(local_batch(1, 13, 0, rank, world_size).mine) for rank in range(world_size)] == expected
