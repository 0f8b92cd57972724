"The optimizer: SGD against torch's, and what may be set, saved and refused."

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from learner.errors import UserError
from learner.module import Parameter
from learner.optim import SGD, Optimizer, average_grad, l2, sgd_step

rates = st.sampled_from([0.0, 1e-3, 0.1, 0.9])


def params(seed: int = 0, shapes=((2, 3), (4,), ())) -> list[Parameter]:
    stream = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, dtype=torch.float64, generator=stream)) for shape in shapes]


def give_gradients(seed: int, *lists) -> None:
    "The same random gradients to the parameters of each list."
    for tensors in lists:
        stream = torch.Generator().manual_seed(seed)
        for p in tensors:
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=stream)


@given(
    st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4),
    rates, rates, rates, st.integers(1, 30), st.integers(0, 2**31),
)  # fmt: skip
def test_sgd_equals_torchs_over_many_steps(shapes, lr, momentum, weight_decay, steps, seed) -> None:
    ours = params(seed, shapes)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    opt = SGD(ours, lr, momentum, weight_decay)
    oracle = torch.optim.SGD(theirs, lr, momentum, weight_decay=weight_decay)
    for step in range(steps):
        give_gradients(seed + step, ours, theirs)
        opt.lr = oracle.param_groups[0]["lr"] = lr / (step + 1)
        opt.step()
        oracle.step()
    assert_close([p.detach() for p in ours], [p.detach() for p in theirs], rtol=1e-12, atol=1e-12)


def test_what_has_no_gradient_or_is_frozen_stays() -> None:
    none, frozen, free = params()
    give_gradients(1, [frozen, free])
    frozen.requires_grad = False
    before = [p.detach().clone() for p in (none, frozen, free)]
    SGD([none, frozen, free], 0.1, 0.9, 0.1).step()
    assert [torch.equal(p, old) for p, old in zip((none, frozen, free), before)] == [True, True, False]


def test_a_step_records_nothing_for_autograd() -> None:
    tensors = params()
    give_gradients(1, tensors)
    opt = SGD(tensors, 0.1, 0.9, 0.1)
    opt.step()
    assert all(p.is_leaf and p.requires_grad for p in tensors)
    assert not any(tensor.requires_grad for tensor in opt.state_dict().values())


def test_groups_have_hyperparameters_of_their_own() -> None:
    first, second = params()[:1], params()[:1]
    opt = SGD([first, second], lr=0.1)
    opt.groups[0][1]["lr"] = 0.0
    give_gradients(1, first, second)
    opt.step()
    assert torch.equal(first[0], params()[0]) and torch.equal(second[0], params()[0] - 0.1 * second[0].grad)
    assert [id(p) for p in opt.params] == [id(first[0]), id(second[0])]
    opt.set(lr=0.5)
    assert [hypers["lr"] for _, hypers in opt.groups] == [0.5, 0.5] and opt.lr == 0.5


def test_hyperparameters_are_read_and_set_as_attributes() -> None:
    opt = SGD(params(), lr=0.1, momentum=0.9, weight_decay=0.01)
    opt.lr = 0.2
    assert (opt.lr, opt.momentum, opt.weight_decay) == (0.2, 0.9, 0.01)
    with pytest.raises(AttributeError, match="learning_rate"):
        _ = opt.learning_rate


@pytest.mark.parametrize(
    "misuse",
    [
        lambda: Optimizer(params(), [sgd_step], [average_grad], lr=0.1, momentun=0.9),
        lambda: SGD(params(), lr=0.1, momentum=0.9).set(momentun=0.5),
        lambda: setattr(SGD(params(), lr=0.1, momentum=0.9), "momentun", 0.5),
    ],
)
def test_a_misspelt_hyperparameter_is_refused_with_the_nearest(misuse) -> None:
    with pytest.raises(UserError, match=r"'momentun'.*did you mean momentum\?.*lr"):
        misuse()


def test_a_hyperparameter_without_a_value_is_refused() -> None:
    with pytest.raises(UserError, match="'lr' needs a value"):
        Optimizer(params(), [sgd_step], [l2])


def test_a_refused_set_changes_no_group() -> None:
    opt = SGD([params()[:1], params()[1:]], lr=0.1)
    with pytest.raises(UserError):
        opt.set(lr=0.2, rate=1.0)
    assert [hypers["lr"] for _, hypers in opt.groups] == [0.1, 0.1]


def test_a_stepper_of_ones_own_declares_its_hyperparameters_by_its_signature() -> None:
    def sign_step(p, grad, state, *, lr, scale=2.0) -> None:
        p.sub_(grad.sign(), alpha=lr * scale)

    tensors = params()
    give_gradients(1, tensors)
    opt = Optimizer(tensors, [sign_step], lr=0.5)
    opt.step()
    assert_close(tensors[0].detach(), params()[0].detach() - tensors[0].grad.sign())
    assert opt.scale == 2.0


def test_a_state_that_is_no_tensor_is_refused() -> None:
    def counting(p, grad, state) -> None:
        state["n"] = state.get("n", 0) + 1

    tensors = params()
    give_gradients(1, tensors)
    with pytest.raises(UserError, match=r"state 'n' is 1: keep it as torch.tensor"):
        Optimizer(tensors, [counting]).step()


def test_zero_grad_writes_zeros_where_the_gradient_lies() -> None:
    tensors = params()
    give_gradients(1, tensors[:2])
    grads = [p.grad for p in tensors[:2]]
    SGD(tensors, 0.1).zero_grad()
    assert all(p.grad is grad and not grad.any() for p, grad in zip(tensors, grads)) and tensors[2].grad is None


def test_reduce_is_called_once_a_step_before_the_update_which_uses_what_it_made() -> None:
    calls = []

    def reduce(given: list[Parameter]) -> None:
        calls.append(([id(p) for p in given], [p.detach().clone() for p in given]))
        for p in given:
            p.grad.fill_(1.0)

    tensors = params()
    give_gradients(1, tensors)
    SGD(tensors, 0.5, reduce=reduce).step()
    assert len(calls) == 1 and calls[0][0] == [id(p) for p in tensors]
    assert all(torch.equal(before, start) for before, start in zip(calls[0][1], params()))
    assert all(torch.equal(p, start - 0.5) for p, start in zip(tensors, params()))


def test_a_loaded_state_goes_on_bitwise() -> None:
    straight, resumed = params(), params()
    opt = SGD(straight, 0.1, 0.9, 0.01)
    for step in range(6):
        if step == 3:
            saved = {name: tensor.clone() for name, tensor in opt.state_dict().items()}
            weights = [p.detach().clone() for p in straight]
        give_gradients(step, straight)
        opt.step()
    for p, weight in zip(resumed, weights):
        p.data.copy_(weight)
    second = SGD(resumed, 0.1, 0.9, 0.01)
    second.load_state_dict(saved)
    for step in range(3, 6):
        give_gradients(step, resumed)
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed))
    assert set(saved) == {f"{n}.grad_avg" for n in range(3)}


def test_a_loaded_state_is_a_copy() -> None:
    tensors = params()
    give_gradients(0, tensors)
    opt, other = SGD(tensors, 0.1, 0.9), SGD(params(), 0.1, 0.9)
    opt.step()
    other.load_state_dict(opt.state_dict())
    before = other.state_dict()["0.grad_avg"].clone()
    opt.step()
    assert torch.equal(other.state_dict()["0.grad_avg"], before)


@pytest.mark.parametrize("name", ["3.grad_avg", "0.grad_avg", "first.grad_avg"])
def test_a_state_that_does_not_fit_is_refused_whole(name: str) -> None:
    tensors = params()
    give_gradients(0, tensors)
    opt = SGD(tensors, 0.1, 0.9)
    opt.step()
    before = {key: tensor.clone() for key, tensor in opt.state_dict().items()}
    with pytest.raises(UserError, match=name):
        opt.load_state_dict({"1.grad_avg": torch.zeros(4), name: torch.zeros(5)})
    assert before.keys() == opt.state_dict().keys()
    assert all(torch.equal(before[key], opt.state_dict()[key]) for key in before)


def test_without_momentum_no_state_is_kept() -> None:
    tensors = params()
    give_gradients(0, tensors)
    opt = SGD(tensors, 0.1, weight_decay=0.1)
    opt.step()
    assert opt.state_dict() == {}
