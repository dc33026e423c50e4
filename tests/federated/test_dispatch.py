"""The server's end of visits as messages: a site gets what it lacks, no less and no more."""

from __future__ import annotations

import pytest
import torch

from atoll.core.errors import SiteFailed
from atoll.core.message import Message
from atoll.federated.dispatch import Dispatch
from atoll.federated.method import Share
from atoll.federated.visit import Job, Outcome, Publication
from atoll.federated.wire import LACKS, hexed, pack_outcome, unpack


class Sum(Share):
    """The replica is the sum of all broadcasts."""

    incremental = True


class Last(Share):
    """The replica is the last broadcast."""


def weights(value: float, size: int = 100) -> Message:
    return Message("weights", {"weights": {"w": torch.full((size,), value)}})


def published(*values: float, first: int = 0, share: Share | None = None, size: int = 1) -> Dispatch:
    dispatch, replica = Dispatch(share or Sum(), "run"), torch.zeros(100)
    for i, value in enumerate(values):
        replica = replica + value
        dispatch.publish(Publication(first + i, {"weights": {"w": replica}}, weights(value, size)))
    return dispatch


def sent(dispatch: Dispatch, job: Job, **options) -> list[tuple[int, int, bool]]:
    return [(d.round, d.after, d.snapshot) for d in unpack(dispatch.request(job, **options)).deliveries]


def test_exactly_the_missing_broadcasts():
    dispatch = published(1, 2, 3)
    assert sent(dispatch, Job(0, 2, missing=(1, 2))) == [(1, 0, False), (2, 1, False)]
    assert sent(dispatch, Job(0, 2, missing=())) == []
    assert sent(dispatch, Job(0, 2, missing=None)) == [(2, -1, True)]
    assert sent(dispatch, Job(0, 2, missing=(1, 2)), lacking=True) == [(2, -1, True)]


def test_what_is_dearer_than_a_snapshot_is_not_kept():
    dispatch = published(1, 2, 3, size=60)  # two broadcasts are more than the replica of 100
    assert sent(dispatch, Job(0, 2, missing=(2,))) == [(2, 1, False)]
    assert sent(dispatch, Job(0, 2, missing=(1, 2))) == [(2, -1, True)]


def test_after_a_resume_nothing_builds_on_the_unknown():
    dispatch = published(1, 2, first=7)
    assert sent(dispatch, Job(0, 8, missing=(7, 8))) == [(8, -1, True)]
    assert sent(dispatch, Job(0, 8, missing=(8,))) == [(8, 7, False)]


def test_a_share_that_needs_no_history_gets_the_last_broadcast():
    dispatch = published(1, 2, 3, share=Last())
    assert sent(dispatch, Job(0, 2, missing=(2,))) == [(2, 1, False)]
    assert sent(dispatch, Job(0, 2, message=weights(9), missing=())) == [], "its own content comes instead"
    assert sent(dispatch, Job(0, 0), part="test") == [(2, 1, False)]


def test_an_evaluation_brings_what_the_site_has_not_confirmed():
    dispatch = published(1, 2, 3)
    assert sent(dispatch, Job(4, 0), part="test") == [(0, -1, False), (1, 0, False), (2, 1, False)]
    job = Job(4, 2)
    assert dispatch.outcome(pack_outcome(Outcome(4, weights(1)), job, "run"), job).error == ""
    assert sent(dispatch, Job(4, 0), part="test") == []
    dispatch.publish(Publication(3, {"weights": {"w": torch.zeros(100)}}, weights(0, 1)))
    assert sent(dispatch, Job(4, 0), part="test") == [(3, 2, False)]


def test_answers_that_are_none():
    dispatch, job = published(1), Job(0, 0)
    assert dispatch.outcome("no answer", job).error == "no answer"
    late = pack_outcome(Outcome(0, weights(1)), Job(0, 5), "run")
    assert "belongs to another visit" in dispatch.outcome(late, job).error
    assert dispatch.lacks(Message(LACKS))
    assert dispatch.metrics(Message("metrics", {}, {"run": "run", "site": 0, "metrics": hexed({"a": 0.5})}), job) == {
        "a": 0.5
    }
    for odd in ({"a": "x"}, {"a": 1.0}, [], None):
        with pytest.raises(SiteFailed, match="could not be evaluated"):
            dispatch.metrics(Message("metrics", {}, {"run": "run", "site": 0, "metrics": odd}), job)
    with pytest.raises(SiteFailed, match="expected the site's metrics"):
        dispatch.metrics(Message("metrics", {}, {"run": "other", "site": 0, "metrics": {}}), job)
