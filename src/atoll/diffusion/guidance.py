"""Classifier-free guidance and its relatives, which are one line with different numbers.

``D_w = D_null + w (D_cond - D_null)``: w = 1 is the conditional prediction and w = 0 the unconditional one, each exact
and for one call; w > 1 is classifier-free guidance; w < 0 is the Anti-CFG of Zhou, Gu and Wang (2025, arXiv
2505.12674), whose Zero-CFG is w = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Gt
from torch import Tensor

from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.schedules import shaped


def both(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    """``(D_cond, D_null)``, from one batch of twice the rows; ``t``: ``[B]``."""
    twice = {k: torch.cat([v, v]) if isinstance(v, Tensor) and v.dim() else v for k, v in more.items()}
    said = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([cond, denoiser.null(cond)]), **twice)
    given, null = said.chunk(2)
    return given, null


@dataclass(frozen=True)
class Guidance:
    """How strongly a condition is followed.

    Args:
        scale: w above; 1 is no guidance.
        low, high: guide only where sigma / alpha lies between; None: no upper end (Kynkaanniemi et al., 2024, arXiv
            2404.07724).
    """

    scale: float = 1.0
    low: float = 0.0
    high: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        if self.high is not None and not self.low < self.high:
            raise AtollError(f"Guidance needs `low` below `high`; got {self.low} and {self.high}.")

    @property
    def calls(self) -> int:
        """Calls of the network (rows, not batches) per prediction."""
        everywhere = self.low == 0 and self.high is None
        return 1 if self.scale == 1.0 or (self.scale == 0.0 and everywhere) else 2

    def __call__(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Tensor, **more: Any) -> Tensor:
        """The guided clean sample; conditional and null rows go through the network in one batch."""
        if self.calls == 1:
            out: Tensor = denoiser(x_t, t, cond if self.scale == 1.0 else denoiser.null(cond), **more)
            return out
        t = t.expand(len(x_t))
        given, null = both(denoiser, x_t, t, cond, **more)
        ratio = denoiser.schedule.ratio(t)
        inside = ratio >= self.low
        inside = shaped(inside if self.high is None else inside & (ratio <= self.high), x_t)
        return torch.where(inside, null + self.scale * (given - null), given)
