"""An engine made from a saved state hands out what its predecessor handed out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from atoll.core.message import Message
from atoll.core.tree import equal
from atoll.federated.backends.inline import Inline
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.engine import Engine
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.method import DeviceProfile, LocalWork, Method
from atoll.federated.server.apply import Apply
from atoll.federated.share.parameters import Parameters
from atoll.federated.visit import Setup


@dataclass(frozen=True)
class OnceOnly(LocalWork):
    """Fails from the second round on: no new broadcast is made."""

    inner: LocalSGD = field(default_factory=LocalSGD)

    def run(self, visit):
        if visit.round:
            raise RuntimeError("no power")
        return self.inner.run(visit)


@pytest.mark.parametrize("merges", [0, 1, 3])
def test_the_broadcast_has_the_same_bits_however_long_ago_it_was_made(digits_task, digits_federation, merges):
    method = Method(local=OnceOnly(), downlink=(Quantise(bits=4),))
    setup = Setup(task=digits_task, federation=digits_federation, method=method, profiles=(DeviceProfile(),) * 5, seed=0)  # fmt: skip
    before = Engine(setup, Inline().open(setup))
    for _ in range(merges):
        before.step()
    after = Engine(setup, Inline().open(setup), before.state)
    assert equal(before.broadcasts.common.parts["weights"], after.broadcasts.common.parts["weights"])
    assert equal(after.broadcasts.common.parts["weights"], after.state.site_replica["weights"])
    assert before.broadcasts.bytes == after.broadcasts.bytes


@dataclass(frozen=True)
class Broken(Parameters):
    """Cannot make its first replica."""

    def initial(self, model):
        raise RuntimeError("no such layer")


def test_workers_are_closed_when_the_engine_cannot_start(run):
    closed = []

    class Watched(Inline):
        def open(self, setup):
            workers = super().open(setup)
            workers.close = lambda: closed.append(True)
            return workers

    with pytest.raises(RuntimeError, match="no such layer"):
        run(Method(share=Broken()), backend=Watched())
    assert closed == [True]


@dataclass(frozen=True)
class ColumnMajor(Apply):
    """Gives the same numbers in another layout, as a decomposition does."""

    def step(self, replica, state, combined, context):
        broadcast, state = super().step(replica, state, combined, context)
        weights = {n: t.mT.contiguous().mT if t.dim() == 2 else t for n, t in broadcast.common.parts["weights"].items()}
        return replace(broadcast, common=Message("weights", {"weights": weights})), {"kept": weights}


def test_what_a_server_makes_has_the_layout_that_a_file_gives_back(run):
    """Kernels round by the layout too: a run from a checkpoint must not differ in the last bit."""
    state = run(Method(server=ColumnMajor()), rounds=2)[-1].engine.state
    for tree in (state.replica["weights"], state.server["kept"]):
        assert all(t.is_contiguous() for t in tree.values())
