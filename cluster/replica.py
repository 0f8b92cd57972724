"Replica: all that training changes on one rank. It can be copied, compared and taken over: any one is a checkpoint."

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from cluster.rank_learner import RankLearner
from cluster.reducer import GradientSum
from learner.callbacks.ema import EMA
from learner.errors import UserError


class Replica:
    "The state of a rank's Learner, which is the same on all ranks after each step."

    def __init__(self, learner: RankLearner, reducer: GradientSum, device: torch.device) -> None:
        self.learner, self.reducer, self.device = learner, reducer, device

    def turn_to(self, training: bool) -> None:
        "Go over between training and validation, which callbacks hear of: one may put other weights in place."
        if self.learner.model.training != training:
            self.learner("cleanup_epoch")
            self.learner.model.training = training
            self.learner("before_epoch")

    def states(self) -> list[dict[str, Tensor]]:
        "All that training changes, as training sees it: the model, the optimizer, and what callbacks keep."
        self.turn_to(True)
        kept = [cb.state_dict() for cb in self.learner.cbs]
        return [self.learner.model.state_dict(), self.learner.opt.state_dict(), *kept]

    def snapshot(self) -> dict[str, np.ndarray]:
        "A copy of all that training changes, by names that say whose it is."
        states = enumerate(self.states())
        return {f"{n}/{name}": t.cpu().numpy().copy() for n, state in states for name, t in state.items()}

    def load(self, snapshot: dict[str, np.ndarray]) -> None:
        "Take over what `snapshot` of another worker, or of this one at another time, gave."
        states: list[dict[str, Tensor]] = [{} for _ in self.states()]
        for full_name, array in snapshot.items():
            number, _, name = full_name.partition("/")
            if number not in map(str, range(len(states))):
                raise UserError(f"{full_name!r} is nothing that this model and these options have a place for")
            states[int(number)][name] = torch.from_numpy(array.copy()).to(self.device)
        refuse_misfits(self.states(), states)
        model, opt, *kept = states
        self.learner.model.load_state_dict(model)
        self.learner.opt.load_state_dict(opt)
        for cb, state in zip(self.learner.cbs, kept, strict=True):
            cb.load_state_dict(state)
        self.reducer.reset()

    def checksums(self) -> dict[str, str]:
        "Of each tensor that training changes, by the names that `snapshot` gives them; the model's in its order."
        named = ((f"{n}/{name}", t) for n, state in enumerate(self.states()) for name, t in state.items())
        return {name: f"{zlib.crc32(tensor.cpu().numpy().tobytes()):08x}" for name, tensor in named}

    def fingerprint(self) -> str:
        "A checksum of all bits that training changes: equal on all ranks, or something is wrong."
        return f"{zlib.crc32(str(sorted(self.checksums().items())).encode()):08x}"

    def state(self) -> dict[str, np.ndarray]:
        "A copy by name of the model's tensors, averaged ones where there are."
        averages = [cb.average for cb in self.learner.cbs if isinstance(cb, EMA)]
        tensors = averages[0] if averages else self.learner.model.state_dict()
        return {name: tensor.cpu().numpy().copy() for name, tensor in tensors.items()}


def refuse_misfits(own: list[dict[str, Tensor]], given: list[dict[str, Tensor]]) -> None:
    """Raise UserError unless `given` are states such as `own`, those of the model, the optimizer and the callbacks.

    The same names, shapes and types, but for the optimizer's: it has none before its first step, and checks the shapes.
    """
    for number, (ours, theirs) in enumerate(zip(own, given, strict=True)):
        if number == 1:
            misfits = [name for name, t in theirs.items() if t.dim() and not t.is_floating_point()]
        else:
            kinds = [{name: (t.shape, t.dtype) for name, t in state.items()} for state in (ours, theirs)]
            misfits = sorted(name for name, _ in kinds[0].items() ^ kinds[1].items())
        if misfits:
            raise UserError(f"{misfits[0]!r} is missing, unknown, or of another shape or type than this run's")
