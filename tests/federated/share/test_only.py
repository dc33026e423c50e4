"""Only the named tensors train, and only the shared ones travel."""

from __future__ import annotations

import pytest
import torch

from atoll.core.errors import RecipeError
from atoll.core.tree import equal, named_tensors, pick
from atoll.federated.methods.custom import custom
from atoll.federated.share.only import Only
from atoll.federated.visit import Job
from atoll.models.cnn import CNN
from atoll.recipes.recipe import read_recipe
from atoll.tasks.classification import Classification

NET = CNN(channels=(4, 6), dense=12, norm="batch")


def test_the_body_keeps_its_bits_and_the_head_travels(run, digits):
    task = Classification(digits.info, NET)
    start = named_tensors(task.model(0))
    engine = run(custom(share=Only(shared=("dense2.*",), private=("dense1.*", "dense2.bias"))), rounds=2, task=task)[
        -1
    ].engine
    reply = engine.workers.local.run(Job(0, 2, state_tag=engine.state.tags[0]))
    assert set(reply.message.parts["delta"]) == set(engine.state.replica["weights"]) == {"dense2.weight"}
    kept = engine.workers.local.states.get(0, engine.state.tags[0]).parts["private"]
    assert set(kept) == {"dense1.weight", "dense1.bias", "dense2.bias"}
    assert not torch.equal(kept["dense1.weight"], start["dense1.weight"])
    at, _ = engine.workers.local.place(0, engine.state.tags[0])
    body = [n for n in start if not n.startswith("dense")]
    assert equal(pick(at.tensors, body), pick(start, body))


def test_a_pattern_that_fits_nothing_is_refused(run):
    with pytest.raises(RecipeError, match=r"no tensor of the model is called `haed\.\*`"):
        run(custom(share=Only(shared=("haed.*",))), rounds=1)


def test_a_recipe_can_say_it():
    method = read_recipe({"method": {"name": "custom", "share": {"name": "only", "shared": ["head.*"]}}}).method
    assert method.share == Only(shared=("head.*",))
