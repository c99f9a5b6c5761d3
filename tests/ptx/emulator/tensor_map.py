"""Tensor maps: what ``cuTensorMapEncodeTiled`` makes of a matrix for the tensor memory accelerator."""

import struct
from dataclasses import dataclass

import numpy as np

from .numbers import Array

# Bytes in a row of a swizzled tile, by CUtensorMapSwizzle; 0 is no swizzle.
WIDTHS = {1: 32, 2: 64, 3: 128}

# As ``libcuda_stub.c`` writes it into the 128 bytes of a map: address, shape, stride in bytes, box (the innermost
# dimension first), rank, bytes of an element, swizzle, and whether elements outside are NaN.
_LAYOUT = struct.Struct("<QQQQIIBBBB")


def swizzled(addresses: Array, width: int) -> Array:
    """Permute the 16-byte pieces of rows of ``width`` bytes within each 8 rows, as the hardware does; 0: not at all."""
    return addresses ^ ((addresses >> 7) & (width // 16 - 1)) << 4 if width else addresses


@dataclass(frozen=True)
class TensorMap:
    """A matrix ``shape`` (rows, columns) at ``address``, rows ``stride`` bytes apart, read in boxes (rows, columns)."""

    address: int
    shape: tuple[int, int]
    stride: int
    box: tuple[int, int]
    swizzle: int
    itemsize: int

    @classmethod
    def decode(cls, data: bytes) -> "TensorMap":
        """Read what the stub driver encoded. Raises ``ValueError`` for what is not emulated."""
        address, columns, rows, stride, box_columns, box_rows, rank, itemsize, swizzle, nan = _LAYOUT.unpack_from(data)
        if rank != 2 or nan:
            raise ValueError(f"a tensor map of rank {rank}, filled with {'NaN' if nan else 'zeros'}, is not emulated")
        return cls(address, (rows, columns), stride, (box_rows, box_columns), swizzle, itemsize)

    def tile(self, shared: int, row: int, column: int) -> tuple[Array, Array, Array]:
        """Return for the box at (row, column): addresses in shared memory, which are inside, and global addresses."""
        rows, columns = np.arange(self.box[0])[:, None], np.arange(self.box[1])[None, :]
        addresses = shared + (rows * self.box[1] + columns) * self.itemsize
        rows, columns = row + rows, column + columns
        inside = (rows >= 0) & (rows < self.shape[0]) & (columns >= 0) & (columns < self.shape[1])
        places = self.address + rows * self.stride + columns * self.itemsize
        return swizzled(addresses, WIDTHS.get(self.swizzle, 0)), inside, places
