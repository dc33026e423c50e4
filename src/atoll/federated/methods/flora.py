"""FLoRA (Wang et al., 2024, arXiv 2409.05976)."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt

from atoll.core.card import Card, Cite
from atoll.federated.combine.stack import Stack
from atoll.federated.local.low_rank_sgd import LowRankSGD
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.server.pass_on import PassOn
from atoll.federated.share.low_rank import LowRank, Ranks

CARD = Card(
    name="flora",
    area="federated method",
    summary="LoRA adapters of any ranks, stacked exactly and merged into the base each round",
    cites=(
        Cite(
            authors="Ziyao Wang, Zheyu Shen, Yexiao He, Guoheng Sun, Hongyi Wang, Lingjuan Lyu, Ang Li",
            year=2024,
            title="FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
            arxiv="2409.05976",
            venue="NeurIPS",
        ),
    ),
    server_sees="each site's adapter and number of examples",
    additive=False,
    suits=("language models", "sites differ in hardware", "few rounds"),
)


@method(CARD)
def flora(
    ranks: tuple[Annotated[int, Ge(1)], ...] = (16,),
    memory_bytes: tuple[Annotated[float, Gt(0)], ...] = (),
    alpha: Annotated[float, Gt(0)] | None = None,
    targets: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
    by: Literal["samples", "uniform"] = "samples",
    compress_rank: Annotated[int, Ge(1)] | None = None,
    training: Training = Training(lr=3e-4, optimizer="adamw"),
) -> Method:
    """Sites train LoRA adapters of their own ranks; the stack of all is broadcast and merged into everybody's
    base.

    With p_k a site's share of the examples and s_k = alpha / r_k, the base moves by sum_k p_k s_k B_k A_k
    exactly. Each round starts from a new adapter (A random, B zero). The download grows with the number of
    sites in a round until the dense product is smaller. The paper: rank 16, or 64 down to 4 over ten sites,
    alpha twice the rank, query and value projections, 3 to 5 rounds of 1 to 3 epochs. It suits few long
    rounds; many short ones restart too often.

    Args:
        ranks: site i gets ``ranks[i % len(ranks)]``, unless ``memory_bytes`` is given.
        memory_bytes: the bytes that a site needs for each of ``ranks``; a site gets the largest that its
            device holds.
        alpha: LoRA's alpha; None: twice the rank.
        targets: patterns of module names to adapt, e.g. ``("q_proj", "v_proj")``; empty: every linear layer.
        also: patterns of modules to train in full and average, e.g. a new classification head.
        by: weight of a site: its examples, or all alike.
        compress_rank: project the broadcast to this rank (lossy); None: exact.
        training: what a site does in a visit.
    """
    rank = Ranks(ranks, memory_bytes, alpha)
    return Method(
        share=LowRank(rank, targets, also),
        local=LowRankSGD(training, rank),
        combine=Stack(by, compress_rank),
        server=PassOn(),
    )
