"""SemiPFL: what travels, who learns from which rows, and predictions without a label."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from atoll.core.errors import AtollError, DataError, RecipeError
from atoll.core.message import Message
from atoll.core.tree import clone, equal, named_tensors
from atoll.data.dataset import Dataset, Federation, Info, SiteData
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.local.training import Training
from atoll.federated.method import MergeContext
from atoll.federated.methods.semipfl import semipfl
from atoll.federated.schedules.buffered import Buffered
from atoll.federated.select.uniform import Uniform
from atoll.federated.server.hyper_server import HyperServer, look, similar
from atoll.federated.visit import Job
from atoll.models.cnn import CNN
from atoll.models.coded import bounded, coded
from atoll.models.export import load_model
from atoll.models.hypernetwork import generate
from atoll.models.logistic import Logistic
from atoll.models.mlp import MLP
from atoll.models.user import User
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import start
from atoll.tasks.classification import Classification
from atoll.tasks.regression import Regression

FAST = semipfl(Training(lr=2e-3, optimizer="adam", epochs=3, batch_size=16))


@pytest.fixture(scope="module")
def world(digits):  # type: ignore[no-untyped-def]
    """Four sites, two of which see negatives; sites 0 and 1 own the same rows as do 2 and 3. One label in fifty."""
    rows = digits.select(range(1000))
    x = rows.column("x")

    def site(first: int, negative: bool) -> SiteData:
        at = torch.arange(first, first + 200)
        seen = Dataset({"x": 16 - x[at] if negative else x[at], "y": rows.column("y")[at]}, digits.info)
        few, test = seen.select(range(3)), seen.select(range(150, 200))
        return SiteData(few, seen.select([]), test, seen.select(range(3, 150)).without_column("y"))

    sites = (site(0, False), site(0, False), site(200, True), site(200, True))
    negative = torch.arange(300) % 2
    pool = digits.select(range(400, 700))
    seen = torch.where(negative.view(-1, 1, 1, 1) == 1, 16 - pool.column("x"), pool.column("x"))
    public = Dataset({"x": seen, "y": pool.column("y"), "kind": negative}, digits.info)
    return Federation(sites, digits.select(range(700, 800)), public=public, info=digits.info)


@pytest.fixture
def task(digits):  # type: ignore[no-untyped-def]
    return Classification(digits.info, MLP(hidden=(64, 32)))


def two_heads(**options):  # type: ignore[no-untyped-def]
    return semipfl(Training(lr=4e-3, optimizer="adam", epochs=2, batch_size=16), heads=2, subjects="kind", **options)


# ------------------------------------------------------------------------------------------ what travels


def test_weights_of_the_autoencoder_go_up_and_nothing_else(run, world, task):  # type: ignore[no-untyped-def]
    engine = run(two_heads(), rounds=2, federation=world, task=task)[-1].engine
    s = engine.state
    job = Job(1, 2, message=s.broadcast.per_site[1], state_tag=s.tags[1])
    reply = engine.workers.local.run(job).message
    names = set(named_tensors(engine.workers.local.site_model(1).model.autoencoder))
    assert reply.parts.keys() == {"delta"}
    assert set(reply.parts["delta"]) == names
    for site in range(4):
        came = s.broadcast.per_site[site].parts
        assert came.keys() == {"autoencoder", "heads", "errors"}
        assert set(came["autoencoder"]) == names
        assert not any("autoencoder" in n for n in came["heads"])


def test_every_site_has_an_autoencoder_of_its_own(run, world, task):  # type: ignore[no-untyped-def]
    """One module serves all visits; what it is left with is nobody's."""
    engine = run(two_heads(server_lr=0.01), rounds=6, federation=world, task=task)[-1].engine
    base, made = engine.state.replica["autoencoder"], engine.state.broadcast.per_site
    fresh = coded(task.model(0), world.info, 2)
    assert base.keys() == named_tensors(fresh.autoencoder).keys()
    one, twin, other = (made[i].parts["autoencoder"]["encoder.layers.0.weight"] for i in (0, 1, 2))
    assert float((one - other).norm()) > max(0.01, 5 * float((one - twin).norm()))
    before = clone(base)
    for site in (2, 0):
        engine.workers.local.run(Job(site, 6, message=made[site], state_tag=engine.state.tags[site]))
    assert equal(before, engine.state.replica["autoencoder"])


def test_a_site_predicts_with_the_autoencoder_that_its_heads_were_trained_on(run, world, task):  # type: ignore[no-untyped-def]
    sent, kept = [], []

    def watch(engine, _):  # type: ignore[no-untyped-def]
        state = engine.workers.local.states.get(0, engine.state.tags[0])
        sent.append(clone(state.parts["local.autoencoder"]))
        private = state.parts["private"]
        kept.append({n.removeprefix("autoencoder."): t.clone() for n, t in private.items() if n.startswith("auto")})

    engine = run(two_heads(), rounds=3, federation=world, task=task, on_merge=watch)[-1].engine
    assert equal(kept[1], sent[0])
    assert equal(kept[2], sent[1])
    assert not equal(sent[1], sent[0])
    at, public = engine.workers.local.site_model(0), world.public
    _, error = look(at.model, sent[2], public.ready()["x"], world.info)
    told = engine.state.broadcast.per_site[0].parts["errors"]["rows"]
    kind = public.column("kind")
    assert torch.allclose(told, torch.stack([error[kind == i].mean() for i in (0, 1)]), rtol=1e-4)


# ------------------------------------------------------------------------------------------ the hypernetwork


def test_the_server_moves_towards_what_sites_made_of_their_autoencoders(world, task):  # type: ignore[no-untyped-def]
    net = coded(task.model(0), world.info, 2)
    base = clone(named_tensors(net.autoencoder))
    g = torch.Generator().manual_seed(2)
    deltas = {str(i): {n: 0.01 * torch.randn(t.shape, generator=g) for n, t in base.items()} for i in (0, 3)}
    server = HyperServer(heads=2, subjects="kind", lr=1e-3)
    context = MergeContext(0, {"autoencoder": base}, 4, 0, task, world.public)
    _, state = server.step(context.replica, {}, Message("letters", deltas), context)
    made = generate(state["phi"], [0, 3])
    wanted = torch.stack([torch.cat([t.flatten() for t in d.values()]) for d in deltas.values()])
    assert float((made * wanted).sum()) > 0
    # Adam's first step is lr times the sign of the mean gradient, wherever that is not tiny beside 1e-8.
    mean = wanted.mean(0)
    clear = mean.abs() > 1e-4
    assert torch.allclose(state["phi"]["offset"][clear], 1e-3 * mean.sign()[clear], atol=1e-5)
    again, state = server.step(context.replica, state, Message("letters", deltas), replace(context, round=1))
    assert int(state["adam"]["steps"]) == 2
    assert set(again.per_site) == {0, 1, 2, 3}
    assert "heads" not in again.per_site[1].parts  # it has sent nothing that heads could be trained on


def test_sites_with_equal_rows_come_to_equal_embeddings(run, world, task):  # type: ignore[no-untyped-def]
    state = run(two_heads(server_lr=0.01), rounds=7, federation=world, task=task)[-1].engine.state
    e = state.server["phi"]["embedding"]
    between = float((e[:2].mean(0) - e[2:].mean(0)).norm())
    assert between > 0.01
    assert float((e[0] - e[1]).norm()) < 0.3 * between
    assert float((e[2] - e[3]).norm()) < 0.3 * between


# ------------------------------------------------------------------------------------------ the server's rows


def test_rows_are_kept_one_by_one(world, task):  # type: ignore[no-untyped-def]
    """Which rows are like a site's does not depend on the company in which they are looked at."""
    net = coded(task.model(0), world.info, 2)
    x = world.public.ready()["x"]
    theta = clone(named_tensors(net.autoencoder))
    code, error = look(net, theta, x, world.info)
    assert code.shape == (300, 32)
    for i in (0, 7, 299):
        one, alone = look(net, theta, x[i : i + 1], world.info)
        made = net.autoencoder.decoder(one).tanh()
        by_hand = sum((a - b) ** 2 for a, b in zip(made[0].tolist(), bounded(x[i : i + 1], world.info)[0].tolist()))  # noqa: B905
        assert float(alone[0]) == pytest.approx(by_hand / 64, rel=1e-5)
        assert float(error[i]) == pytest.approx(float(alone[0]), rel=1e-5)


def test_rows_like_the_sites_train_heads_and_else_the_best_do():  # type: ignore[no-untyped-def]
    error = torch.tensor([0.01, 0.3, 0.04, 0.2, 0.049, 0.05])
    assert similar(error, 0.05, 2).tolist() == [0, 2, 4]
    assert similar(error, 0.001, 2).tolist() == [0, 2]
    assert similar(error, 0.02, 3).tolist() == [0, 2, 4]
    assert similar(error[:2], 0.001, 32).tolist() == [0, 1]


def test_each_head_learns_from_one_subject(world, task):  # type: ignore[no-untyped-def]
    """Only its own shard's labels reach a head."""
    base = clone(named_tensors(coded(task.model(0), world.info, 2).autoencoder))
    zero = {"0": {n: torch.zeros_like(t) for n, t in base.items()}}
    y = world.public.column("y").clone()
    y[world.public.column("kind") == 1] = 0  # other labels for the second head
    other = replace(world.public, columns={**world.public.columns, "y": y})
    found = []
    for public in (world.public, other):
        context = MergeContext(0, {"autoencoder": base}, 4, 0, task, public)
        server = HyperServer(heads=2, subjects="kind")
        found.append(server.step(context.replica, {}, Message("letters", zero), context)[0].per_site[0].parts["heads"])
    same = {n: torch.equal(t, found[1][n]) for n, t in found[0].items() if n.endswith("6.weight")}
    assert same == {"0.6.weight": True, "1.6.weight": False}


@pytest.mark.parametrize(
    ("hidden", "mirror"), [((256, 128, 64), [64, 128, 256, 64]), ((32, 32), [32, 32, 64]), ((20,), [20, 64])]
)
def test_the_decoder_mirrors_the_encoder(digits, hidden, mirror):  # type: ignore[no-untyped-def]
    net = coded(MLP(hidden).build(digits.info, 10), digits.info, 2)
    layers = [m for m in net.autoencoder.decoder.modules() if isinstance(m, nn.Linear)]
    assert [layers[0].in_features, *(m.out_features for m in layers)] == mirror


@pytest.mark.parametrize("kind", ["image", "table"])
def test_what_is_reconstructed_is_bounded(kind):  # type: ignore[no-untyped-def]
    info = Info(name="b", kind=kind, shape=(1, 4, 4), mean=0.3, scale=0.5, unit=1 / 16)
    raw = torch.arange(17, dtype=torch.uint8)[:16].view(1, 1, 4, 4)
    out = bounded(Dataset({"x": raw}, info).ready()["x"], info)
    assert out.shape == (1, 16)
    assert float(out.abs().max()) <= 1
    if kind == "image":
        assert torch.allclose(out[0], 2 * torch.arange(16) / 16 - 1, atol=1e-6)
    assert bool((out.diff() > 0).all())


# ------------------------------------------------------------------------------------------ predictions


def test_a_site_without_a_label_predicts(run, world, task):  # type: ignore[no-untyped-def]
    bare = replace(world, sites=tuple(replace(s, train=s.train.select([])) for s in world.sites))
    longer = Training(lr=5e-3, optimizer="adam", epochs=20, batch_size=16)
    engine = run(two_heads(head_training=longer), rounds=4, federation=bare, task=task)[-1].engine
    assert all(flops > 0 for flops in engine.row.flops.values())  # counted on rows that have labels to test by
    found = [m["accuracy"] for m in engine.evaluate_sites().values()]
    assert sum(found) / 4 > 0.3
    assert min(found) > 0.2
    at, _ = engine.workers.local.place(2, engine.state.tags[2])
    shares = at.model.mixture.mixing.detach().softmax(0)
    assert float(shares[1]) > 0.6  # the head of those who see negatives too
    before = engine.state.broadcast.per_site[2]
    engine.step()
    at, _ = engine.workers.local.place(2, engine.state.tags[2])
    inverse = 1 / before.parts["errors"]["rows"]
    assert torch.allclose(at.model.mixture.mixing.detach().softmax(0), inverse / inverse.sum(), atol=1e-5)


def test_labels_change_the_heads_and_inputs_the_code(run, world, task):  # type: ignore[no-untyped-def]
    """A label moves no weight that travels; an unlabelled row does."""
    y = [replace(s, train=s.train.with_column("y", 9 - s.train.column("y"))) for s in world.sites]
    fewer = [replace(s, unlabelled=s.unlabelled.select(range(60))) for s in world.sites]
    runs = [
        run(two_heads(), rounds=2, federation=replace(world, sites=tuple(s)), task=task)[-1].engine
        for s in (world.sites, y, fewer)
    ]
    a, b, c = (e.state.server["phi"] for e in runs)
    assert equal(a, b)
    assert not equal(a, c)
    one, other = (e.workers.local.place(0, e.state.tags[0])[0].model.mixture.mixing for e in runs[:2])
    assert not torch.equal(one, other)


def user_conv(info, outputs):  # type: ignore[no-untyped-def]
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 24), nn.ReLU(), nn.Linear(24, outputs)
    )


@pytest.mark.parametrize(
    "network", [User(user_conv), CNN(channels=(4, 6), dense=16, norm="group")], ids=["user", "cnn"]
)
def test_other_networks(run, digits, world, network):  # type: ignore[no-untyped-def]
    task = Classification(digits.info, network)
    row = run(two_heads(), rounds=2, federation=world, task=task)[-1]
    assert row.refused == {}
    assert row.notes == []


def test_a_table_with_a_number_to_predict(tmp_path):  # type: ignore[no-untyped-def]
    recipe = read_recipe(
        {"data": {"name": "sklearn_table", "table": "diabetes"}, "partition": "iid", "sites": 3, "public": 0.3,
         "labelled": 0.1, "rounds": 3, "method": {"name": "semipfl", "heads": 2}, "model": {"name": "mlp", "hidden": [16]}}
    )  # fmt: skip
    run, _ = start(recipe, tmp_path / "r")
    assert run.go()["metrics"]["rmse"] > 0
    assert isinstance(run.prepared.setup.task, Regression)


def test_a_saved_model_loads(tmp_path):  # type: ignore[no-untyped-def]
    recipe = read_recipe(
        {"data": "digits", "sites": 2, "limit": 300, "public": 0.3, "labelled": 0.05, "rounds": 2,
         "method": {"name": "semipfl", "heads": 2}, "model": {"name": "mlp", "hidden": [16]}}
    )  # fmt: skip
    run, _ = start(recipe, tmp_path / "r")
    run.go()
    model = load_model(tmp_path / "r" / "model" / "site1")
    x = run.prepared.setup.federation.test.ready()["x"]
    assert torch.allclose(model(x).exp().sum(1), torch.ones(len(x)), atol=1e-5)


def test_two_processes_give_the_same_bits_with_a_codec_and_some_sites(run, world, task):  # type: ignore[no-untyped-def]
    states = []
    for backend in ({}, {"backend": ProcessPool(workers=2)}):
        row = run(
            two_heads().but(uplink=(Quantise(bits=8),), select=Uniform(count=2)),
            rounds=2,
            federation=world,
            task=task,
            **backend,
        )[-1]
        states.append(row.engine.state.server)
    assert all(equal(states[0][p], states[1][p]) for p in states[0])


# ------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be_is_refused_with_a_sentence(run, world, task, digits):  # type: ignore[no-untyped-def]
    with pytest.raises(RecipeError, match="needs public data"):
        run(FAST, federation=replace(world, public=None), task=task)
    with pytest.raises(RecipeError, match="Synchronous"):
        run(FAST.but(schedule=Buffered(k=2)), federation=world, task=task)
    with pytest.raises(AtollError, match="nothing before its last linear layer"):
        run(FAST, federation=world, task=Classification(digits.info, Logistic()))
    with pytest.raises(AtollError, match="is counted; use `norm: group`"):
        run(FAST, federation=world, task=Classification(digits.info, CNN(norm="batch")))
    with pytest.raises(AtollError, match="ends in a linear layer"):
        run(FAST, federation=world, task=Classification(digits.info, User(lambda outputs: nn.Conv2d(1, outputs, 8))))
    with pytest.raises(RecipeError, match="similar"):
        read_recipe({"method": {"name": "semipfl", "similar": -1}})
    text = Info(name="letters", kind="text", shape=(8,), num_classes=20)
    with pytest.raises(DataError, match="cannot read tokens"):
        coded(nn.Linear(2, 2), text, 2)
    few = replace(world, public=world.public.select(range(5)))
    notes = run(FAST, rounds=1, federation=few, task=task)[0].notes
    assert "fewer than two" in notes[0]
