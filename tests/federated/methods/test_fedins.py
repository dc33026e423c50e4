"""FedIns: what is chosen, by whom, what travels, and that the backbone never moves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from atoll.core.errors import AtollError, RecipeError
from atoll.core.tree import equal, named_tensors
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.local.training import Training
from atoll.federated.methods.fedins import fedins
from atoll.federated.schedules.buffered import Buffered
from atoll.federated.visit import Job
from atoll.models.cnn import CNN
from atoll.models.instance_tuned import InstanceTuned, InstanceTunedNet, TunerPool
from atoll.models.keyed_pool import KeyedPool
from atoll.models.model import build_model
from atoll.models.transformers_model import TransformersModel
from atoll.models.user import User
from atoll.models.vit import ViT
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import start
from atoll.tasks.classification import Classification

VIT = ViT(patch=4, dim=16, layers=1, heads=2)
POOL = TunerPool(size=5, k=2)
FAST = Training(lr=0.1, batch_size=64)
HF = TransformersModel(
    config={"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32, "patch_size": 4},
    head="image_classification",
)  # fmt: skip


def own(info, outputs):  # type: ignore[no-untyped-def]
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, outputs)
    )


@pytest.fixture
def small(digits):  # type: ignore[no-untyped-def]
    return Classification(digits.info, VIT)


def by_hand(net: InstanceTunedNet, x: torch.Tensor) -> tuple[torch.Tensor, list[list[int]]]:
    """One row after the other, by another road: plain copies of the backbone with its layers' numbers changed."""
    out, chosen = [], []
    plain = copy.deepcopy(net.body)
    for layer in plain.modules():
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
    for row in x.split(1):
        query = plain.features(row)[0]
        cosine = [float(query @ key / (query.norm() * key.norm())) for key in net.pool.keys]
        best = sorted(range(len(cosine)), key=lambda m: -cosine[m])[: net.k]
        tuned = copy.deepcopy(plain)
        for name, tuner in net.tuners.items():
            layer = tuned.get_submodule(name.replace("/", "."))
            scale, shift = (sum(t[m] for m in best) / net.k for t in (tuner.scale, tuner.shift))
            layer.weight.data = layer.weight * scale.view(-1, *[1] * (layer.weight.dim() - 1))  # s (W x + b) + t
            layer.bias.data = layer.bias * scale + shift
        head, bias = (sum(t[m] for m in best) / net.k for t in (net.heads, net.biases))
        out.append(head @ tuned.features(row)[0] + bias)
        chosen.append(best)
    return torch.stack(out), chosen


def test_each_row_gets_the_layers_of_its_own_nearest_keys(digits):
    net = build_model(InstanceTuned(network=VIT, pool=TunerPool(size=5, k=2, spread=0.3)), digits.info, 10, 0).eval()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t in (*net.body.parameters(), net.heads, net.biases):
            t.add_(torch.randn(t.shape, generator=noise) * 0.3)  # a fresh transformer gives all rows almost one feature
        x = digits.ready(torch.arange(12))["x"]
        want, chosen = by_hand(net, x)
        assert len({frozenset(c) for c in chosen}) > 1, "all rows choose alike: the test says nothing"
        assert torch.allclose(net(x), want, atol=1e-5)
        order = torch.randperm(12)
        assert torch.allclose(net(x[order]), net(x)[order], atol=1e-6)


@pytest.mark.parametrize("network", [VIT, CNN(channels=(4, 6), dense=8, norm="batch"), User(own), HF],
                         ids=["vit", "cnn", "user", "transformers"])  # fmt: skip
def test_scales_of_one_and_shifts_of_zero_are_the_backbone(digits, network):
    plain = build_model(network, digits.info, 10, 0).eval()
    net = build_model(InstanceTuned(network=network, pool=TunerPool(size=5, k=3, spread=0)), digits.info, 10, 0)
    x = digits.ready(torch.arange(20))["x"]
    want = plain(x)
    for training in (False, True):  # no dropout, no batch statistics
        assert torch.allclose(net.train(training)(x), getattr(want, "logits", want), atol=1e-6)
    points = [m for m in plain.modules() if getattr(m, "weight", None) is not None]
    assert len(net.tuners) == len(points) - 1  # all but the head


def test_the_backbone_keeps_its_bits_and_the_pool_travels(run, small):
    engine = run(fedins(size=5, k=2, training=FAST), rounds=2, task=small)[-1].engine
    at, _ = engine.workers.local.place(0, None)
    engine.workers.local.run(Job(0, 2))
    plain = named_tensors(small.model(0))
    assert all(torch.equal(at.tensors[f"body.{n}"], t) for n, t in plain.items())
    # patch, both norms, q, k, v, projection, both MLP layers, final norm
    widths = 16 + 2 * 16 + 3 * 16 + 16 + 64 + 16 + 16
    reply = engine.workers.local.run(Job(0, 2)).message
    assert set(reply.parts) == {"delta"}
    sent = reply.parts["delta"]
    assert sum(t.numel() for t in sent.values()) == 5 * (2 * widths + 16 + 10 * (16 + 1))
    assert not any(n.startswith("body.") or n == "pool.uses" for n in sent)
    still = [n for n, t in sent.items() if not float(t.abs().max()) > 0]
    assert all("k_proj.shift" in n for n in still), "attention does not feel a shift of all keys, but all else learns"


def test_one_step_is_the_gradient_of_the_papers_loss(run, small, digits_federation):
    """(1 - a) CE + a (1 - sum of cosines): keys by the second term alone, all else by the first."""
    one = Training(lr=0.1, batch_size=10_000)
    engine = run(fedins(size=5, k=2, pull=0.25, training=one), rounds=1, task=small)[-1].engine
    worker = engine.workers.local
    delta = worker.run(Job(3, 1)).message.parts["delta"]
    at, _ = worker.place(3, None)
    net, batch = at.model.train(), digits_federation.sites[3].train.ready()
    with torch.no_grad():
        net.body(batch["x"])
        q = net.tap.feature("")
    loss = 0.75 * nn.functional.cross_entropy(net(batch["x"]), batch["y"])
    cosine = nn.functional.cosine_similarity(q[:, None], net.pool.keys[None], dim=2)
    loss = loss + 0.25 * (1 - cosine.topk(2, dim=1).values.sum(1)).mean()
    names = list(delta)
    grads = torch.autograd.grad(loss, [net.get_parameter(n) for n in names])
    for name, g in zip(names, grads, strict=True):
        assert torch.allclose(delta[name], -0.1 * g, atol=1e-6), name


def test_sites_count_alike_whatever_their_size(run, small):
    engine = run(fedins(size=5, k=2, training=FAST), rounds=1, task=small)[-1].engine
    before = {n: t.clone() for n, t in engine.state.replica["weights"].items()}
    replies = [engine.workers.local.run(Job(site, 1)) for site in range(5)]
    assert len({r.num_samples for r in replies}) > 1
    engine.step()
    for name, after in engine.state.replica["weights"].items():
        moved = sum(r.message.parts["delta"][name].double() for r in replies) / 5
        assert torch.allclose(after.double(), before[name] + moved, atol=1e-6), name


def test_an_entry_that_all_have_chosen_makes_room_while_training_only():
    pool = KeyedPool(3, 2, usage_penalty=1.0)
    with torch.no_grad():
        pool.keys.copy_(torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]]))
    query = torch.tensor([[1.0, 0.0]])
    first = [int(pool.train()(query, 1).argmax()) for _ in range(6)]
    assert first[:2] == [0, 1]  # 1 - 1 < 0.8
    assert 0 in first[2:]
    assert 2 not in first
    assert int(pool.uses.sum()) == 6
    pool.uses.copy_(torch.tensor([9, 0, 0]))
    assert [int(pool.eval()(query, 1).argmax()) for _ in range(3)] == [0, 0, 0]
    assert int(pool.uses.sum()) == 9  # evaluation neither counts nor cares
    assert math.isclose(float(pool.pull().mean().detach()), 1 - (1.0 if first[-1] == 0 else 0.8), abs_tol=1e-6)


@pytest.mark.parametrize("parts", [{}, {"uplink": (Quantise(bits=8),)}, {"schedule": Buffered(k=3)}],
                         ids=["plain", "quantised", "buffered"])  # fmt: skip
def test_two_processes_give_the_same_bits(run, small, parts):
    method = fedins(size=5, k=2, training=FAST).but(**parts)
    one = run(method, rounds=2, task=small)[-1]
    two = run(method, rounds=2, task=small, backend=ProcessPool(workers=2))[-1]
    assert equal(one.engine.state.replica["weights"], two.engine.state.replica["weights"])
    assert one.up_bytes == two.up_bytes


def test_it_learns_with_fewer_bytes_than_the_network_has(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    public = {"name": "subset", "source": "digits", "classes": [0, 1, 2, 3, 4, 5], "rows": [0, 600]}
    cnn = {"name": "cnn", "channels": [16, 32], "dense": 64}
    recipe = read_recipe(
        {"name": "w", "sites": 3, "partition": "iid", "rounds": 2,
         "data": {"name": "subset", "source": "digits", "rows": [600, 1797]},
         "model": {"name": "pretrained", "model": cnn, "data": public, "epochs": 6, "lr": 5e-3},
         "method": {"name": "fedins", "size": 3, "k": 1, "training": {"lr": 0.2, "batch_size": 16}}}
    )  # fmt: skip
    run, plan = start(recipe, tmp_path / "run")
    assert run.go()["metrics"]["accuracy"] > 0.6  # six classes were seen before, under a head that is gone
    network = named_tensors(run.prepared.setup.task.model(0))
    assert plan.up_bytes / 6 < 0.2 * sum(t.numel() * 4 for t in network.values())


def test_a_saved_run_loads_and_computes_what_the_live_one_does(tmp_path, digits):
    from atoll.models.export import load_model

    recipe = read_recipe(
        {"name": "w", "sites": 3, "rounds": 1, "limit": 300, "model": {"name": "vit", "patch": 4, "dim": 16, "layers": 1},
         "method": {"name": "fedins", "size": 5, "k": 2, "training": {"batch_size": 64}}}
    )  # fmt: skip
    run, _ = start(recipe, tmp_path / "run")
    run.go()
    setup = run.prepared.setup
    x = setup.federation.test.ready(torch.arange(20))["x"]
    saved, plain = load_model(tmp_path / "run" / "model"), named_tensors(setup.task.model(setup.seed))
    assert isinstance(saved, InstanceTunedNet)
    assert equal({n: named_tensors(saved.body)[n] for n in plain}, plain)
    with torch.no_grad():
        assert torch.allclose(saved(x), by_hand(saved, x)[0], atol=1e-5)


def test_what_cannot_work_is_refused_with_a_sentence(run, digits):
    with pytest.raises(RecipeError, match="fedins needs a model that ends in a linear layer"):
        run(fedins(), task=Classification(digits.info, User(lambda: nn.Sequential(nn.Flatten()))))
    with pytest.raises(AtollError, match="pool has 2 entries"):
        fedins(size=2, k=3)
    with pytest.raises(RecipeError, match=r"method\.pull"):
        read_recipe({"method": {"name": "fedins", "pull": 2}})
    tokens = User(lambda: nn.Sequential(nn.Flatten(2), nn.Linear(64, 10), nn.Flatten()))
    with pytest.raises(RecipeError, match="one feature per row, but the model's last linear layer sees 2"):
        run(fedins(), task=Classification(digits.info, tokens))
