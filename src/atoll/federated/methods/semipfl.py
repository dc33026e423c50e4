"""SemiPFL (Tashakori et al., 2022, arXiv 2203.08176).

Assumes  the server owns labelled rows of the same kind as the sites' (``public``), with the same classes.
Sees     each site's autoencoder, trained on its inputs; never a label of a site, nor what it makes of the heads.
Departs  generated weights are added to an autoencoder that all agree on, all sites start from one embedding, and the
         hypernetwork's last layer has a low rank: a full one would have 100 numbers for each weight of an autoencoder.
         A site's heads go on from where they were at its last merge, one for each of the server's subjects. A shard
         with few rows like a site's gives its best ones. At a site the heads' statistics stay the server's.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt

from atoll.core.card import Card, Cite
from atoll.federated.combine.keep_apart import KeepApart
from atoll.federated.local.reconstruct import Reconstruct
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.server.hyper_server import HyperServer
from atoll.federated.share.generated_autoencoder import GeneratedAutoencoder

CARD = Card(
    name="semipfl",
    area="federated method",
    summary="a code learned without labels at each site, and heads that the server trains on it with its own",
    cites=(
        Cite(
            authors="Arvin Tashakori, Wenwen Zhang, Z. Jane Wang, Peyman Servati",
            year=2023,
            title="SemiPFL: Personalized Semi-Supervised Federated Learning Framework for Edge Intelligence",
            arxiv="2203.08176",
            venue="IEEE Internet of Things Journal",
        ),
        Cite(
            authors="Aviv Shamsian, Aviv Navon, Ethan Fetaya, Gal Chechik",
            year=2021,
            title="Personalized Federated Learning using Hypernetworks",
            arxiv="2103.04628",
            venue="ICML",
        ),
    ),
    server_sees="each site's autoencoder, which was trained on its inputs",
    additive=False,
    needs_public_data=True,
    suits=("no labels", "a model per site", "sites differ in features"),
)

ADAM = Training(lr=1e-3, optimizer="adam", epochs=5, batch_size=16)


@method(CARD)
def semipfl(
    training: Training = ADAM,
    heads: Annotated[int, Ge(1)] = 4,
    subjects: str | None = None,
    similar: Annotated[float, Gt(0)] = 0.05,
    head_training: Training = Training(lr=5e-3, optimizer="adam", epochs=5, batch_size=16),
    adapting: Training = ADAM,
    server_lr: Annotated[float, Gt(0)] = 3e-3,
    rank: Annotated[int, Ge(1)] = 16,
) -> Method:
    """Sites learn a code from inputs alone, labelled or not; the server learns what codes mean from its own labels.

    The encoder is the network of the recipe without its last linear layer, the decoder its mirror. In each visit a site
    first completes its own model, with the heads that the server trained on the autoencoder that it sent last; then it
    trains the autoencoder that came. So it can predict from its second visit on, without a single label of its own.
    The server holds an autoencoder and heads for each site.

    Args:
        training: of the autoencoder, in a visit.
        heads: how many base heads the server trains for a site.
        subjects: column of the server's rows that says whose they are: each head learns from one (several subjects
            share a head when there are more); None: rows are shared out at random.
        similar: a row of the server is like a site's when its reconstruction has a mean squared error below this, on a
            scale from -1 to 1.
        head_training: of the heads, at the server in a merge.
        adapting: of heads and their weights, at a site on its labels.
        server_lr: step size of the hypernetwork.
        rank: of the hypernetwork's last layer.
    """
    return Method(
        share=GeneratedAutoencoder(heads),
        local=Reconstruct(training, adapting),
        combine=KeepApart(),
        server=HyperServer(
            heads=heads, subjects=subjects, similar=similar, training=head_training, lr=server_lr, rank=rank
        ),
    )
