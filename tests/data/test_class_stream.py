"""Tasks in sequence: which classes a site sees when."""

from __future__ import annotations

import torch

from atoll.data.class_stream import ClassStream
from atoll.data.dataset import SiteData


def test_every_class_is_seen_in_one_task_in_the_order_of_the_site(digits_federation):
    stream, site = ClassStream(tasks=3, rounds=2), digits_federation.sites[1]
    groups = stream.groups(site, 1, 0)
    present = torch.unique(site.train.column("y"))
    assert torch.equal(torch.cat(groups).sort().values, present)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    for at in range(8):
        seen = stream.at(site, 1, 0, at)
        now = groups[min(at // 2, 2)]
        for part, whole in ((seen.train, site.train), (seen.test, site.test)):
            y = whole.column("y")
            assert torch.equal(part.column("y"), torch.stack([v for v in y if v in now]))
    orders = {tuple(map(tuple, stream.groups(site, s, 0))) for s in range(6)}
    assert len(orders) > 1, "sites have orders of their own"
    assert all(torch.equal(a, b) for a, b in zip(groups, stream.groups(site, 1, 0), strict=True))


def test_a_site_with_fewer_classes_than_tasks_has_as_many_tasks(digits):
    two = digits.select((digits.column("y") < 2).nonzero().flatten())
    empty = digits.select([])
    groups = ClassStream(tasks=5).groups(SiteData(two, empty, empty), 0, 0)
    assert sorted(int(c) for g in groups for c in g) == [0, 1]
    assert [len(g) for g in groups] == [1, 1]
    nothing = SiteData(empty, empty, empty)
    assert len(ClassStream().at(nothing, 0, 0, 7).train) == 0
