"""Federated spectral graph transformer with layers that are ODE steps (Gurumurthy et al., 2025, arXiv 2504.11808).

Assumes  data that is a graph, in which each site knows the edges among its own nodes and no other ones.
Sees     each site's update, in which nothing has the size of its graph.
Departs  a layer's Runge-Kutta steps follow the change that attention and feed-forward make; in the published code the
         change holds the input already, and its third-order branch takes a wrong slope. A node without neighbours has
         eigenvalue 1. Sites use Adam: plain gradient descent at the paper's 0.05 runs away on some random graphs and
         stalls on others. More than 2,000 nodes at a site want ``pairs``.
"""

from __future__ import annotations

from atoll.core.card import Card, Cite
from atoll.federated.combine.weighted_mean import WeightedMean
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.share.spectral_parameters import SpectralParameters
from atoll.models.spectral_transformer import Spectral

CARD = Card(
    name="fed_gnodeformer",
    area="federated method",
    summary="nodes of graphs that are split across owners: a transformer learns filters of each site's own spectrum",
    cites=(
        Cite(
            authors="Kishan Gurumurthy, Himanshu Pal, Charu Sharma",
            year=2025,
            title="Federated Spectral Graph Transformers Meet Neural Ordinary Differential Equations for Non-IID "
            "Graphs",
            arxiv="2504.11808",
            venue="TMLR",
        ),
        Cite(
            authors="Deyu Bo, Chuan Shi, Lele Wang, Renjie Liao",
            year=2023,
            title="Specformer: Spectral Graph Neural Networks Meet Transformers",
            arxiv="2303.01028",
            venue="ICLR",
        ),
    ),
    server_sees="each site's update",
    additive=True,
    suits=("graphs", "sites differ in labels"),
)


@method(CARD)
def fed_gnodeformer(
    training: Training = Training(optimizer="adam", lr=0.005, epochs=3, weight_decay=5e-3),
    spectral: Spectral = Spectral(),
) -> Method:
    """The plain mean of spectral graph transformers, each trained on its site's subgraph.

    The model that you give becomes the encoder of single nodes (one that reads edges works too), and spectral layers
    follow it. A site works out the spectrum of its graph once and keeps it.

    Args:
        training: what a site does in a visit; an epoch is one step on all of its nodes, whatever ``batch_size``.
        spectral: the transformer over eigenvalues.
    """
    return Method(share=SpectralParameters(spectral), local=LocalSGD(training), combine=WeightedMean(by="uniform"))
