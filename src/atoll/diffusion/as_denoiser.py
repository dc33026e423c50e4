"""From a bare network to a denoiser: the schedule and the parametrisation that it is trained under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt
from torch import nn

from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.diffusers_model import denoiser_of
from atoll.diffusion.discrete_vp import DiscreteVP, UniformSteps
from atoll.diffusion.experts import ensemble_of
from atoll.diffusion.schedules import EDM, RF, LogitNormal, LogNormal, TimeLaw
from atoll.models.diffusers_net import DiffusersNet
from atoll.models.expert_nets import ManyNets
from atoll.models.model import Wrapper

Kind = Literal["edm", "flow"]


@dataclass(frozen=True)
class AsDenoiser(Wrapper):
    """A network ``net(x, time, class)`` as a :class:`Denoiser`. One that is a denoiser already stays as it is, and one
    of diffusers is seen under the schedule that it was trained with.

    Args:
        kind: ``edm`` (preconditioned, variance exploding) or ``flow`` (rectified flow).
        sigma_data: standard deviation of the data.
    """

    kind: Kind = "edm"
    sigma_data: Annotated[float, Gt(0)] = 0.5

    def __call__(self, net: nn.Module, outputs: int) -> Denoiser:
        if isinstance(net, Denoiser):
            return net
        if isinstance(net, ManyNets):
            return ensemble_of([self(each, outputs) for each in net.nets], net.shape, net.top_k, net.width)
        if isinstance(net, DiffusersNet):
            return denoiser_of(net, self.sigma_data)
        if self.kind == "edm":
            return Denoiser(net, EDM(), "edm", classes=outputs, sigma_data=self.sigma_data)
        return Denoiser(net, RF(), "flow", classes=outputs, sigma_data=self.sigma_data)


def usual_law(denoiser: Denoiser) -> TimeLaw:
    """The noise levels that a model of its kind is trained at."""
    if isinstance(denoiser.schedule, DiscreteVP):
        return UniformSteps(denoiser.schedule)
    return LogNormal() if denoiser.predicts == "edm" else LogitNormal()
