"""Tables measured on this machine: one JSON file per GPU, in the user's cache directory.

This is about files; what their rows mean is the caller's. A table that cannot be used is ignored with one warning, and
no table at all is nothing to warn of.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

PACKAGE = __name__.partition(".")[0]

# Raise it when the format changes, or when kernels change so much that choices measured before no longer hold.
VERSION = 2

T = TypeVar("T")
Rows = list[dict[str, Any]]

logger = logging.getLogger(__name__)
_warned: dict[Path, object] = {}


def folder() -> Path | None:
    """$BERT_FUSED_TABLES if set, else a folder of the cache directory; None if that is "off" or there is no home."""
    chosen = os.environ.get("BERT_FUSED_TABLES", "")
    if chosen:
        return None if chosen == "off" else Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # the XDG specification: unset, or to be ignored
        cache = os.path.expanduser("~/.cache")
    return Path(cache, PACKAGE) if os.path.isabs(cache) else None


def table_path(arch: int, device: str) -> Path | None:
    """Where the table of a GPU lies or would lie. ``device`` is its name, as CUDA gives it."""
    base = folder()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return base / f"sm_{arch}-{slug}.json" if base is not None else None


def read(arch: int, device: str, parse: Callable[[Rows], T]) -> T | None:
    """The rows of this GPU's table through ``parse``; None if there is no table, or none that can be used.

    ``parse`` raises ValueError where it does not understand the rows.
    """
    path = table_path(arch, device)
    if path is None:
        return None
    try:
        return parse(_rows(path, arch, device))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        me = object()
        if _warned.setdefault(path, me) is me:  # one thread of several
            logger.warning(
                "ignoring %s: %s; `python -m %s tune` measures a new one",
                path,
                error.strerror if isinstance(error, OSError) else error,
                PACKAGE,
            )
        return None


def update(arch: int, device: str, source: str, change: Callable[[Rows], Rows]) -> Path:
    """Replace the rows of this GPU's table by ``change(rows)``; rows that cannot be used count as none.

    Processes take turns, and readers see the old file or the new one, never a part.

    Raises:
        OSError: the file cannot be written.
    """
    path = table_path(arch, device)
    if path is None:
        raise OSError("there is no folder for tables: BERT_FUSED_TABLES is off, or there is no home directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        try:
            rows = change(_rows(path, arch, device))
        except (OSError, ValueError):
            rows = change([])
        write(path, {"version": VERSION, "device": device, "arch": arch, "source": source}, rows)
    return path


def write(path: Path, header: dict[str, Any], rows: Rows) -> None:
    """A table in the form that people can read and compare: one line per row.

    Raises:
        OSError: the file cannot be written.
    """
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in header.items()]
    entries = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    text = "\n".join(["{", *lines, '  "entries": [', entries, "  ]", "}", ""])
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _rows(path: Path, arch: int, device: str) -> Rows:
    """Raises ValueError, in words for the user, where the file is not a table of this GPU and version."""
    try:
        table = json.loads(path.read_text())
        written = (table["version"], table["device"], table["arch"], table["entries"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error
    version, its_device, its_arch, rows = written
    if version != VERSION:
        raise ValueError(f"it was written by another version (table version {version}, now {VERSION})")
    if (its_device, its_arch) != (device, arch):
        raise ValueError(f"it was measured on {its_device}, sm_{its_arch}, and this is {device}, sm_{arch}")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is damaged (its entries are not a list of objects)")
    return rows


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file, which stays; without a lock where the system or the file system has none."""
    with path.open("w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
