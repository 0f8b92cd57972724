"Compile: forward, loss and backward of a training batch as the few kernels that torch's compiler makes of them."

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from learner.batchnorm import batchnorms, unshared
from learner.dropout import dropouts
from learner.learner import Callback
from learner.pieces import in_pieces
from learner.reading import expanded

SETTINGS = {  # torch's own folders are below /tmp, where others may have been first, and what is there is executed
    "TORCHINDUCTOR_CACHE_DIR": "~/.cache/orchestrator/compiled",
    "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
}
LIMIT = 8  # kinds of batches compiled for at a time: torch refuses more
RUNS = 3  # on a GPU the first run of a CUDA graph warms up, the second records it, the third replays it


class Compile(Callback):
    """Train through `torch.compile`, on a GPU with CUDA graphs; as without it where that can't be, and `tell` why.

    For each kind of batch (shapes, and what of the model is frozen) the code is made, and tried with gradients that go
    nowhere, before its first step: what fails there has changed nothing. Whether a batch is compiled depends on what
    it is, never on what came before, so that a run that was resumed computes the same bits. Whoever knows that a batch
    is of a kind that will not come again, such as an epoch's last, says by `worth` that it is not worth it. Another
    `forward` or `loss_func` means other code, so that it should not be one in each step. Validation is not compiled,
    and neither is the update, a handful of calls with a rate of its own in each step.
    """

    backend: Any = "inductor"
    order = 90  # behind all that prepare a batch, and within MixedPrecision's autocast

    def __init__(self, tell: Callable[[str], object] = print, busy: Callable[[], object] = lambda: None) -> None:
        self.tell, self.busy = tell, busy  # `busy` is called when code is about to be made, which takes its time
        self.worth, self.off, self.under_way = True, False, False
        self.seconds = 0.0  # that went into making code

    def before_fit(self) -> None:
        "Begin with no code."
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, str(expanded(value)) if value.startswith("~") else value)
        torch._inductor.config.cpp_cache_precompile_headers = False  # torch 2.11 heeds no variable there
        self.modules, self.layers = list(self.model.modules()), dropouts(self.model)
        self.norms = batchnorms(self.model)
        self.off, self.said, self.plain = False, set[str](), (self.learner.forward, self.learner.loss_func)
        self.shared = False  # whether BatchNorm's batch is spread over several devices
        self._forget()

    def _forget(self) -> None:
        "Code is kept by the function that it was made of, which may be another learner's too."
        torch.compiler.reset()
        forward, loss = self.plain[0] or self.model, self.plain[1]
        # torch compiles functions, and lets each have code for so many kinds of arguments
        self.fast = self._compiled(lambda *args: forward(*args)), self._compiled(lambda *args: loss(*args))
        self.ready: set[tuple[Any, ...]] = set()

    def _compiled(self, function: Any) -> Any:
        if self.shared:  # without CUDA graphs, of which each piece would have one, and copy what it is given into it
            backend, mode = in_pieces(torch._dynamo.lookup_backend(self.backend), self.norms), None
        else:
            on_gpu = next(iter(self.model.parameters())).device.type == "cuda"
            backend, mode = self.backend, "reduce-overhead" if on_gpu and self.backend == "inductor" else None
        return torch.compile(function, backend=backend, mode=mode, dynamic=False, fullgraph=True)

    def before_batch(self) -> None:
        "Put the compiled functions in place, if this batch is one for them."
        self.under_way = False
        if self.off or not self.worth or not self.model.training or self._obstacle():
            return
        self._note_sharing()
        if (replaced := (self.learner.forward, self.learner.loss_func)) != self.plain:
            self.plain = replaced
            self._forget()
        x, y = self.batch
        trained = sum(p.requires_grad for p in self.model.parameters())
        kind = x.shape, x.stride(), y.shape, y.dtype, trained
        if kind not in self.ready:
            if len(self.ready) == LIMIT:
                self._forget()
            self._try()
            self.ready.add(kind)
        if not self.off:
            torch.compiler.cudagraph_mark_step_begin()
            self._put(self.fast)
            self.under_way = True

    def _note_sharing(self) -> None:
        "Other devices may have come, or all have gone."
        shared = any(norm.sum_ is not None for norm in self.norms)
        if shared != self.shared:
            self.shared = shared
            for number, norm in enumerate(self.norms):
                norm.number = number if shared else None
            self._forget()

    def after_backward(self) -> None:
        "What comes now is not compiled."
        self.under_way = False

    def cleanup_batch(self) -> None:
        "Let all else go through the model as it is, but leave in place what others have put there."
        now = self.learner.forward, self.learner.loss_func
        self._put(tuple(plain if one is fast else one for one, fast, plain in zip(now, self.fast, self.plain)))

    def failed(self, error: Exception) -> bool:
        """Whether the batch that this error ended was in compiled code, of which there is none any more.

        It can be done again, unless it is `shared` and other devices are in the midst of it.
        """
        if self.under_way:
            self._give_up(error)
        return self.under_way

    def _obstacle(self) -> bool:
        "Whether there is now what compiled code can't have, or nothing to compute."
        if hooked := any(module._hooks for module in self.modules):
            self._say("hooks look at its layers, as --activations wants it")
        return hooked or not len(self.batch[0])

    def _say(self, reason: str) -> None:
        if reason not in self.said:
            self.said.add(reason)
            self.tell(f"the model trains uncompiled: {reason}")

    def _give_up(self, error: Exception) -> None:
        self.off = True
        torch.compiler.reset()
        self.learner.preds = self.learner.loss = torch.empty(0)  # what is done again needs the memory of their graph
        self._say(cause_of(error))

    def _put(self, functions: tuple[Any, ...]) -> None:
        self.learner.forward, self.learner.loss_func = functions

    def _try(self) -> None:
        "Go forth and back for nothing, so that all code is made; give up where that fails."
        self.busy()
        started, before = time.perf_counter(), [buffer.clone() for buffer in self.model.buffers()]
        try:
            self._put(self.fast)
            with unshared(self.model):  # the other devices may be at something else
                for _ in range(RUNS if self.batch[0].device.type == "cuda" else 1):
                    self._run()
        except Exception as error:  # compilers have many
            self._give_up(error)
        finally:
            self._put(self.plain)
            for buffer, old in zip(self.model.buffers(), before):
                buffer.data.copy_(old)
            for layer in self.layers:
                layer.calls = 0
            self.seconds += time.perf_counter() - started

    def _run(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        for layer in self.layers:
            layer.calls = 0
        self.learner.predict()
        with torch.autocast(self.batch[0].device.type, enabled=False):  # as MixedPrecision has it
            self.learner.preds = self.preds.float()
            self.learner.get_loss()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        torch.autograd.grad(self.loss * self.loss_scale, parameters, allow_unused=True)


def cause_of(error: Exception) -> str:
    "What an error comes to, in a sentence: compilers wrap the cause into many."
    lines = [line.strip() for line in f"{error}".splitlines() if line.strip()] or [""]
    told = next((line for line in lines if not line.endswith("raised:")), lines[0])
    return f"{type(error).__name__}: {told[:200]}"
