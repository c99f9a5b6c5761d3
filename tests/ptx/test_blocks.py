"""Global and shared memory, barriers and races, and threads that part."""

import numpy as np
import pytest
from emulator.memory import Memory
from emulator.parse import PTXError
from numpy import uint32
from program import run

STORE = "st.global.b32 [%rd11], %r9;"
# %r20: the address of each thread's four bytes in shared memory.
SHARED = "mov.b32 %r20, global_smem; add.s32 %r20, %r20, %r2; mov.b32 %r21, global_smem;"


# --------------------------------------------------------------------------------------------------------------- global


def test_vectors_are_loaded_and_stored_in_order() -> None:
    data = np.arange(64, dtype=uint32)
    body = "shl.b32 %r8, %r1, 4; cvt.u64.u32 %rd20, %r8; add.s64 %rd21, %rd2, %rd20; add.s64 %rd22, %rd1, %rd20;"
    body += "setp.lt.u32 %p1, %r1, 16; @%p1 ld.global.v4.b32 {%r11, %r12, %r13, %r14}, [%rd21];"
    ran = run(body + "@%p1 st.global.v4.b32 [%rd22], {%r14, %r13, %r12, %r11};", data, out_size=64)
    assert ran.result.tolist() == data.reshape(-1, 4)[:, ::-1].ravel().tolist()
    assert not ran.kinds


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r9, [%rd11+4];", "load outside of tensors, byte 128 of out"),
        ("st.global.b32 [%rd11+-4], %r1;", "store outside of tensors, byte -4 of out"),
        ("add.s64 %rd12, %rd11, 2; st.global.b32 [%rd12], %r1;", "misaligned store"),
        ("ld.global.v4.b32 {%r11, %r12, %r13, %r14}, [%rd11];", "misaligned load"),
        ("st.shared.b32 [%r2], %r1;", "outside of shared memory"),
        (SHARED + "st.shared.b32 [%r20+4000], %r1;", "outside of shared memory, byte 4096 of 4096"),
        (SHARED + "st.shared.b64 [%r20], %rd1;", "misaligned store of shared memory"),
    ],
)
def test_an_access_outside_or_misaligned_is_an_error(body, message) -> None:
    with pytest.raises(PTXError, match=message):
        run(body)


def test_gaps_between_rows_are_outside() -> None:
    memory = Memory()
    tensor = memory.add("x", np.arange(8, dtype=uint32).reshape(2, 4), stride=6)
    for byte, inside in ((0, True), (12, True), (16, False), (24, True), (36, True), (40, False)):
        body = f"mov.b64 %rd20, {tensor.address + byte}; ld.global.b32 %r9, [%rd20]; {STORE}"
        if inside:
            assert run(body, memory=memory).result[0] == (byte // 24) * 4 + byte % 24 // 4
        else:
            with pytest.raises(PTXError, match="outside of tensors"):
                run(body, memory=memory)


def test_a_byte_written_twice_and_a_byte_never_written_are_reported() -> None:
    assert run("mov.b32 %r9, %r1;" + STORE + STORE).kinds == {"written twice"}
    assert run("st.global.b32 [%rd1], %r1;").kinds == {"written twice"}
    assert run("ld.global.b32 %r9, [%rd11];" + STORE).kinds == {"uninitialized"}
    assert run("mov.b32 %r9, %r1;" + STORE + "ld.global.b32 %r9, [%rd11];").kinds == set()


# --------------------------------------------------------------------------------------------------------------- shared


def exchange(between: str, threads: int = 64) -> str:
    """Each thread stores its number and loads that of the thread of the other warp."""
    return f"{SHARED} st.shared.b32 [%r20], %r1; {between} xor.b32 %r22, %r20, 128; ld.shared.b32 %r9, [%r22]; {STORE}"


def test_warps_exchange_bytes_over_a_barrier_and_race_without() -> None:
    ran = run(exchange("bar.sync 0;"), threads=64)
    assert ran.result.tolist() == [thread ^ 32 for thread in range(64)]
    assert not ran.kinds
    assert not run(exchange("barrier.sync 0;"), threads=64).kinds
    assert run(exchange(""), threads=64).kinds == {"race"}


def test_a_store_after_another_warps_load_races_without_a_barrier() -> None:
    later = "st.shared.b32 [%r20], %r9;"
    assert run(exchange("bar.sync 0;") + later, threads=64).kinds == {"race"}
    assert run(exchange("bar.sync 0;") + "bar.sync 0;" + later, threads=64).kinds == set()


def test_a_warps_own_bytes_need_no_barrier() -> None:
    body = SHARED + "st.shared.b32 [%r20], %r1; xor.b32 %r22, %r20, 64; ld.shared.b32 %r9, [%r22];" + STORE
    ran = run(body)
    assert ran.result.tolist() == [thread ^ 16 for thread in range(32)]
    assert not ran.kinds


def test_a_barrier_of_warps_orders_no_other_warp() -> None:
    assert run(exchange("bar.sync 0; bar.warp.sync -1;"), threads=64).kinds == set()
    assert run(exchange("bar.warp.sync -1;"), threads=64).kinds == {"race"}
    with pytest.raises(PTXError, match="for a part of a warp"):
        run("bar.warp.sync 1;")
    apart = "setp.lt.u32 %p1, %r1, 16; @%p1 bra L;\nbar.warp.sync -1;\nL: mov.b32 %r9, 1;"
    assert "divergence" in run(apart).kinds


def test_threads_that_store_different_values_to_one_byte_are_reported() -> None:
    assert run("mov.b32 %r8, global_smem; st.shared.b32 [%r8], %r1;").kinds == {"race"}
    assert run("mov.b32 %r8, global_smem; mov.b32 %r9, 7; st.shared.b32 [%r8], %r9;").kinds == set()


def test_shared_bytes_never_written_are_reported() -> None:
    assert run(SHARED + "ld.shared.b32 %r9, [%r20];" + STORE).kinds == {"uninitialized"}


# -------------------------------------------------------------------------------------------------------------- control


def test_threads_part_and_meet() -> None:
    body = (
        """
    mov.b32 %r9, 0; and.b32 %r8, %r1, 3;
    setp.eq.b32 %p1, %r8, 0; @%p1 bra DONE;
    LOOP: add.s32 %r9, %r9, 10; sub.s32 %r8, %r8, 1; setp.ne.b32 %p2, %r8, 0; @%p2 bra LOOP;
    DONE: st.global.b32 [%rd11], %r9;
    """.replace("\n", " ")
        .replace("LOOP:", "\nLOOP:")
        .replace("DONE:", "\nDONE:")
    )
    ran = run(body)
    assert ran.result.tolist() == [10 * (thread % 4) for thread in range(32)]
    assert not ran.kinds


def test_a_warp_shuffles_and_elects() -> None:
    assert run(f"shfl.sync.bfly.b32 %r9, %r1, 3, 31, -1; {STORE}").result.tolist() == [i ^ 3 for i in range(32)]
    assert run(f"shfl.sync.idx.b32 %r9, %r2, 5, 31, -1; {STORE}").result.tolist() == [20] * 32
    ran = run(f"elect.sync %r8|%p1, -1; selp.b32 %r9, 1, 0, %p1; {STORE}", threads=64)
    assert ran.result.nonzero()[0].tolist() == [0, 32]


def test_a_shuffle_of_threads_that_are_apart_is_reported() -> None:
    ran = run(
        f"setp.lt.u32 %p1, %r1, 7; @%p1 bra L;\nL2: shfl.sync.idx.b32 %r9, %r1, 20, 31, -1;\nL: mov.b32 %r9, 0; {STORE}"
    )
    assert ran.kinds == {"divergence"}


def test_a_shuffle_by_a_part_of_a_warp_is_reported() -> None:
    ran = run(f"setp.lt.u32 %p1, %r1, 7; mov.b32 %r9, 0; @%p1 shfl.sync.idx.b32 %r9, %r1, 0, 31, -1; {STORE}")
    assert ran.kinds == {"divergence"}


def test_a_barrier_that_some_threads_never_reach_is_a_deadlock() -> None:
    # Threads below 7 wait for an mbarrier at which nothing arrives; the others wait for them.
    body = (
        "setp.lt.u32 %p1, %r1, 32; @!%p1 bra L;\n mov.b32 %r21, global_smem; mbarrier.init.shared::cta.b64 [%r21], 1;"
    )
    body = body.replace("mbarrier.init", "setp.eq.b32 %p2, %r1, 0; @%p2 mbarrier.init")
    body += "\nW: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r21], 0; @!%p3 bra W;\nL: bar.sync 0;"
    with pytest.raises(PTXError, match="deadlock"):
        run(body, threads=64)


def test_a_barrier_waits_for_threads_that_have_not_returned() -> None:
    body = f"setp.lt.u32 %p1, %r1, 32; @%p1 bra L;\nret;\nL: bar.sync 0; mov.b32 %r9, 1; {STORE}"
    assert run(body, threads=64).memory.stores.sum() == 128


def test_a_program_that_does_not_end_is_an_error() -> None:
    with pytest.raises(PTXError, match="does not end"):
        run("L: bra L;")


# ------------------------------------------------------------------------------------------------- warps that run apart

# Warps 0 and 1 store, warps 2 and 3 load what they stored; %p1: the thread is in one of the first two.
PARTS = SHARED + "setp.lt.u32 %p1, %r1, 64; xor.b32 %r22, %r20, 256; @%p1 bra FIRST;\n"
LOAD = f"ld.shared.b32 %r9, [%r22]; {STORE} ret;\n"


def meeting(first: str, second: str, loads: str = LOAD, seed: int = 0) -> set[str]:
    body = f"{PARTS} {second} {loads} FIRST: st.shared.b32 [%r20], %r1; {first} mov.b32 %r9, 0; {STORE}"
    return run(body, threads=128, seed=seed).kinds


def test_a_barrier_of_its_own_orders_some_warps() -> None:
    assert meeting("bar.sync 3, 128;", "bar.sync 3, 128;") == set()
    assert meeting("barrier.sync 3;", "barrier.sync 3;") == set()
    assert "race" in meeting("bar.sync 2, 64;", "bar.sync 3, 64;") | meeting(
        "bar.sync 2, 64;", "bar.sync 3, 64;", seed=1
    )
    with pytest.raises(PTXError, match="deadlock"):
        meeting("bar.sync 2, 128;", "bar.sync 3, 128;")
    with pytest.raises(PTXError, match=r"not for as many as before|deadlock"):
        meeting("bar.sync 2, 128;", "bar.sync 2, 64;")


ARRIVE = "setp.eq.b32 %p2, %r1, 0; @%p2 mbarrier.arrive.shared::cta.b64 _, [%r21+2048];"
LOOP = "\nW: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r21+2048], 0; @!%p3 bra W;\n"


def handing_over(first: str = "bar.sync 1, 64;" + ARRIVE, second: str = LOOP) -> set[str]:
    begin = "setp.eq.b32 %p4, %r1, 0; mov.b32 %r25, global_smem;"
    begin += "@%p4 mbarrier.init.shared::cta.b64 [%r25+2048], 1; bar.sync 0;"
    kinds: set[str] = set()
    for seed in range(4):
        body = f"{begin} {PARTS} {second} {LOAD} FIRST: st.shared.b32 [%r20], %r1; {first} mov.b32 %r9, 0; {STORE}"
        kinds |= run(body, threads=128, seed=seed).kinds
    return kinds


def test_an_mbarrier_hands_over_what_the_arriving_warps_stored() -> None:
    assert handing_over() == set()
    assert handing_over(first=ARRIVE) == {"race"}  # before the other warp has stored
    assert "race" in handing_over(second=LOOP.replace("@!%p3 bra W;", ""))  # a wait that is not repeated
    assert "race" in handing_over(second="")
    with pytest.raises(PTXError, match="deadlock"):
        handing_over(second=LOOP + LOOP.replace("W", "V").replace("], 0;", "], 1;"))


@pytest.mark.parametrize("after_the_label", [" ", "\n"], ids=["3.7", "3.9"])
def test_a_table_sends_warps_apart(after_the_label) -> None:
    body = f"shr.u32 %r8, %r1, 5;\nT:{after_the_label}.branchtargets A,\nB;\nbrx.idx %r8, T;\n"
    ran = run(body + f"A: mov.b32 %r9, 10; bra C;\nB: mov.b32 %r9, 20;\nC: {STORE}", threads=64)
    assert ran.result.tolist() == [10] * 32 + [20] * 32


def registers(first: str, second: str) -> None:
    body = f"setp.lt.u32 %p1, %r1, 128; @%p1 bra FIRST;\n {second} ret;\nFIRST: {first} mov.b32 %r9, 0; {STORE}"
    run(body, threads=256, max_registers=128, out_size=256, seed=0)


def test_registers_are_given_back_before_others_get_them() -> None:
    more, less = "setmaxnreg.inc.sync.aligned.u32 {};", "setmaxnreg.dec.sync.aligned.u32 {};"
    registers(more.format(232), less.format(24))
    for first, second, message in (
        (more.format(240), less.format(24), "deadlock"),
        (more.format(136), "", "deadlock"),
        (less.format(136), "", "a thread has"),
        (more.format(132), "", "steps of 8"),
    ):
        with pytest.raises(PTXError, match=message):
            registers(first, second)
