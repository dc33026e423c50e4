"""pFedGate: what a gate may choose, where gradients go, what is sent and merged, and what a site serves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from atoll.core.errors import AtollError, BadReply, RecipeError
from atoll.core.message import Message, encoded_size
from atoll.core.tree import equal, numel
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.combine.block_mean import BlockMean
from atoll.federated.local.training import Training
from atoll.federated.method import MergeContext, Reply
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.pfedgate import pfedgate
from atoll.federated.secure.secure_sum import SecureSum
from atoll.federated.select.uniform import Uniform
from atoll.federated.share.gated_parameters import GatedParameters
from atoll.federated.visit import Job
from atoll.models.export import load_model
from atoll.models.gated import GatedNet, cut, flat_sizes, seen
from atoll.models.lm import LM
from atoll.models.masks import pack_bits
from atoll.models.mlp import MLP
from atoll.models.user import User
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import start
from atoll.tasks.classification import Classification

T = Training(lr=0.2, batch_size=32)


def conv(info, outputs):  # type: ignore[no-untyped-def]
    """A user's own module with layers of both groups, and statistics."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, outputs)
    )


@pytest.fixture
def images(digits):  # type: ignore[no-untyped-def]
    return Classification(digits.info, User(conv))


def gated(keep=0.5, blocks=5, **more):  # type: ignore[no-untyped-def]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GatedNet(conv(None, 10), keep, blocks, 64, **more)


# ------------------------------------------------------------------------------------------ choosing


@given(st.integers(1, 1000), st.integers(1, 50))
def test_blocks_are_even_and_the_first_is_never_larger(numel, blocks):
    sizes = cut(numel, blocks)
    assert sum(sizes) == numel
    assert len(sizes) == min(numel, blocks)
    assert sizes[0] == min(sizes) >= max(sizes) - 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.2, 0.3, 0.5, 0.77, 1.0]), st.booleans(), st.sampled_from([5, 8]))
def test_a_choice_stays_within_the_budget_whatever_the_scores(seed, keep, per_entry, blocks):
    net = gated(keep, blocks, per_entry=per_entry)
    kept = net.choose(torch.rand(len(net.flat), generator=torch.Generator().manual_seed(seed)))
    theta = dict(net.network.named_parameters())
    used, at = {}, 0
    for name, p in theta.items():
        n = len(cut(p.numel(), blocks))
        assert bool(kept[at]), "the first block of each tensor stays"
        used[name] = sum(s for s, k in zip(cut(p.numel(), blocks), kept[at : at + n].tolist(), strict=True) if k)
        at += n
    linear = {"5.weight", "5.bias"}
    for group in (linear, set(theta) - linear):
        assert sum(used[n] for n in group) <= keep * sum(theta[n].numel() for n in group) + 1e-6
    assert sum(used.values()) <= net.budget <= keep * numel(theta) + 1e-6
    assert keep < 1 or bool(kept.all())


def test_the_highest_scores_are_kept():
    net = gated(0.5, 10)
    scores = torch.linspace(0, 1, len(net.flat))
    kept = net.choose(scores)
    dense = [i for i in range(len(net.flat)) if net.flat[i] == 54 and i not in net.first]  # of the last layer's weight
    chosen = [i for i in dense if kept[i]]
    assert chosen == dense[-len(chosen) :]
    assert 0 < len(chosen) < len(dense)


def test_a_budget_below_one_block_of_each_tensor_is_refused():
    tiny = nn.Sequential(*(nn.Linear(1, 1) for _ in range(3)))
    with pytest.raises(RecipeError, match=r"6 of 6 numbers here, but `keep` 0.5 allows 3"):
        GatedNet(tiny, 0.5, 5, 4)


def test_small_budgets_get_more_blocks():
    assert GatedParameters((0.5,)).count == 5
    assert GatedParameters((0.5, 0.1)).count == 10


# ------------------------------------------------------------------------------------------ gradients


def test_dropped_blocks_compute_with_zeros_and_pass_no_gradient_to_the_weights_but_one_to_their_gate():
    net = gated(0.4)
    scores = (0.1 + 0.8 * torch.rand(len(net.flat), generator=torch.Generator().manual_seed(1))).requires_grad_()
    kept = net.choose(scores.detach())
    assert 0 < int(kept.sum()) < len(kept)
    adapted = net.adapted(scores, kept)
    factor = torch.where(kept, scores.detach(), 0.0)
    at, total = 0, 0.0
    g = torch.Generator().manual_seed(2)
    outer = {n: torch.randn(t.shape, generator=g) for n, t in adapted.items()}
    for name, p in net.network.named_parameters():
        spread = torch.cat([f.expand(s) for f, s in zip(factor[at:], cut(p.numel(), 5), strict=False)]).view(p.shape)
        assert torch.equal(adapted[name], p * spread)
        total = total + (adapted[name] * outer[name]).sum()
        at += len(cut(p.numel(), 5))
    total.backward()
    at, dead = 0, 0
    for name, p in net.network.named_parameters():
        for own_p, own_g, own_o in zip(
            *(t.flatten().split(cut(p.numel(), 5)) for t in (p.detach(), p.grad, outer[name])), strict=True
        ):
            assert torch.allclose(own_g, factor[at] * own_o)
            assert bool(kept[at]) or not own_g.any()
            assert float(scores.grad[at]) == pytest.approx(float((own_o * own_p).sum()), rel=1e-4, abs=1e-5)
            dead += not bool(kept[at])
            at += 1
    assert dead > 0


def test_a_step_trains_network_and_gate(run, images):  # type: ignore[no-untyped-def]
    worker = run(pfedgate(training=T), rounds=1, task=images)[-1].engine.workers.local
    at = worker.site_model(0)
    before = {n: t.clone() for n, t in at.initial.items()}
    worker.run(Job(0, 0))
    assert not torch.equal(at.tensors["gate.linear.weight"], before["gate.linear.weight"])
    assert not torch.equal(at.tensors["gate.shift"], before["gate.shift"])
    assert not torch.equal(at.tensors["gate.scores"], before["gate.scores"])


def test_batches_of_one_train(run, images, digits_federation):  # type: ignore[no-untyped-def]
    few = replace(
        digits_federation, sites=tuple(replace(s, train=s.train.select(range(12))) for s in digits_federation.sites)
    )
    rows = run(pfedgate(training=Training(lr=0.01, batch_size=1)), rounds=2, task=images, federation=few)
    assert [(row.replies, row.refused) for row in rows] == [(5, {})] * 2


# ------------------------------------------------------------------------------------------ messages


def test_only_chosen_blocks_are_sent_and_nothing_of_a_gate(run, images):  # type: ignore[no-untyped-def]
    engine = run(pfedgate((0.4,), training=T), rounds=2, task=images)[-1].engine
    worker, weights = engine.workers.local, engine.state.replica["weights"]
    reply = worker.run(Job(2, 2, state_tag=engine.state.tags[2])).message
    at = worker.site_model(2)
    assert reply.parts.keys() == {"blocks"}
    assert reply.parts["blocks"].keys() == {"sent", "values"}
    assert all(n.startswith("network.") for n in weights)
    assert {n for n in at.split.private if n.startswith("gate.")} == set(at.split.private)
    expected = []
    chosen = iter(at.tensors["gate.kept"].tolist())
    for name, w in weights.items():
        moved = (at.tensors[name] - w).flatten()
        for block in moved.split(cut(w.numel(), 5)):
            if "running" in name or next(chosen):
                expected.append(block)
    assert next(chosen, None) is None
    assert torch.equal(reply.parts["blocks"]["values"], torch.cat(expected))
    theta = sum(t.numel() for n, t in weights.items() if "running" not in n)
    assert encoded_size(reply) <= 4 * (0.4 * theta + 12) + 8 + 400


def test_a_plan_counts_the_most_that_a_choice_can_cost(run, images):  # type: ignore[no-untyped-def]
    engine = run(pfedgate((0.4,), training=T), rounds=1, task=images)[-1].engine
    dry = engine.workers.local.run(Job(0, 1, dry=True)).message
    engine.method.share.check(dry, engine.state.replica)
    net = engine.workers.local.site_model(0).model
    assert len(dry.parts["blocks"]["values"]) == net.budget + 12


def message(sent, values):  # type: ignore[no-untyped-def]
    bits = pack_bits({"b": torch.tensor(sent)})
    return Message("blocks", {"blocks": {"sent": bits, "values": torch.tensor(values)}})


def test_a_block_is_averaged_over_the_sites_that_sent_it():
    weights = {"network.w": torch.zeros(2, 2), "network.b": torch.zeros(3)}  # blocks of 2 2 | 1 2
    context = MergeContext(0, {"weights": weights}, 3, 0, None)
    replies = [
        Reply(0, message([True, True, True, False], [1.0, 2.0, 3.0, 4.0, 5.0]), num_samples=1),
        Reply(1, message([True, False, True, False], [4.0, 8.0, 1.0]), num_samples=3),
    ]
    delta = BlockMean(2).combine(replies, context).parts["delta"]
    assert torch.allclose(delta["network.w"], torch.tensor([[3.25, 6.5], [3.0, 4.0]]))
    assert torch.allclose(delta["network.b"], torch.tensor([2.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    "bad",
    [
        message([True] * 9, [0.0] * 7), message([True, True, True, False], [0.0] * 4), message([True] * 4, [0.0] * 8),
        Message("blocks", {"blocks": {"values": torch.zeros(2)}}), Message("blocks", {"delta": {"w": torch.zeros(2)}}),
        message([True] * 4, [0] * 7),
    ],
    ids=["bits", "few", "many", "half", "other", "integers"],
)  # fmt: skip
def test_replies_that_cannot_be_right_are_refused(bad):
    weights = {"network.w": torch.zeros(2, 2), "network.b": torch.zeros(3)}
    share = GatedParameters(blocks=2)
    share.check(message([True, True, True, False], [0.0] * 5), {"weights": weights})
    with pytest.raises(BadReply):
        share.check(bad, {"weights": weights})


def test_buffers_are_averaged_whole(run, images):  # type: ignore[no-untyped-def]
    rows = run(pfedgate((0.4,), training=T), rounds=1, task=images)
    running = rows[-1].engine.state.replica["weights"]["network.1.running_mean"]
    assert bool((running != 0).all())


# ------------------------------------------------------------------------------------------ serving


def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(run, images, digits):  # type: ignore[no-untyped-def]
    engine = run(pfedgate(training=T), rounds=2, task=images)[-1].engine
    at, _ = engine.workers.local.place(1, engine.state.tags[1])
    x = digits.ready(torch.arange(30))["x"]
    at.model.eval()
    assert torch.allclose(at.model(x)[:1], at.model(x[:1]), atol=1e-6)


def test_sites_settle_on_scores_of_their_own_and_keep_them(run, images):  # type: ignore[no-untyped-def]
    engine = run(pfedgate(training=T), rounds=3, task=images)[-1].engine
    scores = []
    for site in range(5):
        at, _ = engine.workers.local.place(site, engine.state.tags[site])
        scores.append(at.tensors["gate.scores"].clone())
    assert all(not torch.equal(scores[0], s) for s in scores[1:])
    least = min(max(1 / 5, 0.1), 0.5)
    assert all(bool(((s >= least) & (s <= 1)).all()) for s in scores)


def test_sites_can_have_budgets_of_their_own(run, images):  # type: ignore[no-untyped-def]
    rows = run(pfedgate((0.3, 0.9), training=T), rounds=2, task=images)
    assert rows[-1].refused == {}
    small, large = (max(rows[-1].up_bytes[s] for s in sites) for sites in ((0, 2, 4), (1, 3)))
    assert small < 0.6 * large


def test_the_exported_models_are_ordinary_sparse_networks(tmp_path, digits):  # type: ignore[no-untyped-def]
    recipe = read_recipe(
        {"name": "g", "sites": 3, "rounds": 2, "limit": 300, "model": {"name": "mlp", "hidden": [20]},
         "method": {"name": "pfedgate", "keep": 0.4}}
    )  # fmt: skip
    run, _ = start(recipe, tmp_path / "run")
    run.go()
    model = load_model(tmp_path / "run" / "model" / "site1")
    assert type(model) is type(MLP((20,)).build(digits.info, 10))
    zeros = sum(int((p == 0).sum()) for p in model.parameters()) / numel(dict(model.named_parameters()))
    assert 0.6 <= zeros < 0.8


def test_an_export_computes_what_the_site_does(run, images, digits):  # type: ignore[no-untyped-def]
    engine = run(pfedgate(training=T), rounds=2, task=images)[-1].engine
    share, x = engine.method.share, digits.ready(torch.arange(20))["x"]
    at, _ = engine.workers.local.place(3, engine.state.tags[3])
    before = {n: t.clone() for n, t in at.tensors.items()}
    plain = share.personal(at.model).eval()
    assert type(plain) is nn.Sequential
    assert torch.allclose(plain(x), at.model.eval()(x), atol=1e-6)
    assert equal(before, at.tensors)


# ------------------------------------------------------------------------------------------ inputs


def test_long_inputs_are_averaged_down_and_short_ones_followed_by_zeros():
    x = torch.arange(2 * 3 * 8 * 8).float().view(2, 3, 8, 8)
    assert seen(x, 48).shape == (2, 48)
    blocks = x.view(2, 3, 4, 2, 4, 2).mean((3, 5)).flatten(1)
    expected = (blocks - blocks.mean(1, keepdim=True)) / blocks.std(1, keepdim=True, unbiased=False)
    assert torch.allclose(seen(x, 48), expected, atol=1e-5)
    row = seen(torch.tensor([[1.0, 3.0]]), 4)
    assert torch.allclose(row, torch.tensor([[-1.0, 1.0, 0.0, 0.0]]), atol=1e-4)
    assert seen(torch.rand(2, 100), 10).shape == (2, 10)
    assert not seen(torch.full((2, 9), 7.0), 9).any()


def test_tokens_are_refused(digits):  # type: ignore[no-untyped-def]
    with pytest.raises(AtollError, match="gate reads numbers"):
        seen(torch.zeros(2, 3, dtype=torch.long), 4)
    model = LM(dim=8, layers=1, heads=1).build(replace(digits.info, kind="text", shape=(6,), num_classes=20), 20)
    with pytest.raises(RecipeError, match="embeds tokens"):
        GatedParameters().prepare(model, None)


# ------------------------------------------------------------------------------------------ company


def test_two_processes_give_the_same_bits(run, images):  # type: ignore[no-untyped-def]
    parts = {"uplink": (Quantise(bits=8),), "select": Uniform(fraction=0.5)}
    method = pfedgate((0.3, 0.7), training=T).but(**parts)
    one, two = (run(method, rounds=3, task=images, backend=b) for b in (None, ProcessPool(workers=2)))
    assert equal(one[-1].engine.state.replica["weights"], two[-1].engine.state.replica["weights"])
    assert [row.up_bytes for row in one] == [row.up_bytes for row in two]
    assert all(row.refused == {} for row in one)


def test_secure_sums_are_refused(run):  # type: ignore[no-untyped-def]
    with pytest.raises(RecipeError, match="BlockMean looks at single replies"):
        run(pfedgate().but(secure=SecureSum()), rounds=1)


def test_it_learns_with_half_the_traffic(run):  # type: ignore[no-untyped-def]
    half, whole = run(pfedgate(0.5, training=replace(T, lr=0.5)), rounds=8), run(fedavg(T), rounds=1)
    sites = half[-1].engine.evaluate_sites()
    assert sum(m["accuracy"] for m in sites.values()) / 5 > 0.7
    assert sum(half[-1].up_bytes.values()) < 0.55 * sum(whole[-1].up_bytes.values())


def test_a_fresh_network_starts_as_itself(run, images):  # type: ignore[no-untyped-def]
    """Not as a small fraction of its outputs, layer by layer."""
    at = run(pfedgate(1.0), rounds=1, task=images)[-1].engine.workers.local.site_model(None)
    assert float(at.initial["gate.scores"].min()) > 0.8


def test_bad_knobs_are_refused_with_a_sentence():
    with pytest.raises(RecipeError, match=r"keep"):
        read_recipe({"method": {"name": "pfedgate", "keep": [0.5, 1.5]}})
    with pytest.raises(RecipeError, match=r"`keep` needs one or more"):
        read_recipe({"method": {"name": "pfedgate", "keep": []}})


def test_sizes_of_all_blocks():
    tree = {"a": torch.zeros(2, 5), "b": torch.zeros(2)}
    assert flat_sizes(tree, 3) == [3, 3, 4, 1, 1]
    assert math.prod(flat_sizes({}, 3)) == 1
