"""How much sites forget of earlier tasks while they learn later ones.

Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018, arXiv 1801.10112.
"""

from __future__ import annotations

from collections.abc import Sequence

from atoll.data.class_stream import ClassStream, of_classes
from atoll.federated.engine import Engine


def by_task(engine: Engine, stream: ClassStream) -> dict[int, list[float]]:
    """The task's headline for each site's own model on its own test rows of each task; NaN where it has none."""
    setup, worker, out = engine.setup, engine.workers.local, {}
    for info in engine.sites:
        site, data = info.site, setup.federation.sites[info.site]
        at, _ = worker.place(site, engine.state.tags.get(site))
        at.model.eval()
        parts = [of_classes(data.test, classes) for classes in stream.groups(data, site, setup.seed)]
        scores = [setup.task.evaluate(at.model, rows) if len(rows) else {} for rows in parts]
        out[site] = [score.get(setup.task.headline, float("nan")) for score in scores]
    return out


def forgetting(history: Sequence[Sequence[float]]) -> float:
    """Mean over all tasks but the last of: best score so far minus the last one; 0 with a single task.

    Args:
        history: of one site, for each moment the score (higher is better) of each task; from the end of the first task
            to the end of the last, one moment a task.
    """
    tasks = range(len(history[-1]) - 1)
    lost = [max(moment[t] for moment in history[t:]) - history[-1][t] for t in tasks]
    return sum(lost) / len(lost) if lost else 0.0
