"""Which configuration serves which shape. Pure Python: needs neither Triton nor a GPU.

A configuration is data. Each architecture has a table ``tables/sm_XX.json`` that says how its entries came to be; an
architecture without one gets ``default_config``. What ``tune`` measured on this very GPU (user_tables.py) goes before
both. Lookup never measures anything.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from . import user_tables

T = TypeVar("T")

TABLES = Path(__file__).parent / "tables"

# Offsets inside a tile are 32-bit (rows of a tile times N), those of whole tensors 64-bit.
MAX_N = 2**23
MAX_M = 2**31 - 2**10

# Bytes of shared memory one block may use, by compute capability: CUDA C++ programming guide, technical specifications.
SHARED_MEMORY = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
TMA_ARCHS = (90, 100, 103)

# How far from its own M an entry for one N and K may serve, as a factor. A tile that was measured best at 32 rows says
# nothing about 8192.
REACH = 4

# From this K on only what was measured serves: a step of a 128x128 tile is modelled at 640 clocks for 512 of matrix
# work, and past K = 2000 that costs more than the pass over the output that fusing saves.
UNMEASURED_K = 2048


@dataclass(frozen=True)
class Config:
    """One way to compute ``act(x @ W.T + b)``.

    kernel: "pointer" and "tma" are one Triton launch that loads its tiles through pointers or through Hopper's tensor
    memory accelerator; "library" is cuBLAS (bias in its epilogue) and one activation pass.
    dtype: "float16", "bfloat16", "float32" (IEEE products) or "tf32" (fp32 tensors, TF32 products).
    The rest describes a Triton kernel's tile, in powers of two, and is left out for "library".
    persistent: blocks per SM, each of which computes tile after tile; 0 launches a block per tile.
    subtiles: column slices in which a persistent block stores its tile: smaller buffers, more blocks per SM.

    Raises ValueError for a combination that no kernel has.
    """

    kernel: str
    dtype: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 0
    num_stages: int = 0
    group_m: int = 8
    persistent: int = 0
    subtiles: int = 1

    def __post_init__(self) -> None:
        reason = impossible(self)
        if reason is not None:
            raise ValueError(f"{self}: {reason}")

    def __str__(self) -> str:
        if self.kernel == "library":
            return "cuBLAS + activation pass"
        parts = [
            f"{self.kernel} {self.block_m}x{self.block_n}x{self.block_k} {self.num_warps} warps "
            f"{self.num_stages} stages",
            f"groups of {self.group_m}" if self.group_m != 8 else "",
            f"persistent {self.persistent}/SM" if self.persistent else "",
            f"stored in {self.subtiles}" if self.subtiles != 1 else "",
        ]
        return " ".join(part for part in parts if part)


def impossible(config: Config) -> str | None:
    """Why no kernel has this combination, or None if one does. Whether it fits a chip is another question."""
    c = config
    if c.kernel not in ("pointer", "tma", "library") or c.dtype not in ("float16", "bfloat16", "float32", "tf32"):
        return "unknown kernel or dtype"
    if c.kernel == "library":
        return None if dataclasses.astuple(c)[2:] == _UNTILED else "cuBLAS chooses its own tiles"
    powers = (c.block_m, c.block_n, c.block_k, c.num_warps, c.subtiles)
    if min(powers) < 1 or any(size & (size - 1) for size in powers):
        return "blocks, warps and subtiles must be powers of two"
    if min(c.num_stages, c.group_m) < 1 or c.persistent < 0:
        return "stages and groups start at 1"
    if c.persistent and c.kernel != "tma":
        return "only the TMA kernel is persistent"
    if not c.persistent and c.subtiles > 1:
        return "only a persistent kernel has subtiles"
    if c.block_n // c.subtiles < 16:
        return "a subtile has at least 16 columns"
    return None


# The fields after kernel and dtype of a configuration that has no tile.
_UNTILED = (0, 0, 0, 0, 0, 8, 0, 1)


@dataclass(frozen=True)
class Measured:
    """Medians in microseconds of the chosen configuration and of what it had to beat, and when and with what."""

    us: float
    library_us: float
    eager_us: float
    date: str
    versions: str


@dataclass(frozen=True)
class Entry:
    """A configuration and the shape it was chosen for; ``n`` and ``k`` are None where any will do."""

    m: int
    n: int | None
    k: int | None
    config: Config
    measured: Measured | None = None


def parse_rows(rows: Iterable[dict[str, Any]]) -> tuple[Entry, ...]:
    """The entries in a table's rows.

    Raises:
        ValueError: a row is not one; whether a configuration fits a chip is ``unlaunchable``'s to say.
    """
    entries = []
    for row in rows:
        try:
            tile = dict(row)
            dtypes, m, n, k = tile.pop("dtypes"), tile.pop("m"), tile.pop("n", None), tile.pop("k", None)
            measured = tile.pop("measured", None)
            measured = _typed(Measured, measured) if measured is not None else None
            if any(type(size) is not int or size < 1 for size in (m, *(s for s in (n, k) if s is not None))):
                raise ValueError("sizes must be positive integers")
            if (n is None) != (k is None):
                raise ValueError("n and k come together")
            entries += [Entry(m, n, k, _typed(Config, tile | {"dtype": dtype}), measured) for dtype in dtypes]
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"row {row}: {type(error).__name__}: {error}") from error
    return tuple(entries)


def _typed(kind: type[T], values: dict[str, Any]) -> T:
    """An instance of a dataclass whose fields have exactly their declared types."""
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in values and type(values[field.name]) is not field.type:
            raise TypeError(f"{field.name} = {values[field.name]!r}")
    return kind(**values)


def entry_row(entry: Entry) -> dict[str, Any]:
    """The row that ``parse_rows`` reads as this entry."""
    given = {
        field.name: getattr(entry.config, field.name)
        for field in dataclasses.fields(Config)
        if field.name != "dtype" and getattr(entry.config, field.name) != field.default
    }
    shape = {name: size for name, size in (("m", entry.m), ("n", entry.n), ("k", entry.k)) if size is not None}
    measured = {"measured": dataclasses.asdict(entry.measured)} if entry.measured is not None else {}
    return {"dtypes": [entry.config.dtype], **shape, **given, **measured}


def unlaunchable(config: Config, arch: int) -> str | None:
    """Why an architecture cannot launch a configuration, or None: a quick check of one from a file."""
    if config.kernel == "library":
        return None
    if config.kernel == "tma" and arch not in TMA_ARCHS:
        return f"sm_{arch} has no tensor memory accelerator"
    blocks = (config.block_m, config.block_n, config.block_k)
    if min(blocks) < 16 or max(blocks) > 256 or max(config.num_warps, config.persistent) > 16:
        return "blocks are 16 to 256, warps and blocks per SM at most 16"
    # The pipeline of an sm_8x keeps num_stages - 1 tiles in flight, that of an sm_90 all.
    stages = config.num_stages - (arch < 90 or arch >= 120)
    operands = (config.block_m + config.block_n) * config.block_k * (2 if "16" in config.dtype else 4)
    return None if operands * stages <= SHARED_MEMORY.get(arch, 101376) else "more shared memory than a block may use"


@functools.cache
def shipped_table(arch: int) -> dict[str, Any]:
    """The file shipped for a compute capability (90 for sm_90), as it is; without entries if there is none."""
    path = TABLES / f"sm_{arch}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {"arch": arch, "source": "", "entries": []}


@functools.cache
def load_table(arch: int) -> tuple[Entry, ...]:
    """The entries shipped for a compute capability; empty if there are none."""
    return parse_rows(shipped_table(arch)["entries"])


@functools.cache
def load_user_table(arch: int, device: str) -> tuple[Entry, ...]:
    """What was measured on this machine for the GPU of this name; empty if nothing was, or for an empty name."""
    return (user_tables.read(arch, device, lambda rows: _parse_measured(rows, arch)) if device else None) or ()


def _parse_measured(rows: Iterable[dict[str, Any]], arch: int) -> tuple[Entry, ...]:
    try:
        entries = parse_rows(rows)
    except ValueError as error:
        raise ValueError(f"it is damaged ({error})") from error
    for entry in entries:
        reason = unlaunchable(entry.config, arch)
        if entry.n is None or entry.measured is None or reason is not None:
            raise ValueError(f"it is damaged ({entry.config}: {reason or 'not measured'})")
    return entries


def remember(entries: Iterable[Entry], arch: int, device: str, source: str) -> Path:
    """Merge entries into this GPU's table on this machine: those of the same shape and dtype are replaced.

    Lookup in this process sees them from now on. Returns the table's path.

    Raises:
        OSError: the file cannot be written.
    """

    def merged(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        by_shape = {
            (entry.config.dtype, entry.n, entry.k, entry.m): entry_row(entry)
            for entry in (*_parse_measured(rows, arch), *entries)
        }
        return [row for _, row in sorted(by_shape.items(), key=lambda item: item[0])]

    entries = tuple(entries)
    path = user_tables.update(arch, device, source, merged)
    forget_tables()
    return path


def forget_tables() -> None:
    """Read tables again when they are next asked for."""
    for cached in (load_table, shipped_table, load_user_table, _entries_for):
        cached.cache_clear()


def default_config(M: int, dtype: str, arch: int) -> Config:
    """The configuration for an architecture that has no table: tiles that fit everywhere, chosen by rows alone."""
    if arch == 0:  # the interpreter pays per block, and small tiles make small tests cross block borders
        return Config("pointer", dtype, 16, 32, 32, num_warps=4, num_stages=1, group_m=2)
    # 8 warps for the small tile too: with 4 it spills on sm_86. TF32 takes twice the registers, and spills on sm_120
    # where a tile has 128 rows.
    block_k = 32 if dtype == "tf32" else 64
    if M <= 256:
        return Config("pointer", dtype, 64, 64, block_k, num_warps=8, num_stages=3)
    return Config("pointer", dtype, 64 if dtype == "tf32" else 128, 128, block_k, num_warps=8, num_stages=3)


def get_config(M: int, N: int, K: int, dtype: str, arch: int, *, aligned: bool, device: str = "") -> Config:
    """The configuration for ``[M, K] @ [N, K].T``. A pure function of its arguments and the tables.

    aligned: whether every row of x, W and the output starts on a 16-byte boundary and is contiguous.
    device: the GPU's name, whose own table on this machine goes first; none if empty.
    """
    return choose(M, N, K, dtype, arch, aligned=aligned, device=device)[0]


def choose(
    M: int, N: int, K: int, dtype: str, arch: int, *, aligned: bool, device: str = ""
) -> tuple[Config, Entry | str]:
    """The configuration, and the table's entry it is from or the reason in words.

    cuBLAS serves where tiles would spill (unaligned rows, whose loads are narrow), where there are no tensor cores
    (IEEE fp32), and K = 0, which no descriptor describes and the kernel does not expect. Else the entry that is nearest
    in log M decides: one of this very N and K if it is within a factor of ``REACH``, else one for any N and K. From
    ``UNMEASURED_K`` on an entry needs measured times, and cuBLAS serves where there are none.
    """
    library = functools.partial(Config, "library", dtype)
    if N > MAX_N or M > MAX_M:
        return library(), "too large for 32-bit offsets"
    if K == 0:
        return library(), "K is 0"
    if arch != 0:
        if dtype == "float32":
            return library(), "IEEE fp32 has no tensor cores"
        if not aligned:
            return library(), "rows are not on 16-byte boundaries"
    unmeasured = arch != 0 and K >= UNMEASURED_K
    for entries, reach in _entries_for(N, K, dtype, arch, device, measured_only=unmeasured):
        distance, entry = min(((abs(math.log2(max(M, 1) / entry.m)), entry) for entry in entries), key=itemgetter(0))
        if distance <= math.log2(reach):
            return entry.config, entry
    if unmeasured:
        return library(), f"K is {UNMEASURED_K} or more, and nothing was measured near this shape"
    return default_config(M, dtype, arch), "no table for this architecture"


@functools.lru_cache(1024)
def _entries_for(
    N: int, K: int, dtype: str, arch: int, device: str, measured_only: bool
) -> tuple[tuple[tuple[Entry, ...], float], ...]:
    """Groups of entries with their reach, the best founded first: this machine's, shipped for N and K, shipped for any.

    Within a group the entries are in order of M.
    """
    shipped = load_table(arch)
    groups = []
    for table, n, k, reach in (
        (load_user_table(arch, device), N, K, REACH),
        (shipped, N, K, REACH),
        (shipped, None, None, math.inf),
    ):
        found = [e for e in table if (e.config.dtype, e.n, e.k) == (dtype, n, k) and (e.measured or not measured_only)]
        if found:
            groups.append((tuple(sorted(found, key=lambda entry: entry.m)), reach))
    return tuple(groups)


def shipped_configs(arch: int) -> Iterator[Config]:
    """Every Triton configuration that ``get_config`` can return on an architecture, each once."""
    entries = [entry.config for entry in load_table(arch)]
    dtypes = ("float16", "bfloat16", "tf32")
    defaults = [default_config(M, dtype, arch) for dtype in dtypes for M in (1, 4096)]
    for config in dict.fromkeys(entries or defaults):
        if config.kernel != "library":
            yield config
