"""FedWon: what travels, what is clipped, and that nothing depends on a batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from atoll.core.errors import RecipeError
from atoll.core.tree import equal, named_tensors
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.local.adaptive_clip import AdaptiveClip, classifier
from atoll.federated.local.training import Training
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.fedwon import fedwon
from atoll.federated.schedules.buffered import Buffered
from atoll.federated.select.uniform import Uniform
from atoll.federated.share.norm_free_parameters import NormFreeParameters
from atoll.federated.visit import Job
from atoll.models.cnn import CNN
from atoll.models.export import load_model
from atoll.models.user import User
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import start
from atoll.tasks.classification import Classification

CNN_BN = CNN(channels=(4, 6), dense=12, norm="batch")
FAST = Training(lr=0.05, batch_size=64)


def residual(info, outputs):  # type: ignore[no-untyped-def]
    """A user's own module with norms of two kinds."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.GroupNorm(2, 6),
        nn.ReLU(), nn.Flatten(), nn.Linear(96, outputs),
    )  # fmt: skip


@pytest.fixture(params=[CNN_BN, User(residual)], ids=["cnn", "user"])
def images(request, digits):  # type: ignore[no-untyped-def]
    return Classification(digits.info, request.param)


def test_raw_weights_gains_and_biases_travel_and_no_statistic(run, images):  # type: ignore[no-untyped-def]
    engine = run(fedwon(FAST), rounds=1, task=images)[-1].engine
    reply = engine.workers.local.run(Job(0, 1)).message
    for message in (reply, engine.state.broadcast.common):
        for tree in message.parts.values():
            assert not any("running" in n or "norm" in n or "num_batches" in n for n in tree)
            convs = [n.partition(".parametrizations")[0] for n in tree if n.endswith("weight.original")]
            assert len(convs) == 2
            for name in convs:
                assert {f"{name}.parametrizations.weight.0.gain", f"{name}.bias"} <= set(tree)


def test_the_merge_is_the_mean_of_raw_weights(run, images):  # type: ignore[no-untyped-def]
    """The standardised weights of the mean are not the mean of the standardised weights."""
    engine = run(fedwon(FAST), rounds=1, task=images)[-1].engine
    before = {n: t.clone() for n, t in engine.state.replica["weights"].items()}
    replies = [engine.workers.local.run(Job(site, 1)) for site in range(5)]
    engine.step()
    total = sum(r.num_samples for r in replies)
    for name, after in engine.state.replica["weights"].items():
        moved = sum(r.num_samples / total * r.message.parts["delta"][name].double() for r in replies)
        assert torch.allclose(after.double(), before[name] + moved, atol=1e-6), name


def test_batches_of_one_train(run, digits):  # type: ignore[no-untyped-def]
    """Where a batch norm cannot: at one example and one pixel it has nothing to normalise by."""
    deep = User(
        lambda info, outputs: nn.Sequential(nn.Conv2d(1, 8, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, outputs))
    )
    task = Classification(digits.info, deep)
    one = Training(lr=0.02, batch_size=1)
    rows = run(fedwon(one), rounds=2, task=task)
    assert rows[-1].metrics["accuracy"] > 0.5
    broken = run(fedavg(one), rounds=1, task=task)
    assert len(broken[0].refused) == 5


def test_without_convolutions_and_clipping_it_is_fedavg(run):  # type: ignore[no-untyped-def]
    ours, plain = (run(m, rounds=2)[-1].engine.state.replica for m in (fedwon(FAST, clipping=None), fedavg(FAST)))
    assert equal(ours["weights"], plain["weights"])


def test_the_exported_model_computes_what_the_live_one_does(run, images, digits):  # type: ignore[no-untyped-def]
    engine = run(fedwon(FAST), rounds=2, task=images)[-1].engine
    at, _ = engine.workers.local.place(None, None)
    x = digits.ready(torch.arange(50))["x"]
    live = at.model.eval()(x)
    export = NormFreeParameters().export(copy.deepcopy(at.model), engine.state.replica)
    assert torch.equal(export.eval()(x), live)
    assert not any("parametrizations" in n for n in named_tensors(export))


def test_a_saved_run_loads_with_plain_torch(tmp_path, digits):  # type: ignore[no-untyped-def]
    import safetensors.torch

    recipe = read_recipe(
        {"name": "w", "sites": 3, "rounds": 1, "limit": 300, "method": {"name": "fedwon", "training": {"batch_size": 64}},
         "model": {"name": "cnn", "channels": [4, 6], "dense": 12, "norm": "batch"}}
    )  # fmt: skip
    run, _ = start(recipe, tmp_path / "run")
    run.go()
    x = digits.ready(torch.arange(20))["x"]
    model = load_model(tmp_path / "run" / "model")
    plain = CNN(channels=(4, 6), dense=12).build(digits.info, 10)  # without norms: an ordinary network
    assert safetensors.torch.load_model(plain, tmp_path / "run" / "model" / "model.safetensors") == (set(), [])
    assert torch.equal(plain.eval()(x), model(x))
    rows = plain.conv1.weight.detach().flatten(1)
    assert float(rows.mean(1).abs().max()) < 1e-5  # these are the standardised weights


# ------------------------------------------------------------------------------------------ clipping


def test_rows_are_clipped_to_a_share_of_their_own_length_and_the_classifier_is_not():
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2))
    params = {n: p.detach() for n, p in net.named_parameters()}
    grads = [torch.randn(p.shape, generator=g) * (10.0 ** (i - 2)) for i, p in enumerate(params.values())]
    before = [t.clone() for t in grads]
    clip = AdaptiveClip(0.1)
    visit = type("V", (), {"model": net})()
    clip.correct_(clip.start(visit, params), grads, list(params.values()))
    for name, p, was, now in zip(params, params.values(), before, grads, strict=True):
        if name.startswith("4."):
            assert torch.equal(was, now), name
            continue
        rows = [(p, was, now)] if p.dim() == 1 else list(zip(p, was, now, strict=True))
        for w, old, new in rows:
            allowed = 0.1 * max(float(w.norm()), 1e-3)
            factor = min(1.0, allowed / float(old.norm()))
            assert torch.allclose(new, old * factor, rtol=1e-5), name


def test_small_gradients_and_zero_gradients_pass():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    params = {n: p.detach() for n, p in net.named_parameters()}
    grads = [torch.full_like(p, 1e-7) for p in params.values()]
    grads[0].zero_()
    before = [t.clone() for t in grads]
    AdaptiveClip(0.32).correct_([0, 1], grads, list(params.values()))
    assert all(torch.equal(a, b) for a, b in zip(before, grads, strict=True))


def test_a_row_of_zeros_can_still_move():
    grads = [torch.ones(2, 4)]
    AdaptiveClip(0.5).correct_([0], grads, [torch.zeros(2, 4)])
    assert torch.allclose(grads[0].norm(dim=1), torch.full((2,), 0.5e-3))


def test_clipping_stops_a_step_size_that_would_diverge(run, digits):  # type: ignore[no-untyped-def]
    task = Classification(digits.info, CNN_BN)
    wild = Training(lr=2.0, batch_size=16)
    free, clipped = (run(fedwon(wild, clipping=c), rounds=2, task=task)[-1] for c in (None, 0.02))
    reached = clipped.metrics["accuracy"]
    assert reached > 0.4
    assert not free.metrics or not free.metrics["accuracy"] > reached - 0.1


@pytest.mark.parametrize(
    "parts",
    [{}, {"uplink": (Quantise(bits=8),)}, {"schedule": Buffered(k=3)}, {"select": Uniform(fraction=0.5)}],
    ids=["plain", "quantised", "buffered", "partial"],
)
def test_two_processes_give_the_same_bits(run, digits, parts):  # type: ignore[no-untyped-def]
    task = Classification(digits.info, CNN_BN)
    method = fedwon(FAST).but(**parts)
    one = run(method, rounds=2, task=task)[-1]
    two = run(method, rounds=2, task=task, backend=ProcessPool(workers=2))[-1]
    assert equal(one.engine.state.replica["weights"], two.engine.state.replica["weights"])
    assert one.up_bytes == two.up_bytes


def test_bad_knobs_are_refused_with_a_sentence():
    with pytest.raises(RecipeError, match="clipping"):
        read_recipe({"method": {"name": "fedwon", "clipping": -1}})
    with pytest.raises(RecipeError, match="gamma"):
        read_recipe({"method": {"name": "fedwon", "gamma": 0}})


def test_the_classifier_is_the_last_layer_with_a_weight():
    assert classifier(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2))) == "1"
