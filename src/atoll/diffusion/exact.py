"""A teacher without error: the exact denoiser of a mixture of Gaussians.

With it a wrong sign or a missing ``detach`` shows at once; see the tests of every distillation loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.schedules import EDM, NoiseSchedule, shaped


class MixtureNet(nn.Module):
    """``E[x0 | x_t]`` of a mixture of round Gaussians, whose components belong to classes.

    Args:
        means: ``[K, D]``.
        std: of each component.
        labels: class of each component ``[K]``; the null class (one above the largest) has all of them.
    """

    means: Tensor
    labels: Tensor

    def __init__(self, means: Tensor, std: float, labels: Tensor, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("labels", labels)
        self.std, self.schedule = std, schedule

    def parts(self, x: Tensor, t: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Log density ``[B]`` of the noised mixture at ``x`` and log responsibilities ``[B, K]``."""
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        variance = (a * self.std) ** 2 + s**2
        square = (x[:, None] - shaped(a, self.means[None]) * self.means).square().sum(-1)
        allowed = (self.labels == cond[:, None]) | (cond[:, None] == int(self.labels.max()) + 1)
        weight = allowed.float() / allowed.float().sum(1, keepdim=True)
        dims = x.shape[1]
        logs = -0.5 * square / variance[:, None] - 0.5 * dims * (2 * math.pi * variance).log()[:, None] + weight.log()
        return logs.logsumexp(1), logs.log_softmax(1)

    def log_density(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """ln p_t(x) ``[B]``."""
        return self.parts(x, t, cond)[0]

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        _, logs = self.parts(x, t, cond)
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        gain = (a * self.std**2 / ((a * self.std) ** 2 + s**2))[:, None, None]
        posterior = self.means + gain * (x[:, None] - a[:, None, None] * self.means)
        out: Tensor = (logs.exp()[..., None] * posterior).sum(1)
        return out

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Exact samples ``[n, D]`` and their classes."""
        which = torch.randint(len(self.means), (n,), generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator)
        return self.means[which] + self.std * noise, self.labels[which]


def exact_mixture(
    means: Tensor, std: float, labels: Tensor | None = None, schedule: NoiseSchedule | None = None
) -> Denoiser:
    """The exact denoiser of a mixture. ``.net`` also draws samples and knows the density."""
    schedule = schedule or EDM()
    labels = torch.zeros(len(means), dtype=torch.int64) if labels is None else labels
    net = MixtureNet(means, std, labels, schedule)
    return Denoiser(net, schedule, "x0", classes=int(labels.max()) + 1)


def ring(modes: int = 8, classes: int = 4, radius: float = 2.0, std: float = 0.15) -> Denoiser:
    """Gaussians on a ring in the plane, neighbours sharing a class."""
    angle = 2 * math.pi * torch.arange(modes) / modes
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return exact_mixture(means, std, torch.arange(modes) * classes // modes)


class PlaneNet(nn.Module):
    """A small network for points: ``(x [B, D], time [B], class [B]) -> [B, D]``."""

    taps = ("body.4",)

    def __init__(self, dims: int = 2, classes: int = 4, width: int = 128, numbers: int = 0) -> None:
        super().__init__()
        from atoll.models.unet import TimeAndClass

        self.embed = TimeAndClass(width, classes, numbers)
        self.inward = nn.Linear(dims, width)
        self.body = nn.Sequential(
            nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dims)
        )

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, numbers: Tensor | None = None) -> Tensor:
        out: Tensor = self.body(self.inward(x) + self.embed(t, cond, numbers))
        return out
