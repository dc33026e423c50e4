"""Adapter guidance distillation: adapters beside any network's blocks, trained on guided trajectories."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from atoll.core.errors import AtollError, MessageError
from atoll.core.tree import clone, equal, named_tensors
from atoll.data.dataset import Info
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Conditions, Draw, Work
from atoll.diffusion.exact import PlaneNet
from atoll.diffusion.guidance import Guidance, both
from atoll.diffusion.guidance_adapters import (
    AtScale,
    CrossAttention,
    GuidanceAdapters,
    Offset,
    attach,
    blocks_of,
    detach,
    load_adapters,
    make_adapters,
    save_adapters,
)
from atoll.diffusion.methods.agd import AGD
from atoll.diffusion.methods.edm_fm_teacher import EdmFmTeacher
from atoll.diffusion.pairs import TrajectoryStore
from atoll.diffusion.schedules import EDM, RF
from atoll.diffusion.solvers import Sampler
from atoll.diffusion.trainer import Trainer
from atoll.models.dit import DiT
from atoll.models.unet import UNet

INFO = Info(name="x", shape=(1, 8, 8), num_classes=3)
WORK = Work((1, 8, 8), Conditions.classes(3), seed=1, batch=8)
PROMPTS = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(5))
FEW = TrajectoryStore(6, Sampler(solver="ddim", steps=3))


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shake(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))


class Diffusers(nn.Module):
    """A diffusers network as it is, seen through three arguments."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.unet = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8, norm_num_groups=4, num_class_embeds=4,
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        out: Tensor = self.unet(x, t, class_labels=cond).sample
        return out


class Prompted(nn.Module):
    """Tokens that look at each other; the prompt's mean is added. ``cond``: embeddings ``[B, 5, 7]``."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.prompt, self.outward = nn.Linear(8, 16), nn.Linear(7, 16), nn.Linear(16, 8)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        h = self.inward(x[:, 0]) + self.prompt(cond.mean(1))[:, None] + t[:, None, None]
        out: Tensor = self.outward(h + self.attention(h, h, h)[0])[:, None]
        return out


def build(kind: str) -> tuple[Denoiser, Work]:
    torch.manual_seed(0)
    work = WORK
    if kind == "unet":
        made = Denoiser(UNet(width=16).build(INFO, 3), EDM(), classes=3)
    elif kind == "dit":
        made = Denoiser(DiT(patch=2, dim=16, layers=2, heads=2).build(INFO, 3), RF(), "flow", classes=3)
    elif kind == "diffusers":
        made = Denoiser(Diffusers(), RF(), "flow", classes=3, time_scale=1000.0)
    else:
        made = Denoiser(Prompted(), EDM(), null=torch.zeros(5, 7))
        work = dataclasses.replace(WORK, conditions=Conditions(PROMPTS))
    shake(made)
    return made.eval().requires_grad_(False), work


KINDS = ["unet", "dit", "diffusers", "prompts"]


def asked(work: Work, n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.linspace(0.1, 0.9, n)
    return gaussian(1, n, *work.shape), t, work.conditions.rows[torch.arange(n) % 3]


# ---------------------------------------------------------------- the adapters


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_change_no_bit_and_trained_ones_do(kind: str) -> None:
    base, work = build(kind)
    student = attach(base, make_adapters(base, work))
    x, t, cond = asked(work)
    w = torch.linspace(1, 6, len(x))
    assert torch.equal(student(x, t, cond, w=w), base(x, t, cond))
    adapters: Any = student.net.adapters
    shake(adapters)
    said = student(x, t, cond, w=w)
    assert not torch.allclose(said, base(x, t, cond), atol=1e-4)
    assert torch.equal(student(x, t, cond), base(x, t, cond))  # without w it is the base
    assert torch.equal(base(x, t, cond), build(kind)[0](x, t, cond))  # no hook stays behind
    # it depends on the scale, the time and the condition, each by itself
    with torch.no_grad():
        context = adapters.context(w, t, cond)
        others = (
            adapters.context(w + 0.5, t, cond),
            adapters.context(w, t * 0.5, cond),
            adapters.context(w, t, cond.roll(1, 0)),
        )
    for i, other in enumerate(others):
        changed = [(context[:, j] - other[:, j]).abs().max() > 1e-3 for j in (0, 1)] + [
            bool((context[:, 2:] != other[:, 2:]).any())
        ]
        assert [bool(c) for c in changed] == [i == 0, i == 1, i == 2]


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_and_every_part_of_the_context_counts(kind: str) -> None:
    base, work = build(kind)
    adapters = make_adapters(base, work)
    x, t, cond = asked(work)
    w = torch.full((len(x),), 2.0)
    plain = base(x, t, cond)
    for i, block in enumerate(adapters.blocks):
        fresh = copy.deepcopy(adapters)
        shake(fresh.blocks[i])
        assert not torch.allclose(attach(base, fresh)(x, t, cond, w=w), plain, atol=1e-6), adapters.shape.blocks[i]
        assert isinstance(block, CrossAttention if kind == "prompts" else Offset)
    shake(adapters)
    out = attach(base, adapters)
    assert not torch.allclose(out(x, t, cond, w=w), out(x, t, cond, w=w + 1), atol=1e-6)


def test_an_offset_is_one_vector_for_all_places() -> None:
    base, work = build("unet")
    adapters = make_adapters(base, work, ["inward"])
    shake(adapters)
    x, t, cond = asked(work)
    net: Any = base.net
    plain = net.inward(x.repeat(1, 4, 1, 1))
    with adapters.on(net, torch.full((6,), 3.0), t, cond):
        moved = net.inward(x.repeat(1, 4, 1, 1)) - plain
    assert (moved - moved[:, :, :1, :1]).abs().max() < 1e-5
    assert (moved[:, :, 0, 0] - moved[:1, :, 0, 0]).abs().max() > 1e-4  # rows differ in time and class


def test_cross_attention_looks_from_every_place() -> None:
    base, work = build("prompts")
    adapters = make_adapters(base, work)
    shake(adapters)
    block: Any = adapters.blocks[0]
    places, context = gaussian(0, 2, 8, 16), adapters.context(torch.ones(2), torch.ones(2), PROMPTS[:2])
    out = block(places, context)
    assert context.shape == (2, 2 + 5, 32)
    assert (out[:, 0] - out[:, 1]).abs().max() > 1e-4
    # by hand: softmax(q k / sqrt(h)) v
    q, k, v = block.query(block.norm(places)), block.key(context), block.value(context)
    assert torch.allclose(out, block.outward((q @ k.mT / 32**0.5).softmax(-1) @ v), atol=1e-5)


def test_which_blocks_are_found() -> None:
    assert blocks_of(build("dit")[0].net) == ("blocks.0.attention", "blocks.1.attention")
    assert blocks_of(build("unet")[0].net) == ("down1.0", "down2.0", "middle", "up2.0", "up1.0")
    found = blocks_of(build("diffusers")[0].net)
    assert found
    assert all(".attentions." in name for name in found)
    assert blocks_of(build("dit")[0].net, ["blocks.1.up"]) == ("blocks.1.up",)

    class InnerAttention(nn.Module):
        pass

    class OuterAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = InnerAttention()

    both_kinds = nn.ModuleDict({"residual": UNet(width=8).build(INFO, 3), "looks": OuterAttention()})
    assert blocks_of(both_kinds) == ("looks",)  # attention before residual blocks, and the outermost of it
    with pytest.raises(AtollError, match=r"no block `blocks\.7`"):
        blocks_of(build("dit")[0].net, ["blocks.7"])
    with pytest.raises(AtollError, match="neither attention nor residual"):
        blocks_of(PlaneNet())


def test_few_numbers_are_trained_at_the_size_of_the_benchmark() -> None:
    """At most 5%, about 2% of a transformer."""
    info = Info(name="x", shape=(1, 28, 28), num_classes=10)
    work = Work((1, 28, 28), Conditions.classes(10))
    for network, most in ((DiT(dim=128, layers=6), 0.025), (UNet(width=32), 0.05)):
        base = Denoiser(network.build(info, 10), EDM(), classes=10)
        adapters = make_adapters(base, work)
        share = sum(p.numel() for p in adapters.parameters()) / sum(p.numel() for p in base.parameters())
        assert 0.005 < share < most


def test_adapters_move_to_a_sibling_checkpoint() -> None:
    base, work = build("unet")
    student = attach(base, make_adapters(base, work))
    shake(student.net.adapters)  # type: ignore[arg-type]
    sibling = copy.deepcopy(base)
    shake(sibling, 3)
    plain, adapters = detach(student)
    x, t, cond = asked(work)
    w = torch.full((6,), 3.0)
    assert plain.net is base.net
    assert torch.equal(plain(x, t, cond), base(x, t, cond))
    moved = attach(sibling, adapters)
    assert moved.net.adapters is student.net.adapters
    assert not torch.allclose(moved(x, t, cond, w=w), sibling(x, t, cond), atol=1e-4)
    assert not torch.allclose(moved(x, t, cond, w=w), student(x, t, cond, w=w), atol=1e-4)
    assert isinstance(base.net, nn.Module)
    assert not hasattr(base.net, "adapters")  # the model that they were attached to is as it was
    with pytest.raises(AtollError, match="already"):
        attach(student, adapters)
    with pytest.raises(AtollError, match="no guidance adapters"):
        detach(plain)
    other = attach(build("dit")[0], adapters)
    with pytest.raises(AtollError, match="does not have"):
        other(x, t, cond, w=w)


@pytest.mark.parametrize("kind", ["unet", "prompts"])
def test_a_file_gives_the_same_adapters_back(kind: str, tmp_path: Path) -> None:
    base, work = build(kind)
    adapters = make_adapters(base, work, hidden=16)
    shake(adapters)
    path = tmp_path / "guidance.safetensors"
    save_adapters(adapters, path)
    loaded = load_adapters(path)
    assert loaded.shape == adapters.shape
    x, t, cond = asked(work)
    w = torch.full((6,), 2.5)
    assert torch.equal(attach(base, loaded)(x, t, cond, w=w), attach(base, adapters)(x, t, cond, w=w))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(MessageError, match="holds no guidance adapters"):
        load_adapters(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path, {"other": "1"})
    with pytest.raises(MessageError, match="holds no guidance adapters"):
        load_adapters(path)


# ---------------------------------------------------------------- the method


@pytest.mark.parametrize("kind", ["dit", "prompts"])
def test_training_leaves_the_base_alone(kind: str) -> None:
    base, work = build(kind)
    before = clone(named_tensors(base))
    method = AGD(FEW, lr=1e-2)
    trainer = Trainer(method, base, work, 4)
    trainer.go()
    student: Any = trainer.nets["student"]
    assert equal(before, named_tensors(base))
    assert equal(
        {n.removeprefix("net.base."): v for n, v in named_tensors(student).items() if ".base." in n},
        {n.removeprefix("net."): v for n, v in before.items() if n.startswith("net.")},
    )
    assert all(p.requires_grad == ("adapters" in n) for n, p in student.named_parameters())
    x, t, cond = asked(work)
    assert not torch.equal(student(x, t, cond, w=torch.full((6,), 3.0)), base(x, t, cond))


def test_the_loss_is_the_squared_error_of_the_noise_on_stored_points() -> None:
    base, work = build("unet")
    method = AGD(FEW)
    material = method.material(base, work)
    nets = {n: role.module for n, role in method.roles(base, work).items()}
    shake(nets["student"].net.adapters)  # type: ignore[arg-type, union-attr]
    draw = Draw(work, torch.Generator().manual_seed(0), 0, 1, material)
    ((role, losses),) = list(method.updates(nets, draw))
    again = dataclasses.replace(draw, generator=torch.Generator().manual_seed(0))
    x, eps, t, cond, w = again.stored("x_t", "eps", "t", "cond", "w")
    said = (x - nets["student"](x, t, cond, w=w)) / t[:, None, None, None]
    assert role == "student"
    assert torch.allclose(losses["guidance"], (said - eps).square().mean(), rtol=1e-4)
    given, null = both(base, x, t, cond)
    guided = null + w[:, None, None, None] * (given - null)
    assert torch.allclose(x - t[:, None, None, None] * eps, guided, atol=1e-4)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["ddim", "heun", "dpmpp"]), st.floats(1.0, 6.0), st.integers(5, 12))
def test_half_the_calls_of_guidance_with_any_solver_and_scale(solver: Any, scale: float, steps: int) -> None:
    base, work = build("unet")
    nets = {n: r.module for n, r in AGD().roles(base, work).items()}
    shake(nets["student"].net.adapters)  # type: ignore[arg-type, union-attr]
    sampler = Sampler(solver=solver, steps=steps)
    z, cond = gaussian(0, 3, *work.shape), torch.arange(3)
    calls, seen = [], []

    def count(_: nn.Module, args: Any) -> None:
        calls.append(len(args[0]))
        seen.append(args[2])

    handle = nets["student"].net.base.register_forward_pre_hook(count)  # type: ignore[union-attr]
    method = AGD(scale=scale, sampler=sampler)
    made = method.generate(nets, z, cond, sampler.calls)
    handle.remove()
    assert sum(calls) == 3 * sampler.calls
    assert 2 * sampler.calls == dataclasses.replace(sampler, guidance=Guidance(scale)).calls or scale == 1.0
    assert all(torch.equal(c, cond) for c in seen)  # never the null condition
    wanted = sampler(AtScale(nets["student"], scale), z, cond)  # type: ignore[arg-type]
    assert torch.equal(made, wanted)


def test_scales_outside_the_trained_range_are_refused() -> None:
    with pytest.raises(AtollError, match=r"from 1\.0 to 6\.0"):
        AGD(scale=7.0)
    with pytest.raises(AtollError, match="even number"):
        AGD(hidden=33)


def test_adapters_imitate_guidance_of_every_scale(ring_teacher: Denoiser, ring_work: Callable[..., Work]) -> None:
    """On trajectories that they have not seen, at low and at high scales, for far less than the base's error."""
    work = ring_work(batch=256, images=True)
    teacher = Trainer(EdmFmTeacher(lr=5e-3, drop=0.3, ema=0.98), work.build(), work, 200)  # type: ignore[misc]
    teacher.go()
    base: Any = teacher.nets["student_ema"]
    method = AGD(TrajectoryStore(300, Sampler(solver="ddim", steps=12)), blocks=("inward", "body.1", "body.3"), lr=5e-3)
    work = dataclasses.replace(work, images=None, build=None)
    trainer = Trainer(method, base, work, 250)
    trainer.go()
    student: Any = trainer.nets["student"]
    for low, high in ((1.0, 2.0), (4.0, 6.0)):
        held = TrajectoryStore(60, Sampler(solver="ddim", steps=12), low=low, high=high).make(
            base, dataclasses.replace(work, seed=9)
        )
        x, eps, t, cond, w = (held[n] for n in ("x_t", "eps", "t", "cond", "w"))
        with torch.no_grad():
            error = float((student.predict(x, t, cond, "eps", w=w) - eps).square().mean())
            without = float((base.predict(x, t, cond, "eps") - eps).square().mean())
            wrong = float((student.predict(x, t, cond, "eps", w=7 - w) - eps).square().mean())
        assert error < (0.75 if high < 3 else 0.35) * without
        assert error < wrong
    assert isinstance(student.net.adapters, GuidanceAdapters)
