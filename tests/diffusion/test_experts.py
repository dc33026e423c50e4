"""Experts that never met, and a router, against the model of all rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.exact import exact_mixture, ring
from atoll.diffusion.experts import ExpertEnsemble, Router, fit_router, made_by_experts, routing_loss
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.readers import SampleReader
from atoll.diffusion.schedules import EDM, RF, VP, NoiseSchedule, Trig
from atoll.diffusion.solvers import Sampler

SCHEDULES = (EDM(), RF(), VP(), Trig(0.5))


class Points(Denoiser):
    """E[x0 | x_t] of a finite set of points, in the numbers' own precision."""

    def __init__(self, points: Tensor, schedule: NoiseSchedule) -> None:
        super().__init__(nn.Identity(), schedule, "x0", classes=1)
        self.points = points

    def logs(self, x_t: Tensor, t: Tensor) -> Tensor:
        gap = x_t[:, None] - self.schedule.alpha(t)[:, None, None] * self.points
        return -gap.square().sum(-1) / (2 * self.schedule.sigma(t)[:, None] ** 2)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, **more: Any) -> Tensor:
        return self.logs(x_t, t).softmax(1) @ self.points


class Responsibility(nn.Module):
    """The true router: how likely each part is, its size counted."""

    def __init__(self, experts: list[Points]) -> None:
        super().__init__()
        self.parts = experts

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return torch.stack([e.logs(x_t, t).logsumexp(1) for e in self.parts], 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=4, max_size=12), st.integers(0, 2**20), st.floats(0.05, 0.95),
    st.sampled_from(SCHEDULES),
)  # fmt: skip
def test_any_parts_whatever_make_up_the_flow_of_the_whole(
    owner: list[int], seed: int, time: float, schedule: NoiseSchedule
) -> None:
    g = torch.Generator().manual_seed(seed)
    points = torch.randn(len(owner), 3, generator=g, dtype=torch.float64)
    parts = [points[torch.tensor(owner) == k] for k in sorted(set(owner))]
    experts = [Points(p, schedule) for p in parts]
    ensemble = ExpertEnsemble(experts, Responsibility(experts), top_k=None)
    t, x_t = torch.full((5,), time, dtype=torch.float64), torch.randn(5, 3, generator=g, dtype=torch.float64)
    cond = torch.zeros(5, dtype=torch.int64)
    # The marginal flow of the whole set, by hand: the mean, by responsibility, of the flows towards single points.
    a, s = schedule.alpha(t), schedule.sigma(t)
    flows, logs = [], []
    for p in points:
        eps = (x_t - a[:, None] * p) / s[:, None]
        flows.append(schedule.d_alpha(t)[:, None] * p + schedule.d_sigma(t)[:, None] * eps)
        logs.append(-0.5 * eps.square().sum(1))
    whole = (torch.stack(logs).softmax(0)[..., None] * torch.stack(flows)).sum(0)
    mixed = ensemble.predict(x_t, t, cond, "flow")
    assert mixed.dtype == torch.float64
    assert torch.allclose(mixed, whole, atol=1e-6, rtol=1e-6)


class Fixed(nn.Module):
    """A router with an opinion of its own."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.logits[: len(x_t)]


class Counted(Denoiser):
    """Says a constant, and notes the rows that it is asked about."""

    def __init__(self, says: float) -> None:
        super().__init__(nn.Identity(), EDM(), "x0", classes=4)
        self.says, self.rows = says, 0

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, **more: Any) -> Tensor:
        self.rows += len(x_t)
        return torch.full_like(x_t, self.says)


@pytest.mark.parametrize("top_k", [1, 2, 3, None])
def test_top_k_asks_k_experts_and_mixes_them_by_their_shares(top_k: int | None) -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    experts = [Counted(float(10**k)) for k in range(4)]
    ensemble = ExpertEnsemble(experts, Fixed(logits), top_k)
    out = ensemble(torch.zeros(50, 2), torch.ones(()), torch.zeros(50, dtype=torch.int64))
    k = top_k or 4
    assert sum(e.rows for e in experts) == 50 * k
    for row in range(50):
        best = sorted(range(4), key=lambda i: -float(logits[row, i]))[:k]
        weight = {i: 2.718281828 ** float(logits[row, i]) for i in best}
        expected = sum(w * 10**i for i, w in weight.items()) / sum(weight.values())
        assert out[row].tolist() == pytest.approx([expected] * 2, rel=1e-4)


def test_one_expert_is_that_expert_bit_for_bit(digit_teacher: Denoiser) -> None:
    router = Router(1, digit_teacher, (1, 8, 8), torch.arange(10))
    x, t, cond = torch.randn(12, 1, 8, 8), torch.rand(12) + 0.1, torch.arange(12) % 10
    for top_k in (1, None):
        ensemble = ExpertEnsemble([digit_teacher], router, top_k)
        assert torch.equal(ensemble(x, t, cond), digit_teacher(x, t, cond))
        sampler = Sampler(steps=3, guidance=Guidance(1.5))
        assert torch.equal(sampler(ensemble, x, cond), sampler(digit_teacher, x, cond))


def test_guidance_acts_on_the_mixture() -> None:
    """Guidance of the whole ring is that of its experts, mixed for the class and mixed for none."""
    whole = ring()
    means, labels = whole.net.means, whole.net.labels  # type: ignore[union-attr]
    odd = torch.arange(8) % 2
    experts = [exact_mixture(means[odd == k], 0.15, labels[odd == k]) for k in (0, 1)]  # type: ignore[index]

    class True_(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return torch.stack([e.net.log_density(x_t, t, cond) for e in experts], 1)  # type: ignore[operator]

    ensemble = ExpertEnsemble(experts, True_(), None)
    g = torch.Generator().manual_seed(0)
    x, t, cond = 2 * torch.randn(64, 2, generator=g), 0.3 + torch.rand(64, generator=g), torch.arange(64) % 4
    guided, guide = Guidance(2.5), Guidance(2.5)
    assert torch.allclose(guided(ensemble, x, t, cond), guide(whole, x, t, cond), atol=2e-4)


def test_experts_of_two_schedules_are_refused() -> None:
    with pytest.raises(AtollError, match="same schedule"):
        ExpertEnsemble([ring(), exact_mixture(torch.zeros(1, 2), 1.0, schedule=RF())], nn.Identity())
    with pytest.raises(AtollError, match="between 1 and the number of experts, 1, not 2"):
        ExpertEnsemble([ring()], nn.Identity(), 2)


def halves() -> tuple[ExpertEnsemble, list[Denoiser]]:
    """Two exact experts, each with one half of the ring (two classes), and a fresh router."""
    whole = ring()
    means, labels = whole.net.means, whole.net.labels  # type: ignore[union-attr]
    experts = []
    for k in (0, 1):
        mine = (labels >= 2) == bool(k)
        expert = exact_mixture(means[mine], 0.15, labels[mine])  # type: ignore[index]
        expert.net.labels = labels[mine] - 2 * k  # type: ignore[operator, union-attr, assignment, index]
        expert.classes = 2
        experts.append(expert)
    torch.manual_seed(0)
    return ExpertEnsemble(experts, Router(2, experts[0], (2,), torch.arange(2)), top_k=None), experts


def test_a_router_learns_from_samples_of_the_experts_alone_how_likely_each_part_is() -> None:
    ensemble, experts = halves()
    g = torch.Generator().manual_seed(3)
    asked = [torch.arange(600) % 2, torch.arange(600) % 2]
    x, cond, part = made_by_experts(ensemble, asked, (2,), Sampler(steps=12), g)
    assert x.shape == (1200, 2)
    assert part.tolist() == [0] * 600 + [1] * 600
    assert torch.equal(cond, torch.cat(asked))
    before = copy.deepcopy([e.state_dict() for e in experts])
    # The first part is three times as large, though there are as many samples of both.
    loss = fit_router(ensemble, x, cond, part, torch.tensor([3000, 1000]), steps=500, lr=3e-3, drop=0.25, generator=g)
    assert 0 < loss < 0.69
    for e, weights in zip(experts, before, strict=True):
        assert all(torch.equal(v, weights[n]) for n, v in e.state_dict().items())
    # At points of the mixed data, against Bayes.
    for ratio in (0.3, 1.0, 3.0):
        t = torch.full((800,), ratio)
        points = torch.cat([experts[0].net.draw(600, g)[0], experts[1].net.draw(200, g)[0]])  # type: ignore[operator]
        x_t = points + ratio * torch.randn(800, 2, generator=g)
        null = torch.full((800,), 2)
        dense = ensemble.router(x_t, t, null).softmax(1)[:, 1].detach()
        logs = torch.stack([e.net.log_density(x_t, t, null) for e in experts])  # type: ignore[operator]
        truth = (logs + torch.tensor([[0.75], [0.25]]).log()).softmax(0)[1]
        assert float((dense - truth).abs().mean()) < 0.06, ratio
    t = torch.full((800,), 40.0)
    share = (
        ensemble.router(40 * torch.randn(800, 2, generator=g), t, torch.arange(800) % 2)
        .softmax(1)[:, 1]
        .mean()
        .detach()
    )
    assert float(share) == pytest.approx(0.25, abs=0.07)  # where nothing can be seen, the parts' sizes decide


def test_the_routing_loss_is_cross_entropy_at_the_noised_row() -> None:
    ensemble, _ = halves()
    with torch.no_grad():
        ensemble.router.reader.out.bias.copy_(torch.tensor([1.0, -0.5]))  # type: ignore[union-attr]
    x, cond, ratio = torch.randn(6, 2), torch.arange(6) % 2, torch.linspace(0.1, 9, 6)
    part, eps = torch.tensor([0, 1, 0, 0, 1, 1]), torch.randn(6, 2)
    found = routing_loss(ensemble, x, cond, part, ratio, eps)
    z = 2.718281828**1.0 + 2.718281828**-0.5
    expected = [-torch.tensor((2.718281828**1.0, 2.718281828**-0.5)[k] / z).log().item() for k in part.tolist()]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(3,), (4, 5), (1, 8, 8), (3, 9, 7), (2, 4, 16, 16)])
@pytest.mark.parametrize("conditions", ["classes", "embeddings"])
def test_readers_take_samples_and_conditions_of_any_shape(shape: tuple[int, ...], conditions: str) -> None:
    torch.manual_seed(0)
    cond = torch.arange(3) if conditions == "classes" else torch.randn(3, 5, 7)
    reader = SampleReader(shape, 2, cond, 4 if conditions == "classes" else None)
    x = torch.randn(3, *shape)
    assert torch.equal(reader(x, torch.zeros(3), cond), torch.zeros(3, 2))
    with torch.no_grad():
        reader.out.weight.normal_()
    said = reader(x, torch.zeros(3), cond)
    assert not torch.allclose(said, reader(x, torch.zeros(3), cond.flip(0)))
    assert not torch.allclose(said, reader(x + 1, torch.zeros(3), cond))
    assert not torch.allclose(said, reader(x, torch.ones(3), cond))
