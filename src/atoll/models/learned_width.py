"""Weights of a narrow network from those of a wide one, and back, by small convolutions that can be learned.

FedConv (Shen et al., 2024, arXiv 2502.20639). A weight is seen as S matrices ``[O, I]``, one for each place in
a convolution's window (or in an image that was flattened before a linear layer); a bias as one ``[O, 1]``. A kernel of
(O - O' + 1) x (I - I' + 1) takes a matrix to ``[O', I']``, the transposed convolution takes it back. All kernels start
as "leave it where it is": the first O' x I' entries, and zeros around them on the way back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.core.tree import Tree, named_tensors
from atoll.models.narrow import remove_units, units_of

Activation = Literal["identity", "leaky"]
AREA = 1024
"""Kernels over more entries than this are products of a column and a row."""
PLACES = 256
"""Of more places than this, one is not mixed with the others."""


def narrower(model: nn.Module, ratio: float) -> nn.Module:
    """A copy that keeps the first ``ratio`` of the units of every layer that can lose some (at least one)."""
    small = copy.deepcopy(model)
    for units in units_of(small):
        n = len(dict(small.named_parameters())[f"{units.layer}.weight"])
        remove_units(small, units, torch.arange(n) < max(1, round(ratio * n)))
    return small


@dataclass(frozen=True, slots=True)
class Widths:
    """Where a wide and a narrow network differ.

    Attributes:
        wide, narrow: shapes of all shared tensors.
        places: S of each tensor whose shape differs.
        counted: tensors that are not learned (running statistics): they are cut and padded.
    """

    wide: Mapping[str, torch.Size]
    narrow: Mapping[str, torch.Size]
    places: Mapping[str, int]
    counted: frozenset[str]

    @property
    def differ(self) -> list[str]:
        """Tensors that have kernels."""
        return [n for n in self.places if n not in self.counted]


def widths(wide: nn.Module, narrow: nn.Module) -> Widths:
    """Compare a network with a :func:`narrower` copy."""
    spread = {f"{reader}.weight": columns for units in units_of(wide) for reader, columns in units.readers}
    parameters = {n for n, _ in wide.named_parameters()}
    a, b = ({n: t.shape for n, t in named_tensors(m).items()} for m in (wide, narrow))
    places = {n: spread.get(n, 1) if len(s) < 3 else s[2:].numel() for n, s in a.items() if s != b[n]}
    return Widths(a, b, places, frozenset(a.keys() - parameters))


def matrices(t: Tensor, places: int) -> Tensor:
    """``[O, I, ...]`` or ``[O]`` -> ``[S, O, I]``."""
    return t.reshape(len(t), -1, places).permute(2, 0, 1)


def tensor(m: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`matrices`."""
    return m.permute(1, 2, 0).reshape(shape)


def first_kernels(w: Widths, mixing: bool) -> Tree:
    """Kernels that cut (or pad with zeros); ``mixing`` adds the 1 x 1 convolution over places, which starts at zero."""
    out: Tree = {}
    for name in w.differ:
        s = w.places[name]
        size = [
            a - b + 1
            for a, b in zip(*(matrices(torch.empty(x[name]), s).shape[1:] for x in (w.wide, w.narrow)), strict=True)
        ]
        for part, (rows, columns) in _factors(*size).items():
            kernel = torch.zeros(s, 1, rows, columns)
            kernel[:, :, 0, 0] = 1
            out |= {f"{name}:{part}": kernel, f"{name}:{part}.length": torch.ones(s, 1, 1, 1)}
        if mixing and s <= PLACES:
            out[f"{name}:mix"] = torch.zeros(s, s)
    return out


def _factors(rows: int, columns: int) -> dict[str, tuple[int, int]]:
    whole = rows * columns <= AREA
    return {"kernel": (rows, columns)} if whole else {"column": (rows, 1), "row": (1, columns)}


def _kernels(kernels: Tree, name: str) -> list[Tensor]:
    """A tensor's kernels, in the order of their use, each of the learned length (weight normalisation)."""
    found = [f"{name}:{part}" for part in ("kernel", "column", "row") if f"{name}:{part}" in kernels]
    return [
        kernels[n] * (kernels[f"{n}.length"] / torch.linalg.vector_norm(kernels[n], dim=(1, 2, 3), keepdim=True))
        for n in found
    ]


def compress(kernels: Tree, wide: Tree, w: Widths, activation: Activation) -> Tree:
    """The narrow network's tensors: differentiable in ``kernels``, and views of ``wide`` where shapes are equal."""
    out = {}
    for name, t in wide.items():
        shape = w.narrow[name]
        if name in w.counted and name in w.places:
            out[name] = t[: shape[0]]
        elif name in w.places:
            m = matrices(t, w.places[name])
            mix = kernels.get(f"{name}:mix")
            m = m if mix is None else m + torch.einsum("st,toi->soi", mix, m)
            for kernel in _kernels(kernels, name):
                m = F.conv2d(m[None], kernel, groups=len(m))[0]
            out[name] = tensor(activate(m, activation), shape)
        else:
            out[name] = t
    return out


def activate(x: Tensor, activation: Activation) -> Tensor:
    """x, or for "leaky" the paper's 0.85 x above zero and 0.001 x below."""
    return x if activation == "identity" else torch.where(x > 0, 0.85 * x, 0.001 * x)


def dilate(kernels: Tree, narrow: Tree, w: Widths) -> Tree:
    """The wide network's tensors: differentiable in ``kernels``, and views of ``narrow`` where shapes are equal."""
    out = {}
    for name, t in narrow.items():
        shape = w.wide[name]
        if name in w.counted and name in w.places:
            out[name] = F.pad(t, (0, shape[0] - len(t)))
        elif name in w.places:
            m = matrices(t, w.places[name])
            for kernel in reversed(_kernels(kernels, name)):
                m = F.conv_transpose2d(m[None], kernel, groups=len(m))[0]
            out[name] = tensor(m, shape)
        else:
            out[name] = t
    return out


def reached(kernels: Tree, narrow: Tree, w: Widths) -> Tree:
    """1 for entries of the wide network to which an entry of the narrow one contributes in :func:`dilate`, else 0."""
    every = dilate({n: t.abs() for n, t in kernels.items()}, {n: torch.ones_like(t) for n, t in narrow.items()}, w)
    return {n: (t > 0).to(t.dtype) for n, t in every.items()}
