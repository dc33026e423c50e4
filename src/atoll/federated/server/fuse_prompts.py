"""A server that fuses prompts by what they do on its own rows, not by their numbers.

Yu et al., KDD 2024, arXiv 2407.00113.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.func import functional_call

from atoll.core.message import Message
from atoll.core.tree import Parts, Tree, add
from atoll.data.dataset import Dataset
from atoll.federated.local.local_sgd import gradients
from atoll.federated.local.optimizer import make_optimizer
from atoll.federated.local.training import Training
from atoll.federated.method import Broadcast, MergeContext, ServerStep
from atoll.federated.share.prompts import Prompts
from atoll.models.model import seeded
from atoll.models.prompted import PromptedNet
from atoll.tasks.classification import expect_classes


@dataclass(frozen=True)
class FusePrompts(ServerStep):
    """Prompts that fail on the server's rows are dropped; one with the others' features, and a head on it, remain.

    It starts as the mean of the survivors (the authors start at one of them) and minimises the mean over rows of
    sum_j ||f_new(x) - f_j(x)||^2; the head starts as the mean head and is fitted to the rows' classes. Where none
    survives, all do.

    Args:
        share: of the method.
        per_class: rows of each class that are used, the first ones.
        threshold: accuracy on them below which a prompt with its head is dropped.
        steps: of Adam on all rows, for the prompt and for the head.
        lr: its step size.
    """

    share: Prompts = Prompts()
    per_class: Annotated[int, Ge(1)] = 20
    threshold: Annotated[float, Ge(0), Le(1)] = 0.1
    steps: Annotated[int, Ge(0)] = 20
    lr: Annotated[float, Gt(0)] = 1e-3
    accepts: ClassVar[tuple[str, ...]] = ("letters",)
    needs_public_data: ClassVar[bool] = True

    def step(self, replica: Parts, state: Parts, combined: Message, context: MergeContext) -> tuple[Broadcast, Parts]:
        sent = [add(replica["weights"], delta) for delta in combined.parts.values()]
        if context.dry:
            return Broadcast(Message("weights", {"weights": mean(sent)})), state
        net = self._net(context)
        rows = first_of_each_class(context.public, len(net.met), self.per_class).ready(device=net.met.device)
        with torch.no_grad():
            features = [net.feature(rows["x"], tree["prompt"]) for tree in sent]
            guesses = [head(net, tree, f).argmax(1) for tree, f in zip(sent, features, strict=True)]
        right = [float((guess == rows["y"]).double().mean()) for guess in guesses]
        kept = [i for i, share in enumerate(right) if share >= self.threshold] or list(range(len(sent)))
        new = mean([sent[i] for i in kept])
        targets = [features[i] for i in kept]

        def apart() -> Tensor:
            feature_BD = net.feature(rows["x"], new["prompt"])
            return torch.stack([(feature_BD - f).square().sum(1).mean() for f in targets]).sum()

        self._minimise(apart, [new["prompt"]])
        with torch.no_grad():
            final_BD = net.feature(rows["x"], new["prompt"])
        heads = [new[n] for n in new if n.startswith("head.")]
        self._minimise(lambda: F.cross_entropy(head(net, new, final_BD), rows["y"]), heads)
        return Broadcast(Message("weights", {"weights": {n: t.detach() for n, t in new.items()}})), state

    def _minimise(self, loss: Callable[[], Tensor], params: list[Tensor]) -> None:
        """In place."""
        for p in params:
            p.requires_grad_(True)
        optimizer = make_optimizer(Training(optimizer="adam"), params, self.lr)
        for _ in range(self.steps):
            optimizer.step(gradients(loss(), params))
        for p in params:
            p.requires_grad_(False)

    def _net(self, context: MergeContext) -> PromptedNet:
        """The frozen network, as every site has it."""
        expect_classes(context.public, context.task.outputs, "fedmgp")
        model = context.task.model(context.seed)
        with seeded(context.seed, "prepare"):
            net = self.share.prepare_for(model, None, context.public.info)
        assert isinstance(net, PromptedNet)
        return net.to(context.replica["weights"]["prompt"].device)


def head(net: PromptedNet, weights: Tree, feature_BD: Tensor) -> Tensor:
    """Logits of the common head with these weights."""
    own = {n.removeprefix("head."): t for n, t in weights.items() if n.startswith("head.")}
    out: Tensor = functional_call(net.head, own, (feature_BD,))
    return out


def mean(trees: list[Tree]) -> Tree:
    """The unweighted mean, in double precision, so that the mean of equals is their bits."""
    return {n: torch.stack([t[n].double() for t in trees]).mean(0).to(t0.dtype) for n, t0 in trees[0].items()}


def first_of_each_class(rows: Dataset, classes: int, count: int) -> Dataset:
    """The first ``count`` rows of each class."""
    y = rows.column("y")
    found = [(y == c).nonzero().flatten()[:count] for c in range(classes)]
    return rows.select(torch.cat(found))
