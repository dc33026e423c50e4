"""Who serves which condition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.core.errors import AtollError
from atoll.core.tree import copy_, named_tensors
from atoll.diffusion.condition_router import ConditionRouter, MultiStudent, routed
from atoll.diffusion.denoiser import Denoiser
from atoll.diffusion.exact import PlaneNet, exact_mixture
from atoll.diffusion.schedules import EDM

CLASSES = st.integers(2, 30).flatmap(
    lambda c: st.tuples(st.just(c), st.sets(st.integers(0, c - 1), min_size=1), st.integers(1, 6))
)


@settings(deadline=None)
@given(CLASSES, st.booleans())
def test_every_class_has_one_student_and_blocks_are_balanced(case: tuple[int, set[int], int], mixed: bool) -> None:
    classes, asked, count = case
    rows = torch.tensor(sorted(asked) * 2)
    shuffle = torch.Generator().manual_seed(1) if mixed else None
    if len(asked) < count:
        with pytest.raises(AtollError, match="cannot be split among"):
            ConditionRouter.of_classes(rows, classes, count, shuffle)
        return
    router = ConditionRouter.of_classes(rows, classes, count, shuffle)
    which = router(torch.arange(classes))
    assert which.shape == (classes,)
    assert ((which >= 0) & (which < count)).all(), "total, also for classes that nobody asks for"
    sizes = router(torch.tensor(sorted(asked))).bincount(minlength=count)
    assert int(sizes.min()) >= 1
    assert int(sizes.max() - sizes.min()) <= 1
    if not mixed:
        assert (which.diff() >= 0).all(), "neighbours stay together"


def test_classes_can_be_dealt_out_at_random() -> None:
    rows = torch.arange(10)
    dealt = ConditionRouter.of_classes(rows, 10, 2, torch.Generator().manual_seed(0))(rows)
    assert ConditionRouter.of_classes(rows, 10, 2)(rows).tolist() == [0] * 5 + [1] * 5
    assert (dealt.diff() < 0).any()
    assert torch.equal(dealt, ConditionRouter.of_classes(rows, 10, 2, torch.Generator().manual_seed(0))(rows))


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 4), st.integers(0, 99))
def test_embeddings_go_to_the_nearest_centroid(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.eye(6)[:count]
    of = torch.arange(40) % count
    rows = (centres[of] + torch.randn(40, 6, generator=generator)).reshape(40, 2, 3)
    router = ConditionRouter.of_embeddings(rows, count, seed)
    which = router(rows)
    assert len({(int(a), int(b)) for a, b in zip(of, which, strict=True)}) == count, "a student a cloud"
    fresh = (centres[of] + torch.randn(40, 6, generator=generator)).reshape(40, 2, 3)
    assert torch.equal(router(fresh), which), "embeddings that were never seen too"
    again = ConditionRouter(count, centroids=torch.zeros(count, 6))
    copy_(named_tensors(again), named_tensors(router))
    assert torch.equal(again(fresh), which), "the centroids are all there is to it"


def test_too_few_embeddings_are_refused() -> None:
    with pytest.raises(AtollError, match="2 different conditions cannot be split among 3"):
        ConditionRouter.of_embeddings(torch.eye(2).repeat(5, 1), 3, 0)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_rows_come_back_in_their_order(which: list[int]) -> None:
    at = torch.tensor(which)
    asked: list[int] = []

    def ask(k: int, rows: torch.Tensor) -> torch.Tensor:
        asked.extend(rows.tolist())
        assert (at[rows] == k).all()
        return torch.stack([10 * rows + k, rows], 1)

    out = routed(at, ask)
    assert sorted(asked) == list(range(len(which))), "each row is asked for once"
    assert out.tolist() == [[10 * i + k, i] for i, k in enumerate(which)]


def students(count: int = 2) -> list[Denoiser]:
    return [Denoiser(PlaneNet(2, 4, width=8), EDM(), "edm", classes=4) for _ in range(count)]


def test_several_students_are_one_denoiser() -> None:
    both = MultiStudent(students(), ConditionRouter.of_classes(torch.arange(4), 4, 2))
    x, t, cond = torch.randn(6, 2), torch.rand(6) + 0.1, torch.tensor([3, 0, 1, 2, 0, 3])
    out = both(x, t, cond)
    for i in range(6):
        own = both.students[int(cond[i]) // 2]
        torch.testing.assert_close(out[i], own(x[i : i + 1], t[i : i + 1], cond[i : i + 1])[0])
    both(x, t, torch.zeros(6, dtype=torch.int64)).square().sum().backward()
    assert any(p.grad is not None for p in both.students[0].parameters())
    assert all(p.grad is None for p in both.students[1].parameters()), "no other student learns from it"
    assert both(x, torch.tensor(2.0), cond).shape == x.shape


def test_a_mixture_is_served_in_parts() -> None:
    """Each knows its own classes alone; together they are the whole model."""
    means = torch.tensor([[0.0, 0], [1, 0], [2, 2], [3, 3]])
    whole = exact_mixture(means, 0.3, torch.arange(4))
    wrong = exact_mixture(means.flip(0), 0.3, torch.arange(4))
    router = ConditionRouter.of_classes(torch.arange(4), 4, 2)
    x, t, cond = torch.randn(8, 2), torch.full((8,), 0.7), torch.arange(8) % 4
    made = MultiStudent([whole, wrong], router)(x, t, cond)
    low = cond < 2
    assert torch.equal(made[low], whole(x, t, cond)[low])
    assert torch.equal(made[~low], wrong(x, t, cond)[~low])


def test_students_are_not_guided() -> None:
    both = MultiStudent(students(), ConditionRouter.of_classes(torch.arange(4), 4, 2))
    with pytest.raises(AtollError, match="sample them without guidance"):
        both.null(torch.arange(4))
    with pytest.raises(AtollError, match="classes 0 to 3"):
        both(torch.randn(1, 2), torch.ones(1), torch.tensor([4]))
