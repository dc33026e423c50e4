"""The shared loop: what a run keeps, what it survives, what it counts."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atoll.core.errors import AtollError, RunError
from atoll.core.message import Message, detach
from atoll.core.tree import clone, equal, named_tensors
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Conditions, Distiller, Draw, Images, Nets, Role, Update, Work
from atoll.diffusion.exact import exact_mixture
from atoll.diffusion.gan_heads import Adversary
from atoll.diffusion.methods.dmd import DMD
from atoll.diffusion.methods.sim import SIM
from atoll.diffusion.trainer import MATERIAL, STATE, Trainer

TEACHER = exact_mixture(torch.zeros(1, 3), 1.0)


class Counted(nn.Module):
    """A linear layer with an integer buffer that its method counts in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).float()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Toy(Distiller):
    """Two linear layers: ``other`` fits noise, ``student`` fits ``other``."""

    clip: float | None = 1.0
    scale: float = 1.0
    ema: float | None = 0.9
    bad: int = -1  # the step whose loss is not finite
    restart: int = -1  # the step at which the student's optimiser starts afresh
    made: list[int] = field(default_factory=list)
    look: Callable[[Nets, Draw], None] | None = None

    def material(self, teacher: Denoiser, work: Work) -> dict[str, Tensor]:
        self.made.append(1)
        return {"target": torch.arange(20.0).view(4, 5)}

    def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
        return {
            "teacher": Role(teacher, saved=False),
            "student": Role(Counted(), 1e-2, ema=self.ema, clip=self.clip),
            "other": Role(nn.Linear(3, 5), 3e-3, clip=self.clip),
        }

    def begin(self, nets: Nets, step: int, steps: int) -> Iterable[str]:
        return ["student"] if step == self.restart else []

    def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
        if self.look is not None:
            self.look(nets, draw)
        x = draw.noise()
        (target,) = draw.stored("target")
        yield "other", {"fit": (nets["other"](x).float() - target).square().mean()}
        nets["student"].seen += 1  # type: ignore[operator]
        loss = self.scale * (nets["student"](x) - nets["other"](x).float().detach()).square().mean()
        yield "student", {"fit": loss * float("nan") if draw.step == self.bad else loss}


def work(**more: Any) -> Work:
    return replace(Work((3,), Conditions.classes(1), batch=16, seed=3), **more)


def toy(steps: int = 5, folder: Path | None = None, method: Any = None, **more: Any) -> Trainer:
    return Trainer(method or Toy(), copy.deepcopy(TEACHER), work(), steps, folder, **more)


def same(a: Message, b: Message) -> bool:
    """Weights, averages, moments and counters; not seconds."""
    facts = [{k: v for k, v in m.facts.items() if k != "bill"} for m in (a, b)]
    return (
        facts[0] == facts[1]
        and a.parts.keys() == b.parts.keys()
        and all(equal(a.parts[name], b.parts[name]) for name in a.parts)
    )


# ------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("stop", range(6))
def test_a_run_cut_off_anywhere_ends_in_the_same_bits(stop: int, tmp_path: Path) -> None:
    straight = toy(method=Toy(restart=3))
    straight.go()
    cut = toy(folder=tmp_path, method=Toy(restart=3), save_every=0.0)  # saves after every step
    if stop:
        for step in cut.iterate():
            if step == stop:
                break
    resumed = toy(folder=tmp_path, method=Toy(restart=3))
    resumed.go()
    assert resumed.bill.steps == 5
    assert resumed.bill.samples == 5 * 2 * 16
    assert same(straight.state(), resumed.state())


def test_step_sizes_fall_to_nothing_at_the_end() -> None:
    sizes: list[float] = []
    trainer = Trainer(Toy(), TEACHER, work(), 8, cooldown=0.5)
    trainer.go(lambda *_: sizes.append(trainer.optimisers["student"].param_groups[0]["lr"]))
    first = sizes[0]
    assert first > 0
    assert [s / first for s in sizes] == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    whole = Trainer(Toy(), TEACHER, work(), 8)
    whole.go()
    assert whole.optimisers["student"].param_groups[0]["lr"] == first


def test_a_run_killed_while_it_writes_keeps_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, killed = toy(), toy(folder=tmp_path)
    straight.go()
    killed.prepare()
    killed.once()
    killed.save()
    killed.once()

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", dies)
        with pytest.raises(KeyboardInterrupt):
            killed.save()
    resumed = toy(folder=tmp_path)
    assert resumed.load()
    assert resumed.step == 1
    resumed.go()
    assert same(straight.state(), resumed.state())


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    toy(folder=tmp_path).go()
    again, steps = toy(folder=tmp_path), []
    again.go(on_step=lambda step, _: steps.append(step))
    assert not steps
    assert again.step == 5


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
@pytest.mark.parametrize("name", [STATE, MATERIAL])
def test_a_damaged_file_is_named_with_what_to_do(name: str, damage: str, tmp_path: Path) -> None:
    toy(folder=tmp_path).go()
    raw = bytearray((tmp_path / name).read_bytes())
    raw[-5] ^= 1
    (tmp_path / name).write_bytes({"cut": raw[: len(raw) // 2], "flipped": raw, "empty": b""}[damage])
    with pytest.raises(RunError, match=rf"{name} is damaged .*; delete it to start the stage again"):
        toy(folder=tmp_path).go()


def test_another_methods_checkpoint_is_refused(tmp_path: Path) -> None:
    toy(folder=tmp_path).go()
    with pytest.raises(RunError, match=r"of another method or model .*start the stage again"):
        toy(folder=tmp_path, method=Toy(ema=None)).restore(Message("distil", {}, {}))

    class Wider(Toy):
        def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
            return {**super().roles(teacher, work), "other": Role(nn.Linear(3, 6), 1e-3)}

    with pytest.raises(RunError, match="of another method or model"):
        toy(folder=tmp_path, method=Wider()).go()


def test_material_is_made_once(tmp_path: Path) -> None:
    method = Toy()
    first = toy(folder=tmp_path, method=method)
    for _ in first.iterate():
        break
    again = toy(folder=tmp_path, method=method)
    again.go()
    assert method.made == [1]
    assert torch.equal(again.material["target"], torch.arange(20.0).view(4, 5))
    assert again.bill.material_cpu_seconds == first.bill.material_cpu_seconds


# ------------------------------------------------------------------------------------------- optimiser steps


def test_an_update_changes_the_named_roles_alone_and_leaves_no_gradients() -> None:
    trainer = toy()
    trainer.prepare()
    seen: list[tuple[bool, bool]] = []
    before = {n: clone(named_tensors(trainer.roles[n].module)) for n in ("student", "other")}

    def look(name: str) -> bool:
        return equal(before[name], named_tensors(trainer.roles[name].module))

    descend = trainer._descend
    trainer._descend = lambda *a: (descend(*a), seen.append((look("student"), look("other"))))[0]  # type: ignore[method-assign, func-returns-value]
    teacher = clone(named_tensors(trainer.teacher))
    trainer.once()
    assert seen == [(True, False), (False, False)]
    assert all(p.grad is None for module in trainer.nets.values() for p in module.parameters())
    assert equal(teacher, named_tensors(trainer.teacher))


def test_several_roles_step_together() -> None:
    @dataclass(frozen=True)
    class Both(Toy):
        def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
            x = draw.noise()
            yield ("student", "other"), {
                "one": nets["student"](x).square().mean(), "two": nets["other"](x).square().mean()
            }  # fmt: skip

    trainer = toy(method=Both())
    before = clone(named_tensors(trainer.roles["other"].module))
    losses = trainer.once()
    assert losses.keys() == {"student/one", "student/two"}
    assert trainer.updates_done == {"teacher": 0, "student": 1, "other": 1}
    assert not equal(before, named_tensors(trainer.roles["other"].module))


@pytest.mark.parametrize(("clip", "scale", "expected"), [(1.0, 1e3, 1.0), (0.25, 1e3, 0.25), (1.0, 1e-4, None)])
def test_gradients_are_clipped_by_their_norm(clip: float, scale: float, expected: float | None) -> None:
    clipped, free = (toy(method=Toy(clip=c, scale=scale)) for c in (clip, None))
    norms = []
    for trainer in (clipped, free):
        trainer.prepare()
        trainer.once()
        moments = trainer.state().parts["adam.student"]
        squares = torch.cat([v.flatten() for name, v in moments.items() if name.endswith("exp_avg_sq")])
        norms.append(float((squares / (1 - 0.999)).sum().sqrt()))
    assert norms[0] == pytest.approx(norms[1] if expected is None else expected, rel=1e-3)
    assert expected is None or norms[1] > 10 * expected


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_batch_that_is_not_finite_is_left_out(clip: float | None) -> None:
    trainer = toy(method=Toy(clip=clip, bad=2))
    trainer.prepare()
    for _ in range(2):
        trainer.once()
    before = detach(trainer.state())
    losses = trainer.once()
    after = trainer.state()
    assert math.isnan(losses["student/fit"])
    assert equal(*({k: v for k, v in m.parts["net.student"].items() if k != "seen"} for m in (before, after)))
    assert equal(before.parts["adam.student"], after.parts["adam.student"])
    assert not equal(before.parts["net.other"], after.parts["net.other"])  # the other role goes on
    trainer.once()
    assert not equal(trainer.state().parts["adam.student"], before.parts["adam.student"])  # and so does this one
    assert all(torch.isfinite(p).all() for m in trainer.nets.values() for p in m.parameters())


def test_a_role_may_start_its_optimiser_afresh() -> None:
    trainer = toy(method=Toy(restart=3))
    trainer.go()
    moments = trainer.state().parts
    assert float(moments["adam.student"]["0.step"]) == 2
    assert float(moments["adam.other"]["0.step"]) == 5


def test_step_sizes_warm_up_and_fall() -> None:
    role = Role(nn.Linear(1, 1), lr=0.1, decay="cosine", warmup=3)
    assert [role.lr_at(i, 1000) for i in range(4)] == pytest.approx([0.025, 0.05, 0.075, 0.1], rel=1e-3)
    assert role.lr_at(500, 1000) == pytest.approx(0.05)
    assert role.lr_at(1000, 1000) == pytest.approx(0.0, abs=1e-9)
    assert {Role(nn.Linear(1, 1), lr=0.1).lr_at(i, 9) for i in range(9)} == {0.1}

    class Falls(Toy):
        def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
            return {**super().roles(teacher, work), "student": Role(Counted(), 1e-2, decay="cosine", warmup=1)}

    trainer, used = toy(4, method=Falls()), []
    trainer.prepare()
    for _ in range(4):
        trainer.once()
        used.append(trainer.optimisers["student"].param_groups[0]["lr"])
    assert used == pytest.approx([0.005, *(0.005 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3))])


def test_weight_decay_chooses_adamw() -> None:
    class Decays(Toy):
        def roles(self, teacher: Denoiser, work: Work) -> dict[str, Role]:
            return {**super().roles(teacher, work), "student": Role(Counted(), 1e-2, weight_decay=0.1)}

    assert isinstance(toy(method=Decays()).optimisers["student"], torch.optim.AdamW)
    assert type(toy().optimisers["student"]) is torch.optim.Adam


# ------------------------------------------------------------------------------------------- averages


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.97])
def test_an_average_warms_up(decay: float) -> None:
    """After n updates its past weighs min(decay, n / (n + 3))."""
    trainer = toy(8, method=Toy(ema=decay))
    trainer.prepare()
    expected = trainer.averages["student_ema"].linear.weight.clone()  # type: ignore[union-attr, operator]
    for n in range(1, 9):
        trainer.once()
        keep = min(decay, n / (n + 3))
        live = trainer.roles["student"].module.linear.weight.detach()  # type: ignore[union-attr]
        expected = keep * expected + (1 - keep) * live  # type: ignore[operator]
        average: Any = trainer.averages["student_ema"]
        assert torch.allclose(average.linear.weight, expected, atol=1e-6)
        assert not average.linear.weight.requires_grad
        assert int(average.seen) == n  # counters are copied


# ------------------------------------------------------------------------------------------- counting


def test_operations_are_counted_on_a_step_that_is_taken_back() -> None:
    trainer, plain = toy(), toy()
    for t in (trainer, plain):
        t.prepare()
        t.once()
    before, bill = detach(trainer.state()), copy.copy(trainer.bill)
    # per linear layer 2 * 16 * 3 * 5 forward and as much for its weights' gradient; `other` is asked twice
    assert trainer.flops_per_step() == 480 * (2 + 2 + 1)
    assert same(before, trainer.state())
    assert (trainer.step, trainer.bill) == (1, bill)
    trainer.go()
    plain.go()
    assert same(trainer.state(), plain.state())


def test_the_bill_counts_rows_that_go_through_a_loss() -> None:
    steps: list[tuple[int, list[str]]] = []
    bill = toy().go(on_step=lambda step, losses: steps.append((step, sorted(losses))))
    assert (bill.steps, bill.samples) == (5, 5 * 2 * 16)
    assert steps == [(i, ["other/fit", "student/fit"]) for i in range(1, 6)]
    assert bill.seconds > 0
    assert bill.cpu_seconds > 0


# ------------------------------------------------------------------------------------------- randomness


def test_draws_depend_on_seed_and_step_alone() -> None:
    def numbers(seed: int, noise_before: bool) -> list[Tensor]:
        found: list[Tensor] = []
        method = Toy(look=lambda _, draw: found.extend([draw.noise(), draw.uniform(), torch.rand(3)]))
        trainer = Trainer(method, copy.deepcopy(TEACHER), work(seed=seed), 3)
        if noise_before:
            torch.rand(7)
        trainer.go()
        return found

    before = torch.get_rng_state()
    a = numbers(3, False)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(u, v) for u, v in zip(a, numbers(3, True), strict=True))
    assert not torch.equal(a[0], numbers(4, False)[0])
    assert not torch.equal(a[0], a[3])  # the next step's
    assert not torch.equal(a[2], a[5])


def test_methods_that_need_images_say_so() -> None:
    method = DMD(adversary=Adversary())
    with pytest.raises(AtollError, match="DMD trains on real images, which a server does not have; let sites run it"):
        toy(method=method)
    draw = Draw(work(), torch.Generator(), 0, 1)
    with pytest.raises(AtollError, match="trains on real images, and it was given none"):
        draw.real()


# ------------------------------------------------------------------------------------------- precision, compiling


def test_bf16_is_for_networks_alone() -> None:
    seen: dict[str, list[bool]] = {"float32": [], "bf16": []}
    state = {}
    for precision, log in seen.items():
        method = Toy(look=lambda *_, log=log: log.append(torch.is_autocast_enabled("cpu")))
        trainer = toy(method=method, precision=precision)
        descend = trainer._descend

        def watched(roles: Any, losses: Any, descend: Any = descend) -> None:
            assert not torch.is_autocast_enabled("cpu")  # neither the gradient nor the optimiser
            assert all(v.dtype == torch.float32 for v in losses.values())
            descend(roles, losses)

        trainer._descend = watched  # type: ignore[method-assign]
        trainer.go()
        assert not torch.is_autocast_enabled("cpu")
        assert all(p.dtype == torch.float32 for m in trainer.nets.values() for p in m.parameters())
        state[precision] = trainer.state().parts["net.student"]
    assert seen == {"float32": [False] * 5, "bf16": [True] * 5}
    assert not equal(state["float32"], state["bf16"])
    for name, value in state["float32"].items():
        assert torch.allclose(value.float(), state["bf16"][name].float(), atol=0.05), name


def test_bf16_keeps_gradients_of_weights_that_a_call_without_them_used_first() -> None:
    @dataclass(frozen=True)
    class Twice(Toy):
        def updates(self, nets: Nets, draw: Draw) -> Iterator[Update]:
            with torch.no_grad():
                nets["student"](draw.noise())
            yield "student", {"fit": nets["student"](draw.noise()).square().mean()}

    trainer = toy(method=Twice(), precision="bf16")
    before = clone(named_tensors(trainer.roles["student"].module))
    trainer.once()
    after = named_tensors(trainer.roles["student"].module)
    assert not torch.equal(before["linear.weight"], after["linear.weight"])


@pytest.mark.parametrize("method", [DMD(), SIM()], ids=["dmd", "sim"])
def test_methods_run_in_bf16(method: Any, digit_teacher: Denoiser, digit_work: Work) -> None:
    trainer = Trainer(method, digit_teacher, digit_work, 2, precision="bf16")
    losses = [trainer.once() for _ in range(2)]
    assert all(math.isfinite(v) for found in losses for v in found.values())
    x = method.generate(trainer.nets, torch.randn(2, *digit_work.shape), torch.arange(2), 1)
    assert x.dtype == torch.float32


@pytest.fixture
def ring_run(
    ring_teacher: Denoiser, ring_work: Callable[..., Work]
) -> Callable[..., Trainer]:  # fmt: skip
    def make(compiled: bool, folder: Path | None = None) -> Trainer:
        method = DMD(adversary=Adversary(), critic_steps=1)
        return Trainer(
            method, copy.deepcopy(ring_teacher), ring_work(32, images=True), 3, folder, compiled=compiled
        )  # fmt: skip

    return make


def compare(make: Callable[..., Trainer], folder: Path) -> None:
    """A compiled run and a plain one agree, under the same names, and read each other's checkpoints."""
    plain, compiled = make(False), make(True, folder)
    plain.go()
    for step in compiled.iterate():
        if step == 2:
            compiled.save()
            break
    for other in (make(True, folder), make(False, folder)):
        kept = folder.with_name("kept")
        shutil.copytree(folder, kept, dirs_exist_ok=True)
        other.folder = kept
        other.go()
        assert plain.nets.keys() == other.nets.keys()
        for role, module in plain.nets.items():
            theirs = named_tensors(other.nets[role])
            for name, value in named_tensors(module).items():
                assert torch.allclose(value, theirs[name], atol=1e-4), f"{role}.{name}"


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the tracer looks at inputs that are no leaves
def test_compiling_changes_neither_names_nor_numbers(
    ring_run: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tracer alone (no compiler needed); taps must be seen through it."""
    real, compiled = nn.Module.compile, []

    def eager(self: nn.Module, *args: Any, **more: Any) -> None:
        compiled.append(self)
        real(self, *args, backend="eager", **more)

    monkeypatch.setattr(nn.Module, "compile", eager)
    compare(ring_run, tmp_path / "run")
    assert compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiling_for_real() -> None:
    plain, compiled = toy(), toy(compiled=True)
    plain.go()
    compiled.go()
    for role, module in plain.nets.items():
        theirs = named_tensors(compiled.nets[role])
        assert all(torch.allclose(v, theirs[n], atol=1e-5) for n, v in named_tensors(module).items())


def test_images_are_drawn_at_the_scale_that_was_asked_for(digit_images: Images) -> None:
    draw = Draw(work(images=digit_images, batch=512), torch.Generator().manual_seed(0), 0, 1)
    x, y = draw.real()
    assert x.shape == (512, 1, 8, 8)
    assert float(x.std()) == pytest.approx(0.5, abs=0.02)
    assert float(x.mean()) == pytest.approx(0.0, abs=0.02)
    assert len(y.unique()) == 10
    chosen = torch.isin(digit_images.data.column("y"), torch.tensor([3, 7])).nonzero().flatten()
    some = replace(digit_images, rows=chosen)
    assert set(some.all(50)[1].tolist()) == {3, 7}
    assert len(some) == len(chosen)


def test_operations_are_those_that_torch_counts(digit_teacher: Denoiser, digit_work: Work) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from atoll.diffusion.methods.uni_instruct import UniInstruct

    trainer = Trainer(DMD(), digit_teacher, digit_work, 2)
    counted = trainer.flops_per_step()
    with FlopCounterMode(display=False) as theirs:
        trainer.once()
    assert counted == theirs.get_total_flops() > 0
    assert Trainer(UniInstruct(), digit_teacher, digit_work, 2).flops_per_step() > counted  # a graph under no_grad
