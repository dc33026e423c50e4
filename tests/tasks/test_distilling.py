"""Distilling as a task: how a student is judged, kept, and what cannot be distilled at sites."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.core.errors import AtollError, DataError, RecipeError
from atoll.core.tree import clone, equal, named_tensors
from atoll.data.dataset import Dataset, Federation
from atoll.data.sources.sklearn_table import SklearnTable
from atoll.diffusion.diffusers_model import load_denoiser
from atoll.diffusion.distiller import Distiller
from atoll.diffusion.gan_heads import Adversary
from atoll.diffusion.latent_reward import LatentReward
from atoll.diffusion.methods.cd_ct import CdCt
from atoll.diffusion.methods.dmd import DMD
from atoll.diffusion.methods.dollar import Dollar
from atoll.diffusion.methods.sana_sprint import SanaSprint
from atoll.diffusion.pairs import TeacherPairStore
from atoll.diffusion.rewards import InkFraction
from atoll.diffusion.rows import Rows
from atoll.diffusion.student import load_student
from atoll.federated.check import check_method
from atoll.federated.methods.distil_at_sites import distil_at_sites
from atoll.federated.methods.fedavg import fedavg
from atoll.models.unet import UNet
from atoll.tasks.classification import Classification
from atoll.tasks.distilling import Distilling, energy_distance


@given(st.integers(0, 2**31), st.floats(0.5, 3))
@settings(max_examples=20, deadline=None)
def test_energy_distance_tells_distributions_apart(seed: int, shift: float) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(300, 4, generator=g), torch.randn(300, 4, generator=g)
    assert abs(energy_distance(a, b)) < 0.1
    assert energy_distance(a, b + shift) > 0.1
    assert energy_distance(a, b + shift) == pytest.approx(energy_distance(b + shift, a))


def test_energy_distance_of_two_points_is_known() -> None:
    zeros, ones = torch.zeros(2, 9), torch.ones(3, 9)
    assert energy_distance(zeros, ones) == pytest.approx(2.0)  # 2 * sqrt(9) / sqrt(9)
    mixed = torch.tensor([[0.0], [1.0]])
    assert energy_distance(mixed, mixed) == pytest.approx(2 * 0.5 - 1 - 1)


def test_evaluation_is_pure(digits: Dataset, generator: str) -> None:
    task = Distilling(digits.info, start=generator, samples=60)
    model = task.model(0).train()
    before, state = clone(named_tensors(model)), torch.get_rng_state()
    found = task.evaluate(model, digits)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert task.evaluate(model, digits) == found
    assert task.flops(model, digits, "cpu") > 0
    assert equal(clone(named_tensors(model)), before)
    assert model.training
    assert task.evaluate(model, digits.select(range(1))) == {}


def test_the_student_that_is_kept_draws_as_the_model_does(digits: Dataset, generator: str, tmp_path: Path) -> None:
    task = Distilling(digits.info, start=generator, method=DMD(adversary=Adversary()))
    model = task.model(0)
    with torch.no_grad():
        for p in model.nets["student"].parameters():
            p += 0.05
    task.save(model, tmp_path, {"method": "here"})
    student = load_student(tmp_path)
    z, classes = torch.randn(10, 1, 8, 8), torch.arange(10)
    assert torch.equal(student.method.generate(student.nets, z, classes, 1), model(z, classes))
    assert not torch.equal(model(z, classes), Distilling(digits.info, start=generator).model(0)(z, classes))
    assert load_denoiser(tmp_path).classes == 10  # and it can be a teacher again


def test_an_adapter_is_what_learns(digits: Dataset, generator: str) -> None:
    whole, lean = (Distilling(digits.info, start=generator, lora=rank).model(0) for rank in (None, 2))
    sizes = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (whole, lean)]
    assert 0 < sizes[1] < sizes[0] / 4
    assert torch.equal(whole(torch.ones(3, 1, 8, 8), torch.arange(3)), lean(torch.ones(3, 1, 8, 8), torch.arange(3)))


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (SanaSprint(rows=Rows(made=TeacherPairStore(count=8))), "a server can make"),
        (CdCt(target="average"), "let `target` be `itself`"),
        (Dollar(taste=LatentReward(InkFraction())), "remembers samples"),
    ],
)
def test_what_sites_cannot_do_is_said(method: Distiller, why: str, digits: Dataset, generator: str) -> None:
    with pytest.raises(AtollError, match=why):
        Distilling(digits.info, start=generator, method=method).model(0)


def test_its_size_is_known_before_it_takes_memory(digits: Dataset, generator: str) -> None:
    """As sites of a deployment ask it."""
    task = Distilling(digits.info, start=generator, method=DMD(adversary=Adversary()))
    with torch.device("meta"):
        counted = named_tensors(task.model(0))
    real = named_tensors(task.model(0))
    assert {n: t.shape for n, t in counted.items()} == {n: t.shape for n, t in real.items()}
    assert all(t.is_meta for t in counted.values())


def test_an_adapter_alone_is_no_beginning(digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match="an adapter alone"):
        Distilling(digits.info, start=str(tmp_path)).model(0)


def test_wrong_beginnings_are_said(digits: Dataset, generator: str) -> None:
    with pytest.raises(DataError, match="task's `start`"):
        Distilling(digits.info).model(0)
    with pytest.raises(DataError, match=r"does not make rows of \d+, which"):
        Distilling(SklearnTable("wine").load().train.info, start=generator).model(0)


def test_tasks_and_local_work_must_fit(digits: Dataset, digits_federation: Federation, generator: str) -> None:
    task = Distilling(digits.info, start=generator, method=CdCt())
    with pytest.raises(RecipeError, match="LocalSGD descends one loss, and the networks of Distilling take turns"):
        check_method(fedavg(), task, digits_federation)
    check_method(distil_at_sites(), task, digits_federation)
    with pytest.raises(AtollError, match="use `task: distilling`"):
        distil_at_sites().share.prepare(Classification(digits.info, UNet()).model(0), None)
