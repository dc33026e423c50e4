"""Distillation of a generator where the images are (Rasouli et al., 2020, arXiv 2006.07228; McMahan et al., 2017).

Assumes  `task: distilling`, and that every site has the teacher, which a federation may have trained before.
Sees     each site's update of student and critics, and its number of rows.
Departs  Rasouli et al. average the generator and discriminator of a GAN; here they are the networks of any method that
         takes steps on real rows, such as a student, its fake score and a head on its features.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from atoll.core.card import Card, Cite
from atoll.federated.local.distil_steps import DistilSteps
from atoll.federated.method import Method, method
from atoll.federated.server.apply import Apply
from atoll.federated.server.average_rounds import AverageRounds
from atoll.federated.share.learned import Learned

CARD = Card(
    name="distil_at_sites",
    area="federated method",
    summary="sites make a fast generator of a slow one together, each on its own rows",
    cites=(
        Cite(
            authors="Mohammad Rasouli, Tao Sun, Ram Rajagopal", year=2020, arxiv="2006.07228",
            title="FedGAN: Federated Generative Adversarial Networks for Distributed Data",
        ),
        Cite(
            authors="H. Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson, Blaise Aguera y Arcas", year=2017,
            title="Communication-Efficient Learning of Deep Networks from Decentralized Data", arxiv="1602.05629",
            venue="AISTATS",
        ),
    ),
    server_sees="each site's update of the student and its critics, and number of examples",
    additive=True,
    suits=("generative models", "few calls a sample"),
)  # fmt: skip


@method(CARD)
def distil_at_sites(
    steps: Annotated[int, Ge(1)] = 20,
    batch: Annotated[int, Ge(1)] = 128,
    rounds: Annotated[int, Ge(1)] | None = None,
    cooldown: Annotated[float, Ge(0), Le(1)] = 0.3,
    precision: Literal["float32", "bf16"] = "float32",
    moments: Literal["kept", "fresh"] = "kept",
    server_lr: Annotated[float, Gt(0)] = 1.0,
    average: Annotated[float, Ge(0), Lt(1)] = 0.9,
) -> Method:
    """The task says how the student is made, and step sizes are that method's own.

    Args:
        steps: of a visit.
        batch: rows and samples per loss.
        rounds: what the method schedules over a training is spread over so many; None: over those of the run.
        cooldown: share of them, at the end, over which all step sizes fall to nothing.
        precision: ``bf16`` computes the networks in bfloat16.
        moments: of Adam are ``kept`` at the site from visit to visit, or start ``fresh``.
        server_lr: 1 takes the mean of the sites' networks as it is.
        average: the run ends with a running average of the rounds' networks that keeps this share of itself in each; 0
            ends with the last round's. What a single training averages over steps is averaged by the server here.
    """
    local = DistilSteps(
        steps=steps, batch=batch, rounds=rounds, cooldown=cooldown, precision=precision, moments=moments
    )  # fmt: skip
    server = AverageRounds(average, server_lr) if average else Apply(server_lr)
    return Method(share=Learned(), local=local, server=server)
