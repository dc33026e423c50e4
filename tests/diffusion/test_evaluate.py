"""Distances between sets of samples, and the classifier whose features they are measured in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.core.errors import DataError
from atoll.core.streams import stream
from atoll.data.dataset import Dataset, Info
from atoll.diffusion.distiller import Images
from atoll.diffusion.evaluate import (
    Judge,
    Reference,
    as_pixels,
    evaluate_samples,
    frechet,
    judge_generator,
    kernel_distance,
    make_judge,
    precision_recall,
    within_class_variance,
)


def cloud(n: int, *name: str | int, at: float = 0.0, dims: int = 4) -> Tensor:
    return at + torch.randn(n, dims, generator=stream(0, *name), dtype=torch.float64)


@given(seed=st.integers(0, 1000), rank=st.sampled_from([2, 6, 20]))
@settings(max_examples=15, deadline=None)
def test_frechet_agrees_with_a_matrix_square_root(seed: int, rank: int) -> None:
    from scipy.linalg import sqrtm

    a, b = (cloud(rank, name, seed, dims=6) for name in ("a", "b"))
    cov_a, cov_b = a.T @ a / rank + 1e-6 * torch.eye(6), b.T @ b / rank + 1e-6 * torch.eye(6)
    root = np.real(sqrtm(cov_a.numpy() @ cov_b.numpy()))
    expected = float((a[0] - b[0]).square().sum()) + float(cov_a.trace() + cov_b.trace()) - 2 * np.trace(root)
    assert frechet(a[0], cov_a, b[0], cov_b) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert frechet(a[0], cov_a, a[0], cov_a) == pytest.approx(0.0, abs=1e-5)


def test_frechet_of_round_gaussians_is_by_hand() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    assert frechet(zero, eye, one, 4 * eye) == pytest.approx(3 + 3 * (2 - 1) ** 2)


def test_the_kernel_distance_is_unbiased() -> None:
    """Around 0 for equal laws, on both sides of it; a plain loop agrees."""
    found = torch.tensor([kernel_distance(cloud(30, "x", i), cloud(40, "y", i)) for i in range(200)])
    assert abs(float(found.mean())) < 3 * float(found.std()) / 200**0.5
    assert 0.2 < float((found < 0).float().mean()) < 0.8
    shifted = [kernel_distance(cloud(30, "x", i), cloud(40, "y", i, at=1.0)) for i in range(20)]
    assert min(shifted) > float(found.std())
    a, b = cloud(5, "a"), cloud(6, "b")

    def k(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 4 + 1) ** 3)

    slow = sum(k(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
    slow += sum(k(b[i], b[j]) for i in range(6) for j in range(6) if i != j) / 30
    slow -= 2 * sum(k(x, y) for x in a for y in b) / 30
    assert kernel_distance(a, b) == pytest.approx(slow)


def test_precision_and_recall_of_clouds() -> None:
    left, right = cloud(300, "left", at=-20), cloud(300, "right", at=20)
    assert precision_recall(left, right) == (0.0, 0.0)
    both = torch.cat([left, right])
    more = cloud(300, "more", at=-20)
    precision, recall = precision_recall(both, more)  # half of the modes
    assert precision > 0.8
    assert 0.35 < recall < 0.52
    precision, recall = precision_recall(more, both)  # half of it is nowhere near
    assert 0.35 < precision < 0.52
    assert recall > 0.8
    same = precision_recall(left, more)
    assert min(same) > 0.8


def test_each_point_has_its_own_ball() -> None:
    """The third neighbour sets the radius: by hand on a line."""
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0]])  # radii 3, 2, 2, 3, 99
    made = torch.tensor([[5.9], [6.1], [-3.0], [200.0], [0.5]])
    inside = [True, True, True, False, True]  # 6.1 lies in the ball of 100
    assert precision_recall(real, made)[0] == pytest.approx(sum(inside) / 5)


def test_variance_within_classes_ignores_their_means() -> None:
    x = torch.cat([cloud(500, "a", at=0), cloud(500, "b", at=50)])
    y = torch.arange(2).repeat_interleave(500)
    assert within_class_variance(x, y) == pytest.approx(4.0, abs=0.3)
    assert within_class_variance(x[:1], y[:1]) == 0.0


# ------------------------------------------------------------------------------------------- the judge


@pytest.fixture(scope="module")
def judged(digit_images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Judge]]:
    """A cache, and the judge that was trained into it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        torch.set_num_threads(1)
        yield folder, make_judge(digit_images)


class Trained(Exception):
    pass


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise Trained

    monkeypatch.setattr("torch.optim.Adam", refuse)


def test_it_knows_the_digits(judged: tuple[Path, Judge], digit_images: Images) -> None:
    x, y = digit_images.all()
    assert float((judged[1](x).argmax(1) == y).float().mean()) > 0.97
    assert judged[1].features(x[:2]).shape == (2, 64)
    assert not any(p.requires_grad for p in judged[1].parameters())


@pytest.mark.usefixtures("no_training")
def test_it_is_trained_once_per_what_it_depends_on(judged: tuple[Path, Judge], digit_images: Images) -> None:
    folder, judge = judged
    again = make_judge(digit_images)
    assert all(torch.equal(a, b) for a, b in zip(judge.parameters(), again.parameters(), strict=True))
    assert len(list((folder / "atoll" / "judges").iterdir())) == 1
    for other in ({"seed": 1}, {"epochs": 4}):
        with pytest.raises(Trained):
            make_judge(digit_images, **other)
    for images in (Images(digit_images.data, 0.7), Images(digit_images.data, rows=torch.arange(99))):
        with pytest.raises(Trained):
            make_judge(images)


@pytest.mark.usefixtures("no_training")
def test_a_damaged_judge_is_trained_again(judged: tuple[Path, Judge], digit_images: Images) -> None:
    (path,) = (judged[0] / "atoll" / "judges").iterdir()
    raw = path.read_bytes()
    try:
        path.write_bytes(raw[:-9])
        with pytest.raises(Trained):
            make_judge(digit_images)
    finally:
        path.write_bytes(raw)


def test_what_it_cannot_judge_is_refused() -> None:
    table = Dataset({"x": torch.zeros(4, 3), "y": torch.zeros(4).long()}, Info(name="rows", shape=(3,), num_classes=2))
    with pytest.raises(DataError, match="`rows` has no classes or is no image set"):
        make_judge(Images(table))


def test_what_samples_are_worth(judged: tuple[Path, Judge], digit_images: Images) -> None:
    reference = Reference.of(digit_images, judged[1])
    x, y = digit_images.all()
    rows = torch.randperm(len(x), generator=stream(0, "rows"))[:700]
    real = evaluate_samples(reference, x[rows], y[rows])
    assert real["fid"] < 0.02 * reference.spread
    assert real["agreement"] > 0.97
    assert min(real["precision"], real["recall"]) > 0.9
    assert real["diversity"] == pytest.approx(1.0, abs=0.15)
    noise = evaluate_samples(reference, 0.5 * torch.randn(x[rows].shape, generator=stream(1, "noise")), y[rows])
    assert noise["fid"] > 10 * real["fid"]
    assert noise["kid"] > 10 * abs(real["kid"])
    assert noise["agreement"] < 0.4
    wrong = evaluate_samples(reference, x[rows], (y[rows] + 1) % 10)
    assert wrong["agreement"] < 0.03
    assert wrong["fid"] == pytest.approx(real["fid"])
    first = torch.stack([x[y == c][0] for c in range(10)])
    collapsed = evaluate_samples(reference, first[y[rows]], y[rows])
    assert collapsed["diversity"] < 1e-6
    assert collapsed["recall"] < 0.3 < 0.9 < collapsed["precision"]
    broken = evaluate_samples(reference, torch.full_like(x[:300], float("nan")), y[:300])
    assert all(np.isfinite(v) for v in broken.values())
    assert broken["fid"] > 10 * real["fid"]


def test_a_generator_is_asked_for_all_classes_from_fixed_noise(
    judged: tuple[Path, Judge], digit_images: Images
) -> None:
    reference, seen = Reference.of(digit_images, judged[1]), []
    x, y = digit_images.all()

    def generate(z: Tensor, cond: Tensor, generator: torch.Generator) -> Tensor:
        seen.append((z, cond, torch.rand(1, generator=generator)))
        return torch.stack([x[y == c][i % 50] for i, c in enumerate(cond)])

    found, made = judge_generator(reference, generate, (1, 8, 8), torch.arange(10), samples=120, batch=50)
    again, same = judge_generator(reference, generate, (1, 8, 8), torch.arange(10), samples=120, batch=50)
    assert torch.equal(made, same)
    assert [len(z) for z, _, _ in seen] == [50, 50, 20] * 2
    for (z, cond, r), (z2, cond2, r2) in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(z, z2)
        assert torch.equal(cond, cond2)
        assert torch.equal(r, r2)
    assert torch.bincount(torch.cat([c for _, c, _ in seen[:3]])).tolist() == [12] * 10
    assert found["agreement"] > 0.95
    assert found["cpu_seconds_per_1000"] > 0
    assert {k: v for k, v in found.items() if "seconds" not in k} == {
        k: v for k, v in again.items() if "seconds" not in k
    }


def test_pixels_undo_the_scaling() -> None:
    grey = torch.rand(3, 1, 4, 5, generator=stream(0, "grey"))
    pixels = as_pixels((grey - 0.3) / 0.2 * 0.5, 0.3, 0.2, 0.5)
    assert pixels.shape == (3, 4, 5, 1)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels[..., 0].astype(float) - 255 * grey[:, 0].numpy()).max() <= 0.51
    assert as_pixels(torch.full((1, 3, 2, 2), 9.0), 0.5, 0.5, 0.5).min() == 255
