"""Secret tensors that a model's function depends on, drawn so that nobody can foresee or repeat them."""

from __future__ import annotations

import math
import secrets

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from atoll.core.streams import numpy_stream
from atoll.models.passported import SECRET, passports

Uniform = NDArray[np.float64]


def unpredictable_uniform(count: int) -> Uniform:
    """Numbers in (0, 1) from the operating system's cryptographic generator."""
    words = np.frombuffer(secrets.token_bytes(8 * count), dtype=np.uint64)
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def draw_passports_(model: nn.Module, reach: int, test_seed: int | None = None, *name: str | int) -> None:
    """Give every guarded layer passports N(m, 1), in place; m is drawn once for each channel from -reach, ..., -1, 1,
    ..., reach.

    The means are what tells one owner's passports from another's, since layers average much of the rest away. The paper
    draws negative ones alone; then all passports point the same way, and a model does nearly as well with a stranger's.

    Args:
        reach: the more means there are, the harder they are to guess, and the more a layer saturates.
        test_seed: INSECURE. Numbers from the stream ``name`` of a seed that can be known.
    """
    stream = numpy_stream(test_seed, "passports", *name) if test_seed is not None else None

    def uniform(count: int) -> Uniform:
        return stream.random(count) + 2.0**-54 if stream is not None else unpredictable_uniform(count)

    for _, guarded in passports(model):
        for kind in SECRET:
            p = getattr(guarded, kind)
            mean = np.floor(uniform(p.shape[1]) * 2 * reach) - reach
            mean += mean >= 0  # there is no 0
            radius, angle = uniform(p.numel()), uniform(p.numel())  # Box and Muller
            normal = np.sqrt(-2.0 * np.log(radius)) * np.cos(2 * math.pi * angle)
            values = normal.reshape(p.shape) + mean.reshape(-1, *[1] * (p.dim() - 2))
            p.copy_(torch.from_numpy(values))
