"""FedAdam, FedYogi, FedAdagrad (Reddi et al., 2020, arXiv 2003.00295) and FedAvgM (Hsu et al., 2019)."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Lt

from atoll.core.card import Card, Cite
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.server.adaptive import Adaptive, Optimizer

CARD = Card(
    name="fedopt",
    area="federated method",
    summary="an adaptive optimizer on the mean update",
    cites=(
        Cite(
            authors="Sashank J. Reddi, Zachary Charles, Manzil Zaheer, Zachary Garrett, Keith Rush, "
            "Jakub Konečný, Sanjiv Kumar, H. Brendan McMahan",
            year=2020,
            title="Adaptive Federated Optimization",
            arxiv="2003.00295",
            venue="ICLR 2021",
        ),
        Cite(
            authors="Tzu-Ming Harry Hsu, Hang Qi, Matthew Brown",
            year=2019,
            title="Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
            arxiv="1909.06335",
        ),
    ),
    server_sees="each site's update and number of examples",
    additive=True,
    suits=("sparse features", "badly scaled models"),
)


@method(CARD)
def fedopt(
    optimizer: Optimizer = "adam",
    server_lr: Annotated[float, Gt(0)] = 0.03,
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.99,
    tau: Annotated[float, Gt(0)] = 1e-3,
    training: Training = Training(),
) -> Method:
    """The server takes the size-weighted mean update for a gradient and has an optimizer of its own.

    Args:
        optimizer: ``"adam"`` (FedAdam), ``"yogi"``, ``"adagrad"`` or ``"momentum"`` (FedAvgM).
        server_lr: the server's step size. The adaptive three need tuning around 0.01 to 0.1; FedAvgM takes 1.
        beta1: how much of the last direction is kept.
        beta2: how much of the last squared size is kept (adam, yogi).
        tau: smaller means more adaptive; it is not there for numerical stability alone.
        training: what a site does in a visit.
    """
    return Method(local=LocalSGD(training), server=Adaptive(optimizer, server_lr, beta1, beta2, tau))
