"""A step that breaks in the middle of backward, messages under way, in three real processes.

Rank 1 fails once it has started some of its buckets. All ranks must hear of it at once, hold the weights they had,
and be able to go on in a new group with the same reducer.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

from cluster.meeting import KeyStore

MEMBER = """
import json, sys, time
import torch
from cluster.comms import Group, PeerLost, Solo
from cluster.meeting import Meeting
from cluster.reducer import GradientSum
from learner.batchnorm import BatchNorm
from learner.layers import Linear
from learner.module import Sequential
from learner.optim import SGD

rank, port = map(int, sys.argv[1:])
torch.set_num_threads(1)
torch.manual_seed(0)
layers = [Linear(300, 300), BatchNorm(300), Linear(300, 300), Linear(300, 300), Linear(300, 1)]
inputs = torch.randn(3, 4, 300)

class Mishap(Exception):
    pass

def fail(grad):
    raise Mishap

def join(name):
    group = Group(rank, 3, Meeting("127.0.0.1", port, name), "gloo")
    layers[1].sum_ = group.sum_
    return group

def step(x, mishap=False):
    reducer.weight.fill_(len(x))
    hidden = layers[2](layers[1](layers[0](x)))
    if mishap:
        hidden.register_hook(fail)
    layers[4](layers[3](hidden)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()

net = Sequential(*layers)
group = join("first")
reducer = GradientSum(net.parameters(), group, 100_000)
optimizer = SGD(net.parameters(), 1e-3, 0.9, reduce=reducer)
step(inputs[rank])
kept = [p.detach().clone() for p in net.parameters()]
momentum = {name: t.clone() for name, t in optimizer.state_dict().items()}
try:
    step(inputs[rank], rank == 1)
except (Mishap, PeerLost) as error:
    group.close()
    told = {"error": type(error).__name__, "at": time.time()}
told["same"] = all(torch.equal(p, old) for p, old in zip(net.parameters(), kept)) and all(
    torch.equal(t, momentum[name]) for name, t in optimizer.state_dict().items())
reducer.comm = group = join("second")
step(inputs[rank])
told["weights"] = [float(p.detach().double().sum()) for p in net.parameters()]
reducer.comm, layers[1].sum_ = Solo(), None
for p, old in zip(net.parameters(), kept):
    p.data.copy_(old)
optimizer.load_state_dict(momentum)
step(inputs.flatten(0, 1))
told["alone"] = [float(p.detach().double().sum()) for p in net.parameters()]
group.close()
print(json.dumps(told), flush=True)
"""


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    "What each rank saw."
    store = KeyStore("127.0.0.1")
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, f"{rank}", f"{store.meeting.port}"], stdout=subprocess.PIPE, text=True
        )
        for rank in range(3)
    ]
    try:
        return [json.loads(member.communicate(timeout=60)[0].splitlines()[-1]) for member in members]
    finally:
        for member in members:
            member.kill()
            member.wait()


def test_all_ranks_hear_of_it_at_once(told: list[dict[str, Any]]) -> None:
    assert [one["error"] for one in told] == ["PeerLost", "Mishap", "PeerLost"]
    assert max(one["at"] for one in told) - told[1]["at"] < 5, "not when a timeout ends"


def test_weights_and_momentum_are_those_of_the_last_whole_step(told: list[dict[str, Any]]) -> None:
    assert all(one["same"] for one in told)


def test_they_go_on_together_as_if_nothing_had_been(told: list[dict[str, Any]]) -> None:
    assert told[0]["weights"] == told[1]["weights"] == told[2]["weights"]
    assert told[0]["weights"] == pytest.approx(told[0]["alone"], rel=1e-4, abs=1e-4)
