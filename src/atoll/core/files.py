"""Files that are either the old version or the new one, never half of each."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Bytes = bytes | bytearray | memoryview | mmap.mmap


def write_atomic(path: Path, *chunks: Bytes, durable: bool = True) -> None:
    """Write ``chunks`` to ``path`` through a temporary neighbour and a rename.

    Args:
        durable: also wait for the disk, so that the file survives a loss of power. Without it the file still
            survives a killed process.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            for chunk in chunks:
                f.write(chunk)
            if durable:
                f.flush()
                os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True).encode() + b"\n", durable=durable)


def read_json_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The complete lines of an append-only file; a last line that was cut off is ignored."""
    if not path.exists():
        return
    with open(path, "rb") as f:
        for line in f:
            if line.endswith(b"\n"):
                yield json.loads(line)


def user_cache() -> Path:
    """The user's folder for what can be made again: ``$XDG_CACHE_HOME/atoll``, else ``~/.cache/atoll``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "atoll"
