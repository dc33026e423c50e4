"""FedBN (Li et al., 2021, arXiv 2102.07623)."""

from __future__ import annotations

from atoll.core.card import Card, Cite
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.share.without_norms import WithoutNorms

CARD = Card(
    name="fedbn",
    area="federated method",
    summary="normalisation layers stay at the site",
    cites=(
        Cite(
            authors="Xiaoxiao Li, Meirui Jiang, Xiaofei Zhang, Michael Kamp, Qi Dou",
            year=2021,
            title="FedBN: Federated Learning on Non-IID Features via Local Batch Normalization",
            arxiv="2102.07623",
            venue="ICLR",
        ),
    ),
    server_sees="each site's update without its normalisation layers, and its number of examples",
    additive=True,
    suits=("sites differ in features", "a model per site"),
)


@method(CARD)
def fedbn(training: Training = Training()) -> Method:
    """FedAvg on everything but the normalisation layers, found by type, running statistics included.

    There is no single global model afterwards. A model without such layers makes this FedAvg.

    Args:
        training: what a site does in a visit.
    """
    return Method(share=WithoutNorms(), local=LocalSGD(training))
