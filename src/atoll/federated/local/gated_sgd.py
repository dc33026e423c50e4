"""Train a network and the gate that chooses its blocks together; send the blocks that were chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor

from atoll.core.message import Message
from atoll.core.tree import flatten, sub
from atoll.federated.local.local_sgd import gradients
from atoll.federated.local.optimizer import clip_, make_optimizer
from atoll.federated.local.training import Training
from atoll.federated.method import LocalWork
from atoll.federated.share.gated_parameters import NETWORK
from atoll.federated.visit import Cost, Result, Visit
from atoll.models.gated import GatedNet, cut, flat_sizes
from atoll.models.masks import pack_bits
from atoll.tasks.task import rows_at_once


@dataclass(frozen=True)
class GatedSGD(LocalWork):
    """Every step chooses blocks for its batch; after the last one the site settles on those for all its rows.

    Only these are sent. What other blocks learned in steps that chose them is lost.

    Args:
        training: of the network.
        gate_lr: step size of the gate; None: that of the network. It decays like that.
    """

    training: Training = Training()
    gate_lr: Annotated[float, Gt(0)] | None = None
    produces: ClassVar[str] = "blocks"

    @property
    def data_dependent_size(self) -> bool:
        return True

    def run(self, visit: Visit) -> Result:
        t, model = self.training, visit.model
        assert isinstance(model, GatedNet)
        lr = t.lr_at(visit.round)
        named = visit.trainable()
        shared = set(visit.at.split.shared)
        network, gate = ([p for n, p in named.items() if (n in shared) == own] for own in (True, False))
        params: list[Tensor] = [*network, *gate]
        steps = (
            make_optimizer(t, network, lr),
            make_optimizer(t, gate, lr if self.gate_lr is None else self.gate_lr * lr / t.lr),
        )
        for batch in visit.batches(t.batch_size, t.epochs):
            grads = gradients(visit.task.mean_loss(model, batch), params)
            if t.clip_norm:
                clip_(grads, t.clip_norm)
            steps[0].step(grads[: len(network)])
            steps[1].step(grads[len(network) :])
        settle(visit, model)
        passes = float(len(visit.data.train) * t.epochs)
        kept = int(torch.tensor(model.flat)[model.gate.kept.cpu()].sum())
        return Result(blocks(visit, model), cost=Cost(passes, passes), metrics={"kept": kept / sum(model.flat)})


def settle(visit: Visit, model: GatedNet) -> None:
    """Choose the blocks for all training rows of a site; without any, the choice stays."""
    train = visit.data.train
    if visit.dry or not len(train):
        return
    batches = train.batches(rows_at_once(*train.info.shape), visit.device)
    with torch.no_grad():
        model.settle(torch.cat([model.gate.logits(batch["x"]) for batch in batches]))


def blocks(visit: Visit, model: GatedNet) -> Message:
    """What the chosen blocks learned; buffers are sent whole. A dry visit sends as much as any choice could."""
    delta = sub(visit.shared(), visit.replica["weights"])
    names = [f"{NETWORK}{n}" for n in model.names]
    kept = dict(zip(names, model.gate.kept.cpu().split([len(sizes) for sizes in model.sizes]), strict=True))
    every = {n: torch.ones(len(cut(t.numel(), model.blocks)), dtype=torch.bool) for n, t in delta.items()}
    sent = torch.cat([kept.get(n, b) for n, b in every.items()])
    where = sent.repeat_interleave(torch.tensor(flat_sizes(delta, model.blocks)))
    values = flatten(delta).float()
    if visit.dry:
        most = model.budget + len(values) - sum(model.flat)
        values = values[:most] * 0
    else:
        values = values[where.to(values.device)]
    return Message("blocks", {"blocks": {"sent": pack_bits({"blocks": sent}), "values": values}})
