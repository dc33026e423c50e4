"""FedMGP: what stays, what is chosen by whom, what fusion keeps, and that later tasks leave earlier ones alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from atoll.core.errors import RecipeError
from atoll.core.message import Message
from atoll.core.tree import clone, equal, named_tensors
from atoll.data.class_stream import ClassStream
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.local.training import Training
from atoll.federated.methods.fedmgp import TRAINING, fedmgp
from atoll.federated.server.fuse_prompts import FusePrompts, first_of_each_class
from atoll.federated.share.prompts import Prompts as PromptsShare
from atoll.federated.visit import Job
from atoll.models.cnn import CNN
from atoll.models.export import load_model
from atoll.models.model import build_model
from atoll.models.prompted import Prompted, PromptedNet, Prompts
from atoll.models.vit import ViT
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import start
from atoll.tasks.classification import Classification

VIT = ViT(patch=4, dim=8, layers=3, heads=2)
FEW = Prompts(length=3)
FAST = replace(TRAINING, epochs=1, batch_size=64)
STREAM = ClassStream(tasks=2, rounds=1)


@pytest.fixture
def small(digits):  # type: ignore[no-untyped-def]
    return Classification(digits.info, VIT)


@pytest.fixture
def world(digits_federation):  # type: ignore[no-untyped-def]
    public = digits_federation.test.select(range(150))
    return replace(digits_federation, test=digits_federation.test.select(range(150, 300)), public=public)


def by_hand(net: PromptedNet, row: torch.Tensor, prompt: bool, entry: int | None) -> torch.Tensor:
    """The feature of one row, layer by layer."""
    body, heads = net.body, 2
    tokens = body.embedding(row[None])[0]
    if prompt:
        tokens = torch.cat([tokens, net.prompt])
    for number, block in enumerate(body.blocks, 1):
        a, x = block.attention, block.norm1(tokens)
        q, k, v = a.q_proj(x), a.k_proj(x), a.v_proj(x)
        if entry is not None and number in (2, 3):
            k = torch.cat([net.prefixes[entry, number - 2, 0], k])
            v = torch.cat([net.prefixes[entry, number - 2, 1], v])
        mixed = []
        for h in range(heads):
            part = slice(4 * h, 4 * h + 4)
            mixed.append((q[:, part] @ k[:, part].T / 2).softmax(1) @ v[:, part])
        tokens = tokens + a.o_proj(torch.cat(mixed, 1))
        tokens = tokens + block.down_proj(F.gelu(block.up_proj(block.norm2(tokens))))
    return body.norm(tokens[0])


@pytest.fixture
def net(digits):  # type: ignore[no-untyped-def]
    net = build_model(Prompted(network=VIT, prompts=FEW), digits.info, 10, 0)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t in net.parameters():
            t.add_(torch.randn(t.shape, generator=noise) * 0.4)
    return net.eval()


@torch.no_grad()
def test_each_row_gets_the_prompt_and_the_prefix_of_its_nearest_class_that_was_met(net, digits):
    x = digits.ready(torch.arange(20))["x"]
    net.pool.keys.copy_(net.feature(x[:10], net.prompt))  # or one key would be the nearest to all
    net.met.copy_(torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 0, 1]))
    got, chosen = net(x), set()
    for row, logits in zip(x, got, strict=True):
        query = by_hand(net, row, True, None)
        cosine = [
            float(F.cosine_similarity(query, key, dim=0)) if met else -2
            for key, met in zip(net.pool.keys, net.met, strict=True)
        ]
        entry = cosine.index(max(cosine))
        chosen.add(entry)
        want = net.own_head(by_hand(net, row, True, entry))
        assert torch.allclose(logits[net.met > 0], want[net.met > 0], atol=1e-4)
        assert int(logits.argmax()) in (0, 2, 3, 5, 6, 9)
    assert len(chosen) > 1
    assert torch.allclose(net.feature(x[:1])[0], by_hand(net, x[0], False, None), atol=1e-5)
    net.met.zero_()  # a site that knows nothing yet, and the server: the common prompt and head
    assert torch.allclose(net(x)[5], net.head(by_hand(net, x[5], True, None)), atol=1e-4)


def test_prefixes_and_own_heads_stay_and_the_backbone_keeps_its_bits(run, small, world):  # type: ignore[no-untyped-def]
    engine = run(fedmgp(FAST, STREAM, FEW, fusion_steps=1), rounds=2, task=small, federation=world)[-1].engine
    reply = engine.workers.local.run(Job(0, 2, state_tag=engine.state.tags[0]))
    sent = reply.message.parts["delta"]
    assert set(sent) == {"prompt", "prompt_pool.keys", "head.weight", "head.bias"}
    assert sum(t.numel() for t in sent.values()) == 3 * 8 + 8 + 10 * (8 + 1)
    assert set(engine.state.replica["weights"]) == set(sent)
    kept = engine.workers.local.states.get(0, engine.state.tags[0]).parts["private"]
    assert set(kept) == {"prefixes", "pool.keys", "own_head.weight", "own_head.bias", "met"}
    at, _ = engine.workers.local.place(0, engine.state.tags[0])
    plain = named_tensors(small.model(0))
    assert equal({n: at.tensors[f"body.{n}"] for n in plain}, plain)


def test_a_later_task_leaves_the_entries_of_earlier_classes_alone(run, small, world):  # type: ignore[no-untyped-def]
    kept = []

    def note(engine, _) -> None:  # type: ignore[no-untyped-def]
        states = engine.workers.local.states
        kept.append([states.get(s, t).parts["private"] for s, t in sorted(engine.state.tags.items())])

    run(fedmgp(FAST, STREAM, FEW, fusion_steps=1), rounds=2, task=small, federation=world, on_merge=note)
    for site, (first, second) in enumerate(zip(*kept, strict=True)):
        early, late = STREAM.groups(world.sites[site], site, 0)
        assert first["met"].nonzero().flatten().tolist() == early.tolist()
        assert second["met"].nonzero().flatten().tolist() == sorted([*early.tolist(), *late.tolist()])
        for name in ("prefixes", "pool.keys", "own_head.weight", "own_head.bias"):
            assert torch.equal(first[name][early], second[name][early]), name
            assert not torch.equal(first[name][late], second[name][late]), name


def test_both_phases_are_the_papers_losses_and_leave_each_other_alone(run, small, world):  # type: ignore[no-untyped-def]
    one = Training(lr=0.1, batch_size=10_000)
    engine = run(fedmgp(one, STREAM, FEW, pull=0.3), rounds=1, task=small, federation=world)[-1].engine
    worker, site = engine.workers.local, 2
    at, _ = worker.place(site, engine.state.tags[site])
    before = clone(at.tensors)
    worker.run(Job(site, 1, state_tag=engine.state.tags[site]))
    after, net = clone(at.tensors), at.model
    batch = STREAM.at(world.sites[site], site, 0, 1).train.ready()
    here = torch.unique(batch["y"])
    y = torch.searchsorted(here, batch["y"])

    def load(tensors: dict[str, torch.Tensor], *names: str) -> None:
        for name in names:
            at.tensors[name].copy_(tensors[name])

    def check(loss: torch.Tensor, *names: str) -> None:
        grads = torch.autograd.grad(loss, [net.get_parameter(n) for n in names])
        for name, g in zip(names, grads, strict=True):
            assert torch.allclose(after[name] - before[name], -0.1 * g, atol=1e-5), name

    load(before, *before)
    plain, common = net.feature(batch["x"]), net.feature(batch["x"], net.prompt)
    near = F.cosine_similarity(plain, net.prompt_pool.keys).mean()
    check(
        F.cross_entropy(net.head(common)[:, here], y) - 0.3 * near,
        "prompt", "prompt_pool.keys", "head.weight", "head.bias",
    )  # fmt: skip
    load(after, "prompt", "head.weight", "head.bias")
    query = net.feature(batch["x"], net.prompt).detach()
    feature = torch.stack([net.feature(x[None], net.prompt, F.one_hot(c, 10)[None].float())[0] for x, c in
                           zip(batch["x"], batch["y"], strict=True)])  # fmt: skip
    near = F.cosine_similarity(query, net.pool.keys[batch["y"]]).mean()
    check(
        F.cross_entropy(net.own_head(feature)[:, here], y) - 0.3 * near,
        "prefixes", "pool.keys", "own_head.weight", "own_head.bias",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- fusion


def fuse(run, small, world, deltas, **knobs):  # type: ignore[no-untyped-def]
    """What the server makes of these replies: its weights before, after, and a network to try them in."""
    engine = run(fedmgp(FAST, STREAM, FEW, fusion_steps=1), rounds=1, task=small, federation=world)[-1].engine
    net, base = engine.workers.local.place(None, None)[0].model, engine.state.replica["weights"]
    made = deltas(base)
    per_class = knobs.setdefault("per_class", 10)
    server = FusePrompts(PromptsShare(FEW), **knobs)
    letters = Message("letters", {str(i): tree for i, tree in enumerate(made)})
    broadcast, _ = server.step(engine.state.replica, {}, letters, engine.context())
    sent = [{n: base[n] + t for n, t in tree.items()} for tree in made]
    return sent, broadcast.common.parts["weights"], net, first_of_each_class(world.public, 10, per_class).ready()


def random_deltas(count: int, scale: float):  # type: ignore[no-untyped-def]
    def make(base):  # type: ignore[no-untyped-def]
        g = torch.Generator().manual_seed(0)
        return [{n: torch.randn(t.shape, generator=g) * scale for n, t in base.items()} for _ in range(count)]

    return make


def test_fusing_identical_prompts_returns_them(run, small, world):  # type: ignore[no-untyped-def]
    three = lambda base: random_deltas(1, 0.5)(base) * 3  # noqa: E731
    sent, new, _, _ = fuse(run, small, world, three, threshold=0.0)
    assert torch.equal(new["prompt"], sent[0]["prompt"])
    assert torch.equal(new["prompt_pool.keys"], sent[0]["prompt_pool.keys"])


@torch.no_grad()
def test_fusion_comes_nearer_to_all_features_than_the_mean_and_refits_the_head(run, small, world):  # type: ignore[no-untyped-def]
    with torch.enable_grad():
        sent, new, net, rows = fuse(run, small, world, random_deltas(3, 2.0), threshold=0.0, steps=30, lr=0.05)
        _, unchanged, _, _ = fuse(run, small, world, random_deltas(3, 2.0), threshold=0.0, steps=0)

    def apart(prompt: torch.Tensor) -> float:
        mine = net.feature(rows["x"], prompt)
        return sum(float((mine - net.feature(rows["x"], t["prompt"])).square().sum(1).mean()) for t in sent)

    def loss(tree: dict[str, torch.Tensor]) -> float:
        logits = F.linear(net.feature(rows["x"], new["prompt"]), tree["head.weight"], tree["head.bias"])
        return float(F.cross_entropy(logits, rows["y"]))

    mean = {n: torch.stack([t[n] for t in sent]).mean(0) for n in sent[0]}
    assert apart(new["prompt"]) < 0.9 * apart(mean["prompt"])
    assert loss(new) < 0.8 * loss(mean)
    assert all(torch.allclose(unchanged[n], mean[n], atol=1e-5) for n in mean)


def test_prompts_that_fail_on_the_servers_rows_are_dropped(run, small, world):  # type: ignore[no-untyped-def]
    deltas, every = random_deltas(4, 2.0), {"per_class": 150, "steps": 0}  # all rows: classes of unequal size
    sent, new, net, rows = fuse(run, small, world, deltas, threshold=0.0, **every)
    right = []
    with torch.no_grad():
        for tree in sent:
            logits = F.linear(net.feature(rows["x"], tree["prompt"]), tree["head.weight"], tree["head.bias"])
            right.append(float((logits.argmax(1) == rows["y"]).double().mean()))
    bar = sorted(set(right))[1]  # what has exactly this share survives
    better = [i for i in range(4) if right[i] >= bar]
    assert 0 < len(better) < 4

    def mean_of(some: list[int]) -> torch.Tensor:
        return torch.stack([sent[i]["prompt"] for i in some]).mean(0)

    assert torch.allclose(new["prompt"], mean_of([0, 1, 2, 3]), atol=1e-5)
    _, new, _, _ = fuse(run, small, world, deltas, threshold=bar, **every)
    assert torch.allclose(new["prompt"], mean_of(better), atol=1e-5)
    _, new, _, _ = fuse(run, small, world, deltas, threshold=1.0, **every)  # none survives: all do
    assert torch.allclose(new["prompt"], mean_of([0, 1, 2, 3]), atol=1e-5)


# ---------------------------------------------------------------------------------------------- as a user


@pytest.mark.parametrize("parts", [{}, {"uplink": (Quantise(bits=8),)}], ids=["plain", "quantised"])
def test_two_processes_give_the_same_bits(run, small, world, parts):  # type: ignore[no-untyped-def]
    method = fedmgp(FAST, STREAM, FEW, fusion_steps=2).but(**parts)
    one = run(method, rounds=2, task=small, federation=world)[-1]
    two = run(method, rounds=2, task=small, federation=world, backend=ProcessPool(workers=2))[-1]
    assert equal(one.engine.state.replica["weights"], two.engine.state.replica["weights"])
    assert one.up_bytes == two.up_bytes


def test_a_sites_model_loads(tmp_path, digits):  # type: ignore[no-untyped-def]
    recipe = read_recipe(
        {"name": "w", "sites": 2, "rounds": 1, "limit": 300, "public": 0.3,
         "model": {"name": "vit", "patch": 4, "dim": 8, "layers": 2, "heads": 2},
         "method": {"name": "fedmgp", "fusion_steps": 1, "training": {"batch_size": 64}, "stream": {"tasks": 2}}}
    )  # fmt: skip
    run, _ = start(recipe, tmp_path / "run")
    run.go()
    model = load_model(tmp_path / "run" / "model" / "site1")
    assert isinstance(model, PromptedNet)
    assert bool(model.met.any())


def test_what_cannot_be_prompted_is_refused_with_a_sentence(run, digits, world):  # type: ignore[no-untyped-def]
    for network in (CNN(channels=(4, 6), dense=8), ViT(patch=4, dim=8, layers=1, heads=2)):
        with pytest.raises(RecipeError, match="fedmgp prompts vision transformers"):
            run(fedmgp(), task=Classification(digits.info, network), federation=world)
    with pytest.raises(RecipeError, match="needs public data"):
        run(fedmgp(), task=Classification(digits.info, VIT))
    with pytest.raises(RecipeError, match=r"method\.threshold"):
        read_recipe({"method": {"name": "fedmgp", "threshold": 2}})
