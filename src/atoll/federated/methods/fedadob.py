"""FedAdOb, passport-based adaptive obfuscation (Gu et al., 2024, arXiv 2406.01085); the horizontal setting.

Assumes  a server (or a listener) that tries to rebuild a site's rows from its update, and has no access to the site.
Sees     each site's update of all weights, E and D included; not the passports, without which it cannot run the model.
Departs  the norm after a guarded layer keeps its statistics at the site. In evaluation the scales and shifts of all
         passports are averaged. Means of channels are drawn once for each site, of either sign: with negative ones
         alone, as in the paper, a stranger's passports do nearly as well.
Mind     this is obfuscation and no guarantee. A stranger's passports cost accuracy on average, and some draws cost
         nearly none. ``privacy/gradient_inversion.py`` fares about as badly with the right passports as without: what
         stops it at small batches is the normalisation, which a better attack may pass. The secret of an input with
         one channel is small. For a bound add noise (``gaussian_noise``), against the server ``secure_sum``.

The vertical setting, in which two parties hold different columns, is simulated in ``simulate/vertical.py``.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Le

from atoll.core.card import Card, Cite
from atoll.federated.local.draw_passports import DrawPassports
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.share.passport_parameters import PassportParameters

CARD = Card(
    name="fedadob",
    area="federated method",
    summary="secret passports at each site scale and shift the first layers, which makes gradients hard to invert",
    cites=(
        Cite(
            authors="Hanlin Gu, Jiahuan Luo, Yan Kang, Yuan Yao, Gongxi Zhu, Bowen Li, Lixin Fan, Qiang Yang",
            year=2024,
            title="FedAdOb: Privacy-Preserving Federated Deep Learning with Adaptive Obfuscation",
            arxiv="2406.01085",
        ),
    ),
    server_sees="each site's update and number of examples, of a model that it cannot run without the site's passports",
    additive=True,
    threat_model="a curious server without the passports; obfuscation, no bound on what it may learn",
    suits=("a model per site", "hiding updates from the server"),
)


@method(CARD)
def fedadob(
    training: Training = Training(),
    layers: Annotated[int, Ge(1)] = 1,
    passports: Annotated[int, Ge(1), Le(4096)] = 64,
    reach: Annotated[int, Ge(1), Le(100)] = 5,
    decay: Annotated[float, Ge(0)] = 1e-3,
    test_seed: int | None = None,
    allow_insecure_test_seed: bool = False,
) -> Method:
    """FedAvg of a network whose first layers are scaled and shifted by what the site's secret passports yield.

    Weights and the networks that read passports train together, so accuracy adapts to the obfuscation. The server
    cannot evaluate; sites do.

    Args:
        training: what a site does in a visit.
        layers: how many of the first linear and convolutional layers are guarded.
        passports: in each layer; one is drawn for every forward pass in training.
        reach: means of a passport's channels are whole numbers from -reach to reach, but 0; far means saturate.
        decay: weight decay of the network that makes scales and shifts.
        test_seed: INSECURE. Passports from a seed that can be known; see :class:`DrawPassports`.
        allow_insecure_test_seed: must be True for ``test_seed``.
    """
    draw = DrawPassports(reach, decay, test_seed, allow_insecure_test_seed)
    return Method(share=PassportParameters(layers, passports), local=LocalSGD(training, correction=draw))
