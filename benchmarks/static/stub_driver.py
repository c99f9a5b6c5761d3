"""Run Triton's real launcher over a CUDA driver that does nothing (``libcuda_stub.c``), in a process without a GPU.

The parent builds the stub and starts a child with ``environment``; the child calls ``install`` before it imports a
kernel. From then on CPU tensors take the kernels' path in that process: Triton specialises, compiles for sm_90 and
launches as on an H100, and the driver at the end returns. Nothing is computed, so results are meaningless, unless a
test has the launches executed (``tests/ptx/driver.py``).

It replaces:

- the driver;
- ``torch._C._cuda_getDevice`` and ``torch._C._cuda_getCurrentRawStream``, which a CPU-only torch lacks, by other
  builtin functions that return a constant. The current device is -1, the device index of a CPU tensor;
- the check whether a device has kernels, by the same check of ``cuda:0``.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("libcuda_stub.c")
ARCH = 90
SMS = 132
DEVICE = -1
streams = {DEVICE: 0x5EED}  # each device's current stream; tests change it
MAX_PARAMS = 64


class StubError(RuntimeError):
    """The stub driver cannot be built here; the message is one sentence that says why."""


class Launch(ctypes.Structure):
    """The last launch, as ``libcuda_stub.c`` keeps it."""

    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
        ("params", ctypes.c_uint64 * MAX_PARAMS),
    )


def build(directory: Path) -> None:
    """Compile ``libcuda.so.1`` into ``directory`` with the compiler that Triton would use. Raises ``StubError``."""
    if sys.platform != "linux":
        raise StubError(f"Triton's launcher needs Linux, and this is {sys.platform}")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        raise StubError("no C compiler was found ($CC, gcc or clang), and Triton's launcher is C")
    try:
        import triton
    except ImportError:
        raise StubError("Triton is not installed") from None
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    command = [compiler, "-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", f"-I{include}", str(SOURCE)]
    done = subprocess.run([*command, "-o", str(directory / "libcuda.so.1")], capture_output=True, text=True)
    if done.returncode != 0:
        raise StubError(f"{compiler} could not compile {SOURCE.name}: {done.stderr.strip().splitlines()[-1]}")


def environment(directory: Path) -> dict[str, str]:
    """Return the environment of a child that can ``install`` the stub built in ``directory``."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "BERT_FUSED_DISABLE")}
    return inherited | {
        "LD_PRELOAD": str(directory / "libcuda.so.1"),
        "TRITON_LIBCUDA_PATH": str(directory),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def install(arch: int = ARCH) -> ctypes.CDLL:
    """Send this process's kernels to the stub, and return the stub. The process needs ``environment``.

    arch: the compute capability that Triton compiles for, as in ``kernels/lookup.py``.
    """
    stub = ctypes.CDLL("libcuda.so.1")
    stub.stub_launches.restype = ctypes.c_int64  # an AttributeError here: a real driver is loaded
    stub.stub_last_launch.restype = ctypes.POINTER(Launch)

    import torch
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    torch_c: Any = torch._C
    torch_c._cuda_getDevice = functools.partial(int, DEVICE)
    torch_c._cuda_getCurrentRawStream = streams.__getitem__
    driver: Any = CudaDriver()
    driver.get_current_device = torch_c._cuda_getDevice
    driver.get_current_stream = torch_c._cuda_getCurrentRawStream
    driver.get_device_capability = lambda device: divmod(arch, 10)
    triton.runtime.driver.set_active(driver)

    from bert_fused import autograd, fallback, ops
    from bert_fused.hf import checks
    from bert_fused.kernels import runtime

    cuda = torch.device("cuda", 0)
    real = fallback.device_reason

    def device_reason(device: torch.device, dtype: torch.dtype) -> str | None:
        return real(cuda, dtype)

    runtime._arch_of_index = functools.cache(lambda index: arch)
    runtime._num_sms_of_index = functools.cache(lambda index: SMS)
    runtime._name_of_index = functools.cache(lambda index: "stub")
    checks._CPU_HAS_KERNELS = True
    for module in (autograd, fallback, ops):
        vars(module)["device_reason"] = device_reason
    return stub
