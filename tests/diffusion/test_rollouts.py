"""How few-step students make samples: what training sees is what sampling does, with one graph-carrying call."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from atoll.core.build import Reader
from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Conditions, Distiller, Draw, Work
from atoll.diffusion.exact import exact_mixture
from atoll.diffusion.losses import Denoising
from atoll.diffusion.methods.dmd import DMD
from atoll.diffusion.rollouts import OdePrefix, OneStep, PhasePrefix, RandomExit, Rollout, few_step_ratios
from atoll.diffusion.schedules import EDM, RF, VP, KarrasIndex, Trig, UniformTime
from atoll.diffusion.score_distillation import ScoreDistillation
from atoll.diffusion.trainer import Trainer

SCHEDULES = [EDM(), RF(), VP(), Trig()]
ROLLOUTS: list[Rollout] = [
    OneStep(), RandomExit(), RandomExit(exits="last"), RandomExit(steps=2), OdePrefix(), OdePrefix(interval="nested"),
    OdePrefix(counts=(1, 2, 4), inside=True), PhasePrefix(), PhasePrefix(steps=6, phases=3), PhasePrefix(2, 1),
]  # fmt: skip


class Recorder:
    """Stands between a rollout and its student, and keeps what passes."""

    def __init__(self, student: Denoiser) -> None:
        self.student, self.schedule = student, student.schedule
        self.calls: list[tuple[Tensor, Tensor, Tensor, bool, dict[str, Tensor]]] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor, **more: Tensor) -> Tensor:
        more_seen = {k: v.clone() for k, v in more.items()}
        out: Tensor = self.student(x, t, cond)
        self.calls.append((x.clone(), t.expand(len(x)).clone(), out.detach(), torch.is_grad_enabled(), more_seen))
        return out


def a_draw(work: Work, seed: int = 0, step: int = 0, steps: int = 1) -> Draw:
    return Draw(work, torch.Generator().manual_seed(seed), step, steps)


@pytest.fixture
def many(gauss_work: Work) -> Work:
    return Work(gauss_work.shape, gauss_work.conditions, batch=6000)


# ------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("rollout", ROLLOUTS, ids=repr)
def test_one_call_of_all_carries_the_graph(rollout: Rollout, gauss_teacher: Denoiser, gauss_work: Work) -> None:
    student: Any = Recorder(gauss_teacher)
    sample = rollout(student, a_draw(gauss_work))
    with_graph = [c for c in student.calls if c[3]]
    assert len(with_graph) == 1
    assert len(with_graph[0][0]) == gauss_work.batch
    assert sample.x.requires_grad
    assert not with_graph[0][0].requires_grad, "an earlier step carries a graph too"
    assert sum(len(c[0]) for c in student.calls[:-1]) < gauss_work.batch * (max(rollout.few) - 1) + 1


@pytest.mark.parametrize("rollout", ROLLOUTS, ids=repr)
@pytest.mark.parametrize("step", [0, 1])
def test_points_are_noised_above_where_they_are(
    rollout: Rollout, step: int, gauss_teacher: Denoiser, many: Work
) -> None:
    student: Any = Recorder(gauss_teacher)
    sample = rollout(student, a_draw(many, 1, step, 2))
    for law in (UniformTime(), KarrasIndex()):
        noisy = ScoreDistillation().noisy(gauss_teacher, sample, a_draw(many, 2), law)
        assert (noisy.t > sample.s).all()
        assert torch.isfinite(noisy.x_t).all()
        if sample.top is not None:
            assert (noisy.t <= sample.top * (1 + 1e-4)).all()


@settings(deadline=None, max_examples=60)
@given(
    low=st.floats(0, 0.95), width=st.floats(0.001, 1), u=st.floats(1e-4, 1), bounded=st.booleans(),
    schedule=st.sampled_from(SCHEDULES),
)  # fmt: skip
def test_levels_stay_between_an_anchor_and_its_top(
    low: float, width: float, u: float, bounded: bool, schedule: Any
) -> None:
    """Levels as rectified-flow times: the anchor's, and how far above it the top is."""
    high = min(0.99, low + width)
    floor, top = torch.tensor([low / (1 - low)]), torch.tensor([high / (1 - high)])
    drawn = torch.tensor([min(u, 1 - 1e-5)])
    ratio = ScoreDistillation().above(floor, drawn / (1 - drawn), top if bounded else None)
    s, t = schedule.time(floor), schedule.time(ratio)
    assert (t > s).all()
    if bounded:
        assert (ratio <= top * 1.001).all()
        assert (ratio / (1 + ratio) - floor / (1 + floor) >= min(0.019, 0.49 * (high - low))).all()
    elif low == 0:
        assert torch.allclose(ratio, drawn / (1 - drawn), rtol=1e-3)


def test_steps_lie_at_equal_flow_times_or_higher() -> None:
    ratios = few_step_ratios(4, 10.0)
    assert (ratios / (1 + ratios)).diff().tolist() == pytest.approx([-10 / 44] * 4)
    shifted = few_step_ratios(4, 40.0, 5.0)  # by hand: 5 r with r at flow times 8/9 (1, 3/4, 1/2, 1/4)
    assert shifted.tolist() == pytest.approx([40, 10, 4, 10 / 7, 0])
    assert few_step_ratios(2, 1.0, pad=2).tolist() == pytest.approx([1, 1 / 3, 0, 0, 0])


# ------------------------------------------------------------------------------------------- random exit


def test_random_exit_from_one_step_is_one_step(gauss_teacher: Denoiser, gauss_work: Work) -> None:
    one, few = (r(gauss_teacher, a_draw(gauss_work)) for r in (OneStep(), RandomExit(steps=1)))
    assert torch.equal(one.x, few.x)
    assert torch.equal(one.cond, few.cond)


def test_exits_are_equally_likely_and_each_sample_has_its_own(gauss_teacher: Denoiser, many: Work) -> None:
    for rollout in (RandomExit(), OdePrefix()):
        counts = rollout(gauss_teacher, a_draw(many)).step.bincount(minlength=4)
        assert counts.tolist() == pytest.approx([1500] * 4, rel=0.08), rollout
    assert RandomExit(exits="last")(gauss_teacher, a_draw(many)).step.unique().tolist() == [3]
    for step, expected in ((0, [0, 1]), (1, [2, 3])):
        found = PhasePrefix()(gauss_teacher, a_draw(many, step=step, steps=2)).step
        assert found.unique().tolist() == expected
        assert found.float().mean() == pytest.approx(sum(expected) / 2, abs=0.03)


def test_random_exit_noises_afresh_what_was_guessed(gauss_teacher: Denoiser, many: Work) -> None:
    """The input of a step is the last guess with noise of that level, unrelated to any noise before."""
    student: Any = Recorder(gauss_teacher)
    RandomExit(exits="last")(student, a_draw(many))
    sigmas = few_step_ratios(4, 2.5)
    for before, after in zip(student.calls, student.calls[1:], strict=False):
        noise = (after[0] - before[2]) / after[1][:, None]
        assert noise.std() == pytest.approx(1, abs=0.03)
        assert torch.corrcoef(torch.cat([noise, before[0]], 1).T)[0, 1].abs() < 0.04
    assert [float(c[1][0]) for c in student.calls] == pytest.approx(sigmas[:4].tolist())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_training_sees_what_sampling_does(schedule: Any, many: Work) -> None:
    """At each step, the law of the student's inputs in training is that in sampling (not that of noised data)."""
    student = exact_mixture(torch.tensor([[0.5]]), 0.3, schedule=schedule)
    z, cond = torch.randn(6000, 1, generator=torch.Generator().manual_seed(5)), torch.zeros(6000).long()
    for rollout in (RandomExit(), OdePrefix(), PhasePrefix(phases=1)):
        sampling: Any = Recorder(student)
        made = rollout.generate(sampling, z, cond, 4, torch.Generator().manual_seed(6))
        assert made.shape == z.shape
        training: Any = Recorder(student)
        sample = rollout(training, a_draw(many))
        x_t, t = training.calls[-1][:2]
        for k, (x, at, *_) in enumerate(sampling.calls):
            rows = sample.step == k
            assert t[rows].tolist() == pytest.approx(at[: int(rows.sum())].tolist())
            assert x_t[rows].mean() == pytest.approx(float(x.mean()), abs=0.12 * float(x.std()))
            assert x_t[rows].std() == pytest.approx(float(x.std()), rel=0.08)


def test_fewer_calls_stop_earlier_and_more_are_refused(gauss_teacher: Denoiser) -> None:
    z, cond = torch.randn(4, 1), torch.zeros(4).long()
    student: Any = Recorder(gauss_teacher)
    RandomExit().generate(student, z, cond, 2)
    assert [float(c[1][0]) for c in student.calls] == pytest.approx(few_step_ratios(4, 2.5)[:2].tolist())
    with pytest.raises(AtollError, match="at most 4 calls a sample, not 5"):
        RandomExit().generate(gauss_teacher, z, cond, 5)
    with pytest.raises(AtollError, match="takes 4 calls a sample, not 3"):
        PhasePrefix().generate(gauss_teacher, z, cond, 3)


def test_dmd_makes_few_step_students_too(gauss_teacher: Denoiser, gauss_work: Work) -> None:
    method = DMD(
        rollout=RandomExit(), critic=Denoising(0.3), lr=5e-3, critic_lr=3e-2, ema=0.95, critic_steps=2
    )  # fmt: skip
    trainer = Trainer(method, gauss_teacher, gauss_work, 150)
    z, cond = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)), torch.zeros(4000).long()

    def made() -> Tensor:
        return method.generate(trainer.nets, z, cond, 4, torch.Generator().manual_seed(1))

    before = made()
    trainer.go()
    after = made()
    assert before.std() < 0.18, "the teacher's own four guesses are too narrow"
    assert after.std() == pytest.approx(0.24, abs=0.06)
    assert after.mean() == pytest.approx(0.5, abs=0.06)


# ------------------------------------------------------------------------------------------- along the flow


@pytest.mark.parametrize("rollout", [OdePrefix(), PhasePrefix(phases=1), PhasePrefix(phases=2)], ids=repr)
def test_the_last_step_of_a_trajectory_is_the_sample(
    rollout: Rollout, gauss_teacher: Denoiser, gauss_work: Work
) -> None:
    draw = a_draw(gauss_work, step=1, steps=2)
    sample = rollout(gauss_teacher, draw)
    z = a_draw(gauss_work).noise()  # the first thing that was drawn
    last = sample.step == 3
    made = rollout.generate(gauss_teacher, z, sample.cond, 4)
    assert last.any()
    assert torch.allclose(sample.x[last], made[last], atol=1e-6)
    assert (sample.s[last] == 0).all()
    assert torch.equal(sample.anchor[last], sample.x[last])


def test_a_step_of_the_flow_ends_where_its_interval_begins(gauss_teacher: Denoiser, many: Work) -> None:
    grid = few_step_ratios(4, 10.0).float()
    for rollout in (OdePrefix(), OdePrefix(interval="nested")):
        student: Any = Recorder(gauss_teacher)
        sample = rollout(student, a_draw(many))
        x_t, t = student.calls[-1][:2]
        assert torch.allclose(t, grid[sample.step])
        assert torch.allclose(sample.s, grid[sample.step + 1])
        noise = (x_t - sample.x) / t[:, None]
        assert torch.allclose(sample.anchor, sample.x + sample.s[:, None] * noise, atol=1e-4)
        assert sample.top is not None
        assert torch.allclose(sample.top, t if rollout.interval == "separate" else grid[0].expand_as(t))
    inside = OdePrefix(inside=True)(gauss_teacher, a_draw(many))
    assert (inside.s >= grid[inside.step + 1]).all()
    assert (inside.s < grid[inside.step]).all()
    assert (inside.s > grid[inside.step + 1] + 1e-4).float().mean() > 0.9


def test_a_phase_ends_noisy_whatever_the_step_it_is_left_from(gauss_teacher: Denoiser, many: Work) -> None:
    rollout = PhasePrefix()
    student: Any = Recorder(gauss_teacher)
    sample = rollout(student, a_draw(many, step=0, steps=2))
    x_t, t = student.calls[-1][:2]
    assert sample.s.unique().tolist() == pytest.approx([4.0])
    noise = (x_t - sample.x) / t[:, None]
    assert torch.allclose(sample.anchor, sample.x + 4 * noise, atol=1e-3)
    assert sample.top is not None
    assert sample.top.unique().tolist() == pytest.approx([40.0])


@given(steps=st.integers(1, 500), phases=st.integers(1, 5))
def test_phases_share_the_training(steps: int, phases: int) -> None:
    rollout = PhasePrefix(steps=phases, phases=phases)
    found = [rollout.phase(i, steps) for i in range(steps)]
    assert found == sorted(found)
    assert found[0] == 0
    lengths = [found.count(p) for p in range(phases)]
    assert max(lengths) - min(lengths) <= 1


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(AtollError, match="multiple of `phases`; got 4 steps and 3 phases"):
        PhasePrefix(4, 3)
    with pytest.raises(AtollError, match="at least one number of steps"):
        OdePrefix(counts=())


def test_steps_aware_students_are_told_how_many(gauss_teacher: Denoiser, many: Work) -> None:
    rollout = OdePrefix(counts=(1, 2, 4))
    student: Any = Recorder(gauss_teacher)
    sample = rollout(student, a_draw(many))
    told, fake = student.calls[-1][4]["numbers"], sample.told["numbers"]
    assert told[:, 0].unique().tolist() == [1, 2, 4]
    assert (told[:, 1] == 0).all()
    assert torch.equal(fake[:, 0], told[:, 0])
    assert torch.equal(fake[:, 1].long(), sample.step)
    assert (sample.step < told[:, 0]).all()
    for count in (1, 2, 4):
        rows = told[:, 0] == count
        assert rows.float().mean() == pytest.approx(1 / 3, abs=0.03)
        assert sample.step[rows].bincount().tolist() == pytest.approx([int(rows.sum()) / count] * count, rel=0.12)
        grid = few_step_ratios(count, 10.0).float()
        assert torch.allclose(sample.s[rows], grid[sample.step[rows] + 1])
    assert OdePrefix().told(torch.ones(2)) == {}


# ------------------------------------------------------------------------------------------- what they are used for


class Reads(nn.Module):
    """A network for rows ``[B, 3, 2]`` and embeddings ``[B, 5]``, as a user may bring it."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Linear(1, 16)
        self.cond, self.inward, self.out = nn.Linear(5, 16), nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        h = self.inward(x.flatten(1)) + self.time_embed(t[:, None]) + self.cond(cond)
        out: Tensor = self.out(h.tanh()).reshape(x.shape)
        return out


@pytest.mark.parametrize(
    ("schedule", "predicts"), [(EDM(), "edm"), (RF(), "flow"), (VP(), "eps"), (Trig(), "v")], ids=repr
)
@pytest.mark.parametrize(
    "method",
    [
        {"name": "sid_fewstep", "mode": "anti"}, {"name": "tdm", "rollout": {"name": "ode_prefix", "counts": [4, 2]}},
        {"name": "tdm", "rollout": {"name": "ode_prefix", "interval": "nested"}, "guidance": {"scale": 2.0}},
        {"name": "phased_dmd"}, {"name": "phased_dmd", "rollout": {"name": "phase_prefix", "steps": 3, "phases": 3}},
        {"name": "dmd", "rollout": "random_exit"},
    ],
    ids=str,
)  # fmt: skip
def test_methods_take_any_schedule_shape_and_embeddings(method: Any, schedule: Any, predicts: Any) -> None:
    """Named as in a recipe; on a network of the user's own."""
    made: Any = Reader().read(Distiller, method, "method")
    torch.manual_seed(0)
    teacher = Denoiser(Reads(), schedule, predicts, null=torch.zeros(5))
    work = Work((3, 2), Conditions(torch.randn(7, 5)), batch=8)
    trainer = Trainer(made, teacher, work, 3)
    for _ in range(3):
        assert all(math.isfinite(v) for v in trainer.once().values())
    for calls in made.few:
        x = made.generate(trainer.nets, torch.randn(4, 3, 2), torch.randn(4, 5), calls)
        assert x.shape == (4, 3, 2)
        assert torch.isfinite(x).all()
