"""Small networks that read samples and say something short of them: routers and reward models."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from atoll.models.unet import TimeAndClass


class SampleReader(nn.Module):
    """``(x [B, ...], time [B], cond) -> [B, outputs]``. The outputs start at zero.

    Images and clips, ``[..., H, W]``, go through three convolutions of stride 2 (leading dimensions are channels);
    whatever else, flattened, through dense layers of the same number.

    Args:
        shape: of one sample.
        outputs: numbers to say.
        cond: some rows of conditions, for their shape; of embeddings ``[B, ..., D]`` the mean over places is read.
        classes: how many classes ``cond`` names (the null class is one more); None: it holds embeddings.
        width: channels of the first convolution; dense layers have four times as many.
    """

    def __init__(
        self, shape: tuple[int, ...], outputs: int, cond: Tensor, classes: int | None, width: int = 16
    ) -> None:
        super().__init__()
        dim = 4 * width
        self.flat = len(shape) < 3
        self.embed = TimeAndClass(dim, classes or 0, 0)
        self.told = nn.Linear(cond.shape[-1], dim) if classes is None else None
        if self.flat:
            size = dim
            self.first: nn.Module = nn.Linear(math.prod(shape), dim)
            self.tell = nn.Linear(dim, dim)
            self.body = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        else:
            *channels, height, wide = shape
            size = 2 * width * math.ceil(height / 8) * math.ceil(wide / 8)
            self.first = nn.Conv2d(math.prod(channels), width, 3, stride=2, padding=1)
            self.tell = nn.Linear(dim, width)
            self.body = nn.Sequential(
                nn.SiLU(), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GroupNorm(4, 2 * width),
                nn.SiLU(), nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1), nn.SiLU(),
            )  # fmt: skip
        self.last = nn.Linear(size, dim)
        self.out = nn.Linear(dim, outputs)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        if self.told is None:
            e = self.embed(t, cond)
        else:
            embedding = cond.reshape(len(cond), -1, cond.shape[-1]).mean(1)
            e = self.embed(t, t.new_zeros(len(t)).long()) + self.told(embedding.to(x.dtype))
        told = self.tell(e)
        if self.flat:
            h = self.first(x.flatten(1)) + told
        else:
            h = self.first(x.reshape(len(x), -1, *x.shape[-2:])) + told[:, :, None, None]
        out: Tensor = self.out(F.silu(self.last(self.body(h).flatten(1))))
        return out
