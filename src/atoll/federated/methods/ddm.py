"""Decentralised diffusion models with sites as parts (McAllister et al., 2025, arXiv 2501.05450).

Assumes  a denoising task with classes; one round is enough, and later ones let the experts train on.
Sees     each site's denoiser, trained on its rows alone, and how many rows of each class it has.
Departs  the paper clusters a data set that lies in one place and trains the router on its real rows. Here the parts are
         the sites', so nobody has rows of all: the router learns from samples that the experts make.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt

from atoll.core.card import Card, Cite
from atoll.diffusion.solvers import Sampler
from atoll.federated.combine.keep_apart import KeepApart
from atoll.federated.local.learn_expert import LearnExpert
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.server.route_experts import RouteExperts
from atoll.federated.share.experts import Experts

CARD = Card(
    name="ddm",
    area="federated method",
    summary="sites train denoisers alone and send them once; a router makes them one generator",
    cites=(
        Cite(
            authors="David McAllister, Matthew Tancik, Jiaming Song, Angjoo Kanazawa",
            year=2025,
            title="Decentralized Diffusion Models",
            arxiv="2501.05450",
            venue="CVPR",
        ),
    ),
    server_sees="each site's denoiser, trained on its rows alone, and its number of rows of each class",
    additive=False,
    suits=("generative models", "few rounds", "sites differ in labels", "sites differ in features"),
)


@method(CARD)
def ddm(
    training: Training = Training(lr=2e-3, optimizer="adam", epochs=20, batch_size=64),
    top_k: Annotated[int, Ge(1)] | None = 1,
    samples: Annotated[int, Ge(1)] = 512,
    sampler: Sampler = Sampler(steps=12),
    steps: Annotated[int, Ge(0)] = 500,
    lr: Annotated[float, Gt(0)] = 1e-3,
    width: Annotated[int, Ge(4)] = 16,
) -> Method:
    """Use ``task: denoising`` and ``rounds: 1``. What is saved is the ensemble, a denoiser as any other, and a
    call of it costs what ``top_k`` experts cost. It can be the teacher of a smaller one.

    Args:
        training: of a site's expert, in a visit.
        top_k: how many experts see a sample; None: all.
        samples: that each expert makes for the router.
        sampler: how it makes them.
        steps: of the router's training, in a merge.
        lr: of the same.
        width: of the router.
    """
    share = Experts(top_k, width)
    return Method(
        share=share,
        local=LearnExpert(training),
        combine=KeepApart(),
        server=RouteExperts(share, samples, sampler, steps, lr=lr),
    )
