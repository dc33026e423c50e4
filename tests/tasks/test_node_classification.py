"""Nodes of a graph: labels that are hidden, whole batches, and a user's own module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from atoll.core.errors import DataError, RecipeError
from atoll.core.tree import equal
from atoll.data.federation import make_federation
from atoll.data.partitions.iid import Iid
from atoll.data.sources.digits import Digits
from atoll.data.sources.stochastic_blocks import StochasticBlocks
from atoll.federated.local.training import Training
from atoll.federated.methods.centralised import centralised
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.fedkseed import fedkseed
from atoll.federated.simulate.attacks import Hostile, LabelFlip
from atoll.models.gcn import GCN
from atoll.models.mlp import MLP
from atoll.models.user import User
from atoll.recipes.recipe import read_recipe
from atoll.tasks.classification import Classification
from atoll.tasks.node_classification import NodeClassification


@pytest.fixture(scope="module")
def world():
    return make_federation(StochasticBlocks(nodes=120, degree=16), Iid(), sites=2, validation=0.0, test=0.25)


class Asks(nn.Module):
    """A user's module, as written for PyTorch Geometric."""

    def __init__(self, info, outputs: int) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.layer, self.seen = nn.Linear(2 * info.shape[0], outputs), 0

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        self.seen = len(x)
        around = torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]])
        return self.layer(torch.cat([x, around], 1))


@pytest.mark.parametrize("network", [MLP(hidden=(8,)), GCN(hidden=(8,)), User(Asks)], ids=["mlp", "gcn", "user"])
def test_only_labelled_nodes_count(world, network):
    task = NodeClassification(world.info, network)
    model, batch = task.model(0).eval(), world.sites[0].train.ready()
    hidden = batch["y"] < 0
    assert int(hidden.sum()) == 15
    losses = task.loss(model, batch)
    assert losses.shape == (60,)
    assert float(losses[hidden].detach().abs().max()) == 0
    alone = nn.functional.cross_entropy(task.predict(model, batch)[~hidden], batch["y"][~hidden])
    assert torch.allclose(task.mean_loss(model, batch), alone)
    assert torch.allclose(losses.mean(), alone)
    found = task.evaluate(model, world.sites[0].train)
    assert found["loss"] == pytest.approx(float(alone.detach()), rel=1e-5)
    right = (task.predict(model, batch).argmax(1) == batch["y"])[~hidden]
    assert found["accuracy"] == pytest.approx(float(right.float().mean()))
    nobody = {**batch, "y": torch.full_like(batch["y"], -1)}
    assert float(task.mean_loss(model, nobody).detach()) == 0


def test_a_step_sees_the_whole_graph_whatever_the_batch_size(run, world):
    task = NodeClassification(world.info, GCN(hidden=(8,), dropout=0.0))
    small, large = (
        run(fedavg(Training(batch_size=size, epochs=3)), rounds=2, task=task, federation=world)[-1].engine
        for size in (7, 10_000)
    )
    assert equal(small.state.replica["weights"], large.state.replica["weights"])
    asks = NodeClassification(world.info, User(Asks))
    engine = run(fedavg(Training(batch_size=7)), rounds=1, task=asks, federation=world)[-1].engine
    assert engine.workers.local.site_model(0).model.seen in (60, 120)


def test_other_methods_run_on_graphs(run, world):
    task = NodeClassification(world.info, GCN(hidden=(8,)))
    rows = run(fedkseed(steps=3, pool=16), rounds=1, task=task, federation=world)
    assert rows[-1].refused == {}
    pooled = run(centralised(), rounds=1, task=task, federation=centralised().topology.arrange(world))
    assert pooled[-1].refused == {}
    flipped = fedavg().but(local=Hostile(fedavg().local, (0,), LabelFlip()))
    assert run(flipped, rounds=1, task=task, federation=world)[-1].refused == {}


def test_neighbours_help_where_they_are_alike(run, world):
    steps = Training(lr=0.5, epochs=5)
    gcn, mlp = (
        run(fedavg(steps), rounds=10, task=NodeClassification(world.info, n), federation=world)[-1].metrics["accuracy"]
        for n in (GCN(hidden=(8,)), MLP(hidden=(8,)))
    )
    assert gcn > mlp + 0.1


def test_data_and_tasks_that_do_not_fit_are_sentences(world):
    with pytest.raises(DataError, match="use `task: node_classification`"):
        Classification(world.info).model(0)
    with pytest.raises(DataError, match="is not a graph of nodes with classes"):
        NodeClassification(Digits().load().train.info).model(0)
    with pytest.raises(RecipeError, match="homophily"):
        read_recipe({"data": {"name": "stochastic_blocks", "homophily": 1.5}})
    recipe = read_recipe({"data": "stochastic_blocks", "sites": 2})
    assert isinstance(recipe.make_task(world.info), NodeClassification)
