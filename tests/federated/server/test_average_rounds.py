"""A running average of the rounds: what the run ends with, beside what sites go on from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.core.errors import AtollError
from atoll.core.message import Message
from atoll.core.tree import Parts, clone, equal
from atoll.federated.checkpoint import load, save
from atoll.federated.engine import Engine
from atoll.federated.method import Broadcast, MergeContext
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.server.average_rounds import AverageRounds

Weights = dict[str, Tensor]


@settings(max_examples=30, deadline=None)
@given(decay=st.floats(0.01, 0.99), lr=st.floats(0.1, 2), rounds=st.integers(1, 12))
def test_it_is_the_running_average(decay: float, lr: float, rounds: int) -> None:
    """In double precision; the first round has nothing but itself to average."""
    server, g = AverageRounds(decay, lr), torch.Generator().manual_seed(rounds)
    replica = {"weights": {"w": torch.randn(5, generator=g, dtype=torch.float64)}}
    state, by_hand = server.init(replica), torch.zeros(5, dtype=torch.float64)
    assert server.result(replica, state) is replica
    for r in range(rounds):
        delta = torch.randn(5, generator=g, dtype=torch.float64)
        before, kept = clone(replica["weights"]), clone(state.get("average", {}))
        context = MergeContext(r, replica, 2, 0, None, None)
        broadcast, after = server.step(replica, state, Message("delta", {"delta": {"w": delta}}), context)
        assert equal(before, replica["weights"])  # checkpoints still refer to them
        assert equal(kept, state.get("average", {}))
        replica, state = {"weights": broadcast.common.parts["weights"]}, after
        assert torch.allclose(replica["weights"]["w"], before["w"] + lr * delta)
        share = min(decay, r / (r + 3))
        by_hand = share * by_hand + (1 - share) * replica["weights"]["w"]
    assert torch.allclose(server.result(replica, state)["weights"]["w"], by_hand)


def test_the_run_ends_with_it(run: Callable[..., Any]) -> None:
    """Sites go on from the present weights; metrics are the average's; at the end everybody holds the average."""
    seen: list[Weights] = []

    def look(engine: Engine, _: Any) -> None:
        seen.append(clone(engine.state.replica["weights"]))

    plain = run(fedavg(), rounds=4, on_merge=look)
    there, seen = seen, []
    rows = run(fedavg().but(server=AverageRounds(0.5)), rounds=4, on_merge=look)
    assert all(equal(a, b) for a, b in zip(there, seen, strict=True))  # on the way nothing is different
    assert [r.down_bytes for r in rows] == [r.down_bytes for r in plain]
    state = rows[-1].engine.state
    assert equal(state.replica["weights"], state.server["average"])
    assert not equal(there[-1], state.replica["weights"])
    assert rows[-1].metrics == rows[-1].engine.evaluate_global() != plain[-1].metrics
    assert all(m for m in rows[-1].engine.evaluate_sites("common").values())
    assert {m["accuracy"] for m in rows[-1].engine.evaluate_sites("common").values()} == {rows[-1].metrics["accuracy"]}


@dataclass(frozen=True)
class Fails(AverageRounds):
    rounds: tuple[int, ...] = ()

    def step(self, replica: Parts, state: Parts, combined: Message, context: MergeContext) -> tuple[Broadcast, Parts]:
        if context.round in self.rounds:
            raise AtollError("no")
        return super().step(replica, state, combined, context)


def test_a_last_round_that_fails_still_ends_with_it(run: Callable[..., Any]) -> None:
    rows = run(fedavg().but(server=Fails(0.5, rounds=(2,))), rounds=3)
    assert rows[-1].notes == ["merge skipped: no"]
    state = rows[-1].engine.state
    assert equal(state.replica["weights"], state.server["average"])


def test_weights_that_nobody_trained_have_no_share(run: Callable[..., Any]) -> None:
    """Also where the first merges fail: the only merge is the average."""
    seen: list[Weights] = []
    method = fedavg().but(server=Fails(0.9, rounds=(0, 1)))
    rows = run(method, rounds=3, on_merge=lambda e, _: seen.append(clone(e.state.replica["weights"])))
    after = rows[-1].engine.state.replica["weights"]
    assert not equal(seen[-2], seen[-1])
    assert all(torch.allclose(after[n], t, atol=1e-6) for n, t in seen[-1].items())


def test_it_survives_a_checkpoint(run: Callable[..., Any], tmp_path: Path) -> None:
    rows = run(fedavg().but(server=AverageRounds(0.9)), rounds=2)
    save(rows[-1].engine.state, tmp_path, {})
    state, _ = load(tmp_path)
    assert equal(state.server["average"], rows[-1].engine.state.server["average"])
