"Gradients of ranks with different numbers of samples, against the gradient of all samples at once."

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cluster.comms import Solo
from cluster.reducer import GradientSum
from cluster.shards import part
from learner.layers import Linear
from learner.module import Module, Sequential
from learner.optim import SGD


class Together(Solo):
    "A rank whose sum includes what it was given of the others."

    def __init__(self, others: Sequence[Tensor]) -> None:
        self.others = others

    def sum_(self, tensor: Tensor) -> None:
        for other in self.others:
            tensor += other


def model() -> Module:
    "Two layers, always the same."
    torch.manual_seed(1)
    return Sequential(Linear(5, 4), Linear(4, 3)).double()


def gradients(net: Module) -> list[Tensor]:
    "Of each parameter."
    return [p.grad for p in net.parameters() if p.grad is not None]


def test_one_flat_buffer_holds_all_gradients() -> None:
    net = model()
    reducer = GradientSum(net.parameters(), Solo())
    net(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    start, end = reducer.flat.data_ptr(), reducer.flat.data_ptr() + 8 * reducer.flat.numel()
    assert all(start <= grad.data_ptr() < end for grad in gradients(net)), "autograd fills the buffer itself"
    assert reducer.flat.numel() == sum(p.numel() for p in net.parameters()) + 1
    torch.testing.assert_close(reducer.flat[:-1], torch.cat([grad.flatten() for grad in gradients(net)]))


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 1000))
def test_counts_weigh_right(n: int, world_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, whole = torch.randn(n, 5, dtype=torch.float64), model()
    whole(x).square().sum(1).mean().backward()
    flats, nets = [], []
    for rank in range(world_size):
        mine = part(n, rank, world_size)  # for world_size > n, some ranks have no samples
        net = model()
        reducer = GradientSum(net.parameters(), Solo())
        net(x[mine.start : mine.stop]).square().sum().backward()
        flats.append((reducer, net))
        reducer.flat[-1] = len(mine)
        nets.append(reducer.flat.clone())
    for rank, (reducer, net) in enumerate(flats):
        reducer.comm = Together([flat for other, flat in enumerate(nets) if other != rank])
        reducer(net.parameters())
        for grad, wanted in zip(gradients(net), gradients(whole), strict=True):
            torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-14)


def test_no_sample_on_any_rank_gives_zeros() -> None:
    net = model()
    reducer = GradientSum(net.parameters(), Solo())
    reducer(net.parameters())
    assert reducer.flat.count_nonzero() == 0, "not NaN"


def test_the_optimizer_reduces_before_it_updates() -> None:
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    reducer = GradientSum(net.parameters(), Solo())
    optimizer = SGD(net.parameters(), 0.5, reduce=reducer)
    for _ in range(2):  # views must outlive zero_grad
        net(torch.ones(4, 5, dtype=torch.float64)).sum().backward()
        reducer.weight.fill_(4)
        optimizer.step()
        optimizer.zero_grad()
    moved = before[-1] - net.parameters()[-1]
    torch.testing.assert_close(moved.detach(), torch.ones(3, dtype=torch.float64), msg="2 steps of 0.5 * 4 / 4")


def test_a_replaced_gradient_is_noticed() -> None:
    net = model()
    reducer = GradientSum(net.parameters(), Solo())
    net.parameters()[0].grad = None
    net(torch.ones(1, 5, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match="zero_grad"):
        reducer(net.parameters())
