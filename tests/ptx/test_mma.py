"""mma.sync, ldmatrix and stmatrix, against what the PTX manual says that each thread holds."""

import numpy as np
import pytest
from emulator.matrices import numbers
from numpy import uint16, uint32
from program import drawn, encoded, run

RNG = np.random.default_rng(0)
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4
SHARED = "mov.b32 %r21, global_smem;"


def words(*columns: np.ndarray) -> str:
    """PTX that puts a different word for each thread into %r30 and on, by way of the input."""
    return "".join(
        f"add.s64 %rd21, %rd2, {128 * i}; add.s64 %rd21, %rd21, %rd10; ld.global.b32 %r{30 + i}, [%rd21];"
        for i in range(len(columns))
    )


def kept(*names: str) -> str:
    """PTX that stores registers of 32 threads, one after the other."""
    return "".join(f"st.global.b32 [%rd11+{128 * i}], {name};" for i, name in enumerate(names))


@pytest.mark.parametrize("element", ["f16", "bf16", "tf32"])
def test_mma_sync_multiplies_what_the_manual_says_each_thread_holds(element) -> None:
    per = 1 if element == "tf32" else 2
    a, b, c = drawn(16, 8 * per), drawn(8 * per, 8), drawn(16, 8)

    def packed(rows, columns, matrix) -> np.ndarray:
        pieces = [
            encoded(matrix[rows, columns + e] if matrix is a else matrix[columns + e, rows], element)
            for e in range(per)
        ]
        return np.stack(pieces, 1).view(uint32)[:, 0] if per == 2 else pieces[0]

    registers = [
        packed(G, per * T, a),
        packed(G + 8, per * T, a),
        packed(G, per * (T + 4), a),
        packed(G + 8, per * (T + 4), a),
    ]
    registers += [packed(G, per * T, b), packed(G, per * (T + 4), b)]
    registers += [np.ascontiguousarray(c[G + 8 * (i // 2), 2 * T + i % 2]).view(uint32) for i in range(4)]
    shape = "m16n8k8" if per == 1 else "m16n8k16"
    body = (
        words(*registers) + f"mma.sync.aligned.{shape}.row.col.f32.{element}.{element}.f32 {{%r60, %r61, %r62, %r63}}, "
    )
    body += "{%r30, %r31, %r32, %r33}, {%r34, %r35}, {%r36, %r37, %r38, %r39};" + kept("%r60", "%r61", "%r62", "%r63")
    got = run(body, np.concatenate(registers), out_size=128).floats().reshape(4, 32)
    expected = a @ b + c
    for i in range(4):
        assert np.array_equal(got[i], expected[G + 8 * (i // 2), 2 * T + i % 2])


def test_tensor_cores_ignore_the_lowest_13_bits_of_tf32() -> None:
    assert numbers(np.array([0x3F801FFF, 0x3F802000], uint32), "tf32").tolist() == [1.0, 1 + 2.0**-10]


# %r20: the address of row %r1 of an 8x8 matrix of 16 bits, whose rows are 32 bytes apart.
ROWS = SHARED + "shl.b32 %r20, %r1, 5; add.s32 %r20, %r20, %r21;"
FILL = "".join(f"st.shared.b32 [%r20+{4 * i}], %r{30 + i};" for i in range(4))


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_gives_each_thread_two_elements_of_its_row_or_column(trans) -> None:
    matrices = RNG.integers(0, 2**16, (4, 8, 8), uint16)
    columns = [np.ascontiguousarray(matrices.reshape(32, 4, 2)[:, i]).view(uint32)[:, 0] for i in range(4)]
    body = words(*columns) + ROWS + FILL
    body += f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r60, %r61, %r62, %r63}}, [%r20];"
    ran = run(body + kept("%r60", "%r61", "%r62", "%r63"), np.concatenate(columns), out_size=128)
    got = ran.result.view(uint16).reshape(4, 32, 2)
    for i in range(4):
        matrix = matrices[i].T if trans else matrices[i]
        assert got[i].tolist() == matrix[G[:, None], 2 * T[:, None] + [0, 1]].tolist()
    assert not ran.kinds


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_is_the_reverse_of_ldmatrix(trans) -> None:
    values = [RNG.integers(0, 2**32, 32, uint32) for _ in range(4)]
    body = (
        words(*values) + ROWS + f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r20], {{%r30, %r31, %r32, %r33}};"
    )
    body += f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r60, %r61, %r62, %r63}}, [%r20];"
    ran = run(body + kept("%r60", "%r61", "%r62", "%r63"), np.concatenate(values), out_size=128)
    assert ran.result.tolist() == np.concatenate(values).tolist()
    assert not ran.kinds
