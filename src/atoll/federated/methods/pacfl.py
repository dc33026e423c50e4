"""PA-CFL, privacy-adaptive clustered federated learning (Long et al., 2025, arXiv 2503.12220).

Assumes  sites of a few kinds, which differ in what drives their target. The server forms groups as it should.
Sees     of each site its noisy feature importances and its number of rows; then, as in FedAvg, its updates.
Departs  the number of groups is at most half the number of sites: with N - 1 allowed, the Davies-Bouldin index chooses
         N - 1. Noise is drawn on whole numbers, exactly. Distances take any two features to be equally far apart, as
         their order means nothing. At epsilon 5 a share's noise has scale 0.4, so a hostile site does not stand out
         reliably, whatever is said elsewhere: here it does from about 50. Nobody is left out for being alone.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt

from atoll.core.card import Card, Cite
from atoll.federated.grouping import Ground
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.signatures.feature_importance import FeatureImportance
from atoll.federated.signatures.signature import Signature
from atoll.federated.topologies.bubbles import Bubbles

CARD = Card(
    name="pacfl",
    area="federated method",
    summary="FedAvg within groups of alike sites, found from noisy feature importances",
    cites=(
        Cite(
            authors="Yunbo Long, Liming Xu, Ge Zheng, Alexandra Brintrup",
            year=2025,
            title="PA-CFL: Privacy-Adaptive Clustered Federated Learning for Transformer-Based Sales Forecasting on "
            "Heterogeneous Retail Data",
            arxiv="2503.12220",
        ),
    ),
    server_sees="each site's noisy feature importances, then its update and number of examples",
    additive=False,
    privacy_unit="site",
    threat_model="covers the feature importances that groups are formed from, and not the updates within a group",
    suits=("sites differ in features", "a model per site", "hostile sites", "tables and series"),
)


@method(CARD)
def pacfl(
    training: Training = Training(),
    signature: Signature = FeatureImportance(),
    privacy: Annotated[float, Gt(0)] | None = 20.0,
    ground: Ground = "zero_one",
    most: Annotated[int, Ge(2)] | None = None,
    test_seed: int | None = None,
    allow_insecure_test_seed: bool = False,
) -> Method:
    """The first round groups the sites and trains nothing. Around another method: ``topology: bubbles``.

    Args:
        training: what a site does in a visit.
        signature: what sites reveal to be grouped by.
        privacy: epsilon of a signature, for all rows of a site together; None: no noise. Updates are not covered.
        ground: how far apart two shares of a signature are: equally (``"zero_one"``), or by their places (``"index"``).
        most: groups, at most; None: half as many as sites.
        test_seed: INSECURE. Noise from a seed that can be known; see :class:`Bubbles`.
        allow_insecure_test_seed: must be True for ``test_seed``.
    """
    bubbles = Bubbles(signature, privacy, ground, most, test_seed, allow_insecure_test_seed)
    return Method(local=LocalSGD(training), topology=bubbles)
