"EMA: an exponential moving average of the weights, which is what gets validated, and what a run saves."

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from learner.learner import Callback


class EMA(Callback):
    """Average parameters and buffers over steps: Polyak and Juditsky, 1992.

    average = decay * average + (1 - decay) * weights, with a decay that rises as (1 + step) / (10 + step) up to
    `decay`, so that the first weights are soon forgotten. `average` maps the state_dict's names to tensors; behind a
    fit the model has its weights again, and gets what was validated by `learn.model.load_state_dict(ema.average)`.
    """

    order = 30

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.live: dict[str, Tensor] = {}

    def before_fit(self) -> None:
        "Begin with the weights as they are."
        self.average = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    @torch.no_grad()
    def after_step(self) -> None:
        "Move the average towards the new weights; integers are copied."
        decay = min(self.decay, (1 + self.global_step) / (10 + self.global_step))
        state = self.model.state_dict()
        moving = [name for name, tensor in state.items() if tensor.is_floating_point()]
        # a few kernels on a GPU, not one for each
        torch._foreach_lerp_([self.average[name] for name in moving], [state[name] for name in moving], 1 - decay)
        for name in state.keys() - moving:
            self.average[name].copy_(state[name])

    def before_epoch(self) -> None:
        "Validate with the average."
        if not self.model.training:
            self.live = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self.model.load_state_dict(self.average)

    def cleanup_epoch(self) -> None:
        "Train on with the weights."
        if self.live:
            self.model.load_state_dict(self.live)
            self.live = {}

    def state_dict(self) -> dict[str, Tensor]:
        "The average: live memory."
        return self.average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        "Take over what `state_dict` gave, laid out as what is here: only alike in memory do they move together."
        like = {**state, **self.average}
        self.average = {name: torch.empty_like(like[name]).copy_(tensor) for name, tensor in state.items()}
