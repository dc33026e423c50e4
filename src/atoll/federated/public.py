"""Training at the server, on its own rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from atoll.federated.local.local_sgd import train
from atoll.federated.local.training import Training
from atoll.federated.method import MergeContext


def train_on_public(model: nn.Module, training: Training, context: MergeContext, purpose: str) -> None:
    """Train ``model`` on the public rows, in place; no step in a dry run. ``purpose`` names the random streams."""
    if context.dry:
        return
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.stream(purpose, "global").initial_seed())  # dropout and the like
        train(context.task, model, batches(training, context, purpose), training, training.lr_at(context.round))


def batches(training: Training, context: MergeContext, purpose: str) -> Iterator[Any]:
    """The public rows in a fresh order each epoch."""
    order = context.stream(purpose)
    for _ in range(training.epochs):
        for rows in torch.randperm(len(context.public), generator=order).split(training.batch_size):
            yield context.public.ready(rows)
