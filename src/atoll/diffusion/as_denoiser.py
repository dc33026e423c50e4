"""From a bare network to a denoiser: the schedule and the parametrisation that it is trained under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt
from torch import nn

from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.schedules import EDM, RF, LogitNormal, LogNormal, TimeLaw
from atoll.models.model import Wrapper

Kind = Literal["edm", "flow"]


@dataclass(frozen=True)
class AsDenoiser(Wrapper):
    """A network ``net(x, time, class)`` as a :class:`Denoiser`; one that is a denoiser already stays as it is.

    Args:
        kind: ``edm`` (preconditioned, variance exploding) or ``flow`` (rectified flow).
        sigma_data: standard deviation of the data.
    """

    kind: Kind = "edm"
    sigma_data: Annotated[float, Gt(0)] = 0.5

    def __call__(self, net: nn.Module, outputs: int) -> Denoiser:
        if isinstance(net, Denoiser):
            return net
        if self.kind == "edm":
            return Denoiser(net, EDM(), "edm", classes=outputs, sigma_data=self.sigma_data)
        return Denoiser(net, RF(), "flow", classes=outputs, sigma_data=self.sigma_data)


def usual_law(denoiser: Denoiser) -> TimeLaw:
    """The noise levels that a model of its kind is trained at."""
    return LogNormal() if denoiser.predicts == "edm" else LogitNormal()
