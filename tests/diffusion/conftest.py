"""Small worlds: points on a ring with an exact teacher, one Gaussian, and handwritten digits with a tiny network."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

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


class GaussNet(nn.Module):
    """The denoiser of N(0.5, 0.3^2) in one dimension under EDM, exact as it comes, that can become any other Gaussian's
    and any affine step."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.mean = nn.Parameter(torch.zeros(9)), nn.Parameter(torch.full((9,), 0.5))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        level = t.clamp(min=1e-4).log()[:, None]
        near = (-0.5 * (level - torch.linspace(-4, 4, 9)).square()).softmax(1)  # which noise level, smoothly
        gain = (2 * (math.log(0.3) - level) + (near @ self.gain)[:, None]).sigmoid()
        return gain * x + (1 - gain) * (near @ self.mean)[:, None]


@pytest.fixture
def gauss_teacher() -> Denoiser:
    """One Gaussian in one dimension: mean 0.5, standard deviation 0.3. Copies of it can learn, in milliseconds."""
    return Denoiser(GaussNet(), EDM(), "x0", classes=1, sigma_data=0.3)


@pytest.fixture
def gauss_work() -> Work:
    return Work((1,), Conditions.classes(1), batch=256)


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
