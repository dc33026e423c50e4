"""AutoFLIP: hybrid pruning by loss exploration (Interno, Raponi, van Stein, Baeck, Olhofer, Jin, Hammer, 2024).

Assumes  one model for all sites; rounds that wait for replies.
Sees     the squared drift of each scout's parameters, once, then each site's update of the kept entries; under a secure
         sum only the sums.
Departs  the mask is made once, from all scouts together: the paper renews it each round from the scouts among the sites
         of that round, which takes every scout's drift at the server and would bring removed units back. Scouts send
         squares, as in ``fedlex``. Any layer may be thinned, the first and the last too, but inputs and outputs stay,
         and so does the best entry of each tensor and the best unit of each layer. By default a unit goes only when
         less than a tenth of it would be left; removing as many units as entries (``unit_quantile``) would prune far
         more than ``sparsity`` says.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

from atoll.core.card import Card, Cite
from atoll.federated.local.local_sgd import Correction
from atoll.federated.local.loss_exploration import LossExploration, Scouting
from atoll.federated.local.proximal import Proximal
from atoll.federated.local.pruned_sgd import PrunedSGD
from atoll.federated.local.training import Training
from atoll.federated.method import Method, ServerStep, method
from atoll.federated.server.apply import Apply
from atoll.federated.server.prune import Prune, Score
from atoll.federated.share.pruned import Pruned

CARD = Card(
    name="autoflip",
    area="federated method",
    summary="scouts train alone once; what hardly moved is pruned, and only what is kept travels",
    cites=(
        Cite(
            authors="Christian Internò, Elena Raponi, Niki van Stein, Thomas Bäck, Markus Olhofer, Yaochu Jin, "
            "Barbara Hammer",
            year=2024,
            title="Adaptive Hybrid Model Pruning in Federated Learning through Loss Exploration",
            arxiv="2405.10271",
        ),
    ),
    server_sees="the squared drift of each scout's parameters, once; each site's update of the entries that are kept, "
    "and its number of examples",
    additive=True,
    suits=("less traffic", "sites differ in hardware", "sites differ in labels"),
)


@method(CARD)
def autoflip(
    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.3,
    unit_share: Annotated[float, Ge(0), Le(1)] = 0.1,
    unit_quantile: Annotated[float, Ge(0), Lt(1)] = 0.0,
    score: Score = "exploration",
    scouts: Annotated[float, Gt(0), Le(1)] = 0.1,
    warm_up: Annotated[int, Ge(1)] = 1,
    scouting: Scouting = Scouting(),
    mu: Annotated[float, Ge(0)] = 0.0,
    server: ServerStep = Apply(),
    training: Training = Training(),
) -> Method:
    """FedAvg of a network that loses, after one exploring round, the weights that no site needed to move.

    Sites compute with zeros in a network of the old size. The exported model is smaller where whole neurons or channels
    went, which is found out for networks whose graph ``torch.fx`` can trace.

    Args:
        sparsity: fraction of all trainable entries that are pruned.
        unit_share: a neuron or channel of which a smaller share would be kept is removed as a whole; 0: never.
        unit_quantile: also remove this fraction of each layer's neurons or channels, those with the lowest mean score.
        score: ``"exploration"`` judges an entry by how far scouts moved it; ``"magnitude"`` (its size at that time) and
            ``"random"`` are baselines.
        scouts: fraction of the sites that explore, at least one; the paper's runs use 1.
        warm_up: ordinary rounds before that.
        scouting: how long a scout trains alone.
        mu: weight of FedProx's pull to the weights that a visit started from.
        server: what the server does with the mean update, e.g. ``{name: adaptive}``.
        training: what a site does in a visit, and how a scout steps.
    """
    pull: Correction | None = Proximal(mu) if mu else None
    return Method(
        share=Pruned(),
        local=LossExploration(training, scouting, PrunedSGD(training, correction=pull)),
        server=Prune(scouts, warm_up, server, sparsity, unit_share, unit_quantile, score),
    )
