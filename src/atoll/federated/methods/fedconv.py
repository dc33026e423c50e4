"""FedConv (Shen et al., 2024, arXiv 2502.20639).

Assumes  the server owns labelled rows like the sites' (``public``); linear and convolution layers whose outputs can be
         taken out one by one (residual sums and norms over channels keep their width).
Sees     each site's update, as in FedAvg.
Departs  kernels start as slicing instead of at random, so what is learned can be told from what is given, and the first
         round's sub-models are slices. Held-out public rows decide which epoch is best; the published code takes the
         test rows, and trains the large model itself on the public rows in each round, which is not done here. Merging
         starts from the mean over the sites that have an entry. The paper's activation, which nearly deletes negative
         weights, is an option. Very large kernels are products of a column and a row.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt

from atoll.core.card import Card, Cite
from atoll.federated.combine.keep_apart import KeepApart
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.server.learn_on_models import LearnOnModels
from atoll.federated.share.sub_models import Ratio, SubModels
from atoll.models.learned_width import Activation

CARD = Card(
    name="fedconv",
    area="federated method",
    summary="the server learns to convolve its large model into smaller ones for weak sites, and theirs back into it",
    cites=(
        Cite(
            authors="Leming Shen, Qiang Yang, Kaiyan Cui, Yuanqing Zheng, Xiao-Yong Wei, Jianwei Liu, Jinsong Han",
            year=2024,
            title="FedConv: A Learning-on-Model Paradigm for Heterogeneous Federated Clients",
            arxiv="2502.20639",
            venue="MobiSys",
        ),
    ),
    server_sees="each site's update and number of examples",
    additive=False,
    needs_public_data=True,
    suits=("sites differ in hardware", "less traffic"),
)


@method(CARD)
def fedconv(
    training: Training = Training(),
    ratios: tuple[Ratio, ...] = (1.0, 0.75, 0.5625),
    first: Annotated[int, Ge(0)] = 20,
    later: Annotated[int, Ge(0)] = 10,
    lr: Annotated[float, Gt(0)] = 1e-3,
    batch_size: Annotated[int, Ge(1)] = 32,
    activation: Activation = "identity",
) -> Method:
    """Sites train what they are sent, as in FedAvg; a weak site is sent a narrower model, which it cannot tell.

    ``first: 0`` with ``later: 0`` learns nothing at the server: sub-models are slices, merged over who has an entry, as
    in HeteroFL. The server keeps kernels for each site, and for a merge as many large models as there are replies.

    Args:
        training: what a site does in a visit.
        ratios: site i has this share of the units of each layer: ``ratios[i % len(ratios)]``.
        first: epochs over the public rows at the first merge, for each thing that is learned there.
        later: epochs at the other merges.
        lr: step size of Adam at the server.
        batch_size: public rows in a step.
        activation: of compressed weights: none, or the paper's 0.85 x above zero and 0.001 x below.
    """
    return Method(
        share=SubModels(ratios),
        local=LocalSGD(training),
        combine=KeepApart(),
        server=LearnOnModels(
            ratios=ratios, first=first, later=later, lr=lr, batch_size=batch_size, activation=activation
        ),
    )
