"""A site's part of a consensus on a subspace: gradient steps on an augmented Lagrangian.

Nguyen et al., 2022, arXiv 2212.12121. Shapes: X ``[n, d]`` rows, U, Y, Z ``[d, k]``, T ``[k, k]``, S = X^T X / n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from atoll.core.errors import DataError, SiteFailed
from atoll.core.message import Message
from atoll.core.tree import Tree
from atoll.federated.method import LocalWork
from atoll.federated.visit import Cost, Result, Visit
from atoll.models.subspace import orthonormal


def residual_gradient(s: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """Of (1/n) ||X - X U U^T||_F^2 for any U, orthonormal or not. ``s(U)``: S U."""
    su = s(u)
    return -4 * su + 2 * su @ (u.T @ u) + 2 * u @ (u.T @ su)


def second_moments(visit: Visit, d: int) -> Callable[[Tensor], Tensor]:
    """U -> S U, the cheaper way. Raises :class:`DataError` unless rows have d numbers."""
    x = visit.data.train.ready(device=visit.device)["x"].flatten(1)
    if x.shape[1] != d:
        raise DataError(f"the model's matrix is for rows of {d} numbers, and those of the site have {x.shape[1]}")
    if len(x) > d:
        s = x.T @ x / len(x)
        return lambda u: s @ u
    return lambda u: x.T @ (x @ u) / len(x)


def excess(u: Tensor) -> Tensor:
    """max(0, U^T U - I), entry by entry: how far columns are too long, or lean towards each other."""
    return (u.T @ u - torch.eye(u.shape[1], dtype=u.dtype, device=u.device)).clamp(min=0)


def across(v: Tensor, u: Tensor) -> Tensor:
    """(I - U U^T) V: what of V moves the span of U."""
    return v - u @ (u.T @ v)


def aligned(u: Tensor, z: Tensor) -> Tensor:
    """U Q with the rotation Q that brings it closest to Z (Procrustes): the same subspace in Z's basis."""
    a, _, bt = torch.linalg.svd(u.T @ z)
    out: Tensor = u @ (a @ bt)
    return out


@dataclass(frozen=True)
class SubspaceADMM(LocalWork):
    """``steps`` gradient steps from Z on f(U) + <Y, U - Z> + rho/2 ||U - Z||^2, where f is the mean squared residual.

    The site keeps U and the multiplier Y: once Z has come that U went into, Y += rho (U - Z). When all sites take part,
    the multipliers' weighted sum stays zero, and sites agree on the subspace of all rows; a site that missed rounds
    takes the next Z that comes, and they agree but roughly. Features are those that models see, so tables are
    standardised by the rows of all sites.

    Args:
        variant: ``"fedpg"`` steps along the Grassmann manifold (the gradient without its part in the span of U, then
            a QR decomposition) and sends U in Z's basis; ``"fedpe"`` in plain space, where a multiplier T and a penalty
            of rho/2 hold U^T U below I.
        steps: in a visit, each with all rows of the site.
        lr: step size; below 1 / (2 l), for the largest eigenvalue l of S.
        rho: weight of the consensus.
    """

    variant: Literal["fedpg", "fedpe"] = "fedpg"
    steps: Annotated[int, Ge(1)] = 30
    lr: Annotated[float, Gt(0)] = 0.01
    rho: Annotated[float, Ge(0)] = 1.0
    produces: ClassVar[str] = "delta"

    def run(self, visit: Visit) -> Result:
        ((name, matrix),) = visit.trainable().items()
        z = matrix.detach().clone()
        kept: Tree = {n: t.clone() for n, t in visit.state.get("admm", {}).items()}
        y = kept["Y"] + self.rho * (kept["U"] - z) if kept else torch.zeros_like(z)
        if self.variant == "fedpg":
            y = across(y, z)
        t = kept["T"] if kept else z.new_zeros(z.shape[1], z.shape[1])
        u, n = z.clone(), len(visit.data.train)
        if n and not visit.dry:
            s = second_moments(visit, len(z))
            for _ in range(self.steps):
                u = self._step(s, u, y, z, t)
            if not bool(torch.isfinite(u).all()):
                raise SiteFailed(f"the subspace grew without bound; use an `lr` below {self.lr:g}")
            if self.variant == "fedpg":
                u = aligned(u, z)
            else:
                t = t + self.rho * excess(u)
        return Result(Message("delta", {"delta": {name: u - z}}), {"admm": {"U": u, "Y": y, "T": t}}, self.cost(n, z))

    def _step(self, s: Callable[[Tensor], Tensor], u: Tensor, y: Tensor, z: Tensor, t: Tensor) -> Tensor:
        g = residual_gradient(s, u) + y + self.rho * (u - z)
        if self.variant == "fedpg":
            return orthonormal(u - self.lr * across(g, u))
        over = excess(u)
        return u - self.lr * (g + 2 * u @ torch.where(over > 0, t + self.rho * over, 0.0))

    def cost(self, n: int, u: Tensor) -> Cost:
        """Of S, if it is formed, and all products with it; a forward pass for a row is 4 d k operations."""
        d, k = u.shape
        return Cost(forward=n * d / (2 * k) + self.steps * d / 2 if n > d else float(self.steps * n))
