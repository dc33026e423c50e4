"""Bristle (Verbraeken et al., 2021, arXiv 2110.11006)."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Lt, MultipleOf

from atoll.core.card import Card, Cite
from atoll.federated.combine.vouched_rows import VouchedRows
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.saying_classes import SayingClasses
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.share.head import Head
from atoll.federated.topologies.gossip import Gossip

CARD = Card(
    name="bristle",
    area="federated method",
    summary="peers gossip output layers over a frozen body, and take over rows that do well on their own data",
    cites=(
        Cite(
            authors="Joost Verbraeken, Martijn de Vos, Johan Pouwelse",
            year=2021,
            title="Bristle: Decentralized Federated Learning in Byzantine, Non-i.i.d. Environments",
            arxiv="2110.11006",
        ),
    ),
    server_sees="letters on their way: output layers, which classes a site has, numbers of examples",
    additive=False,
    threat_model="any number of peers send anything; a peer that does well on known classes is believed about others",
    suits=("hostile sites", "no server", "sites differ in labels", "less traffic"),
)


@method(CARD)
def bristle(
    candidates: Annotated[int, Ge(1)] = 10,
    explore: Annotated[float, Gt(0), Lt(1)] = 0.4,
    per_class: Annotated[int, Ge(1)] = 10,
    degree: Annotated[int, Ge(2), MultipleOf(2)] = 12,
    changing: bool = True,
    training: Training = Training(),
) -> Method:
    """The last linear layer is all that trains and travels; give a network whose body was trained before, e.g.
    ``model: {name: pretrained, ...}``.

    The released program draws peers at random and leaves the draw by distance out; here it is as published. F1 is
    measured on the site's validation rows, or on its training rows where it has none.

    Args:
        candidates: peers that a site looks at in a round.
        explore: how far from its own layer it looks for them, from 0 to 1.
        per_class: own rows of a class that peers are judged on.
        degree: neighbours whose letters a site receives.
        changing: other neighbours in each round.
        training: what a site does in a visit.
    """
    return Method(
        share=Head(), local=SayingClasses(LocalSGD(training)),
        combine=VouchedRows(candidates=candidates, explore=explore, per_class=per_class),
        topology=Gossip(degree=degree, changing=changing),
    )  # fmt: skip
