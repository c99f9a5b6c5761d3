"""Launch kernels: the only module of this package that does.

``kernel[grid](...)`` inspects every argument in every call, which costs the host more than the rest of a call together.
A ``Launch`` has Triton compile its kernel once, and hands later calls to Triton's C launcher with addresses. A plan is
a function that holds a ``Launch``, if it needs one, and no tensor: it serves all calls with equal keys.
"""

import copy
import functools
import inspect
import logging
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

from .runtime import INTERPRETED, on_device

MAX_PLANS = 2048
MAX_ENCODED = 8192
KNOWN_TRITONS = ("3.6.", "3.7.", "3.8.", "3.9.")
LAUNCHER_IS_KNOWN = triton.__version__.startswith(KNOWN_TRITONS)
SLOW_LAUNCHES = (
    f"the launcher of Triton {triton.__version__} is not known here: kernels are launched by kernel[grid], which "
    "costs the host 10 to 30 us more for each call, and sm_90's kernel in Gluon is not used"
)

# A torch without CUDA has neither function.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)

Outputs = tuple[Tensor, Tensor | None]
Plan = Callable[..., Outputs]
Encoder = Callable[[int], tuple[Any, ...]]

_fp32_precision: Callable[[str, str], str] = torch._C._get_fp32_precision_getter

plans: dict[Any, Plan] = {}
# A forked child cannot use the kernels that its parent loaded.
os.register_at_fork(after_in_child=plans.clear)


def key_of(a: Tensor, b: Tensor, c: Tensor | None, activation: str, flag: bool) -> tuple[Any, ...] | None:
    """Return what a plan depends on: everything about each tensor but its address. None if one has no strides.

    Triton compiles for addresses on 16-byte boundaries, so the distance from one is part of the key. A lazily zero
    tensor has no address, so its key differs from that of any tensor that has one. The device's index is enough: no
    process has two kinds of accelerator, and the CPU's index is -1, as is the meta device's. Contiguous tensors of one
    shape need no strides in the key: they differ at most in the stride of a dimension of size 1, which no address
    depends on. In fp32 the choice of a configuration depends on torch's setting.
    """
    dtype = a.dtype
    try:
        return (
            activation,
            flag,
            dtype,
            a.get_device(),
            a.shape,
            a.is_contiguous() or a.stride(),
            address & 15 if (address := a.data_ptr()) else None,
            b.dtype,
            b.get_device(),
            b.shape,
            b.is_contiguous() or b.stride(),
            address & 15 if (address := b.data_ptr()) else None,
            None
            if c is None
            else (
                c.dtype,
                c.get_device(),
                c.shape,
                c.is_contiguous() or c.stride(),
                address & 15 if (address := c.data_ptr()) else None,
            ),
            _fp32_precision("cuda", "matmul") if dtype is torch.float32 else None,
        )
    except RuntimeError:  # sparse and nested tensors
        return None


def keep(key: tuple[Any, ...] | None, plan: Plan) -> None:
    """Keep ``plan`` for later calls with this key; without a key do nothing."""
    if key is None:
        return
    if len(plans) >= MAX_PLANS:
        plans.clear()
    plans[key] = plan


class Matrix(NamedTuple):
    """How a kernel's tensor descriptor reads a tensor: as ``shape`` with ``strides``, in tiles of ``block_shape``.

    descriptor: the class of descriptor, or a function that makes one, from a tensor and the other three.
    """

    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    descriptor: Callable[..., Any]

    def describe(self, tensor: Any) -> Any:
        return self.descriptor(tensor, self.shape, self.strides, self.block_shape)


class Compiled(NamedTuple):
    """A compiled kernel, which Triton's C function launches: ``function(*grid, stream, *fixed, arguments)``.

    unpacks: the function takes the kernel's arguments one by one, not as a tuple.
    rest: the kernel's arguments after the tensors.
    encoders: None if all tensors are pointers; else one for each descriptor, and None for each pointer.
    handle: kept because Triton 3.9 unloads a kernel that nothing refers to.
    """

    function: Callable[..., None]
    fixed: tuple[Any, ...]
    unpacks: bool
    device: int
    rest: tuple[Any, ...]
    encoders: tuple[Encoder | None, ...] | None
    handle: Any


class Launch:
    """A kernel with its grid and all of its arguments but the tensors. Call it with tensors to launch it on them.

    The first call compiles for its tensors, so those of later calls must agree with them in all that ``key_of`` reads.
    ``kernel[grid]`` launches instead if something watches or changes launches (profilers' hooks, instrumentation,
    debugging), in the interpreter, and with a Triton whose launcher is not known, which one warning reports.
    """

    def __init__(
        self,
        kernel: Any,
        num_blocks: int,
        numbers: tuple[int | None, ...],
        constants: dict[str, Any],
        matrices: tuple[Matrix | None, ...] | None = None,
    ) -> None:
        """
        kernel: its arguments are tensors or None, then ``numbers``, then constexprs.
        constants: the constexprs, then Triton's options.
        matrices: one for each tensor that the kernel takes as a descriptor, None for each that it takes as a pointer;
            None if all are pointers.
        """
        self.kernel = kernel
        self.grid = (num_blocks, 1, 1)
        self.numbers = numbers
        self.constants = constants
        self.matrices = matrices
        self.compiled: Compiled | None = None  # set by the first call

    def __call__(self, *tensors: Any) -> None:
        compiled = self.compiled
        if compiled is None or is_observed(self.kernel):
            return self._launch_unprepared(tensors)
        function, fixed, unpacks, device, rest, encoders, _ = compiled
        if current_device() != device:
            with torch.cuda.device(device):
                return self(*tensors)
        arguments = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        if encoders is not None:
            arguments = _encoded(arguments, encoders)
        if unpacks:
            function(*self.grid, current_stream(device), *fixed, *arguments, *rest)
        else:
            function(*self.grid, current_stream(device), *fixed, (*arguments, *rest))

    def _launch_unprepared(self, tensors: tuple[Any, ...]) -> None:
        """Compile and launch if Triton's C launcher may be called; else launch by ``kernel[grid]``."""
        by_triton = INTERPRETED or not LAUNCHER_IS_KNOWN or is_observed(self.kernel)
        if not by_triton and self._compile(tensors):
            return self(*tensors)
        if not (LAUNCHER_IS_KNOWN or INTERPRETED):
            _warn_once()
        with on_device(tensors[0]):
            self.kernel[self.grid](*self._described(tensors), *self.numbers, **self.constants)

    def _described(self, tensors: tuple[Any, ...]) -> list[Any]:
        """Return the kernel's first arguments: the tensors, or descriptors of them."""
        return [
            tensor if tensor is None or matrix is None else matrix.describe(tensor)
            for tensor, matrix in zip(tensors, self.matrices or len(tensors) * (None,), strict=True)
        ]

    def _compile(self, tensors: tuple[Any, ...]) -> bool:
        """Compile for these tensors; return whether Triton's C function can launch the result by itself."""
        args = self._described(tensors)
        with on_device(tensors[0]):
            handle = self.kernel.warmup(*args, *self.numbers, grid=self.grid, **self.constants)
            if handle is None:  # a hook of Triton's took over the compilation
                return False
            run = handle.run
            if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
                return False  # Triton would allocate memory for each launch; none of our kernels needs it
        encoders: list[Encoder | None] = []
        if self.matrices is not None:
            metadata = iter(handle.metadata.tensordesc_meta or ())
            encoders = [
                None if arg is None or matrix is None else _encoder_of(arg, next(metadata))
                for arg, matrix in zip(args, self.matrices, strict=True)
            ]
        # The launcher reads no constexpr, but counts them.
        rest = (*self.numbers, *self.constants.values())[: len(self.kernel.arg_names) - len(tensors)]
        device = tensors[0].get_device()
        self.compiled = Compiled(*_launcher_of(handle), device, rest, tuple(encoders) or None, handle)
        return True


@functools.cache
def _warn_once() -> None:
    logging.getLogger(__name__).warning(SLOW_LAUNCHES)


def is_observed(kernel: Any) -> bool:
    """Return whether something watches or changes launches, so that Triton itself has to make them."""
    runtime = knobs.runtime
    try:
        hooked = runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls
    except AttributeError:  # a function or None in place of a chain of hooks
        hooked = True
    observed: bool = (
        hooked
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
        or kernel.pre_run_hooks
    )
    return observed


@functools.lru_cache(MAX_PLANS)
def _launcher_of(handle: Any) -> tuple[Callable[..., None], tuple[Any, ...], bool]:
    """Return the first three fields of ``Compiled``. Triton's versions differ in what this and ``_encode`` use."""
    run, metadata = handle.run, handle.packed_metadata
    function = run.launch
    # For a kernel with descriptors Triton wraps its C function into one that encodes them in every call.
    if inspect.isfunction(function):
        function = inspect.getclosurevars(function).nonlocals["launcher"]
    options = (handle.function, run.launch_cooperative_grid, run.launch_pdl)
    # None: no scratch memory, no metadata for hooks, and no hooks.
    if not hasattr(run, "arg_annotations"):  # Triton 3.6 compiles a launcher for each signature
        return function, (*options, None, None, metadata, None, None, None), True
    signature = (run.arg_annotations, run.kernel_signature)
    return function, (*options, metadata, None, None, None, None, None, *signature), False


def _encoded(addresses: list[Any], encoders: tuple[Encoder | None, ...]) -> list[Any]:
    """Return the launcher's arguments for tensors at these addresses: five for a descriptor, one for a pointer."""
    arguments: list[Any] = []
    for address, encode in zip(addresses, encoders, strict=True):
        arguments += (address,) if encode is None or address is None else _encoded_at(encode, address)
    return arguments


@functools.lru_cache(MAX_ENCODED)
def _encoded_at(encode: Encoder, address: int) -> tuple[Any, ...]:
    """Encode an address. The result depends on nothing else, so it is reused for any tensor at that address."""
    return encode(address)


def _encoder_of(descriptor: Any, metadata: Any) -> Encoder:
    """Return a function from a tensor's address to the launcher's arguments for a descriptor of it."""
    template = copy.copy(descriptor)
    template.base = None  # keeps no tensor alive

    def encode(address: int) -> tuple[Any, ...]:
        there = copy.copy(template)
        there.base = SimpleNamespace(data_ptr=lambda: address)
        return _encode(there, metadata)

    return encode


def _encode(descriptor: Any, metadata: Any) -> tuple[Any, ...]:
    encode = triton.backends.nvidia.driver.make_tensordesc_arg
    more = (None,) * (encode.__code__.co_argcount - 2)  # Triton 3.9 passes on arguments that it does not read
    try:
        return tuple(encode(descriptor, metadata, *more))
    except RuntimeError:
        # A launch makes the device's context current where a thread has none yet, encoding does not. Any call of
        # CUDA's runtime does, and this one is allowed while a graph is captured.
        torch.cuda.mem_get_info()
        return tuple(encode(descriptor, metadata, *more))
