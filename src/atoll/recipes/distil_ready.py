"""Before a stage of distillation trains: its data, its teacher, how long it will take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.core.errors import RunError
from atoll.data.dataset import Info
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.diffusers_model import adapted, load_denoiser
from atoll.diffusion.distiller import Conditions, Distiller, Images, Work
from atoll.diffusion.teacher import expect_fits, make_denoiser
from atoll.diffusion.trainer import Trainer
from atoll.models.diffusers_net import DiffusersNet
from atoll.recipes.distil import Distil, described
from atoll.recipes.texts import read_texts

COUNTED = 1000
"""Length of the run whose first step is counted to see how many a budget pays for: some methods divide theirs."""


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


def prepare(recipe: Distil) -> Ready:
    """Load the data and the teacher."""
    torch.set_num_threads(recipe.threads)  # sums round by the number of threads
    device = recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("`device: cuda` needs a GPU that PyTorch can use, and there is none; use `device: auto`.")
    images = None
    if recipe.texts is not None:
        teacher, shape, conditions = _told_texts(recipe, recipe.texts)
    else:
        rows = recipe.data.load().train
        images = Images(rows.select(range(recipe.limit)) if recipe.limit and recipe.limit < len(rows) else rows)
        teacher = load_denoiser(recipe.start) if recipe.start else recipe.teacher.denoiser(images, device)
        expect_fits(teacher, rows.info)
        shape, conditions = rows.info.shape, Conditions.classes(rows.info.num_classes or 1)
    given = images if recipe.method.needs == "images" else None
    build = _adapted(teacher.to(device), recipe.lora, recipe.seed)
    work = Work(shape, conditions, given, recipe.seed, recipe.batch, device, build=build)
    return Ready(recipe, images, teacher, work, device)


def _told_texts(recipe: Distil, texts: str) -> tuple[Denoiser, tuple[int, ...], Conditions]:
    """A checkpoint, the shape of its samples, and the conditions of a file."""
    teacher = load_denoiser(str(recipe.start))
    net = teacher.net
    if not isinstance(net, DiffusersNet):
        raise RunError(f"`{recipe.start}` holds no checkpoint that is told texts; leave `texts` out.")
    found = read_texts(texts, net)
    if found.null is not None:
        teacher = load_denoiser(str(recipe.start), null=found.null)
    shape = recipe.shape or (net.channels, *_pair(net.config.get("sample_size")))
    if len(shape) < 3:
        raise RunError(f"`{recipe.start}` does not say how large its samples are; give `shape`, channels first.")
    try:
        with torch.no_grad():
            teacher(torch.zeros(1, *shape), teacher.schedule.time(torch.ones(1)), found.rows[:1])
    except (RuntimeError, ValueError) as e:
        raise RunError(f"The checkpoint does not take samples of {' x '.join(map(str, shape))}: {e}") from e
    return teacher, shape, Conditions(found.rows)


def _pair(size: int | Sequence[int] | None) -> tuple[int, ...]:
    if size is None:
        return ()
    return (size, size) if isinstance(size, int) else tuple(size)


def _adapted(teacher: Denoiser, rank: int | None, seed: int) -> Callable[[], Denoiser] | None:
    """What makes students and fake scores of the teacher and an adapter; None where whole copies are trained."""
    if rank is None:
        return None
    return lambda: adapted(teacher, rank, seed=seed)


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


def foresee_making(recipe: Distil) -> dict[str, Any]:
    """Steps, operations and size of a stage; nothing is trained, so a teacher that would be trained here has random
    weights. ``flops`` is None for methods that first make samples of the teacher."""
    if recipe.texts is not None:
        teacher, shape, conditions = _told_texts(recipe, recipe.texts)
        images = None
    else:
        rows = recipe.data.load().train
        images, info = Images(rows), rows.info
        shape, conditions = info.shape, Conditions.classes(info.num_classes or 1)
        own = recipe.teacher
        teacher = load_denoiser(recipe.start) if recipe.start else make_denoiser(own.model, info, 0, own.kind)
    build = _adapted(teacher, recipe.lora, recipe.seed)
    work = Work(shape, conditions, images, recipe.seed, recipe.batch, build=build)
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
