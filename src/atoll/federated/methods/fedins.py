"""FedIns (Feng et al., 2023, arXiv 2308.06051).

Assumes  a pretrained network that ends in a linear head on one feature per row (a vision transformer's class token).
Sees     each site's changes of the pool, as in FedAvg.
Departs  every row chooses for itself; the authors' code averages the choice over a batch, which is the same only when
         images come one by one. Heads start as copies of the network's own. Where a few keys take all queries,
         ``usage_penalty`` handicaps the busy ones while training (the paper has no such term, and choosing differently
         in training than afterwards has its own cost: off by default).
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Le

from atoll.core.card import Card, Cite
from atoll.federated.combine.weighted_mean import WeightedMean
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.pull_keys import PullKeys
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.share.instance_tuners import InstanceTuners
from atoll.models.instance_tuned import TunerPool

CARD = Card(
    name="fedins",
    area="federated method",
    summary="a frozen network whose layers each input rescales, from a shared pool that it chooses from",
    cites=(
        Cite(
            authors="Chun-Mei Feng, Kai Yu, Nian Liu, Xinxing Xu, Salman Khan, Wangmeng Zuo",
            year=2023,
            title="Towards Instance-adaptive Inference for Federated Learning",
            arxiv="2308.06051",
            venue="ICCV",
        ),
    ),
    server_sees="each site's update of the pool and its keys",
    additive=True,
    suits=("less traffic", "sites differ in features", "pretrained models"),
)


@method(CARD)
def fedins(
    size: Annotated[int, Ge(1)] = 25,
    k: Annotated[int, Ge(1)] = 3,
    pull: Annotated[float, Ge(0), Le(1)] = 0.1,
    spread: Annotated[float, Ge(0)] = 0.02,
    usage_penalty: Annotated[float, Ge(0)] = 0.0,
    training: Training = Training(lr=0.01),
) -> Method:
    """Every layer's output is scaled and shifted by the mean of the k entries whose keys are nearest to the input.

    The query is the feature that the untouched network gives, so an input takes two passes. Every linear layer, norm
    and convolution of any network is tuned; with ``size`` and ``k`` 1 this is plain scale-and-shift tuning.

    Args:
        size: entries of the pool.
        k: entries that an input chooses, at most ``size``.
        pull: share of the loss that brings keys to the queries that chose them.
        spread: standard deviation of the initial scales around 1 and shifts around 0.
        usage_penalty: while training, what an entry that every input has chosen so far loses of its cosine; 0: off.
        training: what a site does in a visit.
    """
    return Method(
        share=InstanceTuners(TunerPool(size=size, k=k, spread=spread, usage_penalty=usage_penalty)),
        local=LocalSGD(training, correction=PullKeys(pull)),
        combine=WeightedMean(by="uniform"),
    )
