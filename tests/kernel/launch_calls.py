"""Checks of whole calls of ``linear_act``: a kept call launches the same as a new one."""

from collections.abc import Iterator
from typing import Any

import torch
from launch_common import launched, linear_tensors, offset_by, slow_and_seen

from bert_fused import linear_act
from bert_fused.kernels import linear_act as forward
from bert_fused.kernels.plan import plans


def linear_calls() -> Iterator[tuple[str, tuple[Any, ...], str]]:
    """Name, arguments of ``linear_act``, and the path: "fused", "library", or "copy": fused, on a copy of an input."""
    x, w, b = linear_tensors()
    yield "as it is", (x, w, b, "gelu"), "fused"
    yield "activation", (x, w, b, "relu"), "fused"
    yield "no bias", (x, w, None, "gelu"), "fused"
    yield "x requires grad", (x.clone().requires_grad_(), w, b, "gelu"), "fused"
    yield "only bias requires grad", (x, w, b.clone().requires_grad_(), "gelu"), "fused"
    yield "output saved", (x.clone().requires_grad_(), w, b, "relu"), "fused"
    for M in (1, 2, 16, 17, 300):
        yield f"M={M}", (linear_tensors(M)[0], w, b, "gelu"), "fused"
    for dtype in (torch.bfloat16, torch.float32):
        yield str(dtype), (*linear_tensors(dtype=dtype), "gelu"), "fused"
    yield "N", (x, *linear_tensors(N=48)[1:], "gelu"), "fused"
    yield "K", (*linear_tensors(K=80), "gelu"), "fused"
    yield "three dimensions", (x.view(3, 16, 64), w, b, "gelu"), "fused"
    yield "three dimensions, other shape", (x.view(4, 12, 64), w, b, "gelu"), "fused"
    yield "rows of a wider matrix", (torch.randn(48, 72).half()[:, :64], w, b, "gelu"), "fused"
    yield "rows of a still wider one", (torch.randn(48, 88).half()[:, :64], w, b, "gelu"), "fused"
    yield "CLS rows", (torch.randn(48, 5, 64).half()[:, 0], w, b, "gelu"), "fused"
    yield "weight of a wider matrix", (x, torch.randn(32, 72).half()[:, :64], b, "gelu"), "fused"
    yield "weight is x", (x[:32], x[:32], b, "gelu"), "fused"
    yield "x transposed", (torch.randn(64, 48).half().t(), w, b, "gelu"), "library"
    yield "odd N", (x, *(t[:31] for t in (w, b)), "gelu"), "library"
    yield "odd N, three dimensions", (x.view(3, 16, 64), *(t[:31] for t in (w, b)), "gelu"), "library"
    yield "odd N, four dimensions", (x.view(3, 4, 4, 64), *(t[:31] for t in (w, b)), "gelu"), "library"
    yield "odd N, x requires grad", (x.clone().requires_grad_(), *(t[:31] for t in (w, b)), "gelu"), "library"
    yield "odd N, only bias requires grad", (x, w[:31], b[:31].clone().requires_grad_(), "relu"), "library"
    yield "x off its boundary", (offset_by(x, 1), w, b, "gelu"), "library"
    yield "weight off its boundary", (x, offset_by(w, 4), b, "gelu"), "library"
    yield "bias off its boundary", (x, w, offset_by(b, 1), "gelu"), "fused"
    yield "bias with gaps", (x, w, torch.randn(64).half()[::2], "gelu"), "copy"
    yield "x with rows apart in memory", (torch.randn(3, 20, 64).half()[:, :16], w, b, "gelu"), "copy"


SEEN = {"fused": 8, "library": 3, "copy": 3}


def check_kept_calls_launch_what_new_ones_do() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    cases = list(linear_calls())
    truth = {name: slow_and_seen(arguments, SEEN[kept]) for name, arguments, kept in cases}
    plans.clear()
    seen_functions = {seen["function"] for seen in truth.values()}
    assert len(seen_functions) >= 8, len(seen_functions)
    for order in (cases, cases[::-1], cases):
        for name, arguments, kept in order:
            out, seen = launched(lambda arguments=arguments: linear_act(*arguments), SEEN[kept])
            x, w, bias, _ = arguments
            assert out.shape == (*x.shape[:-1], w.shape[0]), name
            assert out.dtype == x.dtype
            assert out.requires_grad == any(t.requires_grad for t in (x, w, bias) if t is not None), name
            assert out.is_contiguous()
            assert not out._is_view()
            for field in ("function", "grid", "stream", "block", "shared"):
                assert seen[field] == truth[name][field], (name, field)
            if kept == "copy":
                continue
            given = (x, w, bias, out) if kept == "fused" else (out,)
            addresses = [t.data_ptr() for t in given if t is not None]
            # Then come preact, if it is saved, and the numbers that are not compiled in.
            saved = [t for t in getattr(out.grad_fn, "saved_tensors", ()) if t is not None]
            inputs = [t.data_ptr() for t in (x, w, bias) if t is not None]
            fresh = [t.data_ptr() for t in saved if t.data_ptr() not in (*inputs, *addresses)]
            assert len(fresh) == (out.requires_grad and arguments[3] == "gelu"), name
            if kept == "library":
                addresses = (fresh or addresses) + addresses
                fresh = []
            start = len(addresses) + len(fresh)
            assert seen["params"][:start] == addresses + fresh, name
            numbers = [value & 0xFFFFFFFF for value in seen["params"][start : start + 3]]
            assert numbers == [value & 0xFFFFFFFF for value in truth[name]["params"][start : start + 3]], name
            if kept == "library":
                assert numbers == [out.numel()], name
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def check_the_product_of_a_kept_library_call() -> None:
    """The stub launches nothing, so what the library computed is still there."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    x, w, b = (t.float() for t in linear_tensors())
    for shaped in (
        x,
        x.view(3, 16, 64),
        x.view(3, 4, 4, 64),
        x.t().contiguous().t(),
        x.view(3, 16, 64).transpose(0, 1),
    ):
        plans.clear()
        for wanted in (False, True):
            parameter = w.clone().requires_grad_(wanted)
            for _ in range(3):
                out = linear_act(shaped, parameter, b, "tanh")
                torch.testing.assert_close(out.detach(), torch.nn.functional.linear(shaped, w, b))
        assert len(plans) == 1


def check_a_kept_library_call_under_autocast() -> None:
    """Through the operator, which autocast does not reach: the product keeps x's dtype, and the pass its buffer."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    x, w, b = (t.float() for t in linear_tensors())
    for enabled in (False, True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, preact = torch.ops.bert_fused.linear_act_fwd(x, w, b, "gelu", True)
        assert out.dtype is preact.dtype is torch.float32
        torch.testing.assert_close(preact, torch.nn.functional.linear(x, w, b))


def check_every_call_has_one_plan() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    for name, arguments, _ in linear_calls():
        plans.clear()
        for _ in range(2):
            linear_act(*arguments)
        assert len(plans) == 1, name
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def check_each_place_between_boundaries_has_a_plan() -> None:
    """A kernel compiled for aligned addresses would fault on others: for x, weight and bias apart."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    x, w, b = linear_tensors(dtype=torch.float32)
    plans.clear()
    cases = [
        (x, w, b),
        (x, w, offset_by(b, 1)),
        (offset_by(x, 1), w, b),
        (x, offset_by(w, 1), b),
        (x, w, offset_by(b, 2)),
    ]
    functions = [slow_and_seen((*tensors, "gelu"))["function"] for tensors in cases]
    for _ in range(3):
        for tensors, function in zip(cases, functions, strict=True):
            assert launched(lambda tensors=tensors: linear_act(*tensors))[1]["function"] == function
    assert len(plans) == 5
    assert len(set(functions)) == 3, "aligned, bias off a boundary, cuBLAS's pass"
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def check_a_kept_call_is_made() -> None:
    """Without kept calls every other check here would pass too."""
    x, w, b = linear_tensors()
    for arguments in ((x, w, b, "gelu"), (x.clone().requires_grad_(), w, b, "gelu")):
        linear_act(*arguments)
        original = forward.linear_act_fwd
        forward.linear_act_fwd = None
        try:
            launched(lambda arguments=arguments: linear_act(*arguments))
        finally:
            forward.linear_act_fwd = original


def check_the_precision_of_fp32_is_read_each_time() -> None:
    arguments = linear_tensors(dtype=torch.float32)
    seen = {}
    for setting in ("ieee", "tf32", "ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = setting
        function = launched(lambda: linear_act(*arguments))[1]["function"]
        assert seen.setdefault(setting, function) == function
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert seen["ieee"] != seen["tf32"]


def check_a_parameter_whose_data_changes() -> None:
    x, w, b = linear_tensors()
    parameter = torch.nn.Parameter(torch.randn(64, 64).half())
    bias = torch.randn(64).half()
    with torch.no_grad():
        for _ in range(3):
            linear_act(x, parameter, bias)
        square = slow_and_seen((x, parameter, bias, "gelu"))
        parameter.data = parameter.data.t()
        for _ in range(2):
            assert launched(lambda: linear_act(x, parameter, bias))[1]["function"] != square["function"]
        parameter.data = parameter.data.t()[:32]
        for _ in range(2):
            out, seen = launched(lambda: linear_act(x, parameter, b))
            assert out.shape == (48, 32)
            assert seen["params"][1] == parameter.data_ptr()
        parameter.data = w.clone()
        _, seen = launched(lambda: linear_act(x, parameter, b))
        assert seen["params"][1] == parameter.data_ptr()


def check_backward() -> None:
    x, w, b = (t.requires_grad_() for t in linear_tensors())
    functions = set()
    for _ in range(3):
        out = linear_act(x, w, b)
        d_out = torch.ones_like(out)
        _, seen = launched(lambda out=out, d_out=d_out: torch.autograd.grad(out, (x, w, b), d_out))
        functions.add(seen["function"])
        assert seen["params"][0] == d_out.data_ptr()
    assert len(functions) == 1
