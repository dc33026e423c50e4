"""Classifier-free guidance by its published name; the mathematics is in ``guidance.py``."""

from __future__ import annotations

from atoll.core.card import Card, Cite
from atoll.diffusion.guidance import Guidance

CARD = Card(
    name="cfg",
    area="guidance",
    summary="conditional and unconditional prediction of one network, extrapolated",
    cites=(Cite(authors="Ho, Salimans", year=2022, title="Classifier-Free Diffusion Guidance", arxiv="2207.12598"),),
    suits=("generative models",),
)


def cfg(scale: float = 2.0, low: float = 0.0, high: float | None = None) -> Guidance:
    """Classifier-free guidance (Ho and Salimans, 2022, arXiv 2207.12598).

    Args:
        scale: 1 is off; the papers' other convention is this minus 1.
        low, high: guide only where sigma / alpha lies between.
    """
    return Guidance(scale, low, high)
