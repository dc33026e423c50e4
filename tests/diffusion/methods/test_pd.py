from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.core.tree import clone, equal, named_tensors
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Conditions, Draw, Work
from atoll.diffusion.exact import ring
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.methods.pd import PD, aim
from atoll.diffusion.pairs import TeacherPairStore
from atoll.diffusion.rows import Rows
from atoll.diffusion.schedules import EDM, RF, VP, NoiseSchedule, Trig
from atoll.diffusion.solvers import Sampler, ddim_step
from atoll.diffusion.trainer import Trainer

SCHEDULES = (EDM(), RF(), Trig(), VP())


def draw_of(work: Work, step: int, steps: int) -> Draw:
    return Draw(work, torch.Generator().manual_seed(step), step, steps)


# ------------------------------------------------------------------------------------------- one step for two


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SCHEDULES), st.integers(0, 5), st.floats(0.3, 4.0), st.integers(0, 999))
def test_a_perfect_answer_lands_where_two_steps_do(
    schedule: NoiseSchedule, doublings: int, shift: float, seed: int
) -> None:
    """On every grid, at every place of it, whatever the teacher says."""
    count = 2 << doublings
    ratios = torch.tensor([0.0], dtype=torch.float64)
    times = PD(shift=shift).times(schedule, count, ratios).double()
    generator = torch.Generator().manual_seed(seed)
    i = 2 * int(torch.randint(count // 2, (), generator=generator))
    x, first, second = torch.randn(3, 5, 2, dtype=torch.float64, generator=generator)
    t, middle, to = times[i], times[i + 1], times[i + 2]
    there = ddim_step(schedule, ddim_step(schedule, x, first, t, middle), second, middle, to)
    assert torch.allclose(ddim_step(schedule, x, aim(schedule, x, there, t, to), t, to), there, atol=1e-6)


class Perfect(Denoiser):
    """A student whose one step from every point of its grid is the guided teacher's two."""

    def __init__(self, teacher: Denoiser, times: Tensor, guidance: Guidance) -> None:
        super().__init__(nn.Linear(1, 1), teacher.schedule, "x0", classes=teacher.classes)
        self.teacher, self.times, self.guide = teacher, times, guidance

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, **more: Any) -> Tensor:
        i = (self.times[None] - t[:, None]).abs().argmin(1)
        assert torch.equal(self.times[i], t)
        middle, to = (self.times[i + 1], self.times[i + 2])
        s0, s1, s2 = (u[:, None] for u in (t, middle, to))
        one = x_t + (s1 - s0) / s0 * (x_t - self.guide(self.teacher, x_t, t, cond))  # Euler, in EDM's coordinates
        two = one + (s2 - s1) / s1 * (one - self.guide(self.teacher, one, middle, cond))
        return (two - s2 / s0 * x_t) / (1 - s2 / s0)


def test_the_loss_asks_for_two_guided_steps_and_nothing_else(ring_work: Callable[..., Work]) -> None:
    work, teacher, guide = ring_work(batch=64, images=True), ring(), Guidance(2.0)
    method = PD(guidance=guide)

    def loss(student: Denoiser, step: int, before: Denoiser = teacher) -> float:
        nets = {"teacher": teacher, "before": before, "student": student}
        ((role, losses),) = method.updates(nets, draw_of(work, step, 5))
        assert role == "student"
        return float(losses["two steps"])

    like = torch.zeros(1)
    for step in range(5):  # five rounds; only the teacher is guided, its followers are as they are
        times = method.times(EDM(), 32 >> step, like)
        perfect = Perfect(teacher, times, guide if step == 0 else Guidance())
        assert loss(perfect, step) < 1e-6
        assert loss(Perfect(teacher, times, Guidance(1.5)), step) > 1e-3
        assert loss(teacher, step) > 1e-4
    shifted = Perfect(ring(radius=1.5), method.times(EDM(), 16, like), Guidance())
    assert loss(shifted, 1, before=shifted.teacher) < 1e-6, "from the second round on the last student teaches"
    assert loss(shifted, 1) > 1e-3


@pytest.mark.parametrize("weight", ["snr", "v"])
def test_the_weight_is_the_papers(weight: Any, ring_work: Callable[..., Work]) -> None:
    """Against a student that is off by one everywhere, the loss is the mean weight."""
    work, teacher = ring_work(batch=64, images=True), ring()
    method, seen = PD(weight=weight, first=8), []

    class Off(Perfect):
        def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, **more: Any) -> Tensor:
            seen.append(t)
            return super().forward(x_t, t, cond, **more) + 1

    student = Off(teacher, method.times(EDM(), 8, torch.zeros(1)), Guidance())
    _, losses = next(method.updates({"teacher": teacher, "student": student}, draw_of(work, 0, 3)))
    snr = 1 / seen[0] ** 2
    expected = snr + 1 if weight == "v" else torch.maximum(snr, torch.ones_like(snr))
    assert snr.min() < 1 < snr.max()
    assert torch.isclose(losses["two steps"], expected.mean(), rtol=1e-3)


# ------------------------------------------------------------------------------------------- rounds


def test_each_round_halves_the_calls_and_is_taught_by_the_last_student(ring_work: Callable[..., Work]) -> None:
    teacher, work = ring(), ring_work(batch=64, images=True)
    method = PD()
    assert method.rounds == 5
    assert method.few == (1,)
    trainer = Trainer(method, teacher, work, 25)
    student, before = trainer.nets["student"], trainer.nets["before"]
    asked: set[float] = set()
    student.register_forward_hook(lambda _, inputs, out: asked.update(inputs[1].tolist()))
    start, distinct, fresh = clone(named_tensors(before)), [], []
    for step in range(25):
        average = clone(named_tensors(trainer.nets["student_ema"]))
        if step % 5 == 0:
            asked.clear()
        trainer.once()
        moments = next(iter(trainer.optimisers["student"].state.values()))
        fresh.append(int(moments["step"]))
        if step % 5 == 0 and step:
            assert equal(named_tensors(before), average), "the average teaches the next round"
        elif step == 1:
            assert equal(named_tensors(before), start)
        if step % 5 == 4:
            distinct.append(len(asked))
    assert distinct == [16, 8, 4, 2, 1]
    assert fresh == [1, 2, 3, 4, 5] * 5


def test_a_new_round_starts_from_what_teaches_it(ring_work: Callable[..., Work]) -> None:
    trainer = Trainer(PD(first=4), ring(), ring_work(batch=16, images=True), 10)
    for _ in trainer.iterate():
        pass
    nets = trainer.nets
    assert not equal(named_tensors(nets["student"]), named_tensors(nets["student_ema"]))
    assert list(PD(first=4).begin(nets, 5, 10)) == ["student"]
    assert equal(named_tensors(nets["student"]), named_tensors(nets["student_ema"]))
    for step in (0, 1, 4, 6, 9):
        assert list(PD(first=4).begin(nets, step, 10)) == []


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(0, 5), st.integers(0, 200))
def test_every_round_has_its_share(last: int, rounds: int, extra: int) -> None:
    method = PD(first=last * 2 ** (rounds + 1), last=last)
    assert method.rounds == rounds + 1
    steps = method.rounds + extra
    turns = [method.round_of(step, steps) for step in range(steps)]
    counts = [turns.count(i) for i in range(method.rounds)]
    assert turns == sorted(turns)
    assert max(counts) - min(counts) <= 1
    assert method.first >> method.rounds == method.few[0] == last


@pytest.mark.parametrize(("first", "last"), [(12, 5), (6, 4), (4, 4), (2, 8)])
def test_steps_are_halved(first: int, last: int) -> None:
    with pytest.raises(AtollError, match=f"`last` times a power of 2; got {first} and {last}"):
        PD(first=first, last=last)


def test_every_round_needs_a_step(ring_work: Callable[..., Work]) -> None:
    with pytest.raises(AtollError, match="it takes 5 rounds; got 4 steps"):
        Trainer(PD(), ring(), ring_work(batch=8, images=True), 4).go()


# ------------------------------------------------------------------------------------------- whole runs


def energy(a: Tensor, b: Tensor) -> float:
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def test_one_call_is_worth_many_of_the_teacher(ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    method = PD(first=8, lr=1e-3)
    trainer = Trainer(method, ring_teacher, ring_work(batch=128, images=True), 240)
    trainer.go()
    real = ring_teacher.net.draw(1500, torch.Generator().manual_seed(7))[0]  # type: ignore[operator]
    z, cond = torch.randn(1500, 2, generator=torch.Generator().manual_seed(5)), torch.arange(1500) % 4
    made = method.generate(trainer.nets, z, cond, 1)
    assert energy(made, real) < 0.3 * energy(Sampler("ddim", 1)(ring_teacher, z, cond), real)
    near = torch.cdist(made, ring_teacher.net.means).argmin(1)  # type: ignore[arg-type]
    assert (near.bincount(minlength=8) > 0.2 * 1500 / 8).all(), "no mode is missed"
    # it is the teacher's map that is learned, not its distribution alone
    same = Sampler("ddim", 8, grid="flow")(ring_teacher, z, cond)
    assert (made - same).norm(dim=1).median() < 0.7 * (made - same.roll(4, 0)).norm(dim=1).median()


def test_flow_models_embeddings_and_teacher_samples() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(5, 2)

        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            out: Tensor = self.dense(torch.cat([x, cond, t[:, None]], 1))
            return out

    teacher = Denoiser(Net(), RF(), "flow", null=torch.zeros(2))
    work = Work((2,), Conditions(torch.randn(3, 2)), seed=1, batch=16)
    method = PD(first=4, last=2, rows=Rows(TeacherPairStore(50, Sampler(steps=4))), guidance=Guidance(2.0))
    assert method.needs == "teacher samples"
    assert PD().needs == "images"
    trainer = Trainer(method, teacher, work, 4)
    trainer.go()
    made = method.generate(trainer.nets, torch.randn(6, 2), work.conditions.rows.repeat(2, 1), 2)
    assert torch.isfinite(made).all()
