"""A random graph whose nodes have classes: the stochastic block model.

Holland, Laskey, Leinhardt, "Stochastic Blockmodels: First Steps", Social Networks 5, 1983.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt, Le

from atoll.core.errors import DataError
from atoll.core.streams import numpy_stream
from atoll.data.dataset import Dataset, Info
from atoll.data.graph import neighbour_columns
from atoll.data.source import Loaded, Source, standardised, stored


@dataclass(frozen=True)
class StochasticBlocks(Source):
    """Edges depend on the classes of their ends, and features are those of the class plus noise, standardised.

    The test part is another graph of the same law.

    Args:
        nodes: of the graph, and as many of the test graph.
        classes: equally large.
        degree: neighbours of a node, on average.
        homophily: expected share of them that have the node's own class; 1 / classes says nothing, below it neighbours
            tend to differ.
        features: numbers per node.
        noise: standard deviation of each, where class centres are standard normal.
        seed: of all draws.
    """

    nodes: Annotated[int, Ge(2)] = 600
    classes: Annotated[int, Ge(2)] = 4
    degree: Annotated[float, Gt(0)] = 20.0
    homophily: Annotated[float, Ge(0), Le(1)] = 0.8
    features: Annotated[int, Ge(1)] = 8
    noise: Annotated[float, Ge(0)] = 2.0
    seed: int = 0

    def load(self) -> Loaded:
        own, other = self.probabilities()
        if max(own, other) > 1:
            raise DataError(
                f"`stochastic_blocks` cannot give {self.nodes:,} nodes in {self.classes} classes {self.degree:g} "
                f"neighbours each with homophily {self.homophily:g}; lower `degree`, or raise `nodes`."
            )
        centres = numpy_stream(self.seed, "blocks", "centres").standard_normal((self.classes, self.features))
        train, test = (self._graph(part, centres, first) for part, first in (("train", 0), ("test", self.nodes)))
        return standardised(train, test)

    def probabilities(self) -> tuple[float, float]:
        """Of an edge between two nodes of one class, and of two."""
        size = self.nodes / self.classes
        return self.homophily * self.degree / max(size - 1, 1e-9), (1 - self.homophily) * self.degree / (
            self.nodes - size
        )

    def _graph(self, part: str, centres: np.ndarray, first: int) -> Dataset:
        draw, (own, other) = numpy_stream(self.seed, "blocks", part), self.probabilities()
        y = draw.permutation(np.arange(self.nodes) % self.classes)
        x = centres[y] + self.noise * draw.standard_normal((self.nodes, self.features))
        ends = []
        for i in range(1, self.nodes):  # a row of the lower triangle at a time
            chance = np.where(y[:i] == y[i], own, other)
            found = np.flatnonzero(draw.random(i) < chance)
            ends.append(np.stack([np.full(len(found), i), found], 1))
        name = "stochastic blocks"
        info = Info(name=name, kind="graph", shape=(self.features,), num_classes=self.classes)
        columns = {"x": torch.from_numpy(x).float(), "y": torch.from_numpy(y.astype(np.int64))}
        return stored(name, columns | neighbour_columns(np.concatenate(ends), self.nodes, name, first), info)
