"""Many experts as one denoiser: each has learned a part of the data alone, and a router says whose part a noisy sample
is from (decentralised diffusion models, McAllister et al., 2025, arXiv 2501.05450).

Of data in K parts, ``E[x0 | x_t, c] = sum_k p(k | x_t, c) E_k[x0 | x_t, c]`` for any parts whatever, and the same holds
for flows and scores, which are affine in it. So experts that never met make up the model that training on all rows
would give, as far as the router is right. Nothing here knows where parts are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.losses import hidden
from atoll.diffusion.readers import SampleReader
from atoll.diffusion.schedules import KarrasIndex, TimeLaw, add_noise, shaped
from atoll.diffusion.solvers import Sampler
from atoll.models.model import seeded

EVERYWHERE = KarrasIndex(most=1.0)
"""Noise levels that a router learns at: all through which sampling goes."""


class Router(nn.Module):
    """``(x_t, t, cond) -> logits [B, K]`` of the part that a noisy sample is from.

    Args:
        parts: K.
        like: a denoiser, for its schedule, its scale of data and its conditions.
        shape: of one sample.
        cond: some rows of conditions.
        width: of the network.
    """

    def __init__(self, parts: int, like: Denoiser, shape: tuple[int, ...], cond: Tensor, width: int = 16) -> None:
        super().__init__()
        self.schedule, self.sigma_data = like.schedule, like.sigma_data
        self.reader = SampleReader(shape, parts, cond, like.classes, width)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        t = t.expand(len(x_t))
        ratio = self.schedule.ratio(t)
        scale = self.schedule.alpha(t) * (ratio**2 + self.sigma_data**2).sqrt()  # so that inputs have unit variance
        out: Tensor = self.reader(x_t / shaped(scale, x_t), ratio.clamp(min=1e-6).log() / 4, cond)
        return out


class ExpertEnsemble(Denoiser):
    """Experts and their router, used as any other denoiser; guidance around it acts on what it mixes.

    Must   exact    with the true router it is the denoiser of all parts together
           one      with one expert it is that expert
           sparse   ``top_k`` experts see a sample, no more; with 1, sampling costs what one expert costs

    Args:
        experts: denoisers of one schedule and one kind of condition.
        router: :class:`Router`, or any module that returns logits ``[B, K]``.
        top_k: how many experts are asked, those that the router finds likeliest, their shares scaled to 1; None: all.
    """

    net: nn.ModuleList

    def __init__(self, experts: Sequence[Denoiser], router: nn.Module, top_k: int | None = 1) -> None:
        first = experts[0]
        if any(e.schedule != first.schedule or e.classes != first.classes for e in experts):
            raise AtollError("Experts are mixed at one noise level: all need the same schedule and the same classes.")
        if top_k is not None and not 1 <= top_k <= len(experts):
            raise AtollError(f"`top_k` is between 1 and the number of experts, {len(experts)}, not {top_k}.")
        super().__init__(
            nn.ModuleList(experts), first.schedule, "x0", classes=first.classes, sigma_data=first.sigma_data,
            null=first.null_embedding,
        )  # fmt: skip
        self.router, self.top_k = router, top_k

    @property
    def asked(self) -> int:
        """Experts that see a sample."""
        return self.top_k or len(self.net)

    def chosen(self, x_t: Tensor, t: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts are asked about each row, and what each of them counts for: both ``[B, asked]``; shares sum to
        1."""
        logits, which = self.router(x_t, t, cond).topk(self.asked, dim=1)
        return which, logits.softmax(1)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, **more: Any) -> Tensor:
        t = t.expand(len(x_t))
        which, share = self.chosen(x_t, t, cond)
        out = torch.zeros_like(x_t)
        for k, expert in enumerate(self.net):
            rows, place = (which == k).nonzero(as_tuple=True)
            if len(rows):
                some = {n: v[rows] if isinstance(v, Tensor) and v.dim() else v for n, v in more.items()}
                said = expert(x_t[rows], t[rows], cond[rows], **some)
                out = out.index_add(0, rows, (shaped(share[rows, place], said) * said).to(out.dtype))
        return out

    def _raw(self, x_t: Tensor, t: Tensor, cond: Tensor, more: dict[str, Any]) -> Tensor:
        out: Tensor = self(x_t, t, cond, **more)
        return out


def ensemble_of(
    experts: Sequence[Denoiser], shape: tuple[int, ...], top_k: int | None, width: int = 16, seed: int = 0
) -> ExpertEnsemble:
    """Experts that are told classes, with a fresh router for samples of a shape. ``top_k`` is at most their number."""
    classes = experts[0].classes
    if classes is None:
        raise AtollError("Experts are asked for classes, and these are told embeddings.")
    with seeded(seed, "router"):
        router = Router(len(experts), experts[0], shape, torch.arange(classes), width)
    router.to(next(experts[0].parameters()).device)
    return ExpertEnsemble(experts, router, None if top_k is None else min(top_k, len(experts)))


# ------------------------------------------------------------------------------------------- the router learns


def routing_loss(
    ensemble: ExpertEnsemble, x0: Tensor, cond: Tensor, part: Tensor, ratio: Tensor, eps: Tensor
) -> Tensor:
    """Cross-entropy per row ``[B]`` of the part that a row is from, seen with noise. Its minimum is the true p(k | x_t)
    of the law that rows are drawn by: each part in proportion to its size."""
    t = ensemble.schedule.time(ratio)
    return F.cross_entropy(ensemble.router(add_noise(ensemble.schedule, x0, eps, t), t, cond), part, reduction="none")


def made_by_experts(
    ensemble: ExpertEnsemble, conditions: Sequence[Tensor], shape: tuple[int, ...], sampler: Sampler,
    generator: torch.Generator, batch: int = 256,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What a router can learn from where no real row may be seen: samples of each expert by itself.

    Args:
        conditions: what each expert is asked for, e.g. classes as often as its part has them. An expert that is asked
            for what it has never seen makes something up, and the router learns to believe it.

    Returns:
        samples ``[N, *shape]``, conditions ``[N, ...]`` and parts ``[N]``, in the order of experts.
    """
    made = []
    for expert, asked in zip(ensemble.net, conditions, strict=True):
        for cond in asked.split(batch):
            z = torch.randn(len(cond), *shape, generator=generator, device=generator.device)
            made.append(sampler(expert, z, cond.to(z.device)))  # type: ignore[arg-type]
    part = torch.cat([torch.full((len(c),), k) for k, c in enumerate(conditions)])
    return torch.cat(made), torch.cat(list(conditions)).to(generator.device), part.to(generator.device)


def fit_router(
    ensemble: ExpertEnsemble, x0: Tensor, cond: Tensor, part: Tensor, sizes: Tensor, *, steps: int,
    generator: torch.Generator, batch: int = 128, lr: float = 1e-3, drop: float = 0.1, law: TimeLaw = EVERYWHERE,
) -> float:  # fmt: skip
    """Train the router in place on rows of known parts; experts stay as they are.

    Args:
        part: of each row.
        sizes: of the parts ``[K]``. Each counts by its size, however many rows there are of it here: otherwise small
            parts would be believed too often.
        steps, batch, lr: of Adam, whose step size falls along a half cosine.
        drop: fraction of the conditions that are hidden, so that guidance can ask without any.
        law: noise levels.

    Returns:
        the mean loss of the last tenth of the steps, in nats.
    """
    device = generator.device
    rows = part.bincount(minlength=len(sizes)).clamp(min=1)
    weight = sizes.to(device) / rows
    weight = (weight / (weight[part].mean()))[part].float()
    optimiser = torch.optim.Adam(ensemble.router.parameters(), lr=lr)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    losses = []
    for _ in range(steps):
        at = torch.randint(len(x0), (batch,), generator=generator, device=device)
        hide = torch.rand(batch, generator=generator, device=device) < drop
        eps = torch.randn(x0[at].shape, generator=generator, device=device)
        told = hidden(ensemble, cond[at], hide) if drop else cond[at]
        each = routing_loss(ensemble, x0[at], told, part[at], law.draw(batch, generator), eps)
        loss = (weight[at] * each).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        falling.step()
        losses.append(float(loss.detach()))
    last = losses[-max(1, steps // 10) :]
    return sum(last) / max(1, len(last))
