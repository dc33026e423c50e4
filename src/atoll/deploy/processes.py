"""Flower's programs as children of ours."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atoll.core.errors import one_line


def launch(command: Sequence[Any], log: Path, variables: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A Flower program with its words in a log file. It calls nobody home."""
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "PYTHONUNBUFFERED": "1", **(variables or {})}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out:
        return subprocess.Popen(
            [str(c) for c in command], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )  # fmt: skip


def end_process(process: subprocess.Popen[bytes], grace: float = 5.0) -> None:
    """Ask a process to end, and make it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tail(log: Path, size: int = 16_384) -> str:
    """The end of a log."""
    try:
        with open(log, "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - size))
            return re.sub(r"\x1b\[[0-9;]*m", "", f.read().decode(errors="replace"))  # colours
    except OSError:
        return ""


def last_lines(log: Path, count: int = 3) -> str:
    lines = tail(log).strip().splitlines()[-count:]
    return " / ".join(one_line(line, 200) for line in lines) or "it said nothing"
