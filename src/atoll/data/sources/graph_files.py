"""A graph of your own: a table of nodes and a list of edges, in files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Lt

from atoll.core.errors import DataError, did_you_mean
from atoll.core.streams import numpy_stream
from atoll.data.columns import MISSING, Columns, apply, learn
from atoll.data.graph import Ints, neighbour_columns, with_labels_of
from atoll.data.source import Loaded, Source, standardised
from atoll.data.sources.table import read_columns


@dataclass(frozen=True)
class GraphFiles(Source):
    """One row a node. Features are standardised by mean and deviation of the sites' rows.

    Edges have no direction; loops and repeated edges are left out and counted. The common test part is the whole graph,
    with the labels of the nodes that were held out and belong to no site.

    Args:
        path: the nodes: ``.csv``, ``.tsv``, ``.parquet``, ``.jsonl`` or ``.ndjson``.
        edges: the edges, in one of these formats: two columns with the names of nodes.
        target: column of the node's class; an empty cell is a node without label.
        node: column of the node's name.
        ends: the two columns of ``edges``.
        features: columns to predict from; default: every numeric column but name, target and site.
        site: a column that names each node's natural owner; kept as column ``site``.
        categorical: text in a named feature: one column per value, or an error.
        held_out: fraction of the nodes that no site has.
        seed: of the draw of these.
    """

    path: str
    edges: str
    target: str
    node: str = "node"
    ends: tuple[str, str] = ("source", "target")
    features: tuple[str, ...] | None = None
    site: str | None = None
    categorical: Literal["one_hot", "refuse"] = "refuse"
    held_out: Annotated[float, Ge(0), Lt(1)] = 0.1
    seed: int = 0

    def load(self) -> Loaded:
        where, table = Path(self.path).name, read_columns(self.path)
        for wanted in (self.node, self.target):
            if wanted not in table:
                raise DataError(f"{where} has no column `{wanted}`." + did_you_mean(wanted, table))
        names = [_name(v) for v in table[self.node]]
        ends, left_out = self._edges(names, where)
        unlabelled = np.array([_name(v).lower() in MISSING for v in table[self.target]])
        if unlabelled.all():
            raise DataError(f"Column `{self.target}` of {where} is empty; give at least some nodes a label.")
        data = self._nodes(table, unlabelled, where)
        y = data.columns["y"].clone()
        y[np.flatnonzero(unlabelled)] = -1
        columns = {**data.columns, "y": y, **neighbour_columns(ends, len(names), data.info.name)}
        skipped = {**data.info.skipped, **({"edge to itself or a second time": left_out} if left_out else {})}
        data = replace(data, columns=columns, info=replace(data.info, kind="graph", skipped=skipped))
        order = numpy_stream(self.seed, "held out").permutation(len(names))
        cut = round(self.held_out * len(names))
        test = with_labels_of(data, np.arange(len(names)), np.sort(order[:cut]))
        return standardised(with_labels_of(data, np.sort(order[cut:]), np.sort(order[cut:])), test)

    def _nodes(self, table: Columns, unlabelled: np.ndarray, where: str) -> Any:
        """The table without the names of nodes; a node without label gets any, for now."""
        some = table[self.target][int(np.argmin(unlabelled))]
        target = [some if empty else v for v, empty in zip(table[self.target], unlabelled, strict=True)]
        rest = {c: v for c, v in table.items() if c != self.node or c in (self.features or ())} | {self.target: target}
        schema = learn(
            rest, name=Path(self.path).stem, target=self.target, features=self.features, site=self.site,
            task="classification", categorical=self.categorical, missing="refuse",
        )  # fmt: skip
        return apply(schema, rest, where)

    def _edges(self, names: list[str], where: str) -> tuple[Ints, int]:
        """Positions of both ends ``[E, 2]``, and how many of the edges say nothing new."""
        position = {name: i for i, name in enumerate(names)}
        if len(position) < len(names):
            twice = next(n for i, n in enumerate(names) if position[n] != i)
            raise DataError(f"Column `{self.node}` of {where} names the node {twice!r} twice; a node has one row.")
        listed, edges = Path(self.edges).name, read_columns(self.edges)
        for wanted in self.ends:
            if wanted not in edges:
                raise DataError(f"{listed} has no column `{wanted}`." + did_you_mean(wanted, edges))
        both = [[_name(v) for v in edges[end]] for end in self.ends]
        for row, pair in enumerate(zip(*both, strict=True), 1):
            for name in pair:
                if name not in position:
                    raise DataError(f"Edge {row} of {listed} names node {name[:40]!r}, which {where} does not have.")
        ends = np.array([[position[n] for n in side] for side in both], dtype=np.int64).T
        a, b = ends.min(1), ends.max(1)
        return ends, len(ends) - len(np.unique((a * len(names) + b)[a != b]))


def _name(value: object) -> str:
    """3, 3.0 and "3" are one node: files differ in how they type a number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()
