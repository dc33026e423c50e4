"""FFA-LoRA (Sun et al., 2024, arXiv 2403.12313)."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt

from atoll.core.card import Card, Cite
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.share.one_sided_lora import OneSidedLora

CARD = Card(
    name="ffa_lora",
    area="federated method",
    summary="LoRA adapters with one frozen factor, so that averaging is exact and noise stays linear",
    cites=(
        Cite(
            authors="Youbang Sun, Zitao Li, Yaliang Li, Bolin Ding",
            year=2024,
            title="Improving LoRA in Privacy-preserving Federated Learning",
            arxiv="2403.12313",
            venue="ICLR",
        ),
    ),
    server_sees="each site's adapter and number of examples",
    additive=True,
    suits=("less traffic", "pretrained models", "language models", "generative models"),
)


@method(CARD)
def ffa_lora(
    rank: Annotated[int, Ge(1)] = 8,
    alpha: Annotated[float, Gt(0)] | None = None,
    targets: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
    training: Training = Training(lr=0.01, optimizer="adamw"),
) -> Method:
    """FedAvg of LoRA's zero-started factor B; A is random, the same everywhere and frozen.

    Averaging both factors mixes B_i A_j of different sites; with A fixed, mean(B) A = mean(B A). Half of LoRA's bytes
    travel, clipping and noise act on the update itself, and secure sums apply. It needs a larger rank or alpha than
    LoRA, whose capacity it halves.

    Args:
        rank: of the adapters.
        alpha: LoRA's alpha; None: twice the rank.
        targets: patterns of module names to adapt; empty: every linear layer.
        also: patterns of modules that train in full and are averaged, e.g. a new head.
        training: what a site does in a visit.
    """
    return Method(share=OneSidedLora(rank, alpha, targets, also), local=LocalSGD(training))
