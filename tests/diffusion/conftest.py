"""Two small worlds: points on a ring with an exact teacher, and handwritten digits with a tiny network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from atoll.data.dataset import Dataset, Info
from atoll.data.sources.digits import Digits
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Conditions, Images, Work
from atoll.diffusion.exact import PlaneNet, ring
from atoll.diffusion.schedules import EDM
from atoll.diffusion.teacher import make_denoiser
from atoll.models.unet import UNet


@pytest.fixture
def ring_teacher() -> Denoiser:
    """Eight Gaussians on a ring, two to a class; it knows its own density (``.net``)."""
    return ring()


@pytest.fixture
def ring_work(ring_teacher: Denoiser) -> Callable[..., Work]:
    """``ring_work(batch=..., seed=..., images=True)``: what a method needs to learn from the ring."""

    def make(batch: int = 256, seed: int = 0, images: bool = False, numbers: int = 0) -> Work:
        def build() -> Denoiser:
            return Denoiser(PlaneNet(2, 4, numbers=numbers), EDM(), "edm", classes=4, sigma_data=1.4)

        rows = None
        if images:
            x, y = ring_teacher.net.draw(4000, torch.Generator().manual_seed(seed))  # type: ignore[operator]
            info = Info(name="ring", shape=(2,), num_classes=4)
            rows = Images(Dataset({"x": x, "y": y}, info), sigma_data=1.0)  # as they are
        return Work((2,), Conditions.classes(4), rows, seed, batch, build=build)

    return make


@pytest.fixture(scope="session")
def digit_images() -> Images:
    """Handwritten digits, 8 x 8, of standard deviation 1/2."""
    return Images(Digits().load().train)


@pytest.fixture
def digit_teacher(digit_images: Images) -> Denoiser:
    """A tiny network for digits, with random weights in every layer (an untrained one starts with zeros)."""
    made = make_denoiser(UNet(width=8), digit_images.data.info, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return made


@pytest.fixture
def digit_work(digit_images: Images) -> Work:
    return Work(digit_images.data.info.shape, Conditions.classes(10), digit_images, seed=3, batch=16)
