"""Clips of sliding images: the smallest video there is, from any image source."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from atoll.core.errors import DataError
from atoll.core.streams import stream
from atoll.data.dataset import Dataset, Info
from atoll.data.source import Loaded, Source
from atoll.data.sources.digits import Digits


def slide(x: Tensor, side: int, frames: int, start: Tensor, speed: Tensor) -> Tensor:
    """Images ``[N, C, h, w]`` as clips ``[N, frames * C, side, side]`` on a ground of zeros; frames lie one after the
    other in the channels.

    Args:
        start: where the upper left corner is at first ``[N, 2]``, within the room that there is.
        speed: whole pixels a frame, down and to the right ``[N, 2]``; at the edges images turn back.
    """
    n, channels, h, w = x.shape
    room = torch.tensor([side - h, side - w])
    out = x.new_zeros(n, frames, channels, side, side)
    rows = torch.arange(n)[:, None, None, None]
    colours = torch.arange(channels)[None, :, None, None]
    for f in range(frames):
        along = (start + f * speed).remainder((2 * room).clamp(min=1))
        corner = torch.minimum(along, 2 * room - along)  # there and back again
        y = (corner[:, :1] + torch.arange(h))[:, None, :, None]
        out[:, f][rows, colours, y, (corner[:, 1:] + torch.arange(w))[:, None, None]] = x
    return out.flatten(1, 2)


@dataclass(frozen=True)
class MovingImages(Source):
    """Each image of another source slides over a larger ground, from a random place at a random speed; a clip's frames
    are its channels, so whatever takes images takes clips. Classes and further columns stay.

    Args:
        source: images whose ground is 0, as digits and garments on black.
        frames: of a clip.
        side: of the ground, in pixels.
        fastest: pixels a frame, at most, in each direction.
        seed: of places and speeds.
    """

    source: Source = field(default_factory=Digits)
    frames: Annotated[int, Ge(2)] = 8
    side: Annotated[int, Ge(2)] = 16
    fastest: Annotated[int, Ge(1)] = 2
    seed: int = 0

    def load(self) -> Loaded:
        loaded = self.source.load()
        parts = {"train": loaded.train, "test": loaded.test}
        return replace(loaded, **{n: self._moved(d, n) for n, d in parts.items() if d is not None})  # type: ignore[arg-type]

    def _moved(self, data: Dataset, part: str) -> Dataset:
        info = data.info
        if info.kind != "image" or len(info.shape) != 3:
            raise DataError(f"`moving_images` slides images; `{info.name}` has none. Use digits or fashion_mnist.")
        if max(info.shape[1:]) >= self.side:
            raise DataError(
                f"Images of `{info.name}` have {info.shape[1]} x {info.shape[2]} pixels and no room to move on a "
                f"ground of {self.side} x {self.side}; set a larger `side`."
            )
        g = stream(self.seed, "moving images", part)
        room = torch.tensor([self.side - n for n in info.shape[1:]])
        start = (torch.rand(len(data), 2, generator=g) * (room + 1)).long()
        speed = torch.randint(-self.fastest, self.fastest + 1, (len(data), 2), generator=g)
        speed[(speed == 0).all(1), 1] = 1  # nothing stands still
        x = slide(data.column("x"), self.side, self.frames, start, speed)
        columns = {**{n: data.column(n) for n in data.columns}, "x": x}
        return Dataset(columns, self._described(info))

    def _described(self, info: Info) -> Info:
        """Sliding moves pixels and adds zeros, so mean and scale of clips follow from those of images."""
        part = info.shape[1] * info.shape[2] / self.side**2

        def tiled(v: Tensor | float) -> Tensor | float:
            return v.repeat(self.frames, 1, 1) if isinstance(v, Tensor) and v.dim() == 3 else v

        mean, scale = tiled(info.mean), tiled(info.scale)
        spread = (part * (scale**2 + mean**2) - (part * mean) ** 2) ** 0.5
        shape = (self.frames * info.shape[0], self.side, self.side)
        return replace(info, name=f"moving {info.name}", shape=shape, mean=part * mean, scale=spread)
