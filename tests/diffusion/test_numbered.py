"""Further numbers for networks that were built without: ours, those of diffusers, anyone's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.core.tree import equal, named_tensors
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Conditions, Work
from atoll.diffusion.exact import PlaneNet
from atoll.diffusion.guidance import Guidance
from atoll.diffusion.numbered import Numbered, takes_numbers, time_embedders, with_numbers
from atoll.diffusion.schedules import EDM, RF

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*jit.script.* is deprecated:DeprecationWarning"
)  # diffusers, at import


class OfDiffusers(nn.Module):
    """How a user's module of diffusers is made to take ``(x, time, cond)``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        out: Tensor = self.inner(x, t, class_labels=cond, return_dict=False)[0]
        return out


class Sana(nn.Module):
    """A transformer whose time embedder stands three levels deep and whose outer one returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import SanaTransformer2DModel

        self.inner = SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
            sample_size=8,
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        out: Tensor = self.inner(x, encoder_hidden_states=cond, timestep=t, return_dict=False)[0]
        return out


class Foreign(nn.Module):
    """A network that follows nobody's names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x)) * (1 + t[:, None, None, None]))
        return out


def unet_of_diffusers() -> nn.Module:
    from diffusers import UNet2DModel

    return OfDiffusers(
        UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4, num_class_embeds=11,
        )
    )  # fmt: skip


def dit_of_diffusers() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return OfDiffusers(
        DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=2, sample_size=8, patch_size=2,
            num_embeds_ada_norm=10, norm_num_groups=4,
        ).eval()
    )  # fmt: skip


CLASSES = Conditions.classes(10)
WORLDS: dict[str, Any] = {
    "plane": (lambda: PlaneNet(2, 10, width=16), (2,), CLASSES, ()),
    "unet": (unet_of_diffusers, (1, 8, 8), CLASSES, ()),
    "dit": (dit_of_diffusers, (1, 8, 8), CLASSES, ()),
    "sana": (Sana, (4, 8, 8), Conditions(torch.randn(3, 5, 16)), ()),
    "sana's tuple": (Sana, (4, 8, 8), Conditions(torch.randn(3, 5, 16)), ("inner.time_embed",)),
    "sana's tokens": (Sana, (4, 8, 8), Conditions(torch.randn(3, 5, 16)), ("inner.patch_embed",)),
    "foreign": (Foreign, (1, 8, 8), CLASSES, ("first",)),
}


def of(name: str) -> tuple[Denoiser, Work, tuple[str, ...]]:
    make, shape, conditions, at = WORLDS[name]
    torch.manual_seed(0)
    net = make()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    classes = None if conditions.rows.is_floating_point() else 10
    return Denoiser(net, RF(), "flow", classes=classes), Work(shape, conditions, batch=4), at


@pytest.mark.parametrize("name", WORLDS)
def test_a_copy_starts_as_the_teacher_and_learns_to_hear_the_numbers(name: str) -> None:
    teacher, work, at = of(name)
    before = named_tensors(copy.deepcopy(teacher))
    student = with_numbers(copy.deepcopy(teacher), 2, work, at)
    g = torch.Generator().manual_seed(0)
    x, t, cond = torch.randn(4, *work.shape, generator=g), torch.rand(4, generator=g), work.conditions.draw(4, g)
    numbers = torch.tensor([[0.5, 0.1], [0.5, 0.1], [-0.5, 0.1], [4.0, 1.0]])
    told = student(x, t, cond, numbers=numbers)

    assert torch.equal(told, teacher(x, t, cond))
    assert torch.equal(student(x, t, cond), teacher(x, t, cond))
    told.square().sum().backward()
    assert student.net.branch[-1].weight.grad.abs().sum() > 0  # type: ignore[union-attr,index]

    with torch.no_grad():
        for p in student.net.branch.parameters():  # type: ignore[union-attr]
            p.normal_()
        same = x[:1].expand_as(x), t[:1].expand(4), cond[:1].expand_as(cond)
        told = student(*same, numbers=numbers)
    assert torch.allclose(told[0], told[1], atol=1e-5)
    assert not torch.allclose(told[0], told[2], rtol=0, atol=1e-4)  # a sign is heard
    assert not torch.allclose(told[0], told[3], rtol=0, atol=1e-4)
    assert torch.equal(student(x, t, cond), teacher(x, t, cond))  # silence is still the teacher
    assert equal(before, named_tensors(teacher))


def test_rows_do_not_hear_each_others_numbers_and_guidance_doubles_them() -> None:
    teacher, work, _ = of("plane")
    student = with_numbers(teacher, 1, work)
    with torch.no_grad():
        for p in student.parameters():
            p.normal_(std=0.3)
        x, t, cond = torch.randn(4, 2), torch.rand(4), torch.arange(4)
        numbers = torch.randn(4, 1)
        rows = [student(x[i : i + 1], t[i : i + 1], cond[i : i + 1], numbers=numbers[i : i + 1]) for i in range(4)]
        assert torch.allclose(student(x, t, cond, numbers=numbers), torch.cat(rows), atol=1e-5)
        null = student(x, t, student.null(cond), numbers=numbers)
        guided = Guidance(3.0)(student, x, t, cond, numbers=numbers)
        assert torch.allclose(guided, null + 3 * (torch.cat(rows) - null), atol=1e-4)


def test_derivatives_in_time_pass_through() -> None:
    """Consistency models need the tangent of a network that has heard its numbers."""
    teacher, work, _ = of("plane")
    student = with_numbers(teacher, 1, work)
    with torch.no_grad():
        for p in student.parameters():
            p.normal_(std=0.3)
    x, t, cond, numbers = torch.randn(4, 2), torch.rand(4), torch.arange(4), torch.randn(4, 1)

    def at(t: Tensor) -> Tensor:
        out: Tensor = student.net(x, t, cond, numbers=numbers)
        return out

    slope = torch.func.jvp(at, (t,), (torch.ones(4),))[1]
    assert torch.allclose(slope, (at(t + 1e-2) - at(t - 1e-2)) / 2e-2, rtol=2e-2, atol=2e-2)


def test_a_network_that_takes_them_already_stays_as_it_is() -> None:
    work = Work((2,), Conditions.classes(4))
    made = Denoiser(PlaneNet(2, 4, numbers=2), EDM(), classes=4)
    assert with_numbers(made, 2, work).net is made.net
    assert isinstance(made.net, PlaneNet)
    wrapped = with_numbers(made, 3, work)
    assert isinstance(wrapped.net, Numbered)
    assert with_numbers(wrapped, 3, work).net is wrapped.net
    assert not takes_numbers(wrapped.net, 1)


def test_taps_of_the_network_are_still_found() -> None:
    made = with_numbers(Denoiser(PlaneNet(2, 4), EDM(), classes=4), 2, Work((2,), Conditions.classes(4)))
    assert all(name in dict(made.net.named_modules()) for name in made.net.taps)  # type: ignore[union-attr]
    assert made.net.taps


def test_it_says_what_is_wrong() -> None:
    net, work, _ = of("foreign")
    with pytest.raises(AtollError, match=r"seems to embed the time.*such as `first`"):
        with_numbers(net, 1, work)
    with pytest.raises(AtollError, match=r"one width; first, second have \[1, 6\]"):
        with_numbers(net, 1, work, ("first", "second"))
    with pytest.raises(AtollError, match=r"no module `net\.nowhere`"):
        with_numbers(net, 1, work, ("nowhere",))
    made = with_numbers(net, 2, work, ("first",))
    with pytest.raises(AtollError, match=r"takes 2 further number\(s\) a sample; got \[4, 1\] for 4 samples"):
        made(torch.zeros(4, 1, 8, 8), torch.ones(4), torch.arange(4), numbers=torch.zeros(4, 1))


def test_time_embedders_are_found_by_class_then_by_name() -> None:
    assert time_embedders(unet_of_diffusers()) == ("inner.time_embedding",)
    assert len(time_embedders(dit_of_diffusers())) == 2
    named = nn.ModuleDict({"t_embedder": nn.ModuleDict({"time_mlp": nn.Linear(1, 1)}), "out": nn.Linear(1, 1)})
    assert time_embedders(named) == ("t_embedder",)
