"""FedLEx: what scouts report, what the guide is, what it does to a step, and when each happens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from atoll.core.errors import RecipeError
from atoll.core.message import encoded_size
from atoll.core.tree import equal
from atoll.federated import checkpoint
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.codecs.top_k import TopK
from atoll.federated.knowledge.guidance import guidance
from atoll.federated.local.loss_exploration import Scouting
from atoll.federated.local.training import Training
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.fedlex import fedlex
from atoll.federated.methods.fedprox import fedprox
from atoll.federated.schedules.buffered import Buffered
from atoll.federated.secure.secure_sum import SecureSum
from atoll.federated.server.adaptive import Adaptive
from atoll.federated.share.explored import TRAIN, phase
from atoll.federated.visit import Job
from atoll.models.user import User
from atoll.recipes.recipe import read_recipe
from atoll.tasks.classification import Classification

BRIEF = Scouting(epochs=3, patience=2)
T = Training(lr=0.1, batch_size=64)


# ------------------------------------------------------------------------------------------ the guide


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.floats(1e-30, 1e30), st.floats(0, 1))
def test_the_guide_is_0_for_the_least_and_1_for_the_most(seed, size, floor):
    v = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed)).square() * size + floor * size
    g = guidance(v)
    assert (float(g.min()), float(g.max())) == (0.0, 1.0)
    assert torch.equal(g.flatten().argsort(), v.flatten().argsort())
    middle = (v[1, 1].double() - v.min().double()) / (v.max().double() - v.min().double())
    assert float(g[1, 1]) == pytest.approx(float(middle), abs=1e-5)


@pytest.mark.parametrize("v", [torch.zeros(3), torch.full((2, 2), 7.0), torch.tensor([4.0]), torch.empty(0)])
def test_what_drifted_evenly_is_not_guided(v):
    for scale in ("min_max", "mean"):
        assert torch.equal(guidance(v, scale), torch.ones_like(v))


def test_over_its_mean_the_guide_keeps_the_length_of_a_step():
    g = guidance(torch.rand(1000, generator=torch.Generator().manual_seed(0)), "mean")
    assert float(g.mean()) == pytest.approx(1.0, abs=1e-3)
    outlier = guidance(torch.tensor([0.0, *[0.01] * 99, 1.0]), "mean")
    assert float(outlier.max()) == 5.0


def test_tensors_are_guided_apart_and_buffers_are_not(run, digits):  # type: ignore[no-untyped-def]
    net = User(
        lambda info, outputs: nn.Sequential(
            nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs)
        )
    )
    method = fedlex(scouts=1.0, scouting=BRIEF, training=T)
    rows = run(method, rounds=3, task=Classification(digits.info, net))
    guide = rows[-1].engine.state.replica["guide"]
    assert set(guide) == {"1.weight", "1.bias", "2.weight", "2.bias", "4.weight", "4.bias"}
    assert all((float(g.min()), float(g.max())) == (0.0, 1.0) for g in guide.values())


# ------------------------------------------------------------------------------------------- scouts


def test_the_guide_is_made_of_the_mean_squared_drift_of_scouts_that_trained_alone(run, digits_federation):
    """Full batches, so that a scout's way can be walked again here; each from the same base model."""
    whole = Training(lr=0.1, batch_size=1000)
    rows = run(fedlex(scouts=1.0, scouting=BRIEF, training=whole), rounds=1)
    base = {n: t.clone() for n, t in rows[-1].engine.state.replica["weights"].items()}
    rows = run(fedlex(scouts=1.0, scouting=BRIEF, training=whole), rounds=2)
    total, sizes = dict.fromkeys(base, 0.0), [len(s.train) for s in digits_federation.sites]
    for site in digits_federation.sites:
        batch = site.train.ready()
        w = [base[n].clone().requires_grad_() for n in base]
        for _ in range(3):
            hidden = (batch["x"].flatten(1) @ w[0].T + w[1]).relu()
            loss = nn.functional.cross_entropy(hidden @ w[2].T + w[3], batch["y"])
            w = [(p - 0.1 * g).detach().requires_grad_() for p, g in zip(w, torch.autograd.grad(loss, w), strict=True)]
        for n, p in zip(base, w, strict=True):
            total[n] = total[n] + len(site.train) / sum(sizes) * (p.detach() - base[n]) ** 2
    for name, g in rows[-1].engine.state.replica["guide"].items():
        v = total[name]
        assert torch.allclose(g.float(), (v - v.min()) / (v.max() - v.min()), atol=2e-3), name


@dataclass(frozen=True)
class Flat(Classification):
    """Nothing to learn: every loss is 1."""

    def loss(self, model, batch):  # type: ignore[no-untyped-def]
        return 0 * self.predict(model, batch).sum(1) + 1

    mean_loss = lambda self, model, batch: self.loss(model, batch).mean()  # noqa: E731


def test_a_scout_stops_when_its_loss_stalls_and_no_later_than_it_may(run, digits_task, digits_federation):
    flat = Flat(digits_task.info, digits_task.network)
    for scouting, epochs in ((Scouting(epochs=20, patience=4), 5), (Scouting(epochs=3, patience=4), 3)):
        method = fedlex(scouts=1.0, scouting=scouting, training=T)
        stalled = run(method, rounds=2, task=flat)[-1]
        passes = run(fedavg(T), rounds=1, task=flat)[0].flops  # one epoch
        assert stalled.flops == {site: epochs * flops for site, flops in passes.items()}
    learning = run(fedlex(scouts=1.0, scouting=Scouting(epochs=8, patience=1), training=T), rounds=2)[-1]
    once = run(fedavg(T), rounds=1)[0].flops
    assert learning.flops == {site: 8 * flops for site, flops in once.items()}


def test_scouts_do_not_see_each_other(run):  # type: ignore[no-untyped-def]
    engine = run(fedlex(scouts=1.0, scouting=BRIEF, training=T), rounds=1)[-1].engine
    worker = engine.workers.local
    alone = worker.run(Job(3, 1)).message.parts["drift"]
    alone = {n: t.clone() for n, t in alone.items()}
    worker.run(Job(0, 1))
    assert equal(worker.run(Job(3, 1)).message.parts["drift"], alone)


def test_only_squares_leave_and_they_look_like_the_weights(run):  # type: ignore[no-untyped-def]
    engine = run(fedlex(scouts=1.0, scouting=BRIEF, training=T), rounds=1)[-1].engine
    reply = engine.workers.local.run(Job(0, 1)).message
    assert reply.parts.keys() == {"drift"}
    weights = engine.state.replica["weights"]
    assert {n: t.shape for n, t in reply.parts["drift"].items()} == {n: t.shape for n, t in weights.items()}
    assert all(float(t.min()) >= 0 for t in reply.parts["drift"].values())


# ------------------------------------------------------------------------------------------- rounds


def test_the_exploring_round_asks_scouts_alone_and_moves_no_weight(run):  # type: ignore[no-untyped-def]
    replicas = []
    method = fedlex(scouts=0.4, scouting=BRIEF, training=T, warm_up=2)
    rows = run(method, rounds=5, on_merge=lambda e, _: replicas.append(e.state.replica))
    assert [row.replies for row in rows] == [5, 5, 2, 5, 5]
    assert equal(replicas[2]["weights"], replicas[1]["weights"])
    assert "guide" not in replicas[1]
    assert equal(replicas[2]["guide"], replicas[4]["guide"])
    assert not equal(replicas[3]["weights"], replicas[2]["weights"])


def test_the_guide_travels_once_in_two_bytes_a_parameter(run):  # type: ignore[no-untyped-def]
    rows = run(fedlex(scouts=1.0, scouting=BRIEF, training=T), rounds=4)
    replica = rows[-1].engine.state.replica
    numel = sum(t.numel() for t in replica["weights"].values())
    header = 600
    assert all(2 * numel < size < 2 * numel + header for size in rows[2].down_bytes.values())
    assert all(4 * numel < size < 4 * numel + header for size in rows[3].down_bytes.values())


def test_when_the_scouts_fail_others_explore(run, digits_federation):  # type: ignore[no-untyped-def]
    def break_scouts(engine, row):  # type: ignore[no-untyped-def]
        if row.round == 0:
            (scout,) = engine.state.broadcast.asks
            engine.setup.federation.sites[scout].train.columns["x"] = None

    world = replace(digits_federation, sites=tuple(
        replace(s, train=replace(s.train, columns=dict(s.train.columns))) for s in digits_federation.sites
    ))  # fmt: skip
    rows = run(fedlex(scouting=BRIEF, training=T), rounds=4, federation=world, on_merge=break_scouts, evaluate_every=0)
    assert [row.replies for row in rows] == [5, 0, 4, 4]
    assert "guide" in rows[-1].engine.state.replica


def test_a_checkpoint_remembers_who_was_asked(run, tmp_path):  # type: ignore[no-untyped-def]
    state = run(fedlex(scouts=0.4, scouting=BRIEF, training=T), rounds=1)[-1].engine.state
    checkpoint.save(state, tmp_path, {})
    assert checkpoint.load(tmp_path)[0].broadcast.asks == state.broadcast.asks
    assert len(state.broadcast.asks) == 2


# ------------------------------------------------------------------------------------------- guided steps


def visit_with(run, method, guide):  # type: ignore[no-untyped-def]
    """A site's update from the initial weights, with ``guide(name, shape)`` for a guide."""
    engine = run(method, rounds=1, evaluate_every=0)[-1].engine
    worker = engine.workers.local
    weights = method.share.initial(worker.setup.task.model(0))["weights"]
    found = {n: guide(n, t.shape) for n, t in weights.items()}
    worker.publish({"weights": weights, "guide": found, **phase(TRAIN)})
    return {n: t.clone() for n, t in worker.run(Job(1, 5)).message.parts["delta"].items()}


@pytest.mark.parametrize(
    "training",
    [T, replace(T, momentum=0.9, weight_decay=1e-3, clip_norm=0.5, epochs=2), replace(T, lr=0.01, optimizer="adam")],
    ids=["sgd", "momentum", "adam"],
)
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_a_guide_of_ones_is_fedavg_or_fedprox_to_the_bit(run, training, mu):  # type: ignore[no-untyped-def]
    training = replace(training, step="stock")
    ours = visit_with(run, fedlex(training=training, scouting=BRIEF, mu=mu), lambda n, shape: torch.ones(shape))
    plain = fedprox(mu, training=training) if mu else fedavg(training)
    assert equal(ours, visit_with(run, plain, lambda n, shape: torch.ones(shape)))


def test_the_guide_multiplies_gradients_before_they_are_clipped(run, digits_federation):  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(1)
    guides = {}

    def guide(name, shape):  # type: ignore[no-untyped-def]
        return guides.setdefault(name, torch.rand(shape, generator=g))

    one_step = Training(lr=0.1, batch_size=1000)
    plain = visit_with(run, fedavg(replace(one_step, step="stock")), guide)  # -lr times the gradient
    ours = visit_with(run, fedlex(training=replace(one_step, clip_norm=0.05), scouting=BRIEF), guide)
    scaled = {n: plain[n] / -0.1 * guides[n] for n in plain}
    length = torch.cat([t.flatten() for t in scaled.values()]).norm()
    assert length > 0.05
    for name in ours:
        assert torch.allclose(ours[name], -0.1 * scaled[name] * 0.05 / length, atol=1e-6), name


def test_adam_cannot_undo_the_guide(run):  # type: ignore[no-untyped-def]
    adam = Training(lr=0.01, batch_size=1000, optimizer="adam")
    plain = visit_with(run, fedavg(adam), lambda n, s: torch.ones(s))
    ours = visit_with(run, fedlex(training=adam, scouting=BRIEF), lambda n, s: torch.full(s, 0.25))
    for name in ours:
        assert torch.allclose(ours[name], 0.25 * plain[name], atol=1e-7), name


@pytest.mark.parametrize("more", [{"momentum": 0.9}, {"optimizer": "adamw", "weight_decay": 0.1}], ids=["sgd", "adamw"])
def test_what_the_guide_holds_still_keeps_its_bits(run, more):  # type: ignore[no-untyped-def]
    delta = visit_with(run, fedlex(training=replace(T, **more), scouting=BRIEF), lambda n, s: torch.zeros(s))
    assert not any(bool(d.any()) for d in delta.values())


# ------------------------------------------------------------------------------------------ company


@pytest.mark.parametrize("parts", [{"uplink": (TopK(0.2),)}, {"secure": SecureSum()}], ids=["top_k", "secure_sum"])
def test_it_composes(run, parts):  # type: ignore[no-untyped-def]
    method = fedlex(scouts=1.0, scouting=BRIEF, training=T, scale="mean", server=Adaptive()).but(**parts)
    one, two = (run(method, rounds=4, backend=b) for b in (None, ProcessPool(workers=2)))
    assert [(row.replies, row.refused, row.notes) for row in one] == [(5, {}, [])] * 4
    assert equal(one[-1].engine.state.replica["weights"], two[-1].engine.state.replica["weights"])


def test_it_learns(run):  # type: ignore[no-untyped-def]
    rows = run(fedlex(scouts=1.0, scouting=Scouting(epochs=10), training=replace(T, lr=0.5), scale="mean"), rounds=6)
    assert rows[-1].metrics["accuracy"] > rows[0].metrics["accuracy"] + 0.05


def test_rounds_that_do_not_wait_are_refused(run):  # type: ignore[no-untyped-def]
    with pytest.raises(RecipeError, match="LossExploration needs rounds that wait"):
        run(fedlex().but(schedule=Buffered(k=2)), rounds=1)


def test_bad_knobs_are_refused_with_a_sentence():
    with pytest.raises(RecipeError, match=r"scouts.*greater than 0"):
        read_recipe({"method": {"name": "fedlex", "scouts": 0}})
    with pytest.raises(RecipeError, match=r"scouting.patience"):
        read_recipe({"method": {"name": "fedlex", "scouting": {"patience": 0}}})


def test_a_snapshot_brings_everything(run):  # type: ignore[no-untyped-def]
    engine = run(fedlex(scouts=1.0, scouting=BRIEF, training=T), rounds=3)[-1].engine
    share, replica = engine.method.share, engine.state.replica
    fresh = share.receive(share.initial(engine.setup.task.model(0)), share.snapshot(replica))
    assert fresh.keys() == replica.keys()
    assert all(equal(fresh[p], replica[p]) for p in replica)
    assert encoded_size(share.snapshot(replica)) < 1.6 * encoded_size(engine.state.broadcast.common)
