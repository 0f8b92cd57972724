"""Export: our model in the dress that torch's exporters ask for.

They take a torch.nn.Module alone. So a bare one is given our tensors under their names, and as its forward a function
that calls our model with whatever tensors stand there: the exporter puts symbols in their place.
"""

from __future__ import annotations

import importlib.util
import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.errors import UsageError
from learner.module import Module, Parameter
from orchestrator.loaded_run import LoadedRun
from orchestrator.run_folder import write_aside

ONNX_PACKAGES = ("onnx", "onnxscript")


def save_program(run: LoadedRun, file: Path) -> None:
    "Write the run's model as a torch.export program, for `torch.export.load`."
    content = io.BytesIO()
    torch.export.save(program(run), content)
    write_aside(file, content.getvalue())


def save_onnx(run: LoadedRun, file: Path) -> None:
    "Write the run's model as ONNX; UsageError, naming them, if the packages for it are not installed."
    if missing := [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        raise UsageError(f"--format onnx needs what is not installed here: pip install {' '.join(missing)}")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that nothing here needs
    names: dict[str, Any] = {"input_names": ["pictures"], "output_names": ["logits"]}
    exported = torch.onnx.export(program(run), dynamo=True, verbose=False, **names)
    assert exported is not None
    exported.save(file)


def program(run: LoadedRun) -> torch.export.ExportedProgram:
    "The run's model as torch.export sees it, for any number of pictures."
    model = run.model()
    pictures = torch.zeros(2, run.channels, run.size, run.size)
    any_number = ({0: torch.export.Dim.DYNAMIC},)
    return torch.export.export(adapter(model), (pictures,), dynamic_shapes=any_number, strict=False)


def adapter(model: Module) -> torch.nn.Module:
    "A torch.nn.Module with `model`'s tensors, under the same names, that computes the same."
    root = torch.nn.Module()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        *path, leaf = name.split(".")
        place = root
        for part in path:
            if part not in place._modules:
                place.add_module(part, torch.nn.Module())
            place = place.get_submodule(part)
        if isinstance(tensor, Parameter):
            weight = tensor.detach().contiguous()  # the exporter warns of others, ours are channels_last
            place.register_parameter(leaf, torch.nn.Parameter(weight, requires_grad=False))
        else:
            place.register_buffer(leaf, tensor.detach())

    def forward(pictures: Tensor) -> Tensor:
        return called_with(model, {**dict(root.named_parameters()), **dict(root.named_buffers())}, pictures)

    root.forward = forward
    return root


def called_with(model: Module, tensors: Mapping[str, Tensor], *args: Any) -> Any:
    "What `model` computes with other tensors in the place of its own, which it has again afterwards."
    modules = dict(model.named_modules())
    places = [(vars(modules[name.rpartition(".")[0]]), name.rpartition(".")[2], name) for name in tensors]
    own = [(attributes, leaf, attributes[leaf]) for attributes, leaf, _ in places]
    try:
        for attributes, leaf, name in places:
            attributes[leaf] = tensors[name]
        return model(*args)
    finally:
        for attributes, leaf, tensor in own:
            attributes[leaf] = tensor
