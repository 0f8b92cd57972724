"export: a program of torch.export that computes what the model computes, for any number of pictures."

import importlib
from types import SimpleNamespace

import pytest
import torch

from learner.models import MODELS, build
from orchestrator import export
from orchestrator.exporter import adapter, called_with, program, save_onnx
from orchestrator.loaded_run import LoadedRun


def test_the_exported_program_equals_the_model(run_copy, capsys) -> None:
    assert export.main([str(run_copy)]) == 0
    assert str(run_copy / "model.pt2") in capsys.readouterr().out
    model, exported = LoadedRun.open(str(run_copy)).model(), torch.export.load(run_copy / "model.pt2")
    for n in (1, 2, 5):
        pictures = torch.randn(n, 3, 24, 24)
        torch.testing.assert_close(exported.module()(pictures), model(pictures))
    assert exported.state_dict.keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["simple_net", "conv_net", "xresnet18", "xresnet18_silu_se_blur"])
def test_a_model_has_an_adapter_that_computes_the_same(name) -> None:
    model, pictures = build(name, 3, 4).eval(), torch.randn(2, 3, 32, 32)
    dressed = adapter(model)
    torch.testing.assert_close(dressed(pictures), model(pictures))
    assert dressed.state_dict().keys() == model.state_dict().keys()


def test_a_model_has_its_own_tensors_again_after_a_call_with_others_even_if_that_fails() -> None:
    model = build("simple_cnn_bn", 1, 3).eval()
    before = dict(model.named_parameters())
    zeros = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    assert not called_with(model, zeros, torch.randn(1, 1, 20, 20)).any()
    with pytest.raises(RuntimeError):
        called_with(model, zeros, torch.randn(1, 2, 20, 20))
    assert all(tensor is before[name] for name, tensor in model.named_parameters())
    assert all(getattr(module, name) is t for module in model.modules() for name, t in module._tensors.items())


def test_a_file_that_can_not_be_written_and_a_format_that_there_is_not_are_named(trained, tmp_path, capsys) -> None:
    assert export.main([str(trained), "--output", str(tmp_path / "no" / "model.pt2")]) == 1
    assert "No such file" in capsys.readouterr().err
    assert export.main([str(trained), "--format", "tensorflow"]) == 2
    assert "torch, onnx" in capsys.readouterr().err


def test_without_its_packages_onnx_is_refused_with_their_names(trained, monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert export.main([str(trained), "--format", "onnx"]) == 2
    assert "pip install onnx onnxscript" in capsys.readouterr().err


@pytest.fixture
def runtime():
    "What runs ONNX files, where it is installed."
    for name in ("onnxscript", "onnx", "onnxruntime"):
        pytest.importorskip(name, reason="ONNX export is not tested: pip install onnx onnxscript onnxruntime")
    return importlib.import_module("onnxruntime")


def computed(runtime, file, pictures) -> torch.Tensor:
    "The logits that ONNX Runtime gives."
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"pictures": pictures.numpy()})[0])


def test_onnx_equals_the_model(run_copy, runtime, capfd) -> None:
    assert export.main([str(run_copy), "--format", "onnx"]) == 0
    told = capfd.readouterr()
    assert "torch.onnx" not in told.out and "torchvision" not in told.err, "only what concerns the user is said"
    model = LoadedRun.open(str(run_copy)).model()
    for n in (1, 3, 8):
        pictures = torch.randn(n, 3, 24, 24)
        logits = computed(runtime, run_copy / "model.onnx", pictures)
        torch.testing.assert_close(logits, model(pictures).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "xresnet18_mish_se_blur", "xresnet18_silu"])
def test_every_model_can_be_onnx(name, runtime, tmp_path) -> None:
    model = build(name, 3, 7)
    with torch.no_grad():
        model(torch.randn(8, 3, 64, 64))  # running statistics of their own
    save_onnx(SimpleNamespace(model=model.eval, channels=3, size=64), tmp_path / "model.onnx")  # type: ignore[arg-type]
    pictures = torch.randn(3, 3, 64, 64)
    logits = computed(runtime, tmp_path / "model.onnx", pictures)
    torch.testing.assert_close(logits, model(pictures).detach(), atol=1e-4, rtol=1e-4)


def test_weights_are_parameters_in_the_program_and_statistics_buffers(trained) -> None:
    exported = program(LoadedRun.open(str(trained)))
    assert "0.weight" in exported.graph_signature.inputs_to_parameters.values()
    assert "0.norm.running_mean" in exported.graph_signature.inputs_to_buffers.values()
