"""Other ways to make a graph of a model: what works, and errors that name the way out."""

from __future__ import annotations

import io

import pytest
import torch
from models import At

import htfkernels as hk
from htfkernels import testing

pytestmark = pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated


@pytest.fixture
def model():
    torch.manual_seed(0)
    return hk.HTF(hk.ModeTree.balanced(4), 3, [5, 4])


def ways(model):
    """Modules with arguments for them, and with others of the same shape."""
    yield model, torch.randn(6, 4, 3), torch.randn(6, 4, 3)
    yield At(model), torch.randint(3, (6, 4)), torch.randint(3, (6, 4))


def test_script_is_refused(model):
    sentence = "^HTF: torch.jit.script cannot compile .*torch.export.export.*use_backend"
    for scripted in (model, torch.nn.Sequential(torch.nn.Identity(), model)):
        with pytest.raises(RuntimeError, match=sentence):
            torch.jit.script(scripted)


def test_trace_with_derivatives(cpu_target, model):
    cpu_target.require("evaluate_at", torch.float32)
    for module, given, other in ways(model):
        if cpu_target.backend == "reference":
            assert torch.equal(torch.jit.trace(module, given)(other), module(other))
            continue
        with pytest.raises(RuntimeError, match=r"torch.jit.trace .*use_backend.*torch.export"):
            torch.jit.trace(module, given)


def test_trace_without_derivatives(cpu_target, model):
    cpu_target.require("evaluate_at", torch.float32)
    for module, given, other in ways(model):
        with torch.no_grad():
            traced = torch.jit.trace(module, given)
            assert torch.equal(traced(other), module(other))


def test_onnx_has_no_compiled_operators(cpu_target, model, monkeypatch):
    """The exporter that traces, and the one that begins with ``torch.export``."""
    cpu_target.require("evaluate_at", torch.float32)
    if cpu_target.backend == "reference":
        pytest.skip("it is made of PyTorch's own operators")
    for op, (module, given, _) in zip(("evaluate", "evaluate_at"), ways(model), strict=True):
        sentence = f"{op}: ONNX has no operator for the backend 'cpp'; export under hk.use_backend"
        with pytest.raises(RuntimeError, match=sentence):
            torch.onnx.export(module, (given,), io.BytesIO(), dynamo=False)
        with monkeypatch.context() as patch:
            patch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
            with pytest.raises(RuntimeError, match=sentence):
                torch.export.export(module, (given,))


def test_export_for_any_batch(cpu_target, model):
    cpu_target.require("evaluate_at", torch.float32)
    for module, given, other in ways(model):
        batch = torch.export.Dim("batch", min=2, max=100)
        exported = torch.export.export(module, (given,), dynamic_shapes=({0: batch},)).module()
        longer = torch.cat([given, other])
        testing.assert_matches(exported(longer), module(longer), torch.float32, "forward")
