"""Local training on features beside rows: a shared generator invents them, a private transform makes them the site's.

Chen et al., ICCV 2023, arXiv 2205.14900.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor

from atoll.core.message import Message
from atoll.core.tree import sub
from atoll.federated.knowledge.mmd import mmd
from atoll.federated.local.local_sgd import gradients
from atoll.federated.local.optimizer import clip_, make_optimizer
from atoll.federated.local.training import Training
from atoll.federated.method import LocalWork
from atoll.federated.visit import Cost, Result, Visit
from atoll.models.augmented import AugmentedNet
from atoll.models.features import tapped
from atoll.tasks.classification import expect_classes


@dataclass(frozen=True, kw_only=True)
class AugmentFeatures(LocalWork):
    """For each batch one step of the model, then one of the generator, then one of the transform.

    Model: (1 - r) CE of the rows + r CE of as many invented features. Generator: features of the right class under this
    site's head that are unlike the site's. Transform: features near the site's that its head cannot tell.

    Args:
        training: of the model: step size and so on; the others have its momentum, decay and clipping.
        most: largest r; 0 trains the model on rows alone.
        ramp: rounds until r would be 1: r = min(most, exp(3 (round / ramp - 1))).
        lr_generator: its step size.
        lr_transform: its step size.
        unlike: weight of the generator's distance from the site's features.
        near: weight of the transform's distance from them.
        momentum: how far a batch moves the mean of a class.
    """

    training: Training
    most: Annotated[float, Ge(0), Le(1)] = 0.5
    ramp: Annotated[int, Ge(1)] = 300
    lr_generator: Annotated[float, Gt(0)] = 0.05
    lr_transform: Annotated[float, Gt(0)] = 0.025
    unlike: Annotated[float, Ge(0)] = 1.0
    near: Annotated[float, Ge(0)] = 1.0
    momentum: Annotated[float, Gt(0), Le(1)] = 0.3

    def run(self, visit: Visit) -> Result:
        t, net, r = self.training, visit.model, self.share_at(visit.round)
        assert isinstance(net, AugmentedNet)
        expect_classes(visit.data.train, net.classes, "fraug")
        lr, decay = t.lr_at(visit.round), t.lr_decay**visit.round
        steps = {
            "body": (lr, [p for p in net.body.parameters() if p.requires_grad]),
            "generator": (self.lr_generator * decay, list(net.generator.parameters())),
            "transform": (self.lr_transform * decay, list(net.transform.parameters())),
        }
        optimizers = {name: make_optimizer(replace(t, lr=rate), params, rate) for name, (rate, params) in steps.items()}

        def step(name: str, loss: Tensor) -> None:
            grads = gradients(loss, steps[name][1])
            if t.clip_norm:
                clip_(grads, t.clip_norm)
            optimizers[name].step(grads)

        noise, head = visit.stream("noise"), net.head()
        with tapped(head) as tap:
            for batch in visit.batches(t.batch_size, t.epochs):
                loss, y = visit.task.mean_loss(net.body, batch), batch["y"]
                real = tap.feature("fraug").detach()
                net.meet(real, y, self.momentum)
                labels = labels_like(y, net.classes, noise)
                if r:
                    with torch.no_grad():
                        invented = net.own(net.common(labels, noise), labels)
                    loss = (1 - r) * loss + r * F.cross_entropy(head(invented), labels)
                step("body", loss)
                common = net.common(labels, noise)
                step("generator", F.cross_entropy(head(common), labels) - self.unlike * mmd(common, real))
                own = net.own(common.detach(), labels)
                step("transform", self.near * mmd(own, real) - entropy(head(own)).mean())
        delta = sub(visit.shared(), visit.replica.get("weights", {}))
        passes = float(len(visit.data.train) * t.epochs)
        return Result(Message("delta", {"delta": delta}), cost=Cost(passes, passes))

    def share_at(self, round: int) -> float:
        """r: how much invented features count in this round."""
        return min(self.most, math.exp(3 * (round / self.ramp - 1)))


def labels_like(y_B: Tensor, classes: int, noise: torch.Generator) -> Tensor:
    """As many classes as ``y_B`` has, and at least 2: the first half as in the batch, the others drawn from all."""
    size = max(2, len(y_B))
    drawn = torch.randint(classes, (size,), generator=noise).to(y_B.device)
    half = len(y_B) // 2
    return torch.cat([y_B[:half], drawn[half:]])


def entropy(logits_BC: Tensor) -> Tensor:
    """Of the predicted classes, in nats, one value per row ``[B]``."""
    log_p = F.log_softmax(logits_BC, dim=1)
    return -(log_p.exp() * log_p).sum(1)
