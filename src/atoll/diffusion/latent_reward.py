"""A small network that learns what a reward would say, so that a generator can follow its gradient: the reward itself
may be a file size, a threshold, or somebody's answer.

It sees samples as the generator makes them (latents, where those are the generator's samples), and is told the true
scores of fresh ones again and again, as it would otherwise be led off what it knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Draw, Update, Work
from atoll.diffusion.readers import SampleReader
from atoll.diffusion.rewards import Reward, scores

MEMORY = 0.9
"""Of the running mean of rank correlations, which starts at 0: a perfect model is believed after 16 batches."""


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of two vectors ``[B]``; equal numbers share their mean rank. 0 where one is constant."""

    def centred(v: Tensor) -> Tensor:
        ranks = (v[:, None] > v).double().sum(1) + 0.5 * (v[:, None] == v).double().sum(1)
        return ranks - ranks.mean()

    x, y = centred(a), centred(b)
    size = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / size if size else 0.0


class LatentRewardNet(nn.Module):
    """``(x [B, ...], cond) -> [B]``: the score that it expects, in standard deviations of those that it has been told.

    All that it remembers is in buffers, and so in checkpoints: samples with their true scores, and how far it is to be
    believed.
    """

    remembers: ClassVar[bool] = True
    x: Tensor
    cond: Tensor
    score: Tensor
    seen: Tensor
    trust: Tensor
    ramp: Tensor

    def __init__(self, like: Denoiser, work: Work, keep: int, width: int) -> None:
        super().__init__()
        cond = work.conditions.rows
        self.reader = SampleReader(work.shape, 1, cond, like.classes, width)
        self.register_buffer("x", torch.zeros(keep, *work.shape))
        self.register_buffer("cond", torch.zeros(keep, *cond.shape[1:], dtype=cond.dtype))
        self.register_buffer("score", torch.zeros(keep))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("trust", torch.zeros(()))
        self.register_buffer("ramp", torch.zeros(()))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        out: Tensor = self.reader(x, torch.zeros(len(x), device=x.device), cond)[:, 0]
        return out

    def told(self, x: Tensor, cond: Tensor, score: Tensor) -> None:
        """New samples and their true scores. First it is tried on them: what it has not seen is what it is believed
        by. The oldest ones make room."""
        with torch.no_grad():
            self.trust.lerp_(torch.tensor(rank_correlation(self(x, cond), score)).to(self.trust), 1 - MEMORY)
            x, cond, score = x[: len(self.x)], cond[: len(self.x)], score[: len(self.x)]
            place = (self.seen + torch.arange(len(x), device=x.device)) % len(self.x)
            self.x[place], self.cond[place], self.score[place] = x, cond, score
            self.seen += len(x)

    def loss(self, draw: Draw) -> Tensor:
        """Mean squared error of the score, over a batch of what it remembers."""
        known = min(int(self.seen), len(self.x))
        scale = self.score[:known].std(correction=0).clamp(min=1e-6)
        rows = draw.integers(0, known)
        target = (self.score[rows] - self.score[:known].mean()) / scale
        loss: Tensor = (self(self.x[rows], self.cond[rows]) - target).square().mean()
        return loss


@dataclass(frozen=True)
class LatentReward:
    """A reward as a generator's second aim (Ding et al., 2024, arXiv 2412.15689).

    Args:
        reward: what is wanted.
        share: size of the reward's gradient at the samples, relative to that of the generator's own loss.
        trust: rank correlation with the true scores of samples that the model has not seen (a running mean), below
            which the reward does not count.
        ramp: fraction of the run over which ``share`` is reached, from the first step at which the model is trusted.
        keep: samples that it remembers.
        steps: of the model, each time it is told new scores.
        every: steps of the generator between one batch of true scores and the next.
        width: of the model.
        lr: of its Adam.
    """

    reward: Reward
    share: Annotated[float, Ge(0)] = 0.1
    trust: Annotated[float, Ge(0), Le(1)] = 0.8
    ramp: Annotated[float, Ge(0), Le(1)] = 0.1
    keep: Annotated[int, Ge(2)] = 4096
    steps: Annotated[int, Ge(1)] = 4
    every: Annotated[int, Ge(1)] = 1
    width: Annotated[int, Ge(4)] = 16
    lr: Annotated[float, Gt(0)] = 1e-3

    def net(self, like: Denoiser, work: Work) -> LatentRewardNet:
        return LatentRewardNet(like, work, self.keep, self.width)

    def learn(self, net: LatentRewardNet, x: Tensor, cond: Tensor, draw: Draw) -> Iterator[Update]:
        """Ask for the true scores of samples, and take some steps towards them."""
        net.told(x.detach(), cond, scores(self.reward, x, cond))
        if self.believed(net):
            net.ramp.add_(self.every / max(1.0, self.ramp * draw.steps)).clamp_(max=1)
        for _ in range(self.steps):
            yield "reward", {"regression": net.loss(draw)}

    def believed(self, net: LatentRewardNet) -> bool:
        return float(net.trust) > self.trust

    def generator_loss(self, net: LatentRewardNet, x: Tensor, cond: Tensor, main: Tensor) -> Tensor | None:
        """What the generator descends besides ``main``, a loss of its samples ``x``; None while it would not count. The
        gradient comes from the network alone."""
        if not (self.share and self.believed(net) and float(net.ramp)):
            return None
        expected = net(x, cond).mean()
        (theirs,) = torch.autograd.grad(main, x, retain_graph=True)
        (ours,) = torch.autograd.grad(expected, x, retain_graph=True)
        weight = self.share * net.ramp * theirs.norm() / ours.norm().clamp(min=1e-12)
        loss: Tensor = -weight.detach() * expected
        return loss
