"""A server that makes an autoencoder for each site, learns from what the site changed in it, and trains base heads on
its own labelled rows, seen through the site's encoder.

SemiPFL (Tashakori et al., 2022, arXiv 2203.08176).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.func import functional_call

from atoll.core.errors import AtollError
from atoll.core.message import Message
from atoll.core.streams import stream
from atoll.core.tree import Parts, Tree, clone, copy_, flatten, named_tensors, unflatten, zeros_like
from atoll.data.dataset import Info
from atoll.federated.local.local_sgd import train
from atoll.federated.local.optimizer import clip_
from atoll.federated.local.training import Training
from atoll.federated.method import Broadcast, MergeContext, ServerStep
from atoll.models.coded import CodedNet, bounded, coded
from atoll.models.hypernetwork import generate, pull, start
from atoll.models.model import seeded

BETAS, EPS, CLIP = (0.9, 0.999), 1e-8, 50.0
ROWS = 512


@dataclass(frozen=True)
class HyperServer(ServerStep):
    """phi <- phi - Adam((d theta / d phi)^T (theta_i - theta_i')), then an autoencoder for every site, and heads for
    those that replied.

    A head is trained on the rows of one of the server's subjects (or of one random shard) that the site's autoencoder
    reconstructs well. Everything that a site needs comes for it alone; the server keeps each site's heads.

    Args:
        heads: the same as the share's.
        subjects: column of the public rows that says whose they are; None: shards at random.
        similar: mean squared error of a row's reconstruction, on a scale from -1 to 1, below which it is like the
            site's rows.
        least: rows of a shard that train its head in any case, those with the smallest errors.
        training: of the heads at a merge; they go on from where they were.
        lr: step size of the hypernetwork.
        hidden, rank: its hidden units, and the rank of its last layer.
    """

    heads: Annotated[int, Ge(1)] = 4
    subjects: str | None = None
    similar: Annotated[float, Gt(0)] = 0.05
    least: Annotated[int, Ge(2)] = 32
    training: Training = Training(lr=5e-3, optimizer="adam", epochs=5, batch_size=16)
    lr: Annotated[float, Gt(0)] = 3e-3
    hidden: Annotated[int, Ge(1)] = 100
    rank: Annotated[int, Ge(1)] = 16
    accepts: ClassVar[tuple[str, ...]] = ("letters",)
    broadcasts: ClassVar[str] = "autoencoder"
    needs_public_data: ClassVar[bool] = True

    def open(self, replica: Parts) -> Broadcast:
        """Nothing to send: the seed gave everybody the same autoencoder."""
        return Broadcast(Message("agreed"))

    def step(self, replica: Parts, state: Parts, combined: Message, context: MergeContext) -> tuple[Broadcast, Parts]:
        base, replies = replica["autoencoder"], {int(site): delta for site, delta in combined.parts.items()}
        new = {**state} if state else self._start(base, context.num_sites, context.seed)
        sites = list(replies)
        before, common = generate(new["phi"], sites), flatten(base)
        deltas = torch.stack([flatten(delta) for delta in replies.values()])
        if not context.dry:
            new |= self._learn(new, sites, -deltas)
        net, shards = self._net(context), self._shards(context)
        fresh = clone(named_tensors(net.mixture.heads))
        for i, own, delta in zip(sites, before, deltas, strict=True):
            theta = unflatten(common + own + delta, base)  # what the site has now
            new[f"heads{i}"], new[f"errors{i}"] = self._teach(
                net, theta, new.get(f"heads{i}", fresh), shards, i, context
            )

        made = common + generate(new["phi"], range(context.num_sites))
        per_site = {}
        for i, theta in enumerate(made):
            parts = {"autoencoder": unflatten(theta, base)}
            if f"heads{i}" in new:
                parts |= {"heads": new[f"heads{i}"], "errors": new[f"errors{i}"]}
            per_site[i] = Message("autoencoder", parts)
        return Broadcast(Message("agreed"), per_site), new

    def _start(self, base: Tree, num_sites: int, seed: int) -> dict[str, Tree]:
        size, generator = sum(t.numel() for t in base.values()), stream(seed, "server", "hypernetwork")
        phi = start(num_sites, size, self.hidden, self.rank, generator)
        phi = {n: t.to(next(iter(base.values())).device) for n, t in phi.items()}
        return {"phi": phi, "m": zeros_like(phi), "v": zeros_like(phi), "adam": {"steps": torch.tensor(0)}}

    def _learn(self, state: Parts, sites: Sequence[int], error: Tensor) -> Parts:
        """One step of Adam on the mean over the sites, ``error`` ``[k, T]``."""
        phi, steps = state["phi"], state["adam"]["steps"] + 1
        grads = pull(phi, sites, error / len(sites))
        clip_(list(grads.values()), CLIP)
        m = {n: BETAS[0] * t + (1 - BETAS[0]) * grads[n] for n, t in state["m"].items()}
        v = {n: BETAS[1] * t + (1 - BETAS[1]) * grads[n].square() for n, t in state["v"].items()}
        fair = [1 - beta ** int(steps) for beta in BETAS]
        phi = {n: t - self.lr * (m[n] / fair[0]) / ((v[n] / fair[1]).sqrt() + EPS) for n, t in phi.items()}
        return {"phi": phi, "m": m, "v": v, "adam": {"steps": steps}}

    def _net(self, context: MergeContext) -> CodedNet:
        network = context.task.model(context.seed)
        with seeded(context.seed, "prepare"):
            net = coded(network, context.public.info, self.heads)
        return net.to(next(iter(context.replica["autoencoder"].values())).device)

    def _shards(self, context: MergeContext) -> list[Tensor]:
        """Positions of the public rows behind each head."""
        public = context.public
        if self.subjects is None:
            order = torch.randperm(len(public), generator=stream(context.seed, "server", "shards"))
            shards = [order[i :: self.heads] for i in range(self.heads)]
        else:
            whose = public.column(self.subjects).unique(return_inverse=True)[1]
            shards = [(whose % self.heads == i).nonzero().flatten() for i in range(self.heads)]
        if min(map(len, shards)) < 2:
            raise AtollError(
                f"The server's {len(public):,} public rows leave one of {self.heads} heads with fewer than two; give "
                "the data a larger `public` fraction, or use fewer `heads`."
            )
        return shards

    def _teach(
        self, net: CodedNet, theta: Tree, before: Tree, shards: list[Tensor], site: int, context: MergeContext
    ) -> tuple[Tree, Tree]:
        """A site's base heads, and the mean error of each one's shard."""
        heads = named_tensors(net.mixture.heads)
        copy_(heads, before)
        errors = torch.zeros(self.heads)
        if not context.dry:
            rows = context.public.ready(device=net.mixture.mixing.device)
            code, error = look(net, theta, rows["x"], context.public.info)
            errors = torch.stack([error[shard].mean() for shard in shards])
            t, order = self.training, context.stream("heads", site)
            for head, shard in zip(net.mixture.heads, shards, strict=True):
                like = shard[similar(error[shard], self.similar, self.least)]
                train(context.task, head.train(), _batches(code, rows["y"], like, t, order), t, t.lr_at(context.round))
        return clone(heads), {"rows": errors}


def look(net: CodedNet, theta: Tree, x: Tensor, info: Info) -> tuple[Tensor, Tensor]:
    """Rows ``[n, ...]`` through a site's autoencoder: codes ``[n, D]``, and each row's mean squared error ``[n]``."""
    net.eval()
    with torch.no_grad():
        seen = [(part, *functional_call(net.autoencoder, theta, (part,))) for part in x.split(ROWS)]
        errors = [(made - bounded(part, info)).square().mean(1) for part, _, made in seen]
    return torch.cat([code for _, code, _ in seen]), torch.cat(errors)


def similar(error: Tensor, most: float, least: int) -> Tensor:
    """Positions of the rows with an error below ``most``, or of the ``least`` best."""
    below = (error < most).nonzero().flatten()
    return below if len(below) >= min(least, len(error)) else error.argsort(stable=True)[:least]


def _batches(code: Tensor, y: Tensor, rows: Tensor, training: Training, order: torch.Generator) -> Iterator[Tree]:
    for _ in range(training.epochs):
        for some in rows[torch.randperm(len(rows), generator=order)].split(training.batch_size):
            if len(some) > 1:  # one row has no statistics
                yield {"x": code[some], "y": y[some]}
