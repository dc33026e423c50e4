"""AGD: guidance inside small adapters, so that a guided sample costs one call a step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from atoll.core.card import Card, Cite
from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Distiller, Draw, Needs, Nets, Role, Update, Work, best
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.guidance_adapters import AtScale, attach, make_adapters
from atoll.diffusion.pairs import TrajectoryStore
from atoll.diffusion.solvers import Sampler

CARD = Card(
    name="agd",
    area="guidance",
    summary="adapters of a few percent imitate classifier-free guidance, at any scale, for half the calls",
    cites=(
        Cite(
            authors="Perez Jensen, Sadat", year=2025, arxiv="2503.07274",
            title="Efficient Distillation of Classifier-Free Guidance using Adapters",
        ),
    ),
    suits=("generative models", "few calls a sample", "distilling without data", "pretrained models", "less traffic"),
)  # fmt: skip


@dataclass(frozen=True)
class AGD(Distiller):
    """Adapter guidance distillation (Perez Jensen and Sadat, 2025, arXiv 2503.07274).

    Guidance asks the network twice. Its effect is learned by adapters beside the attention blocks that know the scale
    w, the time and the condition, while the network itself stays as it is. They learn on the points that guided
    trajectories pass, not on noised data, since that is where they will be asked. Afterwards every solver gets a guided
    prediction of any scale within the trained range for one call.

    Departs: context (scale, time, condition) is embedded once for all blocks and by the adapters' own layers, so that
    any network can be adapted; networks without attention have their residual blocks adapted.

    Args:
        trajectories: how the guided trajectories are made, and from which scales.
        blocks: paths of the modules that get adapters; empty: attention blocks, else residual blocks.
        hidden: width of the adapters; the authors' is 256 to 320, for networks of 675 million numbers and more.
        scale: w in sampling.
        sampler: solver and grid; the number of steps follows from the calls.
        lr: of Adam.
    """

    trajectories: TrajectoryStore = field(default_factory=TrajectoryStore)
    blocks: tuple[str, ...] = ()
    hidden: Annotated[int, Ge(2)] = 32
    scale: float = 2.0
    sampler: Sampler = Sampler()
    lr: Annotated[float, Gt(0)] = 1e-4
    needs: ClassVar[Needs] = "teacher samples"
    few: ClassVar[tuple[int, ...]] = (9, 19)

    def __post_init__(self) -> None:
        low, high = self.trajectories.low, self.trajectories.high
        if not low <= self.scale <= high:
            raise AtollError(
                f"agd samples at the scale {self.scale}, and its adapters learn scales from {low} to {high}; widen "
                "`trajectories` or choose a scale between."
            )
        if self.hidden % 2:
            raise AtollError(f"agd needs an even number for `hidden`; got {self.hidden}.")

    def material(self, teacher: Denoiser, work: Work) -> dict[str, Tensor]:
        return self.trajectories.make(teacher, work)

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        base = copy.deepcopy(teacher).requires_grad_(False)
        student = attach(base, make_adapters(base, work, self.blocks, self.hidden))
        return {"student": Role(student, self.lr, betas=(0.9, 0.999))}

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        student: Denoiser = nets["student"]  # type: ignore[assignment]
        x_t, eps, t, cond, w = draw.stored("x_t", "eps", "t", "cond", "w")
        said = student.predict(x_t, t, cond, "eps", w=w)
        yield "student", {"guidance": (said - eps).square().mean()}

    def generate(
        self, nets: Nets, z: Tensor, cond: Tensor, calls: int, generator: torch.Generator | None = None
    ) -> Tensor:
        model: nn.Module = AtScale(best(nets), self.scale)
        return replace(self.sampler, guidance=Guidance()).within(calls)(model, z, cond)  # type: ignore[arg-type]
