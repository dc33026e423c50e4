"""FedKSeed: a model that travels as seeds and scalars."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from atoll.core.errors import BadReply
from atoll.core.message import Message, encode
from atoll.core.streams import key
from atoll.core.tree import equal
from atoll.data.dataset import Dataset, Federation, Info, SiteData
from atoll.federated.backends.inline import Inline
from atoll.federated.combine.scatter_sum import ScatterSum
from atoll.federated.engine import open_engine
from atoll.federated.method import DeviceProfile, MergeContext, Reply
from atoll.federated.methods.fedkseed import fedkseed
from atoll.federated.select.uniform import Uniform
from atoll.federated.server.add_scalars import probability
from atoll.federated.share.seed_scalars import SeedPool, SeedScalars, rebuild
from atoll.federated.visit import Job, Setup
from atoll.models.lm import LM
from atoll.models.mlp import MLP
from atoll.tasks.classification import Classification
from atoll.tasks.language import Language

SMALL = fedkseed(pool=64, steps=20, eps=1e-3)


def worker_of(method, task, federation):
    n = len(federation.sites)
    setup = Setup(task=task, federation=federation, method=method, profiles=(DeviceProfile(),) * n, seed=0)
    return open_engine(setup, Inline()).workers.local


def direction(j: int, count: int, seed: int = 0) -> np.ndarray:
    """z_j, drawn by NumPy alone."""
    generator = np.random.Generator(np.random.Philox(key=key(seed, "direction", j)))
    return generator.standard_normal(count, dtype=np.float32).astype(np.float64)


# ------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize("hidden", [(4,), (64,)])
@pytest.mark.parametrize(("pro", "pool", "total"), [(False, 4096, 17_988), (True, 1024, 9_796)])
def test_a_round_moves_the_papers_bytes_whatever_the_model(run, digits, digits_federation, hidden, pro, pool, total):
    sizes = []

    @dataclass(frozen=True)
    class Seen(ScatterSum):
        def combine(self, replies, context):
            replies = list(replies)
            sizes.extend(r.message.payload_bytes for r in replies)
            return super().combine(replies, context)

    made = fedkseed(pool=pool, steps=200, pro=pro).but(combine=Seen(), select=Uniform(count=1))
    row = run(made, rounds=1, task=Classification(digits.info, MLP(hidden=hidden)), evaluate_every=0)[0]
    down = row.engine.state.broadcast.common
    assert down.payload_bytes == 4 * pool * (2 if pro else 1)
    assert sizes == [8 * 200]
    assert down.payload_bytes + sizes[0] + 4 == total  # and the count of steps, which stands in the header
    (site,) = row.down_bytes
    assert row.down_bytes[site] == len(encode(made.server.open(made.share.initial(nn.Linear(1, 1))).common))


def test_a_site_that_missed_rounds_needs_the_last_broadcast_alone(run, digits_task):
    made = SMALL.but(select=Uniform(count=2))
    rows = run(made, rounds=6, evaluate_every=0)
    assert len({b for r in rows for b in r.down_bytes.values()}) == 1
    state = rows[-1].engine.state
    late = made.share.receive(made.share.initial(digits_task.model(0)), state.broadcast.common)
    assert equal(late["weights"], state.replica["weights"])
    assert not equal(late["weights"], late["initial"])
    assert late["initial"] is not late["weights"]
    assert equal(late["initial"], {n: p.detach() for n, p in digits_task.model(0).named_parameters()})


def test_a_dry_visit_has_the_true_sizes_and_walks_nowhere(digits_task, digits_federation):
    worker = worker_of(SMALL, digits_task, digits_federation)
    dry, real = worker.run(Job(1, 0, dry=True)), worker.run(Job(1, 0))
    assert not dry.error
    assert len(encode(dry.message)) == len(encode(real.message))
    assert dry.flops == real.flops > 0
    assert not dry.message.parts["steps"]["scalars"].any()


# ------------------------------------------------------------------------------------------ rebuilding


def test_directions_depend_on_their_number_alone():
    pool = SeedPool(8)
    first = pool.direction(5, 1000)
    torch.manual_seed(123)
    np.random.seed(4)  # noqa: NPY002
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pool.direction(4, 77)
        assert torch.equal(pool.direction(5, 1000), first)
    assert np.array_equal(first.numpy().astype(np.float64), direction(5, 1000))
    assert abs(float(first.mean())) < 0.15
    assert abs(float(first.std()) - 1) < 0.1
    assert not torch.equal(first, pool.direction(4, 1000))
    assert not torch.equal(first, SeedPool(8, seed=1).direction(5, 1000))
    # Pinned: a change of these numbers would break every run between sites of different versions.
    pinned = torch.tensor([-0.5810, 0.1783, -1.2169])
    assert torch.allclose(SeedPool().direction(0, 3), pinned, atol=1e-4)


def test_rebuilding_equals_taking_the_steps_one_by_one():
    g = torch.Generator().manual_seed(0)
    start = {"a": torch.randn(40, 5, generator=g), "b": torch.randn(9, generator=g)}
    pool, lr, n = SeedPool(50), 0.01, 209
    walk = [(int(j), float(s)) for j, s in zip(
        torch.randint(50, (300,), generator=g), torch.randn(300, generator=g), strict=True)]  # fmt: skip
    w, total = np.concatenate([t.numpy().ravel() for t in start.values()]).astype(np.float64), torch.zeros(50)
    for j, s in walk:
        w -= lr * s * direction(j, n)
        total[j] += s
    got = rebuild(start, total, pool, lr)
    assert list(got) == ["a", "b"]
    assert got["a"].shape == (40, 5)
    flat = np.concatenate([t.numpy().ravel() for t in got.values()])
    assert np.abs(flat - w).max() < 1e-5
    half = rebuild({n: t.bfloat16() for n, t in start.items()}, total, pool, lr)
    assert half["b"].dtype == torch.bfloat16
    assert torch.allclose(half["b"].float(), got["b"], atol=0.05)


def test_a_single_site_ends_where_everybody_rebuilds(run, digits, digits_task):
    data = digits.select(range(100))
    alone = Federation((SiteData(data, digits.select([]), digits.select([])),), digits, info=digits.info)
    worker = worker_of(SMALL, digits_task, alone)
    reply = worker.run(Job(0, 0)).message.parts["steps"]
    start = {n: p.detach() for n, p in digits_task.model(0).named_parameters()}
    w = np.concatenate([t.numpy().ravel() for t in start.values()]).astype(np.float64)
    for j, g in zip(reply["seeds"].tolist(), reply["scalars"].tolist(), strict=True):
        w -= 0.01 * g * direction(j, len(w))
    got = run(SMALL, rounds=1, federation=alone)[0].engine.state.replica["weights"]
    flat = np.concatenate([t.numpy().ravel() for t in got.values()])
    assert np.abs(flat - w).max() < 1e-5
    assert np.abs(flat - np.concatenate([t.numpy().ravel() for t in start.values()])).max() > 1e-3


# ------------------------------------------------------------------------------------------ local steps


@dataclass(frozen=True)
class Watched(Classification):
    """Counts losses and can spoil some of them; the model has dropout."""

    calls: list[float] = field(default_factory=list, compare=False)
    spoiled: tuple[int, ...] = ()

    def model(self, seed: int, site: int | None = None) -> nn.Module:
        return nn.Sequential(nn.Flatten(), super().model(seed, site), nn.Dropout(0.5))

    def mean_loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.calls.append(math.nan)
        loss = super().mean_loss(model, batch)
        return loss * math.nan if len(self.calls) - 1 in self.spoiled else loss


def test_slopes_are_gradients_along_directions_on_the_way_down(digits, digits_federation):
    task = Watched(digits.info, MLP(hidden=()))  # smooth: a kink would add a difference of its own
    made = fedkseed(pool=16, steps=20, eps=1e-3, lr=0.02, batch_size=10_000)
    reply = worker_of(made, task, digits_federation).run(Job(2, 0)).message.parts["steps"]
    model, rows = task.model(0).eval(), digits_federation.sites[2].train.ready()
    params = list(model.parameters())
    w = torch.nn.utils.parameters_to_vector(params).detach().double()
    start = w.clone()
    for j, g in zip(reply["seeds"].tolist(), reply["scalars"].tolist(), strict=True):
        torch.nn.utils.vector_to_parameters(w.float(), params)
        grad = torch.autograd.grad(Classification.mean_loss(task, model, rows), params)
        z = torch.tensor(direction(j, len(w)))
        assert g == pytest.approx(float(torch.cat([t.flatten() for t in grad]).double() @ z), abs=3e-3)
        w -= 0.02 * g * z
    assert (w - start).norm() > 0.5  # far enough for a walk in another direction to show


def test_a_step_whose_loss_is_not_finite_is_skipped_and_the_walk_goes_on(digits, digits_federation):
    task = Watched(digits.info, MLP(hidden=(8,)), spoiled=(6, 7))  # both losses of the fourth step
    same = Watched(digits.info, MLP(hidden=(8,)))
    made = fedkseed(pool=64, steps=6, eps=1e-3)
    outcome = worker_of(made, task, digits_federation).run(Job(0, 0))
    got = outcome.message.parts["steps"]
    want = worker_of(made, same, digits_federation).run(Job(0, 0)).message.parts["steps"]
    assert got["seeds"].tolist() == [j for i, j in enumerate(want["seeds"].tolist()) if i != 3]
    assert torch.equal(got["scalars"][:3], want["scalars"][:3])
    assert bool(torch.isfinite(got["scalars"]).all())
    assert outcome.metrics["skipped_steps"] == 1


class Peak(TorchDispatchMode):
    """The largest number of bytes of tensors made inside that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                ref = StorageWeakRef(storage)
                self.live.setdefault(ref.cdata, (ref, storage.nbytes()))
        self.live = {k: (r, b) for k, (r, b) in self.live.items() if not r.expired()}
        self.peak = max(self.peak, sum(b for _, b in self.live.values()))
        return out


@contextmanager
def nothing_is_kept_for_a_backward_pass() -> Iterator[None]:
    def refuse(t: torch.Tensor) -> torch.Tensor:
        raise AssertionError("an activation was kept")

    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t):
        yield


def test_a_visit_needs_the_memory_of_inference_and_no_backward_pass(digits, digits_federation):
    task = Classification(digits.info, MLP(hidden=(64,) * 12))
    made = fedkseed(pool=64, steps=3, batch_size=256)
    worker = worker_of(made, task, digits_federation)
    outcome = worker.run(Job(0, 0))  # counts FLOPs, which does keep a graph
    forward, _ = worker.flops(worker.site_model(0), 0)
    rows = min(256, len(digits_federation.sites[0].train))
    assert outcome.flops == 2 * 3 * rows * forward
    at, _ = worker.place(0, None)
    weights = sum(p.numel() * 4 for p in at.model.parameters())
    with Peak() as inference, torch.no_grad():
        task.mean_loss(at.model, digits_federation.sites[0].train.ready(torch.arange(rows)))
    with Peak() as training:
        loss = task.mean_loss(at.model, digits_federation.sites[0].train.ready(torch.arange(rows)))
        torch.autograd.grad(loss, list(at.model.parameters()))
    with Peak() as visit, nothing_is_kept_for_a_backward_pass():
        assert not worker.run(Job(0, 1)).error
    data = sum(t.numel() * t.element_size() for t in digits_federation.sites[0].train.ready().values())
    allowed = inference.peak + data + 2 * weights + 64 * 64 * 4 + 10_000
    assert visit.peak < allowed < training.peak
    assert training.peak > 2.5 * inference.peak


# ------------------------------------------------------------------------------------------ the server


def reply(site: int, pairs: list[tuple[int, float]], count: int) -> Reply:
    seeds = torch.tensor([j for j, _ in pairs], dtype=torch.int32)
    scalars = torch.tensor([g for _, g in pairs])
    return Reply(site, Message("seed_scalars", {"steps": {"seeds": seeds, "scalars": scalars}}), count)


def test_scalars_are_added_by_seed_and_weighted_by_examples():
    context = MergeContext(0, {"scalars": {"G": torch.zeros(5)}}, 2, 0, None)
    replies = [reply(0, [(3, 1.0), (1, 2.0), (3, -4.0)], 30), reply(1, [(3, 8.0), (0, -2000.0)], 10)]
    out = ScatterSum().combine(iter(replies), context).parts["scalars"]
    assert out["G"].tolist() == [-500.0, 1.5, 0.0, -0.75 * 3 + 0.25 * 8, 0.0]
    assert out["magnitude"].tolist() == [1000.0, 2.0, 0.0, 13.0, 0.0]
    assert out["visits"].tolist() == [1, 1, 0, 3, 0]
    even = ScatterSum(by="uniform").combine(iter(replies[::-1]), context).parts["scalars"]
    assert even["G"].tolist() == [-1000.0, 1.0, 0.0, -0.5 * 3 + 0.5 * 8, 0.0]


def test_scalars_of_all_rounds_add_up(run):
    seen = []

    @dataclass(frozen=True)
    class Seen(ScatterSum):
        def combine(self, replies, context):
            out = super().combine(replies, context)
            seen.append(out.parts["scalars"]["G"])
            return out

    engine = run(SMALL.but(combine=Seen()), rounds=3)[-1].engine
    assert torch.allclose(engine.state.replica["scalars"]["G"].double(), sum(seen), rtol=1e-6)
    assert engine.state.server == {}


def test_pro_prefers_directions_with_large_slopes(run):
    p = probability(torch.tensor([6.0, 0.0, 4.0, 0.0]).double(), torch.tensor([2.0, 0.0, 4.0, 1.0]).double())
    raw = np.exp(np.array([3.0, 0.0, 1.0, 0.0]) / 3.0)
    assert np.allclose(p.numpy(), raw / raw.sum(), atol=1e-6)
    assert torch.equal(probability(torch.zeros(4).double(), torch.zeros(4).double()), torch.full((4,), 0.25))
    rows = run(fedkseed(pool=32, steps=100, eps=1e-3, pro=True), rounds=2)
    engine = rows[-1].engine
    odds, history = (
        engine.state.broadcast.common.parts["scalars"]["probability"],
        engine.state.server["history"],
    )
    assert int(history["visits"].sum()) == 2 * 5 * 100
    mean = history["magnitude"] / history["visits"]
    assert int(odds.argmax()) == int(mean.argmax())
    assert float(odds.sum()) == pytest.approx(1, abs=1e-5)
    assert not any(r.refused or r.notes for r in rows)


def test_pro_draws_by_the_broadcast_odds(digits_task, digits_federation):
    made = fedkseed(pool=8, steps=400, eps=1e-3, batch_size=1, pro=True)
    worker = worker_of(made, digits_task, digits_federation)
    odds = torch.tensor([0.0, 0.5, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0])
    worker.publish({**worker.replica, "scalars": {**worker.replica["scalars"], "probability": odds}})
    seeds = worker.run(Job(0, 0)).message.parts["steps"]["seeds"]
    assert set(seeds.tolist()) == {1, 2, 3}
    assert 150 < int((seeds == 1).sum()) < 250


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        (
            {"seeds": torch.tensor([1, 8], dtype=torch.int32), "scalars": torch.ones(2)},
            "outside the pool of 8",
        ),
        (
            {"seeds": torch.tensor([-1, 2], dtype=torch.int32), "scalars": torch.ones(2)},
            "outside the pool of 8",
        ),
        ({"seeds": torch.tensor([1, 2], dtype=torch.int32), "scalars": torch.ones(3)}, "do not fit"),
        ({"seeds": torch.tensor([1, 2]), "scalars": torch.ones(2)}, "int32"),
        ({"seeds": torch.tensor([1], dtype=torch.int32), "scalars": torch.ones(1).double()}, "float32"),
        ({"seeds": torch.tensor([[1]], dtype=torch.int32), "scalars": torch.ones(1, 1)}, "int32"),
        ({"seeds": torch.tensor([1], dtype=torch.int32)}, "expected the part `steps`"),
    ],
)
def test_a_reply_that_cannot_be_right_is_refused(steps, why):
    share = SeedScalars(SeedPool(8))
    fine = {"seeds": torch.tensor([0, 7], dtype=torch.int32), "scalars": torch.ones(2)}
    share.check(Message("seed_scalars", {"steps": fine}), {})
    with pytest.raises(BadReply, match=why):
        share.check(Message("seed_scalars", {"steps": steps}), {})
    with pytest.raises(BadReply, match="nothing else"):
        share.check(Message("seed_scalars", {"steps": fine, "delta": {}}), {})


# ------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("pro", [False, True])
def test_digits_are_learned_without_a_gradient(run, pro):
    rows = run(fedkseed(pool=1024, steps=50, lr=1e-2, eps=1e-3, pro=pro), rounds=30, evaluate_every=30)
    assert rows[-1].metrics["accuracy"] > 0.78


def test_a_language_model_improves():
    info = Info(name="loop", kind="text", shape=(8,), num_classes=5)
    data = Dataset({"x": (torch.arange(64)[:, None] * 3 + torch.arange(8)) % 5}, info)
    none = data.select([])
    parts = tuple(SiteData(data.select(range(a, a + 32)), none, none) for a in (0, 32))
    task = Language(info, LM(dim=8, layers=1, heads=2, dropout=0.2, norm="layer"))
    made = fedkseed(pool=256, steps=60, lr=0.02, eps=1e-3)
    setup = Setup(task=task, federation=Federation(parts, data, info=info), method=made,
                  profiles=(DeviceProfile(),) * 2, seed=0)  # fmt: skip
    engine = open_engine(setup, Inline())
    before = engine.evaluate_global()["loss"]
    for _ in range(6):
        assert not engine.step().refused
    assert engine.evaluate_global()["loss"] < before - 0.2


def test_a_frozen_parameter_is_not_moved(digits_task):
    model = digits_task.model(0)
    model.layers[0].weight.requires_grad_(False)
    assert "layers.0.weight" not in replace(SMALL).share.split(model).shared
