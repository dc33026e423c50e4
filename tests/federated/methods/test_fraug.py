"""FRAug: what leaves a site, who trains whom, and that without invented features it is FedAvg."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atoll.core.errors import RecipeError
from atoll.core.tree import clone, equal, named_tensors
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.local import augment_features
from atoll.federated.local.augment_features import AugmentFeatures, entropy, labels_like
from atoll.federated.local.local_sgd import LocalSGD
from atoll.federated.local.training import Training
from atoll.federated.methods.custom import custom
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.fraug import fraug
from atoll.federated.share.only import Only
from atoll.federated.visit import Job
from atoll.models.augmented import AugmentedNet
from atoll.models.cnn import CNN
from atoll.models.export import load_model
from atoll.models.mlp import MLP
from atoll.models.user import User
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import start
from atoll.tasks.classification import Classification
from atoll.tasks.regression import Regression

CNN_BN = CNN(channels=(4, 6), dense=12, norm="batch")
FAST = Training(lr=0.05, batch_size=64, momentum=0.5, step="stock")


@pytest.fixture
def images(digits):  # type: ignore[no-untyped-def]
    return Classification(digits.info, CNN_BN)


def test_transform_means_and_statistics_never_leave(run, images):  # type: ignore[no-untyped-def]
    engine = run(fraug(FAST, ramp=3), rounds=2, task=images)[-1].engine
    reply = engine.workers.local.run(Job(0, 2, state_tag=engine.state.tags[0]))
    model = named_tensors(engine.workers.local.site_model(0).model)
    for tree in (*reply.message.parts.values(), *engine.state.broadcast.common.parts.values()):
        assert not any(n.startswith(("transform.", "means", "met")) for n in tree)
        assert not any("running" in n and n.startswith("body.") for n in tree)
        parameters = dict(engine.workers.local.site_model(0).model.body.named_parameters())
        assert {f"body.{n}" for n in parameters} == {n for n in tree if n.startswith("body.")}
        assert {n for n in model if n.startswith("generator.") and "num_batches" not in n} == {
            n for n in tree if n.startswith("generator.")
        }  # its norms are averaged, statistics and all
    kept = engine.workers.local.states.get(0, engine.state.tags[0]).parts["private"]
    assert {"means", "met", "transform.0.weight", "transform.4.running_mean", "body.norm1.running_var"} <= set(kept)
    other = engine.workers.local.states.get(1, engine.state.tags[1]).parts["private"]
    assert not torch.equal(kept["transform.0.weight"], other["transform.0.weight"])


def test_without_invented_features_it_is_fedavg(run, digits):  # type: ignore[no-untyped-def]
    task = Classification(digits.info, MLP(hidden=(16,)))
    ours, plain = (run(m, rounds=2, task=task)[-1].engine.state.replica for m in (fraug(FAST, most=0.0), fedavg(FAST)))
    assert equal(
        {n.removeprefix("body."): t for n, t in ours["weights"].items() if n.startswith("body.")}, plain["weights"]
    )


def test_and_with_batch_norms_fedavg_with_local_statistics(run, images):  # type: ignore[no-untyped-def]
    names = [n for n, _ in images.model(0).named_parameters()]
    local = custom(share=Only(shared=tuple(names), private=("*.running_*",)), local=LocalSGD(FAST))
    ours, plain = (run(m, rounds=3, task=images)[-1].engine for m in (fraug(FAST, most=0.0), local))
    weights = plain.state.replica["weights"]
    assert equal({n: ours.state.replica["weights"][f"body.{n}"] for n in weights}, weights)
    kept, plainly = (e.workers.local.states.get(2, e.state.tags[2]).parts["private"] for e in (ours, plain))
    assert torch.equal(kept["body.norm1.running_mean"], plainly["norm1.running_mean"])


def test_each_step_moves_its_own_parameters_by_its_own_loss(run, images, digits_federation, monkeypatch):  # type: ignore[no-untyped-def]
    """One batch: model, generator and transform, each from the paper's loss, in this order."""
    work = AugmentFeatures(
        training=Training(lr=0.1, batch_size=10_000), most=0.5, ramp=1, lr_generator=0.2, lr_transform=0.3, unlike=0.7,
        near=0.4,
    )  # fmt: skip
    engine = run(fraug(FAST).but(local=work), rounds=1, task=images)[-1].engine
    worker, site = engine.workers.local, 1
    drawn = []
    monkeypatch.setattr(augment_features, "labels_like", lambda *a: drawn.append(labels_like(*a)) or drawn[-1])
    noises, rand = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: noises.append(rand(*a, **k)) or noises[-1])
    at, _ = worker.place(site, engine.state.tags[site])
    before = clone(at.tensors)
    worker.run(Job(site, 1, state_tag=engine.state.tags[site]))
    monkeypatch.undo()
    after, (labels,) = clone(at.tensors), drawn
    n = len(digits_federation.sites[site].train)
    assert [z.shape for z in noises] == [(n, 6), (n, 6)]  # d / 2; as many as the batch has rows

    net = at.model.train()
    order = torch.randperm(n, generator=_batches(engine, site))
    batch = digits_federation.sites[site].train.ready(order)

    def load(*groups: tuple[dict[str, torch.Tensor], str]) -> None:
        for tensors, prefix in groups:
            for name, t in at.tensors.items():
                if name.startswith(prefix):
                    t.copy_(tensors[name])

    def check(prefix: str, lr: float, loss: torch.Tensor) -> None:
        names = [m for m, _ in net.named_parameters() if m.startswith(prefix)]
        grads = torch.autograd.grad(loss, [net.get_parameter(m) for m in names], allow_unused=True)
        for name, g in zip(names, grads, strict=True):
            moved = torch.zeros_like(after[name]) if g is None else -lr * g
            assert torch.allclose(after[name] - before[name], moved, atol=2e-5, rtol=1e-3), name

    def one_hot(y: torch.Tensor) -> torch.Tensor:
        return F.one_hot(y, 10).float()

    def invent(z: torch.Tensor) -> torch.Tensor:
        return net.generator(torch.cat([z, one_hot(labels)], 1))

    def transformed(v: torch.Tensor) -> torch.Tensor:
        assert bool(((after["met"] > 0) == (after["means"].abs().sum(1) > 0)).all())
        base = torch.stack([after["means"][y] if after["met"][y] else v[i] for i, y in enumerate(labels)])
        return base + net.transform(torch.cat([v, one_hot(labels)], 1))

    body = net.body

    def features(x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(body.norm1(body.conv1(x)), 2).relu()
        return body.dense1(F.max_pool2d(body.norm2(body.conv2(x)), 2).relu().flatten(1)).relu()

    load((before, ""))
    real = features(batch["x"])
    with torch.no_grad():
        v = transformed(invent(noises[0]))
    logits = body.dense2(real)
    check("body.", 0.1, 0.5 * F.cross_entropy(logits, batch["y"]) + 0.5 * F.cross_entropy(body.dense2(v), labels))
    real = real.detach()
    load((before, ""), (after, "body."))
    v = invent(noises[1])
    check("generator.", 0.2, F.cross_entropy(body.dense2(v), labels) - 0.7 * augment_features.mmd(v, real))
    load((before, "transform."), (after, "body."), (before, "generator."))
    p = body.dense2(own := transformed(invent(noises[1]).detach())).softmax(1)
    check("transform.", 0.3, (p * p.log()).sum(1).mean() + 0.4 * augment_features.mmd(own, real))


def _batches(engine, site: int) -> torch.Generator:  # type: ignore[no-untyped-def]
    from atoll.core.streams import stream

    return stream(engine.setup.seed, "batches", 1, site)


def test_a_class_mean_moves_by_its_momentum_and_starts_at_its_first_batch():
    net = AugmentedNet(nn.Linear(2, 3))
    net.meet(torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([2, 2]), 0.3)
    net.meet(torch.tensor([[4.0, 4.0], [9.0, 9.0]]), torch.tensor([2, 0]), 0.3)
    assert torch.allclose(net.means, torch.tensor([[9.0, 9.0], [0, 0], [0.7 * 2 + 0.3 * 4, 0.7 * 1 + 0.3 * 4]]))
    assert net.met.tolist() == [1, 0, 1]


def test_half_of_the_labels_are_those_of_the_batch():
    y = torch.tensor([7] * 4000)
    labels = labels_like(y, 10, torch.Generator().manual_seed(0))
    assert len(labels) == 4000
    assert bool((labels[:2000] == 7).all())
    assert torch.bincount(labels[2000:], minlength=10).min() > 120
    assert len(labels_like(y[:1], 10, torch.Generator())) == 2  # a batch norm needs two


def test_r_is_the_papers_curve_at_its_300_rounds():
    work = AugmentFeatures(training=FAST)
    for at in (0, 100, 240, 299):
        assert math.isclose(work.share_at(at), min(0.5, math.exp(0.01 * (at - 300))))
    assert replace(work, most=0.0).share_at(299) == 0.0


def test_entropy_is_largest_where_nothing_is_known():
    assert torch.allclose(entropy(torch.tensor([[0.0, 0, 0], [50, 0, 0]])), torch.tensor([math.log(3), 0.0]), atol=1e-6)


@pytest.mark.parametrize("parts", [{}, {"uplink": (Quantise(bits=8),)}], ids=["plain", "quantised"])
def test_two_processes_give_the_same_bits(run, images, parts):  # type: ignore[no-untyped-def]
    method = fraug(FAST, ramp=3).but(**parts)
    one = run(method, rounds=2, task=images)[-1]
    two = run(method, rounds=2, task=images, backend=ProcessPool(workers=2))[-1]
    assert equal(one.engine.state.replica["weights"], two.engine.state.replica["weights"])
    assert one.up_bytes == two.up_bytes


def test_sites_export_the_model_as_the_user_knows_it(tmp_path, digits):  # type: ignore[no-untyped-def]
    recipe = read_recipe(
        {"name": "w", "sites": 2, "rounds": 1, "limit": 300, "method": {"name": "fraug", "training": {"batch_size": 64}},
         "model": {"name": "cnn", "channels": [4, 6], "dense": 12, "norm": "batch"}}
    )  # fmt: skip
    run, _ = start(recipe, tmp_path / "run")
    run.go()
    model = load_model(tmp_path / "run" / "model" / "site1")
    assert list(named_tensors(model)) == list(named_tensors(CNN_BN.build(digits.info, 10)))


def test_what_has_no_classes_or_no_head_is_refused_with_a_sentence(run, digits):  # type: ignore[no-untyped-def]
    with pytest.raises(RecipeError, match="fraug needs a model that ends in a linear layer"):
        run(fraug(), task=Classification(digits.info, User(lambda: nn.Sequential(nn.Flatten()))))
    (row,) = run(fraug(FAST), rounds=1, task=Regression(digits.info, MLP(hidden=(4,))))
    assert len(row.refused) == 5
    assert all("works with 1 classes, and `y` of `digits` holds none such" in w for w in row.refused.values())
    with pytest.raises(RecipeError, match=r"method\.most"):
        read_recipe({"method": {"name": "fraug", "most": 2}})
