"""What tests need of Triton's interpreter and it lacks: right bf16 numbers, memory bounds, and one launch at a time.

``install()`` mends the first and the last for the whole process, ``sanitized()`` watches memory within a scope.
Works on Triton 3.6 to 3.9: where signatures differ between them, only the leading arguments are named.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

_launch_lock = threading.RLock()


def install() -> None:
    """Repair bf16, serialise launches and shorten them, once per process."""
    if getattr(GridExecutor, "repaired", False):
        return
    GridExecutor.repaired = True
    _repair_bf16()

    launch, patch_language = GridExecutor.__call__, triton_interpreter._patch_lang
    patched: set[int] = set()

    @functools.wraps(launch)
    def one_at_a_time(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        # A launch patches triton.language and shares one builder: threads would run each other's program ids.
        with _launch_lock:
            patched.clear()
            launch(self, *args, **kwargs)

    def patch_once(function: Callable[..., Any]) -> Any:
        # Triton patches its language again for every call of a function in a kernel: a third of a launch's time.
        module = id(function.__globals__)
        if module not in patched:
            patched.add(module)
            return patch_language(function)

    GridExecutor.__call__ = one_at_a_time
    triton_interpreter._patch_lang = patch_once


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """The values of bf16 bit patterns (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """The bit patterns of fp32 values rounded to the nearest bf16, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bf16(value: object) -> bool:
    dtype = getattr(value, "dtype", None)
    return isinstance(dtype, tl.dtype) and dtype.scalar == tl.bfloat16


def _repair_bf16() -> None:
    """The interpreter keeps bf16 as bit patterns, multiplies these in dot, and truncates where hardware rounds.

    All other arithmetic on bit patterns would be wrong as well (triton-lang/triton#11584), so it raises.
    """
    cast_impl, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source != target and tl.bfloat16 in (source, target):
            if (source, target) == (tl.bfloat16, tl.float32):
                return TensorHandle(bf16_to_fp32(src.data), target)
            if (source, target) == (tl.float32, tl.bfloat16):
                return TensorHandle(fp32_to_bf16(src.data), target)
            raise TypeError(f"{source} to {target}: bf16 goes through fp32 in the interpreter")
        return cast_impl(self, src, dst_type)

    def repaired_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *args: Any) -> TensorHandle:
        a, b = (TensorHandle(bf16_to_fp32(h.data), tl.float32) if _is_bf16(h) else h for h in (a, b))
        return dot(self, a, b, *args)

    def fp_to_fp(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
        def convert(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype, *args: Any) -> TensorHandle:
            if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
                return cast(self, src, dst_type)
            return original(self, src, dst_type, *args)

        return convert

    def without_bf16(owner: type, name: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def checked(self: Any, *args: Any) -> Any:
            handles = [part for arg in args for part in (arg if isinstance(arg, tuple) else (arg,))]
            if any(map(_is_bf16, handles)):
                raise TypeError(f"{name} on raw bf16: convert to fp32 right after the load")
            return original(self, *args)

        setattr(owner, name, checked)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_dot = repaired_dot
    InterpreterBuilder.create_fp_to_fp = fp_to_fp(InterpreterBuilder.create_fp_to_fp)
    for name in ("binary_op", "unary_op", "create_idiv", "create_clampf", "create_fma", "create_fabs", "create_erf"):
        without_bf16(InterpreterBuilder, name)
    for name in ("create_rsqrt", "create_atomic_rmw"):
        without_bf16(InterpreterBuilder, name)
    without_bf16(triton_interpreter.ReduceScanOpInterface, "apply")


class SanitizerError(AssertionError):
    """A launch touched memory it was not given, or wrote an element of an output twice or never."""


@dataclass
class Launch:
    """What one launch did: how many elements of each argument, by name, it stored to."""

    kernel: str
    stored: dict[str, int]


@dataclass
class Sanitizer:
    """The launches that a ``sanitized()`` scope watched, so that a test can see that there were some."""

    launches: list[Launch] = field(default_factory=list)


def _element_addresses(tensor: torch.Tensor) -> np.ndarray:
    """The address of every element, sorted, each once, without the gaps between the rows of a view."""
    addresses = np.zeros((1,) * max(tensor.dim(), 1), np.int64)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        shape = [1] * tensor.dim()
        shape[dim] = size
        addresses = addresses + (np.arange(size) * stride * tensor.element_size()).reshape(shape)
    return _sorted(addresses.ravel().astype(np.uint64) + np.uint64(tensor.data_ptr()))


def _sorted(addresses: np.ndarray) -> np.ndarray:
    """``np.unique`` for addresses that are mostly in order and different, for which hashing is slow."""
    addresses = np.sort(addresses, kind="stable")
    return addresses[np.diff(addresses, prepend=addresses[:1] - np.uint64(1)) != 0]


class _Memory:
    """The elements a launch may touch, and how often it wrote each."""

    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor]):
        self.kernel = kernel
        self.tensors = {name: (t, _element_addresses(t)) for name, t in tensors.items()}
        self.addresses: dict[int, np.ndarray] = {}
        for itemsize in {t.element_size() for t in tensors.values()}:
            parts = [addresses for t, addresses in self.tensors.values() if t.element_size() == itemsize]
            self.addresses[itemsize] = _sorted(np.concatenate(parts))
        self.writes = {itemsize: np.zeros(len(known), np.int64) for itemsize, known in self.addresses.items()}

    def check(self, verb: str, pointers: TensorHandle, mask: Any) -> tuple[int, np.ndarray]:
        """The element size and the index of each active lane's element; raises if a lane hits none."""
        lanes, active = np.broadcast_arrays(pointers.data, np.asarray(mask.data))
        touched = lanes[active]
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        known = self.addresses.get(itemsize, np.empty(0, np.uint64))
        index = np.searchsorted(known, touched)
        inside = np.zeros(len(touched), bool)
        within = index < len(known)
        inside[within] = known[index[within]] == touched[within]
        if not inside.all():
            stray = touched[~inside]
            raise SanitizerError(
                f"{self.kernel}: {verb} {len(stray)} elements of {itemsize} bytes outside the tensors it was given, "
                f"the first at {self._place(int(stray[0]))}"
            )
        return itemsize, index

    def store(self, pointers: TensorHandle, mask: Any) -> None:
        itemsize, index = self.check("writes", pointers, mask)
        np.add.at(self.writes[itemsize], index, 1)

    def finish(self) -> Launch:
        """Every tensor stored to must have been stored to completely, and nowhere twice."""
        stored = {}
        for name, (tensor, addresses) in self.tensors.items():
            known, writes = self.addresses[tensor.element_size()], self.writes[tensor.element_size()]
            counts = writes[np.searchsorted(known, addresses)]
            if not counts.any():
                continue
            stored[name] = len(addresses)
            if not (counts == 1).all():
                raise SanitizerError(
                    f"{self.kernel}: of {len(counts)} elements of {name}, {int((counts == 0).sum())} were never "
                    f"written and {int((counts > 1).sum())} more than once"
                )
        return Launch(self.kernel, stored)

    def _place(self, address: int) -> str:
        def distance(item: tuple[str, tuple[torch.Tensor, np.ndarray]]) -> int:
            addresses = item[1][1]
            return min(abs(address - int(addresses[0])), abs(address - int(addresses[-1])))

        nearby = [item for item in self.tensors.items() if len(item[1][1])]
        if not nearby:
            return hex(address)
        name, (tensor, addresses) = min(nearby, key=distance)
        return f"{name} {address - int(addresses[0]):+d} bytes (shape {tuple(tensor.shape)}, strides {tensor.stride()})"


def _tensors(names: list[str], args: Any, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    unwrapped = {name: arg.base if isinstance(arg, TensorDescriptor) else arg for name, arg in arguments.items()}
    return {name: arg for name, arg in unwrapped.items() if isinstance(arg, torch.Tensor)}


def _watched_memory(current: list[_Memory]) -> dict[str, Callable[..., Any]]:
    """The builder's loads, stores and atomics, checked against the memory of the launch that runs."""
    masked_load, masked_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic_rmw = InterpreterBuilder.create_atomic_rmw

    def load(self: InterpreterBuilder, pointers: TensorHandle, mask: Any, *args: Any, **kwargs: Any) -> Any:
        current[-1].check("reads", pointers, mask)
        return masked_load(self, pointers, mask, *args, **kwargs)

    def store(
        self: InterpreterBuilder, pointers: TensorHandle, value: Any, mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        current[-1].store(pointers, mask)
        return masked_store(self, pointers, value, mask, *args, **kwargs)

    def count(self: InterpreterBuilder, kind: Any, pointers: TensorHandle, value: Any, mask: Any, *args: Any) -> Any:
        if pointers.get_element_ty().is_floating():
            raise SanitizerError("the order of floating-point atomics would make results vary")
        current[-1].check("counts", pointers, mask)
        return atomic_rmw(self, kind, pointers, value, mask, *args)

    def exchange(self: InterpreterBuilder, *args: Any) -> Any:
        raise SanitizerError("compare-and-swap is not watched")

    return {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": count,
        "create_atomic_cas": exchange,
    }


def _watched_launches(current: list[_Memory], record: Sanitizer) -> dict[str, Callable[..., Any]]:
    """The executor's launch, which sets up its memory in ``current`` and ends in ``record``."""
    init_args, call = GridExecutor._init_args_hst, GridExecutor.__call__

    def watch(self: GridExecutor, args: Any, kwargs: dict[str, Any]) -> Any:
        # The interpreter may copy arguments to the host: their addresses there are what its pointers hold.
        host_args, host_kwargs = init_args(self, args, kwargs)
        current.append(_Memory(self.fn.__name__, _tensors(self.arg_names, host_args, host_kwargs)))
        return host_args, host_kwargs

    def launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        with _launch_lock:
            depth = len(current)
            try:
                call(self, *args, **kwargs)
                record.launches.append(current[-1].finish())
            except Exception as error:
                # The interpreter wraps what a kernel raises, once for each function that was called.
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, SanitizerError):
                    cause = cause.__cause__
                if cause is not None:
                    raise cause from None
                raise
            finally:
                del current[depth:]

    return {"_init_args_hst": watch, "__call__": launch}


@contextlib.contextmanager
def sanitized() -> Iterator[Sanitizer]:
    """Watch every launch: lanes must stay inside the tensors passed in, and outputs be written exactly once.

    A tensor's elements are those that its shape and strides reach; the padding between its rows is outside. Raises
    ``SanitizerError`` from the launch that is at fault.
    """
    record = Sanitizer()
    current: list[_Memory] = []
    memory, launches = _watched_memory(current), _watched_launches(current, record)
    with mock.patch.multiple(InterpreterBuilder, **memory), mock.patch.multiple(GridExecutor, **launches):
        yield record
