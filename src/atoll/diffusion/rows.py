"""Where clean rows come from: real images, or samples that the teacher makes once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Draw, Needs, Work
from atoll.diffusion.pairs import TeacherPairStore


@dataclass(frozen=True)
class Rows:
    """Clean rows that a method noises.

    Args:
        made: samples that the teacher makes before training, so that no image is needed; None takes real images.
    """

    made: TeacherPairStore | None = None

    @property
    def needs(self) -> Needs:
        return "teacher samples" if self.made is not None else "images"

    def material(self, teacher: Denoiser, work: Work) -> dict[str, Tensor]:
        """The teacher's samples ``x`` and their conditions ``cond``; nothing where images are taken."""
        if self.made is None:
            return {}
        pairs = self.made.make(teacher, work)
        return {name: pairs[name] for name in ("x", "cond")}

    def draw(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """A batch ``(x, cond)``."""
        if self.made is None:
            return draw.real()
        x, cond = draw.stored("x", "cond")
        return x, cond
