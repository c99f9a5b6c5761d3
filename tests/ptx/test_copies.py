"""Asynchronous copies, mbarriers and tensor maps."""

import struct

import numpy as np
import pytest
from emulator.memory import Memory
from emulator.parse import PTXError
from emulator.tensor_map import TensorMap
from numpy import uint16, uint32
from program import Ran, run

STORE = "st.global.b32 [%rd11], %r9;"
SHARED = "mov.b32 %r20, global_smem; add.s32 %r20, %r20, %r2; mov.b32 %r21, global_smem;"
SOURCE = "add.s64 %rd21, %rd2, %rd10;"
COPY = SHARED + SOURCE + "cp.async.ca.shared.global [%r20], [%rd21], 4, SIZE;"
LOAD = f"ld.shared.b32 %r9, [%r20]; {STORE}"
DATA = np.arange(100, 164, dtype=uint32)

# ------------------------------------------------------------------------------------------------------------- cp.async


def copied(between: str, size: str = "4", threads: int = 32) -> Ran:
    return run(f"{COPY.replace('SIZE', size)} {between} {LOAD}", DATA, threads=threads)


def test_a_copy_arrives_when_its_group_is_waited_for() -> None:
    ran = copied("cp.async.commit_group; cp.async.wait_group 0;")
    assert ran.result.tolist() == DATA[:32].tolist()
    assert not ran.kinds


@pytest.mark.parametrize(
    "between",
    [
        "",
        "cp.async.commit_group;",
        "cp.async.wait_group 0;",
        "cp.async.commit_group; cp.async.wait_group 1;",
        "cp.async.commit_group; cp.async.commit_group; cp.async.wait_group 2;",
    ],
)
def test_reading_before_the_group_is_waited_for_is_a_race_and_reads_what_was_there(between) -> None:
    ran = copied(between)
    assert "race" in ran.kinds
    assert (ran.result == 0xFFFFFFFF).all()


def test_groups_are_counted_from_the_last() -> None:
    assert not copied("cp.async.commit_group; cp.async.commit_group; cp.async.wait_group 1;").kinds


def test_a_copy_of_no_bytes_writes_zeros_and_reads_nothing() -> None:
    ran = run(
        SHARED
        + "setp.lt.u32 %p1, %r1, 16; selp.b32 %r30, 4, 0, %p1; add.s64 %rd21, %rd2, %rd10;"
        + f"cp.async.ca.shared.global [%r20], [%rd21], 4, %r30; cp.async.commit_group; cp.async.wait_group 0; {LOAD}",
        DATA[:16],
    )
    assert ran.result.tolist() == [*DATA[:16], *[0] * 16]
    with pytest.raises(PTXError, match=r"cp\.async outside of tensors"):
        run(f"{COPY.replace('SIZE', '4')}", DATA[:16])


def test_copying_what_was_never_written_is_reported() -> None:
    memory = Memory()
    source = memory.add("source", DATA, output=True)
    body = f"{SHARED} mov.b64 %rd2, {source.address}; {SOURCE} cp.async.ca.shared.global [%r20], [%rd21], 4;"
    assert run(body, memory=memory).kinds == {"uninitialized"}


def test_another_warp_needs_a_barrier_after_the_wait() -> None:
    wait = "cp.async.commit_group; cp.async.wait_group 0;"
    other = "xor.b32 %r20, %r20, 128;"
    assert copied(wait + other, threads=64).kinds == {"race"}
    ran = copied(wait + "bar.sync 0;" + other, threads=64)
    assert not ran.kinds
    assert ran.result.tolist() == [DATA[i ^ 32] for i in range(64)]


# ----------------------------------------------------------------------------------------------- bulk copies, mbarriers

ROWS, COLUMNS, STRIDE = 20, 40, 48  # elements of 2 bytes
MATRIX = np.arange(ROWS * COLUMNS, dtype=uint16).reshape(ROWS, COLUMNS)
FIRST = "setp.eq.b32 %p1, %r1, 0; mov.b32 %r22, global_smem; add.s32 %r22, %r22, 2048;"
INIT = "@%p1 mbarrier.init.shared::cta.b64 [%r22], 1;"
FENCE = "fence.proxy.async.shared::cta;"
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r22], BYTES;"
BULK = (
    "mov.b64 %rd30, param_1; mov.b32 %r23, COLUMN; mov.b32 %r24, ROW; @%p1 cp.async.bulk.tensor.2d.shared::cta.global"
    ".mbarrier::complete_tx::bytes [%r21], [%rd30, {%r23, %r24}], [%r22];"
)
WAIT = "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r22], 0;"
PARTS = {"init": INIT + FENCE, "sync": "bar.sync 0;", "expect": EXPECT, "bulk": BULK, "wait": WAIT}


def bulk_load(swizzle: int = 0, row: int = 0, column: int = 0, threads: int = 64, **parts: str) -> Ran:
    """Load a box of 8 x 16 elements, and store its words to the output as they lie in shared memory."""
    memory = Memory()
    tensor = memory.add("matrix", MATRIX, stride=STRIDE)
    box_columns = {0: 16, 1: 16, 2: 32, 3: 64}[swizzle]
    tensor_map = TensorMap(tensor.address, (ROWS, COLUMNS), 2 * STRIDE, (8, box_columns), swizzle, 2)
    body = "".join((PARTS | parts).values()).replace("BYTES", str(16 * box_columns))
    body = body.replace("COLUMN", str(column)).replace("ROW", str(row))
    return run(f"{SHARED} {FIRST} {body} {LOAD}", tensor_map, memory=memory, threads=threads)


def test_a_box_arrives_when_its_mbarrier_is_waited_for() -> None:
    ran = bulk_load(row=3, column=8)
    assert not ran.kinds
    assert ran.result.view(uint16).reshape(8, 16).tolist() == MATRIX[3:11, 8:24].tolist()


def test_elements_outside_of_the_matrix_are_zeros() -> None:
    ran = bulk_load(row=16, column=32)
    expected = np.zeros((8, 16), uint16)
    expected[:4, :8] = MATRIX[16:, 32:]
    assert ran.result.view(uint16).reshape(8, 16).tolist() == expected.tolist()
    assert bulk_load(row=-1).result.view(uint16)[16:32].tolist() == MATRIX[0, :16].tolist()


@pytest.mark.parametrize(("swizzle", "width"), [(1, 32), (2, 64), (3, 128)])
def test_a_swizzle_permutes_16_byte_pieces_of_each_8_rows(swizzle, width) -> None:
    threads = 2 * width
    got = bulk_load(swizzle, threads=threads).result.view(uint16).reshape(8 * width // 16, 8)
    padded = np.zeros((8, width // 2), uint16)
    padded[:, : min(COLUMNS, width // 2)] = MATRIX[:8, : width // 2]
    expected = np.empty_like(got)
    for piece in range(len(got)):
        line = piece * 16 // 128  # of 128 bytes
        expected[piece ^ line % (width // 16)] = padded.reshape(-1, 8)[piece]
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ({"wait": ""}, "race"),
        ({"init": INIT}, "mbarrier not fenced"),
        ({"wait": ""}, "exit"),
        ({"expect": EXPECT + EXPECT.replace("BYTES", "0")}, "mbarrier"),
        ({"wait": WAIT + "bar.sync 0;" + EXPECT + "@%p1 mbarrier.inval.shared::cta.b64 [%r22];"}, "mbarrier"),
    ],
)
def test_misuse_of_a_bulk_load_is_reported(parts, kind) -> None:
    assert kind in bulk_load(**parts).kinds


@pytest.mark.parametrize("parts", [{"expect": ""}, {"bulk": ""}, {"wait": WAIT.replace("], 0", "], 1") + WAIT + WAIT}])
def test_a_phase_that_never_completes_is_a_deadlock(parts) -> None:
    if "wait" in parts:  # the phase before the first counts as complete, the second never is
        parts = {"wait": WAIT.replace("], 0", "], 1") + WAIT + WAIT.replace("], 0", "], 1")}
    with pytest.raises(PTXError, match="deadlock"):
        bulk_load(**parts)


def test_an_mbarrier_must_be_there_and_a_tile_aligned() -> None:
    with pytest.raises(PTXError, match="no mbarrier at shared byte 2048"):
        bulk_load(init="")
    with pytest.raises(PTXError, match="a multiple of 128 bytes"):
        bulk_load(bulk="add.s32 %r21, %r21, 16;" + BULK)
    with pytest.raises(PTXError, match="not a tensor map"):
        bulk_load(bulk=BULK.replace("param_1", "param_0"))


def test_memory_that_a_bulk_load_fills_again_must_have_been_read() -> None:
    second = LOAD + "SYNC" + EXPECT + BULK + WAIT.replace("], 0", "], 1")
    again = WAIT + second.replace(STORE, "")
    assert not bulk_load(wait=again.replace("SYNC", "bar.sync 0;")).kinds
    assert bulk_load(wait=again.replace("SYNC", "")).kinds == {"race"}


def bulk_store(fence: str, finish: str, row: int = 0) -> tuple[Ran, np.ndarray]:
    memory = Memory()
    tensor = memory.add("matrix", np.zeros((ROWS, COLUMNS), uint16), stride=STRIDE, output=True)
    tensor_map = TensorMap(tensor.address, (ROWS, COLUMNS), 2 * STRIDE, (8, 16), 0, 2)
    body = (
        f"st.shared.b32 [%r20], %r1; {fence} bar.sync 0; mov.b64 %rd30, param_1; mov.b32 %r23, 8; mov.b32 %r24, {row};"
    )
    body += "@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd30, {%r23, %r24}], [%r21];" + finish
    ran = run(f"{SHARED} {FIRST} {body}", tensor_map, memory=memory, threads=64)
    return ran, memory.read(tensor)


FINISH = "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"


def test_a_box_is_stored_and_nothing_outside_of_the_matrix() -> None:
    ran, matrix = bulk_store(FENCE, FINISH, row=17)
    assert not ran.kinds
    words = np.arange(64, dtype=uint32).view(uint16).reshape(8, 16)
    assert matrix[17:, 8:24].tolist() == words[:3].tolist()
    assert (matrix[:17] == 0xFFFF).all()


def test_misuse_of_a_bulk_store_is_reported() -> None:
    assert bulk_store("", FINISH)[0].kinds == {"missing proxy fence"}
    assert bulk_store(FENCE, "")[0].kinds == {"exit"}
    later = "bar.sync 0; st.shared.b32 [%r20], %r2;"
    assert bulk_store(FENCE, FINISH + later)[0].kinds == set()
    assert "race" in bulk_store(FENCE, "cp.async.bulk.commit_group;" + later + FINISH)[0].kinds


def test_a_tensor_map_is_read_as_the_stub_driver_writes_it() -> None:
    data = struct.pack("<QQQQIIBBBB", 4096, 40, 20, 96, 64, 8, 2, 2, 3, 0).ljust(128, b"\0")
    assert TensorMap.decode(data) == TensorMap(4096, (20, 40), 96, (8, 64), 3, 2)
    with pytest.raises(ValueError, match="rank 3"):
        TensorMap.decode(data[:40] + b"\3" + data[41:])
