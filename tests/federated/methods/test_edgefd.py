"""EdgeFD: only predictions travel, each site speaks only about what it knows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atoll.core.errors import BadReply, RecipeError
from atoll.core.message import Message, encoded_size
from atoll.data.dataset import Dataset, Federation, SiteData
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.codecs.cast import Cast
from atoll.federated.combine.masked_mean import MaskedMean
from atoll.federated.local.training import Training
from atoll.federated.method import MergeContext, Reply
from atoll.federated.methods.edgefd import edgefd
from atoll.federated.select.uniform import Uniform
from atoll.federated.server.share_targets import ShareTargets
from atoll.federated.share.predictions import Predictions
from atoll.federated.visit import Job
from atoll.models.mlp import MLP
from atoll.tasks.classification import Classification

QUICK = Training(lr=0.1, batch_size=16, epochs=2)
QUICK_EDGEFD = edgefd(training=QUICK, distil=QUICK)


@pytest.fixture(scope="session")
def mixed(digits: Dataset) -> Classification:
    """Three architectures, site by site."""
    networks = MLP(hidden=(32,)), MLP(hidden=(48,)), MLP(hidden=(32, 16))
    return Classification(digits.info, networks[0], networks)


@pytest.fixture(scope="session")
def two_classes(digits: Dataset) -> Federation:
    """Five sites, two classes each, none in common."""
    train, empty = digits.select(range(300, len(digits))), digits.select([])
    y = train.column("y")
    rows = [torch.nonzero(y // 2 == s).flatten() for s in range(5)]
    sites = tuple(SiteData(train.select(r[:-50]), empty, train.select(r[-50:])) for r in rows)
    public = digits.select(range(200, 300))
    return Federation(sites, digits.select(range(200)), public=public, info=digits.info)


def context(proxies: int | None, public: Dataset | None = None) -> MergeContext:
    replica = {} if proxies is None else {"proxies": {"x": torch.zeros(proxies, 2)}}
    return MergeContext(0, replica, 3, 0, None, public)


def reply(site: int, ids: list[int], logits: torch.Tensor) -> Reply:
    tree = {"ids": torch.tensor(ids, dtype=torch.int32), "logits": logits}
    return Reply(site, Message("predictions", {"predictions": tree}), 10 * site + 1)


def targets(replies: list[Reply], rows: int) -> dict[str, torch.Tensor]:
    at = context(rows)
    broadcast, _ = ShareTargets().step(at.replica, {}, MaskedMean().combine(replies, at), at)
    return broadcast.common.parts["targets"]


# ----------------------------------------------------------------------------------------------- fusion


def test_the_mean_is_over_those_who_spoke_and_silent_rows_are_dropped() -> None:
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0]])
    got = targets([reply(0, [0, 3], a), reply(2, [3], b), reply(4, [], torch.zeros(0, 2))], rows=5)
    assert got["ids"].tolist() == [0, 3]
    assert got["logits"].tolist() == [[1, 2], [4, 5]]  # site sizes do not count


def test_fusion_is_two_sums() -> None:
    draw = torch.Generator().manual_seed(0)
    masks = torch.rand(3, 8, generator=draw) < 0.5
    z = torch.randn(3, 8, 4, generator=draw)
    replies = [reply(s, masks[s].nonzero().flatten().tolist(), z[s][masks[s]]) for s in range(3)]
    one, two, whole = (MaskedMean().combine(r, context(8)).parts["sums"] for r in (replies[:1], replies[1:], replies))
    assert torch.allclose(one["logits"] + two["logits"], whole["logits"])
    assert torch.equal(one["votes"] + two["votes"], whole["votes"])
    m = masks.double()
    slow = torch.einsum("km,kmc->mc", m, z.double()) / m.sum(0)[:, None]
    got = targets(replies, 8)
    assert torch.allclose(got["logits"].double(), slow[masks.any(0)], rtol=1e-6)


def test_without_a_threshold_it_is_fedmds_mean_exactly(run, mixed) -> None:  # type: ignore[no-untyped-def]
    engine = run(edgefd(training=QUICK, quantile=None), rounds=2, task=mixed, evaluate_every=0)[-1].engine
    replica = engine.state.replica
    x = replica["proxies"]["x"].float() / 16
    logits = []
    for site in range(5):  # the models that sent the logits are the models that the sites kept
        at, _ = engine.workers.local.place(site, engine.state.tags[site])
        at.model.eval()
        with torch.no_grad():
            logits.append(at.model(x))
    assert replica["targets"]["ids"].tolist() == list(range(len(x)))
    assert torch.equal(replica["targets"]["logits"], torch.stack(logits).double().mean(0).float())


@pytest.mark.parametrize(
    ("ids", "shape"),
    [([0, 0], (2, 3)), ([1, 0], (2, 3)), ([0, 5], (2, 3)), ([-1, 0], (2, 3)), ([0], (2, 3)), ([0], (1, 4))],
    ids=["twice", "unordered", "unknown", "negative", "rows", "classes"],
)
def test_bad_replies_are_refused(ids: list[int], shape: tuple[int, ...]) -> None:
    replica = {"proxies": {"x": torch.zeros(5, 2)}, "targets": {"logits": torch.zeros(4, 3)}}
    good = reply(0, [0, 4], torch.zeros(2, 3)).message
    Predictions().check(good, replica)
    with pytest.raises(BadReply):
        Predictions().check(reply(0, ids, torch.zeros(shape)).message, replica)
    with pytest.raises(BadReply):
        Predictions().check(good, {})  # no proxies yet
    with pytest.raises(BadReply):
        Predictions().check(Message("proxies", {"proxies": {"x": torch.zeros(2, 2)}}), replica)


def test_sites_must_contribute_rows_of_one_format() -> None:
    rows = [torch.zeros(2, 3), torch.zeros(2, 4)]
    replies = [Reply(s, Message("proxies", {"proxies": {"x": x}})) for s, x in enumerate(rows)]
    with pytest.raises(BadReply, match="site 1 sent rows"):
        MaskedMean().combine(replies, context(None))


# ------------------------------------------------------------------------------------------------ rounds


def test_setup_asks_everyone_once_and_later_rounds_send_only_targets(run, mixed, digits_federation) -> None:  # type: ignore[no-untyped-def]
    method = QUICK_EDGEFD.but(select=Uniform(fraction=0.5))
    rows = run(method, rounds=4, task=mixed, evaluate_every=0)
    assert [len(r.up_bytes) for r in rows] == [5, 2, 2, 2]
    assert not any(r.refused or r.notes for r in rows)
    proxies = rows[-1].engine.state.replica["proxies"]
    owners = proxies["owner"].tolist()
    for site, data in enumerate(digits_federation.sites):
        mine = proxies["x"][proxies["owner"] == site]
        assert len(mine) == round(0.1 * len(data.train))
        own_rows = {t.numpy().tobytes() for t in data.train.column("x")}
        assert all(t.numpy().tobytes() in own_rows for t in mine)
    assert owners == sorted(owners)
    pool = proxies["x"].numel() + 4 * len(owners)
    seen: set[int] = set()
    for r, row in enumerate(rows[1:], 1):
        for site, size in row.down_bytes.items():
            # the proxies come with a site's first visit after the setup, and never again
            floor = 0 if site in seen else pool
            assert floor <= size <= floor + (r - 1) * len(owners) * 44 + 400 * r
            seen.add(site)


def test_only_kept_rows_go_up_and_owners_always_speak(run, mixed, two_classes) -> None:  # type: ignore[no-untyped-def]
    engine = run(QUICK_EDGEFD, rounds=2, task=mixed, federation=two_classes, evaluate_every=0)[-1].engine
    owner = engine.state.replica["proxies"]["owner"]
    for site in range(5):
        outcome = engine.workers.local.run(Job(site, 2, state_tag=engine.state.tags[site]))
        sent = outcome.message.parts["predictions"]
        ids = sent["ids"].tolist()
        assert set((owner == site).nonzero().flatten().tolist()) <= set(ids)
        assert len(ids) < 0.5 * len(owner)  # most proxies are of classes that this site never saw
        assert outcome.message.payload_bytes == len(ids) * (4 + 4 * 10)
        assert outcome.metrics["kept"] == len(ids) / len(owner)


def test_rows_that_nobody_kept_have_no_influence(run, mixed, digits_federation) -> None:  # type: ignore[no-untyped-def]
    engine = run(QUICK_EDGEFD, rounds=1, task=mixed, evaluate_every=0)[-1].engine
    worker, state = engine.workers.local, engine.state
    m = len(state.replica["proxies"]["x"])

    def visit(ids: list[int]) -> torch.Tensor:
        told = {
            "ids": torch.tensor(ids, dtype=torch.int32),
            "logits": 9 * torch.eye(10)[torch.tensor(ids) % 10],
        }
        worker.publish({**state.replica, "targets": told})
        return worker.run(Job(0, 1, state_tag=state.tags[0])).message.parts["predictions"]["logits"]

    seen: list[torch.Tensor] = []
    hook = worker.site_model(0).model.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().clone()) if module.training else None
    )
    first = visit(list(range(m // 2, m)))
    hook.remove()
    trained = {t.numpy().tobytes() for batch in seen for t in batch}
    x = state.replica["proxies"]["x"].float() / 16
    own = {t.numpy().tobytes() for t in digits_federation.sites[0].train.ready()["x"]}
    assert all(t.numpy().tobytes() in trained for t in x[m // 2 :])
    assert not any(t.numpy().tobytes() in trained - own for t in x[: m // 2])
    assert not torch.equal(first, visit(list(range(m))))


def test_public_proxies_let_nothing_private_leave_but_logits(run, mixed, two_classes) -> None:  # type: ignore[no-untyped-def]
    method = edgefd("public", training=QUICK, distil=QUICK, quantile=None).but(select=Uniform(fraction=0.5))
    rows = run(method, rounds=3, task=mixed, federation=two_classes, evaluate_every=0)
    assert [len(r.up_bytes) for r in rows] == [2, 2, 2]  # nobody has to be asked for proxies
    assert max(rows[0].up_bytes.values()) < 300
    replica = rows[-1].engine.state.replica
    public = {t.numpy().tobytes() for t in two_classes.public.column("x")}
    assert {t.numpy().tobytes() for t in replica["proxies"]["x"]} == public
    assert set(replica["proxies"]["owner"].tolist()) == {-1}
    assert len(replica["targets"]["ids"]) == 100
    with pytest.raises(RecipeError, match="public data"):
        run(method, task=mixed, federation=replace(two_classes, public=None))


def test_a_dry_visit_is_an_upper_bound(run, mixed) -> None:  # type: ignore[no-untyped-def]
    engine = run(QUICK_EDGEFD, rounds=2, task=mixed, evaluate_every=0)[-1].engine
    m = len(engine.state.replica["proxies"]["x"])
    dry, real = (engine.workers.local.run(Job(0, 2, state_tag=engine.state.tags[0], dry=d)) for d in (True, False))
    assert not dry.error
    assert dry.message.payload_bytes == m * 44 > real.message.payload_bytes
    assert dry.metrics["kept"] == 1.0
    assert dry.flops >= real.flops > 0
    worker = engine.workers.local
    worker.publish({})
    assert encoded_size(worker.run(Job(0, 0, dry=True)).message) == encoded_size(worker.run(Job(0, 0)).message)


@pytest.mark.parametrize("backend", [ProcessPool(workers=2)], ids=["processes"])
def test_processes_give_the_same_bits(run, mixed, backend) -> None:  # type: ignore[no-untyped-def]
    method = QUICK_EDGEFD.but(select=Uniform(fraction=0.5))
    here, there = (run(method, rounds=3, task=mixed, evaluate_every=0, **o)[-1] for o in ({}, {"backend": backend}))
    for part, tree in here.engine.state.replica.items():
        for name, t in tree.items():
            assert torch.equal(t, there.engine.state.replica[part][name])
    assert here.up_bytes == there.up_bytes


def test_codecs_work_on_logits_both_ways(run, mixed) -> None:  # type: ignore[no-untyped-def]
    plain, half = (
        run(m, rounds=3, task=mixed, evaluate_every=0)
        for m in (QUICK_EDGEFD, QUICK_EDGEFD.but(uplink=(Cast(),), downlink=(Cast(),)))
    )
    assert not any(r.refused or r.notes for r in half)
    assert sum(half[1].up_bytes.values()) < 0.7 * sum(plain[1].up_bytes.values())
    got = [r[-1].engine.state.replica["targets"] for r in (plain, half)]
    assert torch.equal(got[0]["ids"], got[1]["ids"])
    assert torch.allclose(got[0]["logits"], got[1]["logits"], atol=0.2)


def test_sites_learn_classes_that_they_never_saw(run, mixed, two_classes) -> None:  # type: ignore[no-untyped-def]
    def accuracy(method) -> float:  # type: ignore[no-untyped-def]
        engine = run(method, rounds=10, task=mixed, federation=two_classes, evaluate_every=0)[-1].engine
        worker, tags = engine.workers.local, engine.state.tags
        scores = [mixed.evaluate(worker.place(s, tags[s])[0].model, two_classes.test)["accuracy"] for s in range(5)]
        return sum(scores) / 5

    filtered, unfiltered = (
        accuracy(QUICK_EDGEFD),
        accuracy(edgefd(training=QUICK, distil=QUICK, quantile=None)),
    )
    assert filtered > 0.5  # alone, a site that has two of ten classes cannot exceed 0.2
    assert filtered > unfiltered + 0.2
