"""Tables of configurations, and the choice of one for a shape. Pure Python: needs neither Triton nor a GPU.

An architecture's table, ``tables/sm_XX.json``, says how its entries came to be; an architecture without a table gets
``default_config``. ``tune`` keeps what it measures on a machine in the user's cache directory, one file per GPU, and
lookup prefers these entries to both. Lookup itself measures nothing.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

from .configs import Config, Entry, Measured, default_config, unlaunchable

Rows = list[dict[str, Any]]

PACKAGE = __name__.partition(".")[0]
TABLES = Path(__file__).parent / "tables"

# The version of tables on users' machines. Raise it when the format changes, or when kernels change so much that
# choices measured before no longer hold.
VERSION = 2

# Offsets inside a tile are 32-bit (rows of a tile times N), those of whole tensors 64-bit.
MAX_N = 2**23
MAX_M = 2**31 - 2**10

# An entry for one N and K serves M up to this factor above or below its own: the tile measured best at 32 rows says
# nothing about 8192.
REACH = 4

# From this K on only measured entries serve: the model gives a step of a 128x128 tile 886 clocks for 683 of matrix
# work, and past K = 1500 that costs more than the pass over the output that fusing saves. Not measured.
UNMEASURED_K = 2048

UNUSABLE = (OSError, ValueError, TypeError, KeyError)

logger = logging.getLogger(__name__)


def get_config(M: int, N: int, K: int, dtype: str, arch: int, *, aligned: bool, device: str = "") -> Config:
    """Return the configuration for ``[M, K] @ [N, K].T``. It depends on nothing but the arguments and the tables.

    aligned: whether every row of x, W and the output starts on a 16-byte boundary and is contiguous.
    device: the GPU's name, to look first in its table on this machine; if empty, only shipped tables count.
    """
    return choose(M, N, K, dtype, arch, aligned=aligned, device=device)[0]


def choose(
    M: int, N: int, K: int, dtype: str, arch: int, *, aligned: bool, device: str = ""
) -> tuple[Config, Entry | str]:
    """Return the configuration, and the table's entry that it is from or the reason in words.

    cuBLAS serves unaligned rows (their loads are narrow, and tiles would spill), IEEE fp32 (no tensor cores), and K = 0
    (no descriptor describes it, and the kernel does not expect it). Else the entry nearest in log M decides: one for
    this N and K if it is within a factor of ``REACH``, else one for any N and K. From ``UNMEASURED_K`` on an entry must
    have measured times; if there is none, cuBLAS serves.
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
    """Return groups of entries, each with its reach: this machine's, those shipped for N and K, those shipped for any.

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
    """Yield once each Triton configuration that ``get_config`` can return on an architecture from shipped tables."""
    entries = [entry.config for entry in load_table(arch)]
    dtypes = ("float16", "bfloat16", "tf32")
    defaults = [default_config(M, dtype, arch) for dtype in dtypes for M in (1, 4096)]
    for config in dict.fromkeys(entries or defaults):
        if config.kernel != "library":
            yield config


@functools.cache
def shipped_table(arch: int) -> dict[str, Any]:
    """Return the file shipped for a compute capability (90 for sm_90); if there is none, a table without entries."""
    path = TABLES / f"sm_{arch}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {"arch": arch, "source": "", "entries": []}


@functools.cache
def load_table(arch: int) -> tuple[Entry, ...]:
    """Return the entries shipped for a compute capability; empty if there are none."""
    return parse_rows(shipped_table(arch)["entries"])


@functools.cache
def load_user_table(arch: int, device: str) -> tuple[Entry, ...]:
    """Return the entries measured on this machine for the GPU of this name; empty for an empty name.

    A table that cannot be used is ignored with a warning.
    """
    path = table_path(arch, device) if device else None
    if path is None:
        return ()
    try:
        return _measured_entries(path, arch, device)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except UNUSABLE as error:
        logger.warning(
            "ignoring %s (%s: %s); `python -m %s tune` measures a new one", path, type(error).__name__, error, PACKAGE
        )
        return ()


def _measured_entries(path: Path, arch: int, device: str) -> tuple[Entry, ...]:
    """Return a file's entries. Raises one of ``UNUSABLE`` if the file is not a table of this GPU and version."""
    table = json.loads(path.read_text())
    if table["version"] != VERSION:
        raise ValueError(f"it was written by another version (table version {table['version']}, now {VERSION})")
    if (table["device"], table["arch"]) != (device, arch):
        measured_on = f"{table['device']}, sm_{table['arch']}"
        raise ValueError(f"it was measured on {measured_on}, and this is {device}, sm_{arch}")
    entries = parse_rows(table["entries"])
    for entry in entries:
        reason = unlaunchable(entry.config, arch)
        if entry.n is None or entry.measured is None or reason is not None:
            raise ValueError(f"{entry.config}: {reason or 'not measured'}")
    return entries


def folder() -> Path | None:
    """Return $BERT_FUSED_TABLES if set (None if it is "off"), else a folder in the user's cache directory.

    None also if the variable is not set and there is no home directory.
    """
    chosen = os.environ.get("BERT_FUSED_TABLES", "")
    if chosen:
        return None if chosen == "off" else Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # unset, or relative, which the XDG specification says to ignore
        cache = os.path.expanduser("~/.cache")
    return Path(cache, PACKAGE) if os.path.isabs(cache) else None


def table_path(arch: int, device: str) -> Path | None:
    """Return the path of a GPU's table, whether it exists or not; None if there is no folder for tables.

    device: the GPU's name, as CUDA gives it.
    """
    base = folder()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return base / f"sm_{arch}-{slug}.json" if base is not None else None


def remember(entries: Iterable[Entry], arch: int, device: str, source: str) -> Path:
    """Merge entries into this GPU's table on this machine: those of the same shape and dtype are replaced.

    Returns the table's path. Lookup in this process uses the entries from now on; plans made before keep their own.

    Raises:
        OSError: the file cannot be written.
    """
    path = table_path(arch, device)
    if path is None:
        raise OSError("there is no folder for tables: BERT_FUSED_TABLES is off, or there is no home directory")
    try:
        known = _measured_entries(path, arch, device)
    except UNUSABLE:
        known = ()
    merged = {(e.config.dtype, e.n, e.k, e.m): entry_row(e) for e in (*known, *entries)}
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"version": VERSION, "device": device, "arch": arch, "source": source}
    write(path, header, [row for _, row in sorted(merged.items(), key=itemgetter(0))])
    forget_tables()
    return path


def forget_tables() -> None:
    """Make the next lookup read the tables' files again."""
    for cached in (load_table, shipped_table, load_user_table, _entries_for):
        cached.cache_clear()


def write(path: Path, header: dict[str, Any], rows: Rows) -> None:
    """Write a table that people can read and compare, one line per row. Readers see all of the old file or of the new.

    Raises:
        OSError: the file cannot be written.
    """
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in header.items()]
    entries = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    text = "\n".join(["{", *lines, '  "entries": [', entries, "  ]", "}", ""])
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def parse_rows(rows: Iterable[dict[str, Any]]) -> tuple[Entry, ...]:
    """Return the entries in a table's rows. ``unlaunchable`` tells whether their configurations fit a chip.

    Raises:
        ValueError: a row is not an entry.
    """
    entries = []
    for row in rows:
        try:
            tile = dict(row)
            dtypes, m, n, k = tile.pop("dtypes"), tile.pop("m"), tile.pop("n", None), tile.pop("k", None)
            measured = tile.pop("measured", None)
            measured = Measured(**measured) if measured is not None else None
            if any(type(size) is not int or size < 1 for size in (m, *(s for s in (n, k) if s is not None))):
                raise ValueError("sizes must be positive integers")
            if (n is None) != (k is None):
                raise ValueError("n and k come together")
            entries += [Entry(m, n, k, Config(**tile, dtype=dtype), measured) for dtype in dtypes]
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"row {row}: {type(error).__name__}: {error}") from error
    return tuple(entries)


def entry_row(entry: Entry) -> dict[str, Any]:
    """Return the row that ``parse_rows`` reads as this entry."""
    given = {
        field.name: getattr(entry.config, field.name)
        for field in dataclasses.fields(Config)
        if field.name != "dtype" and getattr(entry.config, field.name) != field.default
    }
    shape = {name: size for name, size in (("m", entry.m), ("n", entry.n), ("k", entry.k)) if size is not None}
    measured = {"measured": dataclasses.asdict(entry.measured)} if entry.measured is not None else {}
    return {"dtypes": [entry.config.dtype], **shape, **given, **measured}
