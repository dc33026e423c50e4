"""FedSpeed (Sun et al., 2023, arXiv 2302.10429)."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le

from atoll.core.card import Card, Cite
from atoll.federated.combine.weighted_mean import WeightedMean
from atoll.federated.local.local_sgd import LocalSGD, Plain
from atoll.federated.local.perturbed import Perturbed
from atoll.federated.local.prox_correction import ProxCorrection
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.server.apply import Apply
from atoll.federated.server.apply_with_correction import ApplyWithCorrection

CARD = Card(
    name="fedspeed",
    area="federated method",
    summary="a proximal term without its bias, and uphill-perturbed gradients",
    cites=(
        Cite(
            authors="Yan Sun, Li Shen, Tiansheng Huang, Liang Ding, Dacheng Tao",
            year=2023,
            title="FedSpeed: Larger Local Interval, Less Communication Round, and Higher Generalization Accuracy",
            arxiv="2302.10429",
            venue="ICLR",
        ),
    ),
    server_sees="each site's update",
    additive=True,
    suits=("sites differ in labels", "few rounds"),
)


@method(CARD)
def fedspeed(
    rho: Annotated[float, Ge(0)] = 0.1,
    lam: Annotated[float, Ge(0)] = 0.1,
    alpha: Annotated[float, Ge(0), Le(1)] = 1.0,
    normalised: bool = True,
    mean_over: Literal["all", "active"] = "all",
    training: Training = Training(clip_norm=10.0, weight_decay=1e-3),
) -> Method:
    """Each step follows (1 - alpha) g(x) + alpha g(x + rho g / ||g||) + lam (x - x_t + h_i).

    After the visit h_i += x_K - x_t. It stays at the site and undoes the bias of the proximal term: with
    rho = 0 the fixed point is the optimum of the unpenalised mean objective; with rho > 0 it is that of the
    perturbed one. A step costs two gradients.

    The new weights are the mean of x_K over the active sites plus the mean of h_i. In the paper's algorithm
    the second mean is over the active sites too (they send x_K + h_i); in the authors' code it is over all
    sites, which does not jump with whoever takes part. Both are the same when everybody does.

    Args:
        rho: size of the step uphill; 0 takes plain gradients, one a step.
        lam: weight of the proximal term, 1 / lambda in the paper; 0 has neither the term nor its correction.
        alpha: weight of the uphill gradient.
        normalised: divide the uphill step by the gradient's norm (the authors' code; the paper does not).
        mean_over: whose h_i enter the new weights: ``"all"`` (the authors' code) or ``"active"`` (the paper).
        training: what a site does in a visit. Weight decay is separate from the proximal term.
    """
    gradient = Perturbed(rho, alpha, normalised) if rho and alpha else Plain()
    correction = ProxCorrection(lam, send_h=mean_over == "active") if lam else None
    return Method(
        local=LocalSGD(training, gradient, correction),
        combine=WeightedMean(by="uniform"),
        server=ApplyWithCorrection() if correction and mean_over == "all" else Apply(),
    )
