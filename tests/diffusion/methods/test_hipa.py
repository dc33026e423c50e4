"""HiPA: losses on high frequencies, adapters that leave the model alone, one call."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from atoll.adapters import lora
from atoll.core.errors import AtollError
from atoll.core.tree import clone, equal, named_tensors
from atoll.data.dataset import Info
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Conditions, Draw, Work
from atoll.diffusion.frequencies import energy_ratio, high_frequency_loss, high_pass, sobel
from atoll.diffusion.methods.hipa import (
    HiPA,
    adaptable,
    adapters,
    merged,
    one_step,
    trainable_fraction,
    with_adapters,
    without_adapters,
)
from atoll.diffusion.pairs import TeacherPairStore
from atoll.diffusion.perceptual import RandomFeatures
from atoll.diffusion.schedules import EDM, RF, VP
from atoll.diffusion.solvers import Sampler
from atoll.diffusion.trainer import Trainer
from atoll.models.dit import DiT
from atoll.models.unet import UNet

FEW = TeacherPairStore(16, Sampler(solver="ddim", steps=3))


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shaken(denoiser: Denoiser) -> Denoiser:
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in denoiser.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return denoiser


# ---------------------------------------------------------------- frequencies


def waves(high: int, wide: int, fy: int, fx: int, phase: float) -> Tensor:
    y, x = torch.arange(high)[:, None] / high, torch.arange(wide)[None] / wide
    return (2 * math.pi * (fy * y + fx * x) + phase).cos()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(-4, 4), st.integers(0, 4), st.floats(0, 6.3), st.sampled_from([(16, 16), (12, 20), (28, 28), (9, 11)])
)
def test_the_filter_takes_the_disc_of_low_frequencies_and_nothing_else(
    fy: int, fx: int, phase: float, size: tuple[int, int]
) -> None:
    wave = waves(*size, fy, fx, phase)
    radius = math.hypot(fy / size[0], fx / size[1]) / 0.5
    if abs(radius - 0.25) < 1e-6:
        return
    kept = high_pass(wave[None, None])[0, 0]
    assert torch.allclose(kept, wave if radius > 0.25 else torch.zeros_like(wave), atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.booleans())
def test_the_loss_is_blind_to_low_frequencies(seed: int, both: bool) -> None:
    x, y = gaussian(seed, 2, 3, 16, 16), gaussian(seed + 1, 2, 3, 16, 16)
    low = sum(
        a * waves(16, 16, fy, fx, p)
        for a, fy, fx, p in [(2.0, 0, 0, 0.0), (1.5, 1, 0, 0.4), (-1.0, 1, 1, 1.0), (0.7, 0, 1, 2.0)]
    )
    moved = high_frequency_loss(x + low, y + 0.3 * low if both else y)
    assert torch.allclose(moved, high_frequency_loss(x, y), atol=1e-5)
    assert (high_frequency_loss(x + waves(16, 16, 4, 3, 0.0), y) - high_frequency_loss(x, y)).abs().max() > 1e-3


def test_edges_by_hand() -> None:
    """A step from 0 to 1 between two columns: (1 + 2 + 1) / 8 on both sides of it."""
    x = torch.zeros(1, 1, 6, 6)
    x[..., 2:5] = 1.0
    wanted = torch.tensor([0.0, 0.5, 0.5, 0.0, 0.5, 0.5]).expand(6, 6)  # it wraps: the last column is next to the first
    assert torch.allclose(sobel(x)[0, 0], wanted, atol=1e-5)
    assert torch.allclose(sobel(x.mT)[0, 0], wanted.T, atol=1e-5)


def test_both_parts_of_the_loss_count() -> None:
    x, y = gaussian(0, 1, 1, 8, 8), gaussian(1, 1, 1, 8, 8)
    a, b = high_pass(x), high_pass(y)
    wanted = (a - b).abs().mean() + (sobel(a) - sobel(b)).abs().mean()
    assert float(high_frequency_loss(x, y)) == pytest.approx(float(wanted), rel=1e-6)
    flipped = high_frequency_loss(x, -x)  # edges are the same: only the high-pass part differs
    assert float(flipped) == pytest.approx(float(2 * a.abs().mean()), rel=1e-4)


def test_a_constant_image_has_a_gradient() -> None:
    x = torch.zeros(1, 1, 8, 8, requires_grad=True)
    high_frequency_loss(x, gaussian(0, 1, 1, 8, 8)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_sharpness_of_blurred_images() -> None:
    x = gaussian(0, 4, 1, 16, 16)
    assert energy_ratio(x, x) == pytest.approx(1.0)
    assert energy_ratio(x / 2, x) == pytest.approx(0.25)
    assert energy_ratio(x - high_pass(x), x) < 1e-6


# ---------------------------------------------------------------- one step


def test_one_step_is_the_models_guess_in_pure_noise(digit_teacher: Denoiser, digit_work: Work) -> None:
    z, cond = gaussian(0, 3, *digit_work.shape), torch.arange(3)
    assert torch.equal(one_step(digit_teacher, z, cond), digit_teacher(40 * z, torch.tensor(40.0), cond))


@pytest.mark.parametrize("schedule", [RF(), VP()])
def test_a_noise_predicting_model_of_another_schedule(schedule: Any) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return 0.9 * x

    model = Denoiser(Net(), schedule, "eps")
    z, t = gaussian(0, 3, 2), schedule.time(torch.tensor(40.0))
    x_t = schedule.sigma(t) * z
    wanted = (x_t - schedule.sigma(t) * 0.9 * x_t) / schedule.alpha(t)
    assert torch.allclose(one_step(model, z, torch.zeros(3)), wanted, rtol=1e-3)


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("network", [UNet(width=8), DiT(patch=2, dim=16, layers=1, heads=2)])
def test_training_changes_adapters_alone_and_without_them_the_base_is_back(
    network: Any, digit_work: Work, digit_images: Any
) -> None:
    from atoll.diffusion.teacher import make_denoiser

    teacher = make_denoiser(network, digit_images.data.info, seed=0)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * gaussian(p.numel(), *p.shape))
    before = clone(named_tensors(teacher))
    trainer = Trainer(HiPA(FEW, rank=2, lr=1e-2), teacher, digit_work, 4)
    trainer.go()
    x, t, cond = gaussian(0, 4, *digit_work.shape), torch.full((4,), 3.0), torch.arange(4)
    for role in ("student", "student_ema"):
        student: Any = trainer.nets[role]
        base = {n.replace(".base_layer", ""): v for n, v in named_tensors(student).items() if "lora_" not in n}
        assert equal(base, before)
        assert not torch.equal(student(x, t, cond), teacher(x, t, cond))
        flags = [p.requires_grad for p in student.parameters()]
        with without_adapters(student):
            assert torch.equal(student(x, t, cond), teacher(x, t, cond))
        assert not torch.equal(student(x, t, cond), teacher(x, t, cond))
        assert flags == [p.requires_grad for p in student.parameters()]
        assert any(flags) == (role == "student")


def test_the_student_starts_as_the_teacher(digit_teacher: Denoiser, digit_work: Work) -> None:
    student = HiPA().roles(digit_teacher, digit_work)["student"].module
    z, cond = gaussian(0, 4, *digit_work.shape), torch.arange(4)
    assert torch.equal(one_step(student, z, cond), one_step(digit_teacher, z, cond))  # type: ignore[arg-type]


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 6))
def test_merging_equals_running(rank: int) -> None:
    torch.manual_seed(0)
    info = Info(name="x", shape=(1, 8, 8), num_classes=3)
    base = Denoiser(UNet(width=8).build(info, 3), EDM(), classes=3)
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    student = shaken(with_adapters(copy.deepcopy(base), rank))
    plain = merged(student)
    z, cond = gaussian(0, 4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    assert torch.allclose(one_step(plain, z, cond), one_step(student, z, cond), atol=1e-5)
    assert not torch.allclose(one_step(plain, z, cond), one_step(base, z, cond), atol=1e-3)
    assert named_tensors(plain).keys() == named_tensors(base).keys()
    assert not lora.lora_layers(plain.net)


def test_peft_reads_what_is_saved(digit_teacher: Denoiser, digit_work: Work, tmp_path: Path) -> None:
    from peft import PeftModel

    student = shaken(with_adapters(copy.deepcopy(digit_teacher), 3))
    lora.as_peft(copy.deepcopy(digit_teacher.net), adapters(student, 3)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(digit_teacher.net), tmp_path)
    x, t, cond = gaussian(0, 4, *digit_work.shape), torch.full((4,), 0.3), torch.arange(4)
    assert torch.allclose(loaded(x, t, cond), student.net(x, t, cond), atol=1e-5)
    assert not torch.allclose(loaded(x, t, cond), digit_teacher.net(x, t, cond), atol=1e-3)


def test_what_gets_an_adapter() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inward, self.deep = nn.Linear(4, 4), nn.Conv2d(4, 4, 3, groups=4)
            self.conv, self.tied, self.twin = nn.Conv2d(4, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4)
            self.twin.weight = self.tied.weight
            self.table, self.norm = nn.Embedding(3, 4), nn.LayerNorm(4)

    assert adaptable(Net()) == ["inward", "conv"]
    assert adaptable(Net(), ("conv",)) == ["conv"]
    with pytest.raises(AtollError, match="inward, conv"):
        adaptable(Net(), ("attention",))


def test_little_is_trained_in_a_large_model_and_the_share_is_reported() -> None:
    """rank (n + m) / (n m) of a layer: under 2% at a width of 1024, and a quarter of a toy."""
    layer = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    large = with_adapters(Denoiser(layer, EDM()), 8)
    assert trainable_fraction(large) == pytest.approx(8 * 2 / 1024)
    info = Info(name="x", shape=(1, 28, 28), num_classes=10)
    toy = with_adapters(Denoiser(UNet(width=32).build(info, 10), EDM()), 1)
    assert 0.015 < trainable_fraction(toy) < 0.035
    toy = with_adapters(Denoiser(UNet(width=32).build(info, 10), EDM()), 8)
    assert 0.12 < trainable_fraction(toy) < 0.28


# ---------------------------------------------------------------- the method


def test_the_losses_by_hand(digit_teacher: Denoiser, digit_work: Work) -> None:
    method = HiPA(FEW, high=2.0, cut=0.5, perceptual=RandomFeatures())
    material = method.material(digit_teacher, digit_work)
    nets = {name: role.module for name, role in method.roles(digit_teacher, digit_work).items()}
    draw = Draw(digit_work, torch.Generator().manual_seed(4), 0, 1, material)
    ((role, losses),) = list(method.updates(nets, draw))
    z, y, cond = dataclasses.replace(draw, generator=torch.Generator().manual_seed(4)).stored("z", "x", "cond")
    x = one_step(digit_teacher, z, cond)
    assert role == "student"
    assert losses.keys() == {"pixels", "perceptual", "frequencies"}
    assert torch.allclose(losses["pixels"], (x - y).square().mean((1, 2, 3)).sqrt().mean(), atol=1e-3)
    assert torch.allclose(losses["frequencies"], 2 * high_frequency_loss(x, y, 0.5).mean())
    assert HiPA(high=0.0).needs == "teacher samples"


def test_points_have_no_frequencies(ring_teacher: Denoiser) -> None:
    work = Work((2,), Conditions.classes(4))
    with pytest.raises(AtollError, match="compares frequencies of images"):
        HiPA().roles(ring_teacher, work)
    with pytest.raises(AtollError, match="nothing to adapt"):
        HiPA(high=0.0).roles(ring_teacher, work)  # the exact teacher has no layers


def test_high_frequencies_come_back(digit_images: Any, digit_work: Work) -> None:
    """A briefly trained model: one step of it lacks fine structure, and the adapters bring it back. At this size the
    pixels' loss alone does so too (0.87 of the energy without the other loss, 0.85 with four times its weight)."""
    from atoll.diffusion.methods.edm_fm_teacher import EdmFmTeacher
    from atoll.diffusion.teacher import make_denoiser

    start = make_denoiser(UNet(width=8), digit_images.data.info, seed=0)
    training = Trainer(EdmFmTeacher(lr=5e-3, ema=0.98), start, dataclasses.replace(digit_work, batch=64), 100)
    training.go()
    teacher: Any = training.nets["student_ema"]
    method = HiPA(TeacherPairStore(256, Sampler(solver="ddim", steps=10)), lr=5e-3, ema=0.9)
    trainer = Trainer(method, teacher, dataclasses.replace(digit_work, images=None, batch=32), 80)
    trainer.go()
    z, y, cond = (trainer.material[n] for n in ("z", "x", "cond"))
    made, plain = method.generate(trainer.nets, z, cond, 1), one_step(teacher, z, cond).detach()
    assert energy_ratio(plain, y) < 0.6
    assert 0.65 < energy_ratio(made, y) < 1.3
    assert (made - y).square().mean() < 0.6 * (plain - y).square().mean()
