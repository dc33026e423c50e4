"""Peers' output layers, row by row, each weighted by how well it does on the own rows (Bristle; Verbraeken et al.,
2021, arXiv 2110.11006)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.func import functional_call

from atoll.core.errors import AtollError
from atoll.core.message import Message
from atoll.core.tree import Tree, clone
from atoll.federated.method import Combine, MergeContext, Reply

FLOOR = -100.0
"""Least score of a class that both know."""


@dataclass(frozen=True)
class VouchedRows(Combine):
    """For each class that both know, a peer's row counts by its F1 beside the own one, times how sure the peer is
    (:func:`weights`); rows of classes that the site does not know, by all its scores together. The own rows count 1.

    Peers are drawn by distance first (:func:`prioritise`). Scores and certainty use only classes that both have: over
    all classes, peers with other labels would be certain of nothing, and nobody would accept a foreign row. A peer may
    lie about its classes, and foreign rows are vouched for by what it does on known ones: a bound on neither.

    Works at sites (gossip) with a labelled task; every shared tensor must have a row for each class.

    Args:
        candidates: peers looked at in a round, at most.
        explore: 0 looks at the nearest third of the peers alone, 1 at the farthest.
        per_class: own rows of a class that F1 is measured on.
    """

    candidates: Annotated[int, Ge(1)] = 10
    explore: Annotated[float, Gt(0), Lt(1)] = 0.4
    per_class: Annotated[int, Ge(1)] = 10
    at_peers: ClassVar[bool] = True

    def combine(self, replies: Iterable[Reply], context: MergeContext) -> Message:
        if context.model is None or context.site is None:
            raise AtollError("VouchedRows judges peers by a site's own model and rows; use the topology Gossip.")
        own, peers = None, []
        for reply in replies:
            delta = reply.message.parts["delta"]
            if reply.site == context.site:
                own = clone(delta)
            else:
                peers.append((clone(delta), known_classes(reply, context)))
        assert own is not None, "gossip hands over the own model too"
        if context.dry or not peers:
            return Message("delta", {"delta": own})
        distances = [float(sum(float(t.square().sum()) for t in delta.values())) for delta, _ in peers]
        chosen = prioritise(distances, self.candidates, self.explore, context.stream("prioritise"))
        judge = Judge(context, own, self.per_class)
        mine = judge.f1(own)
        rows = torch.stack([
            weights(mine, judge.f1(peers[i][0]), judge.classes, peers[i][1]) for i in chosen
        ])  # fmt: skip
        total = 1.0 + rows.sum(0)
        out = {}
        for name, t in own.items():
            if t.shape[:1] != total.shape:
                raise AtollError(
                    f"VouchedRows needs a row for each class in every shared tensor, and `{name}` has not; use the "
                    "share Head."
                )
            along = (-1, *[1] * (t.dim() - 1))
            mixed = t.clone()
            for w, i in zip(rows, chosen, strict=True):
                mixed += w.to(t.dtype).view(along) * peers[i][0][name]
            out[name] = mixed / total.to(t.dtype).view(along)
        return Message("delta", {"delta": out})


def known_classes(reply: Reply, context: MergeContext) -> Tensor:
    """The classes that a peer says it has: bool ``[C]``, none when what it says makes no sense."""
    said = reply.message.facts.get("classes")
    known = torch.zeros(int(context.task.outputs), dtype=torch.bool)
    if isinstance(said, list) and all(type(c) is int and 0 <= c < len(known) for c in said):
        known[said] = True
    return known


def prioritise(distances: Sequence[float], count: int, explore: float, generator: torch.Generator) -> list[int]:
    """Positions of at most ``count`` peers, rising: of the nearest third of them a share (1 - a)^2, of the middle one
    2 a (1 - a), of the farthest a^2, at random within each."""
    order = torch.tensor(distances).argsort(stable=True)
    a, out = explore, list[int]()
    for third, share in zip(order.tensor_split(3), ((1 - a) ** 2, 2 * a * (1 - a), a * a), strict=True):
        drawn = torch.randperm(len(third), generator=generator)[: round(share * count)]
        out += third[drawn].tolist()
    return sorted(out)


def weights(own_C: Tensor, peer_C: Tensor, own_classes_C: Tensor, peer_classes_C: Tensor) -> Tensor:
    """How much each row of a peer counts beside the own one: ``[C]``, 0 where the peer has no such class.

    Args:
        own_C, peer_C: F1 (0 to 1) of each class on the own rows.
        own_classes_C, peer_classes_C: which classes each has.
    """
    both = own_classes_C & peer_classes_C
    if not both.any():
        return torch.zeros_like(own_C)
    certain = peer_C[both]
    certainty = (certain.mean() - certain.std(correction=0)).clamp(min=0)
    gap = 10 * (own_C - peer_C).abs()
    score = torch.where(peer_C > own_C, gap ** (3 + own_C), -(gap ** (4 + own_C)))
    accepted = score[both].sum().expand_as(score)  # of rows that only the peer can judge
    score = torch.where(both, score.clamp(min=FLOOR), accepted)
    weight = (10 * torch.sigmoid(score / 100) - 4).clamp(min=0) * certainty
    return torch.where(peer_classes_C, weight, 0.0)


class Judge:
    """F1 per class of output layers on a balanced draw of the site's own rows. The body runs once."""

    def __init__(self, context: MergeContext, own: Tree, per_class: int) -> None:
        model = context.model
        assert model is not None
        prefix = {name.rpartition(".")[0] for name in own}
        if len(prefix) != 1:
            raise AtollError("VouchedRows judges one output layer, and more than one is shared; use the share Head.")
        self.head = model.get_submodule(prefix.pop())
        self.start = {n.rpartition(".")[2]: context.replica["weights"][n] for n in own}
        rows, count = context.public, int(context.task.outputs)
        y = rows.column("y")
        order = torch.randperm(len(y), generator=context.stream("judge"))
        drawn = torch.cat([order[y[order] == c][:per_class] for c in range(count)])
        batch = rows.ready(drawn, next(iter(own.values())).device)
        self.y, self.count = batch["y"], count
        self.classes = torch.bincount(self.y.cpu(), minlength=count) > 0
        seen: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                logits = context.task.predict(model, batch)
                if not seen or not torch.equal(self.head(seen[0]), logits):
                    raise AtollError(
                        "VouchedRows needs a network whose last layer gives its output; use another combiner."
                    )
        finally:
            handle.remove()
            model.train(training)
        self.features = seen[0]

    def f1(self, delta: Tree) -> Tensor:
        """Of the own layer plus ``delta``: ``[C]``, 0 for a class without rows."""
        layer = {n.rpartition(".")[2]: t for n, t in delta.items()}
        with torch.no_grad():
            logits = functional_call(self.head, {n: t + layer[n] for n, t in self.start.items()}, (self.features,))
        return f1_per_class(logits.argmax(1).cpu(), self.y.cpu(), self.count)


def f1_per_class(predicted_N: Tensor, y_N: Tensor, count: int) -> Tensor:
    """2 hits / (predicted + actual): ``[C]``, 0 where there is neither."""
    hits = torch.bincount(y_N[predicted_N == y_N], minlength=count)
    seen = torch.bincount(predicted_N, minlength=count) + torch.bincount(y_N, minlength=count)
    return 2 * hits / seen.clamp(min=1)
