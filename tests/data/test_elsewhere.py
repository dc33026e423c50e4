"""Of rows that never come to the server, a picture shows how many there are, and nothing that it would have to invent."""

from __future__ import annotations

from dataclasses import replace

import torch

from atoll.data.dataset import Dataset, Federation, SiteData
from atoll.data.picture import partition_svg


def test_the_picture_of_rows_elsewhere_speaks_of_numbers_alone(digits):
    def rows(n: int) -> Dataset:
        columns = {"x": torch.zeros(1, 1, 1, 1).expand(n, 1, 8, 8), "y": torch.zeros(1, dtype=torch.int64).expand(n)}
        return Dataset(columns, replace(digits.info, class_names=tuple("abcdefghij")))

    sites = tuple(SiteData(rows(n), rows(0), rows(n // 2)) for n in (30, 12))
    here = Federation(sites, rows(0), info=sites[0].train.info)
    there = replace(here, labels={"elsewhere": True, "site_names": ["lyon", "oslo"]})
    drawn = partition_svg(there)
    assert "lyon" in drawn
    assert "42 training rows" in drawn
    for invented in ("Jensen-Shannon", "classes", "<title>lyon, a:"):
        assert invented in partition_svg(replace(here, labels={"site_names": ["lyon", "oslo"]}))
        assert invented not in drawn
