"""Clips of sliding images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.core.errors import DataError
from atoll.data.source import fitted
from atoll.data.sources.digits import Digits
from atoll.data.sources.moving_images import MovingImages, slide
from atoll.data.sources.sklearn_table import SklearnTable


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(6, 9), st.integers(1, 9), st.data())
def test_an_image_goes_straight_on_and_turns_back_at_the_edges(
    h: int, w: int, side: int, frames: int, data: st.DataObject
) -> None:
    x = torch.randint(1, 255, (2, 3, h, w), dtype=torch.uint8)
    start = [(data.draw(st.integers(0, side - h)), data.draw(st.integers(0, side - w))) for _ in range(2)]
    speed = [(data.draw(st.integers(-4, 4)), data.draw(st.integers(-4, 4))) for _ in range(2)]
    clip = slide(x, side, frames, torch.tensor(start), torch.tensor(speed))
    assert clip.shape == (2, 3 * frames, side, side)
    assert clip.dtype == torch.uint8
    for i in range(2):
        place, pace = list(start[i]), list(speed[i])
        for f in range(frames):
            frame = clip[i, 3 * f : 3 * f + 3]
            y, z = place
            assert torch.equal(frame[:, y : y + h, z : z + w], x[i])
            assert int(frame.sum()) == int(x[i].sum())  # and nothing else is there
            for axis, size in enumerate((h, w)):  # one pixel at a time
                for _ in range(abs(pace[axis])):
                    step = 1 if pace[axis] > 0 else -1
                    if not 0 <= place[axis] + step <= side - size:
                        pace[axis], step = -pace[axis], -step
                    place[axis] += step


def test_clips_of_digits_are_the_same_each_time_and_each_other_seed_is_another() -> None:
    first, again = MovingImages().load().train, MovingImages().load().train
    assert torch.equal(first.column("x"), again.column("x"))
    assert first.column("x").shape == (1797, 8, 16, 16)
    assert first.info.shape == (8, 16, 16)
    digits = Digits().load().train
    assert torch.equal(first.column("y"), digits.column("y"))
    assert torch.equal(first.column("x").long().sum((2, 3)), digits.column("x").long().sum((2, 3)).expand(-1, 8))
    assert not torch.equal(first.column("x"), MovingImages(seed=1).load().train.column("x"))
    moved = (first.column("x")[:, 1:] != first.column("x")[:, :-1]).flatten(2).any(2)
    assert moved.float().mean() > 0.95  # between two frames that lie on both sides of a turn it may stand


def test_mean_and_scale_follow_from_those_of_the_images() -> None:
    data = MovingImages().load().train
    x = data.ready()["x"]
    assert float(x.mean()) == pytest.approx(0, abs=1e-3)
    assert float(x.std()) == pytest.approx(1, abs=1e-3)
    # Also where they were taken of the rows, colour by colour.
    digits = Digits().load().train
    info = fitted(digits.info, [digits])
    moving = MovingImages(frames=3)._described(info)
    assert moving.mean.shape == moving.scale.shape == (3, 1, 1)
    assert float(moving.mean[0, 0, 0]) == pytest.approx(float(data.info.mean), rel=1e-3)
    assert float(moving.scale[2, 0, 0]) == pytest.approx(float(data.info.scale), rel=1e-3)


def test_what_cannot_move_is_refused() -> None:
    with pytest.raises(DataError, match="8 x 8 pixels and no room to move on a ground of 8 x 8; set a larger `side`"):
        MovingImages(side=8).load()
    with pytest.raises(DataError, match="slides images"):
        MovingImages(SklearnTable("iris")).load()
