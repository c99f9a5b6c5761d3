"""Global memory: tensors at addresses, of which only the bytes of their elements may be touched."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .numbers import Array
from .parse import Instruction, Reports

_GAP = 4096


@dataclass
class Tensor:
    """A tensor in ``Memory``: its first byte's address, its extent in bytes, and where these stand in the arena.

    strides: in bytes.
    """

    name: str
    address: int
    extent: int
    start: int
    shape: tuple[int, int]
    strides: tuple[int, int]
    dtype: np.dtype[Any]

    def offsets(self) -> Array:
        """Return the place in the arena of every element's first byte."""
        rows, columns = np.ogrid[: self.shape[0], : self.shape[1]]
        places: Array = self.start + rows * self.strides[0] + columns * self.strides[1]
        return places


class Memory:
    """Tensors side by side in an arena of bytes, with gaps.

    valid: bytes of elements. written: bytes that hold a value. stores: how often a kernel wrote each.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.data, self.valid, self.written = np.zeros(_GAP, np.uint8), np.zeros(_GAP, bool), np.zeros(_GAP, bool)
        self.stores = np.zeros(_GAP, np.uint8)
        self._bounds = np.zeros((0, 3), np.int64)
        self._next = 0x7F0000000000 + 256  # a multiple of 256 and of nothing larger

    def add(
        self,
        name: str,
        array: Array,
        *,
        stride: int | None = None,
        column_stride: int = 1,
        output: bool = False,
        address: int | None = None,
    ) -> Tensor:
        """Copy in an array ``[rows, columns]`` or ``[columns]``.

        stride, column_stride: elements between rows and columns. output: nothing has been written yet. address: where
        it stands; by default somewhere.
        """
        array = np.atleast_2d(np.ascontiguousarray(array))
        (rows, columns), size = array.shape, array.itemsize
        strides = (columns if stride is None else stride) * size, column_stride * size
        extent = (rows - 1) * strides[0] + (columns - 1) * strides[1] + size
        if address is None:
            address, self._next = self._next, (self._next + extent + 2 * _GAP) // _GAP * _GAP + 256
        tensor = Tensor(name, address, extent, len(self.data), (rows, columns), strides, array.dtype)
        room = (extent + 2 * _GAP) // _GAP * _GAP
        self.data = np.concatenate((self.data, np.zeros(room, np.uint8)))
        for each in ("valid", "written"):
            setattr(self, each, np.concatenate((getattr(self, each), np.zeros(room, bool))))
        self.stores = np.concatenate((self.stores, np.zeros(room, np.uint8)))
        elements = tensor.offsets()[..., None] + np.arange(array.itemsize)
        self.data[elements] = 0xFF if output else array.view(np.uint8).reshape(elements.shape)
        self.valid[elements], self.written[elements] = True, not output
        index = int(np.searchsorted(self._bounds[:, 0], address, "right"))
        self._bounds = np.insert(self._bounds, index, (address, extent, tensor.start), axis=0)
        self.tensors.insert(index, tensor)
        return tensor

    def read(self, tensor: Tensor) -> Array:
        """Return a tensor's elements."""
        offsets = tensor.offsets()[..., None] + np.arange(tensor.dtype.itemsize)
        return self.data[offsets].view(tensor.dtype)[..., 0]

    def times_written(self, tensor: Tensor) -> Array:
        """Return how often each byte of a tensor was written: ``[rows, columns, bytes]``."""
        return self.stores[tensor.offsets()[..., None] + np.arange(tensor.dtype.itemsize)]

    def find(self, addresses: Array, size: int, ins: Instruction, what: str) -> Array:
        """Return where in the arena accesses of ``size`` bytes lie. Raises ``PTXError`` outside of tensors."""
        if (addresses % size).any():
            raise ins.error(f"misaligned {what}")
        if not self.tensors:
            raise ins.error(f"{what} outside of tensors")
        index = np.maximum(np.searchsorted(self._bounds[:, 0], addresses, "right") - 1, 0)
        address, extent, start = self._bounds[index].T
        inside = addresses - address
        ok = (inside >= 0) & (inside + size <= extent)
        places = np.where(ok, start + inside, 0)
        ok &= self.valid[places] & self.valid[places + size - 1]
        if not ok.all():
            wrong = int(addresses[~ok][0])
            tensor = self.tensors[int(index[~ok][0])]
            raise ins.error(
                f"{what} outside of tensors, byte {wrong - tensor.address} of {tensor.name} ({tensor.extent})"
            )
        return places

    def load(self, places: Array, size: int, count: int, ins: Instruction, reports: Reports) -> Array:
        """Return ``count`` numbers of ``size`` bytes from each place: ``[n, count]``."""
        self.check_written(places, size * count, ins, reports)
        return self.data.view(f"u{size}")[(places // size)[:, None] + np.arange(count)]

    def check_written(self, places: Array, size: int, ins: Instruction, reports: Reports) -> None:
        if not (self.written[places] & self.written[places + size - 1]).all():
            reports.add("uninitialized", ins, "global memory was never written")

    def store(self, places: Array, values: Array, ins: Instruction, reports: Reports) -> None:
        """Write ``values [n, count]``."""
        size, count = values.itemsize, values.shape[1]
        touched = places[:, None] + np.arange(size * count)
        if self.stores[touched].any() or len(np.unique(places)) < len(places):
            reports.add("written twice", ins, "bytes of global memory")
        self.stores[touched] += 1
        self.written[touched] = True
        self.data.view(f"u{size}")[(places // size)[:, None] + np.arange(count)] = values
