"""Tasks that come one after the other: which rows a site sees in which round.

Every site has its own classes in its own order; a task is a few of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from atoll.core.streams import numpy_stream
from atoll.data.dataset import Dataset, SiteData


@dataclass(frozen=True, kw_only=True)
class ClassStream:
    """A site's classes in random order, cut into equal groups; each group is seen for some rounds, then never again.

    The last group stays. A site with fewer classes than tasks has as many tasks as classes.

    Args:
        tasks: groups.
        rounds: how long each is seen.
    """

    tasks: Annotated[int, Ge(1)] = 4
    rounds: Annotated[int, Ge(1)] = 5

    def groups(self, data: SiteData, site: int, seed: int) -> list[Tensor]:
        """The classes of each task, int64, from the site's training rows."""
        present = torch.unique(data.train.column("y"))
        order = numpy_stream(seed, "class stream", site).permutation(len(present))
        parts = np.array_split(order, min(self.tasks, max(1, len(present))))
        return [present[torch.from_numpy(np.sort(part))] for part in parts]

    def at(self, data: SiteData, site: int, seed: int, round: int) -> SiteData:
        """What the site has in this round: of all three parts, the rows of the task's classes."""
        groups = self.groups(data, site, seed)
        classes = groups[min(round // self.rounds, len(groups) - 1)]
        return SiteData(*(of_classes(part, classes) for part in (data.train, data.validation, data.test)))


def of_classes(rows: Dataset, classes: Tensor) -> Dataset:
    """The rows whose ``y`` is one of the classes."""
    return rows.select(torch.isin(rows.column("y"), classes).nonzero().flatten())
