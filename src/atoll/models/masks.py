"""Choosing what to keep: entries of tensors by a threshold, blocks under a budget; and masks as bits."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from atoll.core.errors import MessageError
from atoll.core.tree import Tree, flatten, numel


def keep_highest(scores: Mapping[str, Tensor], drop: float, never: Mapping[str, Tensor] | None = None) -> Tree:
    """Masks that keep all but ``floor(drop * D)`` of the D entries, those with the lowest scores of all tensors.

    Each tensor keeps at least its best entry, so that no layer falls silent. Of equal scores the first go first.

    Args:
        scores: any shapes.
        drop: fraction of all entries, in [0, 1).
        never: entries (True) that must not be kept, whatever they score. They count among the dropped ones.
    """
    flat, best, at = flatten({n: t.detach().double().cpu() for n, t in scores.items()}), [], 0
    for t in scores.values():
        best += [at + int(flat[at : at + t.numel()].argmax())] if t.numel() else []
        at += t.numel()
    flat[best] = math.inf
    count = math.floor(drop * len(flat) + 1e-9)
    if never:
        out = flatten({n: t.cpu() for n, t in never.items()})
        flat[out] = -math.inf
        count = max(count, int(out.sum()))
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[flat.argsort(stable=True)[: min(count, len(flat) - len(best))]] = False
    return _like(kept, scores)


def knapsack(scores: Sequence[float], sizes: Sequence[int], budget: int, always: Collection[int] = ()) -> list[bool]:
    """Which blocks to keep: those of ``always``, then by falling score every one that still fits ``budget``.

    Greedy: near the best sum of scores when blocks are small beside the budget. Of equal scores the first goes first.
    """
    left = budget - sum(sizes[i] for i in always)
    kept = [i in always for i in range(len(sizes))]
    for i in sorted(range(len(sizes)), key=lambda i: -scores[i]):
        if not kept[i] and sizes[i] <= left:
            kept[i], left = True, left - sizes[i]
    return kept


def straight_through(choice: Tensor, scores: Tensor) -> Tensor:
    """``choice`` in value, while the gradient goes to ``scores`` as if nothing had been chosen."""
    return choice + (scores - scores.detach())


def pack_bits(masks: Mapping[str, Tensor]) -> Tensor:
    """All masks one after the other at a bit an entry, lowest first: uint8 [ceil(D / 8)]."""
    flat = flatten({n: t.cpu() for n, t in masks.items()})
    return torch.from_numpy(np.packbits(flat.bool().numpy(), bitorder="little"))


def unpack_bits(bits: Tensor, like: Mapping[str, Tensor]) -> Tree:
    """The inverse, on the device of ``like``, whose names and shapes it takes.

    Raises:
        MessageError: ``bits`` belongs to other shapes.
    """
    total = numel(dict(like))
    if bits.dtype != torch.uint8 or bits.shape != (-(-total // 8),):
        raise MessageError(f"A mask of {total:,} entries takes {-(-total // 8):,} bytes; got {list(bits.shape)}.")
    flat = np.unpackbits(bits.cpu().numpy(), count=total, bitorder="little")
    return _like(torch.from_numpy(flat).bool(), like)


def _like(flat: Tensor, like: Mapping[str, Tensor]) -> Tree:
    parts = flat.split([t.numel() for t in like.values()])
    return {n: part.view(t.shape).to(t.device) for part, (n, t) in zip(parts, like.items(), strict=True)}
