"""FRAug (Chen et al., 2022, arXiv 2205.14900).

Assumes  classes, and a network that ends in a linear head on one feature per row.
Sees     each site's update of the model and of the generator; transforms and class means never leave.
Departs  the distance is the maximum mean discrepancy, which is bounded, so the generator's reward for being unlike is
         too; the paper also allows L2. The generator ends in a linear layer, which can match features of any sign. A
         visit is counted in epochs; the authors' code counts batches. r follows the same curve on any number of rounds.
         Interpolating invented with real features, an option of the paper, is left out.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le

from atoll.core.card import Card, Cite
from atoll.federated.local.augment_features import AugmentFeatures
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.share.with_generator import WithGenerator

CARD = Card(
    name="fraug",
    area="federated method",
    summary="a shared generator and a private transform invent features that each site's head trains on",
    cites=(
        Cite(
            authors="Haokun Chen, Ahmed Frikha, Denis Krompass, Jindong Gu, Volker Tresp",
            year=2023,
            title="FRAug: Tackling Federated Learning with Non-IID Features via Representation Augmentation",
            arxiv="2205.14900",
            venue="ICCV",
        ),
    ),
    server_sees="each site's update of the model and of a generator of features, and its number of examples",
    additive=True,
    suits=("sites differ in features", "few examples a site", "a model per site"),
)


@method(CARD)
def fraug(
    training: Training = Training(lr=0.01, momentum=0.5),
    most: Annotated[float, Ge(0), Le(1)] = 0.5,
    ramp: Annotated[int, Ge(1)] = 300,
    lr_generator: Annotated[float, Gt(0)] = 0.05,
    lr_transform: Annotated[float, Gt(0)] = 0.025,
    unlike: Annotated[float, Ge(0)] = 1.0,
    near: Annotated[float, Ge(0)] = 1.0,
    momentum: Annotated[float, Gt(0), Le(1)] = 0.3,
) -> Method:
    """Sites train their heads also on features that look like their own and were never seen.

    Running statistics of batch norms stay at the site. With ``most`` 0 the model is that of FedAvg with local
    statistics.

    Args:
        training: what a site does in a visit.
        most: largest weight r of invented features in the model's loss.
        ramp: the run's rounds: r = min(most, exp(3 (round / ramp - 1))) starts at 0.05 and grows.
        lr_generator: step size of the generator.
        lr_transform: step size of the transform.
        unlike: weight of the generator's distance from the site's features; the paper has 1 to 10.
        near: weight of the transform's distance from them.
        momentum: how far a batch moves the mean feature of a class.
    """
    local = AugmentFeatures(
        training=training, most=most, ramp=ramp, lr_generator=lr_generator, lr_transform=lr_transform, unlike=unlike,
        near=near, momentum=momentum,
    )  # fmt: skip
    return Method(share=WithGenerator(), local=local)
