"""Several networks of one kind beside each other, for a denoiser that is made of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import nn

from atoll.data.dataset import Info
from atoll.models.model import ModelBuilder
from atoll.models.unet import UNet


class ManyNets(nn.Module):
    """``nets``, and what is needed to build a router between them (``atoll.diffusion.experts``)."""

    def __init__(self, nets: list[nn.Module], shape: tuple[int, ...], top_k: int | None, width: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self.shape, self.top_k, self.width = shape, top_k, width


@dataclass(frozen=True)
class ExpertNets(ModelBuilder):
    """What builds a saved ensemble of experts again; a denoising task puts the router between them.

    Args:
        network: of each expert.
        experts: how many there are.
        top_k: how many of them see a sample; None: all.
        width: of the router.
    """

    network: ModelBuilder = UNet()
    experts: Annotated[int, Ge(1)] = 4
    top_k: Annotated[int, Ge(1)] | None = 1
    width: Annotated[int, Ge(4)] = 16
    denoises: ClassVar[bool | None] = True

    def build(self, info: Info, outputs: int) -> nn.Module:
        nets = [self.network.build(info, outputs) for _ in range(self.experts)]
        return ManyNets(nets, info.shape, self.top_k, self.width)

    @property
    def architecture(self) -> ModelBuilder:
        return ExpertNets(self.network.architecture, self.experts, self.top_k, self.width)
