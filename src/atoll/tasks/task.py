"""What is learned. A task knows nothing of federation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.data.dataset import Dataset
from atoll.models.model import ModelBuilder, Wrapper

Batch = Mapping[str, Tensor]
"""Columns of a data set for some examples, on the model's device, ready for the model (float, normalised)."""


class Task(Protocol):
    """Builds a model, computes a loss per example, evaluates.

    Must   per-example  ``loss`` returns one value per example ``[B]``; masks and weights belong to the caller
           same         ``mean_loss`` is the mean of ``loss``
           pure         evaluation leaves the model as it found it, and gives the same numbers when repeated

    A loss may be random (dropout; the noise and time of a denoiser). It then draws from torch's global
    generator, e.g. ``torch.randn_like(x)``, never from one of its own: the worker seeds the global generator
    from (seed, round, site) before each visit, so serial, parallel and resumed runs agree. Draw for the whole
    batch at once and before the model runs, and expect fresh numbers at every call: two calls in one step see
    different noise. Evaluation has no such seed, so a task with a random loss evaluates inside
    ``with seeded(0, "evaluate"):`` from ``models/model.py``: the same noise at every site and in every round,
    and the global generator is left alone.

    A task is a frozen dataclass. ``info`` comes from the data; all other fields are configuration.
    """

    package: ClassVar[str] = "atoll.tasks"
    later: ClassVar[frozenset[str]] = frozenset({"info", "network", "site_networks"})
    """What a recipe says elsewhere, and gives a task once the data is known."""
    headline: ClassVar[str]
    """The metric that reports lead with, a key of ``evaluate``."""
    higher_is_better: ClassVar[bool]
    denoises: ClassVar[bool] = False
    """Its networks see noisy rows, times and classes; see ``ModelBuilder.denoises``."""
    alternates: ClassVar[bool] = False
    """Its model is several networks that take turns, each with a loss of its own: local work has to know."""

    @property
    def wrapper(self) -> Wrapper | None:
        """What :meth:`model` puts around the network that is built; None: nothing."""
        return None

    @property
    def outputs(self) -> int:
        """How many numbers a model returns: classes, targets, or the vocabulary."""
        ...

    def model(self, seed: int, site: int | None = None) -> nn.Module:
        """A fresh model; equal seeds give equal bits. ``site``: whose architecture, where they differ."""
        ...

    def model_key(self, site: int | None = None) -> object:
        """Sites with equal keys have the same architecture (and may share one instance in a simulator)."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor: ...

    def mean_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean of ``loss``; override where a fused kernel is faster."""
        return self.loss(model, batch).mean()

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Raw outputs (logits or values), one row per example."""
        ...

    def evaluate(self, model: nn.Module, data: Dataset) -> dict[str, float]: ...


def network_at(site: int | None, network: ModelBuilder, site_networks: tuple[ModelBuilder, ...]) -> ModelBuilder:
    """A site's builder: site i has ``site_networks[i % len]``; ``network`` where there are none."""
    if site is None or not site_networks:
        return network
    return site_networks[site % len(site_networks)]


def outputs_of(model: nn.Module, *inputs: Tensor) -> Tensor:
    """The model's output as a tensor; models of ``transformers`` return an object with ``.logits``."""
    out: Any = model(*inputs)
    if isinstance(out, Tensor):
        return out
    logits = getattr(out, "logits", None)
    if not isinstance(logits, Tensor):
        raise AtollError(
            f"The model returned {type(out).__name__}; it must return a tensor or an object with `.logits`."
        )
    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients, giving the model's device; then each module has its mode back."""
    training = [m for m in model.modules() if m.training]
    parameter = next(model.parameters(), None)
    model.eval()
    try:
        with torch.no_grad():
            yield parameter.device if parameter is not None else torch.device("cpu")
    finally:
        for module in training:
            module.training = True


def rows_at_once(*numbers_per_row: int) -> int:
    """How many rows to evaluate together: at most 512, and at most 2^25 of their numbers."""
    return max(1, min(512, 2**25 // max(1, math.prod(numbers_per_row))))
