"""FedPE and FedPG, federated PCA by consensus (Nguyen et al., 2022, arXiv 2212.12121).

Assumes  rows that are normal lie near a subspace of few dimensions; no label.
Sees     each site's subspace, and its number of rows.
Departs  Y starts at 0 and the server's mean is retracted, as the mathematics wants (the authors' code starts Y at Z and
         does not). In FedPG, Y keeps to what moves the span of Z: the rest grows with every retraction and drives sites
         apart. A visit starts at Z. Features are standardised by all sites' rows together, not by each site's own,
         which would hide that sites differ in their means.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt

from atoll.core.card import Card, Cite
from atoll.federated.local.subspace_admm import SubspaceADMM
from atoll.federated.method import Method, method
from atoll.federated.server.apply import Apply
from atoll.federated.server.retract import Retract
from atoll.federated.share.subspace_basis import SubspaceBasis

CARD = Card(
    name="fedpca",
    area="federated method",
    summary="one subspace for all sites' rows, by consensus; what lies off it is an anomaly",
    cites=(
        Cite(
            authors="Tung-Anh Nguyen, Jiayu He, Long Tan Le, Wei Bao, Nguyen H. Tran",
            year=2022,
            title="Federated PCA on Grassmann Manifold for Anomaly Detection in IoT Networks",
            arxiv="2212.12121",
        ),
    ),
    server_sees="each site's subspace and number of rows",
    additive=True,
    suits=("no labels", "less traffic", "sites differ in features"),
)


@method(CARD)
def fedpca(
    variant: Literal["fedpg", "fedpe"] = "fedpg",
    steps: Annotated[int, Ge(1)] = 30,
    lr: Annotated[float, Gt(0)] = 0.01,
    rho: Annotated[float, Ge(0)] = 1.0,
) -> Method:
    """A d x k matrix goes down and up; use `model: {name: subspace, k: 2}` and `task: anomaly_detection`.

    Args:
        variant: ``"fedpg"`` moves on the Grassmann manifold and needs fewer rounds; ``"fedpe"`` in plain space.
        steps: gradient steps in a visit, each with all rows of the site.
        lr: step size. Too large a one grows without bound in ``fedpe``; the paper has 1e-4, for its data.
        rho: weight of the consensus between sites; the more they differ, the more it takes.
    """
    return Method(
        share=SubspaceBasis(),
        local=SubspaceADMM(variant, steps, lr, rho),
        server=Retract() if variant == "fedpg" else Apply(),
    )
