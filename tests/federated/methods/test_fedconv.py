"""FedConv: what each site gets, what the server learns from, and slicing as the limit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from atoll.core.errors import AtollError, BadReply, RecipeError
from atoll.core.message import Message
from atoll.core.tree import clone, equal, named_tensors
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.local.training import Training
from atoll.federated.method import MergeContext
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.fedconv import fedconv
from atoll.federated.server.learn_on_models import LearnOnModels
from atoll.federated.share.sub_models import SubModels, part
from atoll.federated.visit import Job
from atoll.models.cnn import CNN
from atoll.models.export import load_model
from atoll.models.learned_width import narrower
from atoll.models.logistic import Logistic
from atoll.models.mlp import MLP
from atoll.models.user import User
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import start
from atoll.tasks.classification import Classification

FAST = Training(lr=0.1, batch_size=32)
RATIOS = (1.0, 0.75, 0.5)
SLICING = fedconv(FAST, ratios=RATIOS, first=0, later=0)
LEARNING = fedconv(FAST, ratios=RATIOS, first=2, later=1, lr=5e-3)


@pytest.fixture
def world(digits_federation):  # type: ignore[no-untyped-def]
    test = digits_federation.test
    return replace(digits_federation, test=test.select(range(150, 300)), public=test.select(range(150)))


@pytest.fixture
def task(digits):  # type: ignore[no-untyped-def]
    return Classification(digits.info, MLP(hidden=(16, 8)))


def user(info, outputs):  # type: ignore[no-untyped-def]
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(),
        nn.Linear(8, outputs),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ what sites get


def test_site_code_is_that_of_fedavg_on_the_model_that_came(run, world, task):  # type: ignore[no-untyped-def]
    assert LEARNING.local == fedavg(FAST).local
    engine = run(LEARNING, rounds=1, federation=world, task=task)[-1].engine
    for site in range(5):
        came = engine.state.broadcast.per_site[site]
        assert came.parts.keys() == {"weights"}
        narrow = narrower(task.model(0), RATIOS[site % 3])
        assert {n: t.shape for n, t in came.parts["weights"].items()} == {
            n: t.shape for n, t in named_tensors(narrow).items()
        }
        reply = engine.workers.local.run(Job(site, 1, message=came)).message
        widths = [16, 12, 8][site % 3], [8, 6, 4][site % 3]
        alike = Classification(world.info, MLP(hidden=widths))
        theirs = run(fedavg(FAST), rounds=1, federation=world, task=alike)[-1].engine
        theirs.workers.local.publish({"weights": came.parts["weights"]})
        other = theirs.workers.local.run(Job(site, 1)).message
        assert equal(dict(reply.parts["delta"]), dict(other.parts["delta"]))


def test_a_narrow_site_moves_fewer_bytes(run, world, task):  # type: ignore[no-untyped-def]
    row = run(LEARNING, rounds=2, federation=world, task=task)[-1]
    for way in (row.down_bytes, row.up_bytes, row.flops):
        assert way[2] / way[0] < 0.75
    assert row.down_bytes[0] == row.down_bytes[3]


def test_a_site_of_ratio_one_gets_the_large_model_itself(run, world, task):  # type: ignore[no-untyped-def]
    s = run(LEARNING, rounds=1, federation=world, task=task)[-1].engine.state
    for site in (0, 3):
        assert s.broadcast.per_site[site].parts["weights"] is s.broadcast.common.parts["weights"]
    assert s.replica.keys() == {"weights", "weights at 0.75", "weights at 0.5"}


# ------------------------------------------------------------------------------------------ limits


def test_with_one_ratio_and_nothing_learned_it_is_fedavg(run, world, task):  # type: ignore[no-untyped-def]
    method = fedconv(FAST, ratios=(1.0,), first=0, later=0)
    a, b = (run(m, rounds=3, federation=world, task=task)[-1].engine.state.replica for m in (method, fedavg(FAST)))
    assert all(torch.allclose(t, b["weights"][n], atol=1e-5) for n, t in a["weights"].items())


@pytest.mark.parametrize("network", [MLP(hidden=(16, 8)), User(user)], ids=["mlp", "user"])
def test_with_nothing_learned_entries_are_averaged_over_those_who_have_them(run, world, network, digits):  # type: ignore[no-untyped-def]
    task = Classification(digits.info, network)
    engine = run(SLICING, rounds=1, federation=world, task=task)[-1].engine
    state = engine.state
    before, own = clone(state.replica["weights"]), state.broadcast.per_site
    replies = [engine.workers.local.run(Job(i, 1, message=own[i])) for i in range(5)]
    engine.step()
    for name, t in state.replica["weights"].items():
        total, weight = torch.zeros_like(t), torch.zeros_like(t)
        for i, reply in enumerate(replies):
            model = own[i].parts["weights"][name] + reply.message.parts["delta"][name]
            block = tuple(slice(0, n) for n in model.shape)
            total[block] += reply.num_samples * model
            weight[block] += reply.num_samples
        assert torch.allclose(t, torch.where(weight > 0, total / weight, before[name]), atol=1e-5), name
        small = state.replica[part(0.5)][name]
        assert torch.allclose(small, t[tuple(slice(0, n) for n in small.shape)], atol=1e-6), name


def test_without_a_large_site_its_entries_stay(run, world, task):  # type: ignore[no-untyped-def]
    fewer = replace(world, sites=world.sites[:2])
    method = fedconv(FAST, ratios=(0.5, 0.75), first=0, later=0)
    engine = run(method, rounds=2, federation=fewer, task=task)[-1].engine
    now, first = engine.state.replica["weights"], task.model(0).state_dict()
    assert torch.equal(now["layers.0.weight"][12:], first["layers.0.weight"][12:])
    assert not torch.allclose(now["layers.0.weight"][:12], first["layers.0.weight"][:12])


# ------------------------------------------------------------------------------------------ what is learned


def test_learning_changes_kernels_and_leaves_what_they_are_applied_to(run, world, task):  # type: ignore[no-untyped-def]
    engine = run(LEARNING, rounds=1, federation=world, task=task)[-1].engine
    state = engine.state
    assert {"compress 0.75", "compress 0.5", "dilate 0.75 1", "dilate 0.5 2", "dilate 0.75 4"} == set(state.server)
    replica = {p: clone(tree) for p, tree in state.replica.items()}
    deltas = {str(i): {n: 0.01 * t for n, t in state.broadcast.per_site[i].parts["weights"].items()} for i in range(5)}
    told = {site: {"num_samples": 10} for site in deltas}
    engine.method.server.step(state.replica, state.server, Message("letters", deltas, {"from": told}), engine.context())
    assert all(equal(replica[p], state.replica[p]) for p in replica)


def test_learned_models_are_better_on_the_servers_rows_than_slices(run, world, task):  # type: ignore[no-untyped-def]
    """Sub-models of one large model: with kernels, and cut."""
    method = fedconv(FAST, ratios=RATIOS, first=10, later=5, lr=5e-3)
    state = run(method, rounds=2, federation=world, task=task)[-1].engine.state
    small = narrower(task.model(0), 0.5)
    losses = []
    for weights in (state.replica[part(0.5)], state.replica["weights"]):
        with torch.no_grad():
            for n, t in named_tensors(small).items():
                t.copy_(weights[n][tuple(slice(0, k) for k in t.shape)])
        losses.append(task.evaluate(small, world.public)["loss"])
    assert losses[0] < losses[1] - 0.1


def test_test_rows_decide_nothing(run, world, task):  # type: ignore[no-untyped-def]
    y = torch.zeros(len(world.test), dtype=torch.int64)
    wrong = replace(world.test, rows=None, columns={"x": world.test.column("x"), "y": y})
    a, b = (
        run(LEARNING, rounds=2, federation=f, task=task)[-1].engine.state.replica
        for f in (world, replace(world, test=wrong))
    )
    assert all(equal(a[p], b[p]) for p in a)


def test_of_all_epochs_the_best_on_held_out_rows_is_taken_and_maybe_none(world, task):  # type: ignore[no-untyped-def]
    """Weights that are learned themselves: a few good epochs help; after them, wild ones do not."""
    model = task.model(0)
    context = MergeContext(0, {}, 5, 0, task, world.public)

    def learned(start, lr):  # type: ignore[no-untyped-def]
        return LearnOnModels(lr=lr, batch_size=16)._learn(start, lambda t: t, model, 8, context, "test")

    start = clone(named_tensors(model))
    good = learned(start, 5e-3)
    assert not equal(good, start)
    assert equal(learned(good, 3.0), good)
    assert equal(named_tensors(model), start)


def test_rows_that_decide_train_nothing(world):  # type: ignore[no-untyped-def]
    taught, judged = set[int](), set[int]()

    class Watched:
        def mean_loss(self, model, batch):  # type: ignore[no-untyped-def]
            (taught if torch.is_grad_enabled() else judged).update(batch["id"].tolist())
            return model(batch["x"]).square().mean()

    public = world.public.with_column("id", torch.arange(150))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    context = MergeContext(0, {}, 5, 0, Watched(), public)
    for name in ("one", "two"):
        LearnOnModels()._learn(clone(named_tensors(model)), lambda t: t, model, 2, context, name)
    assert len(judged) == 30
    assert taught == set(range(150)) - judged


# ------------------------------------------------------------------------------------------ replies


def test_replies_of_a_wrong_size(run, world, task):  # type: ignore[no-untyped-def]
    engine = run(SLICING, rounds=1, federation=world, task=task)[-1].engine
    replica, server = engine.state.replica, engine.method.server
    with pytest.raises(BadReply, match="shapes of none of the models"):
        SubModels(RATIOS).check(Message("delta", {"delta": {"layers.0.weight": torch.zeros(2, 2)}}), replica)
    small = {n: torch.ones_like(t) for n, t in replica[part(0.5)].items()}
    zero = {n: torch.zeros_like(t) for n, t in replica["weights"].items()}
    told = {"from": {"0": {"num_samples": 5}, "3": {"num_samples": 9}}}
    letters = Message("letters", {"0": zero, "3": small}, told)  # site 3 has the large model
    after, _ = server.step(replica, {}, letters, engine.context())
    assert all(torch.allclose(t, replica["weights"][n]) for n, t in after.common.parts["weights"].items())


# ------------------------------------------------------------------------------------------ as a user


@pytest.mark.parametrize("network", [User(user), CNN(channels=(4, 6), dense=8)], ids=["user", "cnn"])
@pytest.mark.parametrize("parts", [{}, {"uplink": (Quantise(bits=8),)}], ids=["plain", "quantised"])
def test_other_networks(run, world, digits, network, parts):  # type: ignore[no-untyped-def]
    method = LEARNING.but(**parts)
    rows = run(method, rounds=2, federation=world, task=Classification(digits.info, network))
    assert all(not row.refused and not row.notes for row in rows)
    sites = rows[-1].engine.evaluate_sites("common")
    assert len(sites) == 5


def test_a_saved_run_loads_as_the_large_network(tmp_path):  # type: ignore[no-untyped-def]
    recipe = read_recipe(
        {"data": {"name": "sklearn_table", "table": "diabetes"}, "partition": "iid", "sites": 3, "public": 0.3, "rounds": 2,
         "method": {"name": "fedconv", "first": 1, "later": 1}, "model": {"name": "mlp", "hidden": [16]}}
    )  # fmt: skip
    run, _ = start(recipe, tmp_path / "r")
    assert run.go()["metrics"]["rmse"] > 0
    model = load_model(tmp_path / "r" / "model")
    assert named_tensors(model)["layers.0.weight"].shape == (16, 10)


def test_what_cannot_be_is_refused_with_a_sentence(run, world, task, digits):  # type: ignore[no-untyped-def]
    with pytest.raises(RecipeError, match="needs public data"):
        run(LEARNING, federation=replace(world, public=None), task=task)
    with pytest.raises(AtollError, match="no layer that can lose units"):
        run(LEARNING, federation=world, task=Classification(digits.info, Logistic()))
    with pytest.raises(RecipeError, match="ratios"):
        read_recipe({"method": {"name": "fedconv", "ratios": [1.0, 0.0]}})
    with pytest.raises(AtollError, match="shares of a layer's units"):
        fedconv(ratios=())
