"""The real tokens of a padded batch as rows of one matrix, ``[T, H]``, and attention over them."""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


@dataclass(frozen=True)
class Packing:
    """Which rows of ``[B * S]`` are real tokens, sequence by sequence, the longest first.

    index: ``[T]``, int64, their positions in the flattened batch.
    order: ``[B]``, int64, the sequences of the batch in the order in which they are packed.
    starts: ``[B + 1]``, int32, where each begins among the ``T`` rows, and ``T``.
    keep: ``[B, S]``, bool.
    runs: (count, length) of neighbouring sequences of one length. Only on a CPU: elsewhere reading them would wait for
        the device.
    """

    index: Tensor
    order: Tensor
    starts: Tensor
    keep: Tensor
    runs: tuple[tuple[int, int], ...]

    def pack(self, padded: Tensor) -> Tensor:
        """``[B, S, ...]`` to ``[T, ...]``."""
        rows: Tensor = padded.flatten(0, 1).index_select(0, self.index)
        return rows

    def restore(self, rows: Tensor) -> Tensor:
        """``[T, ...]`` to ``[B, S, ...]``, zeros at padding."""
        batch, sequence = self.keep.shape
        padded = rows.new_zeros(batch * sequence, *rows.shape[1:])
        return padded.index_copy(0, self.index, rows).view(batch, sequence, *rows.shape[1:])

    def firsts(self, rows: Tensor) -> Tensor:
        """The first token of each sequence: ``[T, H]`` to ``[B, H]``, in packed order."""
        return rows.index_select(0, self.starts[:-1])

    def restore_firsts(self, rows: Tensor) -> Tensor:
        """``[B, ...]`` in packed order to ``[B, 1, ...]``."""
        return torch.zeros_like(rows).index_copy(0, self.order, rows).unsqueeze(1)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float = 0.0, firsts: bool = False
    ) -> Tensor:
        """Attention within each sequence.

        key, value: ``[T, heads, D]``. query: the same, or with ``firsts`` ``[B, heads, D]``, a row for each sequence,
        none of which may be empty then. The result has query's shape.
        """
        if varlen_serves(query, dropout):
            return _varlen(self, query, key, value, scale, firsts)
        attend = _by_length if query.device.type == "cpu" else _padded
        return attend(self, query, key, value, scale, dropout, firsts)


# Packing reads how many tokens there are, so torch.compile must break its graph here.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def packing_of(keep: Tensor, *, needs_first: bool) -> Packing | None:
    """Return how to pack a batch; None if that would save nothing or lose a position that is read.

    keep: ``[B, S]``, bool, the real tokens. needs_first: position 0 is read even where it is padding.
    """
    if keep.numel() == 0 or (keep.device.type == "cpu" and bool(keep.all())):  # on a GPU: one more wait
        return None
    lengths = keep.sum(1)
    tokens, firsts = torch.stack((lengths.sum(), keep[:, 0].sum())).tolist()
    if tokens in (0, keep.numel()) or (needs_first and firsts < len(keep)):
        return None
    lengths, order = lengths.sort(descending=True, stable=True)
    rows, columns = keep[order].nonzero(as_tuple=True)
    starts = F.pad(lengths.cumsum(0), (1, 0)).int()
    runs = _runs(lengths.tolist()) if keep.device.type == "cpu" else ()
    return Packing(order[rows] * keep.shape[1] + columns, order, starts, keep, runs)


def _runs(lengths: list[int]) -> tuple[tuple[int, int], ...]:
    return tuple((len(list(run)), length) for length, run in itertools.groupby(lengths) if length)


def varlen_serves(query: Tensor, dropout: float) -> bool:
    """Tell whether ``torch.nn.attention.varlen`` (flash attention) can compute attention for ``[T, heads, D]``."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and dropout == 0
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _varlen(packing: Packing, query: Tensor, key: Tensor, value: Tensor, scale: float, firsts: bool) -> Tensor:
    # The longest sequence is at most S long; reading its exact length would wait for the GPU.
    batch, longest = packing.keep.shape
    starts, per_query = packing.starts, longest
    if firsts:
        starts, per_query = torch.arange(batch + 1, dtype=torch.int32, device=query.device), 1
    out = varlen_attn(query, key, value, starts, packing.starts, per_query, longest, scale=scale)
    assert isinstance(out, Tensor)  # a tuple only where more than the result is asked for
    return out


# Lengths differ from batch to batch, and torch.compile would compile this for each of them.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_length(
    packing: Packing, query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, firsts: bool
) -> Tensor:
    """One call for each length: sequences of one length lie side by side and need neither a copy nor a mask."""
    tokens = [count * length for count, length in packing.runs]
    queries = [count for count, _ in packing.runs] if firsts else tokens
    pieces = []
    for (count, _), q, k, v in zip(
        packing.runs, query.split(queries), key.split(tokens), value.split(tokens), strict=True
    ):
        q, k, v = [rows.view(count, -1, *rows.shape[1:]) for rows in (q, k, v)]
        pieces.append(_sdpa(q, k, v, scale, dropout).flatten(0, 1))
    return torch.cat(pieces)


def _padded(
    packing: Packing, query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, firsts: bool
) -> Tensor:
    """One call with padding and a mask, for devices on which a call for each length would cost more to launch."""
    q = packing.restore_firsts(query) if firsts else packing.restore(query)
    k, v, mask = packing.restore(key), packing.restore(value), packing.keep[:, None, None, :]
    out = _sdpa(q, k, v, scale, dropout, mask)
    return out[packing.order, 0] if firsts else packing.pack(out)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, mask: Tensor | None = None
) -> Tensor:
    """Attention over ``[N, S, heads, D]``; the result has query's shape."""
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2)
