"""Vertical federated learning in one process: parties hold different columns of the same rows, one holds the labels.

Each party's bottom model turns its columns into an embedding; the party with the labels runs the top model on all of
them. In a step embeddings cross one way and their gradients the other, and nothing else does. For studies of attacks
and defences (passports in bottom and top models, ``models/passported.py``); no part of a real federation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.core.streams import stream
from atoll.federated.local.optimizer import make_optimizer
from atoll.federated.local.training import Training
from atoll.models.model import seeded


def train_vertical(
    bottoms: Sequence[nn.Module], top: nn.Module, columns: Sequence[Tensor], y: Tensor, training: Training, seed: int
) -> int:
    """Train all models in place, ``training.epochs`` over the rows; returns the bytes that crossed.

    Args:
        bottoms: of each party: its columns ``[B, F_p]`` -> embedding ``[B, D_p]``.
        top: embeddings side by side -> logits ``[B, C]``; at the party with the labels.
        columns: of each party, rows aligned, ``[N, F_p]``.
        y: classes ``[N]``.
    """
    optimisers = [make_optimizer(training, list(m.parameters()), training.lr) for m in (*bottoms, top)]
    order, crossed = stream(seed, "vertical", "batches"), 0
    for model in (*bottoms, top):
        model.train()
    with seeded(seed, "vertical"):
        for _ in range(training.epochs):
            for rows in torch.randperm(len(y), generator=order).split(training.batch_size):
                own = [bottom(x[rows]) for bottom, x in zip(bottoms, columns, strict=True)]
                arrived = [h.detach().requires_grad_() for h in own]
                loss = F.cross_entropy(top(torch.cat(arrived, 1)), y[rows])
                weights = list(top.parameters())
                found = torch.autograd.grad(loss, [*weights, *arrived])
                optimisers[-1].step(list(found[: len(weights)]))
                back = found[len(weights) :]
                crossed += sum(2 * g.numel() * g.element_size() for g in back)
                for bottom, h, g, optimiser in zip(bottoms, own, back, optimisers, strict=False):
                    optimiser.step(list(torch.autograd.grad(h, list(bottom.parameters()), g)))
    return crossed


@torch.no_grad()
def predict_vertical(bottoms: Sequence[nn.Module], top: nn.Module, columns: Sequence[Tensor]) -> Tensor:
    """Logits ``[N, C]`` in evaluation mode."""
    own = [bottom.eval()(x) for bottom, x in zip(bottoms, columns, strict=True)]
    out: Tensor = top.eval()(torch.cat(own, 1))
    return out
