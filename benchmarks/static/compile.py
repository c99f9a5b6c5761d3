"""Compile the kernels for an architecture given by name; this needs no GPU."""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from bert_fused.kernels import elementwise, hopper, linear_act
from bert_fused.kernels.configs import Config
from bert_fused.kernels.gated import parse

TRITON_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "tf32": "fp32"}
# Triton makes a kernel for one row, one for multiples of 16, and one for all other numbers of rows.
ROWS = (1, 16, 17)


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: its code by stage, Triton's metadata, and the output of ``ptxas -v``."""

    asm: dict[str, Any]
    metadata: Any
    ptxas: str


def compile_linear(
    config: Config,
    arch: int,
    *,
    activation: str,
    save_preact: bool = True,
    bias: bool = True,
    even_k: bool = True,
    rows: int = 17,
) -> Compiled:
    """Compile the forward kernel for tensors whose rows are contiguous and whose sizes are multiples of 16.

    even_k: K is a multiple of the tile, as BERT's are. rows: one of ``ROWS``, which stands for all numbers of rows that
    Triton specialises alike.
    """
    tiles = {
        "x": [config.block_m, config.block_k],
        "w": [config.block_n, config.block_k],
        "out": [config.block_m, config.block_n // config.subtiles],
        "preact": [config.block_m, config.block_n // config.subtiles],
    }
    unaligned = ("M",) if rows % 16 else ()
    if config.kernel == "hopper":
        constants = hopper.constants_of(config, activation, bias, save_preact)
        options = {"num_warps": constants.pop("num_warps")}
        del constants["enable_fp_fusion"]
        constants |= {"M": 1} if rows == 1 else {}
        constants |= {} if bias else {"bias_ptr": None}
        constants |= {} if save_preact else {"preact_desc": None}
        described = {f"{name}_desc": tile for name, tile in tiles.items()}
        layouts = {name: hopper.layout_of(config.dtype, tile) for name, tile in described.items()}
        kernel = hopper.linear_act_hopper_kernel
        return compile_kernel(kernel, config.dtype, arch, constants, options, unaligned, described, layouts)
    constants: dict[str, Any] = {
        "stride_xk": 1,
        "stride_wk": 1,
        **gating(activation),
        "HAS_BIAS": bias,
        "SAVE_PREACT": save_preact,
        "EVEN_K": even_k,
        "INPUT_PRECISION": "tf32" if config.dtype == "tf32" else "ieee",
        "TMA": config.kernel == "tma",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "PERSISTENT": config.persistent > 0,
        "SUBTILES": config.subtiles,
    }
    if rows == 1:
        constants["M"] = 1
    # None is a constant for Triton, as in a real launch.
    constants |= {} if bias else {"bias_ptr": None}
    constants |= {} if save_preact else {"preact_ptr": None}
    return compile_kernel(
        linear_act.linear_act_fwd_kernel,
        config.dtype,
        arch,
        constants,
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
        unaligned,
        {f"{name}_ptr": tile for name, tile in tiles.items()} if config.kernel == "tma" else {},
    )


def gating(activation: str) -> dict[str, Any]:
    """Return the two constexprs of a kernel for an activation's name, which may be a gated one's."""
    name, half = parse(activation)
    return {"ACTIVATION": name, "GATED": half}


def compile_pass(dtype: str, arch: int, *, activation: str) -> Compiled:
    constants = gating(activation) | {"BLOCK": elementwise.FWD_BLOCK}
    constants |= {} if constants["GATED"] else {"N": None}
    return compile_kernel(elementwise.act_fwd_kernel, dtype, arch, constants, {})


def compile_grad(dtype: str, arch: int, *, activation: str) -> Compiled:
    gates = gating(activation)
    constants = {
        "stride_dn": 1,
        **gates,
        "BIAS_GRAD": True,
        "ROWS_PER_PROGRAM": elementwise.MAX_ROWS_PER_PROGRAM,
        "BLOCK_M": elementwise.GATED_BLOCK_M if gates["GATED"] else elementwise.BLOCK_M,
        "BLOCK_N": elementwise.BLOCK_N,
    }
    return compile_kernel(elementwise.act_bwd_kernel, dtype, arch, constants, {}, ("M",))


def compile_kernel(
    kernel: Any,
    dtype: str,
    arch: int,
    constants: dict[str, Any],
    options: dict[str, Any],
    unaligned: tuple[str, ...] = (),
    descriptors: dict[str, list[int]] | None = None,
    layouts: dict[str, Any] | None = None,
) -> Compiled:
    """Compile a kernel whose integer arguments are multiples of 16, except for those named in ``unaligned``.

    descriptors: the tile of each argument that is a tensor descriptor. layouts: of these, for a kernel in Gluon.
    """
    descriptors = descriptors or {}

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in descriptors:
            layout = f",{layouts[name]!r}" if layouts else ""
            return f"tensordesc<{TRITON_DTYPES[dtype]}{descriptors[name]}{layout}>"
        if not name.endswith("_ptr"):
            return "i32"
        return "*fp32" if name == "partial_ptr" else "*" + TRITON_DTYPES[dtype]

    names = kernel.arg_names
    source = (GluonASTSource if layouts else ASTSource)(
        kernel,
        {name: type_of(name) for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name not in constants and name not in unaligned and name not in descriptors
        },
    )
    target, options = GPUTarget("cuda", arch, 32), {**options, "enable_fp_fusion": True}
    # Only ptxas's log tells of serialized matrix instructions. Triton prints it when it compiles, not on a cache hit.
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=target, options=options)
    return Compiled(compiled.asm, compiled.metadata, log.getvalue())
