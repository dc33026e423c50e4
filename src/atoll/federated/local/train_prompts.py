"""First the prompt that all share, then the classes' own prefixes, on the classes that the site sees now.

Yu et al., KDD 2024, arXiv 2407.00113.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from atoll.core.message import Message
from atoll.core.tree import sub
from atoll.federated.local.local_sgd import gradients
from atoll.federated.local.optimizer import clip_, make_optimizer
from atoll.federated.local.training import Training
from atoll.federated.method import LocalWork
from atoll.federated.visit import Cost, Result, Visit
from atoll.models.prompted import NOWHERE, PromptedNet
from atoll.tasks.classification import expect_classes

Loss = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class TrainPrompts(LocalWork):
    """Cross-entropy over the classes at hand - pull * cosine of key and query, twice: for prompt and common head, then
    for prefixes, their keys and the own head, whose query is what the prompt gives.

    What belongs to other classes keeps its bits: rows of both heads, prefixes and keys.

    Args:
        training: of each of the two.
        pull: weight of the cosines.
    """

    training: Training
    pull: Annotated[float, Ge(0)] = 0.1

    def run(self, visit: Visit) -> Result:
        net, rows = visit.model, visit.data.train
        assert isinstance(net, PromptedNet)
        expect_classes(rows, len(net.met), "fedmgp")
        here_C = torch.isin(torch.arange(len(net.met), device=net.met.device), rows.column("y").to(net.met.device))

        def loss(logits_BC: Tensor, batch: dict[str, Tensor], query_BD: Tensor, key_BD: Tensor) -> Tensor:
            ce = F.cross_entropy(logits_BC.masked_fill(~here_C, NOWHERE), batch["y"])
            return ce - self.pull * F.cosine_similarity(query_BD, key_BD, dim=1).mean()

        def common(batch: dict[str, Tensor]) -> Tensor:
            with torch.no_grad():
                query_BD = net.feature(batch["x"])
            return loss(net.head(net.feature(batch["x"], net.prompt)), batch, query_BD, net.prompt_pool.keys)

        def own(batch: dict[str, Tensor]) -> Tensor:
            one_hot_BC = F.one_hot(batch["y"], len(net.met)).to(net.prompt)
            with torch.no_grad():
                query_BD = net.feature(batch["x"], net.prompt)
            feature_BD = net.feature(batch["x"], net.prompt.detach(), one_hot_BC)
            return loss(net.own_head(feature_BD), batch, query_BD, one_hot_BC @ net.pool.keys)

        self._train(visit, common, [net.prompt, net.prompt_pool.keys], list(net.head.parameters()), here_C)
        by_class = [net.prefixes, net.pool.keys, *net.own_head.parameters()]
        self._train(visit, own, [], by_class, here_C)
        if not visit.dry:
            net.met[here_C] = 1
        delta = sub(visit.shared(), visit.replica.get("weights", {}))
        passes = float(len(rows) * self.training.epochs)
        return Result(Message("delta", {"delta": delta}), cost=Cost(2 * passes, passes))

    def _train(
        self, visit: Visit, loss: Loss, params: list[nn.Parameter], by_class: list[nn.Parameter], here_C: Tensor
    ) -> None:
        """Train both lists; of ``by_class`` only the rows of the classes that are here, even with weight decay."""
        t, before = self.training, [p.detach().clone() for p in by_class]
        every: list[Tensor] = [*params, *by_class]
        optimizer = make_optimizer(t, every, t.lr_at(visit.round))
        for batch in visit.batches(t.batch_size, t.epochs):
            grads = gradients(loss(batch), every)
            if t.clip_norm:
                clip_(grads, t.clip_norm)
            optimizer.step(grads)
        with torch.no_grad():
            for p, old in zip(by_class, before, strict=True):
                p[~here_C] = old[~here_C]
