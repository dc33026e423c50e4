"""A server that trains on its own rows: the baseline of methods that need public data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atoll.core.errors import RecipeError
from atoll.core.tree import equal
from atoll.federated.local.training import Training
from atoll.federated.methods.custom import custom
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.fedwon import fedwon
from atoll.federated.server.train_on_public import TrainOnPublic
from atoll.models.cnn import CNN
from atoll.tasks.classification import Classification


@pytest.fixture
def world(digits_federation):  # type: ignore[no-untyped-def]
    test = digits_federation.test
    return replace(digits_federation, test=test.select(range(100, 300)), public=test.select(range(100)))


def test_without_the_sites_it_is_a_model_of_the_public_rows_alone(run, world):  # type: ignore[no-untyped-def]
    alone = custom(server=TrainOnPublic(Training(lr=0.3, epochs=10), lr=0))
    one = run(alone, rounds=3, federation=world)[-1]
    fewer = replace(world, sites=world.sites[:2])
    two = run(alone, rounds=3, federation=fewer)[-1]
    assert equal(one.engine.state.replica["weights"], two.engine.state.replica["weights"])
    assert one.metrics["accuracy"] > 0.5
    y = world.public.column("y").clone()
    labels = replace(world.public, rows=None, columns={"x": world.public.column("x"), "y": (y + 1) % 10})
    assert run(alone, rounds=3, federation=replace(world, public=labels))[-1].metrics["accuracy"] < 0.3


def test_with_steps_of_no_size_it_is_fedavg(run, world):  # type: ignore[no-untyped-def]
    still = fedavg().but(server=TrainOnPublic(Training(lr=1e-30)))
    a, b = (run(m, rounds=2, federation=world)[-1].engine.state.replica["weights"] for m in (still, fedavg()))
    assert all(torch.equal(a[n], b[n]) for n in b)


def test_refusals(run, world, digits):  # type: ignore[no-untyped-def]
    with pytest.raises(RecipeError, match="needs public data"):
        run(fedavg().but(server=TrainOnPublic()), federation=replace(world, public=None))
    task = Classification(digits.info, CNN(channels=(2, 2), dense=4))
    notes = run(fedwon().but(server=TrainOnPublic()), rounds=1, federation=world, task=task)[0].notes
    assert "trains a plain network" in notes[0]
