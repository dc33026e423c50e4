"""A many-step model trained here, once per machine: what serves as the pretrained one in recipes, claims and tests."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import nn

from atoll.core.build import describe
from atoll.core.errors import DataError, MessageError
from atoll.core.files import user_cache, write_atomic
from atoll.core.message import NO_LIMITS, Message, decode, detach, encode, seal, unseal
from atoll.core.tree import clone, copy_, named_tensors
from atoll.data.dataset import Info
from atoll.data.source import Source
from atoll.diffusion.as_denoiser import AsDenoiser, Kind
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.distiller import Conditions, Images, Work
from atoll.diffusion.evaluate import describe_rows
from atoll.diffusion.methods.edm_fm_teacher import EdmFmTeacher
from atoll.diffusion.trainer import Trainer
from atoll.models.model import ModelBuilder, build_model
from atoll.models.unet import UNet

EDITION = 1
"""Of the training below: another one gives other weights, and so another name in the cache."""


def make_denoiser(
    network: ModelBuilder, info: Info, seed: int, kind: Kind = "edm", sigma_data: float = 0.5
) -> Denoiser:
    """An untrained denoiser for a data set's rows and classes.

    Raises:
        DataError: for a network that does not denoise.
    """
    if network.architecture.denoises is False:
        raise DataError(f"{type(network).__name__} does not take a noise level; choose `unet` or `dit` as the model.")
    classes = info.num_classes or 1
    return AsDenoiser(kind, sigma_data)(build_model(network, info, classes, seed), classes)


def expect_fits(teacher: Denoiser, info: Info) -> None:
    """Raise :class:`DataError` when a denoiser makes no rows like those of the data, class by class."""
    if teacher.classes is None or teacher.classes < (info.num_classes or 1):
        told = "embeddings" if teacher.classes is None else f"{teacher.classes} classes"
        raise DataError(
            f"The teacher is told {told}, and `{info.name}` has {info.num_classes} classes; for a model of texts, give "
            "its encoder's answers in `texts`."
        )
    device = next(teacher.parameters()).device  # where memory is counted before it is taken: none, but shapes
    x, cond = torch.zeros(1, *info.shape, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    try:
        with torch.no_grad():
            same = teacher(x, teacher.schedule.time(torch.ones(1, device=device)), cond).shape == x.shape
    except (RuntimeError, ValueError):
        same = False
    if not same:
        rows = " x ".join(map(str, info.shape))
        raise DataError(f"The teacher does not make rows of {rows}, which `{info.name}` has; choose other data.")


@dataclass(frozen=True, kw_only=True)
class Base:
    """A denoiser that is trained in one place, on public rows, before any site is asked: what adapters adapt.

    Args:
        data: the public rows: keep them apart from those of the sites (``subset`` names rows and classes).
        steps, batch, lr, seed: of the training, as in :class:`Teacher`.
    """

    data: Source
    steps: Annotated[int, Ge(0)] = 1000
    batch: Annotated[int, Ge(1)] = 128
    lr: Annotated[float, Gt(0)] = 2e-3
    seed: int = 0

    def denoiser(self, network: ModelBuilder, kind: Kind, sigma_data: float, info: Info) -> Denoiser:
        """The trained model, for rows like those that ``info`` describes.

        Raises:
            DataError: when the public rows are of another shape or have other classes.
        """
        rows = self.data.load().train
        if rows.info.shape != info.shape or rows.info.num_classes != info.num_classes:
            theirs, ours = (f"{' x '.join(map(str, i.shape))} of {i.num_classes} classes" for i in (rows.info, info))
            raise DataError(f"The base saw rows of {theirs}, and those of `{info.name}` are {ours}; they must agree.")
        teacher = Teacher(model=network, kind=kind, steps=self.steps, batch=self.batch, lr=self.lr, seed=self.seed)
        return teacher.denoiser(Images(rows.about(info), sigma_data))


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A denoiser trained on real rows, kept in the user's cache under a hash of all that it depends on.

    Args:
        model: the network.
        kind: ``edm`` (preconditioned, variance exploding) or ``flow`` (rectified flow).
        steps: of training.
        batch: images a step.
        lr: largest step size of Adam.
        seed: of weights, noise and order.
    """

    model: ModelBuilder = UNet()
    kind: Kind = "edm"
    steps: Annotated[int, Ge(0)] = 3000
    batch: Annotated[int, Ge(1)] = 128
    lr: Annotated[float, Gt(0)] = 2e-3
    seed: int = 0

    def denoiser(self, images: Images, device: str = "cpu") -> Denoiser:
        """The trained model, from the cache or trained now (an interrupted training goes on where it was)."""
        info = images.data.info
        made = make_denoiser(self.model, info, self.seed, self.kind, images.sigma_data)
        said = json.dumps([EDITION, describe(self), describe_rows(images)], sort_keys=True)
        name = hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
        folder = user_cache() / "teachers"
        path = folder / f"{name}.safetensors"
        try:
            copy_(named_tensors(made), detach(unseal(decode(path.read_bytes(), NO_LIMITS))).parts["weights"])
            return made.to(device).eval()
        except FileNotFoundError:
            pass
        except MessageError:
            path.unlink(missing_ok=True)  # damaged: train again
        work = Work(info.shape, Conditions.classes(info.num_classes or 1), images, self.seed, self.batch, device)
        trainer = Trainer(EdmFmTeacher(lr=self.lr), made, work, self.steps, folder / f"{name}.partial")
        bill = trainer.go(label="training the teacher")
        best: nn.Module = trainer.nets["student_ema"]
        folder.mkdir(parents=True, exist_ok=True)
        message = Message("teacher", {"weights": clone(named_tensors(best))}, {"cpu_seconds": bill.cpu_seconds})
        write_atomic(path, encode(seal(message)))
        shutil.rmtree(folder / f"{name}.partial", ignore_errors=True)
        made.load_state_dict(best.state_dict())
        return made.eval().requires_grad_(True)
