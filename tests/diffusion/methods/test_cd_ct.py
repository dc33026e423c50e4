from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.diffusion.consistency import Gaps, to_the_end
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Conditions, Draw, Images, Work
from atoll.diffusion.exact import exact_mixture, ring
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.methods.cd_ct import CdCt
from atoll.diffusion.pairs import TeacherPairStore
from atoll.diffusion.rows import Rows
from atoll.diffusion.schedules import EDM, RF, VP, NoiseSchedule, Trig
from atoll.diffusion.solvers import Sampler
from atoll.diffusion.trainer import Trainer

SCHEDULES = (EDM(), RF(), Trig(), VP())


class Wild(nn.Module):
    """A network that says anything, with a dropout and embeddings as conditions."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.dense, self.drop = nn.Linear(2 * size + 1, size), nn.Dropout(0.5)
        nn.init.normal_(self.dense.weight, std=2.0, generator=torch.Generator().manual_seed(3))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        out: Tensor = self.drop(self.dense(torch.cat([x, cond, t[:, None]], 1)).sin() * 5)
        return out


def draw_of(work: Work, step: int = 0, steps: int = 10, seed: int = 0) -> Draw:
    return Draw(work, torch.Generator().manual_seed(seed), step, steps)


def calls_of(module: nn.Module, log: list[tuple[Tensor, Tensor, Tensor, bool]]) -> Any:
    def hook(_: Any, inputs: Any, out: Tensor) -> None:
        log.append((inputs[0].detach(), inputs[1].detach(), out.detach(), torch.is_grad_enabled()))

    return module.register_forward_hook(hook)


# ------------------------------------------------------------------------------------------- the function


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SCHEDULES), st.sampled_from(["edm", "x0", "eps", "v", "flow"]), st.floats(0.002, 0.1),
    st.integers(0, 99),
)  # fmt: skip
def test_at_the_lowest_time_it_is_the_identity_whatever_the_network_says(
    schedule: NoiseSchedule, kind: Any, low: float, seed: int
) -> None:
    denoiser = Denoiser(Wild(), schedule, kind).eval()
    x, cond = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed))
    end = schedule.time(torch.tensor(low)).expand(4)
    assert torch.allclose(to_the_end(denoiser, x, end, cond, low), x, atol=1e-5)
    above = to_the_end(denoiser, x, schedule.time(torch.tensor(2.0)).expand(4), cond, low)
    assert torch.isfinite(above).all()
    assert not torch.allclose(above, x, atol=0.1)


def test_of_a_preconditioned_network_it_has_the_factor_of_the_paper() -> None:
    """c_out = (s - low) sd / sqrt(s^2 + sd^2): what the answer changes by where the network's says one more."""

    class Says(nn.Module):
        value = 0.0

        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return torch.full_like(x, self.value)

    denoiser, s, low, sd = Denoiser(Says(), EDM(), "edm", sigma_data=0.5), torch.tensor([0.01, 0.3, 7.0]), 0.002, 0.5
    before = to_the_end(denoiser, torch.ones(3, 1), s, torch.zeros(3), low)
    denoiser.net.value = 1.0  # type: ignore[assignment]
    after = to_the_end(denoiser, torch.ones(3, 1), s, torch.zeros(3), low)
    assert torch.allclose((after - before)[:, 0], (s - low) * sd / (s**2 + sd**2).sqrt(), rtol=1e-3)


class GaussianEnd(nn.Module):
    """What a denoiser says whose consistency function is exact, for the Gaussian N(m, std^2)."""

    def __init__(self, m: Tensor, std: float, low: float, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.m, self.std, self.low, self.schedule = m, std, low, schedule

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        end = self.schedule.time(torch.tensor(self.low, dtype=torch.float64)).float()
        a, s, b, e = (f(u) for u in (t[:, None], end) for f in (self.schedule.alpha, self.schedule.sigma))
        spread = ((b * self.std) ** 2 + e**2).sqrt() / ((a * self.std) ** 2 + s**2).sqrt()
        there = b * self.m + spread * (x - a * self.m)
        out: Tensor = (there - e / s * x) / (b - e / s * a)
        return out.nan_to_num()  # at the end itself every answer is right


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_exact_solution_of_a_gaussians_flow_has_no_loss(schedule: NoiseSchedule) -> None:
    m, gaps = torch.tensor([0.4, -0.3]), Gaps(first=80, last=80, low=0.02)
    teacher = exact_mixture(m[None], 0.5, schedule=schedule)
    exact = Denoiser(GaussianEnd(m, 0.5, 0.02, schedule), schedule, "x0")
    rows = teacher.net.draw(500, torch.Generator().manual_seed(0))[0]  # type: ignore[operator]
    work = Work((2,), Conditions.classes(1), _images(rows), batch=64)

    def loss(student: Denoiser, method: CdCt) -> float:
        _, losses = next(method.updates({"teacher": teacher, "student": student}, draw_of(work)))
        return float(losses["consistency"])

    method = CdCt(gaps=gaps)
    assert loss(exact, method) < 2e-3 * loss(teacher, method)
    # with Euler's step the points are off by the square of the gap, and without the teacher by the noise itself
    assert loss(exact, CdCt(gaps=gaps, solver="ddim")) > 5 * loss(exact, method)
    assert loss(exact, CdCt(gaps=gaps, mode="train")) > 100 * loss(exact, method)


def _images(x: Tensor, y: Tensor | None = None) -> Images:
    from atoll.data.dataset import Dataset, Info

    y = torch.zeros(len(x), dtype=torch.int64) if y is None else y
    return Images(Dataset({"x": x, "y": y}, Info(name="rows", shape=(2,), num_classes=4)), sigma_data=1.0)


# ------------------------------------------------------------------------------------------- its loss


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 8), st.floats(0, 1), st.floats(0, 1))
def test_the_grid_only_becomes_finer(first: int, doublings: int, a: float, b: float) -> None:
    gaps = Gaps(first=first, last=first * 2**doublings)
    early, late = gaps.widths(min(a, b)), gaps.widths(max(a, b))
    assert first == gaps.widths(0) <= early <= late <= gaps.widths(1) == gaps.last
    assert math.log2(late / first).is_integer()


def test_it_doubles_at_equal_intervals() -> None:
    gaps = Gaps(first=10, last=1280)
    assert [gaps.widths(i / 8 + 1e-9) for i in range(8)] == [10, 20, 40, 80, 160, 320, 640, 1280]
    assert Gaps(first=10, last=50).widths(0.99) == 50


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 640), st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20))
def test_two_points_lie_one_width_apart(widths: int, ratios: list[float]) -> None:
    gaps = Gaps()
    high, low = gaps.pair(torch.tensor(ratios, dtype=torch.float64), widths)
    assert (low < high).all()
    assert low.min() >= gaps.low * (1 - 1e-9)
    assert high.max() <= gaps.high * (1 + 1e-9)
    index = [(v ** (1 / 7) - gaps.low ** (1 / 7)) / (gaps.high ** (1 / 7) - gaps.low ** (1 / 7)) for v in (high, low)]
    assert torch.allclose(index[0] - index[1], torch.full_like(high, 1 / widths), atol=1e-9)


def test_a_grid_has_two_ends() -> None:
    with pytest.raises(AtollError, match="`first` is at most `last`; got 20 and 10"):
        Gaps(first=20, last=10)
    with pytest.raises(AtollError, match="`low` below `high`"):
        Gaps(low=3.0, high=2.0)


@pytest.mark.parametrize("target", ["itself", "average"])
def test_both_points_are_one_sample_with_one_noise_and_the_loss_is_the_papers(
    target: Any, ring_work: Callable[..., Work]
) -> None:
    work = ring_work(batch=32, images=True)
    student, average = work.build(), work.build()  # type: ignore[misc]
    log: list[tuple[Tensor, Tensor, Tensor, bool]] = []
    calls_of(student, log)
    other: list[tuple[Tensor, Tensor, Tensor, bool]] = []
    calls_of(average, other)
    method = CdCt(mode="train", target=target, c=0.3)
    role, losses = next(method.updates({"student": student, "student_ema": average}, draw_of(work)))
    assert role == "student"
    (x_t, t, said, graph) = log[-1]
    (x_r, r, goal, none) = (log if target == "itself" else other)[0]
    assert len(log) + len(other) == 2
    assert graph
    assert not none, "the target has no graph"
    eps = (x_t - x_r) / (t - r)[:, None]
    x0 = x_t - t[:, None] * eps
    rows = work.images.all()[0]  # type: ignore[union-attr]
    assert torch.cdist(x0, rows).min(1).values.max() < 0.02  # of 4000 rows; the noise is as large as 40
    assert 0.5 < eps.std() < 1.5
    low = method.gaps.low
    ends = [low / u[:, None] * x + (1 - low / u[:, None]) * d for x, u, d in ((x_t, t, said), (x_r, r, goal))]
    square = (ends[0] - ends[1]).square().sum(1)
    expected = (((square + 0.3**2).sqrt() - 0.3) / (t - r)).mean()
    assert torch.isclose(losses["consistency"].detach(), expected, rtol=1e-3)


def test_the_guided_teacher_leads_to_the_lower_point(ring_work: Callable[..., Work]) -> None:
    work, teacher = ring_work(batch=16, images=True), ring()
    student = work.build()  # type: ignore[misc]
    log: list[tuple[Tensor, Tensor, Tensor, bool]] = []
    calls_of(student, log)
    guide = Guidance(2.5)
    method = CdCt(solver="ddim", guidance=guide)
    next(method.updates({"teacher": teacher, "student": student}, draw_of(work)))
    (x_r, r, *_), (x_t, t, *_) = log
    cond = draw_of(work).real()[1]  # the first thing that is drawn
    d = guide(teacher, x_t, t, cond)
    assert torch.allclose(x_r, x_t + ((r - t) / t)[:, None] * (x_t - d), atol=1e-4)
    assert not torch.allclose(d, teacher(x_t, t, cond), atol=1e-2)


@pytest.mark.parametrize("target", ["itself", "average"])
def test_both_calls_have_the_same_dropout_and_sampling_has_none(target: Any) -> None:
    student = Denoiser(Wild(2), RF(), "flow")
    average = copy.deepcopy(student)
    masks: list[Tensor] = []
    for net in (student, average):
        net.net.drop.register_forward_hook(lambda _, i, out: masks.append((out == 0) & (i[0] != 0)))  # type: ignore
    work = Work((2,), Conditions(torch.randn(3, 2)), batch=64)
    x = torch.randn(64, 2)
    material = {"x": x, "cond": torch.randn(64, 2)}
    method = CdCt(mode="train", target=target, rows=Rows(TeacherPairStore(64)))
    nets = {"student": student.eval(), "student_ema": average.eval()}
    for step in range(2):
        draw = Draw(work, torch.Generator().manual_seed(step), step, 2, material)
        next(method.updates(nets, draw))
    first, second, third, fourth = masks
    assert torch.equal(first, second)
    assert 0.3 < first.float().mean() < 0.7
    assert torch.equal(third, fourth)
    assert not torch.equal(first, third)
    masks.clear()
    made = [method.generate(nets, x, material["cond"], 2, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*made)
    assert not any(m.any() for m in masks)


# ------------------------------------------------------------------------------------------- whole runs


def energy(a: Tensor, b: Tensor) -> float:
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def made_by(method: Any, nets: Any, calls: int) -> Tensor:
    z, cond = torch.randn(1500, 2, generator=torch.Generator().manual_seed(5)), torch.arange(1500) % 4
    made: Tensor = method.generate(nets, z, cond, calls, torch.Generator().manual_seed(6))
    return made


@pytest.mark.parametrize("mode", ["distil", "train"])
def test_few_calls_are_worth_many_of_the_teacher(
    mode: Any, ring_teacher: Denoiser, ring_work: Callable[..., Work]
) -> None:
    method = CdCt(mode=mode, lr=1e-3, gaps=Gaps(last=40))
    trainer = Trainer(method, ring_teacher, ring_work(batch=128, images=True), 300)
    trainer.go()
    real = ring_teacher.net.draw(1500, torch.Generator().manual_seed(7))[0]  # type: ignore[operator]
    z, cond = torch.randn(1500, 2, generator=torch.Generator().manual_seed(5)), torch.arange(1500) % 4
    one = energy(Sampler("ddim", 1)(ring_teacher, z, cond), real)
    found = {calls: energy(made_by(method, trainer.nets, calls), real) for calls in method.few}
    assert found[1] < 0.5 * one
    assert found[2] < 0.4 * one
    near = torch.cdist(made_by(method, trainer.nets, 1), ring_teacher.net.means).argmin(1)  # type: ignore[arg-type]
    assert (near.bincount(minlength=8) > 0.2 * 1500 / 8).all(), "no mode is missed"


def test_teacher_samples_take_the_place_of_images() -> None:
    teacher = ring()
    method = CdCt(rows=Rows(TeacherPairStore(200, Sampler(steps=10))))
    assert method.needs == "teacher samples"
    assert CdCt().needs == "images"
    flow = Denoiser(Wild(2), RF(), "flow", null=torch.zeros(2))
    work = Work((2,), Conditions.classes(4), seed=1, batch=32)
    material = method.material(teacher, work)
    assert set(material) == {"x", "cond"}
    assert torch.cdist(material["x"], teacher.net.means).min(1).values.mean() < 0.4  # type: ignore[arg-type]
    # embeddings as conditions, a flow model, guidance through a null embedding, no image anywhere
    work = Work((2,), Conditions(torch.randn(3, 2)), seed=1, batch=32)
    trainer = Trainer(CdCt(rows=method.rows, guidance=Guidance(2.0)), flow, work, 3)
    trainer.go()
    made = method.generate(trainer.nets, torch.randn(6, 2), work.conditions.rows.repeat(2, 1), 4)
    assert torch.isfinite(made).all()
    with pytest.raises(AtollError, match="trains on real images"):
        Trainer(CdCt(), flow, work, 3)
