"""FedMGP (Yu et al., 2024, arXiv 2407.00113).

Assumes  a pretrained vision transformer that attends by torch's own function; a small labelled set at the server.
Sees     each site's prompt, its key and its common head; prefixes, their keys and the own head never leave.
Departs  one own head over all classes, of which a task trains its classes' rows: the same numbers as a head per task. A
         row finds its prefix among all classes that the site has met, so nobody is told the task. The surrogate rows
         are the server's own, never test rows, and the selection, which the authors' code leaves out, is done. Fusion
         starts from the mean of the survivors, with a loss that is a mean over rows.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le

from atoll.core.card import Card, Cite
from atoll.data.class_stream import ClassStream
from atoll.federated.combine.keep_apart import KeepApart
from atoll.federated.local.in_sequence import InSequence
from atoll.federated.local.train_prompts import TrainPrompts
from atoll.federated.local.training import Training
from atoll.federated.method import Method, method
from atoll.federated.server.fuse_prompts import FusePrompts
from atoll.federated.share.prompts import Prompts
from atoll.models import prompted

CARD = Card(
    name="fedmgp",
    area="federated method",
    summary="sites whose tasks come in sequence share one fused prompt and keep prefixes for each class",
    cites=(
        Cite(
            authors="Hao Yu, Xin Yang, Xin Gao, Yan Kang, Hao Wang, Junbo Zhang, Tianrui Li",
            year=2024,
            title="Personalized Federated Continual Learning via Multi-granularity Prompt",
            arxiv="2407.00113",
            venue="KDD",
        ),
    ),
    server_sees="each site's prompt and common head",
    additive=False,
    suits=("tasks that arrive in turn", "less traffic", "a model per site", "pretrained models"),
)

TRAINING = Training(lr=1.875e-3, optimizer="adam", weight_decay=1e-3, clip_norm=1.0, epochs=5, batch_size=16)


@method(CARD)
def fedmgp(
    training: Training = TRAINING,
    stream: ClassStream = ClassStream(),
    prompts: prompted.Prompts = prompted.Prompts(),
    pull: Annotated[float, Ge(0)] = 0.1,
    per_class: Annotated[int, Ge(1)] = 20,
    threshold: Annotated[float, Ge(0), Le(1)] = 0.1,
    fusion_steps: Annotated[int, Ge(0)] = 20,
    fusion_lr: Annotated[float, Gt(0)] = 1e-3,
) -> Method:
    """A coarse prompt is trained, fused and shared; class-wise prefixes on top of it are each site's own.

    Args:
        training: of the prompt, and again of the prefixes, in a visit.
        stream: which classes a site sees when.
        prompts: how many tokens, and in which layers.
        pull: weight of the cosines of keys and queries.
        per_class: the server's rows of each class on which prompts are fused.
        threshold: accuracy on them below which a site's prompt is dropped.
        fusion_steps: of Adam at the server, for the prompt and for the head; 0: the mean of the survivors.
        fusion_lr: their size.
    """
    share = Prompts(prompts)
    return Method(
        share=share,
        local=InSequence(TrainPrompts(training, pull), stream),
        combine=KeepApart(),
        server=FusePrompts(share, per_class, threshold, fusion_steps, fusion_lr),
    )
