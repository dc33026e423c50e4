"""AutoFLIP: what is pruned, that it stays so, what travels, and what is exported."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from atoll.core.errors import RecipeError
from atoll.core.message import encoded_size
from atoll.core.tree import equal, numel
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.knowledge.guidance import guidance
from atoll.federated.local.loss_exploration import Scouting
from atoll.federated.local.training import Training
from atoll.federated.method import MergeContext
from atoll.federated.methods.autoflip import autoflip
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.schedules.buffered import Buffered
from atoll.federated.secure.secure_sum import SecureSum
from atoll.federated.server.adaptive import Adaptive
from atoll.federated.server.prune import Prune, make_mask
from atoll.federated.visit import Job
from atoll.models.cnn import CNN
from atoll.models.export import load_model
from atoll.models.masks import unpack_bits
from atoll.models.mlp import MLP
from atoll.models.narrow import units_of
from atoll.models.user import User
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import start
from atoll.tasks.classification import Classification

BRIEF = Scouting(epochs=4, patience=2)
T = Training(lr=0.1, batch_size=64)


def brief(sparsity=0.5, training=T, **more):  # type: ignore[no-untyped-def]
    return autoflip(sparsity, scouts=1.0, scouting=BRIEF, training=training, **more)


def own(info, outputs):  # type: ignore[no-untyped-def]
    """A user's own module, with a norm."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 12), nn.ReLU(),
        nn.Linear(12, outputs),
    )  # fmt: skip


@pytest.fixture
def images(digits):  # type: ignore[no-untyped-def]
    return Classification(digits.info, User(own))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("score", ["exploration", "magnitude", "random"])
def test_as_much_is_pruned_as_was_asked_for(run, images, sparsity, score):  # type: ignore[no-untyped-def]
    state = run(brief(sparsity, score=score), rounds=3, task=images)[-1].engine.state
    trained = {n: m for n, m in state.replica["mask"].items() if "running" not in n}
    dropped = sum(int((~m).sum()) for m in trained.values())
    assert abs(dropped / numel(trained) - sparsity) < 0.01
    assert all(bool(m.any()) for m in trained.values())
    assert all(bool(m.all()) for n, m in state.replica["mask"].items() if "running" in n)


def test_what_scouts_hardly_moved_goes(run):  # type: ignore[no-untyped-def]
    """Against the guidance of the same drifts, over all tensors together."""
    method = brief(0.4, unit_share=0.0)
    engine = run(method, rounds=1)[-1].engine
    replies = [engine.workers.local.run(Job(site, 1)) for site in range(5)]
    drifts = [({n: t.clone() for n, t in r.message.parts["drift"].items()}, r.num_samples) for r in replies]
    engine.step()
    total = sum(count for _, count in drifts)
    scores = {n: guidance(sum(d[n] * (c / total) for d, c in drifts)) for n in drifts[0][0]}
    mask, flat = engine.state.replica["mask"], torch.cat([s.flatten() for s in scores.values()])
    threshold = flat.sort().values[math.floor(0.4 * len(flat))]
    for n in scores:
        clear = (scores[n] - threshold).abs() > 1e-5
        assert torch.equal(mask[n][clear], (scores[n] > threshold)[clear]), n


@pytest.mark.parametrize(
    "more",
    [{}, {"training": Training(lr=0.01, batch_size=64, optimizer="adam")}, {"mu": 0.1, "server": Adaptive()},
     {"training": Training(lr=0.05, batch_size=64, momentum=0.9, weight_decay=1e-2, clip_norm=1.0)}],
    ids=["sgd", "adam", "fedadam", "momentum"],
)  # fmt: skip
def test_what_is_pruned_stays_exactly_zero(run, images, more):  # type: ignore[no-untyped-def]
    engine = run(brief(**more), rounds=3, task=images)[-1].engine
    replica, at = engine.state.replica, engine.workers.local.site_model(0)
    for _ in range(2):
        engine.workers.local.run(Job(0, engine.state.round))
        for found in (at.tensors, engine.state.replica["weights"]):  # after local steps, and after the merge
            assert all(not bool(found[n][~m].any()) for n, m in replica["mask"].items())
        engine.step()
    moved = {n: t for n, t in engine.state.replica["weights"].items() if "running" not in n}
    assert all(not torch.equal(t, replica["weights"][n]) for n, t in moved.items())


def test_only_kept_entries_travel_and_the_mask_once(run):  # type: ignore[no-untyped-def]
    rows = run(brief(0.75), rounds=5)
    dense = run(fedavg(T), rounds=1)[0]
    state = rows[-1].engine.state
    n, header = numel(state.replica["weights"]), 700
    whole, kept, bitmap = 4 * n, 4 * math.ceil(0.25 * n), math.ceil(n / 8)
    assert all(whole <= size < whole + header for size in dense.up_bytes.values())
    assert all(kept <= size < kept + header for row in rows[2:] for size in row.up_bytes.values())
    assert all(bitmap <= size < bitmap + header for size in rows[2].down_bytes.values())
    assert all(kept <= size < kept + header for row in rows[3:] for size in row.down_bytes.values())
    share = rows[-1].engine.method.share
    assert encoded_size(share.snapshot(state.replica)) < kept + bitmap + header


def test_a_snapshot_brings_a_fresh_site_to_the_same_replica(run, images):  # type: ignore[no-untyped-def]
    for rounds in (1, 2, 4):
        engine = run(brief(0.5), rounds=rounds, task=images)[-1].engine
        share, replica = engine.method.share, engine.state.replica
        fresh = share.receive(share.initial(images.model(0)), share.snapshot(replica))
        assert fresh.keys() == replica.keys()
        assert all(equal(fresh[p], replica[p]) for p in replica)


def test_the_merge_is_the_mean_of_what_sites_send(run):  # type: ignore[no-untyped-def]
    engine = run(brief(0.5), rounds=2)[-1].engine
    before = {n: t.clone() for n, t in engine.state.replica["weights"].items()}
    mask = engine.state.replica["mask"]
    replies = [engine.workers.local.run(Job(site, 2)) for site in range(5)]
    sent = [({n: t.clone() for n, t in r.message.parts["delta"].items()}, r.num_samples) for r in replies]
    engine.step()
    total = sum(c for _, c in sent)
    for name, after in engine.state.replica["weights"].items():
        mean = sum(d[name].double() * (c / total) for d, c in sent)
        assert torch.allclose(after[mask[name]].double(), before[name][mask[name]] + mean, atol=1e-6), name


# ------------------------------------------------------------------------------------------ units


def test_units_of_which_little_would_be_left_go_with_all_that_reads_them():
    model = nn.Sequential(nn.Linear(20, 4), nn.ReLU(), nn.Linear(4, 30))
    g = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(p.shape, generator=g) + 1 for n, p in model.named_parameters()}
    scores["0.weight"][1, :20] = 0.01 * torch.rand(20, generator=g)
    scores["0.bias"][1] = 0.0
    mask = make_mask(scores, 0.3, units_of(model), 0.1, 0.0)
    assert not mask["0.weight"][1].any()
    assert not mask["2.weight"][:, 1].any()
    assert all(mask["0.weight"][i].any() for i in (0, 2, 3))
    assert sum(int((~m).sum()) for m in mask.values()) == math.floor(0.3 * (84 + 150))
    without = make_mask(scores, 0.3, units_of(model), 0.0, 0.0)
    assert without["2.weight"][:, 1].any()


def test_a_fraction_of_the_units_can_go_and_the_best_always_stays():
    model = nn.Sequential(nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 2))
    scores = {n: torch.ones(p.shape) for n, p in model.named_parameters()}
    scores["0.weight"] *= torch.arange(10.0)[:, None]
    mask = make_mask(scores, 0.0, units_of(model), 0.0, 0.4)
    assert mask["0.bias"].tolist() == [False] * 4 + [True] * 6
    scores = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    assert make_mask(scores, 0.9, units_of(model), 1.0, 0.9)["0.weight"].any(1).sum() == 1


@pytest.mark.parametrize("network", [User(own), CNN(channels=(8, 8), dense=16, norm="batch"), MLP((24, 16))])
def test_the_exported_network_is_smaller_and_computes_the_same(run, digits, network, tmp_path):  # type: ignore[no-untyped-def]
    method = brief(0.6, unit_share=0.3, unit_quantile=0.25)
    engine = run(method, rounds=4, task=Classification(digits.info, network))[-1].engine
    at, _ = engine.workers.local.place(None, None)
    x = digits.ready(torch.arange(60))["x"]
    masked = at.model.eval()(x)
    small = method.share.export(copy.deepcopy(at.model), engine.state.replica).eval()
    assert torch.allclose(small(x), masked, atol=1e-5)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (at.model, small))
    assert after < 0.8 * before
    assert not any("parametriz" in n for n in small.state_dict())


def test_a_saved_run_loads_the_small_network(tmp_path, digits):  # type: ignore[no-untyped-def]
    recipe = read_recipe(
        {"name": "a", "sites": 3, "rounds": 3, "limit": 300, "model": {"name": "mlp", "hidden": [20]},
         "method": {"name": "autoflip", "sparsity": 0.5, "unit_quantile": 0.5, "scouting": {"epochs": 2}}}
    )  # fmt: skip
    run, _ = start(recipe, tmp_path / "run")
    run.go()
    model = load_model(tmp_path / "run" / "model")
    assert model.layers[0].weight.shape == (10, 64)
    assert model.layers[1].weight.shape == (10, 10)
    assert model(digits.ready(torch.arange(3))["x"]).shape == (3, 10)


@pytest.mark.parametrize("sparsity", [0.6, 0.95])
def test_a_plan_knows_how_much_is_kept_or_the_most(tmp_path, sparsity):  # type: ignore[no-untyped-def]
    recipe = read_recipe(
        {"name": "p", "sites": 3, "rounds": 5, "limit": 300, "model": {"name": "mlp", "hidden": [40, 20]},
         "method": {"name": "autoflip", "sparsity": sparsity, "scouting": {"epochs": 2}}}
    )  # fmt: skip
    run, foreseen = start(recipe, tmp_path / "run")
    done = run.go()
    most = 1.0 if sparsity < 0.9 else 1.2  # whole units go beyond 95 %
    for way in ("up_bytes", "down_bytes"):
        digits_of_sizes = 0.001
        assert 1 - digits_of_sizes < getattr(foreseen, way) / done[way] < most + digits_of_sizes


@pytest.mark.parametrize("sparsity", [0.3, 0.95])
def test_a_dry_merge_keeps_as_many_as_no_unit_would_add_to(digits_task, sparsity):
    weights = {n: p.detach() for n, p in digits_task.model(0).named_parameters()}
    context = MergeContext(1, {}, 5, 0, digits_task, dry=True)
    nothing = {n: torch.zeros_like(t) for n, t in weights.items()}
    bits = Prune(sparsity=sparsity, unit_share=0.5).found(nothing, {"weights": weights}, context)["mask"]["bits"]
    kept = sum(int(m.sum()) for m in unpack_bits(bits, weights).values())
    assert kept == numel(weights) - math.floor(sparsity * numel(weights))


def test_a_network_that_cannot_be_traced_is_pruned_entry_by_entry(run, digits):  # type: ignore[no-untyped-def]
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 12), nn.Linear(12, 10)

        def forward(self, x):  # type: ignore[no-untyped-def]
            x = self.a(x.flatten(1))
            return self.b(x.relu() if float(x.detach().sum()) > 0 else x.tanh())

    network = User(lambda info, outputs: Odd())
    rows = run(brief(0.5, unit_share=0.5), rounds=3, task=Classification(digits.info, network))
    assert rows[-1].refused == {}
    engine = rows[-1].engine
    model = engine.method.share.export(engine.workers.local.site_model(None).model, engine.state.replica)
    assert model.a.weight.shape == (12, 64)
    assert abs(float((model.a.weight == 0).float().mean()) - 0.5) < 0.2


# ------------------------------------------------------------------------------------------ company


@pytest.mark.parametrize(
    "parts", [{"uplink": (Quantise(bits=8),)}, {"secure": SecureSum()}], ids=["quantise", "secure"]
)
def test_it_composes(run, parts):  # type: ignore[no-untyped-def]
    one, two = (run(brief().but(**parts), rounds=4, backend=b) for b in (None, ProcessPool(workers=2)))
    assert [(row.replies, row.refused, row.notes) for row in one] == [(5, {}, [])] * 4
    assert equal(one[-1].engine.state.replica["weights"], two[-1].engine.state.replica["weights"])
    assert [row.up_bytes for row in one] == [row.up_bytes for row in two]


def test_half_the_weights_learn_as_well(run):  # type: ignore[no-untyped-def]
    fast = Training(lr=0.3, batch_size=16)
    whole = run(fedavg(fast), rounds=6)[-1].metrics["accuracy"]
    assert whole > 0.8
    assert run(brief(0.5, fast), rounds=7)[-1].metrics["accuracy"] > whole - 0.05


def test_a_proximal_pull_shortens_updates(run):  # type: ignore[no-untyped-def]
    moved = []
    for mu in (0.0, 5.0):
        engine = run(brief(mu=mu, training=Training(lr=0.1, batch_size=16)), rounds=2)[-1].engine
        delta = engine.workers.local.run(Job(0, 2)).message.parts["delta"]
        moved.append(sum(float(d.norm()) for d in delta.values()))
    assert moved[1] < 0.9 * moved[0]


def test_rounds_that_do_not_wait_are_refused(run):  # type: ignore[no-untyped-def]
    with pytest.raises(RecipeError, match="LossExploration needs rounds that wait"):
        run(autoflip().but(schedule=Buffered(k=2)), rounds=1)


def test_bad_knobs_are_refused_with_a_sentence():
    with pytest.raises(RecipeError, match=r"sparsity.*less than 1"):
        read_recipe({"method": {"name": "autoflip", "sparsity": 1}})
    with pytest.raises(RecipeError, match="score"):
        read_recipe({"method": {"name": "autoflip", "score": "luck"}})
