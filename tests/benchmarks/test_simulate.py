"The simulated step: what must hold of it whatever the model and network, and examples worked out by hand."

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scaling import Recorder, fitted, training
from benchmarks.simulate import FREE, Network, Piece, Protocol, limit, step_time, without_batchnorm
from cluster.comms import Solo
from cluster.reducer import GradientSum
from learner.batchnorm import batchnorms
from learner.models import build

Exchange = Callable[[float], float]

seconds = st.floats(0, 1)
any_piece = st.builds(Piece, seconds, st.sampled_from([0, 1e3, 1e7]), st.booleans())
UPDATE = 0.25
steps = st.lists(any_piece, max_size=8).map(lambda pieces: [*pieces, Piece(0.5, 0, True), Piece(UPDATE)])
ranks = st.integers(2, 2048)
protocols = st.lists(
    st.builds(Protocol, *[st.floats(0, 1e-4)] * 3, st.floats(0.1, 1)), min_size=1, max_size=2
).map(tuple)  # fmt: skip
networks = st.builds(Network, st.floats(1e8, 1e12), st.floats(1e8, 1e12), protocols, st.sampled_from([1, 8]))


def compute(pieces: list[Piece]) -> float:
    return sum(piece.seconds for piece in pieces)


@given(steps, networks)
def test_one_worker_takes_compute_and_update(pieces: list[Piece], network: Network) -> None:
    assert step_time(pieces, partial(network.exchange, n=1)) == pytest.approx(compute(pieces))


@given(steps, ranks)
def test_so_do_any_number_over_a_network_that_costs_nothing(pieces: list[Piece], n: int) -> None:
    free = Network(inf, inf, (FREE,))
    assert step_time(pieces, partial(free.exchange, n=n)) == pytest.approx(compute(pieces))


@given(steps, networks, ranks)
def test_no_step_is_faster_than_its_compute_or_its_messages(pieces: list[Piece], network: Network, n: int) -> None:
    exchange = partial(network.exchange, n=n)
    messages = sum(exchange(piece.size) for piece in pieces if piece.size)
    assert step_time(pieces, exchange) >= compute(pieces) * (1 - 1e-9)
    assert step_time(pieces, exchange) >= (messages + UPDATE) * (1 - 1e-9)  # all are through before the update
    assert step_time(pieces, exchange) <= (messages + compute(pieces)) * (1 + 1e-9)


@given(steps, networks, ranks, st.floats(1, 100))
def test_more_bandwidth_or_less_latency_never_slows_a_step(
    pieces: list[Piece], network: Network, n: int, factor: float
) -> None:
    now = step_time(pieces, partial(network.exchange, n=n)) * (1 + 1e-9)
    quick = tuple(replace(p, within=p.within / factor, between=p.between / factor) for p in network.protocols)
    for better in (
        replace(network, within=network.within * factor),
        replace(network, between=network.between * factor),
        replace(network, protocols=quick),
    ):
        assert step_time(pieces, partial(better.exchange, n=n)) <= now


@given(steps, networks, ranks)
def test_a_step_without_batchnorms_sums_is_no_slower(pieces: list[Piece], network: Network, n: int) -> None:
    exchange = partial(network.exchange, n=n)
    assert step_time(without_batchnorm(pieces), exchange) <= step_time(pieces, exchange) * (1 + 1e-9)


def test_two_buckets_by_hand() -> None:
    exchange: Exchange = {10: 4.0, 20: 5.0}.__getitem__
    #          compute  0......3..4......6 (ends)                 11..12.5 (update)
    #          messages        3------7 (first) 7---------12 (second, ready at 4)
    pieces = [Piece(3, 10), Piece(1, 20), Piece(2, 0, True), Piece(1.5)]
    assert step_time(pieces, exchange) == 12 + 1.5


def test_the_first_bucket_is_hidden_behind_backward_and_the_last_is_not() -> None:
    pieces = [Piece(3, 10), Piece(6, 20), Piece(0, 0, True), Piece(1)]
    assert step_time(pieces, {10: 4.0, 20: 5.0}.__getitem__) == 9 + 5 + 1


def test_a_sum_of_batchnorm_waits_for_the_bucket_before_it() -> None:
    exchange: Exchange = {10: 4.0, 1: 0.5}.__getitem__
    pieces = [Piece(3, 10), Piece(1, 1, True), Piece(2, 0, True), Piece(1)]
    assert step_time(pieces, exchange) == 3 + 4 + 0.5 + 2 + 1
    assert step_time(without_batchnorm(pieces), exchange) == 3 + 4 + 1


BOTH = Protocol(begin=0, within=1, between=100)


def test_a_ring_goes_through_each_node_once() -> None:
    ring = Network(1e9, 1e9, (BOTH,))._ring
    assert ring(0, 8, BOTH) == 14  # one node: no network
    assert ring(0, 16, BOTH) == 28 + 2 * 100
    assert ring(0, 1024, BOTH) == (2046 - 254) + 254 * 100


def test_a_trees_hops_grow_with_the_logarithm_of_the_nodes() -> None:
    tree = Network(1e9, 1e9, (BOTH,))._tree
    assert tree(0, 8, BOTH) == 14
    assert tree(0, 16, BOTH) == 14 + 2 * 100
    assert tree(0, 1024, BOTH) == 14 + 2 * 7 * 100


def test_bandwidth_is_the_nodes_between_nodes_and_nvlinks_within_one() -> None:
    network = Network(within=100, between=1, protocols=(FREE,))
    assert network.exchange(800, 8) == pytest.approx(2 * 7 / 8 * 800 / 100)
    assert network.exchange(800, 16) == pytest.approx(2 * 15 / 16 * 800 / 1)


def test_long_messages_take_the_ring_and_short_ones_the_tree() -> None:
    network = Network(450e9, 400e9, (Protocol(6.8e-6, 0.6e-6, 5e-6),))
    by = network.protocols[0]
    assert network.exchange(1e3, 1024) == network._tree(1e3, 1024, by) < network._ring(1e3, 1024, by)
    assert network.exchange(1e9, 16) == network._ring(1e9, 16, by) < network._tree(1e9, 16, by)


@pytest.mark.parametrize(
    ("network", "step", "found"),
    [
        (Network(inf, inf, (FREE,)), [Piece(1, 1e6), Piece(0, 0, True)], "compute"),
        (Network(1e6, 1e6, (FREE,)), [Piece(1, 1e6), Piece(0, 0, True)], "bandwidth"),
        (Network(inf, inf, (Protocol(0, 1, 1),)), [Piece(1, 1e6), Piece(0, 0, True)], "latency"),
        (Network(inf, inf, (Protocol(0, 1, 1),)), [*[Piece(1, 9, True)] * 9, Piece(0, 0, True)], "BatchNorm"),
    ],
)
def test_what_limits_a_step_is_what_would_save_most(network: Network, step: list[Piece], found: str) -> None:
    assert limit(step, network, 64) == found


def test_the_fitted_network_gives_back_what_it_was_fitted_to() -> None:
    network = fitted(small=2e-4, large=0.03, size=1e7)
    assert network.exchange(0, 2) == pytest.approx(2e-4)
    assert network.exchange(1e7, 2) == pytest.approx(0.03)
    assert network.exchange(1e7, 4) == pytest.approx(6 * 1e-4 + 1.5 * (0.03 - 2e-4))


def test_a_recorded_step_has_the_buckets_and_sums_of_the_model() -> None:
    recorder = Recorder()
    train = training("resnet18", 32, 1, recorder, shared=True)
    pieces = recorder.step(train)
    net = build("resnet18", 3, 10)
    buckets = [bucket.flat.nbytes for bucket in GradientSum(net.parameters(), Solo()).buckets]
    assert [piece.size for piece in pieces if piece.size and not piece.waits] == buckets
    assert sum(bool(piece.size) and piece.waits for piece in pieces) == 2 * len(batchnorms(net))  # forth and back


def test_without_shared_batchnorm_a_step_has_one_message_more_than_its_buckets() -> None:
    recorder = Recorder()
    pieces = recorder.step(training("simple_cnn_bn", 16, 2, recorder, shared=False))
    assert [(bool(piece.size), piece.waits) for piece in pieces] == [
        (True, False), (False, True), (True, True), (False, True), (False, False)
    ]  # fmt: skip
