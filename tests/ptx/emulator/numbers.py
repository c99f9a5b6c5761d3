"""PTX's types as numpy's, and arithmetic that numpy lacks."""

from typing import Any

import numpy as np
from numpy import float16, float32, float64, int16, int32, int64, uint8, uint16, uint32, uint64
from numpy.typing import NDArray

Array = NDArray[Any]

# PTX type -> numpy's name. A register of 16, 32 or 64 bits keeps them as an unsigned integer.
NAMES = {"pred": "bool_", "b8": "uint8", "u8": "uint8", "b16": "uint16", "u16": "uint16", "s16": "int16"}
NAMES |= {"b32": "uint32", "u32": "uint32", "s32": "int32", "b64": "uint64", "u64": "uint64", "s64": "int64"}
NAMES |= {"f16": "float16", "bf16": "uint16", "f32": "float32", "f64": "float64"}
SIZES = {name: np.dtype(numpy_name).itemsize for name, numpy_name in NAMES.items()}

# The largest error of ``ex2.approx`` and ``div.full`` in the PTX manual, in units in the last place.
APPROXIMATE_ULPS = 2


def to_bf16(x: Array) -> Array:
    """Round fp32 to bf16, as ``uint16``."""
    bits = x.view(uint32)
    rounded = ((bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16)).astype(uint16)
    return np.where(np.isnan(x), uint16(0x7FFF), rounded)


def from_bf16(x: Array) -> Array:
    return (x.astype(uint32) << uint32(16)).view(float32)


def to_half(x: Array) -> Array:
    """Round fp32 to fp16, as ``uint16``."""
    return x.astype(float16).view(uint16)


def from_half(x: Array) -> Array:
    return x.view(float16).astype(float32)


def tf32(x: Array) -> Array:
    """Return fp32 as tensor cores read it in TF32: they ignore the 13 lowest bits."""
    return (x.view(uint32) & uint32(0xFFFFE000)).view(float32)


def fma(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c. The product is exact in fp64, and the sum is rounded twice."""
    return (a.astype(float64) * b + c).astype(float32)


def ftz(x: Array) -> Array:
    """Flush subnormal numbers to zeros of their sign."""
    return np.where(np.abs(x) < float32(1.1754944e-38), np.copysign(float32(0), x), x)


def nudge(x: Array) -> Array:
    """Move numbers by -2 to 2 units in the last place, by their own bits: the same number always the same way."""
    bits = x.view(uint32)
    ulps = ((bits * uint32(2654435761)) >> uint32(16)).astype(int32) % (2 * APPROXIMATE_ULPS + 1) - APPROXIMATE_ULPS
    usable = np.isfinite(x) & (np.abs(x) > float32(1.2e-38)) & (np.abs(x) < float32(3e38))
    return np.where(usable, bits + ulps.astype(uint32), bits).view(float32)


def exp2(x: Array) -> Array:
    """``ex2.approx.ftz.f32``."""
    return ftz(nudge(np.exp2(ftz(x).astype(float64)).astype(float32)))


def divide(a: Array, b: Array) -> Array:
    """``div.full.f32``."""
    return nudge(a / b)


def quotient(a: Array, b: Array) -> Array:
    """Integer division towards zero. Raises ``ZeroDivisionError`` where every divisor is 0: the result is anything."""
    if not np.any(b):
        raise ZeroDivisionError
    wide, divisor = a.astype(int64), np.where(b == 0, 1, b).astype(int64)
    return (np.abs(wide) // np.abs(divisor) * np.sign(wide) * np.sign(divisor)).astype(a.dtype)


def bits_of(x: Array, position: int, count: int, signed: bool) -> Array:
    """``bfe``: ``count`` bits from ``position`` on, extended by their sign; past the last bit there is no more."""
    count = min(count, 32 - position)
    if count <= 0:
        raise ValueError("a field without bits is not emulated")
    field = (x.view(uint32).astype(uint64) >> uint64(position)) & uint64((1 << count) - 1)
    if signed:
        field = (field ^ uint64(1 << (count - 1))) - uint64(1 << (count - 1))
    return field.astype(uint32)


def shifted(x: Array, amount: Array, left: bool) -> Array:
    """``shl`` and ``shr``: PTX shifts by at most the width, which leaves zeros or the sign."""
    bits = 8 * x.dtype.itemsize
    within = np.minimum(amount, uint32(bits - 1)).astype(x.dtype)
    out: Array = x << within if left else x >> within
    if x.dtype.kind == "i" and not left:
        return out
    return np.where(amount >= bits, x.dtype.type(0), out)


# What generated code may call (``arithmetic.py``).
NAMESPACE: dict[str, Any] = {
    "np": np, "uint8": uint8, "uint16": uint16, "uint32": uint32, "uint64": uint64, "int16": int16, "int32": int32,
    "int64": int64, "float16": float16, "float32": float32, "float64": float64, "bool_": np.bool_,
    "to_bf16": to_bf16, "from_bf16": from_bf16, "to_half": to_half, "from_half": from_half, "fma": fma, "ftz": ftz,
    "exp2": exp2, "divide": divide, "quotient": quotient, "bits_of": bits_of, "shifted": shifted,
}  # fmt: skip
