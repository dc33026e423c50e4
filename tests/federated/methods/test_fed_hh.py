"""Heavy hitters: each person reports once, sums are unbiased, and the common tree helps."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from atoll.core.errors import AtollError, BadReply, RecipeError
from atoll.core.message import Message
from atoll.core.tree import equal
from atoll.data.dataset import Dataset, Federation, Info, SiteData
from atoll.data.federation import make_federation
from atoll.data.partitions.by_column import ByColumn
from atoll.data.sources.zipf_items import ZipfItems
from atoll.federated.backends.inline import Inline
from atoll.federated.backends.process_pool import ProcessPool
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.combine.sum_reports import SumReports
from atoll.federated.engine import federate
from atoll.federated.method import DeviceProfile, MergeContext, Reply
from atoll.federated.methods.fed_hh import fed_hh
from atoll.federated.privacy import spent
from atoll.federated.schedules.buffered import Buffered
from atoll.federated.select.uniform import Uniform
from atoll.federated.server.extend_trie import ExtendTrie
from atoll.federated.share.prefix_trie import Plan, PrefixTrie, best, frequent
from atoll.federated.visit import Job, Setup
from atoll.models.top_items import TopItems
from atoll.recipes.recipe import read_recipe
from atoll.recipes.run import reopen, start
from atoll.tasks.heavy_hitters import HeavyHitters

INSECURE = {"allow_insecure_test_seed": True}
RECIPE = {
    "data": {"name": "zipf_items", "people": 300, "companies": 3}, "partition": {"name": "by_column"}, "test": 0.0,
    "task": "heavy_hitters", "model": {"name": "top_items", "k": 4}, "rounds": 6,
    "method": {"name": "fed_hh", "k": 4, "levels": 6, "shared": 4, "test_seed": 1, **INSECURE},
}  # fmt: skip


def zipf(**options):  # type: ignore[no-untyped-def]
    federation = make_federation(ZipfItems(**options), ByColumn(), test=0.0, validation=0.0)
    return {"federation": federation, "task": HeavyHitters(federation.info, TopItems(10))}


@pytest.fixture(scope="module")
def small():  # type: ignore[no-untyped-def]
    return zipf(people=400, companies=4)


def go(world, method, rounds: int = 12, **options):  # type: ignore[no-untyped-def]
    rows = list(federate(method=method, rounds=rounds, evaluate_every=0, **world, **options))
    assert not any(r.refused or r.notes for r in rows)
    return rows


def counted(world, method, rounds: int):  # type: ignore[no-untyped-def]
    """The replies of every round."""
    found: list[list[Reply]] = []

    class Watched(SumReports):
        def combine(self, replies, context):  # type: ignore[no-untyped-def]
            found.append(list(replies))
            return super().combine(found[-1], context)

    go(world, method.but(combine=Watched(method.combine.privacy)), rounds)
    return found


# ------------------------------------------------------------------------------------------ privacy


def test_every_person_reports_exactly_once(small):
    rounds = counted(small, fed_hh(levels=6, shared=6), 8)
    for site in range(4):
        parts = [r.message.parts for replies in rounds for r in replies if r.site == site]
        assert sum(int(p["counts"]["reports"]) for p in parts[:6]) == 400
        assert parts[6:] == [{}, {}]  # nobody is left to ask
    local = fed_hh(levels=6, shared=6).local
    setup = Setup(**small, method=fed_hh(levels=6, shared=6), profiles=(DeviceProfile(),) * 4, seed=3)
    worker = Inline().open(setup).local
    worker.publish(setup.method.share.initial(None))
    for site in range(4):
        groups = [local.group(worker._enter(Job(site, r))[0]) for r in range(7)]
        assert torch.cat(groups).sort().values.tolist() == list(range(400))
        assert len(groups[6]) == 0


def test_people_without_a_candidate_report_the_last_value():
    rows = Dataset({"item": torch.tensor([0b1101, 0b0010, 0b0111, 0b1110])}, Info(name="bits", shape=(4,)))
    local = fed_hh(bits=4, levels=1, shared=1).local
    visit = SimpleNamespace(
        data=SimpleNamespace(train=rows), dry=False, seed=0, round=0, site=SimpleNamespace(site=0)
    )  # fmt: skip
    order = local.group(visit)
    values = local._values(visit, torch.tensor([0b11, 0b00]), 2)  # two of the four prefixes of two bits
    want = torch.tensor([0, 1, 2, 0])
    assert torch.equal(values, want[order])


def test_messages_to_the_server_hold_counts_alone(small):
    world = {**small, "task": replace(small["task"], network=TopItems(5))}
    for level, replies in enumerate(counted(world, fed_hh(levels=6, shared=3, k=5), 6)):
        for reply in replies:
            tensors = {f"{p}/{n}": t for p, tree in reply.message.parts.items() for n, t in tree.items()}
            assert all(t.dtype == torch.int64 for t in tensors.values())
            shared, last = {"counts/support", "counts/reports"}, {"top/items", "top/counts"}
            assert set(tensors) == (shared if level < 3 else last if level == 5 else set())


def test_bytes_are_those_of_the_candidates(small):
    rows = go(small, fed_hh(levels=6, shared=6), 2)
    engine = rows[-1].engine
    reply = engine.workers.local.run(Job(0, 2)).message
    candidates = len(engine.state.replica["trie"]["prefixes"]) * 16
    assert reply.payload_bytes == 8 * (candidates + 1 + 1)


def test_the_ledger_counts_a_run_once_and_an_insecure_one_as_infinite(small):
    method = fed_hh(privacy=2.5)
    assert spent(method, [], 4) == 0.0
    assert [spent(method, [(4, 4, True)] * n, 4) for n in (1, 12)] == [2.5, 2.5]
    assert spent(method, [(0, 3, True)], 4) == 2.5  # asked is spent, whatever arrived
    assert spent(fed_hh(test_seed=1, **INSECURE), [(1, 1, True)], 4) == math.inf


def test_noise_comes_from_the_operating_system(small):
    one, two = (go(small, fed_hh(), 1)[-1].engine for _ in range(2))
    replies = [e.workers.local.run(Job(0, 1)).message.parts["counts"]["support"] for e in (one, one, two)]
    assert not torch.equal(replies[0], replies[1])
    with pytest.raises(AtollError, match="allow_insecure_test_seed"):
        fed_hh(test_seed=3)


# ------------------------------------------------------------------------------------------ what it finds


def context(**values):  # type: ignore[no-untyped-def]
    return MergeContext(**{"round": 0, "replica": {}, "num_sites": 3, "seed": 0, "task": None, **values})


def test_sums_by_hand():
    """Two sites with groups of 10 of 100 and 20 of 60 people, three candidates and none of them."""
    supports, reports, people = [[4, 3, 2, 1], [5, 5, 5, 5]], [10, 20], [100, 60]
    replies = [
        Reply(i, Message("counts", {"counts": {"support": torch.tensor(s), "reports": torch.tensor(n)}}), N)
        for i, (s, n, N) in enumerate(zip(supports, reports, people, strict=True))
    ]
    found = SumReports(2.0).combine(replies, context()).parts["estimates"]
    e = math.exp(2.0)
    p, q = e / (e + 3), 1 / (e + 3)
    want = [
        sum(N / n * (s[c] - n * q) / (p - q) for s, n, N in zip(supports, reports, people, strict=True))
        for c in range(3)
    ]
    assert found["counts"].tolist() == pytest.approx(want, rel=1e-6)
    variance = sum((N / n) ** 2 * n * q * (1 - q) / (p - q) ** 2 for n, N in zip(reports, people, strict=True))
    assert float(found["variance"]) == pytest.approx(variance, rel=1e-6)


def test_lists_are_added_item_by_item():
    tops = [([7, 3, -1], [50, 20, 0]), ([3, 9, 7], [40, 30, 5])]
    replies = [
        Reply(i, Message("counts", {"top": dict(zip(("items", "counts"), map(torch.tensor, t), strict=True))}))
        for i, t in enumerate(tops)
    ]
    merged = SumReports().combine(replies, context())
    plan = Plan(bits=4, levels=2, shared=0, k=2)
    replica = PrefixTrie(plan).initial(None)
    broadcast, _ = ExtendTrie(plan).step(replica, {}, merged, context())
    top = broadcast.common.parts["top"]
    assert (top["items"].tolist(), top["counts"].tolist()) == ([3, 7], [60, 55])


def test_which_prefixes_are_kept():
    counts = torch.tensor([5.0, 100.0, 96.0, 30.0, 97.0, -3.0, 92.0])
    assert frequent(counts, 4.0, 2).tolist() == [1, 2, 4]  # above 97 - 4, and above 8
    assert frequent(counts, 60.0, 2).tolist() == [1, 4]  # 2 se = 120: none, but k are kept
    assert frequent(counts, 0.0, 1).tolist() == [1]
    assert len(frequent(torch.arange(90.0) / 1e6 + 100, 10.0, 10)) == 30  # all alike: 3 k at most


def test_children_continue_prefixes():
    plan = Plan(bits=5, levels=2, shared=2)
    assert (plan.length(1), plan.length(2)) == (3, 5)
    trie = {"prefixes": torch.tensor([1, 6]), "level": torch.tensor(1)}
    assert plan.children(trie).tolist() == [4, 5, 6, 7, 24, 25, 26, 27]


def test_the_list_is_ordered_and_holds_no_item_without_count():
    top = best(torch.tensor([9, 2, 5, 1]), torch.tensor([3.0, 8.0, 3.0, -1.0]), 4)
    assert top["items"].tolist() == [2, 5, 9, -1]
    assert top["counts"].tolist() == [8, 3, 3, 0]


@pytest.mark.parametrize("shared", [0, 8, 12])
def test_an_easy_distribution_is_recovered_with_its_counts(shared):
    """Twelve items, the top ten well apart from each other's neighbours: truth is found, and counts are right."""
    items = torch.tensor([3, 5, 1000, 77, 2**24 - 1, 2**20, 123456, 999999, 31337, 4242, 6, 8])
    share = torch.tensor([20, 18, 16, 14, 12, 10, 8, 7, 6, 5, 1, 1])
    column = items.repeat_interleave(share * 60)
    rows = Dataset({"x": torch.zeros(len(column), 1), "item": column}, Info(name="easy", shape=(1,)))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    none = rows.select([])
    sites = tuple(SiteData(rows.select(order[s::3]), none, none) for s in range(3))
    world = {"federation": Federation(sites, rows, info=rows.info), "task": HeavyHitters(rows.info, TopItems(10))}
    engine = go(world, fed_hh(privacy=8.0, shared=shared, test_seed=4, **INSECURE))[-1].engine
    assert engine.evaluate_global() == {"f1": 1.0, "ncr": 1.0}
    top = engine.state.replica["top"]
    truth = dict(zip(items.tolist(), (share * 60).tolist(), strict=True))
    for item, count in zip(top["items"].tolist(), top["counts"].tolist(), strict=True):
        assert count == pytest.approx(truth[item], abs=0.5 * truth[item])


def test_without_the_common_tree_less_is_found():
    def f1(shared: int) -> float:
        found = []
        for seed in range(3):
            world = zipf(people=3000, companies=6, seed=seed)
            engine = go(world, fed_hh(shared=shared, test_seed=seed, **INSECURE))[-1].engine
            found.append(engine.evaluate_global()["f1"])
        return sum(found) / 3

    assert f1(12) > f1(0) + 0.15


# ------------------------------------------------------------------------------------------ in a run


@pytest.mark.parametrize(
    "parts", [{}, {"select": Uniform(fraction=0.5)}, {"uplink": (Quantise(bits=8),)}], ids=["all", "half", "quantised"]
)
def test_two_processes_give_the_same_bits(small, parts):
    method = fed_hh(levels=4, shared=2, test_seed=2, **INSECURE).but(**parts)
    one, two = (go(small, method, 4, **more)[-1] for more in ({}, {"backend": ProcessPool(workers=2)}))
    for part, tree in one.engine.state.replica.items():
        assert equal(tree, two.engine.state.replica[part])
    assert (one.up_bytes, one.down_bytes) == (two.up_bytes, two.down_bytes)
    if "uplink" in parts:  # counts are whole numbers: no codec touches them
        plain = go(small, method.but(uplink=()), 4)[-1]
        assert equal(plain.engine.state.replica["top"], one.engine.state.replica["top"])


def test_schedules_that_do_not_wait_are_refused(small):
    with pytest.raises(RecipeError, match="Buffered"):
        go(small, fed_hh().but(schedule=Buffered(k=2)), 1)


@pytest.mark.parametrize("rounds", [2, 5])
def test_a_resumed_run_has_the_same_list(tmp_path, rounds):
    straight, _ = start(read_recipe(RECIPE), tmp_path / "a")
    whole = straight.go()
    broken, _ = start(read_recipe(RECIPE), tmp_path / "b")

    class Power(Exception):
        pass

    def cut(row):  # type: ignore[no-untyped-def]
        if row.round == rounds:
            raise Power

    with pytest.raises(Power):
        broken.go(cut)
    again = reopen(tmp_path / "b").go()
    assert again["metrics"] == whole["metrics"]
    assert again["up_bytes"] == whole["up_bytes"]
    files = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in "ab"]
    assert files[0] == files[1]


def test_a_plan_foresees_no_less_than_a_run_sends(tmp_path):
    run, foreseen = start(read_recipe(RECIPE), tmp_path / "a")
    done = run.go()
    assert foreseen.at_most
    assert foreseen.up_bytes >= done["up_bytes"]
    assert foreseen.down_bytes >= done["down_bytes"]


# ------------------------------------------------------------------------------------------ refusals


def reply(**parts):  # type: ignore[no-untyped-def]
    return Message("counts", {p: {n: torch.tensor(v) for n, v in tree.items()} for p, tree in parts.items()})


PLAN = Plan(bits=4, levels=2, shared=1, k=2)


@pytest.mark.parametrize(
    "bad",
    [
        {"counts": {"support": [1, 1, 1, 1], "reports": 9}}, {"counts": {"support": [1, 1, 1, 1, 10], "reports": 9}},
        {"counts": {"support": [1, -1, 1, 1, 1], "reports": 9}}, {"counts": {"support": [1, 1, 1, 1, 1], "reports": [9]}},
        {"counts": {"support": [1.0, 1, 1, 1, 1], "reports": 9}}, {"counts": {"support": [1, 1, 1, 1, 1]}},
        {"counts": {"support": [0] * 5, "reports": 1 << 50}}, {"top": {"items": [1, 2], "counts": [3, 4]}},
    ],
    ids=["short", "above all", "negative", "shape", "floats", "no reports", "huge", "too early"],
)  # fmt: skip
def test_impossible_counts_are_refused(bad):
    share = PrefixTrie(PLAN)
    replica = share.initial(None)
    share.check(reply(counts={"support": [1, 9, 0, 1, 1], "reports": 9}), replica)
    with pytest.raises(BadReply):
        share.check(reply(**bad), replica)


@pytest.mark.parametrize(
    "bad",
    [
        {"top": {"items": [1, 16], "counts": [3, 4]}}, {"top": {"items": [1, 1], "counts": [3, 4]}},
        {"top": {"items": [1, -2], "counts": [3, 4]}}, {"top": {"items": [1], "counts": [3]}},
        {"top": {"items": [1, 2], "counts": [3, 1 << 50]}}, {"counts": {"support": [1] * 5, "reports": 9}},
        {"top": {"items": [1, 2]}},
    ],
    ids=["bits", "twice", "negative", "short", "huge", "too late", "half"],
)  # fmt: skip
def test_impossible_lists_are_refused(bad):
    share = PrefixTrie(PLAN)
    replica = {**share.initial(None), "trie": {"prefixes": torch.tensor([1]), "level": torch.tensor(1)}}
    share.check(reply(top={"items": [15, -1], "counts": [3, 0]}), replica)
    share.check(reply(), replica)
    with pytest.raises(BadReply):
        share.check(reply(**bad), replica)


def test_mistakes_are_told_in_a_sentence(small):
    with pytest.raises(AtollError, match="shared <= levels"):
        fed_hh(shared=13)
    with pytest.raises(RecipeError, match="privacy"):
        read_recipe({"method": {"name": "fed_hh", "privacy": 0}})
    with pytest.raises(RecipeError, match="one `k`"):
        go(small, fed_hh(k=3), 1)
    rows = list(federate(method=fed_hh(bits=20, levels=10), rounds=1, evaluate_every=0, **small))
    assert len(rows[0].refused) == 4
    assert "whole numbers below 2^20" in str(rows[0].refused)


def test_the_oracle_of_sites_and_server_is_one():
    method = fed_hh(privacy=3.0)
    assert method.local.privacy == method.combine.privacy == 3.0
