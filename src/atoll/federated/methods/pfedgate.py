"""pFedGate (Chen, Yao, Gao, Ding, Li, 2023, arXiv 2305.02776).

Assumes  inputs that are numbers; one network for all sites.
Sees     which blocks each site uses, what these learned, and its number of examples.
Departs  a block is averaged over the sites that sent it (the released code averages whole networks). A site settles on
         one choice for all its rows, so that a prediction does not depend on the other examples of a batch; what is
         sent are the blocks of that choice. A tensor is cut into more blocks when `keep` is below one of them, since
         each keeps one. The network's step and the gate's are taken together, not in two levels. A fresh gate's scores
         are near 0.88 instead of 0.5, so that a deep network starts as itself.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le

from atoll.core.card import Card, Cite
from atoll.federated.combine.block_mean import BlockMean
from atoll.federated.local.gated_sgd import GatedSGD
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.share.gated_parameters import GatedParameters

CARD = Card(
    name="pfedgate",
    area="federated method",
    summary="a private gate picks the blocks of a common network that a site uses and sends, within its budget",
    cites=(
        Cite(
            authors="Daoyuan Chen, Liuyi Yao, Dawei Gao, Bolin Ding, Yaliang Li",
            year=2023,
            title="Efficient Personalized Federated Learning via Sparse Model-Adaptation",
            arxiv="2305.02776",
            venue="ICML",
        ),
    ),
    server_sees="which blocks each site uses, its update of them and its number of examples",
    additive=False,
    suits=("a model per site", "sites differ in hardware", "sites differ in labels", "less traffic"),
)


@method(CARD)
def pfedgate(
    keep: Annotated[float, Gt(0), Le(1)] | tuple[Annotated[float, Gt(0), Le(1)], ...] = 0.5,
    blocks: Annotated[int, Ge(1)] = 5,
    inputs: Annotated[int, Ge(1)] = 784,
    per_entry: bool = False,
    gate_lr: Annotated[float, Gt(0)] | None = None,
    training: Training = Training(),
) -> Method:
    """Each site uses score times weight for the blocks that its gate picks, and zero for the others.

    The exported models are the sites' own: ordinary networks with zeros where a site uses nothing. The arithmetic of
    training is dense, so a budget saves traffic and not FLOPs.

    Args:
        keep: fraction of the network that a site uses and sends; of several, site i has the i-th, in turn.
        blocks: of each tensor; as many as 1 / keep when that is more.
        inputs: numbers that the gate sees of an example; longer inputs are averaged down.
        per_entry: pick blocks by score over size instead of by score.
        gate_lr: step size of the gate; None: that of the network.
        training: what a site does in a visit.
    """
    share = GatedParameters(keep if isinstance(keep, tuple) else (keep,), blocks, inputs, per_entry)
    return Method(share=share, local=GatedSGD(training, gate_lr), combine=BlockMean(share.count))
