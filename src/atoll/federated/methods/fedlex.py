"""FedLEx: federated loss exploration (Interno, Olhofer, Jin, Hammer, IJCNN 2024).

Assumes  one model for all sites; rounds that wait for replies.
Sees     the square of how far each scout's parameters drift, once, then each site's update; under a secure sum only
         the sums.
Departs  a scout sends (w_s - w_0)^2 instead of w_s, so that the server needs only their mean, in which scouts weigh as
         in the merge, by their examples. The base model is that after one ordinary round. With Adam the guide
         multiplies the step: Adam would undo a constant factor of a gradient. Robust scaling, an option of the paper,
         is left out: what drifted less than the median would go uphill. A tensor that drifted evenly is not guided.

The mean of a min-max guide is small, about 0.05, so it also shortens every step: tune the step size anew, or use
``scale="mean"``.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le

from atoll.core.card import Card, Cite
from atoll.federated.knowledge.guidance import Scale
from atoll.federated.local.local_sgd import Correction
from atoll.federated.local.loss_exploration import LossExploration, Scouting
from atoll.federated.local.proximal import Proximal
from atoll.federated.local.scaled_sgd import ScaledSGD
from atoll.federated.local.training import Training
from atoll.federated.method import Method, ServerStep, method
from atoll.federated.server.apply import Apply
from atoll.federated.server.send_guide import SendGuide
from atoll.federated.share.explored import Explored

CARD = Card(
    name="fedlex",
    area="federated method",
    summary="scouts train alone once; how far each parameter went scales its gradients from then on",
    cites=(
        Cite(
            authors="Christian Internò, Markus Olhofer, Yaochu Jin, Barbara Hammer",
            year=2024,
            title="Federated Loss Exploration for Improved Convergence on Non-IID Data",
            venue="IJCNN",
        ),
    ),
    server_sees="the squared drift of each scout's parameters, once; each site's update and number of examples",
    additive=True,
    suits=("sites differ in labels",),
)


@method(CARD)
def fedlex(
    scouts: Annotated[float, Gt(0), Le(1)] = 0.1,
    warm_up: Annotated[int, Ge(1)] = 1,
    scouting: Scouting = Scouting(),
    scale: Scale = "min_max",
    mu: Annotated[float, Ge(0)] = 0.0,
    server: ServerStep = Apply(),
    training: Training = Training(),
) -> Method:
    """FedAvg whose gradients are multiplied, entry by entry, by what a few sites explored beforehand.

    The round after ``warm_up`` belongs to the scouts; it moves no weights. Its cost is in the ledger.

    Args:
        scouts: fraction of the sites that explore, at least one; the paper's runs use 1.
        warm_up: ordinary rounds before that.
        scouting: how long a scout trains alone.
        scale: ``"min_max"``: a factor is 0 for the least drift in its tensor and 1 for the most, which also shortens
            steps; ``"mean"``: that over its mean, at most 5, which keeps their length.
        mu: weight of FedProx's pull to the weights that a visit started from.
        server: what the server does with the mean update, e.g. ``{name: adaptive}``.
        training: what a site does in a visit, and how a scout steps.
    """
    pull: Correction | None = Proximal(mu) if mu else None
    return Method(
        share=Explored(),
        local=LossExploration(training, scouting, ScaledSGD(training, correction=pull, scale="guide")),
        server=SendGuide(scouts, warm_up, server, scale),
    )
