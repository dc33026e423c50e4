"""A distilled generator as a folder that draws again: its weights, and how its method samples them.

The weights are what ``save_model`` or ``save_denoiser`` wrote; ``student.json`` beside them says which method made
them. Its roles are built again on a fresh teacher, so several students behind a router, experts in time or a guidance
adapter come back as they were, not only copies of the teacher.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atoll.core.build import Reader, describe
from atoll.core.errors import DataError
from atoll.core.files import write_json
from atoll.core.streams import stream
from atoll.core.tree import named_tensors
from atoll.data.dataset import Info
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.diffusers_model import load_denoiser, savable, save_denoiser, with_adapter
from atoll.diffusion.distiller import Conditions, Distiller, Nets, Work
from atoll.diffusion.evaluate import as_pixels
from atoll.models.diffusers_folder import holds_diffusers
from atoll.models.export import ABOUT, build_described, save_model
from atoll.models.weights import load_weights, read_weights

NAME = "student.json"
LARGEST = 1_000_000
"""Of a side, and of the number of classes."""
HELD = ("method", "shape", "conditions", "sigma_data", "mean", "scale", "teacher")


@dataclass(frozen=True)
class Student:
    """A generator and how it is sampled.

    Attributes:
        method: that made it.
        nets: its networks by role.
        shape: of a sample.
        classes: how many it tells apart; None where it is told embeddings.
        sigma_data, mean, scale: what turns samples into pixels.
    """

    method: Distiller
    nets: Mapping[str, nn.Module]
    shape: tuple[int, ...]
    classes: int | None
    sigma_data: float
    mean: Any
    scale: Any

    def draw(self, cond: Tensor, calls: int | None = None, seed: int = 0) -> Tensor:
        """Samples ``[B, ...]`` with standard deviation ``sigma_data``, the same for the same seed.

        Args:
            cond: classes ``[B]``, or embeddings ``[B, rows, width]``.
            calls: of the network per sample; None: the fewest that the method is made for.
        """
        if self.classes is not None and (cond.min() < 0 or cond.max() >= self.classes):
            raise DataError(f"This generator knows classes from 0 to {self.classes - 1}.")
        calls = calls or min(self.method.few)
        device = next((p.device for net in self.nets.values() for p in net.parameters()), torch.device("cpu"))
        z = torch.randn(len(cond), *self.shape, generator=stream(seed, "draw", "noise"))
        own = torch.Generator(device).manual_seed(stream(seed, "draw", "sampler").initial_seed())
        return self.method.generate(self.nets, z.to(device), cond.to(device), calls, own).cpu()

    def pixels(self, x: Tensor) -> np.ndarray:
        """Samples of images as uint8 ``[B, H, W, C]``."""
        if x.dim() != 4 or x.shape[1] not in (1, 3):
            raise DataError(f"Samples of {' x '.join(map(str, x.shape[1:]))} are no pictures (latents need a decoder).")
        return as_pixels(x, self.mean, self.scale, self.sigma_data)


def describe_student(
    method: Distiller, info: Info, sigma_data: float, classes: int | None, teacher: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What :func:`load_student` needs besides weights.

    Args:
        info: of the rows that are made.
        classes: how many the teacher was told; None for embeddings.
        teacher: facts of ``about_model`` that build it; None where only its checkpoint says.
    """
    plain = {k: torch.as_tensor(getattr(info, k)).tolist() for k in ("mean", "scale")}
    return {
        "method": describe(method), "shape": list(info.shape), "conditions": classes, "sigma_data": sigma_data,
        "teacher": None if teacher is None else dict(teacher), **plain,
    }  # fmt: skip


def save_student(
    folder: Path, method: Distiller, nets: Nets, teacher: Denoiser, info: Info, sigma_data: float,
    built: Mapping[str, Any] | None, facts: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write a student so that it draws again: in diffusers' and peft's formats what is theirs, networks of our own with
    the facts that let them load alone. A method without a student leaves nothing.

    Args:
        nets: by role.
        teacher: that it was made from.
        info: of the rows that are made.
        built: facts of ``about_model`` that build the teacher; None where only its checkpoint says.
        facts: more of them, for ``model.json``.
    """
    student: Any = nets.get("student_ema", nets.get("student"))
    if student is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / NAME, describe_student(method, info, sigma_data, teacher.classes, built))
    if isinstance(student, Denoiser) and savable(student):
        save_denoiser(student, folder)
        return
    known = built if built and named_tensors(student).keys() == named_tensors(teacher).keys() else {}
    save_model(student, folder, {"calls": list(method.few), **facts, **known})


def facts_of(folder: Path | str) -> dict[str, Any] | None:
    """What built the model in a folder; None of a checkpoint, which says it itself."""
    about = Path(folder) / ABOUT
    if not about.exists():
        return None
    held = json.loads(about.read_text(encoding="utf-8"))
    return {k: held[k] for k in ("builder", "wrapper", "data", "outputs", "seed") if k in held}


def load_student(folder: Path | str, teacher: Denoiser | None = None) -> Student:
    """The generator that a run's ``model/`` holds.

    Args:
        teacher: of which the student is an adapter, or (of a checkpoint) a changed copy; not needed otherwise.

    Raises:
        DataError: when the folder holds none, or needs the teacher.
    """
    folder = Path(folder)
    try:
        facts = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"`{folder}` holds no generator that can be drawn from (no readable {NAME}).") from e
    if not isinstance(facts, dict) or not set(HELD) <= facts.keys():
        raise DataError(f"{folder / NAME} is incomplete; run the stage again.")
    reader = Reader()
    method = reader.read(Distiller, facts["method"], "method")
    if reader.problems:
        raise DataError(f"{folder / NAME}: {'; '.join(reader.problems)}.")
    try:
        shape, classes = tuple(int(n) for n in facts["shape"]), facts["conditions"]
        look = {k: torch.as_tensor(facts[k]) for k in ("mean", "scale")}
        sigma_data = float(facts["sigma_data"])
        if not all(0 < n <= LARGEST for n in (*shape, *([] if classes is None else [int(classes)]))):
            raise ValueError("sizes out of bounds")
    except (TypeError, ValueError, RuntimeError) as e:
        raise DataError(f"{folder / NAME} is damaged ({e}); run the stage again.") from e
    nets = _nets(folder, facts, method, teacher, shape, classes)
    for net in nets.values():
        net.eval().requires_grad_(False)
    return Student(method, nets, shape, classes, sigma_data, **look)


def _nets(
    folder: Path, facts: Mapping[str, Any], method: Distiller, teacher: Denoiser | None, shape: tuple[int, ...],
    classes: int | None,
) -> dict[str, nn.Module]:  # fmt: skip
    """Networks by role, with the saved weights in that of the student."""
    if (folder / "adapter_config.json").exists():
        if teacher is None:
            raise DataError(f"`{folder}` holds an adapter; give the teacher that it belongs to.")
        return {"student": with_adapter(teacher, folder)}
    if holds_diffusers(folder):
        return {"student": load_denoiser(folder)}
    if teacher is None:
        if facts["teacher"] is None:
            raise DataError(f"`{folder}` holds a changed copy of a checkpoint; give the checkpoint as its teacher.")
        built: Any = build_described(facts["teacher"], str(folder / NAME), fresh=True)
        if not isinstance(built, Denoiser):
            raise DataError(f"{folder / NAME} describes a {type(built).__name__}, which is no denoiser.")
        teacher = built
    work = Work(shape, Conditions.classes(classes or 1))
    own: dict[str, nn.Module] = {name: role.module for name, role in method.roles(teacher, work).items()}
    nets = {**own, **method.joined(own)}
    load_weights(nets["student"], read_weights(folder), str(folder))
    return nets
