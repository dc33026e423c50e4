"""MSD: students that share a teacher and nothing else."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from atoll.core.errors import AtollError
from atoll.core.tree import clone, equal, named_tensors
from atoll.data.dataset import Dataset
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Conditions, Draw, Images, Work
from atoll.diffusion.exact import PlaneNet, ring
from atoll.diffusion.gan_heads import Adversary
from atoll.diffusion.methods.disback import DisBack
from atoll.diffusion.methods.dmd import DMD
from atoll.diffusion.methods.lcsc import LCSC
from atoll.diffusion.methods.msd import MSD
from atoll.diffusion.pairs import TeacherPairStore
from atoll.diffusion.rows import Rows
from atoll.diffusion.schedules import EDM
from atoll.diffusion.solvers import Sampler
from atoll.diffusion.trail import vector
from atoll.diffusion.trainer import Trainer
from atoll.models.mlp import MLP
from atoll.models.unet import UNet

FAST = DMD(lr=1e-3, critic_lr=3e-3)
PAIRS = Rows(TeacherPairStore(count=400, sampler=Sampler(steps=8)))


def plane(width: int = 32) -> Denoiser:
    return Denoiser(PlaneNet(2, 4, width=width), EDM(), "edm", classes=4, sigma_data=1.4)


def work(batch: int = 16, seed: int = 0) -> Work:
    return Work((2,), Conditions.classes(4), seed=seed, batch=batch, build=plane)


def run(method: Any, teacher: Denoiser, given: Work, steps: int) -> Trainer:
    trainer = Trainer(method, copy.deepcopy(teacher), given, steps)
    trainer.go()
    return trainer


def made(method: Any, trainer: Trainer, cond: torch.Tensor) -> torch.Tensor:
    z = torch.randn(len(cond), *trainer.work.shape, generator=torch.Generator().manual_seed(3))
    out: torch.Tensor = method.generate(trainer.nets, z, cond, 1, torch.Generator().manual_seed(4))
    return out


@pytest.mark.parametrize("base", [DMD(), DMD(adversary=Adversary())], ids=["dmd", "dmd2"])
def test_one_student_is_the_base_method(base: Any, digit_teacher: Denoiser, digit_work: Work) -> None:
    method = MSD(base=base, students=1)
    assert method.needs == base.needs
    given = dataclasses.replace(digit_work, batch=6)
    ours, theirs = run(method, digit_teacher, given, 4), run(base, digit_teacher, given, 4)
    for role, net in theirs.nets.items():
        mine = ours.nets[role if role == "teacher" else f"0.{role}"]
        assert equal(named_tensors(mine), named_tensors(net)), role
    cond = torch.arange(10)
    assert torch.equal(made(method, ours, cond), made(base, theirs, cond))


def test_a_student_does_not_notice_the_others() -> None:
    """The first of three is, bit for bit, the base method on the first part alone."""
    method = MSD(base=FAST, students=3)
    ours = run(method, ring(), work(), 8)
    assert ours.nets["router"].table.tolist() == [0, 0, 1, 2]  # type: ignore[union-attr,operator]
    alone = run(FAST, ring(), dataclasses.replace(work(), conditions=Conditions(torch.tensor([0, 1]))), 8)
    for role in ("student", "student_ema", "fake"):
        assert equal(named_tensors(ours.nets[f"0.{role}"]), named_tensors(alone.nets[role])), role
    assert len({round(float(vector(ours.nets[f"{k}.fake"]).sum()), 6) for k in range(3)}) == 3
    assert sum(r.module is ours.teacher for r in ours.roles.values()) == 1, "one teacher for all"
    assert ours.bill.samples == 3 * alone.bill.samples

    draw = Draw(ours.work, torch.Generator().manual_seed(0), 5, 8, ours.material)
    before = method.draw_of(2, ours.nets, draw).noise()
    method.draw_of(0, ours.nets, draw).noise()
    assert torch.equal(method.draw_of(2, ours.nets, draw).noise(), before), "each has numbers of its own"


def test_one_student_takes_rows_as_they_are(digit_teacher: Denoiser, digit_images: Images) -> None:
    """Also those that nobody has labelled."""
    data = digit_images.data
    bare = Images(Dataset({"x": data.column("x")}, data.info))
    given = Work((1, 8, 8), Conditions.classes(1), bare)
    assert MSD(students=1).part(given, MSD(students=1).router(digit_teacher, given), 0) is given


def test_a_student_is_asked_for_its_own_conditions_alone(
    digit_teacher: Denoiser, digit_images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conditions, and images where the base method wants some."""
    seen: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    real: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    at = [-1]
    plain = DMD.updates

    def updates(self: Any, nets: Any, draw: Any) -> Any:
        at[0] = (at[0] + 1) % 3
        seen[at[0]] |= set(draw.cond(200).tolist())
        x, y = draw.real(200)
        real[at[0]] |= set(y.tolist())
        assert x.shape == (200, 1, 8, 8)
        return plain(self, nets, draw)

    monkeypatch.setattr(DMD, "updates", updates)
    rows = torch.arange(500, 1500)
    given = Work((1, 8, 8), Conditions.classes(10), dataclasses.replace(digit_images, rows=rows), batch=4)
    trainer = run(MSD(base=DMD(adversary=Adversary()), students=3), digit_teacher, given, 1)
    blocks = {0: {0, 1, 2, 3}, 1: {4, 5, 6}, 2: {7, 8, 9}}
    assert seen == blocks
    assert real == blocks
    assert sorted(torch.cat([trainer.material[f"{k}.images"] for k in range(3)]).tolist()) == rows.tolist()


def test_a_sample_costs_one_call_whatever_the_number_of_students(monkeypatch: pytest.MonkeyPatch) -> None:
    method = MSD(base=FAST, students=4)
    trainer = run(method, ring(), work(), 1)
    asked: list[tuple[int, list[int]]] = []
    plain = Denoiser.forward
    nets = trainer.nets
    averages = {id(nets[f"{k}.student_ema"]): k for k in range(4)}

    def forward(self: Denoiser, x: Any, t: Any, cond: Any, **more: Any) -> Any:
        asked.append((averages[id(self)], cond.tolist()))
        return plain(self, x, t, cond, **more)

    monkeypatch.setattr(Denoiser, "forward", forward)
    cond = torch.tensor([2, 0, 2, 3, 1, 0])
    out = made(method, trainer, cond)
    assert sorted(asked) == [(0, [0, 0]), (1, [1]), (2, [2, 2]), (3, [3])]
    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        together: Any = nets["student_ema"]
        assert torch.equal(together(2.5 * z, torch.tensor(2.5), cond), out), "`student` is all of them"


def test_other_partitions(digit_teacher: Denoiser, digit_work: Work) -> None:
    router = MSD(partition="random", students=5).router(digit_teacher, digit_work)
    assert router.table is not None
    assert router.table.bincount().tolist() == [2] * 5
    assert (router.table.diff() < 0).any()


class Told(nn.Module):
    """A network for points whose conditions are embeddings ``[B, 3]``."""

    taps = ("net",)

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(torch.cat([x, t[:, None], cond], 1))
        return out


def test_embeddings_are_split_into_clusters(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randn(20, 3, generator=generator) + 6 * torch.eye(3)[k] for k in range(2)])
    teacher = Denoiser(Told(), EDM(), "edm", null=torch.zeros(3))
    method = MSD(base=FAST, students=2, network=lambda: Denoiser(Told(8), EDM(), "edm"), match=0.5, match_rows=PAIRS)
    given = Work((2,), Conditions(rows), batch=8)
    trainer = run(method, teacher, given, 4)
    which = trainer.nets["router"](rows)
    assert which[:20].unique().numel() == which[20:].unique().numel() == 1
    assert which[0] != which[20]
    for k in range(2):
        assert (trainer.nets["router"](trainer.material[f"{k}.match.cond"]) == k).all()
    assert torch.isfinite(made(method, trainer, rows)).all()
    with pytest.raises(AtollError, match="no random partition"):
        MSD(partition="random").roles(teacher, given)


# ------------------------------------------------------------------------------------------- smaller students


def test_smaller_students_first_match_the_teacher() -> None:
    method = MSD(base=FAST, students=2, network=lambda: plane(16), match=0.5, match_rows=PAIRS)
    assert method.needs == "teacher samples"
    trainer = Trainer(method, ring(), work(32), 120)
    nets = trainer.nets
    assert len(vector(nets["0.student"])) < len(vector(nets["0.fake"])), "fake scores keep the teacher's size"
    assert nets["0.match"] is nets["0.student"]
    fakes = [clone(named_tensors(nets[f"{k}.fake"])) for k in range(2)]
    losses: list[dict[str, float]] = []
    for step in trainer.iterate(lambda _, said: losses.append(said)):
        if step == 60:
            matched = [vector(nets[f"{k}.student"]) for k in range(2)]
            assert all(equal(named_tensors(nets[f"{k}.fake"]), fakes[k]) for k in range(2))
        if step == 61:
            for k in range(2):  # the average starts where matching ended
                moved = (vector(nets[f"{k}.student_ema"]) - matched[k]).abs().max()
                assert 0 < moved < 1e-3
    assert set(losses[0]) == {"0.match/teacher", "1.match/teacher"}
    assert set(losses[-1]) == {f"{k}.{name}" for k in range(2) for name in ("fake/denoising", "student/scores")}
    for k in range(2):
        early, late = (sum(said[f"{k}.match/teacher"] for said in losses[a:b]) for a, b in ((0, 10), (50, 60)))
        assert late < 0.5 * early


def test_matching_is_the_distance_to_the_teacher_and_leaves_others_alone() -> None:
    method = MSD(base=FAST, students=2, network=plane, match=0.5, match_rows=PAIRS)
    trainer = Trainer(method, ring(), work(), 4)
    trainer.prepare()
    before = {name: vector(net) for name, net in trainer.nets.items() if name != "router"}
    trainer.once()
    after = trainer.nets
    changed = {name for name, old in before.items() if not torch.equal(old, vector(after[name]))}
    assert changed == {"0.student", "0.match", "1.student", "1.match", "student"}
    # A student that says what the teacher says has nothing to learn.
    own = {"student": after["teacher"], "teacher": after["teacher"]}
    draw = Draw(trainer.work, torch.Generator().manual_seed(0), 0, 4, trainer.material)
    mine = method.draw_of(1, after, draw)
    assert float(method.matching_loss(own, mine)) == 0
    assert set(mine.material["match.cond"].tolist()) == {2, 3}


def test_the_base_method_knows_when_its_part_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    plain = DMD.updates

    def updates(self: Any, nets: Any, draw: Any) -> Any:
        told.append(("updates", draw.step, draw.steps))
        return plain(self, nets, draw)

    def begin(self: Any, nets: Any, step: int, steps: int) -> tuple[str, ...]:
        told.append(("begin", step, steps))
        return ("fake",)

    monkeypatch.setattr(DMD, "updates", updates)
    monkeypatch.setattr(DMD, "begin", begin)
    method = MSD(base=FAST, students=2, network=plane, match=0.5, match_rows=PAIRS)
    run(method, ring(), work(), 6)
    assert told == [(what, step, 3) for step in range(3) for what in ("begin", "begin", "updates", "updates")]
    assert list(method.begin(Trainer(method, ring(), work(), 6).nets, 3, 6)) == ["0.fake", "1.fake"]


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_it_resumes_before_and_after_matching(stop: int, tmp_path: Path) -> None:
    method = MSD(base=FAST, students=2, network=lambda: plane(16), match=0.5, match_rows=PAIRS)
    straight = Trainer(method, ring(), work(), 8, tmp_path / "straight")
    straight.go()
    broken = Trainer(method, ring(), work(), 8, tmp_path / "broken")
    for step in broken.iterate():
        if step == stop:
            broken.save()
            break
    resumed = Trainer(method, ring(), work(), 8, tmp_path / "broken")
    resumed.go()
    for role in straight.nets:
        assert equal(named_tensors(straight.nets[role]), named_tensors(resumed.nets[role])), role


def test_a_student_may_be_any_network_of_the_toolkit(digit_teacher: Denoiser, digit_work: Work) -> None:
    images = Rows()
    method = MSD(students=2, network=UNet(width=4), match=0.5, match_rows=images)
    assert method.needs == "images"
    trainer = run(method, digit_teacher, dataclasses.replace(digit_work, batch=4), 2)
    assert len(vector(trainer.nets["0.student"])) < len(vector(digit_teacher))
    assert made(method, trainer, torch.arange(10)).shape == (10, 1, 8, 8)
    assert MSD(network=UNet(width=4)).needs == "teacher samples"
    assert MSD(network=UNet(width=4), match=0).needs == MSD().needs == "nothing"
    with pytest.raises(AtollError, match="does not take a noise level"):
        MSD(network=MLP()).roles(digit_teacher, digit_work)


def distance(exact: Denoiser, x: torch.Tensor, cond: torch.Tensor) -> float:
    """Energy distance to the ring, class by class."""
    real, labels = exact.net.draw(2000, torch.Generator().manual_seed(11))  # type: ignore[operator]
    total = 0.0
    for c in range(4):
        a, b = x[cond == c], real[labels == c]
        total += float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())
    return total / 4


def test_matching_is_a_far_better_start_than_random_weights(ring_teacher: Denoiser) -> None:
    """At equal steps in all, those of matching included, and at the usual step size: with one ten times as large,
    points are so easy that random weights win."""
    cond, found = torch.arange(1000) % 4, {}
    for match in (0.0, 0.6):
        method = MSD(base=DMD(), students=2, network=lambda: plane(48), match=match, match_rows=PAIRS)
        found[match] = distance(ring_teacher, made(method, run(method, ring_teacher, work(64), 100), cond), cond)
    assert found[0.6] < 0.5 * found[0.0], found


def test_it_composes() -> None:
    """Around a method that wraps another, and inside one."""
    inner = MSD(base=DisBack(base=FAST, targets=2, degrade=0.3), students=2)
    trainer = run(inner, ring(), work(), 8)
    assert {"0.target", "1.path", "1.student_ema"} <= trainer.nets.keys()

    outer = LCSC(base=MSD(base=FAST), metric=lambda net: float(vector(net).square().sum()), checkpoints=3, record=0.5)
    trainer = run(outer, ring(), work(), 12)
    nets: dict[str, Any] = trainer.nets
    mixed = nets["trail"].trail.mix(nets["search"].chosen)
    assert torch.equal(vector(nets["student"]), mixed)
    halves = [vector(nets[f"{k}.student_ema"]) for k in range(2)]
    assert torch.equal(torch.cat(halves), mixed), "what is sampled is what was found"
    assert torch.isfinite(made(outer, trainer, torch.arange(4))).all()
