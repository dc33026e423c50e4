"""What goes round local work declares all that the inner work declares: a check must not be fooled by a wrapper."""

from __future__ import annotations

import pytest

from atoll.federated.local.in_sequence import InSequence
from atoll.federated.method import LocalWork
from atoll.federated.simulate.attacks import Hostile, SignFlip


class Talkative(LocalWork):
    produces = "letter"
    synchronous_only = True
    tells = True
    data_dependent_size = True
    epsilon = 2.5
    epsilon_of = "word"


@pytest.mark.parametrize(
    "wrapped", [InSequence(Talkative()), Hostile(Talkative(), (0,), SignFlip())], ids=["stream", "attack"]
)
def test_a_wrapper_says_what_the_inner_work_says(wrapped: LocalWork) -> None:
    for name in ("produces", "synchronous_only", "tells", "data_dependent_size", "epsilon", "epsilon_of"):
        assert getattr(wrapped, name) == getattr(Talkative, name)
