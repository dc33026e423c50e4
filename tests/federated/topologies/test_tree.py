"""Aggregators between sites and server: a mean is a mean, bytes are counted, other combiners merge level by level."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from atoll.core.errors import RecipeError
from atoll.core.message import Message, encoded_size
from atoll.federated.combine.fixed_mean import FixedMean
from atoll.federated.combine.krum import Krum
from atoll.federated.combine.median import Median
from atoll.federated.combine.scatter_sum import ScatterSum
from atoll.federated.combine.weighted_mean import WeightedMean
from atoll.federated.method import MergeContext, Reply
from atoll.federated.methods.fedavg import fedavg
from atoll.federated.methods.fedkseed import fedkseed
from atoll.federated.methods.frl import frl
from atoll.federated.schedules.buffered import Buffered
from atoll.federated.topologies.star import Star
from atoll.federated.topologies.tree import Tree


def replies_of(sites, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        Reply(site, Message("delta", {"delta": {"w": torch.randn(3, 2, generator=g)}}), 1 + (7 * site) % 11)
        for site in sites
    ]


def context(num_sites):
    return MergeContext(0, {"weights": {"w": torch.zeros(3, 2)}}, num_sites, 0, None)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60), st.integers(2, 7), st.data(),
    st.sampled_from([WeightedMean(), WeightedMean(by="uniform"), FixedMean(count=5)]),
)  # fmt: skip
def test_any_tree_of_sums_is_the_star(num_sites, fan_out, data, combiner):
    sites = sorted(data.draw(st.sets(st.integers(0, num_sites - 1), min_size=1)))
    flat, none = Star().combine(combiner, replies_of(sites), context(num_sites))
    tree, carried = Tree(fan_out=fan_out).combine(combiner, replies_of(sites), context(num_sites))
    torch.testing.assert_close(tree.parts["delta"]["w"], flat.parts["delta"]["w"], rtol=1e-5, atol=1e-6)
    assert tree.kind == flat.kind
    assert none == 0
    assert (carried > 0) == (num_sites > fan_out)


def test_replies_are_not_changed_and_each_counts_once():
    replies = replies_of(range(9))
    before = [r.message.parts["delta"]["w"].clone() for r in replies]
    Tree(fan_out=2).combine(WeightedMean(), replies, context(9))
    assert all(torch.equal(r.message.parts["delta"]["w"], b) for r, b in zip(replies, before, strict=True))


def test_levels():
    assert Tree(fan_out=10).levels(10) == []
    assert Tree(fan_out=10).levels(11) == [2]
    assert Tree(fan_out=3).levels(28) == [10, 4, 2]
    assert Tree(fan_out=3).relays(28) == 16


def test_the_median_of_medians_by_hand():
    """Nine sites, three aggregators: sites 0, 1, 3, 4 lie, and with them two of the three medians."""
    values = [99.0, 99.0, 1.0, 99.0, 99.0, 2.0, 3.0, 4.0, 5.0]
    replies = [Reply(i, Message("delta", {"delta": {"w": torch.tensor([v])}})) for i, v in enumerate(values)]
    top, _ = Tree(fan_out=3).combine(Median(), replies, context(9))
    flat, _ = Star().combine(Median(), replies, context(9))
    assert top.parts["delta"]["w"].item() == 99.0
    assert flat.parts["delta"]["w"].item() == 5.0


def test_what_inner_links_carry(run, digits_federation):
    tree = Tree(fan_out=2)  # five sites: three aggregators, two above them
    row = run(fedavg().but(topology=tree), rounds=1)[0]
    flat = run(fedavg(), rounds=1)[0]
    assert (row.up_bytes, row.down_bytes) == (flat.up_bytes, flat.down_bytes)
    one = row.down_bytes[0]
    assert tree.relays(5) == 5
    payload = row.engine.state.broadcast.common.payload_bytes
    up = row.relayed_bytes - 5 * one
    assert 5 * payload <= up <= 5 * (one + 100)
    assert flat.relayed_bytes == 0


def test_a_run_ends_with_the_star_s_model_up_to_rounding(run):
    for method in (fedavg(), fedkseed(steps=3, pool=16)):
        flat = run(method, rounds=2)[-1].engine.state
        tree = run(method.but(topology=Tree(fan_out=2)), rounds=2)[-1].engine.state
        for ours, theirs in ((tree.replica, flat.replica), (tree.server, flat.server)):
            assert ours.keys() == theirs.keys()
            for part in theirs:
                for name, t in theirs[part].items():
                    torch.testing.assert_close(ours[part][name], t, rtol=1e-4, atol=1e-5)


def test_memory_holds_one_sum_a_level():
    """Replies are taken one by one: when the next is asked for, no more than a path of sums is alive."""
    alive, most = [0], [0]

    class Tracked(torch.Tensor):
        def __del__(self):
            alive[0] -= 1

    def stream():
        for i in range(64):
            w = torch.ones(2).as_subclass(Tracked)
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            yield Reply(i, Message("delta", {"delta": {"w": w}}))
            del w

    combined, _ = Tree(fan_out=4).combine(WeightedMean(by="uniform"), stream(), context(64))
    torch.testing.assert_close(torch.Tensor(combined.parts["delta"]["w"]), torch.ones(2))
    assert most[0] < 16


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (fedavg().but(topology=Tree(), schedule=Buffered(k=2)), "Buffered"),
        (frl().but(topology=Tree()), "another kind"),
        (fedavg().but(topology=Tree(fan_out=2), combine=Krum(f=1)), "children"),
    ],
)
def test_what_a_tree_cannot_do_is_refused(method, words, run):
    with pytest.raises(RecipeError, match=words):
        run(method, rounds=1)


def test_the_link_says_its_weight():
    replies = replies_of(range(4))
    _, carried = Tree(fan_out=2).combine(WeightedMean(), replies, context(4))
    w = {"delta": {"w": torch.zeros(3, 2)}}
    expected = sum(
        encoded_size(Message("delta", w, {"weight": float(sum(r.num_samples for r in pair))}))
        for pair in (replies[:2], replies[2:])
    )
    assert carried == expected


def test_what_counts_without_weight_does_so_in_a_tree():
    g = torch.Generator().manual_seed(0)
    replies = [
        Reply(i, Message("seed_scalars", {"steps": {
            "seeds": torch.randint(0, 8, (4,), generator=g, dtype=torch.int32), "scalars": torch.randn(4, generator=g),
        }}), 3 + i)
        for i in range(7)
    ]  # fmt: skip
    at = MergeContext(0, {"scalars": {"G": torch.zeros(8, dtype=torch.float64)}}, 7, 0, None)
    flat = Star().combine(ScatterSum(), replies, at)[0].parts["scalars"]
    tree = Tree(fan_out=2).combine(ScatterSum(), replies, at)[0].parts["scalars"]
    assert flat["visits"].sum() == 28
    for name, t in flat.items():
        torch.testing.assert_close(tree[name], t)
