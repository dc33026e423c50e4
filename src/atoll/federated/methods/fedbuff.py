"""FedBuff (Nguyen et al., 2021, arXiv 2106.06639)."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt

from atoll.core.card import Card, Cite
from atoll.federated.combine.weighted_mean import WeightedMean
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.schedules.buffered import Buffered
from atoll.federated.server.apply import Apply

CARD = Card(
    name="fedbuff",
    area="federated method",
    summary="merge every k arrivals, stale ones with less weight",
    cites=(
        Cite(
            authors="John Nguyen, Kshitiz Malik, Hongyuan Zhan, Ashkan Yousefpour, Michael Rabbat, "
            "Mani Malek, Dzmitry Huba",
            year=2021,
            title="Federated Learning with Buffered Asynchronous Aggregation",
            arxiv="2106.06639",
            venue="AISTATS 2022",
        ),
    ),
    server_sees="each site's update and when it came",
    additive=True,
    suits=("late sites", "sites differ in hardware"),
)


@method(CARD)
def fedbuff(
    k: Annotated[int, Ge(1)] = 10,
    concurrency: Annotated[int, Ge(1)] | None = None,
    server_lr: Annotated[float, Gt(0)] = 1.0,
    staleness: Annotated[float, Ge(0)] = 0.5,
    training: Training = Training(),
) -> Method:
    """Sites train whenever they are free, from the version they pulled; k replies make the next version.

    weights += server_lr * (1/k) sum_j (1 + s_j)^-staleness * delta_j, with s_j in versions. Fast sites report
    more often, so the result leans towards them.

    Args:
        k: replies per version; a fast site may be among them twice.
        concurrency: visits in flight at a time; None keeps every site busy.
        server_lr: the server's step size.
        staleness: exponent of the discount; the paper's is 0.5, and 0 has none.
        training: what a site does in a visit.
    """
    return Method(
        local=LocalSGD(training),
        combine=WeightedMean(by="uniform", staleness=staleness),
        server=Apply(server_lr),
        schedule=Buffered(k, concurrency),
    )
