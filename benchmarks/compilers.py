"""Compilers, rivals on a CPU: torch.compile, and ONNX Runtime where it is installed (the extra ``rivals``)."""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def onnx_runtime(module: nn.Module) -> Callable[..., Any]:
    """Return ``module`` as ONNX Runtime runs it, exported once for each shape of inputs, with torch's threads."""
    sessions: dict[tuple[torch.Size, ...], Any] = {}

    def call(*inputs: Tensor | None) -> Any:
        given = tuple(tensor for tensor in inputs if tensor is not None)
        shapes = tuple(tensor.shape for tensor in given)
        if shapes not in sessions:
            sessions[shapes] = _session(module, given)
        session = sessions[shapes]
        feed = {to.name: tensor.numpy() for to, tensor in zip(session.get_inputs(), given, strict=True)}
        outputs = tuple(map(torch.from_numpy, session.run(None, feed)))
        return outputs if len(outputs) > 1 else outputs[0]

    return call


def _session(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported: Any = torch.onnx.export(module, inputs, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    model = exported.model_proto.SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# Each takes a module and returns it compiled. Frozen: weights are constants, which Inductor lays out for its products.
COMPILERS: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "torch.compile": lambda module: torch.compile(module, dynamic=False),
    "torch.compile, frozen": lambda module: torch.compile(module, dynamic=False, options={"freezing": True}),
}
if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
    COMPILERS["ONNX Runtime"] = onnx_runtime
