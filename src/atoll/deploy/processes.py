"""Flower's programs as children of ours."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


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


def last_lines(log: Path, count: int = 3) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()[-count:]
    except OSError:
        return "it said nothing"
    return " / ".join(line.strip()[:200] for line in lines) or "it said nothing"
