"""The stand-in for a pretrained model: trained once per machine, kept under a hash."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.core.errors import DataError
from atoll.core.tree import clone, equal, named_tensors
from atoll.diffusion import teacher as module
from atoll.diffusion.distiller import Images
from atoll.diffusion.schedules import EDM, RF
from atoll.diffusion.teacher import Teacher, make_denoiser
from atoll.diffusion.trainer import Trainer
from atoll.models.dit import DiT
from atoll.models.mlp import MLP
from atoll.models.unet import UNet

SMALL: dict[str, Any] = {"model": UNet(width=8), "steps": 4, "batch": 8}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "atoll" / "teachers"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every step of training; every step is saved."""
    done: list[int] = []
    once = Trainer.once

    def counted(self: Trainer) -> dict[str, float]:
        done.append(self.step)
        return once(self)

    monkeypatch.setattr(Trainer, "once", counted)
    monkeypatch.setattr(module, "Trainer", functools.partial(Trainer, save_every=0.0))
    return done


def test_it_is_trained_once(digit_images: Images, steps: list[int], cache: Path) -> None:
    first = Teacher(**SMALL).denoiser(digit_images)
    assert steps == [0, 1, 2, 3]
    again = Teacher(**SMALL).denoiser(digit_images)
    assert len(steps) == 4
    assert equal(named_tensors(first), named_tensors(again))
    untrained = make_denoiser(SMALL["model"], digit_images.data.info, 0)
    assert not equal(named_tensors(first), named_tensors(untrained))
    for made in (first, again):
        assert not made.training
        assert all(p.requires_grad for p in made.parameters())
    assert [p.suffix for p in cache.iterdir()] == [".safetensors"]  # nothing half done is left


@pytest.mark.parametrize(
    "change", [{"steps": 5}, {"batch": 9}, {"lr": 1e-3}, {"seed": 1}, {"kind": "flow"}, {"model": UNet(width=12)}],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_another_training_is_another_model(change: dict[str, Any], digit_images: Images, cache: Path) -> None:
    short = {**SMALL, "steps": 1}
    Teacher(**short).denoiser(digit_images)
    Teacher(**{**short, **change}).denoiser(digit_images)
    assert len(list(cache.iterdir())) == 2


def test_other_rows_are_another_model(digit_images: Images, cache: Path) -> None:
    for images in (digit_images, Images(digit_images.data, rows=torch.arange(99)), Images(digit_images.data, 0.4)):
        Teacher(**{**SMALL, "steps": 0}).denoiser(images)
    assert len(list(cache.iterdir())) == 3


def test_an_interrupted_training_goes_on(
    digit_images: Images, steps: list[int], cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    straight = clone(named_tensors(Teacher(**SMALL).denoiser(digit_images)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    once = Trainer.once

    def dies(self: Trainer) -> dict[str, float]:
        if self.step == 2:
            raise KeyboardInterrupt
        return once(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "once", dies)
        with pytest.raises(KeyboardInterrupt):
            Teacher(**SMALL).denoiser(digit_images)
    steps.clear()
    assert equal(straight, named_tensors(Teacher(**SMALL).denoiser(digit_images)))
    assert steps == [2, 3]


def test_a_damaged_file_is_trained_again(digit_images: Images, steps: list[int], cache: Path) -> None:
    first = clone(named_tensors(Teacher(**SMALL).denoiser(digit_images)))
    (path,) = cache.iterdir()
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes(raw)
    assert equal(first, named_tensors(Teacher(**SMALL).denoiser(digit_images)))
    assert len(steps) == 8


def test_kinds_are_what_they_say(digit_images: Images) -> None:
    info = digit_images.data.info
    edm, flow = (make_denoiser(DiT(dim=16, layers=1, heads=2), info, 0, kind) for kind in ("edm", "flow"))
    assert (edm.predicts, edm.schedule, edm.sigma_data) == ("edm", EDM(), 0.5)
    assert (flow.predicts, flow.schedule, flow.classes) == ("flow", RF(), 10)
    x, cond = torch.randn(2, 1, 8, 8), torch.tensor([0, 10])  # 10 is the null class
    for made in (edm, flow):
        assert made(x, torch.tensor(0.3), cond).shape == x.shape


def test_networks_that_do_not_denoise_are_refused(digit_images: Images) -> None:
    with pytest.raises(DataError, match=r"MLP does not take a noise level; choose `unet` or `dit`"):
        make_denoiser(MLP(), digit_images.data.info, 0)
