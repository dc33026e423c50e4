"""The federated spectral graph transformer: what travels, what a site keeps, and that it learns from neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from atoll.core.errors import AtollError, RecipeError
from atoll.core.tree import equal
from atoll.data import graph
from atoll.data.federation import make_federation
from atoll.data.partitions.communities import Communities
from atoll.data.partitions.iid import Iid
from atoll.data.partitions.quantity_skew import QuantitySkew
from atoll.data.sources.stochastic_blocks import StochasticBlocks
from atoll.federated.local.training import Training
from atoll.federated.methods.fed_gnodeformer import fed_gnodeformer
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.visit import Job
from atoll.models.export import load_model
from atoll.models.gcn import GCN
from atoll.models.mlp import MLP
from atoll.models.spectral_transformer import Spectral, SpectralNet, SpectralTransformer
from atoll.models.user import User
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import start
from atoll.tasks.node_classification import NodeClassification

SMALL = Spectral(dim=8, layers=2)
FAST = Training(optimizer="adam", lr=0.01, epochs=3)


def blocks(nodes: int = 120, partition=Iid(), homophily: float = 0.8, sites: int = 3):  # type: ignore[no-untyped-def]
    source = StochasticBlocks(nodes=nodes, degree=16, homophily=homophily, noise=3.0)
    return make_federation(source, partition, sites=sites, validation=0.0, test=0.25)


@pytest.fixture(scope="module")
def world():
    return blocks()


@pytest.fixture(scope="module")
def task(world):
    return NodeClassification(world.info, MLP(hidden=(8,)))


def reply(engine, site: int):  # type: ignore[no-untyped-def]
    return engine.workers.local.run(Job(site, engine.round)).message


def test_a_message_says_nothing_of_the_size_of_a_graph(run, task):
    """Sites of different size, and a federation of other size: the same names, shapes and bytes."""
    sizes = []
    for nodes, partition in ((120, QuantitySkew(alpha=1.0)), (200, Iid())):
        federation = blocks(nodes, partition)
        engine = run(fed_gnodeformer(FAST, SMALL), rounds=1, task=task, federation=federation)[-1].engine
        assert len({len(s.train) for s in federation.sites}) > 1 or nodes == 200
        messages = [reply(engine, site) for site in range(3)]
        sizes += [m.payload_bytes for m in messages]
        counts = {len(s.train) for s in federation.sites} | {nodes}
        assert not any(set(t.shape) & (counts - {4, 8, 16, 24}) for m in messages for t in m.parts["delta"].values())
    assert len(set(sizes)) == 1


def test_every_site_counts_alike(run, task):
    federation = blocks(120, QuantitySkew(alpha=1.0))
    engine = run(fed_gnodeformer(FAST, SMALL), rounds=1, task=task, federation=federation)[-1].engine
    before = {n: t.clone() for n, t in engine.state.replica["weights"].items()}
    replies = [reply(engine, site).parts["delta"] for site in range(3)]
    engine.step()
    for name, after in engine.state.replica["weights"].items():
        assert torch.allclose(after, before[name] + sum(r[name] for r in replies) / 3, atol=1e-6), name


def test_a_site_works_out_its_spectrum_once(run, task, world):
    graph._spectrum.cache_clear()
    rows = run(fed_gnodeformer(FAST, SMALL), rounds=4, task=task, federation=world)
    rows[-1].engine.evaluate_sites()
    assert graph._spectrum.cache_info().misses == 4  # three sites, and the common test graph
    assert graph._spectrum.cache_info().hits > 30


@pytest.mark.parametrize("homophily", [0.8, 0.0])
def test_it_learns_from_neighbours_alike_or_not(run, homophily):
    federation = blocks(240, Iid(), homophily, sites=2)
    task = NodeClassification(federation.info, MLP(hidden=(8,)))
    quiet = Spectral(dim=8, layers=2, dropout=0.0, feature_dropout=0.0, mixing_dropout=0.0)
    engine = run(fed_gnodeformer(FAST, quiet), rounds=20, task=task, federation=federation)[-1].engine
    alone = run(fedavg(FAST), rounds=20, task=task, federation=federation)[-1].engine
    ours, theirs = (sum(m["accuracy"] for m in e.evaluate_sites().values()) / 2 for e in (engine, alone))
    assert ours > theirs + 0.1


def own(info, outputs):  # type: ignore[no-untyped-def]
    return nn.Sequential(nn.Linear(info.shape[0], 6), nn.Tanh(), nn.Linear(6, outputs))


@pytest.mark.parametrize("network", [User(own), GCN(hidden=(6,)), SpectralTransformer(MLP(hidden=(6,)), SMALL)],
                         ids=["user", "gcn", "own spectral"])  # fmt: skip
def test_any_network_becomes_the_encoder_of_nodes(run, world, network):
    rows = run(fed_gnodeformer(FAST, SMALL), rounds=2, task=NodeClassification(world.info, network), federation=world)
    assert rows[-1].refused == {}
    model = rows[-1].engine.workers.local.site_model(None).model
    assert isinstance(model, SpectralNet)
    assert not isinstance(model.encoder, SpectralNet)


def test_seeds_start_different_transformers(run, task, world):
    first, again, other = (
        run(fed_gnodeformer(FAST, SMALL), rounds=1, task=task, federation=world, seed=s)[-1].engine.state.replica
        for s in (0, 0, 1)
    )
    assert equal(first["weights"], again["weights"])
    name = "spectra.embed.weight"
    assert not torch.allclose(first["weights"][name], other["weights"][name], atol=0.05)


def test_where_it_cannot_be_applied_is_a_sentence(run, world):
    with pytest.raises(AtollError, match="needs the edges of a graph"):
        run(fed_gnodeformer(), rounds=1)
    bare = NodeClassification(world.info, User(lambda: nn.PReLU()))
    with pytest.raises(AtollError, match="ends with a linear layer"):
        run(fed_gnodeformer(), rounds=1, task=bare, federation=world)
    with pytest.raises(RecipeError, match="order"):
        read_recipe({"method": {"name": "fed_gnodeformer", "spectral": {"order": 3}}})


def test_a_saved_model_loads_and_says_the_same(tmp_path, world):
    recipe = read_recipe(
        {"name": "g", "data": {"name": "stochastic_blocks", "nodes": 120, "degree": 16}, "partition": "communities",
         "sites": 3, "rounds": 2, "model": {"name": "mlp", "hidden": [8]},
         "method": {"name": "fed_gnodeformer", "spectral": {"dim": 8, "layers": 2}}}
    )  # fmt: skip
    run, _ = start(recipe, tmp_path / "run")
    run.go()
    model = load_model(tmp_path / "run" / "model")
    assert isinstance(model, SpectralNet)
    task = recipe.make_task(recipe.federation().info)
    live = [e for e in (tmp_path / "run" / "events.jsonl").read_text().splitlines() if '"round"' in e]
    accuracy = task.evaluate(model, recipe.federation().test)["accuracy"]
    assert f'"accuracy": {accuracy}' in live[-1]
    assert isinstance(recipe.partition, Communities)
