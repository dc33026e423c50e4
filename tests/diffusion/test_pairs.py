"""Material that a teacher makes: pairs, and guided trajectories."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Conditions, Work
from atoll.diffusion.exact import exact_mixture, ring
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.pairs import TeacherPairStore, TrajectoryStore
from atoll.diffusion.schedules import RF
from atoll.diffusion.solvers import Sampler

WORK = Work((2,), Conditions.classes(4), seed=3)
WORK_2 = Work((2,), Conditions.classes(2), seed=3)


def test_a_pair_is_noise_and_where_the_teacher_takes_it(ring_teacher: Denoiser) -> None:
    sampler = Sampler(steps=5, guidance=Guidance(2.0))
    made = TeacherPairStore(10, sampler).make(ring_teacher, WORK)
    assert made["cond"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert torch.equal(made["x"], sampler(ring_teacher, made["z"], made["cond"]))
    assert not torch.equal(made["x"], Sampler(steps=5)(ring_teacher, made["z"], made["cond"]))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_rows_do_not_depend_on_the_batch_size(batch: int, count: int) -> None:
    whole = TeacherPairStore(12, Sampler(steps=2), batch=12).make(ring(), WORK)
    some = TeacherPairStore(count, Sampler(steps=2), batch=batch).make(ring(), WORK)
    for name, value in some.items():
        assert torch.allclose(value, whole[name][:count], atol=1e-5), name


def test_every_call_of_a_trajectory_leaves_a_row_with_what_guidance_says(ring_teacher: Denoiser) -> None:
    made = TrajectoryStore(6, Sampler(solver="heun", steps=3), low=1.0, high=6.0).make(ring_teacher, WORK)
    assert len(made["x_t"]) == 6 * 5
    w = made["w"].reshape(5, 6)
    assert (w == w[:1]).all()  # one scale a trajectory
    assert w.min() >= 1
    assert w.max() <= 6
    assert len(w[0].unique()) == 6
    for row in range(len(made["w"])):
        x, t, cond = made["x_t"][row : row + 1], made["t"][row : row + 1], made["cond"][row : row + 1]
        x0 = Guidance(float(made["w"][row]))(ring_teacher, x, t, cond)
        assert torch.allclose(made["eps"][row : row + 1], (x - x0) / t, atol=1e-4)


def test_the_trajectory_is_the_guided_samplers_own(ring_teacher: Denoiser) -> None:
    """With one scale for all, the rows of the last step lead to the guided samples."""
    store = TrajectoryStore(8, Sampler(solver="ddim", steps=4), low=2.999999, high=3.0)
    made = store.make(ring_teacher, WORK)
    x, eps, t = (made[name][-8:] for name in ("x_t", "eps", "t"))
    z = made["x_t"][:8] / made["t"][:8, None]
    wanted = Sampler(solver="ddim", steps=4, guidance=Guidance(3.0))(ring_teacher, z, made["cond"][:8])
    assert torch.allclose(x - t[:, None] * eps, wanted, atol=1e-3)


def test_trajectories_of_a_flow_model() -> None:
    means = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    teacher = exact_mixture(means, 0.3, torch.tensor([0, 1]), RF())
    made = TrajectoryStore(4, Sampler(solver="ddim", steps=3)).make(teacher, WORK_2)
    x, t = made["x_t"], made["t"][:, None]
    assert made["t"].max() < 1
    x0 = torch.cat(
        [
            Guidance(float(w))(teacher, x[i : i + 1], made["t"][i : i + 1], made["cond"][i : i + 1])
            for i, w in enumerate(made["w"])
        ]
    )
    assert torch.allclose((1 - t) * x0 + t * made["eps"], x, atol=1e-4)


def test_scales_need_room() -> None:
    with pytest.raises(AtollError, match="between `low` and `high`"):
        TrajectoryStore(low=2.0, high=2.0)
