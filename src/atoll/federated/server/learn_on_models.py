"""A server that learns how to widen, merge and narrow models, on its own labelled rows.

FedConv (Shen et al., 2024, arXiv 2502.20639): learning on models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.func import functional_call

from atoll.core.errors import AtollError, BadReply
from atoll.core.message import Message
from atoll.core.streams import stream
from atoll.core.tree import Parts, Tree, add, clone
from atoll.federated.local.local_sgd import gradients
from atoll.federated.local.optimizer import make_optimizer
from atoll.federated.local.training import Training
from atoll.federated.method import Broadcast, MergeContext, ServerStep
from atoll.federated.share.sub_models import Ratio, SubModels, part
from atoll.models.learned_width import Activation, compress, dilate, first_kernels, narrower, reached, widths
from atoll.tasks.task import rows_at_once


@dataclass(frozen=True)
class LearnOnModels(ServerStep):
    """dilate each reply -> sum_i p_i V_i * dilated_i -> compress for each ratio.

    Kernels of the dilation (one set per site) and of the compression (one per ratio), and the merge's weights V (one
    number per site and weight) are trained in turn, each by the loss of the model that comes out on the public rows;
    everything else is constant meanwhile. Of the states after each epoch, and the one before, the best on held-out
    public rows is taken. With no epochs this is slicing: first units down, and the mean over the sites that have an
    entry up (HeteroFL, Diao, Ding, Tarokh, ICLR 2021, arXiv 2010.01264).

    Args:
        ratios: the same as the share's.
        first, later: epochs at the first merge and at the others.
        lr, batch_size: of Adam.
        held_out: share of the public rows that decide which epoch is best.
        activation: after the compression; "leaky" is the paper's, which nearly deletes negative weights.
    """

    ratios: tuple[Ratio, ...] = (1.0, 0.75, 0.5625)
    first: Annotated[int, Ge(0)] = 20
    later: Annotated[int, Ge(0)] = 10
    lr: Annotated[float, Gt(0)] = 1e-3
    batch_size: Annotated[int, Ge(1)] = 32
    held_out: Annotated[float, Gt(0), Le(0.5)] = 0.2
    activation: Activation = "identity"
    accepts: ClassVar[tuple[str, ...]] = ("letters",)
    needs_public_data: ClassVar[bool] = True

    def open(self, replica: Parts) -> Broadcast:
        """Nothing to send: the seed gave everybody the same large model, and narrow ones are its first units."""
        return Broadcast(Message("agreed"))

    def step(self, replica: Parts, state: Parts, combined: Message, context: MergeContext) -> tuple[Broadcast, Parts]:
        share, new, epochs = SubModels(self.ratios), dict(state), self.later if context.round else self.first
        device = next(iter(replica["weights"].values())).device
        wide = context.task.model(context.seed).to(device).eval()
        narrow = {r: narrower(wide, r) for r in share.narrow()}
        between = {r: widths(wide, model) for r, model in narrow.items()}
        about = combined.facts["from"]

        dilated, have, rows = list[Tree](), list[Tree](), list[float]()
        for site, delta in combined.parts.items():
            ratio = share.ratio(int(site))
            before = replica[part(ratio)]
            if any(delta[n].shape != t.shape for n, t in before.items()):
                continue  # a reply for another site's model says nothing
            model = add(before, delta)
            rows.append(float(about[site]["num_samples"]))
            if ratio == 1:
                reach = {n: torch.ones_like(t) for n, t in model.items()}
            else:
                w, name = between[ratio], f"dilate {ratio:g} {site}"
                kernels = new.get(name) or _to(device, first_kernels(w, mixing=False))
                make = partial(dilate, narrow=model, w=w)
                new[name] = self._learn(kernels, make, wide, epochs, context, name)
                reach, model = reached(new[name], model, w), clone(make(new[name]))
            dilated.append(model)
            have.append(reach)
        weights = self._merge(replica["weights"], dilated, have, rows, wide, epochs, context)

        parts = {part(1.0): weights}
        for ratio, small in narrow.items():
            name = f"compress {ratio:g}"
            make = partial(compress, wide=weights, w=between[ratio], activation=self.activation)
            kernels = new.get(name) or _to(device, first_kernels(between[ratio], mixing=True))
            new[name] = self._learn(kernels, make, small, epochs, context, name)
            parts[part(ratio)] = clone(make(new[name]))
        own = {ratio: Message("weights", {"weights": parts[part(ratio)]}) for ratio in (1.0, *narrow)}
        return Broadcast(Message("weights", parts), {i: own[share.ratio(i)] for i in range(context.num_sites)}), new

    def _merge(
        self, old: Tree, dilated: list[Tree], have: list[Tree], rows: list[float], wide: nn.Module, epochs: int,
        context: MergeContext,
    ) -> Tree:  # fmt: skip
        """sum_i p_i V_i * dilated_i. V starts as the mean over those that have an entry; nobody has it: the old one."""
        if not sum(rows):
            raise BadReply("the sites that replied have no training examples, so their replies weigh nothing")
        p = [n / sum(rows) for n in rows]
        total = {n: sum((p_i * h[n] for p_i, h in zip(p, have, strict=True)), torch.zeros_like(old[n])) for n in old}
        kept = {n: torch.where(total[n] > 0, 0, t) for n, t in old.items()}
        mean = {f"{i} {n}": h[n] / total[n].clamp(min=1e-12) for i, h in enumerate(have) for n in h}

        def make(v: Tree) -> Tree:
            whole = {**mean, **v}
            return {
                n: kept[n]
                + sum(p_i * whole[f"{i} {n}"] * d[n] for i, (p_i, d) in enumerate(zip(p, dilated, strict=True)))
                for n in old
            }

        learned = {n: t for n, t in mean.items() if n.split(" ", 1)[1] not in context.buffers}
        return clone(make(self._learn(learned, make, wide, epochs, context, "merge")))

    def _learn(
        self, start: Tree, make: Callable[[Tree], Tree], model: nn.Module, epochs: int, context: MergeContext, name: str
    ) -> Tree:
        """Train ``start`` by the loss of ``model`` with the tensors that ``make`` makes of it."""
        if context.dry or not epochs or not start:
            return start
        data, task = context.public, context.task
        if len(data) < 2:
            raise AtollError("The server needs two or more public rows; give the data a larger `public` fraction.")
        order = torch.randperm(len(data), generator=stream(context.seed, "server", "held out"))
        cut, device = max(1, round(self.held_out * len(data))), next(iter(start.values())).device
        judges, teachers = data.select(order[:cut]), data.select(order[cut:])
        leaves = {n: t.detach().clone().requires_grad_() for n, t in start.items()}
        params: list[Tensor] = list(leaves.values())
        optimizer = make_optimizer(Training(optimizer="adam"), params, self.lr)

        def loss(batch: Tree) -> Tensor:
            tensors = make(leaves)
            out: Tensor = task.mean_loss(lambda x: functional_call(model, tensors, (x,)), batch)
            return out

        def judged() -> float:
            with torch.no_grad():
                return sum(float(loss(b)) * len(b["x"]) for b in judges.batches(rows_at_once(*data.info.shape), device))

        best, least, shuffled = clone(leaves), judged(), context.stream(name)
        for _ in range(epochs):
            for some in torch.randperm(len(teachers), generator=shuffled).split(self.batch_size):
                optimizer.step(gradients(loss(teachers.ready(some, device)), params))
            now = judged()
            if now < least:
                best, least = clone(leaves), now
        return best


def _to(device: torch.device, tree: Tree) -> Tree:
    return {n: t.to(device) for n, t in tree.items()}
