"""The loop that all of them share: optimiser steps, averages, checkpoints, resuming, the bill."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atoll.core.errors import AtollError, RunError
from atoll.core.files import write_atomic
from atoll.core.message import NO_LIMITS, Message, decode, detach, encode, seal, unseal
from atoll.core.progress import progress
from atoll.core.streams import stream
from atoll.core.tree import Tree, copy_, named_tensors
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Distiller, Draw, Role, Work
from atoll.diffusion.operations import Operations
from atoll.models.model import seeded

STATE, MATERIAL = "distil.safetensors", "material.safetensors"


@dataclass(slots=True)
class Bill:
    """What a training has cost so far."""

    steps: int = 0
    samples: int = 0
    """Rows that went through a loss."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    flops: float = 0.0
    material_cpu_seconds: float = 0.0


@dataclass
class Trainer:
    """Runs a method's updates. All that it keeps is in :meth:`state`; :meth:`go` writes it now and then.

    Args:
        method: what to do.
        teacher: the model to learn from; left as it is.
        work: sizes, conditions, data.
        steps: how many in all (schedules within a method are fractions of it).
        folder: where checkpoints go; None keeps none.
        precision: ``bf16`` computes the networks in bfloat16, losses and weights stay float32.
        compiled: let ``torch.compile`` fuse the networks; worth its minutes on a GPU only.
        cooldown: share of the run, at its end, over which all step sizes fall to nothing: what a fixed step size
            jitters about is settled (Hagele et al., 2024, arXiv 2405.18392).
        save_every: seconds between checkpoints.
        roles: the method's networks, where they are there already; None makes them.
    """

    method: Distiller
    teacher: Denoiser
    work: Work
    steps: int
    folder: Path | None = None
    precision: Literal["float32", "bf16"] = "float32"
    compiled: bool = False
    cooldown: float = 0.0
    save_every: float = 30.0
    roles: dict[str, Role] = field(default_factory=dict)
    step: int = 0
    bill: Bill = field(default_factory=Bill)

    def __post_init__(self) -> None:
        if self.method.needs == "images" and self.work.images is None:
            raise AtollError(
                f"{type(self.method).__name__} trains on real images, which a server does not have; let sites run it, "
                "or give it public or generated rows."
            )
        if self.work.batch < self.method.parts:
            raise AtollError(
                f"{type(self.method).__name__} divides every batch into {self.method.parts} parts; a batch of "
                f"{self.work.batch} is too small."
            )
        self.teacher.to(self.work.device).eval().requires_grad_(False)
        if not self.roles:
            with seeded(self.work.seed, "distil", "weights"):
                self.roles = self.method.roles(self.teacher, self.work)
        for role in self.roles.values():
            role.module.to(self.work.device)
            if role.lr is None:
                role.module.requires_grad_(False)
            if self.compiled:
                role.module.compile()
        self.averages = {
            f"{name}_ema": copy.deepcopy(role.module).requires_grad_(False)
            for name, role in self.roles.items()
            if role.ema is not None
        }
        self.optimisers = {name: _adam(role) for name, role in self.roles.items() if role.lr is not None}
        self.updates_done = dict.fromkeys(self.roles, 0)
        self.material: Mapping[str, Tensor] = {}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def nets(self) -> dict[str, nn.Module]:
        """Networks by role, averages included, and what the method makes of them together."""
        own = {**{n: r.module for n, r in self.roles.items()}, **self.averages}
        return {**own, **self.method.joined(own)}

    # ---------------------------------------------------------------- one step

    def prepare(self) -> None:
        """Make the method's material, or read it from the folder."""
        path = self.folder / MATERIAL if self.folder is not None else None
        if path is not None and path.exists():
            message = _read(path)
            self.material = message.parts["material"]
            self.bill.material_cpu_seconds = float(message.facts["cpu_seconds"])
            return
        started = time.process_time()
        with self._precision():
            made = self.method.material(self.teacher, self.work)
        self.bill.material_cpu_seconds = time.process_time() - started
        self.material = made
        if path is not None and made:
            facts = {"cpu_seconds": self.bill.material_cpu_seconds}
            write_atomic(path, encode(seal(Message("material", {"material": made}, facts))), durable=False)

    def once(self) -> dict[str, float]:
        """One step: the method's updates, each followed by its optimiser. Returns the losses by ``role/name``."""
        started, cpu = time.perf_counter(), time.process_time()
        nets = self.nets
        for name in self.method.begin(nets, self.step, self.steps):
            self.optimisers[name] = _adam(self.roles[name])
        device = torch.device(self.work.device)
        number = stream(self.work.seed, "distil", self.step).initial_seed()
        draw = Draw(
            self.work, torch.Generator(device).manual_seed(number), self.step, self.steps, self.material
        )  # fmt: skip
        said: dict[str, float] = {}
        with seeded(self.work.seed, "distil", "global", self.step):
            turns = self.method.updates(nets, draw)
            while True:
                with self._precision():
                    turn = next(turns, None)
                if turn is None:
                    break
                roles, losses = turn
                self._descend((roles,) if isinstance(roles, str) else roles, losses)
                label = roles if isinstance(roles, str) else roles[0]
                said |= {f"{label}/{name}": float(value.detach()) for name, value in losses.items()}
                self.bill.samples += self.work.batch
        self.step += 1
        self.bill.steps = self.step
        self.bill.seconds += time.perf_counter() - started
        self.bill.cpu_seconds += time.process_time() - cpu
        return said

    def _precision(self) -> torch.autocast:
        """Without its cache, which may hold weights as a call without gradients saw them."""
        kind = torch.device(self.work.device).type
        return torch.autocast(kind, torch.bfloat16, self.precision == "bf16", cache_enabled=False)

    def _descend(self, roles: tuple[str, ...], losses: Mapping[str, Tensor]) -> None:
        total = torch.stack([v.float() for v in losses.values()]).sum()
        owned = {name: [p for p in self.roles[name].module.parameters() if p.requires_grad] for name in roles}
        every = [p for parameters in owned.values() for p in parameters]
        gradients = dict(zip(every, torch.autograd.grad(total, every, allow_unused=True), strict=True))
        for name, parameters in owned.items():
            role = self.roles[name]
            for p in parameters:
                p.grad = gradients[p]
            norm = nn.utils.clip_grad_norm_(parameters, math.inf if role.clip is None else role.clip)
            if not torch.isfinite(norm):  # one bad batch must not end the run: it is left out
                for p in parameters:
                    p.grad = None
            self.optimisers[name].param_groups[0]["lr"] = role.lr_at(self.step, self.steps) * self._cooled()
            self.optimisers[name].step()
            for p in parameters:
                p.grad = None
            self.updates_done[name] += 1
            self._average(name)

    def _cooled(self) -> float:
        """Factor of all step sizes."""
        last = self.cooldown * self.steps
        return min(1.0, (self.steps - self.step) / last) if last else 1.0

    def _average(self, name: str) -> None:
        decay = self.roles[name].ema
        if decay is None:
            return
        done = self.updates_done[name]
        decay = min(decay, done / (done + 3))
        theirs, ours = named_tensors(self.averages[f"{name}_ema"]), named_tensors(self.roles[name].module)
        numbers = [n for n in theirs if theirs[n].is_floating_point()]
        with torch.no_grad():
            torch._foreach_lerp_([theirs[n] for n in numbers], [ours[n] for n in numbers], 1 - decay)
            copy_(theirs, {n: ours[n] for n in theirs if n not in numbers})  # counters have no average

    def flops_per_step(self) -> float:
        """Floating-point operations of a step, counted on one that is then taken back."""
        before, step, bill = detach(self.state()), self.step, copy.copy(self.bill)
        with Operations() as counter:
            self.once()
        self.restore(before)
        self.step, self.bill = step, bill
        return float(counter.total)

    # ---------------------------------------------------------------- all of them

    def go(self, on_step: Callable[[int, dict[str, float]], None] | None = None, label: str = "distil") -> Bill:
        """Train to the end, from the folder's checkpoint when there is one."""
        for _ in self.iterate(on_step, label):
            pass
        return self.bill

    def iterate(
        self, on_step: Callable[[int, dict[str, float]], None] | None = None, label: str = "distil"
    ) -> Iterator[int]:
        """The same, giving back control after every step."""
        self.load()
        self.prepare()
        saved = time.monotonic()
        with progress(self.steps, label) as bar:
            while self.step < self.steps:
                losses = self.once()
                bar.update(self.step, " ".join(f"{k} {v:.3g}" for k, v in list(losses.items())[:2]))
                if on_step is not None:
                    on_step(self.step, losses)
                if time.monotonic() - saved > self.save_every:
                    self.save()
                    saved = time.monotonic()
                yield self.step
        self.save()

    # ---------------------------------------------------------------- state

    def state(self) -> Message:
        """Weights, averages, moments and counters, sharing storage with them."""
        parts: dict[str, Tree] = {}
        for name, role in self.roles.items():
            if role.saved:
                parts[f"net.{name}"] = dict(named_tensors(role.module))
        for name, module in self.averages.items():
            parts[f"ema.{name}"] = dict(named_tensors(module))
        parts |= self.moments()
        bill = {name: getattr(self.bill, name) for name in Bill.__slots__}
        return Message("distil", parts, {"step": self.step, "updates": dict(self.updates_done), "bill": bill})

    def restore(self, message: Message) -> None:
        """Put a :meth:`state` back. Raises :class:`RunError` when it is another method's."""
        facts = message.facts
        try:
            for name, role in self.roles.items():
                if role.saved:
                    _put(role.module, message.parts[f"net.{name}"])
            for name, module in self.averages.items():
                _put(module, message.parts[f"ema.{name}"])
            self.restore_moments(message.parts)
            self.step = int(facts["step"])
            self.updates_done = {name: int(facts["updates"][name]) for name in self.roles}
            self.bill = Bill(**facts["bill"])
        except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as e:
            raise RunError(f"The checkpoint is of another method or model ({e}); start the stage again.") from e

    def moments(self) -> dict[str, Tree]:
        """What the optimisers remember, in parts ``adam.ROLE``, sharing storage with them."""
        parts: dict[str, Tree] = {}
        for name, optimiser in self.optimisers.items():
            own = parts[f"adam.{name}"] = {}
            for i, p in enumerate(optimiser.param_groups[0]["params"]):
                for key, value in optimiser.state.get(p, {}).items():
                    own[f"{i}.{key}"] = torch.as_tensor(value)
        return parts

    def restore_moments(self, parts: Mapping[str, Tree]) -> None:
        """Put :meth:`moments` back; optimisers without a part start afresh."""
        for name in self.optimisers:
            fresh = self.optimisers[name] = _adam(self.roles[name])
            parameters = fresh.param_groups[0]["params"]
            for place, value in parts.get(f"adam.{name}", {}).items():
                i, _, key = place.partition(".")
                fresh.state[parameters[int(i)]][key] = value.clone()

    def save(self) -> None:
        if self.folder is not None:
            write_atomic(self.folder / STATE, encode(seal(self.state())), durable=False)

    def load(self) -> bool:
        """Go on from the folder's checkpoint; False when it has none."""
        path = self.folder / STATE if self.folder is not None else None
        if path is None or not path.exists():
            return False
        self.restore(_read(path))
        return True


def _adam(role: Role) -> Any:
    assert role.lr is not None
    parameters = [p for p in role.module.parameters() if p.requires_grad]
    kind = torch.optim.AdamW if role.weight_decay else torch.optim.Adam
    return kind(parameters, lr=role.lr, betas=role.betas, weight_decay=role.weight_decay)


def _put(module: nn.Module, tree: Mapping[str, Tensor]) -> None:
    own = named_tensors(module)
    if own.keys() != tree.keys():
        raise KeyError(f"tensors {sorted(own.keys() ^ tree.keys())[:3]}")
    with torch.no_grad():
        copy_(own, tree)


def _read(path: Path) -> Message:
    try:
        return detach(unseal(decode(path.read_bytes(), NO_LIMITS)))
    except AtollError as e:
        raise RunError(f"{path} is damaged ({e}); delete it to start the stage again.") from e
