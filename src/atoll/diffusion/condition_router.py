"""Several students as one denoiser, each for its own conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atoll.core.errors import AtollError
from atoll.diffusion.denoiser import Denoiser


class ConditionRouter(nn.Module):
    """``cond [B, ...] -> student [B]``, by a table of classes or by the nearest of K centroids. Its tensors are saved
    with the students, so that both stay of one version.

    Must   total   every condition has a student, also one that nobody asked for while they were made
           one     exactly one, and the same one in training and afterwards

    Args:
        count: of students, K.
        table: student of each class ``[C]``.
        centroids: of embeddings ``[K, D]``.
    """

    table: Tensor | None
    centroids: Tensor | None

    def __init__(self, count: int, *, table: Tensor | None = None, centroids: Tensor | None = None) -> None:
        super().__init__()
        self.count = count
        self.register_buffer("table", table)
        self.register_buffer("centroids", centroids)

    @classmethod
    def of_classes(
        cls, rows: Tensor, classes: int, count: int, shuffle: torch.Generator | None = None
    ) -> ConditionRouter:
        """Blocks of neighbouring class ids, whose sizes differ by one at most. Other ids join their lower neighbour's.

        Args:
            rows: the classes that are asked for.
            classes: how many the model knows.
            shuffle: deal the classes out at random instead, to see what neighbourhood is worth.
        """
        asked = rows.cpu().unique()
        _enough(len(asked), count)
        order = asked if shuffle is None else asked[torch.randperm(len(asked), generator=shuffle)]
        of = torch.zeros(classes, dtype=torch.int64)
        for k, block in enumerate(order.tensor_split(count)):
            of[block] = k
        below = torch.searchsorted(asked, torch.arange(classes), right=True) - 1
        return cls(count, table=of[asked[below.clamp(min=0)]])

    @classmethod
    def of_embeddings(cls, rows: Tensor, count: int, seed: int) -> ConditionRouter:
        """Clusters of the embeddings ``[N, ...]``. They are as balanced as the embeddings are: where the nearest
        centroid decides, sizes cannot be forced."""
        from sklearn.cluster import KMeans

        points = rows.flatten(1).float().cpu()
        _enough(len(points.unique(dim=0)), count)
        found = KMeans(count, n_init=4, random_state=seed % 2**32).fit(points.double().numpy())
        return cls(count, centroids=torch.from_numpy(found.cluster_centers_).float())

    def forward(self, cond: Tensor) -> Tensor:
        if self.table is None:
            assert self.centroids is not None
            return torch.cdist(cond.flatten(1).float(), self.centroids).argmin(1)
        if len(cond) and not 0 <= int(cond.min()) <= int(cond.max()) < len(self.table):
            raise AtollError(f"Students are asked for classes 0 to {len(self.table) - 1}, one of which was not given.")
        return self.table[cond]


def _enough(conditions: int, count: int) -> None:
    if conditions < count:
        raise AtollError(f"{conditions} different conditions cannot be split among {count} students; take fewer.")


def routed(which: Tensor, ask: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Rows ``[B, ...]`` of which each is the answer of one student, ``ask(k, rows)``."""
    rows = [(which == k).nonzero().flatten() for k in range(int(which.max()) + 1)]
    said = torch.cat([ask(k, r) for k, r in enumerate(rows) if len(r)])
    return said[torch.cat(rows).argsort()]


class MultiStudent(nn.Module):
    """Students and their router, used where a :class:`Denoiser` is. Each row goes through one student, once. They are
    sampled without guidance: it is part of what they have learned, and the null condition is nobody's.

    Args:
        students: of one schedule and one kind of condition.
        router: which of them is asked.
    """

    has_null = False

    def __init__(self, students: Sequence[Denoiser], router: ConditionRouter) -> None:
        super().__init__()
        self.students, self.router = nn.ModuleList(students), router
        first = students[0]
        self.schedule, self.classes, self.predicts = first.schedule, first.classes, first.predicts
        self.sigma_data = first.sigma_data

    def null(self, cond: Tensor) -> Tensor:
        raise AtollError("Several students have no null condition in common; sample them without guidance.")

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, **more: Any) -> Tensor:
        t = t.expand(len(x_t))

        def ask(k: int, rows: Tensor) -> Tensor:
            some = {n: v[rows] if isinstance(v, Tensor) and v.dim() else v for n, v in more.items()}
            out: Tensor = self.students[k](x_t[rows], t[rows], cond[rows], **some)
            return out

        return routed(self.router(cond), ask)
