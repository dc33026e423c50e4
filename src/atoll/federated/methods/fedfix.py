"""FedFix (Fraboni et al., 2022, arXiv 2206.10189).

Assumes  all sites are always there, and start again at the first merge after they have reported.
Sees     each site's update, its number of examples, and how long its visit took.
Departs  the length of a visit is observed, not known before: see ``combine/inverse_frequency.py``.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Gt

from atoll.core.card import Card, Cite
from atoll.federated.combine.inverse_frequency import InverseFrequency
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.schedules.fixed_interval import FixedInterval
from atoll.federated.server.apply import Apply

CARD = Card(
    name="fedfix",
    area="federated method",
    summary="merge at every tick of a clock; slow sites weigh as much as they are missed",
    cites=(
        Cite(
            authors="Yann Fraboni, Richard Vidal, Laetitia Kameni, Marco Lorenzi",
            year=2022,
            title="A General Theory for Federated Optimization with Asynchronous and Heterogeneous Clients Updates",
            arxiv="2206.10189",
            venue="JMLR 2023",
        ),
    ),
    server_sees="each site's update, its number of examples and how long its visit took",
    additive=True,
    suits=("late sites", "sites differ in hardware"),
)


@method(CARD)
def fedfix(
    dt: Annotated[float, Gt(0)] = 1.0,
    server_lr: Annotated[float, Gt(0)] = 1.0,
    training: Training = Training(),
) -> Method:
    """The server merges every ``dt`` seconds; who has reported starts again from the new version.

    weights += server_lr * sum_i d_i (y_i - w_base_i) over those who reported, d_i = p_i ceil(tau_i / dt): in the mean
    every site counts by its part p_i of the examples, so the optimum is that of FedAvg, however slow a site is.

    Args:
        dt: virtual seconds between merges. Longer than the slowest visit, this is FedAvg.
        server_lr: the server's step size; the paper's is 1.
        training: what a site does in a visit. A slow site's update is old and counts much: the further ``dt`` is below
            the slowest visit, the smaller lr times steps must be.
    """
    return Method(
        local=LocalSGD(training),
        combine=InverseFrequency(dt),
        server=Apply(server_lr),
        schedule=FixedInterval(dt),
    )
