"""What is wanted of a sample, as a number. Nothing is asked of the function but an answer: no gradient, no network."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol

import torch
from annotated_types import Gt
from torch import Tensor

from atoll.core.errors import AtollError
from atoll.data.source import Source
from atoll.data.sources.digits import Digits
from atoll.diffusion.distiller import Images
from atoll.diffusion.evaluate import Judge, make_judge


class Reward(Protocol):
    """Scores samples. Any callable of this form will do, e.g. one that asks people, or a site that answers with numbers
    alone.

    Must   alone  a score depends on its own sample and condition
    """

    package: ClassVar[str] = "atoll.diffusion.rewards"

    def __call__(self, x: Tensor, cond: Tensor) -> Tensor:
        """Samples ``[B, ...]`` and their conditions to scores ``[B]``, more being better."""
        ...


def scores(reward: Reward, x: Tensor, cond: Tensor) -> Tensor:
    """What a reward says, float32 and without a graph.

    Raises:
        AtollError: for anything but one finite number a sample.
    """
    with torch.no_grad():
        said = torch.as_tensor(reward(x.detach(), cond)).to(x.device, torch.float32)
    if said.shape != (len(x),) or not bool(torch.isfinite(said).all()):
        raise AtollError(
            f"A reward says one finite number for each sample; for {len(x)} samples it said "
            f"{'some that are not finite' if said.shape == (len(x),) else f'a tensor of shape {tuple(said.shape)}'}."
        )
    return said


@dataclass(frozen=True)
class InkFraction(Reward):
    """The share of a sample's numbers above a threshold, or how close it is to a wanted share: flat almost everywhere,
    so no gradient could be taken through it.

    Args:
        threshold: in the samples' own units.
        wanted: score minus the distance from this share; None: more is better.
    """

    threshold: float = 0.0
    wanted: float | None = None

    def __call__(self, x: Tensor, cond: Tensor) -> Tensor:
        share = (x > self.threshold).flatten(1).float().mean(1)
        return share if self.wanted is None else -(share - self.wanted).abs()


@dataclass(frozen=True)
class PngSize(Reward):
    """How well a sample compresses: minus the kilobytes of its numbers as a PNG image would hold them (bytes, each row
    as differences from the number to its left, deflated). Channels and frames lie below each other.

    Args:
        low, high: what becomes black and white; numbers outside are cut off.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise AtollError(f"`png_size` needs `low` below `high`; got {self.low} and {self.high}.")

    def __call__(self, x: Tensor, cond: Tensor) -> Tensor:
        grey = ((x - self.low) / (self.high - self.low) * 255).round().clamp(0, 255).to(torch.uint8)
        rows = grey.cpu().reshape(len(x), -1, x.shape[-1])
        step = rows.clone()
        step[..., 1:] -= rows[..., :-1]  # bytes wrap, as in the format
        kind = torch.ones_like(step[..., :1])  # each row begins with the number of its filter
        return torch.tensor([-len(zlib.compress(r.numpy().tobytes(), 9)) / 1000 for r in torch.cat([kind, step], -1)])


@dataclass(frozen=True)
class ClassConfidence(Reward):
    """How sure a classifier is that a sample shows the class that was asked for: the log of its probability. It is
    trained on real images once per machine, and is not the one that samples are judged with afterwards.

    Args:
        data: the images.
        sigma_data: standard deviation of the samples.
    """

    data: Source = field(default_factory=Digits)
    sigma_data: Annotated[float, Gt(0)] = 0.5

    def __call__(self, x: Tensor, cond: Tensor) -> Tensor:
        data: Any = self.data
        logits: Tensor = _classifier(data, self.sigma_data).to(x.device)(x)
        return logits.log_softmax(1).gather(1, cond[:, None])[:, 0]


@functools.cache
def _classifier(data: Any, sigma_data: float) -> Judge:
    return make_judge(Images(data.load().train, sigma_data), seed=1)
