"""How different two samples look to a small frozen network, layer by layer.

The networks of published methods were trained on millions of photographs. Here the judge stands in, the classifier that
also measures samples, or the same network with random weights, which needs no data. A method that was trained with the
judge's features is flattered by distances in them: look at a metric of other features too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import tapped
from atoll.diffusion.distiller import Work
from atoll.diffusion.evaluate import Judge, make_judge
from atoll.models.model import seeded


class Layers(nn.Module):
    """What some submodules of a network say, after a ReLU: ``x [B, ...]`` -> one ``[B, C, ...]`` a layer."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network.eval().requires_grad_(False), tuple(names)

    def forward(self, x: Tensor) -> list[Tensor]:
        with tapped(self.network, self.names) as found:
            self.network(x)
        return [F.relu(found[name]) for name in self.names]


class Perceptual(Protocol):
    """A frozen network that looks at samples."""

    package: ClassVar[str] = "atoll.diffusion.perceptual"
    needs_images: ClassVar[bool]

    def network(self, work: Work) -> nn.Module:
        """``x [B, ...]`` -> a list of features ``[B, C, ...]``."""
        ...


@dataclass(frozen=True)
class JudgeFeatures(Perceptual):
    """Both convolutions of the classifier that judges samples; it has seen the labels of real images."""

    needs_images: ClassVar[bool] = True

    def network(self, work: Work) -> nn.Module:
        if work.images is None:
            raise AtollError("The judge is trained on real images, and there are none; use `random_features`.")
        return Layers(make_judge(work.images), ("conv1", "conv2"))


@dataclass(frozen=True)
class RandomFeatures(Perceptual):
    """The same network as nobody has trained it: no data, and a weaker sense of what matters.

    Args:
        seed: of its weights.
    """

    seed: int = 0
    needs_images: ClassVar[bool] = False

    def network(self, work: Work) -> nn.Module:
        if len(work.shape) != 3:
            raise AtollError(f"`random_features` looks at images; these samples have the shape {tuple(work.shape)}.")
        with seeded(self.seed, "features"):
            return Layers(Judge(work.shape, 1), ("conv1", "conv2"))


def perceptual_distance(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Squared distance between features of unit length, averaged over places and summed over layers, per sample ``[B]``
    (Zhang et al., 2018, arXiv 1801.03924, without their learned weights). ``y`` gets no gradient."""
    out = x.new_zeros(len(x))
    for a, b in zip(network(x), network(y.detach()), strict=True):
        a, b = (f.float() * (f.float().square().sum(1, keepdim=True) + 1e-8).rsqrt() for f in (a, b))
        out = out + (a - b).square().sum(1).flatten(1).mean(1)
    return out
