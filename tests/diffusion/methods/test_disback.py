"""DisBack: the path that a teacher is degraded along, and the way back."""

from __future__ import annotations

import copy
import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.core.tree import clone, equal, named_tensors
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Conditions, Work
from atoll.diffusion.exact import PlaneNet, ring
from atoll.diffusion.gan_heads import Adversary
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.losses import denoising_loss
from atoll.diffusion.methods.disback import DisBack
from atoll.diffusion.methods.dmd import DMD
from atoll.diffusion.methods.sim import SIM
from atoll.diffusion.schedules import EDM, LogNormal
from atoll.diffusion.trail import put, vector
from atoll.diffusion.trainer import Trainer


def learned(exact: Denoiser, steps: int = 250) -> Denoiser:
    """A network that has learned the ring, so that it can be copied and degraded."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Denoiser(PlaneNet(2, 4, width=64), EDM(), "edm", classes=4, sigma_data=1.4)
    optimiser = torch.optim.Adam(made.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x, cond = exact.net.draw(256, generator)  # type: ignore[operator]
        ratio = LogNormal(-0.5, 1.2).draw(256, generator)
        eps = torch.randn(x.shape, generator=generator)
        loss = denoising_loss(made(x + ratio[:, None] * eps, ratio, cond), x, ratio, 1.4).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def teacher() -> Denoiser:
    return learned(ring())


def work(batch: int = 128, seed: int = 0) -> Work:
    return Work((2,), Conditions.classes(4), seed=seed, batch=batch)


def denoising(net: Any, x: torch.Tensor, cond: torch.Tensor) -> float:
    generator = torch.Generator().manual_seed(7)
    ratio = LogNormal().draw(len(x), generator)
    eps = torch.randn(x.shape, generator=generator)
    with torch.no_grad():
        return float(denoising_loss(net(x + ratio[:, None] * eps, ratio, cond), x, ratio).mean())


def made(method: Any, nets: Any, n: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    z, cond = torch.randn(n, 2, generator=torch.Generator().manual_seed(3)), torch.arange(n) % 4
    return method.generate(nets, z, cond, 1), cond


@pytest.mark.parametrize("base", [DMD(), SIM()], ids=["dmd", "sim"])
def test_without_a_path_it_is_the_base_method(base: Any, teacher: Denoiser) -> None:
    ours = Trainer(DisBack(base=base, targets=0), copy.deepcopy(teacher), work(32), 6)
    theirs = Trainer(base, copy.deepcopy(teacher), work(32), 6)
    ours.go()
    theirs.go()
    assert ours.nets.keys() == theirs.nets.keys()
    for role in theirs.nets:
        assert equal(named_tensors(ours.nets[role]), named_tensors(theirs.nets[role]))


@settings(deadline=None)
@given(st.integers(0, 7), st.integers(0, 300), st.floats(0.01, 0.5), st.floats(0.01, 1.0))
def test_targets_go_back_one_by_one_and_end_at_the_teacher(n: int, steps: int, degrade: float, back: float) -> None:
    method = DisBack(targets=n, degrade=degrade, backtrack=back)
    plan = method.plan(steps)
    assert plan.degrading <= steps / 2
    path = [method.target(step, steps) for step in range(plan.degrading, steps)]
    if not n or not plan.degrading:
        assert not any(path)
        return
    assert path[0] == n - 1
    assert all(a - b in (0, 1) for a, b in pairwise(path))
    held = [path.count(i) for i in range(n - 1, path[-1], -1)]  # of those that were followed to their end
    assert all(h == plan.switch for h in held if path[-1] < n - 1)
    if steps - plan.degrading > (n - 1) * plan.switch:
        assert path[-1] == 0


def test_the_path_leads_from_the_teacher_to_what_the_untrained_student_makes(
    teacher: Denoiser, ring_teacher: Denoiser
) -> None:
    """Along it the loss on the untrained student's samples falls, and that on real ones rises."""
    steps = 300
    method = DisBack(targets=4, degrade=0.5)
    plan = method.plan(steps)
    assert plan.every * 4 == plan.degrading == 148
    trainer = Trainer(method, copy.deepcopy(teacher), work(), steps)
    start = clone(named_tensors(trainer.nets["student"]))
    x0, cond0 = made(method, trainer.nets)
    for step in trainer.iterate():
        if step == plan.degrading:
            break
    nets: dict[str, Any] = trainer.nets
    assert equal(start, named_tensors(nets["student"])), "the generator is frozen while the path is recorded"
    path = [teacher]
    for i in range(3):
        path.append(copy.deepcopy(nets["fake"]))
        put(nets["path"].rows[i], path[-1])
    path.append(nets["fake"])  # c_N

    x, cond = ring_teacher.net.draw(2000, torch.Generator().manual_seed(1))  # type: ignore[operator]
    on_made = [denoising(net, x0, cond0) for net in path]
    on_real = [denoising(net, x, cond) for net in path]
    assert all(a > b for a, b in pairwise(on_made)), on_made
    assert on_real[0] < on_real[2] < on_real[4], on_real

    # The mismatch that the path is for: what the student's real score and its fake score say of its first samples.
    ratio = torch.full((1000,), 0.5)
    noisy = x0 + 0.5 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        said = [net(noisy, ratio, cond0) for net in path]
    near, far = (float((said[i] - said[4]).norm(dim=1).mean()) for i in (3, 0))
    assert near < 0.5 * far, (near, far)


def test_targets_are_frozen_switched_in_turn_and_the_last_is_the_teacher(
    teacher: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, method = 40, DisBack(targets=3, degrade=0.2, backtrack=0.5)
    plan = method.plan(steps)
    given = copy.deepcopy(teacher)
    trainer = Trainer(method, given, work(16), steps)
    asked: list[tuple[int, Any, torch.Tensor]] = []
    plain = DMD.probe

    def probe(self: Any, nets: Any, sample: Any, draw: Any) -> Any:
        asked.append((draw.step, nets["teacher"], vector(nets["teacher"])))
        return plain(self, nets, sample, draw)

    monkeypatch.setattr(DMD, "probe", probe)
    trainer.go()
    rows = trainer.nets["path"].rows
    assert [step for step, _, _ in asked] == list(range(steps - plan.degrading)), "the base counts its own steps"
    for step, net, weights in asked:
        i = method.target(step + plan.degrading, steps)
        if i:
            assert net is not given
            assert torch.equal(weights, rows[i - 1])  # type: ignore[index]
        else:
            assert net is given
            assert torch.equal(weights, vector(teacher))
    assert {method.target(s + plan.degrading, steps) for s, _, _ in asked} == {2, 1, 0}
    assert not torch.equal(rows[0], rows[1])  # type: ignore[index]


def test_it_resumes_on_the_path(teacher: Denoiser, tmp_path: Any) -> None:
    """Also in the middle of a target, after which nothing but the state says which it is."""
    steps, method = 24, DisBack(targets=3, degrade=0.25, backtrack=0.7)
    straight = Trainer(method, teacher, work(16), steps)
    straight.go()
    for stop in (3, 9, 14):
        broken = Trainer(method, teacher, work(16), steps, tmp_path / str(stop))
        for step in broken.iterate():
            if step == stop:
                broken.save()
                break
        resumed = Trainer(method, teacher, work(16), steps, tmp_path / str(stop))
        resumed.go()
        for role in straight.nets:
            assert equal(named_tensors(straight.nets[role]), named_tensors(resumed.nets[role])), (stop, role)


def test_the_fake_score_starts_afresh_from_the_end_of_the_path(teacher: Denoiser) -> None:
    method = DisBack(targets=2, degrade=0.2)
    trainer = Trainer(method, teacher, work(16), 20)
    plan = method.plan(20)
    for step in trainer.iterate():
        if step == plan.degrading:
            end = vector(trainer.nets["fake"])
            before = trainer.optimisers["fake"]
        if step == plan.degrading + 1:
            break
    assert trainer.optimisers["fake"] is not before
    assert not torch.equal(end, vector(teacher))
    moved = (vector(trainer.nets["fake"]) - end).abs().max()
    assert 0 < moved < 1e-3, "one step of Adam from where degradation ended"


def test_guidance_waits_for_the_teacher() -> None:
    method = DisBack(base=DMD(guidance=Guidance(3.0)))
    assert method.towards(2).guidance == Guidance()
    assert method.towards(0).guidance == Guidance(3.0)
    unconditional = DisBack(base=DMD(guidance=Guidance(0.0)))
    assert unconditional.towards(2).guidance == Guidance(0.0), "this is what the fake score learns too"


def test_a_discriminator_waits_too(digit_teacher: Denoiser, digit_work: Work) -> None:
    base = DMD(adversary=Adversary())
    method = DisBack(base=base, targets=2, degrade=0.5)
    assert method.needs == "images"
    trainer = Trainer(method, digit_teacher, dataclasses.replace(digit_work, batch=4), 8)
    trainer.prepare()
    assert set(trainer.once()) == {"fake/denoising"}
    while trainer.step < method.plan(8).degrading:
        trainer.once()
    assert set(trainer.once()) == {"fake/denoising", "fake/discriminator", "student/scores", "student/adversary"}


def distance(exact: Denoiser, x: torch.Tensor, cond: torch.Tensor) -> float:
    """Energy distance to the ring, class by class."""
    real, labels = exact.net.draw(4000, torch.Generator().manual_seed(11))  # type: ignore[operator]
    total = 0.0
    for c in range(4):
        a, b = x[cond == c], real[labels == c]
        total += float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())
    return total / 4


def test_it_teaches_the_ring(teacher: Denoiser, ring_teacher: Denoiser) -> None:
    base = DMD(lr=1e-3, critic_lr=3e-3)
    method = DisBack(base=base, targets=4)
    trainer = Trainer(method, teacher, work(64), 160)
    before = distance(ring_teacher, *made(method, trainer.nets))
    trainer.go()
    after = distance(ring_teacher, *made(method, trainer.nets))
    assert after < 0.5 * before, (before, after)  # measured: 0.11 of 0.30, as the base method alone
