"""A stage that makes a fast generator: a teacher, a method, a judge; nothing of it needs a site.

Its run directory is that of every run: ``recipe.yaml``, ``events.jsonl``, ``state/``, ``model/``, ``report.html``. A
killed stage goes on from its last checkpoint and ends with the same bits.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from atoll.core.build import Reader, describe
from atoll.core.errors import AtollError, RecipeError, RunError
from atoll.core.files import read_json_lines, write_atomic
from atoll.core.tree import named_tensors
from atoll.data.dataset import Info
from atoll.data.source import Source
from atoll.data.sources.digits import Digits
from atoll.diffusion.as_denoiser import AsDenoiser
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.diffusers_model import adapted, load_denoiser, savable, save_denoiser
from atoll.diffusion.distiller import Conditions, Distiller, Images, Work
from atoll.diffusion.evaluate import Reference, judge_generator, make_judge
from atoll.diffusion.methods.sim import SIM
from atoll.diffusion.solvers import Sampler
from atoll.diffusion.student import describe_student, save_description
from atoll.diffusion.teacher import Teacher, make_denoiser
from atoll.diffusion.trainer import Trainer
from atoll.models.diffusers_net import DiffusersNet
from atoll.models.export import ABOUT, about_model, save_model
from atoll.recipes.pictures import keep_samples
from atoll.recipes.texts import read_texts

EVENTS = 50
"""Lines of losses that a run writes, however many steps it takes."""
COUNTED = 1000
"""Length of the run whose first step is counted to see how many a budget pays for: some methods divide theirs."""


@dataclass(frozen=True, kw_only=True)
class Distil:
    """Make a few-step generator from a many-step one.

    Args:
        name: of the run and its directory.
        seed: root of all random streams.
        data: real rows: for the judge, for a teacher that is trained here, and for methods that need images.
        limit: use at most so many of them.
        teacher: the many-step model; trained here, once per machine.
        start: folder of a saved denoiser that is the teacher instead: of a run, or a checkpoint of diffusers.
        texts: for a checkpoint that is told texts: safetensors file with what its text encoder says of prompts
            (``recipes/texts.py``). Then no row of ``data`` is read, and nobody judges the samples.
        shape: of such a checkpoint's samples, channels first; None takes the size that it was made for.
        method: how the student is made.
        lora: rank of the adapters that alone are trained, on the teacher; None trains all weights.
        steps: of training; None takes what ``budget`` pays for.
        budget: floating-point operations of training, in units of 10^12: equal work for different methods.
        cooldown: share of training, at its end, over which all step sizes fall to nothing.
        batch: samples per loss.
        calls: calls per sample at which the student is judged; None: those that its method is made for.
        samples: that the judge looks at.
        compare: the teacher's own sampling, judged beside the student's.
        precision: ``bf16`` computes the networks in bfloat16.
        compiled: fuse the networks with ``torch.compile``.
        device: where tensors live.
        threads: for one operator.
    """

    name: str = "distil"
    seed: int = 0
    data: Source = field(default_factory=Digits)
    limit: Annotated[int, Ge(1)] | None = None
    teacher: Teacher = field(default_factory=Teacher)
    start: str | None = None
    texts: str | None = None
    shape: tuple[Annotated[int, Ge(1)], ...] | None = None
    method: Distiller = field(default_factory=SIM)
    lora: Annotated[int, Ge(1)] | None = None
    steps: Annotated[int, Ge(0)] | None = None
    budget: Annotated[float, Gt(0)] | None = None
    cooldown: Annotated[float, Ge(0), Le(1)] = 0.0
    batch: Annotated[int, Ge(1)] = 128
    calls: tuple[Annotated[int, Ge(1)], ...] | None = None
    samples: Annotated[int, Ge(20)] = 2000
    compare: tuple[Sampler, ...] = ()
    precision: Literal["float32", "bf16"] = "float32"
    compiled: bool = False
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    threads: Annotated[int, Ge(1), Le(256)] = 1

    def __post_init__(self) -> None:
        if self.steps is None and self.budget is None:
            raise AtollError("Say how long to train: `steps`, or a `budget` of 10^12 floating-point operations.")
        if self.texts is None and self.shape is not None:
            raise AtollError("`shape` goes with `texts`; otherwise the rows of `data` say it.")
        if self.texts is not None and self.start is None:
            raise AtollError("`texts` are told to a checkpoint; name its folder in `start`.")
        if self.texts is not None and self.method.needs == "images":
            raise AtollError("This method trains on real images, which a stage with `texts` has none of; see `needs`.")


def read_distil(value: Any, where: str = "recipe") -> Distil:
    """A stage from plain mappings; raises :class:`RecipeError` with all problems at once."""
    if not isinstance(value, Mapping):
        raise RecipeError(["a stage is a mapping such as `method: sim`"], where)
    reader = Reader()
    recipe = reader.call(Distil, {k: v for k, v in value.items() if k != "stage"}, "")
    if reader.problems:
        raise RecipeError(reader.problems, where)
    assert isinstance(recipe, Distil)
    return recipe


@dataclass
class Ready:
    """A stage whose data is loaded and whose teacher is there. ``images`` is None where only texts are given."""

    recipe: Distil
    images: Images | None
    teacher: Denoiser
    work: Work
    device: str

    @property
    def conditions(self) -> Tensor:
        return self.work.conditions.rows

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the rows that are made."""
        return self.images.sigma_data if self.images is not None else self.teacher.sigma_data

    @property
    def info(self) -> Info:
        """Of the rows that are made; of a checkpoint without rows, colours lie between -1 and 1."""
        if self.images is not None:
            return self.images.data.info
        return Info(
            name=Path(str(self.recipe.texts)).name, kind="image", shape=self.work.shape, mean=0.5,
            scale=self.sigma_data / 2,
        )  # fmt: skip


def prepare(recipe: Distil, images: Images | None = None, teacher: Denoiser | None = None) -> Ready:
    """Load the data and the teacher. ``images`` and ``teacher``: from an earlier stage."""
    torch.set_num_threads(recipe.threads)  # sums round by the number of threads
    device = recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("`device: cuda` needs a GPU that PyTorch can use, and there is none; use `device: auto`.")
    if recipe.texts is not None:
        return _told_texts(recipe, recipe.texts, device)
    if images is None:
        rows = recipe.data.load().train
        images = Images(rows.select(range(recipe.limit)) if recipe.limit and recipe.limit < len(rows) else rows)
    info = images.data.info
    if teacher is None:
        teacher = load_denoiser(recipe.start) if recipe.start else recipe.teacher.denoiser(images, device)
    _fits(teacher, images)
    given = images if recipe.method.needs == "images" else None
    work = Work(
        info.shape, Conditions.classes(info.num_classes or 1), given, recipe.seed, recipe.batch, device,
        build=_adapted(teacher.to(device), recipe.lora, recipe.seed),
    )  # fmt: skip
    return Ready(recipe, images, teacher, work, device)


def _told_texts(recipe: Distil, texts: str, device: str) -> Ready:
    """A checkpoint with the conditions of a file, and without rows."""
    teacher = load_denoiser(str(recipe.start))
    net = teacher.net
    if not isinstance(net, DiffusersNet):
        raise RunError(f"`{recipe.start}` holds no checkpoint that is told texts; leave `texts` out.")
    found = read_texts(texts, net)
    if found.null is not None:
        teacher = load_denoiser(str(recipe.start), null=found.null)
    size = net.config.get("sample_size")
    shape = recipe.shape or (net.channels, *_pair(size))
    if len(shape) < 3:
        raise RunError(f"`{recipe.start}` does not say how large its samples are; give `shape`, channels first.")
    x, cond = torch.zeros(1, *shape), found.rows[:1]
    try:
        with torch.no_grad():
            teacher(x, teacher.schedule.time(torch.ones(1)), cond)
    except (RuntimeError, ValueError) as e:
        raise RunError(f"The checkpoint does not take samples of {' x '.join(map(str, shape))}: {e}") from e
    work = Work(
        shape, Conditions(found.rows), None, recipe.seed, recipe.batch, device,
        build=_adapted(teacher.to(device), recipe.lora, recipe.seed),
    )  # fmt: skip
    return Ready(recipe, None, teacher, work, device)


def _pair(size: int | Sequence[int] | None) -> tuple[int, ...]:
    if size is None:
        return ()
    return (size, size) if isinstance(size, int) else tuple(size)


def _adapted(teacher: Denoiser, rank: int | None, seed: int) -> Callable[[], Denoiser] | None:
    """What makes students and fake scores of the teacher and an adapter; None where whole copies are trained."""
    if rank is None:
        return None
    return lambda: adapted(teacher, rank, seed=seed)


def _fits(teacher: Denoiser, images: Images) -> None:
    """Raise :class:`RunError` when the teacher makes no rows like those of the data."""
    info = images.data.info
    if teacher.classes is None or teacher.classes < (info.num_classes or 1):
        told = "embeddings" if teacher.classes is None else f"{teacher.classes} classes"
        raise RunError(
            f"The teacher is told {told}, and `{info.name}` has {info.num_classes} classes; for a model of texts, give "
            "its encoder's answers in `texts`."
        )
    x = torch.zeros(1, *info.shape)
    try:
        with torch.no_grad():
            teacher.cpu()
            same = teacher(x, teacher.schedule.time(torch.ones(1)), torch.zeros(1, dtype=torch.int64)).shape == x.shape
    except (RuntimeError, ValueError):
        same = False
    if not same:
        rows = " x ".join(map(str, info.shape))
        raise RunError(f"The teacher does not make rows of {rows}, which `{info.name}` has; choose other data.")


class DistilRun:
    """A run directory that is being written."""

    def __init__(self, folder: Path, ready: Ready) -> None:
        self.folder, self.ready = folder, ready
        self.events = folder / "events.jsonl"

    def go(self, on_step: Callable[[int, dict[str, float]], None] | None = None) -> dict[str, Any]:
        """Train to the end, judge, export. Returns the summary (the ``end`` event)."""
        recipe = self.ready.recipe
        trainer = trainer_of(self.ready, self.folder / "state")
        resumed = trainer.load()
        kept = [e for e in self._read() if e.get("step", 0) <= trainer.step] if resumed else []
        write_atomic(self.events, *(json.dumps(e).encode() + b"\n" for e in kept), durable=False)
        if not resumed:
            self._append(self._start(trainer))
        every = max(1, trainer.steps // EVENTS)

        def note(step: int, losses: dict[str, float]) -> None:
            if step % every == 0 or step == trainer.steps:
                self._append({"event": "step", "step": step, "losses": losses})
            if on_step is not None:
                on_step(step, losses)

        bill = trainer.go(note, f"{recipe.name}: {described(recipe.method)}")
        judged = self._judge(trainer)
        self._export(trainer)
        end = {
            "event": "end", "at": _now(), "steps": trainer.steps, "judged": judged, "samples": bill.samples,
            "cpu_seconds": bill.cpu_seconds, "seconds": bill.seconds, "teacher_seconds": bill.material_cpu_seconds,
            "trained_parameters": sum(
                p.numel() for r in trainer.roles.values() if r.lr for p in r.module.parameters() if p.requires_grad
            ),
        }  # fmt: skip
        self._append(end)
        return end

    def _judge(self, trainer: Trainer) -> list[dict[str, Any]]:
        """One entry per way of sampling: what, calls, metrics; a few samples of each go into ``state/``."""
        ready, recipe = self.ready, self.ready.recipe
        reference = Reference.of(ready.images, make_judge(ready.images)) if ready.images is not None else None
        samples = recipe.samples if reference is not None else min(recipe.samples, 20)
        ways: list[tuple[str, int, Any]] = [
            (f"teacher, {s.solver} {s.steps}", s.calls, lambda z, c, g, s=s: s(ready.teacher, z, c))
            for s in recipe.compare
        ]
        for calls in recipe.calls or recipe.method.few:
            ways.append((
                f"{described(recipe.method)}", calls,
                lambda z, c, g, n=calls: recipe.method.generate(trainer.nets, z, c, n, g),
            ))  # fmt: skip
        out: list[dict[str, Any]] = []
        shown: list[tuple[str, Tensor]] = []
        for label, calls, generate in ways:
            metrics, x = judge_generator(
                reference, generate, ready.work.shape, ready.conditions, samples=samples, device=ready.device
            )
            finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            out.append({"way": label, "calls": calls, "metrics": finite})
            several = 2 * len(ready.conditions) if reference is not None else samples
            shown.append((f"{label}: {calls} {'call' if calls == 1 else 'calls'}", x[:several]))
        if len(ready.work.shape) == 3:
            keep_samples(self.folder, ready.info, ready.sigma_data, shown)
        return out

    def _export(self, trainer: Trainer) -> None:
        """Diffusers' and peft's formats for what is theirs; our own networks with the facts that let them load
        alone."""
        nets: Mapping[str, Any] = trainer.nets
        student, recipe, folder = nets.get("student_ema", nets.get("student")), self.ready.recipe, self.folder / "model"
        if student is None:
            return
        facts: dict[str, Any] = {"method": described(recipe.method), "calls": list(recipe.method.few)}
        folder.mkdir(parents=True, exist_ok=True)
        teacher, ready = self._builder(), self.ready
        save_description(
            folder, describe_student(recipe.method, ready.info, ready.sigma_data, ready.teacher.classes, teacher)
        )
        if isinstance(student, Denoiser) and savable(student):
            save_denoiser(student, folder)
            return
        if named_tensors(student).keys() == named_tensors(ready.teacher).keys():
            facts |= teacher or {}
        save_model(student, folder, facts)

    def _builder(self) -> dict[str, Any] | None:
        """What built the teacher, and so the student; None of a checkpoint, which says it itself."""
        recipe = self.ready.recipe
        if recipe.start:
            if not (Path(recipe.start) / ABOUT).exists():
                return None
            about = json.loads((Path(recipe.start) / ABOUT).read_text(encoding="utf-8"))
            return {k: about[k] for k in ("builder", "wrapper", "data", "outputs", "seed") if k in about}
        t, info = recipe.teacher, self.ready.info
        wrapper = AsDenoiser(t.kind, self.ready.sigma_data)
        return about_model(t.model, info, info.num_classes or 1, t.seed, wrapper)

    def _start(self, trainer: Trainer) -> dict[str, Any]:
        ready = self.ready
        info = ready.info
        return {
            "event": "start", "at": _now(), "name": ready.recipe.name, "method": described(ready.recipe.method),
            "needs": ready.recipe.method.needs, "data": info.name, "steps": trainer.steps,
            "shape": list(info.shape),
            "parameters": sum(p.numel() for p in ready.teacher.parameters()),
        }  # fmt: skip

    def _read(self) -> list[dict[str, Any]]:
        return [e for e in read_json_lines(self.events) if e.get("event") != "end"]

    def _append(self, event: Mapping[str, Any]) -> None:
        with open(self.events, "ab") as f:
            f.write(json.dumps(event, default=float).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())


def trainer_of(ready: Ready, folder: Path | None = None) -> Trainer:
    """What trains the student, for as many steps as the recipe says or its budget pays for."""
    r = ready.recipe
    made = Trainer(r.method, ready.teacher, ready.work, r.steps or 0, folder, r.precision, r.compiled, r.cooldown)
    made.steps = steps_of(r, made)
    return made


def steps_of(recipe: Distil, trainer: Trainer) -> int:
    """``recipe.steps``, or as many as its budget pays for: operations are counted on one step."""
    if recipe.steps is not None:
        return recipe.steps
    assert recipe.budget is not None
    trainer.steps = COUNTED
    trainer.prepare()
    each = trainer.flops_per_step()
    return max(1, int(recipe.budget * 1e12 / each)) if each else 0


def foresee_making(recipe: Distil, teacher: Denoiser | None = None) -> dict[str, Any]:
    """Steps, operations and size of a stage; nothing is trained, so a teacher that does not exist yet has random
    weights. ``flops`` is None for methods that first make samples of the teacher."""
    if recipe.texts is not None:
        ready = _told_texts(recipe, recipe.texts, "cpu")
        teacher, work = ready.teacher, ready.work
    else:
        rows = recipe.data.load().train
        images, info = Images(rows), rows.info
        if teacher is None and recipe.start:
            teacher = load_denoiser(recipe.start)
        teacher = teacher or make_denoiser(recipe.teacher.model, info, 0, recipe.teacher.kind)
        work = Work(info.shape, Conditions.classes(info.num_classes or 1), images, recipe.seed, recipe.batch)
    trainer = Trainer(recipe.method, teacher, work, recipe.steps or COUNTED)
    steps, flops = recipe.steps, None
    if type(recipe.method).material is Distiller.material:
        each = trainer.flops_per_step()
        steps = steps if steps is not None else int((recipe.budget or 0) * 1e12 / each) if each else 0
        flops = each * steps
    return {
        "method": described(recipe.method), "steps": steps, "flops": flops,
        "parameters": sum(p.numel() for p in teacher.parameters()),
    }  # fmt: skip


def described(method: Distiller) -> str:
    """Its name in recipes."""
    return str(describe(method)["name"])


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
