"""Principal components as a model: a row comes back as its projection onto a subspace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from atoll.core.errors import DataError
from atoll.data.dataset import Info
from atoll.models.model import ModelBuilder, refuse_tokens


class SubspaceNet(nn.Module):
    """``U`` ``[d, k]``; a row x ``[d]`` becomes U U^T x. With orthonormal columns this is the nearest point."""

    def __init__(self, d: int, k: int) -> None:
        super().__init__()
        self.U = nn.Parameter(orthonormal(torch.randn(d, k)))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ...] -> [B, d]``."""
        out: Tensor = (x.flatten(1) @ self.U) @ self.U.T
        return out


def orthonormal(u: Tensor) -> Tensor:
    """The Q of ``u = Q R`` with diag(R) > 0, which makes it unique: ``[d, k] -> [d, k]``.

    Columns that depend on others are replaced by some that do not.
    """
    q, r = torch.linalg.qr(u)
    out: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(u.dtype)
    return out


@dataclass(frozen=True)
class Subspace(ModelBuilder):
    """The projection onto a subspace, which starts at random. As few numbers as a model can have.

    Args:
        k: its dimension, below the numbers in a row.
    """

    k: Annotated[int, Ge(1)] = 2

    def build(self, info: Info, outputs: int) -> nn.Module:
        refuse_tokens(info, "subspace")
        d = math.prod(info.shape)
        if outputs != d:
            raise DataError(
                f"A subspace gives back the {d} numbers of a row, not {outputs} outputs; use it with "
                "`task: anomaly_detection`."
            )
        if self.k >= d:
            raise DataError(f"A subspace of dimension {self.k} holds every row of {d} numbers; give a smaller `k`.")
        return SubspaceNet(d, self.k)
