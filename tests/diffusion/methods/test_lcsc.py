"""LCSC as a method: a run that is recorded, and then searched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from atoll.core.tree import equal, named_tensors
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Conditions, Images, Work
from atoll.diffusion.evaluate import Judge, Reference, frechet
from atoll.diffusion.exact import PlaneNet, ring
from atoll.diffusion.methods import lcsc as module
from atoll.diffusion.methods.dmd import DMD
from atoll.diffusion.methods.edm_fm_teacher import EdmFmTeacher
from atoll.diffusion.methods.lcsc import LCSC, aim, as_images, seen_by
from atoll.diffusion.pairs import TeacherPairStore
from atoll.diffusion.rows import Rows
from atoll.diffusion.schedules import EDM, KarrasIndex, LogNormal
from atoll.diffusion.search import ema_weights
from atoll.diffusion.solvers import Sampler
from atoll.diffusion.trail import CheckpointTrail, vector
from atoll.diffusion.trainer import Trainer

FAST = DMD(law=KarrasIndex(), critic_law=LogNormal(), lr=1e-3, critic_lr=3e-3)


def size_of(net: nn.Module) -> float:
    """A cheap measure."""
    return float(vector(net).square().sum())


def work(seed: int = 0, batch: int = 16) -> Work:
    def build() -> Denoiser:
        return Denoiser(PlaneNet(2, 4, width=32), EDM(), "edm", classes=4, sigma_data=1.4)

    return Work((2,), Conditions.classes(4), seed=seed, batch=batch, build=build)


@settings(deadline=None)
@given(st.integers(2, 30), st.integers(1, 500), st.floats(0.1, 0.95), st.floats(0.05, 1))
def test_checkpoints_are_saved_at_a_fixed_interval_up_to_the_end(
    count: int, steps: int, record: float, window: float
) -> None:
    method = LCSC(checkpoints=count, record=record, window=window, metric=size_of)
    train = method.training(steps)
    places = {step: method.due(step, steps) for step in range(train)}
    saved = {step: place for step, place in places.items() if place is not None}
    assert list(saved.values()) == list(range(count - len(saved), count))
    assert train - 1 in saved
    assert len(saved) == min(count, train)
    assert len({b - a for a, b in zip(list(saved)[:-1], list(saved)[1:], strict=True)}) <= 1
    if window * train >= count:
        assert min(saved) >= (1 - window) * train - 1


def test_the_run_is_the_base_methods_and_then_the_search_alone() -> None:
    method = LCSC(base=FAST, checkpoints=4, record=0.5, metric=size_of)
    ours, theirs = Trainer(method, ring(), work(), 40), Trainer(FAST, ring(), work(), 20)
    kept = []
    for step in theirs.iterate():
        if method.due(step - 1, 40) is not None:
            kept.append(vector(theirs.nets["student"]))
    losses = []
    ours.go(lambda step, said: losses.append(said))
    rows: Any = ours.nets["trail"].rows
    assert torch.equal(rows, torch.stack(kept)), "live weights, not the average"
    assert equal(named_tensors(theirs.nets["fake"]), named_tensors(ours.nets["fake"]))
    assert all(losses[:20])
    assert not any(losses[20:])
    assert ours.bill.samples == theirs.bill.samples


def test_the_base_method_knows_when_its_part_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its schedules run to the end of the training, not of the search."""
    told: list[tuple[str, int, int]] = []
    plain = DMD.updates

    def updates(self: Any, nets: Any, draw: Any) -> Any:
        told.append(("updates", draw.step, draw.steps))
        return plain(self, nets, draw)

    def begin(self: Any, nets: Any, step: int, steps: int) -> tuple[str, ...]:
        told.append(("begin", step, steps))
        return ()

    monkeypatch.setattr(DMD, "updates", updates)
    monkeypatch.setattr(DMD, "begin", begin)
    Trainer(LCSC(base=FAST, checkpoints=2, record=0.5, metric=size_of), ring(), work(), 6).go()
    assert told == [(what, step, 3) for step in range(3) for what in ("begin", "updates")]


def test_a_short_run_is_filled_with_its_beginning() -> None:
    method = LCSC(base=FAST, checkpoints=6, record=0.5, metric=size_of)
    trainer = Trainer(method, ring(), work(), 6)
    start = vector(trainer.nets["student"])
    trainer.go()
    rows: Any = trainer.nets["trail"].rows
    assert [torch.equal(row, start) for row in rows] == [True] * 3 + [False] * 3


def test_one_model_comes_out_and_it_is_no_worse_than_any_start() -> None:
    method = LCSC(base=FAST, checkpoints=5, record=0.5, metric=size_of)
    trainer = Trainer(method, ring(), work(), 60)
    trainer.go()
    nets: dict[str, Any] = trainer.nets
    trail, found = nets["trail"].trail, nets["search"].read()
    chosen = nets["search"].chosen
    assert torch.equal(chosen, found.coefficients[0])
    assert float(chosen.sum()) == pytest.approx(1)
    assert torch.equal(vector(nets["student"]), trail.mix(chosen))
    assert torch.equal(vector(nets["student"]), vector(nets["student_ema"])), "whoever looks finds the same model"
    starts = [float(trail.mix(a).square().sum()) for a in method.how.seeds(5)]
    assert float(found.floor) == min(starts)
    assert size_of(nets["student"]) == float(found.scores[0]) < min(starts)
    z, cond = torch.randn(8, 2), torch.arange(8) % 4
    assert torch.equal(method.generate(nets, z, cond, 1), FAST.generate(nets, z, cond, 1))


def test_it_resumes_within_the_search(tmp_path: Path) -> None:
    method = LCSC(base=FAST, checkpoints=4, record=0.5, metric=size_of)
    straight = Trainer(method, ring(), work(), 20)
    straight.go()
    for stop in (4, 9, 10, 15):
        broken = Trainer(method, ring(), work(), 20, tmp_path / str(stop))
        for step in broken.iterate():
            if step == stop:
                broken.save()
                break
        resumed = Trainer(method, ring(), work(), 20, tmp_path / str(stop))
        resumed.go()
        for role in straight.nets:
            assert equal(named_tensors(straight.nets[role]), named_tensors(resumed.nets[role])), (stop, role)


def test_finalists_are_scored_again_on_other_noise(ring_work: Callable[..., Work]) -> None:
    """On points, the reference is their own mean and covariance."""
    made = dataclasses.replace(ring_work(16, images=True), build=work().build)
    assert made.images is not None
    method = LCSC(base=FAST, checkpoints=4, record=0.5, samples=60, finalists=3)
    assert method.needs == "images"
    seeds: list[tuple[int, int]] = []
    plain = module.FewStepFrechet.__call__

    def call(self: Any, net: nn.Module) -> float:
        seeds.append((self.seed, self.samples))
        return plain(self, net)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.FewStepFrechet, "__call__", call)
        trainer = Trainer(method, ring(), made, 20)
        trainer.go()
    x, _ = made.images.all()
    torch.testing.assert_close(trainer.material["lcsc.mean"], x.double().mean(0))
    torch.testing.assert_close(trainer.material["lcsc.cov"], x.double().T.cov())
    first, last = seeds[0], seeds[-1]
    assert first == (0, 60)
    assert last[1] == 240
    assert last[0] != 0
    again = sum(s == last for s in seeds)
    assert 1 <= again <= 3
    assert len(seeds) == len(method.how.seeds(4)) + 9 + again
    found: Any = trainer.nets["search"]
    ranking = found.read()
    assert any(torch.equal(found.chosen, a) for a in ranking.finalists(3))
    assert torch.equal(vector(trainer.nets["student"]), found_mix(trainer))


def found_mix(trainer: Trainer) -> torch.Tensor:
    nets: dict[str, Any] = trainer.nets
    return CheckpointTrail(nets["trail"].rows).mix(nets["search"].chosen)


def test_the_aim_may_be_what_the_teacher_makes() -> None:
    """Then nobody's images are needed."""
    rows = Rows(TeacherPairStore(count=200, sampler=Sampler(steps=6)))
    method = LCSC(base=FAST, checkpoints=3, record=0.5, samples=60, reference=rows)
    assert method.needs == "teacher samples"
    trainer = Trainer(method, ring(), work(), 8)
    trainer.go()
    assert trainer.material["lcsc.cov"].diagonal().tolist() == pytest.approx([2.0, 2.0], rel=0.25)  # radius 2
    assert LCSC(metric=size_of).needs == "nothing"
    assert LCSC(base=EdmFmTeacher(), metric=size_of).needs == "images"


def test_images_are_seen_through_a_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights travel with the material, so that a resumed run sees what the first one saw."""
    x, y = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 10
    images = as_images({"x": x, "cond": y}, 10)
    judge = Judge((1, 8, 8), 10)
    asked: list[Images] = []
    monkeypatch.setattr(module, "make_judge", lambda images: (asked.append(images), judge)[1])
    found = aim(images)
    assert asked == [images]
    reference = Reference.of(images, judge)
    assert torch.equal(found["mean"], reference.mean)
    assert torch.equal(found["cov"], reference.cov)
    with torch.no_grad():
        f = seen_by(found, (1, 8, 8))(x).double()
        assert torch.equal(f, judge.features(x).double())
    assert frechet(found["mean"], found["cov"], f.mean(0), f.T.cov()) < 1e-4
    embedded = as_images({"x": x, "cond": torch.randn(300, 5)}, None)  # no classes, no judge
    assert set(aim(embedded)) == {"mean", "cov"}
    assert aim(embedded)["cov"].shape == (64, 64)


# ------------------------------------------------------------------------------------------- on the ring


def samples(student: Any, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    z, cond = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)), torch.arange(n) % 4
    with torch.no_grad():
        return student(2.5 * z, torch.tensor(2.5), cond), cond


def distance(exact: Denoiser, x: torch.Tensor, cond: torch.Tensor, seed: int) -> float:
    """Energy distance to the ring, class by class."""
    real, labels = exact.net.draw(2000, torch.Generator().manual_seed(seed))  # type: ignore[operator]
    total = 0.0
    for c in range(4):
        a, b = x[cond == c], real[labels == c]
        total += float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())
    return total / 4


def test_on_noise_that_the_search_never_saw_it_beats_the_last_checkpoint(ring_teacher: Denoiser) -> None:
    """Of a run too short to settle. The best average of its checkpoints is about as good (see the docstring)."""

    def metric(net: nn.Module) -> float:
        return distance(ring_teacher, *samples(net, 400, 3), seed=11)

    method = LCSC(base=FAST, metric=metric, checkpoints=12, record=0.7)
    trainer = Trainer(method, ring_teacher, work(batch=64), 160)
    trainer.go()
    nets: dict[str, Any] = trainer.nets
    trail: CheckpointTrail = nets["trail"].trail

    def held_out() -> float:
        return sum(distance(ring_teacher, *samples(nets["student"], 1500, 100 + i), seed=50 + i) for i in range(2)) / 2

    found = held_out()
    trail.put(len(trail) - 1, nets["student"])
    last = held_out()
    averages = []
    for rate in method.how.rates:
        nets["student"].requires_grad_(False)
        module.put(trail.mix(ema_weights(12, rate)), nets["student"])
        averages.append(held_out())
    assert found < 0.75 * last, (found, last)
    assert found < 1.1 * min(averages), (found, averages)
