"""Which entries and blocks are kept, and masks as bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.core.errors import MessageError
from atoll.models.masks import keep_highest, knapsack, pack_bits, straight_through, unpack_bits


def tensors(seed, ties):  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(seed)
    draw = (lambda *s: torch.randint(3, s, generator=g).float()) if ties else (lambda *s: torch.rand(s, generator=g))
    return {"a": draw(4, 5), "b": draw(3), "c": draw(2, 3, 2), "one": draw(1)}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.booleans(), st.floats(0, 0.85))
def test_the_lowest_of_all_tensors_together_go_and_each_tensor_keeps_its_best(seed, ties, drop):
    scores = tensors(seed, ties)
    masks = keep_highest(scores, drop)
    kept, all_scores = (torch.cat([t.flatten() for t in tree.values()]) for tree in (masks, scores))
    assert int((~kept).sum()) == math.floor(drop * len(kept) + 1e-9)
    best = torch.cat([(t == t.max()).flatten() for t in scores.values()])
    assert all(masks[n][scores[n] == scores[n].max()].any() for n in scores)
    if (~kept).any() and (kept & ~best).any():
        assert float(all_scores[~kept].max()) <= float(all_scores[kept & ~best].min()) or ties


def test_entries_that_must_go_count_among_the_dropped():
    scores = tensors(3, ties=False)
    never = {n: torch.zeros(t.shape, dtype=torch.bool) for n, t in scores.items()}
    never["a"][0] = True
    never["a"][1] = True
    few, many = keep_highest(scores, 0.1, never), keep_highest(scores, 0.5, never)
    assert not few["a"][:2].any()
    assert sum(int((~m).sum()) for m in few.values()) == 10
    assert sum(int((~m).sum()) for m in many.values()) == 18
    assert not many["a"][:2].any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 20)), min_size=1, max_size=12), st.integers(0, 120))
def test_blocks_never_weigh_more_than_the_budget_and_nothing_that_fits_stays_out(blocks, budget):
    scores, sizes = zip(*blocks, strict=True)
    kept = knapsack(scores, sizes, budget)
    used = sum(itertools.compress(sizes, kept))
    assert used <= budget
    assert all(size > budget - used for size, k in zip(sizes, kept, strict=True) if not k)
    assert budget < sum(sizes) or all(kept)


def test_blocks_with_high_scores_come_first_after_those_that_always_stay():
    assert knapsack([0.1, 0.7, 0.8, 0.9], [2, 3, 3, 2], 7, always=(0,)) == [True, False, True, True]
    assert knapsack([0.5, 0.5, 0.5], [1, 1, 1], 2) == [True, True, False]


def test_the_choice_is_the_value_and_the_gradient_goes_to_every_score():
    scores = torch.tensor([0.2, 0.9], requires_grad=True)
    out = straight_through(torch.tensor([0.0, 0.9]), scores)
    assert torch.equal(out, torch.tensor([0.0, 0.9]))
    (out * torch.tensor([3.0, 5.0])).sum().backward()
    assert torch.equal(scores.grad, torch.tensor([3.0, 5.0]))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 50))
def test_bits_bring_masks_back(seed):
    like = tensors(seed, ties=False)
    masks = {n: t > 0.5 for n, t in like.items()}
    bits = pack_bits(masks)
    assert bits.shape == (5,)  # 36 entries
    assert all(torch.equal(m, masks[n]) for n, m in unpack_bits(bits, like).items())


@pytest.mark.parametrize("bits", [torch.zeros(4, dtype=torch.uint8), torch.zeros(5), torch.zeros(1, 5).byte()])
def test_bits_of_other_shapes_are_refused(bits):
    with pytest.raises(MessageError, match="36 entries takes 5 bytes"):
        unpack_bits(bits, tensors(0, ties=False))
