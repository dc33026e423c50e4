"""FedKSeed and FedKSeed-Pro (Qin et al., 2023, arXiv 2312.06353)."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt

from atoll.core.card import Card, Cite
from atoll.federated.combine.scatter_sum import ScatterSum
from atoll.federated.local.zeroth_order import ZerothOrder
from atoll.federated.method import Method, method
from atoll.federated.server.add_scalars import AddScalars
from atoll.federated.share.seed_scalars import SeedPool, SeedScalars

CARD = Card(
    name="fedkseed",
    area="federated method",
    summary="all weights tuned without a backward pass; seeds and scalars travel instead of tensors",
    cites=(
        Cite(
            authors="Zhen Qin, Daoyuan Chen, Bingchen Qian, Bolin Ding, Yaliang Li, Shuiguang Deng",
            year=2024,
            title="Federated Full-Parameter Tuning of Billion-Sized Language Models "
            "with Communication Cost under 18 Kilobytes",
            arxiv="2312.06353",
            venue="ICML",
        ),
    ),
    server_sees="each site's slopes of its loss along known random directions, and number of examples",
    additive=True,
    suits=("less traffic", "weak devices", "language models"),
)


@method(CARD)
def fedkseed(
    pool: Annotated[int, Ge(1)] = 4096,
    steps: Annotated[int, Ge(1)] = 200,
    lr: Annotated[float, Gt(0)] = 0.01,
    eps: Annotated[float, Gt(0)] = 5e-4,
    batch_size: Annotated[int, Ge(1)] = 32,
    pro: bool = False,
    by: Literal["samples", "uniform"] = "samples",
    pool_seed: int = 0,
) -> Method:
    """Sites probe the loss along directions from a pool of K seeds; only (seed, slope) pairs and K sums
    travel.

    The global model is ``w0 - lr * sum_j G_j z_j`` with z_j drawn from seed j. A round moves 4 K bytes down
    and 8 bytes a step up, whatever the model's size: 17,984 bytes and a 4-byte count with the defaults, which
    are the paper's, except for two: its step size is 3e-7 for a billion weights (the largest stable one falls
    with their number), and its batch holds one example.

    Args:
        pool: K. More directions reach further; the download is 4 K bytes.
        steps: local steps of a visit (tau), two forward passes each.
        lr: step size, constant and without decay, so that G is enough to rebuild the weights.
        eps: length of the probe along a direction.
        batch_size: examples per step.
        pro: FedKSeed-Pro: draw directions by softmax of their normalised mean slope; 4 K more bytes down.
        by: weight of a site: its examples, or all alike.
        pool_seed: names the pool of directions.
    """
    directions = SeedPool(pool, pool_seed)
    return Method(
        share=SeedScalars(directions, lr),
        local=ZerothOrder(directions, lr, steps, eps, batch_size),
        combine=ScatterSum(by),
        server=AddScalars(pro),
    )
