from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.core.tree import clone, equal, named_tensors
from atoll.diffusion.denoiser import Denoiser, viewed
from atoll.diffusion.distiller import Conditions, Draw, Work
from atoll.diffusion.exact import exact_mixture, ring
from atoll.diffusion.gan_heads import Adversary
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.methods.sana_sprint import LogVariance, SanaSprint, consistency_gradient
from atoll.diffusion.pairs import TeacherPairStore
from atoll.diffusion.rows import Rows
from atoll.diffusion.schedules import EDM, RF, VP, NoiseSchedule, Trig, convert
from atoll.diffusion.solvers import Sampler
from atoll.diffusion.trainer import Trainer

SCM = SanaSprint(adversary=None)
angles = st.lists(st.floats(0.01, 1.54), min_size=4, max_size=4).map(torch.tensor)


class Wild(nn.Module):
    """A network that says anything smooth, with embeddings as conditions."""

    def __init__(self, size: int = 3, seed: int = 3) -> None:
        super().__init__()
        self.dense = nn.Linear(2 * size + 1, size)
        nn.init.normal_(self.dense.weight, generator=torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        out: Tensor = self.dense(torch.cat([x, cond, t[:, None]], 1)).sin()
        return out


def some(seed: int, rows: int = 4, size: int = 3) -> tuple[Tensor, Tensor]:
    x, cond = torch.randn(2, rows, size, generator=torch.Generator().manual_seed(seed))
    return x, cond


def draw_of(work: Work, step: int = 0, steps: int = 10, seed: int = 0) -> Draw:
    return Draw(work, torch.Generator().manual_seed(seed), step, steps)


# ------------------------------------------------------------------------------------------- the view


@settings(max_examples=40, deadline=None)
@given(angles, st.integers(0, 99))
def test_a_flow_model_is_a_trigflow_model_by_the_papers_formula(t: Tensor, seed: int) -> None:
    """F(x, t) = ((1 - 2 t') x' + (1 - 2 t' + 2 t'^2) v(x', t')) / n with t' = sin t / (sin t + cos t)."""
    net = Wild()
    x, cond = some(seed)
    trig = Trig(1.0)
    found = convert(trig, viewed(Denoiser(net, RF(), "flow"), trig)(x, t, cond), "x0", "flow", x, t)  # sd F, sd = 1
    u = t.sin() / (t.sin() + t.cos())
    n = (u**2 + (1 - u) ** 2).sqrt()[:, None]
    v, u = net(x * n, u, cond), u[:, None]
    assert torch.allclose(found, ((1 - 2 * u) * x * n + (1 - 2 * u + 2 * u**2) * v) / n, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(angles, st.sampled_from([0.5, 1.4]), st.integers(0, 99))
def test_a_preconditioned_model_says_just_the_negative_of_its_network(t: Tensor, sd: float, seed: int) -> None:
    net, (x, cond), trig = Wild(), some(seed), Trig(sd)
    found = convert(
        trig, viewed(Denoiser(net, EDM(), "edm", sigma_data=sd), trig)(x, t, cond), "x0", "flow", x, t
    )  # fmt: skip
    assert torch.allclose(found, -sd * net(x / sd, (sd * t.tan()).log() / 4, cond), atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([EDM(), RF(), VP()]), st.sampled_from(["edm", "eps", "v", "flow"]), st.integers(0, 99))
def test_there_and_back_is_the_same_and_at_zero_nothing_changes(schedule: NoiseSchedule, kind: Any, seed: int) -> None:
    denoiser, (x, cond), trig = Denoiser(Wild(), schedule, kind), some(seed), Trig()
    ratio = torch.tensor([0.05, 0.3, 1.0, 4.0])
    back = viewed(viewed(denoiser, trig), schedule)
    t = schedule.time(ratio)
    assert torch.allclose(back(x, t, cond), denoiser(x, t, cond), atol=1e-5, rtol=1e-4)
    if schedule != VP():  # whose slopes are infinite there
        assert torch.allclose(viewed(denoiser, trig)(x, torch.zeros(4), cond), x, atol=1e-6)


# ------------------------------------------------------------------------------------------- sCM


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 1.4), st.integers(0, 99))
def test_its_gradient_is_the_derivative_along_the_flow(at: float, seed: int) -> None:
    """g = cos t df/dt, by differences in float64, for a student that says anything; without r it only asks for the
    teacher's slope."""
    weight = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x, slope = (v[:1].double() for v in some(seed))
    t = torch.tensor([at], dtype=torch.float64)

    def said(x: Tensor, t: Tensor) -> Tensor:
        return (torch.cat([x, t[:, None]], 1) @ weight.T).sin()

    def f(h: float) -> Tensor:
        x_h, t_h = x + h * slope, t + h
        return t_h.cos()[:, None] * x_h - t_h.sin()[:, None] * said(x_h, t_h)

    h, both = 1e-5, (t.cos() * t.sin())[:, None]
    along = both * (said(x + h * slope, t + h) - said(x - h * slope, t - h)) / (2 * h)
    g = consistency_gradient(said(x, t), slope, x, t, along, 1.0)
    assert torch.allclose(g, t.cos()[:, None] * (f(h) - f(-h)) / (2 * h), atol=1e-7)
    start = consistency_gradient(said(x, t), slope, x, t, along, 0.0)
    assert torch.allclose(start, (t.cos() ** 2)[:, None] * (slope - said(x, t)))


class GaussianEnd(nn.Module):
    """The exact consistency function of N(m, std^2): where a point's trajectory ends."""

    def __init__(self, m: Tensor, std: float, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.m, self.std, self.schedule = m, std, schedule

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        a, s = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        out: Tensor = self.m + self.std * (x - a * self.m) / ((a * self.std) ** 2 + s**2).sqrt()
        return out


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("schedule", [EDM(), RF()], ids=repr)
def test_an_exact_consistency_function_has_no_gradient(schedule: NoiseSchedule, exact: bool) -> None:
    m = torch.tensor([0.4, -0.3])
    teacher = exact_mixture(m[None], 0.5, schedule=schedule)
    student = Denoiser(GaussianEnd(m, 0.5, schedule), schedule, "x0")
    work = Work((2,), Conditions.classes(1), batch=64)
    rows = teacher.net.draw(500, torch.Generator().manual_seed(0))[0]  # type: ignore[operator]
    material = {"x": rows, "cond": torch.zeros(500, dtype=torch.int64)}
    method = replace(SCM, rows=Rows(TeacherPairStore(500)), exact=exact)

    def loss(student: Denoiser, step: int) -> float:
        draw = Draw(work, torch.Generator().manual_seed(0), step, 10, material)
        nets = {"teacher": teacher, "student": student, "variance": LogVariance()}
        _, losses = next(method.updates(nets, draw))
        return float(losses["consistency"].detach())

    assert loss(student, 9) < 2e-3 * loss(teacher, 9)
    assert loss(student, 0) > 100 * loss(student, 9), "before the derivative comes in, the slope is asked for"
    assert loss(teacher, 0) < 1e-6, "which the teacher itself has"


class Shifted(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.shift = net, nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        out: Tensor = self.net(x, t, cond) - self.shift  # of a preconditioned network: F moves by +shift
        return out


def test_the_step_is_the_normalised_tangent_with_the_papers_weight(ring_work: Callable[..., Work]) -> None:
    work, teacher, sd, guide = ring_work(batch=32, images=True), ring(), 1.4, Guidance(2.0)
    student = work.build()  # type: ignore[misc]
    student.net = Shifted(student.net)
    variance, seen = LogVariance(), []
    nn.init.constant_(variance.body[2].bias, 0.7)
    student.register_forward_hook(lambda _, i, out: seen.append((i[0].detach(), i[1].detach())))
    method = replace(SCM, guidance=guide)
    nets = {"teacher": teacher, "student": student, "variance": variance}
    _, losses = next(method.updates(nets, draw_of(work, 1, 10)))  # half of the warm-up
    (grad,) = torch.autograd.grad(losses["consistency"], student.net.shift)

    # the same by hand: EDM's points as angles, the tangent by differences
    y, ratio = seen[-1]
    assert all(torch.allclose(y, other) for other, _ in seen)
    t = (ratio / sd).atan()
    x_t, cond = t.cos()[:, None] * y, draw_of(work).real()[1]
    in_trig, its_teacher = viewed(student, Trig(sd)), viewed(teacher, Trig(sd))
    with torch.no_grad():
        x0 = guide(its_teacher, x_t, t, cond)
        slope = (t.cos()[:, None] * x_t - x0) / t.sin()[:, None]

        def said(h: float) -> Tensor:  # sd F a little further on the teacher's trajectory
            dt = h * t.cos() * t.sin()
            x, u = x_t + dt[:, None] * slope, t + dt
            return (u.cos()[:, None] * x - in_trig(x, u, cond)) / u.sin()[:, None]

        along = (said(1e-2) - said(-1e-2)) / 2e-2
        c, s = t.cos()[:, None], t.sin()[:, None]
        g = -(c**2) * (said(0) - slope) - 0.5 * (c * s * x_t + along)
        g = g / (g.norm(dim=1, keepdim=True) + 0.1)
        weight = math.exp(-0.7) / (sd * t.tan())
        expected = (weight * g.square().sum(1)).mean() + 0.7
    assert torch.isclose(losses["consistency"].detach(), expected, rtol=1e-2)
    direction = -2 * (weight[:, None] * g).mean(0)
    assert torch.allclose(grad, direction, atol=0.02 * float(direction.norm()))
    (more,) = torch.autograd.grad(SCM.consistency(nets, draw_of(work)), variance.body[2].bias)
    assert torch.isfinite(more).all(), "the weighting learns too"


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.05, 1))
def test_the_derivative_comes_in_slowly(a: float, b: float, warmup: float) -> None:
    method = replace(SCM, warmup=warmup)
    assert method.share(0) == 0
    assert method.share(warmup / 2) == pytest.approx(0.5)
    assert 0 <= method.share(min(a, b)) <= method.share(max(a, b)) <= method.share(1) == 1
    assert replace(SCM, warmup=0).share(0) == 1


# ------------------------------------------------------------------------------------------- LADD


def test_both_alternate_and_only_the_head_learns_to_tell(digit_teacher: Denoiser, digit_work: Work) -> None:
    method = SanaSprint()
    trainer = Trainer(method, digit_teacher, digit_work, 4)
    assert set(trainer.roles) == {"teacher", "student", "variance", "head"}
    assert len(trainer.roles["head"].module.bodies) == 4  # type: ignore[arg-type]
    frozen = clone(named_tensors(digit_teacher))
    turns = method.updates(trainer.nets, draw_of(digit_work))
    role, losses = next(turns)
    assert role == ("student", "variance")
    assert set(losses) == {"consistency", "adversary"}
    parameters = list(trainer.nets["student"].parameters())
    with torch.no_grad():
        for out in trainer.nets["head"].outs:  # type: ignore[union-attr]
            nn.init.normal_(out.weight)
    other = next(method.updates(trainer.nets, draw_of(digit_work)))[1]["adversary"]
    assert any(g is not None and g.abs().sum() > 0 for g in torch.autograd.grad(other, parameters, allow_unused=True))
    role, losses = next(turns)
    assert role == "head"
    reached = torch.autograd.grad(losses["discriminator"], parameters, allow_unused=True)
    assert all(g is None for g in reached), "the student does not help to tell"
    assert next(turns, None) is None
    trainer.go()
    assert equal(frozen, named_tensors(digit_teacher))
    assert trainer.updates_done == {"teacher": 0, "student": 4, "variance": 4, "head": 4}


def test_the_head_learns_to_tell_and_the_student_to_fool(digit_teacher: Denoiser, digit_work: Work) -> None:
    found = []
    adversary: Any = replace(SanaSprint().adversary, misaligned=False)  # type: ignore[type-var]
    method = SanaSprint(scm=False, adversary=adversary, critic_lr=1e-2)
    trainer = Trainer(method, digit_teacher, digit_work, 25)
    trainer.go(lambda step, losses: found.append(losses))
    said = [f["head/discriminator"] for f in found]
    assert said[0] == pytest.approx(1.0)  # a fresh head says 0: half of 1 + 1
    assert sum(said[-5:]) / 5 < 0.85
    assert sum(f["student/adversary"] for f in found[-5:]) > 0, "what the student makes is seen through"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_what_is_judged_is_made_from_noise(share: float, ring_work: Callable[..., Work]) -> None:
    work = ring_work(batch=512, images=True)
    student, seen = work.build(), []  # type: ignore[misc]
    student.register_forward_hook(lambda _, inputs, out: seen.append(inputs))
    method = SanaSprint(max_time=share)
    sample = method.sample({"student": student}, draw_of(work))
    highest = seen[0][1] > 0.999 * method.high
    assert highest.float().mean() == pytest.approx(share, abs=0.07)
    assert sample.x.requires_grad
    noise = seen[0][0][highest] / method.high
    if share:
        assert noise.std() == pytest.approx(1, abs=0.1)


def test_each_part_can_be_switched_off(digit_teacher: Denoiser, digit_work: Work) -> None:
    roles = SCM.roles(digit_teacher, digit_work)
    assert set(roles) == {"teacher", "student", "variance"}
    assert set(SanaSprint(scm=False).roles(digit_teacher, digit_work)) == {"teacher", "student", "head"}
    with pytest.raises(AtollError, match="there is nothing to learn; switch one of them on"):
        SanaSprint(scm=False, adversary=None)
    nets = {n: r.module for n, r in roles.items()}
    assert [(r, list(v)) for r, v in SCM.updates(nets, draw_of(digit_work))] == [
        (("student", "variance"), ["consistency"])
    ]
    assert SanaSprint().needs == SCM.needs == "images"
    assert replace(SCM, rows=Rows(TeacherPairStore(10))).needs == "teacher samples"
    assert SanaSprint(rows=Rows(TeacherPairStore(10))).needs == "images"


# ------------------------------------------------------------------------------------------- whole runs


def test_samples_are_noised_again_on_the_circle(ring_work: Callable[..., Work]) -> None:
    student, seen = ring_work().build(), []  # type: ignore[misc]
    student.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], inputs[1][0].item(), out)))
    z, cond = torch.randn(6, 2), torch.arange(6) % 4
    top, sd = math.atan(40 / 1.4), 1.4
    for calls, expected in ((1, [top]), (2, [top, 1.3]), (4, [top, 0.75 * top, 0.5 * top, 0.25 * top])):
        seen.clear()
        made = SCM.generate({"student": student}, z, cond, calls, torch.Generator().manual_seed(1))
        assert [math.atan(ratio / sd) for _, ratio, _ in seen] == pytest.approx(expected, abs=1e-5)
        assert torch.equal(made, seen[-1][2])
        if calls == 2:
            eps = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
            x_t = math.cos(1.3) * seen[0][2] + math.sin(1.3) * sd * eps
            assert torch.allclose(seen[1][0], x_t / math.cos(1.3), atol=1e-4)


def energy(a: Tensor, b: Tensor) -> float:
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def test_few_calls_are_worth_many_of_the_teacher(ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    method = replace(SCM, lr=3e-3)
    trainer = Trainer(method, ring_teacher, ring_work(batch=96, images=True), 250)
    trainer.go()
    real = ring_teacher.net.draw(1500, torch.Generator().manual_seed(7))[0]  # type: ignore[operator]
    z, cond = torch.randn(1500, 2, generator=torch.Generator().manual_seed(5)), torch.arange(1500) % 4
    teacher = energy(Sampler("ddim", 1)(ring_teacher, z, cond), real)
    for calls, part in ((1, 0.5), (2, 0.25)):
        made = method.generate(trainer.nets, z, cond, calls, torch.Generator().manual_seed(6))
        assert energy(made, real) < part * teacher, calls
        near = torch.cdist(made, ring_teacher.net.means).argmin(1)  # type: ignore[arg-type]
        assert (near.bincount(minlength=8) > 0.2 * 1500 / 8).all(), "no mode is missed"


def test_flow_models_embeddings_and_teacher_samples() -> None:
    teacher = Denoiser(Wild(2), RF(), "flow", null=torch.zeros(2))
    work = Work((2,), Conditions(torch.randn(3, 2)), seed=1, batch=16)
    method = replace(SCM, rows=Rows(TeacherPairStore(50, Sampler(steps=4))), guidance=Guidance(4.5))
    trainer = Trainer(method, teacher, work, 3)
    trainer.go()
    made = method.generate(trainer.nets, torch.randn(6, 2), work.conditions.rows.repeat(2, 1), 4)
    assert torch.isfinite(made).all()
    with pytest.raises(AtollError, match="trains on real images"):
        Trainer(SanaSprint(adversary=Adversary(on="teacher", taps=("dense",))), teacher, work, 3)
