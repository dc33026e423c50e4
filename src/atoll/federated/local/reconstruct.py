"""Learn a code from inputs alone, and what it means from base heads and the labels that there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from atoll.core.message import Message
from atoll.core.tree import Tree, clone, copy_, named_tensors, sub
from atoll.federated.local.local_sgd import gradients, train
from atoll.federated.local.optimizer import make_optimizer
from atoll.federated.local.training import Training
from atoll.federated.method import LocalWork
from atoll.federated.visit import Cost, Result, Visit
from atoll.models.coded import CodedNet, bounded


@dataclass(frozen=True)
class Reconstruct(LocalWork):
    """Train the autoencoder that came on all rows, labelled or not, and reply with what changed in it.

    Before that, the base heads that came are mixed into the site's own model, on the autoencoder that they were trained
    for: the one that the site sent last. So a site can predict from its second visit on.

    Args:
        training: of the autoencoder.
        adapting: of the heads and their weights in the mixture, on the site's labels.
    """

    training: Training = Training(lr=1e-3, optimizer="adam", epochs=5, batch_size=16)
    adapting: Training = Training(lr=1e-3, optimizer="adam", epochs=5, batch_size=16)
    produces: ClassVar[str] = "delta"
    synchronous_only: ClassVar[bool] = True

    def run(self, visit: Visit) -> Result:
        model, t, start = visit.model, self.training, visit.replica["autoencoder"]
        assert isinstance(model, CodedNet)
        if "heads" in visit.replica and visit.state:
            self._personalise(visit, model)
        tensors = clone(start)
        params = [p.requires_grad_() for p in tensors.values()]
        optimizer = make_optimizer(t, params, t.lr_at(visit.round))
        model.train()
        for x in self._inputs(visit):
            _, made = functional_call(model.autoencoder, tensors, (x,))
            optimizer.step(gradients(F.mse_loss(made, bounded(x, visit.data.train.info)), params))
        trained = {n: p.detach() for n, p in tensors.items()}
        rows = len(visit.data.train)
        passes = float(t.epochs * (rows + len(visit.data.unlabelled or ())) + self.adapting.epochs * rows)
        return Result(Message("delta", {"delta": sub(trained, start)}), {"autoencoder": trained}, Cost(passes, passes))

    def _inputs(self, visit: Visit) -> Iterator[Tensor]:
        """Batches of the inputs of all training rows, in a fresh order each epoch."""
        data = [visit.data.train, *([visit.data.unlabelled] if visit.data.unlabelled is not None else [])]
        if visit.dry or not sum(map(len, data)):
            return
        x, order = torch.cat([d.ready(device=visit.device)["x"] for d in data]), visit.stream("inputs")
        for _ in range(self.training.epochs):
            for rows in torch.randperm(len(x), generator=order).split(self.training.batch_size):
                yield x[rows.to(x.device)]

    def _personalise(self, visit: Visit, model: CodedNet) -> None:
        """The site's model from now on: heads that reconstruct like this site weigh more, then labels decide."""
        came, t = visit.replica, self.adapting
        copy_(named_tensors(model.autoencoder), visit.state["autoencoder"])
        copy_(named_tensors(model.mixture.heads), came["heads"])
        with torch.no_grad():  # softmax(-log error) is one over the error, in shares
            model.mixture.mixing.copy_(-came["errors"]["rows"].clamp(min=1e-9).log())
        model.eval()  # codes without dropout, as the server saw them
        train(visit.task, model.mixture, _codes(visit, model, t), t, t.lr_at(visit.round))


def _codes(visit: Visit, model: CodedNet, training: Training) -> Iterator[Tree]:
    """Batches of the labelled rows, with their code in the place of their input."""
    for batch in visit.batches(training.batch_size, training.epochs):
        with torch.no_grad():
            code = model.autoencoder.code(batch["x"])
        yield {**batch, "x": code}
