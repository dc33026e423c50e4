"""FedWon (Zhuang and Lyu, 2023, arXiv 2306.05879).

Assumes  a network of convolutions and ReLUs; another activation wants another ``gamma``.
Sees     each site's update, as in FedAvg.
Departs  residual branches are left as they are: which additions are residual cannot be told from a module. Deep
         residual networks want branches that are scaled (arXiv 2101.08692). Depthwise and transposed convolutions keep
         their weights. What the clipping calls the classifier is the last layer with a weight.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Gt

from atoll.core.card import Card, Cite
from atoll.federated.local.adaptive_clip import AdaptiveClip
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.share.norm_free_parameters import NormFreeParameters
from atoll.models.norm_free import RELU_GAIN

CARD = Card(
    name="fedwon",
    area="federated method",
    summary="no normalisation layers; convolutions standardise their own weights",
    cites=(
        Cite(
            authors="Weiming Zhuang, Lingjuan Lyu",
            year=2024,
            title="FedWon: Triumphing Multi-domain Federated Learning Without Normalization",
            arxiv="2306.05879",
            venue="ICLR",
        ),
        Cite(
            authors="Andrew Brock, Soham De, Samuel L. Smith, Karen Simonyan",
            year=2021,
            title="High-Performance Large-Scale Image Recognition Without Normalization",
            arxiv="2102.06171",
            venue="ICML",
        ),
    ),
    server_sees="each site's update and number of examples",
    additive=True,
    suits=("sites differ in features", "tiny batches"),
)


@method(CARD)
def fedwon(
    training: Training = Training(),
    clipping: Annotated[float, Gt(0)] | None = 0.32,
    gamma: Annotated[float, Gt(0)] = RELU_GAIN,
) -> Method:
    """FedAvg of a network that has lost its normalisation layers and standardises its convolutions' weights.

    One model for all sites, in which nothing depends on the batch, so batches of one example train too. The norms are
    found by type in any module and taken out; a model without convolutions keeps them, and this is FedAvg with clipped
    gradients. A network from a checkpoint that was trained with batch norms loses what these had learned.

    Args:
        training: what a site does in a visit.
        clipping: adaptive gradient clipping: the largest length of the gradient of a weight's row over that of the row;
            None: off. Small values slow training.
        gamma: length of a standardised row at gain 1; sqrt(2 / (1 - 1/pi)) keeps the variance through ReLUs.
    """
    return Method(
        share=NormFreeParameters(gamma),
        local=LocalSGD(training, correction=AdaptiveClip(clipping) if clipping else None),
    )
