"""What a model builder is, and how one is used so that equal seeds give equal bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from atoll.core.errors import DataError
from atoll.core.streams import key
from atoll.data.dataset import Info


class ModelBuilder(Protocol):
    """Builds a fresh module for a data set. Initial weights come from the global generator (see below).

    Must   equal   builders that compare equal build the same architecture, and hash alike
           input   the module takes ``batch["x"]`` alone: ``[B, *info.shape]``, float32 or (text) int64
           output  a tensor ``[B, outputs]`` (language models: ``[B, length, outputs]``), or an object that
                   has one as ``.logits``
    """

    package: ClassVar[str] = "atoll.models"
    denoises: ClassVar[bool | None] = False
    """The module takes noisy rows, times and classes, and returns rows; only a denoising task can use it. None: its
    owner knows."""

    def build(self, info: Info, outputs: int) -> nn.Module:
        """Args: what the inputs look like; how many outputs there are (classes, targets, vocabulary)."""
        ...

    @property
    def architecture(self) -> ModelBuilder:
        """What builds the same module and reads no weights."""
        return self


class Wrapper(Protocol):
    """What a task puts around a built network, where it uses more than the network itself."""

    package: ClassVar[str] = "atoll.diffusion.as_denoiser"

    def __call__(self, net: nn.Module, outputs: int) -> nn.Module:
        """Args: ``outputs``: what the network was built for."""
        ...


@contextmanager
def seeded(seed: int, *name: str | int) -> Iterator[None]:
    """Inside, the global generators (torch, NumPy, Python) follow the named stream; then all is as before."""
    number = key(seed, *name)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    theirs, ours = random.getstate(), np.random.get_state()  # noqa: NPY002  a user's model may draw from these
    with torch.random.fork_rng(devices=devices):
        try:
            torch.manual_seed(number)
            random.seed(number)
            np.random.seed(number % 2**32)  # noqa: NPY002
            yield
        finally:
            random.setstate(theirs)
            np.random.set_state(ours)  # noqa: NPY002


def build_model(network: ModelBuilder, info: Info, outputs: int, seed: int) -> nn.Module:
    """A fresh model. Equal arguments give equal bits; the global generators are left alone."""
    with seeded(seed, "model"):
        return network.build(info, outputs)


def expect_shape(info: Info, dims: int, what: str, layout: str) -> tuple[int, ...]:
    """``info.shape``, if it has ``dims`` dimensions; else an error that names the model."""
    if len(info.shape) != dims:
        got = " x ".join(map(str, info.shape)) or "a single number"
        raise DataError(f"{what} takes {layout}; a row of `{info.name}` is {got}. Choose another model.")
    return info.shape


def refuse_tokens(info: Info, what: str) -> None:
    """Raise when the rows are token ids, whose numbers mean nothing to a layer that multiplies them."""
    if info.kind == "text":
        raise DataError(f"{what} cannot read tokens (`{info.name}` is text). Use `lm` or `transformers_model`.")
