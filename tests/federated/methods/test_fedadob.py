"""FedAdOb: passports stay, models depend on them, and what a site saves does not hold them."""

from __future__ import annotations

import secrets

import pytest
import torch
from torch import nn

from atoll.core.errors import AtollError, RecipeError
from atoll.core.tree import equal, named_tensors
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.local.draw_passports import DrawPassports
from atoll.federated.local.training import Training
from atoll.federated.methods.fedadob import fedadob
from atoll.federated.select.uniform import Uniform
from atoll.federated.visit import Job
from atoll.models.cnn import CNN
from atoll.models.export import load_model
from atoll.models.logistic import Logistic
from atoll.models.passported import SECRET, passports
from atoll.models.user import User
from atoll.privacy.passports import draw_passports_
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import start
from atoll.tasks.classification import Classification

FAST = Training(lr=0.1, epochs=2)
TEST = {"test_seed": 1, "allow_insecure_test_seed": True}
IMAGES = CNN(channels=(4, 6), dense=12)


def site_tensors(engine, site: int):  # type: ignore[no-untyped-def]
    at, _ = engine.workers.local.place(site, engine.state.tags.get(site))
    return {n: t.clone() for n, t in at.tensors.items() if n.rpartition(".")[2] in SECRET}


def test_no_passport_travels(run, digits):  # type: ignore[no-untyped-def]
    engine = run(fedadob(FAST, layers=2, passports=3), rounds=2, task=Classification(digits.info, IMAGES))[-1].engine
    sent = [engine.workers.local.run(Job(0, 2, state_tag=engine.state.tags[0])).message, engine.state.broadcast.common]
    secret = site_tensors(engine, 0)
    assert len(secret) == 4
    for message in sent:
        names = {n for tree in message.parts.values() for n in tree}
        assert {"conv1.layer.weight", "conv2.decode.weight", "conv1.encode.bias"} <= names
        assert not any("passports" in n or "running" in n for n in names)
        flat = torch.cat([t.flatten() for tree in message.parts.values() for t in tree.values()])
        assert not any(torch.isin(t.flatten(), flat).any() for t in secret.values())


def test_a_site_draws_once_and_as_nobody_else(run):  # type: ignore[no-untyped-def]
    seen = []
    rows = run(fedadob(FAST, passports=2), rounds=3,
               on_merge=lambda engine, _: seen.append([site_tensors(engine, s) for s in range(5)]))  # fmt: skip
    assert all(equal(seen[0][s], seen[2][s]) for s in range(5))
    values = [t for own in seen[0] for t in own.values()]
    assert len(values) == 10
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    again = run(fedadob(FAST, passports=2), rounds=1)[-1].engine
    assert not equal(seen[0][0], site_tensors(again, 0))  # another run, the same seed
    first, second = (run(fedadob(FAST, passports=2, **TEST), rounds=1)[-1].engine for _ in range(2))
    assert equal(site_tensors(first, 0), site_tensors(second, 0))
    assert not equal(site_tensors(first, 0), site_tensors(first, 1))
    assert rows[-1].refused == {}


def test_passports_come_from_the_systems_generator(run, monkeypatch):  # type: ignore[no-untyped-def]
    asked = []
    real = secrets.token_bytes
    monkeypatch.setattr(secrets, "token_bytes", lambda n: asked.append(n) or real(n))
    run(fedadob(FAST, passports=2), rounds=1)
    assert sum(n for n in asked if n > 16) == 5 * 2 * 8 * (
        64 + 2 * 2 * 64
    )  # five sites, two kinds: means, and two draws an entry
    with pytest.raises(AtollError, match="allow_insecure_test_seed"):
        DrawPassports(test_seed=3)


def test_a_strangers_passports_cost_accuracy(run, digits_federation, digits_task):  # type: ignore[no-untyped-def]
    engine = run(fedadob(FAST, **TEST), rounds=8)[-1].engine
    right = [m["accuracy"] for m in engine.evaluate_sites("common").values()]
    wrong = []
    for site in range(5):
        for draw in range(3):
            at, _ = engine.workers.local.place(site, engine.state.tags[site])
            with torch.no_grad():
                draw_passports_(at.model, 5, 99 + draw, site)
            wrong.append(digits_task.evaluate(at.model, digits_federation.test)["accuracy"])
    assert sum(right) / 5 > 0.75
    assert sum(wrong) / 15 < 0.55
    assert min(wrong) < 0.15  # chance is 0.1; some draws happen to do nearly as well as one's own


def test_the_server_has_no_model_to_evaluate(run):  # type: ignore[no-untyped-def]
    rows = run(fedadob(FAST, passports=2), rounds=1)
    assert rows[-1].engine.evaluate_global() == {}


def test_decay_is_of_d_alone():
    net = nn.ModuleDict({"a": nn.ModuleDict({"decode": nn.Linear(2, 3), "encode": nn.Linear(3, 2)})})
    params = {n: p.detach() for n, p in net.named_parameters()}
    visit = type("V", (), {"state": {"passports": {}}, "dry": False, "model": net})()
    draw = DrawPassports(decay=0.5)
    grads = [torch.zeros_like(p) for p in params.values()]
    draw.correct_(draw.start(visit, params), grads, list(params.values()))
    for (name, p), g in zip(params.items(), grads, strict=True):
        assert torch.equal(g, 0.5 * p if name == "a.decode.weight" else torch.zeros_like(p)), name


def own(info, outputs):  # type: ignore[no-untyped-def]
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 12), nn.ReLU(), nn.Linear(12, outputs)
    )


@pytest.mark.parametrize("network", [IMAGES, User(own)], ids=["cnn", "user"])
@pytest.mark.parametrize(
    "parts", [{"uplink": (Quantise(bits=8),)}, {"select": Uniform(fraction=0.5)}], ids=["quantised", "partial"]
)
def test_other_networks_and_parts(run, digits, network, parts):  # type: ignore[no-untyped-def]
    task = Classification(digits.info, network)
    rows = run(fedadob(FAST, layers=2, passports=2, **TEST).but(**parts), rounds=2, task=task)
    assert [r.refused for r in rows] == [{}, {}]


def test_batches_of_one_train(run):  # type: ignore[no-untyped-def]
    assert run(fedadob(Training(lr=0.01, batch_size=1, clip_norm=1.0), passports=2, **TEST), rounds=1)[-1].refused == {}


def test_what_cannot_be_guarded_is_a_sentence(run, digits):  # type: ignore[no-untyped-def]
    with pytest.raises(AtollError, match="guard 1 layers before a network's last one, and this network has 1"):
        run(fedadob(), rounds=1, task=Classification(digits.info, Logistic()))
    with pytest.raises(AtollError, match=r"guard 5 layers .* or lower `layers`"):
        run(fedadob(layers=5), rounds=1, task=Classification(digits.info, IMAGES))
    with pytest.raises(RecipeError, match="reach"):
        read_recipe({"method": {"name": "fedadob", "reach": 0}})


def test_a_saved_model_has_scales_and_no_passports(tmp_path, digits):  # type: ignore[no-untyped-def]
    import safetensors.torch

    recipe = read_recipe(
        {"name": "p", "sites": 2, "rounds": 2, "limit": 300, "model": {"name": "cnn", "channels": [4, 6], "dense": 12},
         "method": {"name": "fedadob", "layers": 2, "passports": 3}}
    )  # fmt: skip
    run, _ = start(recipe, tmp_path / "run")
    run.go()
    folder = tmp_path / "run" / "model" / "site0"
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    assert not any("passport" in n or "encode" in n for n in saved)
    model = load_model(folder)
    assert not list(passports(model))
    assert set(named_tensors(model)) == set(saved)
    assert isinstance(model.conv1[1], nn.BatchNorm2d)
    assert model(digits.ready(torch.arange(3))["x"]).shape == (3, 10)
    for state in (tmp_path / "run" / "state" / "sites").iterdir():
        assert state.stat().st_mode & 0o077 == 0 or (state.parent.stat().st_mode & 0o077) == 0, "others can read it"
