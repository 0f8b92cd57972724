"Gradients of ranks with different numbers of samples, against the gradient of all samples at once."

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cluster.comms import PeerLost, Solo
from cluster.reducer import BUCKET, GradientSum
from cluster.shards import part
from learner.batchnorm import BatchNorm
from learner.layers import Conv, Flatten, Linear
from learner.models import simple_cnn_bn
from learner.module import Module, Sequential
from learner.optim import SGD


class Together(Solo):
    "A rank whose sum includes what it was given of the others; `started` are the sums begun, `finished` how many."

    def __init__(self, others: Sequence[Tensor] = ()) -> None:
        self.others, self.started, self.finished = list(others), list[Tensor](), 0

    def start_sum_(self, tensor: Tensor) -> None:
        first = tensor.storage_offset()
        self.started.append(tensor)
        for other in self.others:
            tensor += other[first : first + len(tensor)]

    def finish(self) -> None:
        self.finished = len(self.started)


def model() -> Module:
    "Three layers, always the same."
    torch.manual_seed(1)
    layers = [Conv(1, 4), Flatten(), Linear(20, 4), Linear(4, 3)]
    return Sequential(*layers).double()


def x(n: int) -> Tensor:
    "Inputs for `model`."
    return torch.randn(n, 1, 1, 5, dtype=torch.float64)


def gradients(net: Module) -> list[Tensor]:
    "Of each parameter."
    return [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("bucket_bytes", [1, BUCKET])
def test_one_flat_buffer_holds_all_gradients(bucket_bytes: int) -> None:
    net = model()
    reducer = GradientSum(net.parameters(), Solo(), bucket_bytes)
    net(x(2)).sum().backward()
    start, end = reducer.flat.data_ptr(), reducer.flat.data_ptr() + 8 * reducer.flat.numel()
    assert all(start <= grad.data_ptr() < end for grad in gradients(net)), "autograd fills the buffer itself"
    assert reducer.flat[:-1].count_nonzero() == sum(grad.count_nonzero() for grad in gradients(net))
    assert [grad.stride() for grad in gradients(net)] == [p.stride() for p in net.parameters()]
    cuts = [bucket.flat for bucket in reducer.buckets]
    assert torch.equal(torch.cat(cuts[::-1]), reducer.flat), "buckets are the buffer, cut"
    assert [p for bucket in reversed(reducer.buckets) for p in bucket.params] == net.parameters()
    assert len(cuts) == (len(net.parameters()) if bucket_bytes == 1 else 1), "a small model is one bucket"


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 1000), st.sampled_from([1, 200, BUCKET]))
def test_counts_weigh_right(n: int, world_size: int, seed: int, bucket_bytes: int) -> None:
    torch.manual_seed(seed)
    inputs, whole = x(n), model()
    whole(inputs).square().sum(1).mean().backward()

    def rank_gradients(rank: int, comm: Solo, finish: bool) -> tuple[Module, GradientSum]:
        mine, net = part(n, rank, world_size), model()  # for world_size > n, some ranks have no samples
        reducer = GradientSum(net.parameters(), comm, bucket_bytes)
        reducer.weight.fill_(len(mine))
        net(inputs[mine.start : mine.stop]).square().sum().backward()
        if finish:
            reducer(net.parameters())
        return net, reducer

    flats = [rank_gradients(rank, Solo(), False)[1].flat for rank in range(world_size)]
    for rank in range(world_size):
        others = [flat for other, flat in enumerate(flats) if other != rank]
        net, _ = rank_gradients(rank, Together(others), True)
        for grad, wanted in zip(gradients(net), gradients(whole), strict=True):
            torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-14)


def test_buckets_start_in_their_order_while_backward_runs() -> None:
    net, comm = model(), Together()
    reducer = GradientSum(net.parameters(), comm, 1)
    seen: list[int] = []
    hidden = net[0](x(2))
    hidden.register_hook(lambda grad: seen.append(len(comm.started)))
    net[3](net[2](net[1](hidden))).sum().backward()
    assert seen == [4], "both linear layers' were on their way when the convolution's backward began"
    assert [t.data_ptr() for t in comm.started] == [bucket.flat.data_ptr() for bucket in reducer.buckets]
    assert comm.finished == 0
    reducer(net.parameters())
    assert comm.finished == len(comm.started) == len(reducer.buckets)


@pytest.mark.parametrize("n", [0, 3])
def test_a_rank_without_samples_starts_the_same_messages(n: int) -> None:
    net, comm = simple_cnn_bn(), Together()
    order: list[int] = []
    for module in net.modules():
        if isinstance(module, BatchNorm):
            module.sum_ = lambda total: order.append(len(comm.started))
    reducer = GradientSum(net.parameters(), comm, 1)
    net(torch.randn(n, 3, 32, 32)).sum().backward()
    assert len(comm.started) == len(reducer.buckets) == 14
    assert order == [0, 0, 0, 0, 2, 5, 8, 11], "messages and BatchNorm's sums take turns as on any other rank"


def test_only_the_last_part_of_a_batch_starts_messages() -> None:
    net, comm = model(), Together()
    reducer = GradientSum(net.parameters(), comm, 1)
    for reducer.last_part in (False, False, True):
        assert not comm.started
        net(x(2)).sum().backward()
    assert len(comm.started) == len(reducer.buckets)
    with pytest.raises(RuntimeError, match="second backward"):
        net(x(2)).sum().backward()


def test_frozen_parameters_are_not_sent() -> None:
    net, comm = model(), Together()
    reducer = GradientSum(net.parameters(), comm, 1)
    net.requires_grad_(False)
    net[2].requires_grad_(True)
    net(x(2)).sum().backward()
    reducer(net.parameters())
    assert sum(t.numel() for t in comm.started) < 2 * 96, "the second layer, and the last one for its count"
    net.requires_grad_(True)
    net(x(2)).sum().backward()
    reducer(net.parameters())
    assert len(comm.started) == 3 + len(reducer.buckets)


class Broken(Together):
    "A rank whose peers are gone."

    def finish(self) -> None:
        raise PeerLost


@pytest.mark.parametrize("bucket_bytes", [1, BUCKET])
def test_a_step_that_fails_changes_nothing_and_another_comm_goes_on(bucket_bytes: int) -> None:
    net = model()
    reducer = GradientSum(net.parameters(), Broken(), bucket_bytes)
    optimizer = SGD(net.parameters(), 0.1, 0.9, reduce=reducer)
    net(x(2)).sum().backward()
    with pytest.raises(PeerLost):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), model().parameters()))
    assert not optimizer.state_dict()
    reducer.comm = comm = Together()
    assert not reducer.flat.any()
    net(x(2)).sum().backward()
    optimizer.step()
    assert comm.finished == len(reducer.buckets)
    assert optimizer.state_dict()


def test_no_sample_on_any_rank_gives_zeros() -> None:
    net = model()
    reducer = GradientSum(net.parameters(), Solo())
    reducer(net.parameters())
    assert not reducer.flat.any(), "not NaN"


def test_the_optimizer_reduces_before_it_updates() -> None:
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    reducer = GradientSum(net.parameters(), Solo())
    optimizer = SGD(net.parameters(), 0.5, reduce=reducer)
    for _ in range(2):  # views must outlive zero_grad
        net(x(4)).sum().backward()
        reducer.weight.fill_(4)
        optimizer.step()
        optimizer.zero_grad()
    moved = before[-1] - net.parameters()[-1]
    torch.testing.assert_close(moved.detach(), torch.ones(3, dtype=torch.float64), msg="2 steps of 0.5 * 4 / 4")


def test_a_replaced_gradient_is_noticed() -> None:
    net = model()
    reducer = GradientSum(net.parameters(), Solo())
    net.parameters()[0].grad = None
    net(x(1)).sum().backward()
    with pytest.raises(RuntimeError, match="zero_grad"):
        reducer(net.parameters())
