"""Numbers as people read them. Anything that is not a finite number becomes a word, never an exception."""

from __future__ import annotations

import math
from typing import Any

MISSING = "-"
SHARES = ("accuracy", "f1", "auc", "coverage", "false_alarms")
"""Metrics between 0 and 1 that read best as a percentage (also as the end of a longer name)."""


def number(value: Any) -> float:
    """A float from whatever a file held there; NaN when it is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _odd(value: float) -> str | None:
    if math.isnan(value):
        return MISSING
    return None if math.isfinite(value) else ("∞" if value > 0 else "-∞")


def plain(value: float, digits: int = 4) -> str:
    """``digits`` significant digits, thousands in groups, powers of ten for the very large and small."""
    if (word := _odd(value)) is not None:
        return word
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        text = f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
        return f"{float(text):,.0f}" if abs(value) >= 10**digits else text
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"


def count(value: float) -> str:
    return _odd(value) or f"{value:,.0f}"


def calls(n: int) -> str:
    return f"{count(n)} {'call' if n == 1 else 'calls'}"


def percent(value: float) -> str:
    return _odd(value) or f"{100 * value:.1f} %"


def is_share(metric: str) -> bool:
    return metric.endswith(SHARES)


def metric_text(metric: str, value: float) -> str:
    """A metric's value: a percentage where that is how people say it."""
    if is_share(metric):
        return percent(value)
    return f"{value:#.4g}" if 1e-3 <= abs(value) < 1e3 else plain(value)


def size(value: float) -> str:
    """Bytes in decimal units, e.g. ``1.53 MB``."""
    return _scaled(value, 1000, ("B", "kB", "MB", "GB", "TB", "PB"))


def flops(value: float) -> str:
    """Floating-point operations, e.g. ``31.2 GFLOP``."""
    return _scaled(value, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def _scaled(value: float, step: float, units: tuple[str, ...]) -> str:
    if (word := _odd(value)) is not None:
        return word
    for unit in units:
        if abs(value) < step * 0.9995 or unit == units[-1]:
            break
        value /= step
    return f"{value:.3g} {unit}" if abs(value) < 1000 else f"{value:,.0f} {unit}"


def duration(seconds: float) -> str:
    """Seconds as people say them: ``45 ms``, ``12.3 s``, ``4 min 05 s``, ``2 h 03 min``, ``3 d 04 h``."""
    if (word := _odd(seconds)) is not None:
        return word
    if seconds == 0:
        return "0 s"
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400:,} d {whole % 86400 // 3600:02d} h"


def some(n: int, thing: str) -> str:
    """``1 site``, ``12 sites``, ``3 replies``."""
    if n == 1:
        return f"1 {thing}"
    return f"{n:,} {thing[:-1] + 'ies' if thing.endswith('y') else thing + 's'}"
