"Every named optimizer against torch's own (LAMB against its paper written out), over many steps in float64."

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.errors import UserError
from learner.module import Parameter
from learner.optim import LAMB, SGD, Adam, AdamW, Muon, RMSProp
from learner.optimizer import spread
from learner.orthogonal import orthogonalized

SHAPES = [(3, 2), (4,), (2, 3, 2, 2)]


def run(make_ours, make_theirs, steps=40):
    "Both optimizers on a loss that couples all parameters; returns both sets of parameters."
    torch.manual_seed(0)
    start = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    target = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    results = []
    for wrap, make in ((Parameter, make_ours), (torch.nn.Parameter, make_theirs)):
        params = [wrap(t.clone()) for t in start]
        opt = make(params)
        for _ in range(steps):
            loss = sum(((p - t) ** 2).sum() for p, t in zip(params, target))
            (loss + 0.1 * params[1].sum() * params[0].sum().sin()).backward()
            opt.step()
            opt.zero_grad()
        results.append(params)
    return results


PAIRS = {
    "sgd": (lambda p: SGD(p, 0.05, weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.05, weight_decay=0.1)),
    "momentum": (lambda p: SGD(p, 0.05, 0.9, 0.1), lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=0.1)),
    "dampening": (
        lambda p: SGD(p, 0.05, 0.9, 0.1, dampening=0.3),
        lambda p: torch.optim.SGD(p, 0.05, 0.9, dampening=0.3, weight_decay=0.1),
    ),
    "nesterov": (
        lambda p: SGD(p, 0.05, 0.9, 0.1, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=0.1, nesterov=True),
    ),
    "rmsprop": (
        lambda p: RMSProp(p, 0.01, alpha=0.9, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, 0.01, alpha=0.9, weight_decay=0.1),
    ),
    "rmsprop with momentum": (
        lambda p: RMSProp(p, 0.01, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
    ),
    "adam": (
        lambda p: Adam(p, 0.05, (0.8, 0.99), 1e-6, 0.1),
        lambda p: torch.optim.Adam(p, 0.05, (0.8, 0.99), 1e-6, 0.1),
    ),
    "adamw": (
        lambda p: AdamW(p, 0.05, (0.8, 0.99), 1e-6, 0.1),
        lambda p: torch.optim.AdamW(p, 0.05, (0.8, 0.99), 1e-6, 0.1),
    ),
}


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.1}])
def test_what_is_not_nesterovs_is_refused_as_torch_does(options):
    params = [Parameter(torch.zeros(2))]
    with pytest.raises(UserError, match="is none of Nesterov's"):
        SGD(params, 0.1, nesterov=True, **options)
    with pytest.raises(ValueError, match="Nesterov"):
        torch.optim.SGD(params, 0.1, nesterov=True, **options)


@pytest.mark.parametrize("low_high", [(0, 1e-3), (1e-3, 0), (-1, 1)])
def test_no_rates_are_spread_from_or_to_0(low_high):
    with pytest.raises(UserError, match="both must be above 0"):
        spread(slice(*low_high), 3)
    assert spread(slice(1e-4, 1e-2), 3) == pytest.approx([1e-4, 1e-3, 1e-2])


@pytest.mark.parametrize("name", PAIRS)
def test_equals_torch(name):
    for ours, theirs in zip(*run(*PAIRS[name])):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-10, atol=1e-12)


class PaperLamb:
    "Algorithm 2 of https://arxiv.org/abs/1904.00962, line by line, one tensor at a time."

    def __init__(self, params, lr, beta1, beta2, eps, decay):
        self.params, self.numbers, self.t = params, (lr, beta1, beta2, eps, decay), 0
        self.m, self.v = ([torch.zeros_like(p) for p in params] for _ in range(2))

    def step(self):
        lr, beta1, beta2, eps, decay = self.numbers
        self.t += 1
        with torch.no_grad():
            for i, x in enumerate(self.params):
                g = x.grad
                self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
                self.v[i] = beta2 * self.v[i] + (1 - beta2) * g**2
                m_hat, v_hat = self.m[i] / (1 - beta1**self.t), self.v[i] / (1 - beta2**self.t)
                update = m_hat / (v_hat.sqrt() + eps) + decay * x
                x -= lr * (x.norm() / update.norm()) * update

    def zero_grad(self):
        for p in self.params:
            p.grad = None


def test_lamb_equals_its_paper():
    for ours, theirs in zip(
        *run(lambda p: LAMB(p, 0.01, weight_decay=0.1), lambda p: PaperLamb(p, 0.01, 0.9, 0.999, 1e-6, 0.1))
    ):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-10, atol=1e-12)


def test_lamb_moves_weights_that_start_at_zero():
    p = Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    LAMB([p], 0.1).step()
    assert (p < 0).all()


sides = st.integers(1, 20)


@given(sides, sides, st.integers(0, 2**32), st.sampled_from([1e-30, 1.0, 1e30]))
def test_orthogonalizing_keeps_singular_vectors_and_makes_values_about_one(rows, cols, seed, scale):
    "Against the decomposition itself, whose values go through the five steps' polynomial as numbers."
    x = torch.randn(2, rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[1] *= scale
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    values /= values.norm(dim=1, keepdim=True)
    if min(rows, cols) > 1:
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonalized(x), left * values.unsqueeze(1) @ right, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(9, 30), (30, 9), (16, 16), (8, 3, 3, 3), (40, 2, 3, 3)])
def test_muon_is_torchs_but_for_its_half_precision(shape):
    "A convolution's weight is a matrix with a row for each channel that comes out of it."
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has Muon from 2.9 on")
    torch.manual_seed(0)
    start, grads = torch.randn(shape), torch.randn(20, *shape)
    ours, theirs = Parameter(start.clone()), torch.nn.Parameter(start.flatten(1).clone())
    opt = Muon([ours], 0.05, 0.9, weight_decay=0.1)
    peer = torch.optim.Muon([theirs], 0.05, 0.1, 0.9, adjust_lr_fn="match_rms_adamw")
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.flatten(1).clone()
        opt.step()
        peer.step()
    moved = (theirs.detach() - start.flatten(1)).norm()
    assert (ours.detach().flatten(1) - theirs.detach()).norm() < 0.01 * moved


@pytest.mark.parametrize("shape", [(), (7,), (1, 7), (5, 1), (4, 3, 3, 3)])
def test_muon_moves_each_parameter_by_about_a_fifth_of_the_rate(shape):
    "By the root of the mean square, whatever the gradient's size; a gradient of zeros moves nothing."
    torch.manual_seed(0)
    for size in (1e-12, 1.0, 1e12):
        p = Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape) * size
        Muon([p], 0.5, weight_decay=0.0).step()
        assert 0.06 < p.detach().square().mean().sqrt() < 0.12
    p = Parameter(torch.ones(shape))
    p.grad = torch.zeros(shape)
    Muon([p], 0.5, weight_decay=0.0).step()
    assert (p == 1).all()


@pytest.mark.parametrize(
    "make", [PAIRS[name][0] for name in PAIRS] + [lambda p: LAMB(p, 0.01), lambda p: Muon(p, 0.01)]
)
def test_state_survives_its_dictionary(make):
    "Stop after 5 steps, load into a new optimizer, and go on: the same as never having stopped."
    torch.manual_seed(1)
    start, grads = torch.randn(5), torch.randn(10, 5)
    whole, parted = Parameter(start.clone()), Parameter(start.clone())
    straight, first = make([whole]), make([parted])
    for number, grad in enumerate(grads):
        whole.grad, parted.grad = grad.clone(), grad.clone()
        straight.step()
        if number == 5:
            state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
            first = make([parted])
            first.load_state_dict(state)
        first.step()
    assert torch.equal(whole, parted)


def test_groups_have_their_own_hyperparameters():
    a, b = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    a.grad, b.grad = torch.zeros(2), torch.zeros(2)
    AdamW([{"params": [a], "weight_decay": 0.0}, {"params": [b]}], 0.1, weight_decay=0.5).step()
    assert torch.equal(a, torch.ones(2)) and torch.allclose(b, torch.full((2,), 0.95))


def test_rates_spread_over_groups():
    groups = [[Parameter(torch.ones(1))] for _ in range(3)]
    opt = SGD(groups, slice(1e-6, 1e-4))
    assert [hypers["lr"] for _, hypers in opt.groups] == pytest.approx([1e-6, 1e-5, 1e-4])
    opt.lr = slice(None, 1e-3)
    assert [hypers["lr"] for _, hypers in opt.groups] == pytest.approx([1e-4, 1e-4, 1e-3])
    opt.set(lr=[1.0, 2.0, 3.0])
    assert [hypers["lr"] for _, hypers in opt.groups] == [1.0, 2.0, 3.0]
    assert opt.lr == 3.0
    with pytest.raises(UserError, match=r"2 values .* 3 groups of layers"):
        opt.set(lr=[1.0, 2.0])
    assert spread(slice(1e-6, 1e-4), 1) == [1e-4]


def test_a_parameter_in_two_groups_is_refused():
    p = Parameter(torch.ones(1))
    with pytest.raises(UserError, match="two groups"):
        SGD([[p], [p]], 0.1)


def test_an_unknown_hyperparameter_of_a_group_is_refused():
    with pytest.raises(UserError, match=r"'wd' is unknown.* weight_decay"):
        SGD([{"params": [Parameter(torch.ones(1))], "wd": 1.0}], lr=0.1)
