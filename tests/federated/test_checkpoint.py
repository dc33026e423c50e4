"""What a run saves, it can load: whatever its size and whatever its sites measured."""

from __future__ import annotations

import math

import torch

from atoll.core.message import Limits, Message, decode, encode
from atoll.federated import checkpoint
from atoll.federated.run_state import Flight, RunState
from atoll.federated.states import FileStates
from atoll.federated.visit import Outcome

MANY = Limits().max_tensors + 1


def test_more_tensors_than_a_reply_may_have(tmp_path):
    """A thousand replies in flight of a model with a hundred tensors."""
    many = {str(i): torch.zeros(0) for i in range(MANY)}
    checkpoint.save(RunState(server={"m": many}), tmp_path, {}, durable=False)
    assert len(checkpoint.load(tmp_path)[0].server["m"]) == MANY


def test_a_site_may_keep_as_much(tmp_path):
    states = FileStates(tmp_path)
    states.put(0, "0-0", Message("state", {"m": {str(i): torch.zeros(0) for i in range(MANY)}}))
    assert len(states.get(0, "0-0").parts["m"]) == MANY


def test_what_a_visit_in_flight_has_measured(tmp_path):
    reply = decode(encode(Message("delta", {"delta": {"w": torch.ones(2)}}, {"num_samples": 3})))
    measured = {"loss": math.nan, "gap": -math.inf, "third": 1 / 3, "odd": torch.tensor(2.5)}
    flight = Flight(4, 1, 0, 0.5, 1.5, 10, outcome=Outcome(4, reply, "1-0", metrics=measured), reply=reply)
    checkpoint.save(RunState(flights={4: flight}, cohorts=[(1, 2, True)]), tmp_path, {}, durable=False)
    state, _ = checkpoint.load(tmp_path)
    back = state.flights[4].outcome
    assert back is not None
    assert math.isnan(back.metrics["loss"])
    assert {n: v for n, v in back.metrics.items() if n != "loss"} == {"gap": -math.inf, "third": 1 / 3, "odd": 2.5}
    assert back.message is state.flights[4].reply
    assert state.cohorts == [(1, 2, True)]
