"""Fixed-interval asynchronous averaging: the schedule of FedFix, the staleness discount of FedAsync."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt

from atoll.core.card import Card, Cite
from atoll.federated.combine.weighted_mean import WeightedMean
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.schedules.fixed_interval import FixedInterval
from atoll.federated.server.apply import Apply

CARD = Card(
    name="fedinterval",
    area="federated method",
    summary="merge what has arrived at every tick of a clock",
    cites=(
        Cite(
            authors="Yann Fraboni, Richard Vidal, Laetitia Kameni, Marco Lorenzi",
            year=2022,
            title="A General Theory for Federated Optimization with Asynchronous and Heterogeneous Clients Updates",
            arxiv="2206.10189",
            venue="JMLR 2023",
        ),
        Cite(
            authors="Cong Xie, Sanmi Koyejo, Indranil Gupta",
            year=2019,
            title="Asynchronous Federated Optimization",
            arxiv="1903.03934",
        ),
    ),
    server_sees="each site's update, its number of examples and when it came",
    additive=True,
    suits=("late sites", "sites differ in hardware"),
)


@method(CARD)
def fedinterval(
    dt: Annotated[float, Gt(0)] = 1.0,
    server_lr: Annotated[float, Gt(0)] = 1.0,
    staleness: Annotated[float, Ge(0)] = 0.5,
    training: Training = Training(),
) -> Method:
    """The server merges every ``dt`` seconds; sites that have reported start again from the new version.

    A reply that is s versions old counts (1 + s)^-staleness of its share. Without the weights of Fraboni et
    al., which correct for how often a site reports, the result leans towards fast sites.

    Args:
        dt: virtual seconds between merges. Longer than the slowest visit, this is FedAvg.
        server_lr: the server's step size.
        staleness: exponent of the discount; 0 has none.
        training: what a site does in a visit.
    """
    return Method(
        local=LocalSGD(training),
        combine=WeightedMean(staleness=staleness),
        server=Apply(server_lr),
        schedule=FixedInterval(dt),
    )
