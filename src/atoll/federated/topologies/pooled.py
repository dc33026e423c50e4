"""All data in one place: what federation is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from atoll.core.errors import DataError
from atoll.data.dataset import Dataset, Federation, SiteData
from atoll.federated.method import Topology


@dataclass(frozen=True)
class Pooled(Topology):
    """One site that owns every site's rows. A reference for experiments: real sites cannot do this."""

    def arrange(self, federation: Federation) -> Federation:
        sites = federation.sites
        unlabelled = [s.unlabelled for s in sites if s.unlabelled is not None]
        one = SiteData(
            concatenate([s.train for s in sites]),
            concatenate([s.validation for s in sites]),
            concatenate([s.test for s in sites]),
            concatenate(unlabelled) if unlabelled else None,
        )
        return replace(federation, sites=(one,))


def concatenate(parts: Sequence[Dataset]) -> Dataset:
    """The rows of all parts, in their order. Parts that view one storage still do afterwards.

    Raises:
        DataError: when the parts have different columns.
    """
    first = parts[0]
    if any(p.columns.keys() != first.columns.keys() for p in parts):
        raise DataError(f"The sites of `{first.info.name}` have different columns and cannot be pooled.")
    if all(p.columns[name] is column for p in parts for name, column in first.columns.items()):
        rows = [torch.arange(len(p)) if p.rows is None else p.rows for p in parts]
        return replace(first, rows=torch.cat(rows))
    columns = {name: torch.cat([p.column(name) for p in parts]) for name in first.columns}
    return replace(first, columns=columns, rows=None)
