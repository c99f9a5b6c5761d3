"""Instructions that compute registers from registers, against numpy."""

import numpy as np
import pytest
from emulator.numbers import from_bf16, nudge, to_bf16
from emulator.parse import PTXError
from numpy import float16, float32, float64, int32, int64, uint16, uint32, uint64
from program import compute, run

RNG = np.random.default_rng(0)
INTEGERS = RNG.integers(0, 2**32, (3, 64), uint32)
INTEGERS[:, :4] = [[0, 1, 2**31, 2**32 - 1]]
LONGS = RNG.integers(0, 2**64, (2, 32), uint64)
FLOATS = (RNG.standard_normal((3, 64)) * 3).astype(float32)
FLOATS[0, :3] = [np.inf, np.nan, -0.0]
HALVES = (RNG.standard_normal((3, 128)) * 3).astype(float16)
A, B, C = INTEGERS
X, Y, Z = FLOATS


def same(got, expected) -> None:
    assert np.array_equal(got, np.asarray(expected).view(got.dtype))


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("add.s32", A + B),
        ("sub.s32", A - B),
        ("mul.lo.s32", A * B),
        ("and.b32", A & B),
        ("or.b32", A | B),
        ("xor.b32", A ^ B),
        ("min.s32", np.minimum(A.view(int32), B.view(int32))),
        ("max.s32", np.maximum(A.view(int32), B.view(int32))),
        ("min.u32", np.minimum(A, B)),
        (
            "div.s32",
            np.trunc(A.view(int32).astype(float64) / np.where(B == 0, 1, B.view(int32))).astype(int64).astype(int32),
        ),
    ],
)
def test_integers(op, expected) -> None:
    b = np.where(B == 0, uint32(1), B) if op.startswith("div") else B
    same(compute(f"{op} {{d}}, {{0}}, {{1}};", A, b), expected)


def test_shifts_by_the_width_or_more_leave_zeros_or_the_sign() -> None:
    amounts = np.arange(64, dtype=uint32)
    wide = A.astype(uint64)
    same(
        compute("shl.b32 {d}, {0}, {1};", A, amounts),
        np.where(amounts < 32, wide << np.minimum(amounts, 63), 0).astype(uint32),
    )
    same(
        compute("shr.u32 {d}, {0}, {1};", A, amounts),
        np.where(amounts < 32, wide >> np.minimum(amounts, 63), 0).astype(uint32),
    )
    same(compute("shr.s32 {d}, {0}, {1};", A, amounts), A.view(int32) >> np.minimum(amounts, 31).astype(int32))


def test_wide_products_and_long_sums() -> None:
    signed = A.view(int32).astype(int64)
    same(compute("mul.wide.s32 {d}, {0}, {1};", A, B, result="b64"), signed * B.view(int32))
    same(compute("mul.wide.u32 {d}, {0}, {1};", A, B, result="b64"), A.astype(uint64) * B)
    same(compute("mul.hi.u32 {d}, {0}, {1};", A, B), (A.astype(uint64) * B >> uint64(32)).astype(uint32))
    same(compute("mul.hi.s32 {d}, {0}, {1};", A, B).view(int32), (signed * B.view(int32) >> 32).astype(int32))
    same(compute("mad.wide.s32 {d}, {0}, {1}, 5;", A, B, result="b64"), signed * B.view(int32) + 5)
    same(compute("mad.lo.s32 {d}, {0}, {1}, {2};", A, B, C), A * B + C)
    same(compute("add.s64 {d}, {0}, {1};", *LONGS, kind="b64", result="b64"), LONGS[0] + LONGS[1])
    same(compute("min.s64 {d}, {0}, {1};", *LONGS, kind="b64", result="b64"), np.minimum(*LONGS.view(int64)))
    same(compute("cvt.s64.s32 {d}, {0};", A, result="b64"), signed)
    same(compute("cvt.u64.u32 {d}, {0};", A, result="b64"), A.astype(uint64))
    same(compute("cvt.u32.u64 {d}, {0};", LONGS[0], kind="b64"), LONGS[0].astype(uint32))


def test_bit_fields_are_extended_by_their_sign() -> None:
    same(compute("bfe.u32 {d}, {0}, 3, 5;", A), A >> 3 & 31)
    same(compute("bfe.s32 {d}, {0}, 3, 5;", A), ((A >> 3 & 31) ^ 16) - uint32(16))
    same(compute("bfe.s32 {d}, {0}, 28, 8;", A), A.view(int32) >> 28)
    same(compute("neg.s32 {d}, {0};", A), -A)
    same(compute("not.b32 {d}, {0};", A), ~A)
    same(compute("rem.s32 {d}, {0}, 7;", A), np.fmod(A.view(int32), 7))


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("add.f32", X + Y),
        ("sub.f32", X - Y),
        ("mul.f32", X * Y),
        ("min.NaN.f32", np.minimum(X, Y)),
        ("max.f32", np.fmax(X, Y)),
        ("div.rn.f32", X / Y),
    ],
)
def test_floats(op, expected) -> None:
    got = compute(f"{op} {{d}}, {{0}}, {{1}};", X, Y).view(float32)
    assert np.array_equal(got, expected, equal_nan=True)


def test_fma_rounds_once() -> None:
    x, tiny = np.full(32, 1 + 2.0**-12, float32), np.full(32, -1.0, float32)
    exact = (1 + 2.0**-12) ** 2 - 1
    got = compute("fma.rn.f32 {d}, {0}, {1}, {2};", x, x, tiny).view(float32)
    assert np.array_equal(got, np.full(32, exact, float32))
    assert not np.array_equal(got, x * x - 1)


def test_pairs_of_floats_are_computed_apart() -> None:
    x, y = (np.ascontiguousarray(v).view(uint64) for v in (X, Y))
    same(compute("add.f32x2 {d}, {0}, {1};", x, y, kind="b64", result="b64")[2:], (X + Y).view(uint64)[2:])
    z = Z.view(uint64)
    got = compute("fma.rn.f32x2 {d}, {0}, {1}, {2};", x, y, z, kind="b64", result="b64").view(float32)
    expected = (X.astype(float64) * Y + Z).astype(float32)
    assert np.array_equal(got, expected, equal_nan=True)


def test_subnormal_numbers_are_flushed_where_the_instruction_says_so() -> None:
    tiny = np.full(32, -1e-40, float32)
    assert np.signbit(compute("mul.f32 {d}, {0}, 0f3F800000;", tiny).view(float32)).all()
    assert (compute("mul.f32 {d}, {0}, 0f3F800000;", tiny).view(float32) != 0).all()
    same(compute("mul.ftz.f32 {d}, {0}, 0f3F800000;", tiny), np.full(32, -0.0, float32))


def test_subnormal_operands_are_flushed_too() -> None:
    tiny, huge = np.full(32, 1e-40, float32), np.full(32, 1e20, float32)
    assert (compute("mul.ftz.f32 {d}, {0}, {1};", tiny, huge) == 0).all()
    assert (compute("mul.f32 {d}, {0}, {1};", tiny, huge) != 0).all()
    assert (compute("setp.gt.ftz.f32 %p1, {0}, 0f00000000; selp.b32 {d}, 1, 0, %p1;", tiny) == 0).all()


def test_approximate_instructions_are_off_by_two_units_at_most_and_by_some() -> None:
    x = np.linspace(-20, 20, 1024, dtype=float32)
    for got, exact in (
        (compute("ex2.approx.ftz.f32 {d}, {0};", x).view(float32), np.exp2(x.astype(float64)).astype(float32)),
        (compute("div.full.f32 {d}, {0}, {1};", x, np.roll(x, 1)).view(float32), x / np.roll(x, 1)),
    ):
        off = np.abs(got.view(int32).astype(int64) - exact.view(int32))
        assert set(np.unique(off)) == {0, 1, 2}
    specials = np.array([0, -0.0, np.inf, -np.inf, np.nan], float32)
    assert np.array_equal(nudge(specials), specials, equal_nan=True)


def test_sixteen_bit_numbers_are_rounded_to_nearest() -> None:
    words = X.astype(float16).view(uint16).astype(uint32) << 16 | Y.astype(float16).view(uint16)
    same(compute("cvt.rn.f16x2.f32 {d}, {0}, {1};", X, Y), words)
    words = to_bf16(X).astype(uint32) << 16 | to_bf16(Y)
    same(compute("cvt.rn.bf16x2.f32 {d}, {0}, {1};", X, Y), words)
    halfway = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF], uint32).repeat(8)
    got = to_bf16(halfway.view(float32))
    assert got[::8].tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80]
    unpack = "mov.b32 {%rs1, %rs2}, {0}; cvt.f32.KIND {d}, %rsPLACE;"
    packed = np.ascontiguousarray(HALVES[0]).view(uint32)
    for place in (1, 2):
        got = compute(unpack.replace("KIND", "f16").replace("PLACE", str(place)), packed).view(float32)
        assert np.array_equal(got, HALVES[0][place - 1 :: 2].astype(float32))
        got = compute(unpack.replace("KIND", "bf16").replace("PLACE", str(place)), packed).view(float32)
        expected = from_bf16(HALVES[0].view(uint16)[place - 1 :: 2])
        assert np.array_equal(got, expected, equal_nan=True)
    got = compute("mov.b32 {%rs1, %rs2}, {0}; add.rn.f32.f16 {d}, %rs2, {1};", packed[:64], X).view(float32)
    assert np.array_equal(got, HALVES[0][1::2].astype(float32) + X, equal_nan=True)


@pytest.mark.parametrize("op", ["lt", "le", "gt", "ge", "eq", "ne"])
def test_comparisons_select(op) -> None:
    python = {"lt": "__lt__", "le": "__le__", "gt": "__gt__", "ge": "__ge__", "eq": "__eq__", "ne": "__ne__"}[op]
    b = np.where(np.arange(64) % 3 == 0, A, B)
    for kind, dtype in (("s32", int32), ("u32", uint32)):
        expected = np.where(getattr(A.view(dtype), python)(b.view(dtype)), A, C)
        same(compute(f"setp.{op}.{kind} %p1, {{0}}, {{1}}; selp.b32 {{d}}, {{0}}, {{2}}, %p1;", A, b, C), expected)


def test_unordered_comparisons_hold_for_nan_and_others_do_not() -> None:
    cases = (("ltu", (X < Y) | np.isnan(X)), ("lt", X < Y), ("ne", (X != Y) & ~np.isnan(X)), ("neu", X != Y))
    for op, expected in cases:
        same(compute(f"setp.{op}.f32 %p1, {{0}}, {{1}}; selp.b32 {{d}}, 1, 0, %p1;", X, Y), expected.astype(uint32))


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_pairs_of_sixteen_bits(kind) -> None:
    a, b = (np.ascontiguousarray(HALVES[i]) for i in (0, 1))
    read = (lambda x: x.astype(float32)) if kind == "f16x2" else (lambda x: from_bf16(x.view(uint16)))
    text = f"setp.lt.{kind} %p1|%p2, {{0}}, {{1}}; selp.b32 %r40, 1, 0, %p1; selp.b32 %r41, 2, 0, %p2;"
    text += "or.b32 {d}, %r40, %r41;"
    less = (read(a) < read(b)).reshape(-1, 2)
    same(compute(text, a.view(uint32), b.view(uint32)), (less[:, 0] + 2 * less[:, 1]).astype(uint32))
    same(compute(f"abs.{kind} {{d}}, {{0}};", a.view(uint32)), (a.view(uint16) & 0x7FFF).view(uint32))
    got = compute(f"min.NaN.{kind} {{d}}, {{0}}, {{1}};", a.view(uint32), b.view(uint32))
    same(got, np.where(read(a) < read(b), a, b).view(uint32))


def test_predicates_are_combined_and_guard_a_result() -> None:
    text = "setp.lt.u32 %p1, {0}, {1}; setp.lt.u32 %p2, {1}, {2}; OP.pred %p3, %p1, %p2;"
    text += "mov.b32 {d}, 7; @!%p3 mov.b32 {d}, 9;"
    for op, together in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        expected = np.where(together(A < B, B < C), 7, 9).astype(uint32)
        same(compute(text.replace("OP", op), A, B, C), expected)


def test_registers_are_packed_with_the_first_in_the_lowest_bits() -> None:
    same(compute("mov.b64 {d}, {{0}, {1}};", A, B, result="b64"), A + (B.astype(uint64) << 32))
    same(compute("mov.b32 {%rs1, %rs2}, {0}; mov.b32 {d}, {%rs2, %rs1};", A), A << 16 | A >> 16)


def test_a_part_that_nothing_was_written_to_holds_ones() -> None:
    body = "mov.b64 %rd20, {%r1, %r50}; mov.b64 {OUT}, %rd20; st.global.b32 [%rd11], %r9;"
    assert run(body.replace("OUT", "%r9, _")).result.tolist() == list(range(32))
    assert (run(body.replace("OUT", "_, %r9")).result == 0xFFFFFFFF).all()


@pytest.mark.parametrize(
    "body",
    [
        "sqrt.rn.f32 %r9, %r1;",
        "mul.hi.u64 %rd9, %rd1, %rd1;",
        "cvt.rzi.s32.f32 %r9, %r1;",
        "add.rz.f32 %r9, %r1, %r1;",
        "barrier.arrive 1, 64;",
        "bar.arrive 0, 64;",
    ],
)
def test_an_unknown_instruction_is_named_with_its_line(body) -> None:
    with pytest.raises(PTXError, match=rf"line \d+: .*{body.split()[0]}"):
        run(body)


def test_a_register_without_a_value_and_a_division_by_zero_are_errors() -> None:
    with pytest.raises(PTXError, match=r"read before it is written.*add\.s32 %r9"):
        run("add.s32 %r9, %r1, %r50;")
    with pytest.raises(PTXError, match="guard is read before it is written"):
        run("mov.b32 %r9, 1; @%p3 mov.b32 %r9, 2;")
    with pytest.raises(PTXError, match=r"line \d+: .*st\.global"):
        run("st.global.b32 [%rd11], %r50;")
    with pytest.raises(PTXError, match="division by zero"):
        run("sub.s32 %r8, %r1, %r1; div.s32 %r9, %r1, %r8;")
