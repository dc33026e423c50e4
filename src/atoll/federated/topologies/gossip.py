"""No server that learns: sites mix their models with those of a few neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, MultipleOf

from atoll.core.card import Card, Cite
from atoll.core.streams import numpy_stream
from atoll.federated.combine.keep_apart import KeepApart
from atoll.federated.local.with_peers import WithPeers
from atoll.federated.method import Method, Topology
from atoll.federated.server.relay import Relay
from atoll.federated.share.letters import Letters

CARD = Card(
    name="gossip",
    area="topology",
    summary="sites mix their models with those of a few neighbours; no server learns",
    cites=(
        Cite(
            authors="Xiangru Lian, Ce Zhang, Huan Zhang, Cho-Jui Hsieh, Wei Zhang, Ji Liu",
            year=2017,
            title="Can Decentralized Algorithms Outperform Centralized Algorithms? A Case Study for Decentralized "
            "Parallel Stochastic Gradient Descent",
            arxiv="1705.09056",
            venue="NeurIPS",
        ),
    ),
    server_sees="every letter on its way to the neighbours",
    suits=("no server", "a model per site"),
)


@dataclass(frozen=True)
class Gossip(Topology):
    """Decentralised averaging (Lian et al., 2017, arXiv 1705.09056), with any combiner in the place of the mean.

    In each round a site mixes its model with the letters of its neighbours by the method's combiner, works, and writes
    to them. The graph is a union of ``degree / 2`` random cycles through all sites: connected, and sites have equally
    many neighbours (but where cycles share an edge), so that with ``WeightedMean(by="uniform")`` mixing keeps the mean
    of all models. Letters pass through the server, which learns nothing from them itself; their bytes are counted at
    both ends. Every site has a model of its own, so there is no global one. Needs memory for one model per site that
    takes part.

    Args:
        degree: neighbours of a site; 2 is a ring. With fewer other sites than that, all are neighbours.
        changing: draw the graph anew in every round, which mixes faster.
    """

    degree: Annotated[int, Ge(2), MultipleOf(2)] = 4
    changing: bool = False
    peers: ClassVar[bool] = True

    def neighbours(self, site: int, round: int, num_sites: int, seed: int) -> list[int]:
        """Sites whose letters ``site`` reads, rising: a symmetric relation."""
        if num_sites - 1 <= self.degree:
            return [i for i in range(num_sites) if i != site]
        near: set[int] = set()
        for cycle in range(self.degree // 2):
            name = ("gossip", cycle, round) if self.changing else ("gossip", cycle)
            order = numpy_stream(seed, *name).permutation(num_sites).tolist()
            at = order.index(site)
            near |= {order[at - 1], order[(at + 1) % num_sites]}
        return sorted(near)

    def problems(self, method: Method) -> list[str]:
        if isinstance(method.share, Letters):
            return []
        out = []
        server, combiner = type(method.server).__name__, type(method.combine).__name__
        if not method.server.adds:
            out.append(f"Gossip has no server, and {server} is a server's work; use Apply(lr=1), or Star.")
        if method.local.produces != "delta" or not {"delta", "*"} & set(method.combine.accepts):
            out.append(
                f"Peers mix models, and {type(method.local).__name__} replies with `{method.local.produces}`, which "
                f"{combiner} merges; use local work that replies with `delta`, or Star."
            )
        if method.share.incremental or not method.share.same_model:
            out.append(f"Peers mix models of one form, which {type(method.share).__name__} does not give; use Star.")
        if method.combine.least > self.degree + 1:
            out.append(
                f"{combiner} needs {method.combine.least} models, and a peer of this Gossip has its own and those of "
                f"{self.degree} neighbours; use Gossip(degree={method.combine.least // 2 * 2})."
            )
        if not method.schedule.synchronous:
            out.append(f"Gossip goes in rounds, not by {type(method.schedule).__name__}; use Synchronous.")
        if method.secure is not None:
            out.append(
                f"In Gossip each peer reads single letters, so {type(method.secure).__name__} hides nothing; use Star."
            )
        for codec in method.uplink:
            if codec.private or codec.sparse or codec.bound is not None:
                out.append(
                    f"Letters hold whole models, and {type(codec).__name__} is made for updates; use Cast or Quantise, "
                    "or Star."
                )
        if method.downlink:
            out.append("Gossip broadcasts nothing that `downlink` could change; leave it out.")
        return out

    def compose(self, method: Method) -> Method:
        if isinstance(method.share, Letters) or self.problems(method):
            return method  # done before, or to be refused by the checks
        return method.but(
            share=Letters(method.share), local=WithPeers(method.local, method.combine, method.share),
            combine=KeepApart(), server=Relay(self.neighbours),
        )  # fmt: skip
