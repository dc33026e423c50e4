"""TwinFlow against an RCGM written out row by row, exact networks, and DMD's direction."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.core.tree import named_tensors
from atoll.data.dataset import Dataset, Info
from atoll.diffusion.denoiser import Denoiser, viewed
from atoll.diffusion.distiller import Conditions, Draw, Images, Work
from atoll.diffusion.exact import PlaneNet, exact_mixture
from atoll.diffusion.fresh import redrawn
from atoll.diffusion.losses import DMDLoss, Probe, hidden
from atoll.diffusion.methods.twinflow import ADV, ANY, E2E, FLOW, MUL, TwinFlow, velocity
from atoll.diffusion.pairs import TeacherPairStore
from atoll.diffusion.rollouts import clean, few_step_ratios
from atoll.diffusion.rows import Rows
from atoll.diffusion.schedules import EDM, RF, UniformTime, as_times
from atoll.diffusion.solvers import ddim, start
from atoll.diffusion.trainer import Trainer

Worlds = Callable[..., Work]
Mode = Literal["any", "few", "multi"]


def draw_of(work: Work, seed: int = 0) -> Draw:
    return Draw(work, torch.Generator().manual_seed(seed), 0, 10)


def noised(net: nn.Module, std: float = 0.2, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(std * torch.randn(p.shape, generator=g))


def flow_net(seed: int = 0) -> Denoiser:
    """A network whose branch of numbers is heard."""
    torch.manual_seed(seed)
    net = PlaneNet(2, 4, width=32, numbers=2)
    noised(net, seed=seed)
    return Denoiser(net, RF(), "flow", classes=4)


def energy(a: Tensor, b: Tensor) -> float:
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


# ------------------------------------------------------------------------------------------- the base loss


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("enhance", [0.0, 0.6])
def test_without_negative_time_it_is_plain_rcgm(order: int, enhance: float, ring_work: Worlds) -> None:
    method = TwinFlow(twin=False, order=order, enhance=enhance, drop=0.3)
    work = ring_work(batch=24, images=True)
    student, ema = flow_net(0), flow_net(1)
    [(role, losses)] = list(method.updates({"student": student, "student_ema": ema}, draw_of(work)))
    assert role == "student"
    assert set(losses) == {"base", "clamped"}

    draw = draw_of(work)
    rows, cond = draw.real()
    cond = hidden(student, cond, draw.uniform() < 0.3)
    ratio = draw.ratios(method.law, 24)
    u, z = draw.uniform(), draw.noise()
    last, gap = 40 / 41, 0.01
    expected, hits, terms = 0.0, 0, []
    for i in range(24):
        t = min(float(ratio[i] / (1 + ratio[i])), last)
        t, r = [(last, 0.0), (t, max(0.0, t - gap * float(u[i]))), (t, t * float(u[i]))][i // 8]

        def ask(net: Denoiser, x: Tensor, t: float, r: float, label: Tensor) -> Tensor:
            out: Tensor = net.net(x[None], torch.tensor([t]), label[None], numbers=torch.tensor([[t, r]]))[0]
            return out

        x_t, v = (1 - t) * rows[i] + t * z[i], z[i] - rows[i]
        f = ask(student, x_t, t, r, cond[i])
        with torch.no_grad():
            if t - r < gap:
                if enhance:
                    v = v + enhance * (ask(ema, x_t, t, t, cond[i]) - ask(ema, x_t, t, t, torch.tensor(4)))
                residual = f - v
            else:
                if enhance:
                    v = v + enhance * (ask(ema, x_t, t, t, cond[i]) - ask(ema, x_t, t, t, torch.tensor(4)))
                y, total = x_t - gap * v, torch.zeros(2)
                width = (t - gap - r) / order
                for k in range(order):
                    at = t - gap - k * width
                    jump = width * ask(ema, y, at, at - width, cond[i])
                    y, total = y - jump, total + jump
                residual = (t - r) * f / gap - total / gap - v
            hits += int((residual.abs() > 1).sum())
            residual = residual.clamp(-1, 1)
            square = float(residual.square().mean())
            weight = (math.tan((1 - (t - r)) * math.pi / 2.5) + 1) / math.sqrt(square + 1e-6)
        expected += weight * square / 24
        terms.append(weight * 2 * (residual * f).mean() / 24)  # whose gradient is that of the loss
    assert float(losses["base"].detach()) == pytest.approx(expected, rel=1e-3)
    assert float(losses["clamped"]) == pytest.approx(hits / 48, abs=0.03)
    mine = list(student.parameters())
    ours = torch.autograd.grad(losses["base"], mine)
    theirs = torch.autograd.grad(torch.stack(terms).sum(), mine)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=2e-2, atol=2e-4 + 1e-3 * float(b.abs().max()))


class Point(nn.Module):
    """Exact for data at one point: every velocity, mean or not, points there."""

    def __init__(self, at: float = 0.7) -> None:
        super().__init__()
        self.at, self.unused = at, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, numbers: Tensor) -> Tensor:
        return torch.full_like(x, self.at) + self.unused


def test_exact_mean_velocities_leave_nothing_to_learn() -> None:
    data = Dataset(
        {"x": torch.full((50, 2), 0.7), "y": torch.zeros(50, dtype=torch.int64)},
        Info(name="one", shape=(2,), num_classes=1),
    )
    work = Work((2,), Conditions.classes(1), Images(data, sigma_data=1.0), batch=32)
    net = Denoiser(Point(), RF(), "x0", classes=1)
    method = TwinFlow(law=UniformTime(0.05, 1.0))
    [(_, losses)] = list(method.updates({"student": net, "student_ema": net}, draw_of(work)))
    assert float(losses["base"].detach()) < 1e-2  # rounding, a hundred times larger
    assert float(losses["clamped"]) == 0
    assert float(losses["twin"].detach()) < 1e-4
    assert float(losses["rectify"].detach()) == 0
    modes: tuple[Mode, ...] = ("any", "few", "multi")
    for mode in modes:
        for calls in (1, 2, 4):
            x = TwinFlow(sampler=mode).generate({"student": net}, torch.randn(5, 2), torch.zeros(5).long(), calls)
            assert torch.allclose(x, torch.tensor(0.7), atol=1e-3)

    wrong = Denoiser(Point(0.2), RF(), "x0", classes=1)
    [(_, losses)] = list(method.updates({"student": wrong, "student_ema": net}, draw_of(work)))
    assert float(losses["base"].detach()) > 0.1
    assert float(losses["twin"].detach()) < 1e-4  # its own samples are what it says


@settings(max_examples=20)
@given(st.integers(4, 40), st.integers(0, 100), st.booleans(), st.floats(0.001, 0.5))
def test_times_of_the_four_parts(n: int, seed: int, twin: bool, gap: float) -> None:
    method = TwinFlow(twin=twin, gap=gap)
    work = Work((2,), Conditions.classes(1), batch=n)
    part = torch.arange(n) * method.parts // n
    t, r = method.times(part, draw_of(work, seed))
    assert ((r >= 0) & (r <= t) & (t <= method.last)).all()
    assert (t[part == E2E] == method.last).all()
    assert (r[part == E2E] == 0).all()
    assert (t - r <= gap * 1.001)[part == MUL].all()
    assert torch.equal(t[part == ADV], r[part == ADV])
    sizes = part.bincount()
    assert int(sizes.max() - sizes.min()) <= 1
    assert len(sizes) == (4 if twin else 3)
    if (part == ANY).sum() > 5:
        assert float((t - r)[part == ANY].std()) > 0.01


# ------------------------------------------------------------------------------------------- the twin


def test_twins_that_agree_rectify_nothing(ring_work: Worlds) -> None:
    """A copy of a network without numbers hears no sign, so fake and real velocity are one."""
    torch.manual_seed(0)
    teacher = Denoiser(PlaneNet(2, 4), EDM(), classes=4)
    noised(teacher)
    work = ring_work(batch=16, images=True)
    work = Work(work.shape, work.conditions, work.images, batch=16)
    method = TwinFlow()
    student: Any = method.roles(teacher, work)["student"].module
    nets = {"student": student, "student_ema": copy.deepcopy(student)}
    x, cond = torch.randn(16, 2), torch.arange(16) % 4
    assert float(method.twins_apart(student, x, cond, draw_of(work)).abs().max()) == 0
    [(_, losses)] = list(method.updates(nets, draw_of(work)))
    assert float(losses["rectify"].detach()) == 0
    assert float(losses["twin"].detach()) > 0

    noised(student.net.branch)
    assert float(method.twins_apart(student, x, cond, draw_of(work)).abs().min()) > 0
    [(_, losses)] = list(method.updates(nets, draw_of(work)))
    assert float(losses["rectify"].detach()) > 0


class Twins(nn.Module):
    """Exact scores of two Gaussians, one at positive and one at negative time; the jump from noise is a parameter."""

    def __init__(self, real: Denoiser, fake: Denoiser, made: Tensor) -> None:
        super().__init__()
        self.real, self.fake, self.made = real, fake, nn.Parameter(made)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, numbers: Tensor) -> Tensor:
        jump = (numbers[:, 0] > 0.97) & (numbers[:, 1] == 0)
        own = self.made.repeat(-(-len(x) // len(self.made)), 1)[: len(x)]
        told = torch.where(numbers[:, :1] > 0, self.real(x, t, cond), self.fake(x, t, cond))
        return torch.where(jump[:, None], own, told)


def test_descent_moves_samples_as_dmd_does() -> None:
    """Data around 1, samples around -1: x moves along ``real - fake``, and the fake score is the negative time's."""
    g = torch.Generator().manual_seed(0)
    real = exact_mixture(torch.tensor([[1.0, 1.0]]), 0.5, schedule=RF())
    fake = exact_mixture(torch.tensor([[-1.0, -1.0]]), 0.5, schedule=RF())
    made = -1 + 0.5 * torch.randn(16, 2, generator=g)
    net: Any = Twins(real, fake, made)
    student: Any = Denoiser(net, RF(), "x0", classes=1)
    images = Images(
        Dataset({"x": torch.randn(64, 2), "y": torch.zeros(64).long()}, Info(name="g", shape=(2,), num_classes=1)), 1.0
    )
    work = Work((2,), Conditions.classes(1), images, batch=64)
    method = TwinFlow(law=UniformTime(0.3, 0.8))
    [(_, losses)] = list(method.updates({"student": student, "student_ema": student}, draw_of(work)))
    ours = -torch.autograd.grad(losses["rectify"], net.made)[0]

    x = made.clone().requires_grad_(True)
    t = torch.full((16,), 0.5)
    x_t = (0.5 * x + 0.5 * torch.randn(16, 2, generator=g)).detach()
    cond = torch.zeros(16).long()
    probe = Probe(x_t, t, t, real(x_t, t, cond), fake(x_t, t, cond))
    theirs = -torch.autograd.grad(DMDLoss()(clean(x, cond), probe), x)[0]
    assert (theirs > 0).all()
    assert (ours > 0).all()


def test_the_twin_learns_the_students_own_samples_and_rectifies_its_jump(ring_work: Worlds) -> None:
    """Row by row, from the paper's formulas."""
    method = TwinFlow(drop=0.3)
    work = ring_work(batch=24, images=True)
    student, ema = flow_net(0), flow_net(1)
    [(_, losses)] = list(method.updates({"student": student, "student_ema": ema}, draw_of(work)))
    assert set(losses) == {"base", "clamped", "twin", "rectify"}

    draw, last = draw_of(work), 40 / 41
    rows, cond = draw.real()
    cond = hidden(student, cond, draw.uniform() < 0.3)
    ratio = draw.ratios(method.law)
    draw.uniform()
    own, z = draw.noise(6), draw.noise()

    def ask(x: Tensor, t: float, r: float, label: Tensor) -> Tensor:
        numbers = torch.tensor([[t, r]])
        out: Tensor = student.net(x[None], torch.tensor([abs(t)]), label[None], numbers=numbers)[0]
        return out

    expected, terms = 0.0, []
    for i in range(18, 24):
        t = min(float(ratio[i] / (1 + ratio[i])), last)
        start = last * own[i - 18]
        fake = (start - last * ask(start, last, 0.0, cond[i])).detach()
        f = ask((1 - t) * fake + t * z[i], -t, -t, cond[i])
        wrong = (f - (z[i] - fake)).detach()
        weight = (math.tan(math.pi / 2.5) + 1) / math.sqrt(float(wrong.square().mean()) + 1e-6)
        expected += weight * float(wrong.square().mean()) / 24
        terms.append(weight * 2 * (wrong * f).mean() / 24)
    assert float(losses["twin"].detach()) == pytest.approx(expected, rel=1e-4)

    ratio, eps = draw.ratios(method.law, 6), draw.noise(6)
    expected = 0.0
    for i in range(6):
        x_t = (1 - last) * rows[i] + last * z[i]
        f = ask(x_t, last, 0.0, cond[i])
        t = min(float(ratio[i] / (1 + ratio[i])), last)
        again = (1 - t) * (x_t - last * f).detach() + t * eps[i]
        delta = (ask(again, -t, -t, cond[i]) - ask(again, t, t, cond[i])).detach().clamp(-1, 1)
        weight = 0.5 / math.sqrt(float(delta.square().mean()) + 1e-6)
        expected += weight * float(delta.square().mean()) / 24
        terms.append(weight * 2 * (delta * f).mean() / 24)
    assert float(losses["rectify"].detach()) == pytest.approx(expected, rel=1e-3)

    mine = list(student.parameters())
    ours = torch.autograd.grad(losses["twin"] + losses["rectify"], mine)
    theirs = torch.autograd.grad(torch.stack(terms).sum(), mine)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-4 + 1e-3 * float(b.abs().max()))


def test_there_is_no_second_network_that_learns(ring_teacher: Denoiser, ring_work: Worlds) -> None:
    trainer = Trainer(TwinFlow(), ring_teacher, ring_work(batch=8, images=True, numbers=2), 1)
    assert set(trainer.roles) == {"student"}
    assert [n for n, m in trainer.nets.items() if any(p.requires_grad for p in m.parameters())] == ["student"]


@pytest.mark.parametrize("enhance", [0.0, 0.5])
def test_every_step_costs_the_same(
    enhance: float, ring_teacher: Denoiser, ring_work: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 0
    plain = Denoiser.forward

    def counted(self: Denoiser, x_t: Tensor, *args: Any, **more: Any) -> Tensor:
        nonlocal rows
        rows += len(x_t)
        return plain(self, x_t, *args, **more)

    trainer = Trainer(TwinFlow(enhance=enhance), ring_teacher, ring_work(batch=32, images=True, numbers=2), 5)
    monkeypatch.setattr(Denoiser, "forward", counted)
    seen = []
    for _ in range(5):
        rows = 0
        trainer.once()
        seen.append(rows)
    # the batch; the twin's samples; two jumps of the average on three quarters; both twins on a quarter
    assert seen == [32 + 8 + 2 * 24 + 2 * 8 + (2 * 24 if enhance else 0)] * 5


def test_how_often_the_clamp_is_hit_is_told_and_not_descended(ring_work: Worlds) -> None:
    work = ring_work(batch=16, images=True)
    nets = {"student": flow_net(0), "student_ema": flow_net(1)}
    told = [next(TwinFlow(clamp=c).updates(nets, draw_of(work)))[1]["clamped"] for c in (1e-6, 1.0, 1e9)]
    assert float(told[0]) > 0.95
    assert 0 < float(told[1]) < float(told[0])
    assert float(told[2]) == 0
    assert not any(c.requires_grad for c in told)


# ------------------------------------------------------------------------------------------- ways to start and to sample


def test_it_starts_as_the_teacher_or_from_scratch(ring_work: Worlds) -> None:
    torch.manual_seed(0)
    teacher = Denoiser(PlaneNet(2, 4), EDM(), classes=4, sigma_data=1.4)
    noised(teacher)
    real = ring_work(images=True)
    work = Work((2,), Conditions.classes(4), real.images, batch=8)
    z, cond = torch.randn(6, 2), torch.arange(6) % 4
    copied = Trainer(TwinFlow(), copy.deepcopy(teacher), work, 1)
    times = as_times(FLOW, few_step_ratios(4, 40.0), z)
    flow = viewed(teacher, FLOW)
    with torch.no_grad():
        x = start(FLOW, z, times[0])
        euler = ddim(FLOW, lambda x, t: flow(x, t, cond), x, times)
    assert torch.allclose(TwinFlow(sampler="multi").generate(copied.nets, z, cond, 4), euler, atol=1e-4)
    assert not torch.allclose(TwinFlow(sampler="few").generate(copied.nets, z, cond, 4), euler, atol=1e-2)

    fresh = Trainer(TwinFlow(scratch=True), copy.deepcopy(teacher), work, 1)
    again = Trainer(TwinFlow(scratch=True), copy.deepcopy(teacher), work, 1)
    before, after = named_tensors(teacher.net), named_tensors(fresh.nets["student"].net.net)  # type: ignore[union-attr,arg-type]
    for name, value in before.items():
        assert name == "embed.frequencies" or not torch.equal(value, after[name])
    for name, value in named_tensors(again.nets["student"]).items():
        assert torch.equal(value, named_tensors(fresh.nets["student"])[name])


def test_ways_to_sample_agree_at_one_call_and_differ_later(ring_work: Worlds) -> None:
    nets = {"student": flow_net()}
    z, cond = torch.randn(6, 2), torch.arange(6) % 4

    def made(mode: Mode, calls: int, seed: int = 0) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return TwinFlow(sampler=mode).generate(nets, z, cond, calls, g)

    assert torch.equal(made("any", 1), made("few", 1))
    assert torch.allclose(made("any", 1), TwinFlow().one_step(nets["student"], z, cond), atol=1e-6)
    assert not torch.allclose(made("any", 1), made("multi", 1))
    assert torch.equal(made("any", 4, 0), made("any", 4, 1))
    assert not torch.allclose(made("few", 4, 0), made("few", 4, 1))

    net, (first, second) = nets["student"], as_times(FLOW, few_step_ratios(2, 40.0), z)[:2]
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        t, zero = first.expand(6), torch.zeros(6)
        guess = first * z - first * velocity(net, first * z, t, zero, cond)
        again = (1 - second) * guess + second * eps
        by_hand = again - second * velocity(net, again, second.expand(6), zero, cond)
    assert torch.allclose(made("few", 2), by_hand, atol=1e-5)


def test_without_images_it_learns_from_the_teachers_samples(ring_teacher: Denoiser, ring_work: Worlds) -> None:
    method = TwinFlow(rows=Rows(TeacherPairStore(count=64, batch=64)))
    assert method.needs == "teacher samples"
    assert TwinFlow().needs == "images"
    trainer = Trainer(method, ring_teacher, ring_work(batch=16, numbers=2), 3)
    trainer.go()
    assert set(trainer.material) == {"x", "cond"}
    assert torch.isfinite(method.generate(trainer.nets, torch.randn(4, 2), torch.arange(4), 1)).all()


def test_it_learns_the_ring_from_scratch(ring_teacher: Denoiser, ring_work: Worlds) -> None:
    method = TwinFlow(lr=4e-3)
    trainer = Trainer(method, ring_teacher, ring_work(batch=64, images=True, numbers=2), 150)
    net: Any = ring_teacher.net
    real, _ = net.draw(1000, torch.Generator().manual_seed(5))
    z, cond = torch.randn(1000, 2, generator=torch.Generator().manual_seed(6)), torch.arange(1000) % 4
    before = energy(method.generate(trainer.nets, z, cond, 1), real)
    trainer.go()
    for calls in (1, 2, 4):
        x = method.generate(trainer.nets, z, cond, calls)
        assert energy(x, real) < 0.25 * before
        agreement = (net.labels[torch.cdist(x, net.means).argmin(1)] == cond).float().mean()
        assert float(agreement) > 0.5  # a quarter by chance


def test_halved_precision_does_not_reach_the_small_step(ring_work: Worlds) -> None:
    net = flow_net()
    x, t, cond = torch.randn(8, 2), torch.rand(8), torch.arange(8) % 4
    plain = velocity(net, x, t, t, cond)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(velocity(net, x, t, t, cond), plain)


def test_it_says_what_is_wrong(ring_teacher: Denoiser, ring_work: Worlds) -> None:
    with pytest.raises(AtollError, match="divides every batch into 4 parts; a batch of 3 is too small"):
        Trainer(TwinFlow(), ring_teacher, ring_work(batch=3, images=True), 1)
    Trainer(TwinFlow(twin=False), ring_teacher, ring_work(batch=3, images=True), 1)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.own = nn.Linear(2, 2), nn.Parameter(torch.ones(2))

    with pytest.raises(AtollError, match="The weights `own` cannot be drawn anew"):
        redrawn(Odd())
