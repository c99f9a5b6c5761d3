"""Arithmetic instructions against Python's own integers and fp64."""

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from emulator.numbers import Array
from emulator.parse import PTXError
from program import run

DTYPES = {"b16": "u2", "u16": "u2", "s16": "i2", "b32": "u4", "u32": "u4", "s32": "i4", "b64": "u8", "u64": "u8"}
DTYPES |= {"s64": "i8", "f32": "f4", "f16": "f2", "bf16": "u2", "f32x2": "u8", "f16x2": "u4", "bf16x2": "u4"}
TINY, INF, NAN = 2.0**-126, math.inf, math.nan
FLOATS = [0.0, -0.0, 1.0, -1.5, INF, -INF, NAN, TINY, -TINY / 4, TINY / 2, 1e20, -1e-20, 3e38, 65519.0, 65520.0, 2.0**-25]


def values(kind: str, seed: int) -> Array:
    """Return a value for each of 32 threads: edges, which are not in the same threads for each seed, then any."""
    dtype, random = np.dtype(DTYPES[kind]), np.random.default_rng(seed)
    if kind == "f32":
        edges = np.roll(np.array(FLOATS, np.float32), 3 * seed)
        return np.concatenate((edges, random.normal(0, 10, 16).astype(np.float32)))
    if kind in ("f16", "bf16"):
        return random.integers(0, 1 << 16, 32).astype(np.uint16).view(dtype)
    if kind == "f32x2":
        return random.normal(0, 10, 64).astype(np.float32).view(dtype)
    bits = 8 * dtype.itemsize
    edges = [0, 1, 2, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1]
    numbers = [*edges, *(int.from_bytes(random.bytes(dtype.itemsize), "little") >> i % bits for i in range(26))]
    return np.roll(np.array(numbers, f"u{dtype.itemsize}"), 3 * seed).view(dtype)


def register(kind: str, number: int) -> str:
    return {2: "%h", 4: "%r", 8: "%d"}[np.dtype(DTYPES[kind]).itemsize] + str(number)


def compute(op: str, result: str, arguments: list[str | int], given: list[Array], guard: str = "") -> Array:
    """Return what an instruction computes. arguments: PTX types of what is given, and constants."""
    kinds = [kind for kind in arguments if isinstance(kind, str)]
    lines = [f"ld.global.b{8 * given[i].itemsize} {register(kind, i)}, [%e{i}];" for i, kind in enumerate(kinds)]
    names = iter([register(kind, i) for i, kind in enumerate(kinds)])
    operands = ", ".join(str(next(names)) if isinstance(each, str) else str(each) for each in arguments)
    target, size = register(result, 9), np.dtype(DTYPES[result]).itemsize
    lines += [f"mov.b{8 * size} {target}, 7;", "and.b32 %r99, %t, 1;", "setp.eq.b32 %p1, %r99, 1;"]
    lines += [f"{guard} {op} {target}, {operands};", f"st.global.b{8 * size} [%out], {target};"]
    return run("\n".join(lines), *given, out=DTYPES[result]).out[:, 0]


def truncated(a: int, b: int) -> int:
    return 7 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def shift_right(a: int, b: int) -> int:
    return a >> min(b, 64)


def shift_left(a: int, b: int) -> int:
    return a << min(b, 64)


INTEGERS: list[tuple[str, str, list[str | int], Callable[..., int]]] = [
    *((f"add.{k}", k, [k, k], operator.add) for k in ("s16", "u16", "s32", "u32", "s64")),
    *((f"sub.{k}", k, [k, k], operator.sub) for k in ("s32", "u64")),
    *((f"mul.lo.{k}", k, [k, k], operator.mul) for k in ("s32", "s64", "u16")),
    ("mul.wide.s32", "s64", ["s32", "s32"], operator.mul),
    ("mul.wide.u32", "u64", ["u32", "u32"], operator.mul),
    *((f"and.{k}", k, [k, k], operator.and_) for k in ("b16", "b32", "b64")),
    ("or.b64", "b64", ["b64", "b64"], operator.or_),
    ("xor.b32", "b32", ["b32", "b32"], operator.xor),
    *((f"shl.{k}", k, [k, "u32"], shift_left) for k in ("b16", "b32", "b64")),
    *((f"shr.{k}", k, [k, "u32"], shift_right) for k in ("u16", "s16", "u32", "s32", "s64", "b64")),
    *((f"min.{k}", k, [k, k], min) for k in ("s32", "u32", "s64")),
    *((f"max.{k}", k, [k, k], max) for k in ("s32", "u64")),
    ("neg.s32", "s32", ["s32"], operator.neg),
    ("abs.s32", "s32", ["s32"], abs),
    ("not.b32", "b32", ["b32"], operator.invert),
    ("not.b64", "b64", ["b64"], operator.invert),
    *((f"div.{k}", k, [k, k], truncated) for k in ("s32", "u32", "s64", "u64")),
    *((f"rem.{k}", k, [k, k], lambda a, b: a - truncated(a, b) * b) for k in ("s32", "u32", "u64")),
    ("mad.lo.s32", "s32", ["s32", "s32", "s32"], lambda a, b, c: a * b + c),
    ("mad.wide.s32", "s64", ["s32", "s32", "s64"], lambda a, b, c: a * b + c),
    ("mad.wide.u32", "u64", ["u32", 12, "u64"], lambda a, c: a * 12 + c),
    *((f"bfe.u32", "u32", ["u32", at, n], lambda a, at=at, n=n: a >> at & (1 << n) - 1) for at, n in ((0, 3), (5, 9), (31, 1))),
    ("cvt.s64.s32", "s64", ["s32"], int),
    ("cvt.u64.u32", "u64", ["u32"], int),
    ("cvt.u32.u64", "u32", ["u64"], int),
    ("cvt.s32.s16", "s32", ["s16"], int),
    ("cvt.u16.u32", "u16", ["u32"], int),
    ("mov.b32", "b32", ["b32"], int),
    ("mov.b16", "b16", ["b16"], int),
    ("cvta.to.global.u64", "u64", ["u64"], int),
    ("add.s32", "s32", ["s32", -5], lambda a: a - 5),
    ("and.b32", "b32", ["b32", "0xF0"], lambda a: a & 0xF0),
]  # fmt: skip


@pytest.mark.parametrize(("op", "result", "kinds", "function"), INTEGERS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("guard", ["", "@%p1", "@!%p1"])
def test_integers_are_as_pythons(op: str, result: str, kinds: list[str | int], function: Any, guard: str) -> None:
    kinds = [int(kind, 0) if isinstance(kind, str) and kind[0] == "0" else kind for kind in kinds]
    given = [values(kind, i) for i, kind in enumerate(kinds) if isinstance(kind, str)]
    got = compute(op, result, kinds, given, guard)
    for thread, row in enumerate(zip(*(each.tolist() for each in given), strict=True)):
        if op[:3] in ("div", "rem") and row[1] == 0:
            continue
        acts = guard == "" or (thread % 2 == 1) == (guard == "@%p1")
        want = function(*row) if acts else 7
        bits = 8 * got.itemsize
        assert int(got[thread]) % (1 << bits) == want % (1 << bits), row


@pytest.mark.parametrize(("at", "count"), [(0, 1), (4, 3), (30, 2), (28, 8), (40, 4), (3, 0), (0, 32)])
@pytest.mark.parametrize("signed", [False, True])
def test_bfe_extends_by_the_fields_highest_bit(at: int, count: int, signed: bool) -> None:
    kind, given = "s32" if signed else "u32", values("u32", 0)
    got = compute(f"bfe.{kind}", "u32", ["u32", at, count], [given])
    for number, each in zip(given.tolist(), got.tolist(), strict=True):
        bits = [number >> at + i & 1 if at + i < 32 else None for i in range(min(count, 32))]
        sign = number >> min(at + count - 1, 31) & 1 if signed and count else 0
        bits += [sign] * (32 - len(bits))
        assert each == sum((sign if bit is None else bit) << i for i, bit in enumerate(bits))


def single(x: float) -> float:
    with np.errstate(all="ignore"):
        return float(np.float32(x))


def ftz(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < TINY else x


def number_or(x: float, y: float, choose: Any) -> float:
    return choose(x, y) if x == x and y == y else (y if x != x else x)


def power(x: float) -> float:
    return 2.0**x if x < 1000 else (INF if x == x else NAN)


# The name, its operands, the result in fp64, whether it flushes, and the error allowed in units in the last place.
SINGLES: list[tuple[str, int, Callable[..., float], int]] = [
    ("add.f32", 2, operator.add, 0), ("add.rn.f32", 2, operator.add, 0), ("sub.f32", 2, operator.sub, 0),
    ("mul.f32", 2, operator.mul, 0), ("fma.rn.f32", 3, lambda a, b, c: a * b + c, 0), ("neg.f32", 1, operator.neg, 0),
    ("abs.f32", 1, abs, 0), ("add.ftz.f32", 2, operator.add, 0), ("mul.ftz.f32", 2, operator.mul, 0),
    ("fma.rn.ftz.f32", 3, lambda a, b, c: a * b + c, 0), ("abs.ftz.f32", 1, abs, 0),
    ("min.f32", 2, lambda a, b: number_or(a, b, min), 0), ("max.f32", 2, lambda a, b: number_or(a, b, max), 0),
    ("max.ftz.f32", 2, lambda a, b: number_or(a, b, max), 0),
    ("min.NaN.f32", 2, lambda a, b: min(a, b) if a == a and b == b else NAN, 0),
    ("max.NaN.f32", 2, lambda a, b: max(a, b) if a == a and b == b else NAN, 0),
    ("div.rn.f32", 2, lambda a, b: a / b if b else (NAN if a != a or not a else math.copysign(INF, a) * math.copysign(1, b)), 0),
    ("div.full.f32", 2, lambda a, b: a / b if b else (NAN if a != a or not a else math.copysign(INF, a) * math.copysign(1, b)), 2),
    ("ex2.approx.ftz.f32", 1, power, 2),
]  # fmt: skip


@pytest.mark.parametrize(("op", "count", "function", "ulps"), SINGLES, ids=lambda x: x if isinstance(x, str) else "")
def test_fp32_is_fp64_rounded_once(op: str, count: int, function: Any, ulps: int) -> None:
    given = [values("f32", i) for i in range(count)]
    got = compute(op, "f32", ["f32"] * count, given)
    for each, *row in zip(got.tolist(), *(array.tolist() for array in given), strict=True):
        if "ftz" in op:
            want = ftz(single(function(*map(ftz, row))))
        else:
            want = single(function(*row))
        room = ulps * float(np.spacing(np.float32(abs(want)))) if math.isfinite(want) else 0
        if "ftz" in op and ulps and abs(want) <= 2 * TINY:
            room = 2 * TINY
        same = each == want or abs(each - want) <= room or (each != each and want != want)
        assert same, (each, want, row)
        if ulps == 0 and want == want and op[:3] not in ("min", "max"):
            assert math.copysign(1, each) == math.copysign(1, want), row


@pytest.mark.parametrize(
    ("op", "count", "function"),
    [
        ("add.f32x2", 2, operator.add),
        ("sub.f32x2", 2, operator.sub),
        ("mul.rn.f32x2", 2, operator.mul),
        ("fma.rn.f32x2", 3, lambda a, b, c: a * b + c),
    ],
)
def test_fp32_pairs(op: str, count: int, function: Any) -> None:
    given = [values("f32x2", i) for i in range(count)]
    got = compute(op, "b64", ["f32x2"] * count, given).view(np.float32)
    want = function(*(each.view(np.float32).astype(np.float64) for each in given)).astype(np.float32)
    np.testing.assert_array_equal(got, want)


def torch_from(bits: Array, kind: str) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.float16 if kind == "f16" else torch.bfloat16)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_16_bit_numbers_are_converted_as_torch_does(kind: str) -> None:
    x, y, half = values("f32", 0), values("f32", 1), values(kind, 0)
    dtype = torch.float16 if kind == "f16" else torch.bfloat16

    def rounded(numbers: Array) -> Array:
        return torch.from_numpy(numbers.copy()).to(dtype).float().numpy()

    def widened(bits: Array) -> Array:
        return torch_from(np.ascontiguousarray(bits), kind).float().numpy()

    np.testing.assert_array_equal(widened(compute(f"cvt.rn.{kind}.f32", "b16", ["f32"], [x])), rounded(x))
    packed = compute(f"cvt.rn.{kind}x2.f32", "b32", ["f32", "f32"], [x, y]).view(np.uint16)
    np.testing.assert_array_equal(widened(packed[1::2]), rounded(x))
    np.testing.assert_array_equal(widened(packed[0::2]), rounded(y))
    wide = torch_from(half, kind).float().numpy()
    np.testing.assert_array_equal(compute(f"cvt.f32.{kind}", "f32", [kind], [half]), wide)
    np.testing.assert_array_equal(widened(compute(f"abs.{kind}", "b16", [kind], [half])), np.abs(wide))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(compute(f"add.rn.f32.{kind}", "f32", [kind, "f32"], [half, y]), wide + y)
        np.testing.assert_array_equal(compute(f"sub.rn.f32.{kind}", "f32", [kind, "f32"], [half, y]), wide - y)
    pairs = values("b32", 2)
    got = compute(f"abs.{kind}x2", "b32", ["b32"], [pairs]).view(np.uint16)
    np.testing.assert_array_equal(widened(got), np.abs(widened(pairs.view(np.uint16))))
