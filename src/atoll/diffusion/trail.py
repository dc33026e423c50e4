"""Checkpoints of one run, in order, as flat vectors: to go back along them, or to combine them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from atoll.core.errors import DataError
from atoll.core.tree import Tree, copy_, flatten, named_tensors, numel, unflatten
from atoll.models.weights import read_weights


def numbers(module: nn.Module) -> Tree:
    """Parameters and buffers that can be added up: counters and the like are no part of a trail."""
    return {name: t for name, t in named_tensors(module).items() if t.is_floating_point()}


def vector(module: nn.Module) -> Tensor:
    """A copy of a network's numbers ``[P]``, float32."""
    return torch.cat([t.reshape(-1).float() for t in numbers(module).values()])


def put(values: Tensor, module: nn.Module) -> None:
    """The inverse of :func:`vector`, in place; counters stay as they are."""
    own = numbers(module)
    with torch.no_grad():
        copy_(own, unflatten(values, own))


@dataclass(frozen=True)
class CheckpointTrail:
    """K checkpoints, the first one first.

    Args:
        rows: vectors ``[P]``, or one tensor ``[K, P]``. They are asked for one at a time, so they may lie on disk.
    """

    rows: Sequence[Tensor] | Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def files(cls, paths: Sequence[Path | str], like: nn.Module) -> CheckpointTrail:
        """Saved weights (``.safetensors``, or folders of saved models) of networks such as ``like``."""
        return cls(_Files(tuple(Path(p) for p in paths), like))

    def put(self, i: int, module: nn.Module) -> None:
        """Give a network the weights of checkpoint ``i``, from 0."""
        put(self.rows[i], module)

    def mix(self, coefficients: Tensor) -> Tensor:
        """``theta_1 + sum_i a_i (theta_i - theta_1)`` over i >= 2, in float32, one checkpoint at a time: what the
        coefficients ``[K]``, which sum to 1, make of the trail. Equal checkpoints give that checkpoint, to the bit.
        Statistics of batch normalisation are averaged as if they were weights, which they are not; count them anew."""
        first = self.rows[0]
        out = first.clone()
        for i, a in enumerate(coefficients.tolist()):
            if i:
                out.add_(self.rows[i] - first, alpha=a)
        return out


class _Files(Sequence[Tensor]):
    """Vectors that are read when they are asked for."""

    def __init__(self, paths: tuple[Path, ...], like: nn.Module) -> None:
        self.paths, self.like = paths, {name: t.shape for name, t in numbers(like).items()}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i):  # type: ignore[no-untyped-def]  # one vector; slices are not needed
        tree = read_weights(self.paths[i])
        for name, shape in self.like.items():
            if name not in tree or tree[name].shape != shape:
                raise DataError(
                    f"`{self.paths[i]}` is no checkpoint of this network: it has no `{name}` of {list(shape)}."
                )
        return flatten({name: tree[name].float() for name in self.like})


class Recorder(nn.Module):
    """Room for a trail within a training's state, so that a resumed run has it too.

    Args:
        count: checkpoints that fit, K.
        like: a network of their kind.
    """

    rows: Tensor

    def __init__(self, count: int, like: nn.Module) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(count, numel(numbers(like))))

    def write(self, i: int, module: nn.Module) -> None:
        self.rows[i] = vector(module)

    @property
    def trail(self) -> CheckpointTrail:
        return CheckpointTrail(self.rows)
