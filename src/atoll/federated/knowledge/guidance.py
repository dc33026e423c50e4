"""Which parameters moved when sites trained alone: loss exploration (Interno et al., 2024, arXiv 2405.10271)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Scale = Literal["min_max", "mean"]
MOST = 5.0
"""Largest entry under ``"mean"``."""


def guidance(drift: Tensor, scale: Scale = "min_max") -> Tensor:
    """How much to move each parameter: its squared drift, rescaled within its tensor; same shape and type.

    ``"min_max"``: 0 for the least drift and 1 for the most. ``"mean"``: that over its mean, at most 5, so that a step
    is about as long as an unguided one. A tensor whose entries all drifted alike prefers none of them and gets ones.
    """
    if not drift.numel() or not bool((most := drift.max()) > (least := drift.min())):
        return drift.new_ones(drift.shape)
    g = (drift - least) / (most - least)
    return g if scale == "min_max" else (g / g.mean()).clamp(max=MOST)
