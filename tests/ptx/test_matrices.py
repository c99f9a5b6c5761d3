"""Matrices in shared and tensor memory: wgmma and tcgen05, against products of the numbers."""

import numpy as np
import pytest
from emulator.matrices import operand
from emulator.parse import Instruction, PTXError
from numpy import uint32
from program import Ran, drawn, encoded, run

SHARED = "mov.b32 %r21, global_smem;"

# -------------------------------------------------------------------------------------------- matrices in shared memory

INS = Instruction(1, "wgmma", "wgmma.x", [], None, False, frozenset())
# By width of a swizzled row in bytes: the descriptor's upper bits.
MODES = {128: 2, 64: 4, 32: 6}


def descriptor(start: int, stride: int, width: int, leading: int = 0) -> int:
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | MODES[width] << 61


@pytest.mark.parametrize("width", [128, 64, 32])
def test_an_operand_lies_in_rows_of_k_swizzled_by_8(width) -> None:
    at = operand(descriptor(1024, 8 * width, width), 64, "f16", INS)
    for row, k in ((0, 0), (1, 0), (5, 9), (8, 3), (63, 15)):
        linear = 1024 + row * width + 2 * k
        assert at[row, k] == linear ^ (linear >> 7 & width // 16 - 1) << 4
    assert len(np.unique(at)) == at.size


@pytest.mark.parametrize("width", [128, 64, 32])
def test_a_transposed_operand_lies_in_rows_of_its_own_columns(width) -> None:
    across = width // 2
    at = operand(descriptor(1024, 8 * width, width, leading=16 * width), 64, "f16", INS, transposed=True)
    for row, k in ((0, 0), (1, 0), (5, 9), (across - 1, 15), (63, 7)):
        linear = 1024 + row // across * 16 * width + k * width + 2 * (row % across)
        assert at[row, k] == linear ^ (linear >> 7 & width // 16 - 1) << 4
    assert len(np.unique(at)) == at.size


def test_an_operand_without_swizzle_is_not_emulated() -> None:
    with pytest.raises(PTXError, match="without swizzle"):
        operand(64, 64, "f16", INS)


# ---------------------------------------------------------------------------------------------------- wgmma and tcgen05

M, N = 64, 32
A, B = drawn(M, 16), drawn(N, 16)


def filled(element: str, fence: str = "fence.proxy.async.shared::cta;") -> tuple[str, np.ndarray]:
    """PTX that copies A and B, in rows of 32 swizzled bytes, to shared bytes 0 and 4096; and their words."""
    pieces = []
    for matrix, start in ((A, 1024), (B, 1024 + 4096)):
        bits = np.ascontiguousarray(encoded(matrix if element != "tf32" else matrix[:, :8], element))
        at = operand(descriptor(start, 256, 32), len(matrix), element, INS) - 1024
        memory = np.zeros(4096, np.uint8)
        memory.view(bits.dtype)[(at - (start - 1024)) // bits.itemsize] = bits
        pieces.append(memory)
    image = np.concatenate(pieces).view(uint32)
    copies = (
        f"add.s64 %rd21, %rd2, {512 * i}; add.s64 %rd21, %rd21, %rd10;"
        f"ld.global.b32 %r30, [%rd21]; st.shared.b32 [%r20+{512 * i}], %r30;"
        for i in range(16)
    )
    body = SHARED + "add.s32 %r20, %r21, %r2;" + "".join(copies)
    return f"{body}\n{fence} bar.sync 0;", image


ACCUMULATORS = ", ".join(f"%r{100 + i}" for i in range(N // 2))
START = "".join(f"mov.b32 %r{100 + i}, 0f3F800000;" for i in range(N // 2))
RESULT = "".join(f"st.global.b32 [%rd11+{512 * i}], %r{100 + i};" for i in range(N // 2))


def wgmma(element: str = "f16", fence: str = "fence.proxy.async.shared::cta;", add: int = 1, **parts: str) -> Ran:
    fill, image = filled(element, fence)
    a, b = descriptor(1024, 256, 32), descriptor(1024 + 4096, 256, 32)
    transposes = "" if element == "tf32" else ", 0, 0"
    multiply = f"mov.b64 %rd30, {a}; mov.b64 %rd31, {b}; mov.pred %p5, {add}; wgmma.mma_async.sync.aligned.m64n{N}k"
    multiply += f"{8 if element == 'tf32' else 16}.f32.{element}.{element} {{{ACCUMULATORS}}},"
    multiply += f"%rd30, %rd31, %p5, 1, 1{transposes};"
    steps = {"start": START, "ready": "wgmma.fence.sync.aligned;", "multiply": multiply}
    steps |= {
        "commit": "wgmma.commit_group.sync.aligned;",
        "wait": "wgmma.wait_group.sync.aligned 0;",
        "after": "",
    } | parts
    return run(fill + "".join(steps.values()) + RESULT, image, threads=128, shared=8192, out_size=128 * N // 2)


@pytest.mark.parametrize("element", ["f16", "bf16", "tf32"])
@pytest.mark.parametrize("add", [0, 1])
def test_wgmma_multiplies_and_adds(element, add) -> None:
    ran = wgmma(element, add=add)
    assert not ran.kinds
    got = ran.floats().reshape(N // 2, 4, 8, 4)  # [register, warp, g, t]
    k = 8 if element == "tf32" else 16
    expected = A[:, :k] @ B[:, :k].T + add
    for i in range(N // 2):
        column, row = i // 4 * 8 + i % 2, i % 4 // 2 * 8
        for warp in range(4):
            for t in range(4):
                assert (
                    got[i, warp, :, t].tolist()
                    == expected[16 * warp + row : 16 * warp + row + 8, column + 2 * t].tolist()
                )


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ({"wait": ""}, "unfinished register"),
        ({"wait": "wgmma.wait_group.sync.aligned 1;"}, "unfinished register"),
        ({"commit": ""}, "unfinished register"),
        ({"ready": ""}, "missing wgmma.fence"),
        ({"wait": "st.shared.b32 [%r20], %r1; wgmma.wait_group.sync.aligned 0;"}, "race"),
    ],
)
def test_misuse_of_wgmma_is_reported(parts, kind) -> None:
    assert kind in wgmma(**parts).kinds


def test_wgmma_sees_only_stores_that_were_fenced() -> None:
    assert wgmma(fence="").kinds == {"missing proxy fence"}


SETUP = (
    "setp.lt.u32 %p6, %r1, 32; setp.eq.b32 %p7, %r1, 0; add.s32 %r22, %r21, 8192; add.s32 %r23, %r21, 8200;"
    "@%p6 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r22], 32; bar.sync 0; ld.shared.b32 %r24, [%r22];"
    "@%p7 mbarrier.init.shared::cta.b64 [%r23], 1; fence.proxy.async.shared::cta; bar.sync 0;"
    "shr.u32 %r25, %r1, 5; shl.b32 %r25, %r25, 21; add.s32 %r25, %r25, %r24;"
)
TENSOR = ", ".join(f"%r{100 + i}" for i in range(N))
RELEASE = "bar.sync 0; @%p6 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r24, 32;"


def tcgen05(kind: str = "f16", held: str = "f16", add: int = 0, **parts: str) -> Ran:
    """M = 64: lanes 32w to 32w + 15 of tensor memory hold rows 16w and on."""
    fill, image = filled(held)
    a, b = descriptor(1024, 256, 32), descriptor(1024 + 4096, 256, 32)
    shape = 1 << 4 | {"f16": 0, "bf16": 1, "tf32": 2}[held] * (1 << 7 | 1 << 10) | N >> 3 << 17 | M >> 4 << 24
    multiply = f"mov.b64 %rd30, {a}; mov.b64 %rd31, {b}; mov.b32 %r26, {shape}; mov.pred %p5, {add};"
    multiply += f"@%p7 tcgen05.mma.cta_group::1.kind::{kind} [%r24 + 0], %rd30, %rd31, %r26, %p5;"
    load = f"tcgen05.ld.sync.aligned.32x32b.x{N}.b32 {{{TENSOR}}}, [%r25 + 0];"
    steps = {"setup": SETUP, "before": "", "multiply": multiply}
    steps["commit"] = "@%p7 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r23];"
    steps |= {"wait": "mbarrier.try_wait.parity.shared::cta.b64 %p8, [%r23], 0;", "load": load}
    steps |= {"loaded": "tcgen05.wait::ld.sync.aligned;", "release": RELEASE} | parts
    result = "".join(f"st.global.b32 [%rd11+{512 * i}], %r{100 + i};" for i in range(N))
    release = steps.pop("release")
    return run(fill + "".join(steps.values()) + result + release, image, threads=128, shared=8448, out_size=128 * N)


@pytest.mark.parametrize(("kind", "held"), [("f16", "f16"), ("f16", "bf16"), ("tf32", "tf32")])
def test_tcgen05_multiplies_into_tensor_memory(kind, held) -> None:
    ran = tcgen05(kind, held)
    assert not ran.kinds
    got = ran.floats().reshape(N, 4, 32)[:, :, :16].reshape(N, 64).T
    k = 8 if held == "tf32" else 16
    assert got.tolist() == (A[:, :k] @ B[:, :k].T).tolist()


def stored(after: str) -> str:
    """PTX that stores 2.0 to all of the tensor memory."""
    values = "".join(f"mov.b32 %r{140 + i}, 0f40000000;" for i in range(N))
    names = ", ".join(f"%r{140 + i}" for i in range(N))
    return f"{values} tcgen05.st.sync.aligned.32x32b.x{N}.b32 [%r25 + 0], {{{names}}}; {after}"


def test_tcgen05_adds_to_what_was_stored() -> None:
    ran = tcgen05(add=1, before=stored("tcgen05.wait::st.sync.aligned; bar.sync 0;"))
    assert not ran.kinds
    assert ran.floats().reshape(N, 4, 32)[:, :, :16].reshape(N, 64).T.tolist() == (A @ B.T + 2).tolist()


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ({"wait": ""}, "tensor memory"),
        ({"loaded": ""}, "unfinished register"),
        ({"release": ""}, "exit"),
        (
            {"loaded": "tcgen05.wait::ld.sync.aligned;" + RELEASE.replace("bar.sync 0;", ""), "release": ""},
            "tensor memory",
        ),
        ({"commit": "", "wait": ""}, "exit"),
        ({"before": stored("bar.sync 0;")}, "tensor memory"),
        ({"before": stored("tcgen05.wait::st.sync.aligned;")}, "tensor memory"),
    ],
)
def test_misuse_of_tensor_memory_is_reported(parts, kind) -> None:
    assert kind in tcgen05(**parts).kinds


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"load": f"tcgen05.ld.sync.aligned.32x32b.x{N}.b32 {{{TENSOR}}}, [%r25 + 1];"}, "outside of the allocated"),
        ({"load": f"tcgen05.ld.sync.aligned.32x32b.x{N}.b32 {{{TENSOR}}}, [%r24 + 0];"}, "its own 32 lanes only"),
        ({"release": RELEASE.replace(", 32", ", 64")}, "was not allocated"),
        ({"release": RELEASE.replace("@%p6", "")}, "more than one warp"),
        (
            {"setup": SETUP + "@%p6 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r22], 32;"},
            "allocated already",
        ),
    ],
)
def test_wrong_places_in_tensor_memory_are_errors(parts, message) -> None:
    with pytest.raises(PTXError, match=message):
        tcgen05(**parts)


def test_half_a_warp_may_load_other_columns() -> None:
    registers = ", ".join(f"%r{100 + i}" for i in range(16))
    load = f"tcgen05.ld.sync.aligned.16x32bx2.x16.b32 {{{registers}}}, [%r25 + 0], 16;"
    zeros = "".join(f"mov.b32 %r{116 + i}, 0;" for i in range(16))
    ran = tcgen05(load=load + zeros)
    got = ran.floats().reshape(N, 4, 2, 16)[:16]  # [register, warp, half, lane]
    expected = (A @ B.T).reshape(4, 16, 2, 16)  # [warp, lane, half, column]
    assert got.transpose(1, 3, 2, 0).tolist() == expected.tolist()
    assert not ran.kinds
