"""Several denoisers as one, each for its own noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atoll.diffusion.denoiser import Denoiser


class TimeRouter(nn.Module):
    """Asks, for each row, the expert of its noise level; used where a :class:`Denoiser` is.

    Must   one call  a row goes through one expert, and gradients reach no other

    Args:
        experts: of one schedule and one kind of condition, the noisiest first.
        ends: falling ratios sigma / alpha, one less than experts: the first serves what is above ``ends[0]``.
    """

    ends: Tensor

    def __init__(self, experts: Sequence[Denoiser], ends: Tensor) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.register_buffer("ends", torch.tensor(ends.tolist()))
        first = experts[0]
        self.schedule, self.classes, self.predicts = first.schedule, first.classes, first.predicts
        self.sigma_data = first.sigma_data

    @property
    def has_null(self) -> bool:
        first: Any = self.experts[0]
        return bool(first.has_null)

    def null(self, cond: Tensor) -> Tensor:
        first: Any = self.experts[0]
        out: Tensor = first.null(cond)
        return out

    def which(self, t: Tensor) -> Tensor:
        """The expert of each time ``[B]``. An end itself belongs to the next one, however times were rounded."""
        return (self.schedule.ratio(t)[:, None] < self.ends * (1 + 1e-3)).sum(1)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, **more: Any) -> Tensor:
        t = t.expand(len(x_t))
        which, out = self.which(t), torch.zeros_like(x_t)
        for i, expert in enumerate(self.experts):
            rows = (which == i).nonzero().flatten()
            if len(rows):
                some = {k: v[rows] if isinstance(v, Tensor) and v.dim() else v for k, v in more.items()}
                out = out.index_copy(0, rows, expert(x_t[rows], t[rows], cond[rows], **some))
        return out
