"""All networks of a method as one module: what sites train together, and what travels between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Distiller, Nets, Work
from atoll.models.model import seeded


class Distillation(nn.Module):
    """The networks of a distillation by role. Frozen ones, such as the teacher, are known by agreement and stay where
    they are; the others and their buffers are what is learned.

    No moving averages are kept here: they are linear in the weights, so that a server can keep that of all sites
    (``average_rounds``). What a method asks of its student's average it asks of the student.

    Args:
        method: what is done with them.
        teacher: the many-step model.
        work: shape and conditions; the seed of fresh weights.

    Raises:
        AtollError: for a method that cannot be done in parts.
    """

    def __init__(self, method: Distiller, teacher: Denoiser, work: Work) -> None:
        super().__init__()
        own = type(method).__name__
        rows: Any = getattr(method, "rows", None)
        if method.needs == "teacher samples" or getattr(rows, "made", None) is not None:
            raise AtollError(
                f"{own} learns from samples of the teacher, which a server can make: use `stage: distil`, which needs "
                "no site, or let its rows be images."
            )
        if type(method).begin is not Distiller.begin:
            raise AtollError(f"{own} changes its networks between phases, which sites cannot do each for itself.")
        if getattr(method, "target", None) == "average":
            raise AtollError(f"{own} follows a running average, and sites keep none; let `target` be `itself`.")
        teacher.eval().requires_grad_(False)
        with seeded(work.seed, "distil", "weights"):
            roles = method.roles(teacher, work)
        if any(getattr(m, "remembers", False) for role in roles.values() for m in role.module.modules()):
            raise AtollError(f"{own} remembers samples of its student, which would leave a site; drop what they teach.")
        if not any(role.lr for role in roles.values()):
            raise AtollError(f"{own} trains nothing; what is there already can be drawn from.")
        self.method, self.teacher = method, teacher
        self.roles = {name: replace(role, ema=None) for name, role in roles.items()}
        self.learned = nn.ModuleDict({n: r.module for n, r in roles.items() if r.module is not teacher})
        for role in roles.values():
            if role.lr is None:
                role.module.requires_grad_(False)

    @property
    def nets(self) -> Nets:
        """Networks by role, and what the method makes of them together."""
        own: Mapping[str, nn.Module] = {name: role.module for name, role in self.roles.items()}
        return {**own, **self.method.joined(own)}

    def forward(self, z: Tensor, cond: Tensor) -> Tensor:
        """Samples ``[B, ...]`` from unit noise, at the fewest calls that the method is made for."""
        return self.method.generate(self.nets, z, cond, min(self.method.few))
